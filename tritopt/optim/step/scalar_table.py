"""The scalars of a launch, formed on the host or on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch

from tritopt.engine.group import Array, Rows
from tritopt.kernels.twins.random import STEPS
from tritopt.optim.distributed import key_of_shard, local
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.group_options import Hypers
from tritopt.optim.step.members import Member, Number

Runs: TypeAlias = Sequence[Sequence[Member]]
"""Members, those of one param_group together (`members.same_group`)."""


def host_rows(runs: Runs, hypers: Hypers, numbers: ScalarStates, draws: bool = False) -> tuple[type, Rows]:
    """The type of the rule's scalars, and the members' rows: one for all that share hyperparameters and numbers.

    `draws`: whether a row ends with the step, for random bits.
    """
    scalars: Any = None
    index: dict[tuple[float, ...], int] = {}
    row_of = np.empty(sum(map(len, runs)), dtype=np.int64)
    start = 0
    for some in runs:
        hyper, name = hypers.of(some[0].group), _name(some)
        different, which = _distinct(np.stack([vector.numpy() for vector in _numbers(some, numbers)], axis=1))
        rows = np.empty(len(different), dtype=np.int64)
        for i, (count, *others) in enumerate(different.tolist()):
            scalars = hyper.rule.scalars_at(name, hyper.rate, hyper.common[2], int(count), *others)
            rows[i] = index.setdefault((*hyper.common, *scalars, *_step(draws, count)), len(index))
        row_of[start : start + len(some)] = rows[which]
        start += len(some)
    return type(scalars), Rows(np.array(list(index), dtype=np.float64), row_of)


class HostRows:
    """`host_rows` of one launch, step after step.

    Where all members have made as many steps, there is one row for each rule and decay, or a few that differ in the
    learning rate alone: those are formed together.
    """

    def __init__(self, runs: Runs, draws: bool, positions: list[int]) -> None:
        """`positions`: those of all members of the step."""
        self._runs = runs
        self._draws = draws
        own = [member.position for some in runs for member in some]
        # The very list, if it says the same: what is known of one is known of the other.
        self._positions = positions if own == positions else own
        self._sizes = [len(some) for some in runs]
        self._row_of = np.empty(0, dtype=np.int64)
        self._group_ids = [id(some[0].group) for some in runs]
        self._kinds: dict[tuple[Any, ...], dict[float, int]] = {}
        """By what but the rate decides a row: rates, and their places among them."""
        self._rates_of: list[dict[float, int]] = []
        """Of each run."""
        self._generation = self._kinds_at = -1

    def rows(self, hypers: Hypers, numbers: ScalarStates) -> tuple[type, Rows]:
        """As `host_rows`. Rates are numbers."""
        shared = numbers.shared(self._positions)
        if shared is None:
            return host_rows(self._runs, hypers, numbers, self._draws)
        if self._generation != hypers.generation:
            self._sort(hypers)
            self._generation = hypers.generation
        count, *others = shared
        end, rows, scalars = _step(self._draws, count), [], None
        for (common, rule, name), rates in self._kinds.items():
            if len(rates) == 1:
                (lr,) = rates
                scalars = rule.scalars_at(name, lr, common[2], int(count), *others)
                rows.append((*common, *scalars, *end))
                continue
            vector = torch.tensor(list(rates), dtype=torch.float64, device="cpu")
            scalars = rule.scalars_at(name, vector, common[2], int(count), *others)
            columns = [x.tolist() if isinstance(x, torch.Tensor) else [x] * len(rates) for x in scalars]
            rows += [(*common, *values, *end) for values in zip(*columns, strict=True)]
        return type(scalars), Rows(np.array(rows, dtype=np.float64), self._row_of)

    def _sort(self, hypers: Hypers) -> None:
        """Which members have a row in common."""
        if self._kinds_at != hypers.kinds:
            self._kinds, self._rates_of = {}, []
            for some in self._runs:
                _, common, rule, *_ = hypers.of(some[0].group)
                name = _name(some) if rule.is_per_parameter else None
                self._rates_of.append(self._kinds.setdefault((common, rule, name), {}))
            self._kinds_at = hypers.kinds
        for rates in self._kinds.values():
            rates.clear()
        given = hypers.rates
        lrs = [float(given[key]) for key in self._group_ids]
        within = [rates.setdefault(lr, len(rates)) for rates, lr in zip(self._rates_of, lrs, strict=True)]
        firsts = accumulate(map(len, self._kinds.values()), initial=0)
        starts = dict(zip(map(id, self._kinds.values()), firsts, strict=False))  # one more than there are
        rows = [starts[id(rates)] + i for rates, i in zip(self._rates_of, within, strict=True)]
        row_of = np.repeat(np.array(rows, dtype=np.int64), self._sizes)
        if not np.array_equal(row_of, self._row_of):
            self._row_of = row_of


class RowTable:
    """`host_rows` on the device, for one launch. What is constant is uploaded once, and again only when it changes."""

    def __init__(self) -> None:
        self._constants = np.empty(0)
        self._is_constant = np.empty(0, bool)
        self._values = torch.empty(0, dtype=torch.float64, device="cpu")

    @property
    def values(self) -> torch.Tensor:
        """Of the last rows, which the next overwrite or replace."""
        return self._values

    def rows(self, runs: Runs, hypers: Hypers, numbers: ScalarStates, draws: bool = False) -> tuple[type, Rows]:
        """A rule's scalars are tensors, fp64 [members of a group] or [], where they depend on step or learning rate."""
        scalars: Any = None
        blocks: list[tuple[Number, ...]] = []
        sizes = []
        for some in runs:
            lr, common, rule, *_ = hypers.of(some[0].group)
            count, *others = _numbers(some, numbers)
            scalars = rule.scalars_at(_name(some), lr, common[2], count, *others)
            rescale = _unless_zero_lr(common[0], some[0], lr)
            blocks.append((rescale, *common[1:], *scalars, *_step(draws, count)))
            sizes.append(len(some))
        return type(scalars), self._fill(blocks, sizes, local(runs[0][0].param).device)

    def _fill(self, blocks: Sequence[Sequence[Number]], sizes: Sequence[int], device: torch.device) -> Rows:
        is_constant = np.array([[not isinstance(x, torch.Tensor) for x in row] for row in blocks])
        constants = np.array([[0.0 if isinstance(x, torch.Tensor) else x for x in row] for row in blocks])
        constants, is_constant = np.repeat(constants, sizes, axis=0), np.repeat(is_constant, sizes, axis=0)
        is_known = np.array_equal(constants, self._constants) and np.array_equal(is_constant, self._is_constant)
        if not is_known or self._values.device != device:
            self._constants, self._is_constant = constants, is_constant
            self._values = torch.from_numpy(constants.copy()).to(device)
        start = 0
        for row, n in zip(blocks, sizes, strict=True):
            for column, x in enumerate(row):
                if isinstance(x, torch.Tensor):
                    self._values[start : start + n, column] = x
            start += n
        return Rows(self._values, np.arange(start))


def _step(draws: bool, count: Any) -> tuple[Any, ...]:
    """What a row ends with where random bits are drawn."""
    return (count % STEPS,) if draws else ()


def _distinct(numbers: Array) -> tuple[Array, Array]:
    """The different rows of [members, numbers], and which of them each member has."""
    if (numbers == numbers[0]).all():
        return numbers[:1], np.zeros(len(numbers), dtype=np.int64)
    return np.unique(numbers, axis=0, return_inverse=True)


def _numbers(some: Sequence[Member], numbers: ScalarStates) -> list[torch.Tensor]:
    positions = [member.position for member in some]
    return [numbers.get(name, positions) for name in ("step", *some[0].rule.scalar_states)]


def _unless_zero_lr(rescale: float, member: Member, lr: Number) -> Number:
    """NaN, which skips, where a learning rate on the device is 0 and the rule leaves the parameter alone then."""
    if not (member.rule.skips_zero_lr and isinstance(lr, torch.Tensor)):
        return rescale
    return torch.where(lr == 0, math.nan, rescale)


def _name(some: Sequence[Member]) -> Any:
    return key_of_shard(some[0].name, some[0].param)
