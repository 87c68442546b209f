"""Time that a step takes of the host: `tritopt bench --host`, which needs no GPU.

Kernels are replaced by nothing, so what is left is Python, dispatch and the tables. Contestants take turns, so that a
busy machine is as busy for each, and a time is the median of theirs. In a turn's first step the processor's caches hold
what others left there, as they do in training after a backward pass; a few steps on they are the contestant's own. So
the first is told apart, the next few are not timed, and those after them are the step "with all tables warm".
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch

from tritopt import optim
from tritopt.engine.launcher import no_launches
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON
from tritopt.tools.bench import peers
from tritopt.tools.bench.machine import commit, cpu_name, now
from tritopt.tools.bench.without_kernels import OF_FUSED, no_foreach, no_fused
from tritopt.tools.environment import device, environment, fused_unavailable

ELEMENTS = 4
"""Number of elements of each tensor: what work there is beside kernels must not be arithmetic."""
MAX_NORM = 1.0
ABSENT = 10
"""One parameter in so many is without a gradient in one of several sets; all others have one in every set."""
BASELINE = "torch fused"
OURS = "tritopt"
WARM = 3
ROUNDS = 15
SETTLING = 10
"""Steps of a turn until the caches are the contestant's own."""
TURN = 20
"""Steps of a turn that are timed, after those."""


class Case(NamedTuple):
    """One list of parameters."""

    tensors: int
    groups: int
    clip: bool
    """Whether gradients are clipped to a global norm: by max_grad_norm, or by torch's clip_grad_norm_."""
    sets: int = 1
    """Sets of parameters that have gradients, in turn: several as with two heads, or experts without tokens."""


CASES = (
    *(Case(tensors, groups, clip) for tensors, groups in ((400, 1), (400, 400), (4000, 1)) for clip in (False, True)),
    Case(400, 1, False, sets=4),
)


@dataclass
class HostTime:
    """Time that a step of one contestant takes of the host. None: not measured."""

    contestant: str
    tensors: int
    groups: int
    clip: bool
    sets: int
    replaced: str
    """Functions that were replaced by nothing, in words."""
    ms: float | None = None
    """Median of the steps of all rounds, milliseconds."""
    best_ms: float | None = None
    """Shortest of these steps, milliseconds."""
    cold_ms: float | None = None
    """Median of the turns' first steps, milliseconds."""
    ratio: float | None = None
    """Multiple that `ms` is of torch fused's for the same list; None also where that was not measured."""
    refused: str | None = None
    """Reason why it was not measured; None: it was."""


class Contestant(NamedTuple):
    """Someone who makes a step for a list."""

    name: str
    make: Callable[[Case], Callable[[], Any]]
    """An optimizer of AdamW over such a list, and its step with the clip."""
    without_kernels: Callable[[], AbstractContextManager[Any]]
    replaced: str


