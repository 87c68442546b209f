"""Does `tritopt check` notice a broken formula, do tests on a stand-in of a GPU notice a broken host half, and those in
the PTX machine what only compiled code shows?

Breaks each on purpose, in a scratch copy, and looks.

`python -m tests.mutations [NAME ...]` prints a table; the exit code is 1 if a mutation survives.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


# What all optimizers share; one of each kind looks: (optimizer whose check must notice, kernel file, text that occurs
# once in it, {what is wrong: the text instead}). Formulas are broken by the MUTATIONS of the optimizers' own tests.
SHARED: list[tuple[str, str, str, dict[str, str]]] = [
    ("adamw", "adam.py", "(mean, var, s.epsilon)", {"epsilon inside the root": "(mean, var + s.epsilon, 0.0)"}),
    ("adamw", "adam.py", "s.beta2 * var", {"beta1 for beta2": "s.beta1 * var"}),
    (
        "sgd",
        "preambles.py",
        "add_decay(clip(rescale * g, bound), w, wd)",
        {
            "no decay": "clip(rescale * g, bound)",
            "decay is clipped": "clip(rescale * g + wd * w, bound)",
            "clips too early": "rescale * clip(g, bound) + wd * w",
            "never clips": "rescale * g + wd * w",
        },
    ),
    (
        "adamw",
        "preambles.py",
        "return clip(rescale * g, bound)\n",
        {"never clips": "return rescale * g\n", "never rescales": "return clip(g, bound)\n"},
    ),
    (
        "sgd",
        "ops.py",
        "return tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)",
        {"no lower clip bound": "return x"},
    ),
    ("sgd", "ops.py", "bits + 0x7FFF + ((bits >> 16) & 1)", {"bf16 cut off": "bits"}),
    ("sgd", "formats/weights.py", "tl.store(planes[1] + offsets, value, mask=mask)", {"master not stored": "pass"}),
    (
        "sgd",
        "formats/weights.py",
        "return _completed(weight, tl.load(planes[1] + offsets, mask=mask))",
        {"weight read for its master": "return _completed(weight, weight.to(tl.float32))"},
    ),
]

# What the host does on a GPU only: (tests that must notice, file of the package, and as above).
HOST: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "engine/test_cuda_steps",
        "engine/group.py",
        "return known.copy_(pinned(host), non_blocking=True)",
        {"one buffer for all uploads": "return known.copy_(group.staging[0].copy_(host), non_blocking=True)"},
    ),
    (
        "engine/test_cuda_steps",
        "engine/group.py",
        "group.device_table is None or group.stream != stream",
        {"one table for all streams": "group.device_table is None"},
    ),
    (
        "engine/test_cuda_steps",
        "engine/group.py",
        "share_with_streams(group.uploaded())",
        {"tables are freed to the first stream": "pass"},
    ),
    (
        "engine/test_cuda_steps",
        "engine/group.py",
        "return on_device(group.device)",
        {"launches on the current device": 'return on_device(torch.device("cpu"))'},
    ),
    (
        "engine/test_group",
        "engine/group.py",
        "is_dirty = is_dirty or is_capture or group.is_captured",
        {
            "captures upload what is new only": "is_dirty = is_dirty or group.is_captured",
            "steps read a graph's table": "is_dirty = is_dirty or is_capture",
        },
    ),
    (
        "engine/test_group",
        "engine/group.py",
        "group.captured.append((staging, made))",
        {"a graph's upload is freed": "pass"},
    ),
    (
        "engine/test_cuda_graphs",
        "engine/clip.py",
        "if is_capture or self._is_captured or known is None or stream != self._stream:",
        {"a bound that only another graph writes": "if known is None or stream != self._stream:"},
    ),
    (
        "engine/test_cuda_graphs",
        "optim/step/stepper.py",
        "self.of_graphs.append((step, self._planner.held(), self._clip.held(), self._tensors()))",
        {
            "a graph's tables are freed": "self.of_graphs.append((self._clip.held(), self._tensors()))",
            "a graph's scalars are freed": "self.of_graphs.append((step, self._planner.held(), self._clip.held()))",
        },
    ),
    (
        "engine/test_cuda_tuning",
        "engine/tuning/autotune.py",
        "if cached is None and wanted and is_capturing(group.device):",
        {"measures while a graph is captured": "if False:"},
    ),
]

# What only compiled code shows, in the PTX machine: (file of tests that are run there, file of the package, as above).
COMPILED: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "ptx/steps",
        "kernels/drivers/tables.py",
        "address_bits % 16 == 0",
        {"alignment is taken for granted": "address_bits == address_bits"},
    ),
    (
        "ptx/steps",
        "kernels/drivers/multi_tensor_apply.py",
        "ptrs, first, offsets, offsets < n_elements,",
        {"mask one too far": "ptrs, first, offsets, offsets <= n_elements,"},
    ),
    (
        "ptx/steps",
        "kernels/drivers/multi_tensor_apply.py",
        "n_here = tl.where(is_live, tl.minimum(n_elements - start, CHUNK_SIZE), 0)",
        {"chunks overlap": "n_here = tl.where(is_live, tl.minimum(n_elements - start, CHUNK_SIZE + 1), 0)"},
    ),
    (
        "ptx/steps",
        "engine/driver.py",
        '"num_warps": config.num_warps,\n            "enable_fp_fusion": False,',
        {"contracts to fma": '"num_warps": config.num_warps,\n            "enable_fp_fusion": True,'},
    ),
    (
        "ptx/steps",
        "engine/clip.py",
        '"BLOCK_SIZE": 1024, "enable_fp_fusion": False',
        {"a norm contracts to fma": '"BLOCK_SIZE": 1024, "enable_fp_fusion": True'},
    ),
    (
        "ptx/steps",
        "kernels/ops.py",
        "pack_of(max(x.numel, y.numel), n_nvidia_threads(), 4)\n        if n == 0:\n            return tl.div_rn(x, y)",
        {"approximate division": "0\n        if n == 0:\n            return x / y"},
    ),
    (
        "ptx/steps",
        "kernels/ops.py",
        "pack_of(x.numel, n_nvidia_threads(), 8)\n        if n == 0:\n            return tl.sqrt_rn(x)",
        {"approximate root": "0\n        if n == 0:\n            return tl.sqrt(x)"},
    ),
    (
        "ptx/steps",
        "tools/ptx/driver.py",
        "return machine, machine, 0, 0, 1024",
        {
            "a reduction without its first barrier": (
                'text = ptx.decode().replace("bar.sync", "bar.warp.sync -1; //", name == "sum_partials")\n'
                "        machine = Machine(parse(text), shared)\n"
                "        return machine, machine, 0, 0, 1024"
            )
        },
    ),
    (
        "ptx/addresses",
        "kernels/drivers/multi_tensor_apply.py",
        ".to(tl.int64) * CHUNK_SIZE",
        {"chunks begin below 2^31": ".to(tl.int32) * CHUNK_SIZE"},
    ),
    (
        "ptx/addresses",
        "kernels/drivers/multi_tensor_apply.py",
        "offsets = first + tl.arange(0, TAIL_SIZE)",
        {"offsets below 2^32": "offsets = first.to(tl.uint32) + tl.arange(0, TAIL_SIZE)"},
    ),
]


class Mutation(NamedTuple):
    """Replacement of one text by a wrong one."""

    optimizer: str
    """Name of the optimizer whose check must notice, or of a file of tests, in the folder of tests."""
    file: str
    """Path in the kernels' folder; for tests, in the package."""
    old: str
    wrong: str
    new: str


