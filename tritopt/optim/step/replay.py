"""A step like an earlier one with gradients of the same parameters: only their addresses and scalars are looked at.

What a step checks and derives holds as long as parameters, states and their memory are the same ones, and gradients
look the same. A `Replay` asks whether they are (tritopt/engine/walk.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine.group import Array, LaunchGroup, ScalarTable
from tritopt.engine.phase import LaunchSpec, run_phases
from tritopt.engine.plan import Planner
from tritopt.engine.replay import NormTables, ReplayTable, table_of
from tritopt.engine.walk import known_states, n_words, walk
from tritopt.optim.clip import squares
from tritopt.optim.distributed import ShardSums, is_dtensor, local
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.group_options import OptionsByGroup
from tritopt.optim.step.members import LaunchPlan, Member, SingleParameter, groups_of, is_in_norm, launch_for, params_of
from tritopt.optim.step.owner import Owner
from tritopt.optim.step.reference import update_by_reference
from tritopt.optim.step.scalar_table import HostScalars
from tritopt.optim.step.states import Complete, complete_task
from tritopt.optim.step.undo import Undo


class _Update(NamedTuple):
    """Tables, scalars and launch of one plan's update."""

    tables: list[ReplayTable]
    """Tables of its groups; none where the reference updates it."""
    scalars: HostScalars
    launches: list[LaunchSpec]
    """The launch as it was first made: at most one element, none until first use."""


