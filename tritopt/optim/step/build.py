"""A step from scratch: everything is looked at and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from tritopt.engine.group import LaunchGroup, ScalarTable
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Planner, Task, unavailable
from tritopt.engine.telemetry import refuse
from tritopt.engine.warning import warn_once
from tritopt.optim import distributed
from tritopt.optim.clip import squares
from tritopt.optim.distributed import ShardSums, is_dtensor, local
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.group_options import OptionsByGroup
from tritopt.optim.step.members import (
    LaunchPlan,
    Member,
    Number,
    SingleParameter,
    is_in_norm,
    launch_for,
    split_by_group,
)
from tritopt.optim.step.owner import Owner
from tritopt.optim.step.reference import update_by_reference
from tritopt.optim.step.replay import Replay
from tritopt.optim.step.scalar_table import host_scalars
from tritopt.optim.step.states import Complete
from tritopt.optim.step.undo import Undo


class Build:
    """Step that is built from scratch; `Replay` is the same for the steps that follow.

    Args:
        planner: the optimizer's planner.
        members: all parameters that have a gradient.
        tasks: tensors of the members.
        rates: learning rates of their groups, by `id` of the group.
        fused: whether a kernel updates each member.
        complete: parameters whose states were found complete beside these.
        single: the parameter, if the step is for one; None: it is for all.
        like: an earlier step with the same states, which need not be described anew; None: there is none.
    """

    def __init__(
        self,
        planner: Planner,
        members: Sequence[Member],
        tasks: Sequence[Task],
        rates: Mapping[int, Number],
        fused: Sequence[bool],
        complete: Complete,
        single: SingleParameter | None,
        like: Replay | None,
    ) -> None:
        self._planner = planner
        self._complete = complete
        self._single = single
        self._like = like
        self._tasks = tasks
        self.members = list(members)
        self._launched: list[tuple[LaunchPlan, list[LaunchGroup]]] = []
        self.plans = [
            LaunchPlan(
                key,
                split_by_group([members[i] for i in places], members[places[0]].rule.is_per_parameter),
                places,
                *key[-2:],
                key[2],
            )
            for key, places in _by_launch(members, tasks, rates, fused).items()
        ]
        self.reduce: ShardSums | None = None
        """Reduction of the gradients' norm over processes; None until it was asked for."""
        self.positions = [member.position for member in self.members]
        self.normed = [member for member in self.members if is_in_norm(member)]
        """Members whose gradients have a global norm."""

    def squares(self, reduce: ShardSums) -> torch.Tensor:
        """Sum of squares of each gradient that is normed, fp64 [members]."""
        params, grads = [member.param for member in self.normed], [member.grad for member in self.normed]
        return squares(self._planner, self._key, params, grads, reduce)

    def host_scalars(
        self, plan: LaunchPlan, options: OptionsByGroup, scalar_states: ScalarStates
    ) -> tuple[type, ScalarTable]:
        """Type of the rule's scalars, and the scalars of the plan's members."""
        return host_scalars(plan.by_group, options, scalar_states, plan.draws)

    def launch_of(
        self, plan: LaunchPlan, scalars: type, shard_sums: Callable[[Hashable, list[Member]], ShardSums]
    ) -> LaunchSpec:
        """Make the launch of a plan."""
        return launch_for(plan, scalars, shard_sums)

    @property
    def _key(self) -> Hashable:
        return tuple(member.position for member in self.normed)

    def launch(self, opt: Owner, plan: LaunchPlan, table: ScalarTable, launch: LaunchSpec, undo: Undo) -> None:
        """Update the plan's parameters, by a kernel or by the reference."""
        tasks = [self._tasks[i] for i in plan.places]
        members = [self.members[i] for i in plan.places]
        if plan.is_fused:
            positions = tuple(member.position for member in members)
            # A step of one parameter has plans of its own: who warms up on one must be alone to upload its tables.
            key = (plan.key, positions, self._single is not None)
            undo.updates.begin(members)
            groups = self._planner.apply(key, tasks, table, launch)
            if groups is not None:
                self._launched.append((plan, groups))
            return
        update_by_reference(members, tasks, table, launch, undo)
        if all(_is_plain(member, task) for member, task in zip(members, tasks, strict=True)):
            self._launched.append((plan, []))

    def finish(self) -> None:
        """Tell autograd of the writes, after the last launch."""
        distributed.mark_written(member.param for member in self.members)

    def next(self, opt: Owner, options: OptionsByGroup) -> Replay | None:
        """The next step, if it can be like this one."""
        if sum(len(plan.places) for plan, _ in self._launched) != len(self.members):
            return None
        if any(task.grad is not local(m.grad) for m, task in zip(self.members, self._tasks, strict=True)):
            return None
        if not all(isinstance(state, dict) for state in opt.state.values()):  # torch lets users keep anything there
            return None
        has_norm = opt.max_grad_norm is not None and any(plan.is_fused and plan.is_in_norm for plan in self.plans)
        norm_groups = self._planner.groups_of_squares(self._key) if has_norm else []
        if norm_groups is None:  # so many plans that this one had to go
            return None
        return Replay(
            self._planner,
            opt,
            options,
            self.members,
            self._launched,
            norm_groups,
            self._complete,
            self._single,
            self._like,
        )


