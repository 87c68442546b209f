"""A step like the one before: only gradients' addresses and scalars are new, so only those are looked at.

What a step checks and derives holds as long as parameters, states and their memory are the same ones, and gradients
look the same. A `WarmStep` asks whether they are, in a few passes over the lists that run in C: what is left
for 400 tensors is mostly the reading of `.grad` and of addresses.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tritopt.fused import Task, squares_of
from tritopt.group import Array, Group, Launch, Rows, run_phases, upload_table
from tritopt.optim.distributed import ShardSums, is_dtensor, local
from tritopt.optim.members import Bucket, Member, Number, Only, groups_of, params_of

if TYPE_CHECKING:
    from tritopt.optim.optimizer import Optimizer

_data_ptr, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.is_contiguous
_dtype, _grad, _layout, _version = map(operator.attrgetter, ("dtype", "grad", "layout", "_version"))
_NO_ROW = np.array([[1.0, np.inf, 0.0]])


class _Table(NamedTuple):
    """The engine's group, and its table of addresses, but for those of gradients."""

    group: Group
    members: Array
    """Places of the group's members among all."""
    in_bucket: Array
    words: Array


class WarmStep:
    """Built after a step that was launched without copies. See the module.

    Args:
        opt: the optimizer.
        members: all parameters that had a gradient.
        tasks: their tensors.
        launched: the launches, and for each the engine's groups.
        norm_groups: those of the gradients' norm, if there was one.
        only: the parameter, if the step was for one.
    """

    def __init__(
        self,
        opt: Optimizer,
        members: Sequence[Member],
        tasks: Sequence[Task],
        launched: Sequence[tuple[Bucket, list[Group]]],
        norm_groups: list[Group],
        only: Only | None,
    ) -> None:
        self.members = _without_gradients(members)
        self.buckets = [bucket for bucket, _ in launched]
        for bucket in self.buckets:
            bucket.runs[:] = map(_without_gradients, bucket.runs)
        self._tables = {id(bucket): [_table(bucket, group, tasks) for group in groups] for bucket, groups in launched}
        self._norm_groups = norm_groups
        self._only = only
        self._params = params_of(opt, only)
        self._has_grad = [param.grad is not None for param in self._params]
        self._rules = [opt.rule_of(group) for group in groups_of(opt, only)]
        self._groups = list(groups_of(opt, only))
        self._ways = [_way(group) for group in groups_of(opt, only)]
        self._states = [opt.state[member.param] for member in members]
        self._values = list(chain.from_iterable(map(dict.values, self._states)))
        self._kept = [local(value) for value in self._values if isinstance(value, torch.Tensor)]
        self._is_sharded = any(is_dtensor(member.param) for member in members)
        grads = [local(member.grad) for member in members]
        self._dtypes = list(map(_dtype, grads))
        self._contiguous = list(map(_is_contiguous, grads))
        self._strides = [(i, grad.stride()) for i, grad in enumerate(grads) if not grad.is_contiguous()]
        self._grads = _addresses(grads)
        self._fixed = self._fixed_addresses()
        self._versions = self._read_versions()
        self.device = grads[0].device

    def holds(self, opt: Optimizer, rates: Mapping[int, Number]) -> bool:
        """Whether it is this step again. If it is, takes hyperparameters and gradients from the optimizer."""
        params, groups = params_of(opt, self._only), groups_of(opt, self._only)
        if not _same(params, self._params) or not _same(groups, self._groups):
            return False
        if [_way(group) for group in groups] != self._ways:
            return False
        if any(rule.skips_zero_lr for rule in self._rules) and 0.0 in [r for r in rates.values() if type(r) is float]:
            return False
        states = [opt.state.get(member.param) for member in self.members]
        if not _same(states, self._states):
            return False
        if not _same(list(chain.from_iterable(map(dict.values, self._states))), self._values):
            return False
        if self._fixed_addresses() != self._fixed or self._read_versions() != self._versions:
            return False
        grads = list(map(_grad, params))
        if [grad is not None for grad in grads] != self._has_grad:
            return False
        return self._takes_grads(list(compress(grads, self._has_grad))) and self._takes_rules(opt)

    def norm(self, reduce: ShardSums) -> torch.Tensor:
        """Of all gradients together, fp64 []."""
        for group in self._norm_groups:
            addresses = self._grads[group.members]
            upload_table(group, np.stack([addresses, addresses, np.zeros_like(addresses)], axis=1), _NO_ROW)
        found = squares_of(self._norm_groups, len(self.members), self.device, reduce if reduce else None)
        return found.sum().sqrt()

    def launch(self, bucket: Bucket, rows: Rows, launch: Launch) -> None:
        """Update the bucket's parameters."""
        tables = self._tables[id(bucket)]
        for group, members, in_bucket, words in tables:
            words[:, group.format.n_planes] = self._grads[members]
            words[:, -1] = rows.row_of[in_bucket]
            upload_table(group, words, rows.values)
        run_phases([table.group for table in tables], launch, len(bucket.places))

    def finish(self) -> None:
        """Autograd must learn of writes that it did not make."""
        torch.autograd.graph.increment_version([member.param for member in self.members])
        self._versions = self._read_versions()

    def next(self, opt: Optimizer) -> WarmStep:
        """The next step may be like this one."""
        return self

    def _takes_grads(self, grads: list[Any]) -> bool:
        if self._is_sharded:
            for grad, member in zip(grads, self.members, strict=True):
                if is_dtensor(member.param) and getattr(grad, "placements", None) != member.param.placements:
                    return False
            grads = list(map(local, grads))
        if list(map(_dtype, grads)) != self._dtypes or set(map(_layout, grads)) != {torch.strided}:
            return False
        if list(map(_is_contiguous, grads)) != self._contiguous:
            return False
        if any(grads[i].stride() != stride for i, stride in self._strides):
            return False
        self._grads = _addresses(grads)
        return True

    def _takes_rules(self, opt: Optimizer) -> bool:
        groups = groups_of(opt, self._only)
        rules = [opt.rule_of(group) for group in groups]
        if _same(rules, self._rules):
            return True
        if any((a.phases, a.preamble) != (b.phases, b.preamble) for a, b in zip(rules, self._rules, strict=True)):
            return False
        self._rules = rules
        rule_of = {id(group): rule for group, rule in zip(groups, rules, strict=True)}
        for bucket in self.buckets:
            bucket.runs[:] = [[m._replace(rule=rule_of[id(m.group)]) for m in some] for some in bucket.runs]
        self.members = [member._replace(rule=rule_of[id(member.group)]) for member in self.members]
        return True

    def _fixed_addresses(self) -> bytes:
        """Of what must not move: parameters and states."""
        params: Iterable[torch.Tensor] = (member.param for member in self.members)
        return _addresses(chain(map(local, params) if self._is_sharded else params, self._kept)).tobytes()

    def _read_versions(self) -> list[int]:
        """Of the parameters, which tell of writes by others: a master must follow."""
        params = [member.param for member in self.members]
        return list(map(_version, [*params, *map(local, params)] if self._is_sharded else params))


def _table(bucket: Bucket, group: Group, tasks: Sequence[Task]) -> _Table:
    in_bucket = np.array(group.members, dtype=np.int64)
    members = np.array(bucket.places, dtype=np.int64)[in_bucket]
    words = np.array([[*[t.data_ptr() for t in tasks[i].tensors()], 0] for i in members], dtype=np.int64)
    return _Table(group, members, in_bucket, words)


def _without_gradients(members: Sequence[Member]) -> list[Member]:
    """A gradient that is kept here would take its memory for as long as steps are alike."""
    nothing = torch.empty(0)
    return [member._replace(grad=nothing) for member in members]


def _way(group: dict[str, Any]) -> tuple[Any, ...]:
    names = ("fused", "differentiable", "multi_precision", "master", "state_dtype")
    return tuple(map(group.get, names))


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _addresses(tensors: Iterable[torch.Tensor]) -> Array:
    return np.fromiter(map(_data_ptr, tensors), np.int64)
