"""What the compiler makes of a step, without a GPU, and the time that it leaves at least: `tritopt inspect`.

Processes of their own compile, in which kernels are not interpreted whatever TRITON_INTERPRET says here.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from tritopt import optim
from tritopt.engine.validate import did_you_mean
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.weights import MASTERS
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON, INTERPRETED
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.check import find_optimizers
from tritopt.tools.compiled import CompiledLaunch, compile_launches, compile_norm
from tritopt.tools.cost import Traffic, bytes_per_parameter, phase_traffic
from tritopt.tools.gpus import ARCHITECTURES, DEFAULTS, Gpu, find_gpu, find_target, resident_programs
from tritopt.tools.numerics import FORMATS, StorageFormat, find_formats

NORM = "norm"
"""Stands for the global norm of the gradients, which max_grad_norm takes."""
MAIN_FORMATS = ("fp32", "master", "split16", "split16+bf16", "split8+fp8", "split8+int8")
N_PARAMETERS = 1e9
"""That a time is for."""
GRAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """A step that is compiled for a target."""

    optimizer: str
    """A key of `known_optimizers`, "module:Class", or NORM."""
    arguments: dict[str, Any]
    """Of the optimizer."""
    storage: str
    """A key of tritopt.tools.numerics.FORMATS."""
    grad_dtype: str | None
    """A key of GRAD_DTYPES; None: the weights'."""
    gpu: str
    """A key of tritopt.tools.gpus.GPUS."""

    @property
    def label(self) -> str:
        """For messages."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        grad = f", {self.grad_dtype} gradients" if self.grad_dtype else ""
        return f"{self.optimizer}{f'({arguments})' if arguments else ''} {self.storage}{grad}"


@dataclass(frozen=True)
class Row:
    """One launch of a step. Where it works on what is small beside the tensors, what follows `programs` is None."""

    optimizer: str
    arguments: dict[str, Any]
    storage: str
    grad_dtype: str | None
    target: str
    gpu: str
    """That the times are for."""
    triton: str
    step_read: float
    """Bytes per parameter that the whole step must read."""
    step_written: float
    launch: int
    """Its place in the step."""
    kernel: str
    registers: int
    """A thread."""
    spilled_bytes: int
    """A thread."""
    shared_bytes: int
    """A program."""
    num_warps: int
    programs: int
    """That a multiprocessor holds at once."""
    elements: int | None
    """That a thread has in an iteration of the hot loop."""
    loads: dict[str, int] | None
    """Accesses to global memory that it makes for these, by their width in bits."""
    stores: dict[str, int] | None
    bytes_loaded: float | None
    """Per parameter, read off the code."""
    bytes_stored: float | None
    must_load: float | None
    """Likewise, what the launch must move; None also where a phase of the step has several launches."""
    must_store: float | None
    instructions: float | None
    """Per parameter, issued on the hot path."""
    arithmetic: float | None
    """Those among them that neither access memory nor branch."""
    milliseconds: float | None
    """That N_PARAMETERS take at least on the GPU."""
    bound: str | None
    """What takes that long: "memory", or "issue" of instructions."""

    @property
    def case(self) -> Case:
        """Whose step it is part of."""
        return Case(self.optimizer, self.arguments, self.storage, self.grad_dtype, self.gpu)


def known_optimizers() -> dict[str, type[Optimizer]]:
    """The registered optimizers by name, and the rules of tritopt.optim's classes that are not among them."""
    rules = {value.rule for value in vars(optim).values() if hasattr(value, "rule")}
    by_name = {name: registry.find(name) for name in registry.names()}
    others = {rule.__name__.lower(): rule for rule in rules if rule not in by_name.values()}
    return {**by_name, **dict(sorted(others.items()))}


def _key_of(name: str, known: Mapping[str, type[Optimizer]]) -> str:
    """Where a name that users give an optimizer leads: a key of `known`, NORM, or itself for a "module:Class"."""
    if ":" in name:
        find_optimizers([name])
        return name
    prefix, _, last = name.lower().rpartition(".")
    torchs = {key.lower(): value.rule for key, value in vars(optim).items() if hasattr(value, "rule")}
    if prefix in ("optim", "tritopt.optim") and last in torchs:
        return next(key for key, rule in known.items() if rule is torchs[last])
    if name.lower() in (*known, NORM):
        return name.lower()
    names = [*registry.names(), *(f"optim.{key}" for key, value in vars(optim).items() if hasattr(value, "rule")), NORM]
    near = did_you_mean(name.lower(), names)
    raise ValueError(f"unknown optimizer {name!r}{near} known: {', '.join(names)}; or my_module:MyOptimizer")


