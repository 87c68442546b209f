"""One step: from parameters and gradients to launches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from tritopt.engine import validate
from tritopt.engine.clip import Clip
from tritopt.engine.device import current_stream, share_with_streams
from tritopt.engine.group import ScalarTable
from tritopt.engine.plan import Planner
from tritopt.engine.recent import Recent
from tritopt.engine.telemetry import Telemetry, Tracker, check_asked, telemetry
from tritopt.engine.walk import warn_if_slow
from tritopt.optim.distributed import ShardSums, is_dtensor, local
from tritopt.optim.param_group import is_kept
from tritopt.optim.step.build import Build, check_tracked, runs_fused
from tritopt.optim.step.counts import CPU, ScalarStates
from tritopt.optim.step.group_options import OptionsByGroup
from tritopt.optim.step.members import (
    LaunchPlan,
    Member,
    SingleParameter,
    groups_of,
    member_of,
    members_of,
    names_of,
    params_of,
    split_by_group,
)
from tritopt.optim.step.owner import Owner
from tritopt.optim.step.replay import Replay
from tritopt.optim.step.scalar_table import DeviceScalars
from tritopt.optim.step.scale import moved, scalar_of, skip_of, unclipped
from tritopt.optim.step.states import Complete, check_aliases, create_missing, task_of
from tritopt.optim.step.undo import Undo


class Stepper:
    """The steps of one optimizer, with what is derived from its parameters and states and may be thrown away.

    Args:
        scalar_states: names and first values of the numbers kept per parameter.
    """

    def __init__(self, scalar_states: Mapping[str, float]) -> None:
        self._scalar_states = ScalarStates(scalar_states)
        self._planner = Planner()
        self._device_scalars: dict[Hashable, DeviceScalars] = {}
        self._reductions: Recent[ShardSums] = Recent()
        self._clip = Clip()
        self.grad_norm: torch.Tensor | None = None
        """Norm of the last step's gradients, None if it had none or clipped none; its memory is the next one's too."""
        self.tracker = Tracker()
        self._options = OptionsByGroup()
        self._last: Replay | None = None
        """The last step; None after one that cannot be repeated."""
        self._replays: Recent[Replay] = Recent()
        """Steps by which parameters had gradients: two heads that take turns, or experts without tokens, come again."""
        self._params: list[torch.Tensor] = []
        """All parameters of these steps."""
        self._options_of: dict[int, OptionsByGroup] = {}
        """Options of steps for one parameter, by its position."""
        self._replay_of: dict[int, Replay] = {}
        """Steps for one parameter that may be made again, by its position."""
        self.of_graphs: list[Any] = []
        """Steps, tables and scalars that CUDA graphs have captured, and read with each replay."""
        self._streams: dict[torch.device, int] = {}
        """Current streams of the last step whose scalars were formed on the device, by device."""

    def update(self, opt: Owner, single: SingleParameter | None = None, is_captured: bool = False) -> None:
        """Update every parameter that has a gradient, or only one. Checks all before it writes anything.

        After a failure or an interrupt, parameters that no kernel was launched for have the weights, states and counts
        that they had.

        is_captured: whether a CUDA graph captures the step, whose replays will read and write the memory of this step.
        """
        validate.clip_bound("max_grad_norm", opt.max_grad_norm)
        self.grad_norm = None
        undo = Undo(opt, self._scalar_states)
        try:
            self._update(opt, single, is_captured, undo)
        except BaseException:
            undo()
            # What was derived may be half of what it should be: the next step derives all of it again.
            self._forget_plans()
            raise

    def _update(self, opt: Owner, single: SingleParameter | None, is_captured: bool, undo: Undo) -> None:
        found_inf, grad_scale = scalar_of(getattr(opt, "found_inf", None)), scalar_of(getattr(opt, "grad_scale", None))
        options = self._options if single is None else self._options_of.setdefault(single.position, OptionsByGroup())
        options.refresh(opt, groups_of(opt, single))
        on_device = found_inf is not None or self._scalar_states.device != CPU or options.on_device
        step = self._step(opt, options, on_device, undo, single)
        if step is None:
            return
        rescale = self._gradient_scale(opt, step, grad_scale)
        if on_device:
            self._follow_streams(step)
        skip = skip_of(found_inf, rescale, self._scalar_states.device) if on_device else None
        self._advance(step.members, step.positions, skip, not on_device)
        tables = [self._scalar_table(step, plan, options, on_device, single) for plan in step.plans]
        undo.replaced.clear()
        for plan, (scalars, table) in zip(step.plans, tables, strict=True):
            launch = step.launch_of(plan, scalars, self._shard_sums)
            scale = rescale if plan.is_in_norm else unclipped(rescale, grad_scale)
            launch = launch.given(moved(scale, plan.device), moved(found_inf, plan.device), [] if opt.track else None)
            step.launch(opt, plan, table, launch, undo)
            if launch.tracked is not None:
                self.tracker.add([member.position for members in plan.by_group for member in members], launch.tracked)
        step.finish()
        if is_captured:
            self.of_graphs.append((step, self._planner.held(), self._clip.held(), self._tensors()))
        following = None if self._scalar_states.is_shared else step.next(opt, options)
        self._keep(opt, single, following, following is not step)

    def _tensors(self) -> list[torch.Tensor]:
        """Return the tensors on the device that one step after the other reads."""
        return [*self._scalar_states.tensors(), *(table.values for table in self._device_scalars.values())]

    def _follow_streams(self, step: Build | Replay) -> None:
        """Keep for the current streams what was made on others."""
        streams = {plan.device: current_stream(plan.device) for plan in step.plans}
        if streams != self._streams:
            self._streams = streams
            share_with_streams(self._tensors())

    def _forget_plans(self) -> None:
        self._planner.forget()
        self._clip, self._options, self._last = Clip(), OptionsByGroup(), None
        self._options_of, self._replay_of, self._device_scalars = {}, {}, {}
        self._params, self._replays = [], Recent()

    def create_states(self, opt: Owner) -> None:
        """Make the states of all parameters, as they are otherwise made with a first gradient."""
        members = [
            member_of(opt, position, name, param, param, group, opt.rule_of(group))
            for position, (name, (param, group)) in enumerate(zip(names_of(opt), _owned(opt), strict=True))
            if is_kept(param)
        ]
        self._bind(opt, CPU)
        create_missing(opt, members, self._scalar_states, [])

    def _bind(self, opt: Owner, device: torch.device) -> None:
        owned = _owned(opt)
        states = [opt.state.get(param, {}) for param, _ in owned]

        def is_shown(position: int) -> bool:
            return opt.layout_of(*owned[position]).shows_numbers

        self._scalar_states.bind(states, device, is_shown, opt.first_count)

    def _step(
        self, opt: Owner, options: OptionsByGroup, on_device: bool, undo: Undo, single: SingleParameter | None
    ) -> Build | Replay | None:
        """The step to make, checked: an earlier one again, or one that is built. None: there is no gradient."""
        like = None
        for earlier in self._candidates(opt, single):
            is_there = self._counts_as(earlier, earlier.device if on_device else CPU, single)
            if is_there and earlier.holds(opt, options):
                undo.remember(earlier.positions, not on_device)
                return earlier
            if is_there and single is None and earlier.has_other_gradients:
                like = earlier
        members = members_of(opt, single)
        if single is None:
            self._forget_steps_of_others(params_of(opt, None))
        if not members:
            return None
        device = local(members[0].param).device if on_device else CPU
        if like is None:  # which was found to have the same states
            self._bind(opt, device)
        if not any(validate.is_allocated(local(member.param)) for member in members):
            self._make_states(opt, members, undo)
            return None
        undo.remember([member.position for member in members], not on_device)
        complete = Complete() if like is None else like.complete
        known = [complete.has(member) for member in members]
        others = [i for i, is_known in enumerate(known) if not is_known]
        create_missing(opt, [members[i] for i in others], self._scalar_states, undo.replaced)
        tasks = [task_of(opt, member, is_known) for member, is_known in zip(members, known, strict=True)]
        fused = [runs_fused(opt, member) for member in members]
        if any(fused):  # the reference takes longer than any walk
            warn_if_slow()
        if opt.track:
            check_tracked(opt, members, fused)
        if others or not complete.are_apart(members):
            check_aliases(self._planner, members, tasks)
            complete.add([members[i] for i in others], [tasks[i] for i in others])
        like = None if undo.replaced else like
        return Build(self._planner, members, tasks, options.rates, fused, complete, single, like)

    def _make_states(self, opt: Owner, members: list[Member], undo: Undo) -> None:
        """Make the step of parameters without memory: states, of which somebody wants to know the size, and counts."""
        create_missing(opt, members, self._scalar_states, undo.replaced)
        for member in members:
            if member.grad.layout is torch.strided:  # torch makes no dense tensor of a sparse one on meta
                task_of(opt, member)
        self._advance(members, [member.position for member in members], None, on_host=False)

    def telemetry(self, opt: Owner) -> Telemetry:
        """Telemetry of the last step, as `Optimizer.telemetry` shows it."""
        check_asked(opt.track, type(opt).__name__)
        params = params_of(opt, None)
        sums = self.tracker.sums(range(len(params)))
        reduce = ShardSums(params)
        if reduce:
            on_device = sums.to(reduce.device)
            reduce(on_device)
            sums = on_device.cpu()
        return telemetry(names_of(opt), [0 if is_lazy(param) else param.numel() for param in params], sums)

    def _candidates(self, opt: Owner, single: SingleParameter | None) -> Iterator[Replay]:
        """Yield steps that this one may repeat: the last, and the last with gradients of the same parameters."""
        if single is not None:
            earlier = self._replay_of.pop(single.position, None)
            if (
                earlier is not None
                and earlier.members[0].group is single.group
                and earlier.members[0].param is single.param
            ):
                yield earlier
            return
        last, self._last = self._last, None
        if last is not None:
            yield last
        if last is None or last.has_other_gradients:
            earlier = self._replays.get(_with_gradients(params_of(opt, None)))
            if earlier is not None and earlier is not last:
                yield earlier

    def _counts_as(self, earlier: Replay, device: torch.device, single: SingleParameter | None) -> bool:
        """Whether numbers lie where they lay then, on this device.

        States may be again as they were, and numbers not: those of a state that was taken out and put back, or made
        and removed. The latter is another's affair in a step of a single parameter, which has made its own.
        """
        now = self._scalar_states
        is_bound = now.device == device and now.n_bindings == earlier.n_bindings
        return is_bound and (single is not None or now.n_made == earlier.n_made)

    def _forget_steps_of_others(self, params: list[torch.Tensor]) -> None:
        """Let go of parameters that the optimizer no longer has."""
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._params, self._replays = params, Recent()

    def _keep(self, opt: Owner, single: SingleParameter | None, step: Replay | None, is_new: bool) -> None:
        if step is not None and is_new:
            step.n_bindings, step.n_made = self._scalar_states.n_bindings, self._scalar_states.n_made
        if single is not None:
            if step is not None:
                self._replay_of[single.position] = step
            return
        self._last = step
        if step is not None and is_new:
            self._replays.put(_with_gradients(params_of(opt, None)), step, len(step.members))

    def _gradient_scale(self, opt: Owner, step: Build | Replay, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
        """Factor of the gradients, fp64 [] on the device: loss scale and clip. NaN: skip. None: 1."""
        inverse = None if grad_scale is None else 1.0 / grad_scale.double()
        if opt.max_grad_norm is None or not step.normed:
            return inverse
        if step.reduce is None:
            step.reduce = self._shard_sums("norm", step.normed)
        sums = step.squares(step.reduce)
        inverse = None if inverse is None else inverse.to(sums.device)
        factor = self._clip(sums, opt.max_grad_norm, inverse, self._planner.record)
        self.grad_norm = self._clip.norm
        return factor

    def _advance(
        self, members: Sequence[Member], positions: Sequence[int], skip: torch.Tensor | None, on_host: bool
    ) -> None:
        self._scalar_states.advance(positions, skip, on_host)
        for name in members[0].rule.scalar_states:
            for in_group in split_by_group(members):
                positions = [member.position for member in in_group]
                factors = in_group[0].rule.factors(name, self._scalar_states.get("step", positions))
                self._scalar_states.multiply(name, positions, factors, skip)

    def _scalar_table(
        self,
        step: Build | Replay,
        plan: LaunchPlan,
        options: OptionsByGroup,
        on_device: bool,
        single: SingleParameter | None,
    ) -> tuple[type, ScalarTable]:
        if on_device:
            key = (plan.key, None if single is None else single.position)
            return self._device_scalars.setdefault(key, DeviceScalars()).table(
                plan.by_group, options, self._scalar_states, plan.draws
            )
        return step.host_scalars(plan, options, self._scalar_states)

    def _shard_sums(self, key: Hashable, members: Sequence[Member]) -> ShardSums:
        """Sums over processes for these parameters; made once, because that uploads."""
        if not any(is_dtensor(member.param) for member in members):
            return ShardSums([])
        key = (key, tuple(member.position for member in members))
        sums = self._reductions.get(key)
        if sums is None:
            sums = self._reductions.put(key, ShardSums([member.param for member in members]), len(members))
        return sums


def _owned(opt: Owner) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """All parameters with their groups."""
    return [(param, group) for group in opt.param_groups for param in group["params"]]


def _with_gradients(params: Sequence[torch.Tensor]) -> bytes:
    """A byte for each parameter: whether it has a gradient."""
    return bytes([param.grad is not None for param in params])