def host_times(
    cases: Sequence[Case] = CASES,
    rounds: int = ROUNDS,
    chosen_peers: Sequence[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[HostTime]:
    """Host time of a warm step of AdamW in fp32, of ours, torch's and whichever peers are installed.

    Args:
        cases: the lists.
        rounds: turns of each contestant; fewer for lists of thousands.
        chosen_peers: names as `bench --peer` has them; None: all.
        clock: tells the time in seconds.

    Raises:
        ValueError: an unknown peer, or no rounds. RuntimeError: no kernels of ours that could be left out.
    """
    return [row for case in cases for row in case_times(case, rounds, chosen_peers, clock)]


def case_times(
    case: Case,
    rounds: int = ROUNDS,
    chosen_peers: Sequence[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[HostTime]:
    """Take `host_times` of one list."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1")
    if not HAS_TRITON:
        raise RuntimeError(f"the host's part of a step needs {INSTALL_TRITON}")
    if reason := fused_unavailable():
        raise RuntimeError(reason)
    rivals = peers.find_peers(chosen_peers)
    rows, running = [], []
    for contestant in [_ours(), *_torch(rivals), *_others(rivals)]:
        row = HostTime(contestant.name, *case, contestant.replaced)
        rows.append(row)
        try:
            with contestant.without_kernels():
                step = contestant.make(case)
                for _ in range(WARM):
                    step()
        except Exception as error:  # whatever a library comes up with: the others go on
            if contestant.name == OURS:
                raise
            row.refused = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        running.append((row, step, contestant.without_kernels))
    times = interleaved(
        [(step, without) for _, step, without in running],
        max(min(rounds, 5), rounds // max(1, case.tensors // 1000)),
        clock,
    )
    for (row, *_), times_of in zip(running, times, strict=True):
        row.ms, row.best_ms = 1e3 * statistics.median(times_of.warm), 1e3 * min(times_of.warm)
        row.cold_ms = 1e3 * statistics.median(times_of.cold)
    baseline = next((row.ms for row in rows if row.contestant == BASELINE), None)
    for row in rows:
        if row.ms is not None and baseline:
            row.ratio = row.ms / baseline
    return rows


def document(rows: Sequence[HostTime]) -> dict[str, Any]:
    """Collect for JSON what the numbers belong to, and the rows."""
    machine = environment()
    return {
        "machine": {
            "cpu": cpu_name(),
            "date": now(),
            "platform": machine["machine"],
            "commit": commit(),
            **{name: machine[name] for name in ("device", "python", "torch", "triton", "tritopt", "walk")},
            "peers": peers.versions(),
        },
        "rows": [asdict(row) for row in rows],
    }


class Times(NamedTuple):
    """Times of single steps, in seconds."""

    cold: list[float]
    """First steps of turns."""
    warm: list[float]


def interleaved(
    steps: Sequence[tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]],
    rounds: int,
    clock: Callable[[], float],
) -> list[Times]:
    """Time each step in its context, in turns."""
    times = [Times([], []) for _ in steps]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for (step, without_kernels), times_of in zip(steps, times, strict=True):
                with without_kernels():
                    times_of.cold.append(_timed(step, clock))
                    for _ in range(SETTLING - 1):
                        step()
                    times_of.warm.extend(_timed(step, clock) for _ in range(TURN))
    finally:
        if was_enabled:
            gc.enable()
    return times


def _timed(step: Callable[[], Any], clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    step()
    return clock() - start


def _in_turn(step: Callable[[], Any], groups: Sequence[dict[str, Any]], case: Case) -> Callable[[], Any]:
    """The step, each time with gradients of another set of parameters: all but a few, if there are several sets."""
    if case.sets == 1:
        return step
    owned = [(param, param.grad) for group in groups for param in group["params"]]
    left_out = [owned[i :: ABSENT * case.sets] for i in range(case.sets)]
    turns = cycle(range(case.sets))

    def call() -> None:
        turn = next(turns)
        for param, grad in left_out[turn - 1]:
            param.grad = grad
        for param, _ in left_out[turn]:
            param.grad = None
        step()

    return call


def _groups(case: Case) -> list[dict[str, Any]]:
    params = []
    for _ in range(case.tensors):
        param = torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.float32, device=device()))
        param.grad = torch.zeros_like(param)
        params.append(param)
    size = -(-case.tensors // case.groups)
    return [{"params": params[i : i + size]} for i in range(0, case.tensors, size)]


def _ours() -> Contestant:
    def make(case: Case) -> Callable[[], Any]:
        groups = _groups(case)
        opt = optim.AdamW(groups, lr=1e-3, max_grad_norm=MAX_NORM if case.clip else None)
        return _in_turn(opt.step, groups, case)

    return Contestant(OURS, make, no_launches, "launches of Triton kernels")


def _torch(rivals: Sequence[str]) -> Iterator[Contestant]:
    ways = (
        (BASELINE, {"fused": True}, no_fused, f"torch.{', torch.'.join(OF_FUSED)}; the norm of norms stays"),
        (
            "torch foreach",
            {"foreach": True},
            no_foreach,
            "torch._foreach_*, but for those of step counters, which the host computes with",
        ),
    )
    for name, arguments, without_kernels, replaced in ways:
        if name in rivals or name == BASELINE:
            make = partial(_with_clip, cls=torch.optim.AdamW, arguments=arguments)
            yield Contestant(name, make, without_kernels, replaced)


def _with_clip(case: Case, cls: Any, arguments: dict[str, Any]) -> Callable[[], Any]:
    groups = _groups(case)
    params = [param for group in groups for param in group["params"]]
    opt = cls(groups, lr=1e-3, **arguments)
    if not case.clip:
        return _in_turn(opt.step, groups, case)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return _in_turn(step, groups, case)


def _others(rivals: Sequence[str]) -> Iterator[Contestant]:
    """Peers that are installed. Their kernels run, on tensors of a few elements: on a GPU the host does not wait."""
    for peer in peers.beside("AdamW", "fp32", rivals):
        if peer.missing() is None and not peer.name.startswith("torch") and not peer.slow_start:
            yield Contestant(peer.name, partial(_on_gpu, peer=peer), nullcontext, "nothing")


def _on_gpu(case: Case, peer: peers.Peer) -> Callable[[], Any]:
    if device().type != "cuda":
        raise RuntimeError("its kernels need a GPU")
    return _with_clip(case, peer.cls(), peer.arguments)
