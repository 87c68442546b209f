"""The scalars of a launch, formed on the host or on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch

from tritopt.engine.group import Array, ScalarTable
from tritopt.kernels.twins.random import STEPS
from tritopt.optim.distributed import key_of_shard, local
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.group_options import OptionsByGroup
from tritopt.optim.step.members import Member, Number

ByGroup: TypeAlias = Sequence[Sequence[Member]]
"""Members, those of one param_group together (`members.split_by_group`)."""


def host_scalars(
    by_group: ByGroup, options: OptionsByGroup, scalar_states: ScalarStates, draws: bool = False
) -> tuple[type, ScalarTable]:
    """Type of the rule's scalars, and the members' scalars: one set for all that share options and scalar states.

    draws: whether a set ends with the step, which random bits depend on.
    """
    scalars: Any = None
    index: dict[tuple[float, ...], int] = {}
    place_of = np.empty(sum(map(len, by_group)), dtype=np.int64)
    start = 0
    for members in by_group:
        of_group, name = options.of(members[0].group), _name(members)
        different, which = _distinct(
            np.stack([vector.numpy() for vector in _values_of(members, scalar_states)], axis=1)
        )
        places = np.empty(len(different), dtype=np.int64)
        for i, (count, *others) in enumerate(different.tolist()):
            scalars = of_group.rule.scalars_at(name, of_group.rate, of_group.common[2], int(count), *others)
            places[i] = index.setdefault((*of_group.common, *scalars, *_step(draws, count)), len(index))
        place_of[start : start + len(members)] = places[which]
        start += len(members)
    return type(scalars), ScalarTable(np.array(list(index), dtype=np.float64), place_of)


class HostScalars:
    """`host_scalars` of one launch, step after step.

    Where all members have made as many steps, there is one set for each rule and decay, or a few that differ in the
    learning rate alone: those are formed together.
    """

    def __init__(self, by_group: ByGroup, draws: bool, positions: list[int]) -> None:
        """Take the members of one launch. positions: those of all members of the step."""
        self._by_group = by_group
        self._draws = draws
        own = [member.position for members in by_group for member in members]
        # The very list, if it says the same: what is known of one is known of the other.
        self._positions = positions if own == positions else own
        self._sizes = [len(members) for members in by_group]
        self._place_of = np.empty(0, dtype=np.int64)
        self._group_ids = [id(members[0].group) for members in by_group]
        self._rates_by_key: dict[tuple[Any, ...], dict[float, int]] = {}
        """Places of learning rates, by common scalars, rule and name, which decide the rest of a set."""
        self._rates_of: list[dict[float, int]] = []
        """The dict in `_rates_by_key` for each group of members."""
        self._version = self._structure_version = -1

    def table(self, options: OptionsByGroup, scalar_states: ScalarStates) -> tuple[type, ScalarTable]:
        """Return what `host_scalars` does. No learning rate is a tensor."""
        shared = scalar_states.shared(self._positions)
        if shared is None:
            return host_scalars(self._by_group, options, scalar_states, self._draws)
        if self._version != options.version:
            self._sort(options)
            self._version = options.version
        count, *others = shared
        end, lines, scalars = _step(self._draws, count), [], None
        for (common, rule, name), rates in self._rates_by_key.items():
            if len(rates) == 1:
                (lr,) = rates
                scalars = rule.scalars_at(name, lr, common[2], int(count), *others)
                lines.append((*common, *scalars, *end))
                continue
            vector = torch.tensor(list(rates), dtype=torch.float64, device="cpu")
            scalars = rule.scalars_at(name, vector, common[2], int(count), *others)
            columns = [x.tolist() if isinstance(x, torch.Tensor) else [x] * len(rates) for x in scalars]
            lines += [(*common, *values, *end) for values in zip(*columns, strict=True)]
        return type(scalars), ScalarTable(np.array(lines, dtype=np.float64), self._place_of)

    def _sort(self, options: OptionsByGroup) -> None:
        """Find which members share a set of scalars."""
        if self._structure_version != options.structure_version:
            self._rates_by_key, self._rates_of = {}, []
            for members in self._by_group:
                _, common, rule, *_ = options.of(members[0].group)
                name = _name(members) if rule.is_per_parameter else None
                self._rates_of.append(self._rates_by_key.setdefault((common, rule, name), {}))
            self._structure_version = options.structure_version
        for rates in self._rates_by_key.values():
            rates.clear()
        given = options.rates
        lrs = [float(given[key]) for key in self._group_ids]
        within = [rates.setdefault(lr, len(rates)) for rates, lr in zip(self._rates_of, lrs, strict=True)]
        firsts = accumulate(map(len, self._rates_by_key.values()), initial=0)
        starts = dict(zip(map(id, self._rates_by_key.values()), firsts, strict=False))  # one more than there are
        places = [starts[id(rates)] + i for rates, i in zip(self._rates_of, within, strict=True)]
        place_of = np.repeat(np.array(places, dtype=np.int64), self._sizes)
        if not np.array_equal(place_of, self._place_of):
            self._place_of = place_of


class DeviceScalars:
    """Scalars of one launch, formed on the device. Constants are uploaded once, and again only when they change."""

    def __init__(self) -> None:
        self._constants = np.empty(0)
        self._is_constant = np.empty(0, bool)
        self._values = torch.empty(0, dtype=torch.float64, device="cpu")

    @property
    def values(self) -> torch.Tensor:
        """Values of the last table, fp64 [members, 3 + scalars]; the next overwrites or replaces them."""
        return self._values

    def table(
        self, by_group: ByGroup, options: OptionsByGroup, scalar_states: ScalarStates, draws: bool = False
    ) -> tuple[type, ScalarTable]:
        """Type and table of scalars: fp64 [members of a group] or [] where step or learning rate is a tensor."""
        scalars: Any = None
        blocks: list[tuple[Number, ...]] = []
        sizes = []
        for members in by_group:
            lr, common, rule, *_ = options.of(members[0].group)
            count, *others = _values_of(members, scalar_states)
            scalars = rule.scalars_at(_name(members), lr, common[2], count, *others)
            rescale = _unless_zero_lr(common[0], members[0], lr)
            blocks.append((rescale, *common[1:], *scalars, *_step(draws, count)))
            sizes.append(len(members))
        return type(scalars), self._fill(blocks, sizes, local(by_group[0][0].param).device)

    def _fill(self, blocks: Sequence[Sequence[Number]], sizes: Sequence[int], device: torch.device) -> ScalarTable:
        is_constant = np.array([[not isinstance(x, torch.Tensor) for x in block] for block in blocks])
        constants = np.array([[0.0 if isinstance(x, torch.Tensor) else x for x in block] for block in blocks])
        constants, is_constant = np.repeat(constants, sizes, axis=0), np.repeat(is_constant, sizes, axis=0)
        is_known = np.array_equal(constants, self._constants) and np.array_equal(is_constant, self._is_constant)
        if not is_known or self._values.device != device:
            self._constants, self._is_constant = constants, is_constant
            self._values = torch.from_numpy(constants.copy()).to(device)
        start = 0
        for block, n in zip(blocks, sizes, strict=True):
            for column, x in enumerate(block):
                if isinstance(x, torch.Tensor):
                    self._values[start : start + n, column] = x
            start += n
        return ScalarTable(self._values, np.arange(start))


def _step(draws: bool, count: Any) -> tuple[Any, ...]:
    """End of a set of scalars: the step where random bits are drawn, else nothing."""
    return (count % STEPS,) if draws else ()


def _distinct(numbers: Array) -> tuple[Array, Array]:
    """The different rows of a matrix [members, numbers], and which of them each member has."""
    if (numbers == numbers[0]).all():
        return numbers[:1], np.zeros(len(numbers), dtype=np.int64)
    return np.unique(numbers, axis=0, return_inverse=True)


def _values_of(members: Sequence[Member], scalar_states: ScalarStates) -> list[torch.Tensor]:
    positions = [member.position for member in members]
    return [scalar_states.get(name, positions) for name in ("step", *members[0].rule.scalar_states)]


def _unless_zero_lr(rescale: float, member: Member, lr: Number) -> Number:
    """NaN, which skips, where a learning rate on the device is 0 and the rule leaves the parameter alone then."""
    if not (member.rule.skips_zero_lr and isinstance(lr, torch.Tensor)):
        return rescale
    return torch.where(lr == 0, math.nan, rescale)


def _name(members: Sequence[Member]) -> Any:
    return key_of_shard(members[0].name, members[0].param)