def _class_of(key: str, known: Mapping[str, type[Optimizer]]) -> type[Optimizer]:
    return known[key] if key in known else find_optimizers([key])[0]


class Selection(NamedTuple):
    """The cases that were asked for."""

    cases: list[Case]
    refused: dict[str, str]
    """By label of a case: why the optimizer does not take the format."""


def select(
    optimizers: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    gpu: str | None = None,
    grad_dtype: str | None = None,
    everything: bool = False,
) -> Selection:
    """The cases that are chosen so, each optimizer with those of its variants that have other kernels or states.

    Args:
        optimizers: by registered name, "optim.AdamW" for a class of tritopt.optim, "module:Class" for one of the
            user's, or NORM. None: all registered ones, and NORM.
        formats: by name, such as "split8+int8". None: MAIN_FORMATS of optimizers that were named, and of AdamW; of
            others, bf16 with an fp32 master.
        targets: None: the GPU's, or else sm_90.
        gpu: whose bandwidth and clock; None: DEFAULTS.
        grad_dtype: of the gradients; None: the weights'.
        everything: all optimizers, also the rules of tritopt.optim, in all formats that `tritopt numerics` shows.

    Raises ValueError for an unknown name, for a GPU that does not run a target, and if nothing remains.
    """
    gpus = _gpus(targets, gpu)
    if grad_dtype is not None and grad_dtype not in GRAD_DTYPES:
        raise ValueError(f"unknown dtype of gradients {grad_dtype!r}; known: {', '.join(GRAD_DTYPES)}")
    known = known_optimizers()
    chosen = [_key_of(name, known) for name in optimizers or ()]
    asked = find_formats(formats) if formats else None
    names = chosen or [*(known if everything else registry.names())]
    selection = Selection([], {})
    for machine in gpus:
        for name in dict.fromkeys(names):
            if name == NORM:
                continue
            cls = _class_of(name, known)
            for arguments in _variants(cls):
                is_main = bool(optimizers) or (name == "adamw" and not arguments)
                by_default = None if everything else MAIN_FORMATS if is_main else ["master"]
                seen = set()
                for storage in asked or find_formats(by_default):
                    case = Case(name, arguments, storage.name, grad_dtype, machine.name)
                    try:
                        stored = _stored_as(cls, case)
                    except ValueError as error:
                        selection.refused[case.label] = str(error)
                        continue
                    # Without states, those who differ in them do not differ.
                    if asked or stored not in seen:
                        seen.add(stored)
                        selection.cases.append(case)
        if not optimizers or NORM in names:
            dtypes = {storage.dtype: storage.name for storage in reversed(asked or find_formats(["master"]))}
            selection.cases.extend(
                Case(NORM, {}, storage, grad_dtype, machine.name) for storage in reversed(dtypes.values())
            )
    if not selection.cases:
        label, reason = next(iter(selection.refused.items()))
        raise ValueError(f"nothing to compile: {label}: {reason}")
    return selection


def in_both(selection: Selection, saved: Sequence[Row]) -> Selection:
    """Those cases that a saved run has as well; ValueError if it has none of them."""
    known = {_key(row.case) for row in saved}
    cases = [case for case in selection.cases if _key(case) in known]
    if not cases:
        raise ValueError("the saved run has none of these steps: leave out the options that choose others")
    return selection._replace(cases=cases)


def _gpus(targets: Sequence[str] | None, gpu: str | None) -> list[Gpu]:
    wanted = None if gpu is None else find_gpu(gpu)
    names = [find_target(target) for target in targets or ()] or [wanted.target if wanted else "sm_90"]
    for target in names:
        if wanted is not None and wanted.target != target:
            raise ValueError(f"{wanted.name} runs {wanted.target}, not {target}: leave out the target or the GPU")
    return [wanted or find_gpu(DEFAULTS[target]) for target in dict.fromkeys(names)]


def _variants(cls: type[Optimizer]) -> Iterator[dict[str, Any]]:
    seen = set()
    for arguments in cls.variants:
        opt = cls(**arguments)
        key = (tuple(name for phase in opt.phases for name in phase.kernels), tuple(opt.state_names))
        if opt.phases and key not in seen:
            seen.add(key)
            yield arguments


def _stored_as(cls: type[Optimizer], case: Case) -> tuple[str, ...]:
    """How the optimizer stores weights and states; ValueError if it does not take the format."""
    opt = _made(cls, case)
    _traffic(opt, case)
    return (case.storage.partition("+")[0], *(fmt.name for fmt in opt.state_formats()))


def _made(cls: type[Optimizer], case: Case) -> Optimizer:
    storage = FORMATS[case.storage]
    keeps_master: dict[str, Any] = {"multi_precision": True} if storage.arguments.get("master") else {}
    return cls(**case.arguments, **keeps_master, **storage.arguments)


