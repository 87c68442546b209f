"""Compile cases, in processes of their own where kernels are interpreted here."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON, INTERPRETED
from tritopt.tools.compiled import CompiledLaunch, CompiledNorm, CompiledStep, compile_launches
from tritopt.tools.cost import Traffic, phase_traffic
from tritopt.tools.gpus import ARCHITECTURES, Gpu, find_gpu, resident_programs
from tritopt.tools.inspect.cases import NORM, class_of, grad_dtype_of, known_optimizers, make, traffic_of
from tritopt.tools.inspect.model import bytes_in_flight, seconds_of
from tritopt.tools.inspect.record import Case, LaunchRecord, by_width
from tritopt.tools.storage import FORMATS

AnyResult = TypeVar("AnyResult")
N_PARAMETERS = 1e9
"""Number of parameters that a time is for."""


def inspect_case(case: Case) -> list[LaunchRecord]:
    """Compile a step and describe its launches. RuntimeError if kernels are interpreted or do not compile."""
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    gpu = find_gpu(case.gpu)
    try:
        return _compiled_cases([case])[0]
    except Exception as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        message = f"{case.label}, {gpu.target}: Triton {version('triton')} does not compile it: {error}{cause}"
        raise RuntimeError(message) from error


def inspect_batch(cases: Sequence[Case]) -> list[list[LaunchRecord]]:
    """Compile cases together, which takes less time for each. RuntimeError names the first that does not compile."""
    try:
        return _compiled_cases(cases)
    except Exception:
        return [inspect_case(case) for case in cases]


def _compiled_cases(cases: Sequence[Case]) -> list[list[LaunchRecord]]:
    planned = [_plan(case) for case in cases]
    compiled = compile_launches([step for step, _, _ in planned])
    return [
        _records(case, launches, traffic, phases)
        for case, launches, (_, traffic, phases) in zip(cases, compiled, planned, strict=True)
    ]


def _plan(case: Case) -> tuple[CompiledStep | CompiledNorm, Traffic, Sequence[Traffic]]:
    """Return what is to be compiled, and what the step and each of its phases must move."""
    arch, grad_dtype = ARCHITECTURES[find_gpu(case.gpu).target].arch, grad_dtype_of(case)
    if case.optimizer == NORM:
        traffic = Traffic(grad_dtype.itemsize, 0)
        return CompiledNorm(grad_dtype, arch), traffic, [traffic]
    storage = FORMATS[case.storage]
    opt = make(class_of(case.optimizer, known_optimizers()), case)
    step = CompiledStep(opt, storage.dtype, grad_dtype, storage.weight_format, arch, case.views)
    return step, traffic_of(opt, case), phase_traffic(opt, storage.dtype, grad_dtype, storage.weight_format)


def _records(
    case: Case, launches: list[CompiledLaunch], step: Traffic, phases: Sequence[Traffic]
) -> list[LaunchRecord]:
    hot = [i for i, launch in enumerate(launches) if launch.elements]
    must = dict(zip(hot, phases, strict=True)) if len(hot) == len(phases) else {}
    if case.views:  # their narrow accesses are not told from those of scales, which neighbours share
        for i, phase in must.items():
            launches[i] = launches[i]._replace(bytes_loaded=phase.read, bytes_stored=phase.written)
    gpu = find_gpu(case.gpu)
    return [_row(case, gpu, step, i, launch, must.get(i)) for i, launch in enumerate(launches)]


def _row(case: Case, gpu: Gpu, step: Traffic, i: int, launch: CompiledLaunch, must: Traffic | None) -> LaunchRecord:
    programs = resident_programs(gpu.target, launch.registers, launch.num_warps, launch.shared_bytes)
    seconds = seconds_of(launch, programs, gpu)
    bound = max(seconds, key=lambda name: seconds[name], default=None)
    return LaunchRecord(
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
        programs=programs,
        elements=launch.elements or None,
        loads=by_width(launch.loads) if launch.elements else None,
        stores=by_width(launch.stores) if launch.elements else None,
        bytes_loaded=launch.bytes_loaded,
        bytes_stored=launch.bytes_stored,
        must_load=must and must.read,
        must_store=must and must.written,
        instructions=launch.instructions,
        arithmetic=launch.arithmetic,
        waits=launch.waits,
        alu=launch.alu,
        xu=launch.xu,
        in_flight=bytes_in_flight(launch, programs, gpu.target),
        milliseconds=None if bound is None else round(1000 * N_PARAMETERS * seconds[bound], 4),
        bound=bound,
        views=case.views,
    )


def inspect_cases(cases: Sequence[Case], processes: int | None = None) -> Iterator[list[LaunchRecord]]:
    """Compile the cases, and yield the launches of each in order, as they come.

    Args:
        cases: cases as `select_cases` has them.
        processes: number of processes; 0: this one compiles, where kernels are not interpreted. None: as many as pay.

    Raises RuntimeError where Triton is missing. A script that calls this needs `if __name__ == "__main__":`, since the
    processes import it.
    """
    if not HAS_TRITON:
        raise RuntimeError(f"to compile kernels takes {INSTALL_TRITON}")
    if processes is None:
        # Starting one takes as long as some compilations.
        n = math.ceil(len(cases) / 4)
        processes = 0 if n <= 1 and not INTERPRETED else max(1, min(len(os.sched_getaffinity(0)), n))
    # As many for each process that none waits long for another.
    size = math.ceil(len(cases) / (4 * max(1, processes))) or 1
    batches = [cases[i : i + size] for i in range(0, len(cases), size)]
    for records in in_processes(inspect_batch, batches, processes):
        yield from records


def in_processes(compiles: Callable[[Any], AnyResult], whats: Sequence[Any], n: int) -> Iterator[AnyResult]:
    """Compile each of them in one of n processes where kernels are not interpreted; 0: here. In order."""
    if n == 0:
        yield from map(compiles, whats)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, initializer=partial(torch.set_num_threads, 1)) as pool:
        with _no_interpreter():
            futures = [pool.submit(compiles, what) for what in whats]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interpreter() -> Iterator[None]:
    """Let processes that start inside compile kernels: Triton looks at the environment when they import it."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
