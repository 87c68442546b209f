"""One number of the bench: sets of tensors larger than the cache, an optimizer on each, and what its step takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch

from tritopt import optim
from tritopt.tools.bench.device import Device, Step
from tritopt.tools.bench.peers import Peer
from tritopt.tools.bench.plan import ARGUMENTS, MIXED
from tritopt.tools.bench.shapes import Shape, Shapes, is_hidden_matrix
from tritopt.tools.cost import counted_bytes
from tritopt.tools.optimizers import find_optimizer
from tritopt.tools.storage import StorageFormat

OURS = "tritopt"
WARM = 3
"""Steps before anything is measured: the first compiles, the second may with more registers."""
CACHES = 4
"""Times the cache that all sets together move: what a step needs has left it since the last one."""
MAX_SETS = 64
ONE_SET = 2**31
"""Bytes that no cache keeps a noticeable part of. Below, there are two sets at least."""
RATE = 1e-6
"""Learning rate: weights must stay finite, however many steps are taken."""
GRADIENT = 1e-3
"""Standard deviation of the gradients."""


@dataclass
class Measurement:
    """Numbers of one contestant for one case. None: not measured."""

    shapes: str
    elements: int
    tensors: int
    optimizer: str
    format: str
    """Name of our storage format, which a peer stands beside."""
    contestant: str
    stores: str
    """Storage of weights, then of states, in words; by a peer in its own way."""
    ms: float | None = None
    """Milliseconds of a step among others, on end: of GPU or host, the slower. A median, as all times are."""
    device_ms: float | None = None
    """Milliseconds of the GPU alone, all launches waiting in its queue. None: the host cannot be so far ahead."""
    host_ms: float | None = None
    """Milliseconds until the call returns."""
    first_ms: float | None = None
    """Milliseconds of the first step. Some of its kernels were compiled for its check."""
    moved: float | None = None
    """Bytes that must move in a step: read and written, by its own way of storing. None: not known."""
    gb_per_s: float | None = None
    """Rate at which they move, in 10^9 bytes per second of `device_ms`, or of `ms` where that is None."""
    share: float | None = None
    """Share that this rate is of the bandwidth of a copy."""
    launches: int | None = None
    """Number of Triton kernels that a step of ours launches. None: a peer, or Triton does not say."""
    kernels: int | None = None
    """Launches of any kind. A profiler counts them when all times are known, for some models. None: not counted."""
    extra_bytes: int | None = None
    """Bytes of memory that a warm step takes beyond what it found, at the most."""
    allocations: int | None = None
    """Number of allocations of a warm step."""
    synchronises: bool | None = None
    """Whether a warm step waits for the GPU."""
    ratio: float | None = None
    """Multiple that a peer's `ms` is of ours: above 1 it is slower. None: ours, or one of the two is unknown."""
    device_ratio: float | None = None
    """Multiple that a peer's `device_ms` is of ours. None: ours, or one of the two is unknown."""
    refused: str | None = None
    """Reason why there are no numbers: a red check, a library that is missing or failed, no memory, no time."""

    def take(self, **numbers: Any) -> None:
        """Set numbers by name."""
        for name, value in numbers.items():
            setattr(self, name, value)


def params_of(optimizer: str, shapes: Sequence[Shape], dtype: torch.dtype, where: torch.device) -> list[Any]:
    """Make parameters with gradients. What has numbers per row takes a vector as a matrix of one row."""
    params = []
    for shape in shapes:
        size = (1, *shape) if optimizer == "GroupAdaGrad" and len(shape) < 2 else shape
        param = torch.nn.Parameter(torch.empty(size, dtype=dtype, device=where).normal_(0, 1))
        param.grad = torch.empty_like(param).normal_(0, GRADIENT)
        params.append(param)
    return params


def make(optimizer: str, fmt: StorageFormat, params: Sequence[Any]) -> optim.Optimizer:
    """Make one of ours, as it is measured."""
    if optimizer == MIXED:
        groups = [
            {"params": [param for param in params if is_hidden_matrix(param.shape) == is_muons], "algorithm": name}
            for name, is_muons in (("Muon", True), ("AdamW", False))
        ]
        return optim.Mixed([{**group, "lr": RATE} for group in groups if group["params"]], **fmt.arguments)
    cls: Callable[..., optim.Optimizer] = find_optimizer(optimizer)
    return cls(params, lr=RATE, **ARGUMENTS.get(optimizer, {}), **fmt.arguments)


