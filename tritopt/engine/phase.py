"""Phases, what the launches of a step have in common, and how one phase after the other runs over groups of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from tritopt.engine.group import LaunchGroup, on_device_of
from tritopt.engine.telemetry import Tracked
from tritopt.engine.tuning.config import Config


class Phase(Protocol):
    """One launch over a group, or a few that belong together."""

    def launch(self, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None) -> torch.Tensor | None:
        """Run it. `sums`: of the phases before, fp64 [tensors, sums]; returns those that this one emits, or None."""
        ...

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter (read, written). `weight`: what loading and storing it moves; the others: their size."""
        ...

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the update functions that are launched."""
        ...

    @property
    def n_sums(self) -> int:
        """Sums per tensor that later phases receive."""
        ...

    @property
    def sums_elements(self) -> bool:
        """Whether results depend on the order in which elements are summed."""
        ...

    @property
    def is_driver(self) -> bool:
        """Whether the driver loads and stores all tensors, so that formats may draw random bits and sums be tracked."""
        ...


class Tunable(Phase, Protocol):
    """A phase of which engine/tuning may measure how it is launched best."""

    def source(self, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> str:
        """Hash of all source that decides its kernel. n_earlier: number of sums per tensor that it receives."""
        ...


class LaunchSpec(NamedTuple):
    """Settings that the tasks of one step have in common."""

    phases: Sequence[Phase]
    """Phases of the step, in order."""
    scalars: type
    """The NamedTuple of the optimizer's scalars."""
    preamble: str
    """A key of kernels/preambles.py."""
    rescale: torch.Tensor | None = None
    """Device scalar, fp64, that multiplies the rescale in each set of scalars; NaN or Inf skips the update. None: 1."""
    noop: torch.Tensor | None = None
    """Device flag; anything but 0 skips the update. None: nothing does."""
    skip_zero_rescale: bool = False
    """Whether a product of 0 with `rescale` skips the update as NaN does."""
    draws: bool = False
    """Whether storing takes random bits; a set of scalars then ends with the step."""
    tracked: list[Tracked] | None = None
    """List that gets what the phases sum up of gradients and updates; None: they sum up nothing."""
    reduce: Reduce | None = None
    """Sum over processes that completes sums of sharded tensors between phases; None: no tensor is sharded."""
    exchange: Exchange | None = None
    """Orthogonalisation of directions that are sharded over processes; None: each process has whole matrices."""
    config: Config | None = None
    """Launch configuration of all phases; None: each has what was tuned for it, or the default."""
    record: Recorder | None = None
    """Receiver that is told of the launches, of which none is made; None: they are made."""
    generic: Config | None = None
    """Default of the architecture that kernels are compiled for; None: `config.GENERIC`."""

    @property
    def n_scalars(self) -> int:
        """Length of a set of scalars: rescale, clip bound, wd, the optimizer's, and the step if `draws`."""
        return 3 + len(self.scalars._fields) + self.draws  # type: ignore[attr-defined]

    def given(
        self, rescale: torch.Tensor | None, noop: torch.Tensor | None, tracked: list[Tracked] | None
    ) -> LaunchSpec:
        """The launch of one step, with what comes with that."""
        if rescale is None and noop is None and tracked is None:
            return self
        return self._replace(rescale=rescale, noop=noop, tracked=tracked)


class Recorder:
    """Receiver of what a step would launch, in place of launching it, for tools that compile or measure it."""

    def phase(self, phase: Phase, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> None:
        """Note a phase of a group, before its launches. n_earlier: number of sums per tensor that it receives."""

    def kernel(self, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        """Note one launch: number of programs, arguments in order, compile-time arguments and options by name."""


class Exchange(Protocol):
    """Orthogonalisation, once and by one process each, of matrices whose parts several have."""

    def __call__(self, directions: Sequence[torch.Tensor | None], moments: Sequence[torch.Tensor | None]) -> None:
        """Orthogonalise in place.

        Args:
            directions: direction of each task, which lies as its weight; None where that is empty.
            moments: second moments of its rows, where these are normalised; see `normalize_rows`.
        """
        ...


class Reduce(Protocol):
    """Sum over processes, of tensors that are sharded."""

    device: torch.device

    def __call__(self, sums: torch.Tensor) -> None:
        """Add up sums in place: fp64 [tasks, sums], of all tasks, also of those that are empty here."""
        ...


def run_phases(groups: Sequence[LaunchGroup], launch: LaunchSpec, n_tasks: int) -> list[torch.Tensor | None]:
    """Launch the phases one after the other; a phase receives the sums of all before it. Returns all sums."""
    if launch.exchange is not None:
        (phase,) = launch.phases
        phase.launch_sharded(groups, launch, n_tasks)  # type: ignore[attr-defined]
        return [None] * len(groups)
    if len(groups) == 1 and launch.reduce is None:
        with on_device_of(groups[0]):
            total = None
            for phase in launch.phases:
                total = _joined(total, _launched(phase, groups[0], launch, total))
        return [total]
    sums: list[torch.Tensor | None] = [None] * len(groups)
    for phase in launch.phases:
        emitted = []
        for group, earlier in zip(groups, sums, strict=True):
            with on_device_of(group):
                emitted.append(_launched(phase, group, launch, earlier))
        if launch.reduce is not None and phase.n_sums:
            _reduce(launch.reduce, groups, emitted, n_tasks, phase.n_sums)
        sums = [_joined(earlier, new) for earlier, new in zip(sums, emitted, strict=True)]
    return sums


def _launched(phase: Phase, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None) -> torch.Tensor | None:
    if launch.record is not None:
        launch.record.phase(phase, group, launch, 0 if sums is None else sums.shape[1])
    return phase.launch(group, launch, sums)


def _reduce(
    reduce: Reduce, groups: Sequence[LaunchGroup], sums: Sequence[torch.Tensor | None], n_tasks: int, n_sums: int
) -> None:
    """One vector for all groups: a process whose shards are all empty takes part like the others."""
    total = torch.zeros(n_tasks, n_sums, dtype=torch.float64, device=reduce.device)
    for group, values in zip(groups, sums, strict=True):
        assert values is not None
        total.index_copy_(0, group.places, values)
    reduce(total)
    for group, values in zip(groups, sums, strict=True):
        assert values is not None
        values.copy_(total[group.places])


def _joined(earlier: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    return torch.cat((earlier, new), dim=1) if earlier is not None and new is not None else new
