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

from tritopt.engine.group import Array, Group, Rows
from tritopt.engine.phase import Launch, run_phases
from tritopt.engine.plan import Planner
from tritopt.engine.replay import NormTables, ReplayTable, table_of
from tritopt.engine.walk import known_states, n_words, walk
from tritopt.optim.clip import squares
from tritopt.optim.distributed import ShardSums, is_dtensor, local
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.group_options import Hypers
from tritopt.optim.step.members import Bucket, Member, Only, groups_of, launch_for, params_of
from tritopt.optim.step.owner import Owner
from tritopt.optim.step.reference import update_by_reference
from tritopt.optim.step.scalar_table import HostRows
from tritopt.optim.step.states import complete_task
from tritopt.optim.step.undo import Undo


class _Update(NamedTuple):
    """Tables, scalars and launch of a bucket's update."""

    tables: list[ReplayTable]
    """Tables of its groups; none where the reference updates it."""
    rows: HostRows
    launches: list[Launch]
    """At most one element; empty until first use."""


class Replay:
    """A step that was built, and made without copies, to be made again. See the module.

    Args:
        planner: of the optimizer.
        opt: the optimizer.
        hypers: its hyperparameters.
        members: all parameters that had a gradient.
        launched: the launches, and for each the engine's groups.
        norm_groups: those of the gradients' norm, if there was one.
        only: the parameter, if the step was for one.
        like: a step that was found to have the same states as this one; None: there is none.
    """

    def __init__(
        self,
        planner: Planner,
        opt: Owner,
        hypers: Hypers,
        members: Sequence[Member],
        launched: Sequence[tuple[Bucket, list[Group]]],
        norm_groups: list[Group],
        only: Only | None,
        like: Replay | None,
    ) -> None:
        self._planner = planner
        self.members = _without_gradients(members)
        stripped = {id(member): new for member, new in zip(members, self.members, strict=True)}
        self.positions = [member.position for member in members]
        self.reduce: ShardSums | None = None
        """Reduction of the gradients' norm over processes; None until it was asked for."""
        self.buckets = [bucket for bucket, _ in launched]
        for bucket in self.buckets:
            bucket.runs[:] = [[stripped[id(member)] for member in some] for some in bucket.runs]
        self._updates = {
            id(bucket): _Update(
                [table_of(group, np.array(bucket.places, np.int64)) for group in groups],
                HostRows(bucket.runs, bucket.draws, self.positions),
                [],
            )
            for bucket, groups in launched
        }
        self._norm = NormTables(planner, norm_groups, len(members))
        self._only = only
        self._walk = walk()
        self._hypers = hypers
        self._generation = hypers.generation
        self._groups = list(groups_of(opt, only))
        self._ways = [hypers.of(group).way for group in self._groups]
        self._rules = [hypers.of(group).rule for group in self._groups]
        self._options = _options(opt)
        self._params = params_of(opt, only)
        has_grad = [param.grad is not None for param in self._params]
        self._with_grad = None if all(has_grad) else np.flatnonzero(has_grad)
        self._named = _named(self._groups)
        self._names = _names(self._named)
        self._owners: list[Any] = self._owners_now(opt) if like is None else like._owners
        self._known: tuple[Any, Array] = (
            known_states(self._walk, self._states_now(opt)) if like is None else like._known
        )
        self._is_sharded = any(is_dtensor(member.param) for member in members)
        self._members_params = [member.param for member in self.members]
        grads = [None if param.grad is None else local(param.grad) for param in self._params]
        self._n_words = n_words(grads)
        self._found = np.zeros(len(grads), np.int64)
        self._kinds = self._walk.describe(grads, self._found, self._n_words)
        self._grads = self._of_members(self._found)
        weights = self._weights()
        self._weights_at = np.zeros(len(weights), np.int64)
        self._weights_are = self._walk.describe(weights, self._weights_at, n_words(weights))
        self.device = local(members[0].param).device
        self.has_other_gradients = False
        """Whether `holds` found other gradients than before, and all else as it was, when it was asked last."""

    def holds(self, opt: Owner, hypers: Hypers) -> bool:
        """Whether it is this step again. If it is, takes hyperparameters and gradients from the optimizer."""
        ask, self.has_other_gradients = self._walk, False
        if self._known[0] is None or self._weights_are is None or self._kinds is None:
            return False
        is_held = self._only is not None or ask.hold(hypers.lists, self._params)
        if not is_held or _options(opt) != self._options or not self._takes_hypers(opt, hypers):
            return False
        if _names(self._named) != self._names or not ask.same(self._owners_now(opt), self._owners):
            return False
        if not ask.states_are(self._states_now(opt), *self._known):
            return False
        # A weight may have become another view of the same memory.
        if not ask.are(self._weights(), self._weights_are, self._weights_at):
            return False
        self.has_other_gradients = not self._takes_grads(self._params)
        return not self.has_other_gradients

    def squares(self, reduce: ShardSums) -> torch.Tensor:
        """Sum of squares of each gradient, fp64 [members, 1]."""
        if not self._norm:
            grads: list[Any] = [param.grad for param in self._members_params]
            return squares(self._planner, ("replayed", *self.positions), self._members_params, grads, reduce)
        return self._norm.squares(self._grads, self.device, reduce if reduce else None)

    def host_rows(self, bucket: Bucket, hypers: Hypers, numbers: ScalarStates) -> tuple[type, Rows]:
        """Scalars of the bucket's members."""
        return self._updates[id(bucket)].rows.rows(hypers, numbers)

    def launch_of(
        self, bucket: Bucket, scalars: type, shard_sums: Callable[[Hashable, list[Member]], ShardSums]
    ) -> Launch:
        """Make the launch of a bucket, the first time; the same after that."""
        launches = self._updates[id(bucket)].launches
        if not launches:
            launches.append(self._planner.configured(launch_for(bucket, scalars, shard_sums)))
        return launches[0]

    def launch(self, opt: Owner, bucket: Bucket, rows: Rows, launch: Launch, undo: Undo) -> None:
        """Update the bucket's parameters."""
        if not bucket.is_fused:
            members = [member for some in bucket.runs for member in some]
            grads: list[Any] = [member.param.grad for member in members]
            tasks = [
                complete_task(opt, member, member.param.detach(), grad, opt.state.get(member.param, {}))
                for member, grad in zip(members, grads, strict=True)
            ]
            update_by_reference(members, tasks, rows, launch, undo)
            return
        tables = self._updates[id(bucket)].tables
        undo.updates.begin(chain.from_iterable(bucket.runs))
        for table in tables:
            table.upload(self._grads, rows.row_of, rows.values)
        run_phases([table.group for table in tables], launch, len(bucket.places))

    def finish(self) -> None:
        """Autograd must learn of writes that it did not make."""
        torch.autograd.graph.increment_version(self._members_params)

    def next(self, opt: Owner, hypers: Hypers) -> Replay:
        """The next step may be like this one."""
        return self

    def _states_now(self, opt: Owner) -> list[dict[str, Any]]:
        """Of all parameters, in the order of their first step: to look them up one by one takes longer."""
        return list(opt.state.values()) if self._only is None else [opt.state.get(self._only.param, {})]

    def _owners_now(self, opt: Owner) -> list[Any]:
        """The parameters whose states `_states_now` gives, in that order."""
        return list(opt.state) if self._only is None else []

    def _takes_grads(self, params: list[torch.Tensor]) -> bool:
        found = np.empty(len(params), np.int64)
        if self._is_sharded:
            grads = [param.grad for param in params]
            for grad, param in zip(grads, params, strict=True):
                if grad is not None and is_dtensor(param) and getattr(grad, "placements", None) != param.placements:
                    return False
            locals_ = [None if grad is None else local(grad) for grad in grads]
            if self._walk.describe(locals_, found, self._n_words) != self._kinds:
                return False
        elif not self._walk.gradients_are(params, self._kinds, found):
            return False
        if found.tobytes() != self._found.tobytes():
            self._found, self._grads = found, self._of_members(found)
        return True

    def _of_members(self, found: Array) -> Array:
        return found if self._with_grad is None else found[self._with_grad]

    def _takes_hypers(self, opt: Owner, hypers: Hypers) -> bool:
        if hypers is self._hypers and hypers.generation == self._generation:
            return True
        groups = groups_of(opt, self._only)
        if not self._walk.same(list(groups), self._groups):
            return False
        of_groups = [hypers.of(group) for group in groups]
        if [hyper.way for hyper in of_groups] != self._ways or not self._walk.same(_named(groups), self._named):
            return False
        if any(hyper.rule.skips_zero_lr and type(hyper.rate) is float and hyper.rate == 0 for hyper in of_groups):
            return False
        rules = [hyper.rule for hyper in of_groups]
        if not self._walk.same(rules, self._rules):
            if any((a.phases, a.preamble) != (b.phases, b.preamble) for a, b in zip(rules, self._rules, strict=True)):
                return False
            self._rules = rules
            rule_of = {id(group): rule for group, rule in zip(groups, rules, strict=True)}
            for bucket in self.buckets:
                bucket.runs[:] = [[m._replace(rule=rule_of[id(m.group)]) for m in some] for some in bucket.runs]
            self.members = [member._replace(rule=rule_of[id(member.group)]) for member in self.members]
        self._hypers, self._generation = hypers, hypers.generation
        return True

    def _weights(self) -> list[torch.Tensor]:
        """Of the members, what is here."""
        return list(map(local, self._members_params)) if self._is_sharded else self._members_params


def _options(opt: Owner) -> tuple[Any, ...]:
    """What is in no group, and decides which launches a step takes, or the random bits."""
    return opt.max_grad_norm is None, opt.track, opt.rounding_seed


def _named(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose parameters have names."""
    return [group for group in groups if group.get("param_names")]


def _names(named: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Names of the parameters of groups that have some: random bits depend on them."""
    return [list(group["param_names"]) for group in named]


def _without_gradients(members: Sequence[Member]) -> list[Member]:
    """A gradient that is kept here would take its memory for as long as steps are alike."""
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    return [member._replace(grad=nothing) for member in members]
