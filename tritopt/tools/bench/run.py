"""A run of the bench: check first, then measure, and keep what is known as soon as it is."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import tritopt
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON, INTERPRETED, triton
from tritopt.mxnet.registry import with_api
from tritopt.tools import check
from tritopt.tools.bench import measure, peers
from tritopt.tools.bench.device import Device, Rehearsal
from tritopt.tools.bench.machine import commit, now
from tritopt.tools.bench.measure import OURS, Measurement
from tritopt.tools.bench.plan import MIXED, Item
from tritopt.tools.bench.shapes import MODELS, Shapes, miniature, suited
from tritopt.tools.bench.targets import judge
from tritopt.tools.storage import FORMATS, StorageFormat

MEMORY = 0.92
"""Share of the free memory that one set of tensors may take."""
PEER_RESIDENT = 16.0
"""Bytes per parameter that a peer needs, gradient included, unless ours beside it needs more."""
COPY_BYTES = 2**32
"""Bytes of the copy that tells the bandwidth, where memory allows."""
QUICKLY_MADE = ("resnet50", "tiny")
"""Models whose launches are counted once more, by a profiler, when all times are known."""
SECONDS = 0.2
"""Seconds to spend on each kind of times, for each item."""
FOR_COUNTS = 0.05
"""Share of the time given that is left for counting launches."""
AGAIN = 2.0
"""Seconds until a step that was stopped is stopped once more."""
NO_GPU = (
    "the bench needs a GPU that torch can use, and there is none: --host measures what needs none, and --rehearse "
    "goes through all of the bench on the CPU, with sizes and times that mean nothing"
)


def find_device(rehearse: bool) -> Device:
    """Find the GPU, or what pretends to be one. RuntimeError that says what to do where neither will do."""
    if not HAS_TRITON:
        raise RuntimeError(f"the bench needs {INSTALL_TRITON}")
    if rehearse:
        if not INTERPRETED:
            raise RuntimeError("a rehearsal runs kernels in Triton's interpreter: set TRITON_INTERPRET=1")
        return Rehearsal()
    if not torch.cuda.is_available():
        raise RuntimeError(NO_GPU)
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 keeps kernels off the GPU: unset it, or pass --rehearse")
    return Device()


def machine(device: Device) -> dict[str, Any]:
    """Describe the machine and the versions that the numbers belong to."""
    return {
        **device.describe(),
        "date": now(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "tritopt": tritopt.__version__,
        "commit": commit(),
        "peers": peers.versions(),
    }


def check_file(path: Path) -> None:
    """Raise ValueError for a path that nothing can be written to: before time is spent."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} must be a file in a folder that exists")