def resident(optimizer: str, fmt: StorageFormat) -> float:
    """Tell the bytes per parameter of a large matrix, gradient included, before there are any states."""
    weight = torch.nn.Parameter(torch.zeros(128, 128, dtype=fmt.dtype, device="cpu"))
    opt = make("AdamW" if optimizer == MIXED else optimizer, fmt, [weight])
    states = opt.layout_of(weight, opt.param_groups[0]).expected.values()
    return 2 * fmt.dtype.itemsize + sum(prod(s.shape) * s.dtype.itemsize for s in states) / weight.numel()


MakeSet: TypeAlias = Callable[[], tuple[Step, Callable[[], float | None]]]
"""Makes tensors with an optimizer; returns its step, and what tells the bytes that a step moves."""


def measure(
    device: Device,
    row: Measurement,
    make_set: MakeSet,
    n_bytes: float,
    copy: float,
    seconds: float,
) -> Measurement:
    """Fill in the numbers.

    Args:
        device: device that the tensors are on.
        row: measurement that gets the numbers.
        make_set: makes a set of tensors.
        n_bytes: bytes of the tensors of a set, about.
        copy: bytes per second of a copy.
        seconds: time to spend on each of the three kinds of times, about.
    """
    least = 1 if n_bytes > ONE_SET else 2
    n_sets = min(MAX_SETS, max(least, -(-CACHES * device.l2_bytes // max(int(n_bytes), 1))))
    sets = [make_set() for _ in range(n_sets)]
    steps = [step for step, _ in sets]
    device.synchronize()
    start = time.perf_counter()
    steps[0]()
    device.synchronize()
    row.take(first_ms=1e3 * (time.perf_counter() - start))
    for _ in range(WARM):
        for step in steps:
            step()
    start = time.perf_counter()
    steps[0]()
    device.synchronize()
    n = max(5, min(50, int(seconds / (time.perf_counter() - start))))
    memory = device.memory(steps[0])
    row.take(extra_bytes=memory.extra, allocations=memory.allocations, synchronises=device.synchronises(steps[0]))
    for _ in range(WARM):
        steps[0]()  # one that raised has forgotten what made it warm
    if row.contestant == OURS:
        row.take(launches=device.launches(steps[0]))
    host = statistics.median(device.host_times(steps, n))
    row.take(host_ms=1e3 * host, ms=1e3 * statistics.median(device.step_times(steps, n)))
    times = device.device_times(steps, n, host)
    row.take(device_ms=1e3 * statistics.median(times) if times else None, moved=sets[0][1]())
    _derive(row, copy)
    return row


def _derive(row: Measurement, copy: float) -> None:
    ms = row.device_ms or row.ms
    if ms and row.moved:
        per_second = row.moved / ms * 1e3
        row.take(gb_per_s=per_second / 1e9, share=per_second / copy)


def set_of_ours(device: Device, shapes: Shapes, optimizer: str, fmt: StorageFormat) -> MakeSet:
    """Make sets for one of ours."""

    def make_set() -> tuple[Step, Callable[[], float]]:
        params = params_of(optimizer, shapes.tensors, fmt.dtype, device.where)
        opt = make(optimizer, fmt, params)
        return opt.step, lambda: counted_bytes(opt).moved * shapes.elements

    return make_set


def set_of_theirs(device: Device, shapes: Shapes, peer: Peer) -> MakeSet:
    """Make sets for a peer. Whatever its library raises is raised when a set is made.

    What it stores otherwise, because it is small, has no known bytes.
    """

    n_small = sum(n for n in map(prod, shapes.tensors) if n < peer.least)
    is_other = n_small > 0.01 * shapes.elements

    def make_set() -> tuple[Step, Callable[[], float | None]]:
        params = params_of(peer.optimizer, shapes.tensors, peer.dtype, device.where)
        _, step = peer.make(params, RATE)
        return step, lambda: None if is_other or peer.moved is None else peer.moved * shapes.elements

    return make_set


def count_kernels(device: Device, make_set: MakeSet) -> int | None:
    """Count the launches of any kind of a warm step; None where no profiler can tell."""
    step, _ = make_set()
    for _ in range(WARM):
        step()
    return device.kernels(step)