def _format_of(storage: StorageFormat) -> Format:
    master = storage.arguments.get("master")
    return MASTERS[master] if master else PLAIN


def _grad_dtype(case: Case) -> torch.dtype:
    return FORMATS[case.storage].dtype if case.grad_dtype is None else GRAD_DTYPES[case.grad_dtype]


def _traffic(opt: Optimizer, case: Case) -> Traffic:
    storage = FORMATS[case.storage]
    return bytes_per_parameter(opt, storage.dtype, _grad_dtype(case), _format_of(storage))


# Compiling.


def inspect_case(case: Case) -> list[Row]:
    """Compile a step and describe its launches. RuntimeError if kernels are interpreted or do not compile."""
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    gpu = find_gpu(case.gpu)
    try:
        return _compiled_case(case, gpu)
    except Exception as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        message = f"{case.label}, {gpu.target}: Triton {version('triton')} does not compile it: {error}{cause}"
        raise RuntimeError(message) from error


def _compiled_case(case: Case, gpu: Gpu) -> list[Row]:
    arch = ARCHITECTURES[gpu.target].arch
    grad_dtype = _grad_dtype(case)
    if case.optimizer == NORM:
        launches = compile_norm(grad_dtype, arch)
        step, phases = Traffic(grad_dtype.itemsize, 0), [Traffic(grad_dtype.itemsize, 0)]
    else:
        storage = FORMATS[case.storage]
        opt = _made(_class_of(case.optimizer, known_optimizers()), case)
        fmt = _format_of(storage)
        step, phases = _traffic(opt, case), phase_traffic(opt, storage.dtype, grad_dtype, fmt)
        launches = compile_launches(opt, storage.dtype, grad_dtype, fmt, arch)
    hot = [i for i, launch in enumerate(launches) if launch.elements]
    must = dict(zip(hot, phases, strict=True)) if len(hot) == len(phases) else {}
    return [_row(case, gpu, step, i, launch, must.get(i)) for i, launch in enumerate(launches)]


def _row(case: Case, gpu: Gpu, step: Traffic, i: int, launch: CompiledLaunch, must: Traffic | None) -> Row:
    milliseconds = bound = None
    if launch.instructions is not None and launch.bytes_loaded is not None and launch.bytes_stored is not None:
        issued = launch.instructions if ARCHITECTURES[gpu.target].issues_all else launch.arithmetic
        assert issued is not None
        seconds = {
            "memory": (launch.bytes_loaded + launch.bytes_stored) / gpu.bandwidth,
            "issue": issued / gpu.issue_rate,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        milliseconds = round(1000 * N_PARAMETERS * seconds[bound], 4)
    return Row(
        optimizer=case.optimizer,
        arguments=case.arguments,
        storage=case.storage,
        grad_dtype=case.grad_dtype,
        target=gpu.target,
        gpu=gpu.name,
        triton=version("triton"),
        step_read=step.read,
        step_written=step.written,
        launch=i,
        kernel=launch.kernel,
        registers=launch.registers,
        spilled_bytes=launch.spilled_bytes,
        shared_bytes=launch.shared_bytes,
        num_warps=launch.num_warps,
        programs=resident_programs(gpu.target, launch.registers, launch.num_warps, launch.shared_bytes),
        elements=launch.elements or None,
        loads=_by_width(launch.loads) if launch.elements else None,
        stores=_by_width(launch.stores) if launch.elements else None,
        bytes_loaded=launch.bytes_loaded,
        bytes_stored=launch.bytes_stored,
        must_load=must and must.read,
        must_store=must and must.written,
        instructions=launch.instructions,
        arithmetic=launch.arithmetic,
        milliseconds=milliseconds,
        bound=bound,
    )


def _by_width(accesses: Mapping[int, int]) -> dict[str, int]:
    return {str(bits): accesses[bits] for bits in sorted(accesses, reverse=True)}


def inspect_cases(cases: Sequence[Case], processes: int | None = None) -> Iterator[list[Row]]:
    """The rows of each case, in order, as they come.

    Args:
        cases: as `select` has them.
        processes: how many compile; 0: this one does, where kernels are not interpreted. None: as many as pay.

    Raises RuntimeError where Triton is missing. A script that calls this needs `if __name__ == "__main__":`, since the
    processes import it.
    """
    if not HAS_TRITON:
        raise RuntimeError(f"to compile kernels takes {INSTALL_TRITON}")
    if processes is None:
        # Starting one takes as long as some compilations.
        n = math.ceil(len(cases) / 4)
        processes = 0 if n <= 1 and not INTERPRETED else max(1, min(len(os.sched_getaffinity(0)), n))
    if processes == 0:
        yield from map(inspect_case, cases)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=partial(torch.set_num_threads, 1)) as pool:
        with _no_interpreter():
            futures = [pool.submit(inspect_case, case) for case in cases]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interpreter() -> Iterator[None]:
    """Processes that start within compile kernels: Triton looks at the environment when they import it."""
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