@dataclass
class Bench:
    """Everything that is measured, in order; a red check leaves its optimizer and format without numbers.

    Args:
        device: device that the tensors are on.
        items: cases to measure, as `plan` has them.
        seconds: time to spend altogether; what is left then is refused. None: no limit.
        clock: tells the time in seconds.
        seconds_each: time to spend on each kind of times, for each item, in seconds.
    """

    device: Device
    items: Sequence[Item]
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    seconds_each: float = SECONDS
    copy: float | None = None
    """Bytes per second, read and written, of torch's copy here; None until it was measured."""
    done: list[Measurement] = field(default_factory=list)
    _checked: dict[tuple[str, str], str | None] = field(default_factory=dict)
    """Reasons why checks were red, by optimizer and format; None: it was green."""
    _fitting: dict[tuple[str, str, str], tuple[Shapes | None, str | None]] = field(default_factory=dict)
    """Shapes that there is memory for, or None and the reason why not even the smallest fit, by case."""
    _started: float = 0.0

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds!r} must be positive, or None for no limit")
        self.machine = machine(self.device)

    def __len__(self) -> int:
        return len(self.items)

    def rows(self) -> Iterator[Measurement]:
        """Measure, and yield a row for each item as soon as it is known."""
        self._started = self.clock()
        for item in self.items:
            row = self._row(item)
            self.done.append(row)
            yield row
        self._count_kernels()

    @property
    def passed(self) -> bool:
        """Whether every check was green. A peer that failed is its own affair."""
        return not any(reason for reason in self._checked.values())

    def document(self) -> dict[str, Any]:
        """Collect for JSON all that is known so far."""
        note = {"warning": "a rehearsal: sizes are miniatures, and times mean nothing"} if self._pretends else {}
        return {
            "rehearsal": self._pretends,
            **note,
            "machine": self.machine,
            "copy_gb_per_s": None if self.copy is None else self.copy / 1e9,
            "complete": len(self.done) == len(self.items),
            "passed": self.passed,
            "rows": [asdict(row) for row in self.done],
            "targets": [verdict._asdict() for verdict in judge(self.done, self._pretends)],
        }

    def save(self, path: Path) -> None:
        """Write the document, in one piece: whoever reads it at any time finds a whole one."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.document(), indent=1) + "\n")
        beside.replace(path)

    @property
    def _pretends(self) -> bool:
        return self.device.is_rehearsal

    def _row(self, item: Item) -> Measurement:
        fmt = FORMATS[item.format]
        stores = item.peer.stores if item.peer else _in_words(fmt)
        row = Measurement(MODELS[item.model].name, 0, 0, item.optimizer, item.format, item.contestant, stores)
        shapes, row.refused = self._shapes(item, fmt)
        if shapes is not None:
            row.take(shapes=shapes.name, elements=shapes.elements, tensors=len(shapes.tensors))
            row.refused = self._out_of_time() or (item.peer.missing() if item.peer else None) or self._gate(item, fmt)
        if shapes is None or row.refused:
            return row
        try:
            with self._limited():
                self._measure(item, shapes, fmt, row)
        except Exception as error:  # of a library, a compiler or the allocator: the others can still be measured
            reason = str(error).strip().partition("\n")[0]
            row = Measurement(row.shapes, row.elements, row.tensors, *item.case[1:], item.contestant, stores)
            row.refused = f"failed: {type(error).__name__}: {reason}"
        finally:
            gc.collect()
            if item.peer is not None and item.peer.compiled:
                torch.compiler.reset()
        return row

    def _shapes(self, item: Item, fmt: StorageFormat) -> tuple[Shapes | None, str | None]:
        """Take as much of the model as there is memory for, the same for all of a case; or say why nothing of it."""
        if item.case not in self._fitting:
            shapes, reason = self._fit(item, fmt)
            if shapes is not None and (fitting := suited(item.optimizer, shapes)) != shapes:
                reason = None if fitting else f"{shapes.name} has no matrices between layers"
                shapes = fitting
            self._fitting[item.case] = shapes, reason
        return self._fitting[item.case]

    def _fit(self, item: Item, fmt: StorageFormat) -> tuple[Shapes | None, str | None]:
        model = MODELS[item.model]
        try:
            need = max(measure.resident(item.optimizer, fmt), PEER_RESIDENT)
        except ValueError as error:  # a format that the optimizer refuses
            return None, str(error)
        if self._pretends:
            return miniature(model), None
        free = self.device.free_bytes
        shapes = model.fitting(MEMORY * free, need)
        smallest = model.shapes(1).elements
        return (
            shapes,
            f"needs {need * smallest / 2**30:.1f} GiB, and {free / 2**30:.1f} are free" if not shapes else None,
        )

    def _out_of_time(self, share: float = 1 - FOR_COUNTS) -> str | None:
        if self.seconds is not None and self.clock() - self._started > share * self.seconds:
            return f"not measured: the time given ({self.seconds:g} s) was spent"
        return None

    def _gate(self, item: Item, fmt: StorageFormat) -> str | None:
        """Say why a red check forbids numbers of this optimizer and format, ours and any peer's beside it."""
        key = (item.optimizer, item.format)
        if key not in self._checked:
            self._checked[key] = gate(item.optimizer, fmt)
        return self._checked[key]

    def _measure(self, item: Item, shapes: Shapes, fmt: StorageFormat, row: Measurement) -> None:
        if self.copy is None:
            n_copied = min(COPY_BYTES, int(self.device.free_bytes * 0.25))
            self.copy = self.device.copy_bandwidth(2**20 if self._pretends else n_copied)
        seconds = 0.0 if self._pretends else self.seconds_each
        # The bytes are ours for peers too, so that each gets as many sets of tensors.
        n_bytes = measure.resident(item.optimizer, fmt) * shapes.elements
        measure.measure(self.device, row, self._make_set(item, shapes), n_bytes, self.copy, seconds)
        if item.peer is not None:
            for ours in self.done:
                same = (ours.shapes, ours.optimizer, ours.format) == (row.shapes, row.optimizer, row.format)
                if ours.contestant == OURS and same:
                    row.take(ratio=_ratio(row.ms, ours.ms), device_ratio=_ratio(row.device_ms, ours.device_ms))

    def _make_set(self, item: Item, shapes: Shapes) -> measure.MakeSet:
        if item.peer is not None:
            return measure.set_of_theirs(self.device, shapes, item.peer)
        return measure.set_of_ours(self.device, shapes, item.optimizer, FORMATS[item.format])

    def _count_kernels(self) -> None:
        """Count launches of what is soon made again; a library that fails now has its times all the same."""
        for item, row in zip(self.items, self.done, strict=True):
            if item.model in QUICKLY_MADE and row.ms is not None and self._out_of_time(1.0) is None:
                shapes = self._fitting[item.case][0]
                assert shapes is not None
                with contextlib.suppress(Exception), self._limited():
                    row.take(kernels=measure.count_kernels(self.device, self._make_set(item, shapes)))

    def _limited(self) -> contextlib.AbstractContextManager[None]:
        """Limit what is inside to the time given."""
        return _at_most(None if self.seconds is None else self._started + self.seconds - self.clock())