def collect() -> list[Mutation]:
    """The shared ones, those of each optimizer's tests, the host's, and those of compiled code."""
    entries = [*SHARED, *HOST, *COMPILED]
    for path in sorted((ROOT / "tests" / "optimizers").glob("test_*.py")):
        name = path.stem.removeprefix("test_")
        module = importlib.import_module(f"tests.optimizers.{path.stem}")
        entries.extend((name, *entry) for entry in getattr(module, "MUTATIONS", []))
    return [Mutation(name, file, old, wrong, new) for name, file, old, texts in entries for wrong, new in texts.items()]


class Outcome(NamedTuple):
    """Verdict of the check on a mutation."""

    caught: bool
    comment: str


def copy_checkout(to: Path) -> None:
    """The package and its tests, its symlink to the kernels included."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("tritopt", "kernels", "tests"):
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", to)


def path_of(mutation: Mutation, checkout: Path) -> Path:
    """The file that is mutated."""
    return checkout / ("tritopt" if _is_tests(mutation.optimizer) else "kernels") / mutation.file


def mutated(checkout: Path, mutation: Mutation) -> str:
    """Text of the file that is mutated; ValueError if what is replaced does not occur exactly once."""
    text = path_of(mutation, checkout).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times; it must occur once")
    return text.replace(mutation.old, mutation.new)


@contextmanager
def interpreted(mutation: Mutation) -> Iterator[None]:
    """Let this process's interpreter run the mutated file of kernels in place of the one that is imported."""
    name = f"tritopt.kernels.{mutation.file.removesuffix('.py').replace('/', '.')}"
    sound = vars(importlib.import_module(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.py"
        path.write_text(mutated(ROOT, mutation))
        spec = importlib.util.spec_from_file_location("mutated", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # The interpreter keeps what it has made of a function by that function.
        broken = {sound[key]: value for key, value in vars(module).items() if hasattr(value, "rewritten_fn")}
        made = next(iter(broken)).rewritten_fn
        kept = dict(made)
        made.update({function.fn: value.rewrite() for function, value in broken.items()})
    try:
        yield
    finally:
        made.clear()
        made.update(kept)


def run_check(name: str, mutation: Mutation | None) -> Outcome:
    """`tritopt check --quick` of one optimizer, or one file of tests, in a mutated copy of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        copy_checkout(checkout)
        if mutation is not None:
            path_of(mutation, checkout).write_text(mutated(checkout, mutation))
        run = _run(checkout, *_command(name))
    if _is_tests(name):
        if run.returncode not in (0, 1):
            raise RuntimeError(f"{name}, {mutation}: the tests did not run, exit code {run.returncode}\n{run.stdout}")
        return Outcome(run.returncode == 1, run.stdout.strip().rpartition("\n")[2])
    if run.returncode not in (0, 1) or not run.stdout.startswith("{"):
        raise RuntimeError(f"{name}, {mutation}: the check itself broke, exit code {run.returncode}\n{run.stderr}")
    rows = json.loads(run.stdout)["rows"]
    # A mutation that raises says nothing about the check: only a difference counts.
    noticed = [row["reason"] for row in rows if not row["passed"] and "differ by" in row["reason"]]
    return Outcome(run.returncode == 1 and bool(noticed), f"{len(noticed)} of {len(rows)} cases fail")


def _is_tests(name: str) -> bool:
    return "/" in name


def _is_compiled(name: str) -> bool:
    return name.startswith("ptx/")


def _command(name: str) -> tuple[str, ...]:
    if _is_tests(name):
        machine = ("-p", "tests.ptx.plugin") if _is_compiled(name) else ()
        return "pytest", "-q", "-x", *machine, "-p", "no:cacheprovider", f"tests/{name}.py"
    return "tritopt", "check", "--quick", "--json", "--jobs", "1", "--optimizer", name


def _run(checkout: Path, *module: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def main(names: list[str]) -> int:
    """Run the mutations of these optimizers, and print what became of them."""
    mutations = [mutation for mutation in collect() if mutation.optimizer in names]
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = dict(zip(names, pool.map(lambda name: run_check(name, None), names), strict=True))
        broken = [name for name, outcome in sound.items() if outcome.caught]
        if broken:
            console.print(f"the check of {', '.join(broken)} fails without any mutation; mend that first")
            return 1
        running = pool.map(lambda mutation: run_check(mutation.optimizer, mutation), mutations)
        progress = Console(stderr=True)
        outcomes = list(track(running, "mutations", len(mutations), console=progress, disable=not progress.is_terminal))
    table = Table("optimizer", "file", "wrong", "text", "outcome", "")
    for mutation, outcome in zip(mutations, outcomes, strict=True):
        verdict = "caught" if outcome.caught else "SURVIVED"
        table.add_row(*mutation[:2], mutation.wrong, mutation.new.strip() or "(nothing)", verdict, outcome.comment)
    console.print(table)
    survivors = sum(not outcome.caught for outcome in outcomes)
    console.print(f"{len(mutations) - survivors} of {len(mutations)} mutations caught; the unmutated checks pass")
    return 1 if survivors else 0


if __name__ == "__main__":
    known = sorted({mutation.optimizer for mutation in collect()})
    parser = argparse.ArgumentParser(description="Break formulas on purpose and see whether `tritopt check` notices.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"optimizers and tests: {', '.join(known)}")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - set(known):
        parser.error(f"no mutations of {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    sys.exit(main(chosen or known))