def _is_plain(member: Member, task: Task) -> bool:
    """Whether the reference may repeat an update without looking at the parameter again."""
    is_differentiated = bool(member.group.get("differentiable"))
    return not (is_differentiated or is_dtensor(member.param) or task.grad.layout != torch.strided)


def runs_fused(opt: Owner, member: Member) -> bool:
    """Whether a kernel updates a member. RuntimeError if one must and cannot."""
    wanted, part = member.group["fused"], local(member.param)
    if wanted is False or member.group.get("differentiable"):
        return False
    reason = unavailable(part, "pass fused=False to run the reference step")
    if reason is None and member.needs_whole:
        reason = f"{type(opt).__name__} has no kernel for tensors that are sharded over processes"
    if reason and wanted and part.device.type == "cpu":
        warn_once(opt, f"fused=True on the CPU runs the reference: {reason}")
    elif reason and wanted:
        raise RuntimeError(f"`fused=True`, parameter {member.name!r}: {reason}")
    return reason is None


def check_tracked(opt: Owner, members: Sequence[Member], fused: Sequence[bool]) -> None:
    """ValueError if there is no telemetry of a member."""
    for member, is_fused in zip(members, fused, strict=True):
        if is_fused and not all(phase.is_driver for phase in member.rule.phases):
            refuse(type(opt).__name__, "fused=False")
        if member.needs_whole:
            raise ValueError(
                f"track=True needs the kernel of {type(opt).__name__} for tensors that are sharded over processes: "
                "leave it out, or do without fused=False"
            )


def _by_launch(
    members: Sequence[Member], tasks: Sequence[Task], rates: Mapping[int, Number], fused: Sequence[bool]
) -> dict[tuple[object, object, torch.device, bool, bool], list[int]]:
    """Members by launch; those that a learning rate of 0 leaves alone are in none."""
    places_of: dict[tuple[object, object, torch.device, bool, bool], list[int]] = {}
    known: dict[Hashable, list[int]] = {}
    for i, (member, task) in enumerate(zip(members, tasks, strict=True)):
        # What the key is made of takes long to make and to hash, and is the same for most.
        signature = (id(member.group), id(member.layout), task.weight[0].device, fused[i])
        if signature not in known:
            lr, rule = rates[id(member.group)], member.rule
            is_left_alone = rule.skips_zero_lr and not isinstance(lr, torch.Tensor) and lr == 0
            # Rules that share a kernel may have other scalars.
            what = (type(rule), is_in_norm(member), *rule.phases)
            key = (what, rule.preamble, *signature[2:], member.layout.draws)
            known[signature] = [] if is_left_alone else places_of.setdefault(key, [])
        known[signature].append(i)
    return places_of