@contextlib.contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError after so many seconds, where Python is asked in time: a library may compile for minutes."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError("the time given was spent")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: the first may be raised where a library drops what is raised.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def gate(optimizer: str, fmt: StorageFormat) -> str | None:
    """Check an optimizer in a format, and say why that is red; None if it is green."""
    if optimizer == MIXED:
        return gate("Muon", fmt) or gate("AdamW", fmt)
    weight = torch.nn.Parameter(torch.zeros(2, 64, dtype=fmt.dtype, device="cpu"))
    opt = measure.make(optimizer, fmt, [weight])
    group = opt.param_groups[0]
    is_low = fmt.dtype in (torch.bfloat16, torch.float16)
    case = check.Case(
        cls=with_api(opt.rule),
        variant=_variant(opt, group),
        weight_dtype=fmt.dtype,
        grad_dtype=fmt.dtype,
        master=group["master"] if is_low and group["multi_precision"] else None,
        state_dtype=_states(opt, group["state_dtype"]),
        option="wd, clip, rescale",
    )
    row = check.check_case(case, n_steps=2)
    return None if row.passed else f"no numbers, since its check is red: {row.reason}"


def _variant(opt: Any, group: dict[str, Any]) -> dict[str, Any]:
    """Tell the arguments that `opt` constructs its rule with."""
    arguments: dict[str, Any] = {}
    for name, target in opt.arguments.items():
        arguments.update([(target, group[name])] if isinstance(target, str) else zip(target, group[name], strict=True))
    return arguments


def _states(opt: Any, choice: Any) -> Any:
    """Name states as the rule does, where some are chosen by torch's names."""
    rule_name = {torch_name: name for name, torch_name in opt.state_keys.items()}
    return {rule_name.get(name, name): fmt for name, fmt in choice.items()} if isinstance(choice, dict) else choice


def _in_words(fmt: StorageFormat) -> str:
    weights, _, states = fmt.name.partition("+")
    return f"{weights}; {states or 'by default'}"