class Replay:
    """A step that was built, and made without copies, to be made again. See the module.

    Args:
        planner: the optimizer's planner.
        opt: the optimizer.
        options: options of its param_groups.
        members: all parameters that had a gradient.
        launched: the launches, and for each the engine's groups.
        norm_groups: groups of the gradients' norm; none if there was no norm.
        complete: parameters whose states were found complete beside these.
        single: the parameter, if the step was for one; None: it was for all.
        like: a step that was found to have the same states as this one; None: there is none.
    """

    def __init__(
        self,
        planner: Planner,
        opt: Owner,
        options: OptionsByGroup,
        members: Sequence[Member],
        launched: Sequence[tuple[LaunchPlan, list[LaunchGroup]]],
        norm_groups: list[LaunchGroup],
        complete: Complete,
        single: SingleParameter | None,
        like: Replay | None,
    ) -> None:
        self._planner = planner
        self.members = _without_gradients(members)
        stripped = {id(member): new for member, new in zip(members, self.members, strict=True)}
        self.positions = [member.position for member in members]
        self.reduce: ShardSums | None = None
        """Reduction of the gradients' norm over processes; None until it was asked for."""
        self.plans = [plan for plan, _ in launched]
        for plan in self.plans:
            plan.by_group[:] = [[stripped[id(member)] for member in in_group] for in_group in plan.by_group]
        self._updates = {
            id(plan): _Update(
                [table_of(group, np.array(plan.places, np.int64)) for group in groups],
                HostScalars(plan.by_group, plan.draws, self.positions),
                [],
            )
            for plan, groups in launched
        }
        self.normed = [member for member in self.members if is_in_norm(member)]
        """Members whose gradients have a global norm."""
        places = np.flatnonzero([is_in_norm(member) for member in self.members])
        self._norm = NormTables(planner, norm_groups, places)
        self._single = single
        self._walk = walk()
        self._options = options
        self._version = options.version
        self._groups = list(groups_of(opt, single))
        self._build_keys = [options.of(group).build_key for group in self._groups]
        self._rules = [options.of(group).rule for group in self._groups]
        self._settings = _settings(opt)
        self._params = params_of(opt, single)
        self._lists = [] if single is not None else list(map(list, options.lists))
        """Parameters of each group: one that moves to the next group takes other options, in the same order of all."""
        has_grad = [param.grad is not None for param in self._params]
        self._with_grad = None if all(has_grad) else np.flatnonzero(has_grad)
        self._named = _named(self._groups)
        self._names = _names(self._named)
        self._known: tuple[list[Any], Any, Array] = (
            known_states(self._walk, self._states(opt)) if like is None else like._known
        )
        self._is_sharded = any(is_dtensor(member.param) for member in members)
        self._members_params = [member.param for member in self.members]
        grads = [None if param.grad is None else local(param.grad) for param in self._params]
        self._n_words = n_words(grads)
        self._addresses = np.zeros(len(grads), np.int64)
        self._grads_are = self._walk.describe(grads, self._addresses, self._n_words)
        self._grads = self._of_members(self._addresses)
        weights = self._weights()
        self._weights_at = np.zeros(len(weights), np.int64)
        self._weights_are = self._walk.describe(weights, self._weights_at, n_words(weights))
        self.device = local(members[0].param).device
        self.n_bindings = self.n_made = -1
        """Numbers of this name of `ScalarStates`, as they were after the step that it repeats."""
        self.complete = complete
        self.has_other_gradients = False
        """Whether `holds` found other gradients than before, and all else as it was, when it was asked last."""

    def holds(self, opt: Owner, options: OptionsByGroup) -> bool:
        """Whether it is this step again. If it is, takes hyperparameters and gradients from the optimizer."""
        ask, self.has_other_gradients = self._walk, False
        if self._known[1] is None or self._weights_are is None or self._grads_are is None:
            return False
        is_held = self._single is not None or ask.hold(options.lists, self._lists)
        if not is_held or _settings(opt) != self._settings or not self._takes_options(opt, options):
            return False
        if _names(self._named) != self._names or not ask.states_are(self._states(opt), *self._known):
            return False
        # A weight may have become another view of the same memory.
        if not ask.are(self._weights(), self._weights_are, self._weights_at):
            return False
        self.has_other_gradients = not self._takes_grads(self._params)
        return not self.has_other_gradients

    def squares(self, reduce: ShardSums) -> torch.Tensor:
        """Sum of squares of each gradient that is normed, fp64 [members, 1]."""
        if not self._norm:
            params = [member.param for member in self.normed]
            grads: list[Any] = [param.grad for param in params]
            return squares(self._planner, ("replayed", *self.positions), params, grads, reduce)
        return self._norm.squares(self._grads, self.device, reduce if reduce else None)

    def host_scalars(
        self, plan: LaunchPlan, options: OptionsByGroup, scalar_states: ScalarStates
    ) -> tuple[type, ScalarTable]:
        """Type of the rule's scalars, and the scalars of the plan's members."""
        return self._updates[id(plan)].scalars.table(options, scalar_states)

    def launch_of(
        self, plan: LaunchPlan, scalars: type, shard_sums: Callable[[Hashable, list[Member]], ShardSums]
    ) -> LaunchSpec:
        """Make the launch of a plan the first time; return the same one after that."""
        launches = self._updates[id(plan)].launches
        if not launches:
            launches.append(self._planner.configured(launch_for(plan, scalars, shard_sums)))
        return launches[0]

    def launch(self, opt: Owner, plan: LaunchPlan, table: ScalarTable, launch: LaunchSpec, undo: Undo) -> None:
        """Update the plan's parameters."""
        if not plan.is_fused:
            members = [member for in_group in plan.by_group for member in in_group]
            grads: list[Any] = [member.param.grad for member in members]
            tasks = [
                complete_task(opt, member, member.param.detach(), grad, opt.state.get(member.param, {}))
                for member, grad in zip(members, grads, strict=True)
            ]
            update_by_reference(members, tasks, table, launch, undo)
            return
        tables = self._updates[id(plan)].tables
        undo.updates.begin(chain.from_iterable(plan.by_group))
        for replay_table in tables:
            replay_table.upload(self._grads, table.place_of, table.values)
        run_phases([replay_table.group for replay_table in tables], launch, len(plan.places))

    def finish(self) -> None:
        """Tell autograd of writes that it did not make."""
        self._walk.mark_written(self._members_params)

    def next(self, opt: Owner, options: OptionsByGroup) -> Replay:
        """Return itself: the next step may be like this one."""
        return self

    def _states(self, opt: Owner) -> dict[Any, dict[str, Any]]:
        """States of all parameters, or of the single one: to look them up one by one takes longer."""
        return opt.state if self._single is None else {self._single.param: opt.state.get(self._single.param, {})}

    def _takes_grads(self, params: list[torch.Tensor]) -> bool:
        addresses = np.empty(len(params), np.int64)
        if self._is_sharded:
            grads = [param.grad for param in params]
            for grad, param in zip(grads, params, strict=True):
                if grad is not None and is_dtensor(param) and getattr(grad, "placements", None) != param.placements:
                    return False
            locals_ = [None if grad is None else local(grad) for grad in grads]
            if self._walk.describe(locals_, addresses, self._n_words) != self._grads_are:
                return False
        elif not self._walk.gradients_are(params, self._grads_are, addresses):
            return False
        if addresses.tobytes() != self._addresses.tobytes():
            self._addresses, self._grads = addresses, self._of_members(addresses)
        return True

    def _of_members(self, addresses: Array) -> Array:
        return addresses if self._with_grad is None else addresses[self._with_grad]

    def _takes_options(self, opt: Owner, options: OptionsByGroup) -> bool:
        if options is self._options and options.version == self._version:
            return True
        groups = groups_of(opt, self._single)
        if not self._walk.same(list(groups), self._groups):
            return False
        of_groups = [options.of(group) for group in groups]
        if [of_group.build_key for of_group in of_groups] != self._build_keys or not self._walk.same(
            _named(groups), self._named
        ):
            return False
        if any(
            of_group.rule.skips_zero_lr and type(of_group.rate) is float and of_group.rate == 0
            for of_group in of_groups
        ):
            return False
        rules = [of_group.rule for of_group in of_groups]
        if not self._walk.same(rules, self._rules):
            if any((a.phases, a.preamble) != (b.phases, b.preamble) for a, b in zip(rules, self._rules, strict=True)):
                return False
            self._rules = rules
            rule_of = {id(group): rule for group, rule in zip(groups, rules, strict=True)}
            for plan in self.plans:
                plan.by_group[:] = [
                    [m._replace(rule=rule_of[id(m.group)]) for m in in_group] for in_group in plan.by_group
                ]
            self.members = [member._replace(rule=rule_of[id(member.group)]) for member in self.members]
        self._options, self._version = options, options.version
        return True

    def _weights(self) -> list[torch.Tensor]:
        """Parts of the members' parameters that are here."""
        return list(map(local, self._members_params)) if self._is_sharded else self._members_params


def _settings(opt: Owner) -> tuple[Any, ...]:
    """Settings that are in no group, and decide which launches a step takes, or the random bits."""
    return opt.max_grad_norm is None, opt.track, opt.rounding_seed


def _named(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups whose parameters have names."""
    return [group for group in groups if group.get("param_names")]


def _names(named: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Names of the parameters of groups that have some: random bits depend on them."""
    return [list(group["param_names"]) for group in named]


def _without_gradients(members: Sequence[Member]) -> list[Member]:
    """Members without their gradients, whose memory would otherwise be taken for as long as steps are alike."""
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    return [member._replace(grad=nothing) for member in members]
