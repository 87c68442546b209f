"""Device of the tests: the GPU if there is one, otherwise the CPU with Triton's interpreter.

With TRITOPT_PTX=90 (or 80, 100), and tests/ptx/plugin.py, kernels are compiled, and run in the PTX machine.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os

# Workers of pytest-xdist share the cores; threads of torch's would wait for each other in every square root.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if os.environ.get("TRITOPT_PTX"):
    os.environ["TRITON_INTERPRET"] = "0"
elif torch.cuda.is_available():
    torch.set_default_device("cuda")
else:
    # Read when kernels are imported, so before any test imports tritopt.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton"):
    from tritopt.tools.interpreter import speed_up

    speed_up()

# Rich asks it for the terminal's width, which differs from machine to machine.
os.environ["COLUMNS"] = "200"

# Fills what torch.empty returns with NaN: a value that nobody wrote shows.
torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports torch.compile too, in a second
torch.sparse.check_sparse_tensor_invariants.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist take groups in the order below, and not by their numbers of tests."""
    config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the tests themselves, a million objects that stay."""
    if not os.environ.get("TRITOPT_PTX"):  # where the machine asks the collector for tensors
        gc.collect()
        gc.freeze()
        # Tapes are another million, through which it would go in a tenth of the workers' time.
        gc.set_threshold(10_000, 10, 50)
        # Or objects of Triton's would outlive the interpreter, which complains. Not before pytest's last collections,
        # five of them, which would pass through it all.
        atexit.register(gc.unfreeze)


LONGEST = (
    "test_steps.py",
    "compiles",
    "ptx.test_kernels",
    "distributed",
    "tools.test_check",
    "optim.test_torch_parity",
)
"""Files and groups to begin with: at the end, one worker would wait for the other."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker of pytest-xdist run a whole file: its fixtures and caches are made once.

    First, since pytest-xdist writes groups into names here, too.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None and item.path.name != LONGEST[0]:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}.{item.path.stem}"))
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    marker = item.get_closest_marker("xdist_group")
    name = item.path.name if marker is None else marker.args[0]
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