# What comes out.


class Step(NamedTuple):
    """All launches of a case."""

    rows: list[Row]

    @property
    def hot(self) -> list[Row]:
        """Those that work on whole tensors."""
        return [row for row in self.rows if row.elements]

    def total(self, name: str) -> float:
        """Sum of a column over the launches."""
        return float(sum(getattr(row, name) or 0 for row in self.rows))

    @property
    def moves_what_it_must(self) -> bool:
        """Whether the code moves the bytes that the step must move."""
        first = self.rows[0]
        return (self.total("bytes_loaded"), self.total("bytes_stored")) == (first.step_read, first.step_written)


def steps_of(rows: Sequence[Row]) -> list[Step]:
    """The rows, grouped by case."""
    return [Step(list(found)) for _, found in groupby(rows, key=lambda row: row.case)]


def dump(rows: Sequence[Row]) -> str:
    """JSON: a list with a row on each line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"


def load(path: Path) -> list[Row]:
    """The rows of a file that `dump` has written; ValueError that says what is wrong with it."""
    hint = "; `tritopt inspect --save` writes such files"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}{hint}") from error
    names = {field.name for field in fields(Row)}
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path} holds no list of rows{hint}")
    for row in found:
        if row.keys() != names:
            differing = ", ".join(sorted(row.keys() ^ names))
            raise ValueError(f"{path} was made by another version of tritopt, whose rows differ in {differing}{hint}")
    return [Row(**row) for row in found]


class Change(NamedTuple):
    """What differs from a saved run."""

    case: Case
    kernel: str
    column: str
    saved: Any
    now: Any
    is_worse: bool
    is_better: bool = False


_LESS_IS_BETTER = ("spilled_bytes", "bytes_loaded", "bytes_stored", "instructions", "milliseconds")
_MORE_IS_BETTER = ("programs",)
_OF_INTEREST = ("registers", "shared_bytes", "num_warps", "elements", "arithmetic", "bound", "kernel", "triton")


def compare(saved: Sequence[Row], rows: Sequence[Row]) -> list[Change]:
    """What changed for the cases that both have; worse is what costs time.

    That is more spilled bytes, bytes, instructions, time, accesses for the same bytes, launches, or fewer resident
    programs. Registers as such cost nothing.
    """
    changes = []
    before = {_key(step.rows[0].case): step for step in steps_of(saved)}
    for step in steps_of(rows):
        case = step.rows[0].case
        old = before.get(_key(case))
        if old is None:
            continue
        if len(old.rows) != len(step.rows):
            counts = len(old.rows), len(step.rows)
            changes.append(Change(case, "", "launches", *counts, counts[1] > counts[0], counts[1] < counts[0]))
        for a, b in zip(old.rows, step.rows, strict=False):
            changes.extend(_changes(a, b))
    return changes


def _key(case: Case) -> str:
    """What is compiled, whatever the GPU that times are told for."""
    return repr(case._replace(gpu=find_gpu(case.gpu).target))


def _changes(a: Row, b: Row) -> Iterator[Change]:
    for column in (*_LESS_IS_BETTER, *_MORE_IS_BETTER, *_OF_INTEREST):
        old, new = getattr(a, column), getattr(b, column)
        is_of_gpu = column in ("milliseconds", "bound")
        if old == new or (is_of_gpu and a.gpu != b.gpu):
            continue
        sign = (column in _LESS_IS_BETTER) - (column in _MORE_IS_BETTER)
        # A hot loop that is no longer found is no improvement.
        growth = sign * ((math.inf if new is None else new) - (math.inf if old is None else old)) if sign else 0
        yield Change(b.case, b.kernel, column, old, new, growth > 0, growth < 0)
    for column in ("loads", "stores"):
        old, new = getattr(a, column) or {}, getattr(b, column) or {}
        if old != new:
            growth = sum(new.values()) - sum(old.values())
            yield Change(b.case, b.kernel, column, widths(old), widths(new), growth > 0, growth < 0)


def widths(accesses: Mapping[str, int] | None) -> str:
    """How a row's accesses are written.

    >>> widths({"128": 2, "64": 3})
    '2x128 3x64'
    """
    return " ".join(f"{count}x{bits}" for bits, count in (accesses or {}).items())
