"""The scalars of a launch: a row for each parameter, formed on the host or on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tritopt import validate
from tritopt.fused import DeviceRows
from tritopt.optim.distributed import key_of_shard, local
from tritopt.optim.members import Member, Number, same_group
from tritopt.optim.scalar_states import ScalarStates


def host_rows(
    members: Sequence[Member], rates: Mapping[int, Number], numbers: ScalarStates
) -> tuple[type, list[tuple[float, ...]]]:
    """The type of the rule's scalars, and for each member its row: rescale, clip bound, wd, scalars."""
    scalars: Any = None
    rows: list[tuple[float, ...]] = []
    for some in same_group(members, members[0].rule.is_per_parameter):
        found: dict[tuple[float, ...], tuple[float, ...]] = {}
        for number in zip(*(vector.tolist() for vector in _numbers(some, numbers)), strict=True):
            if number not in found:
                scalars = some[0].rule.scalars_at(
                    _name(some), _rate(some, rates), _wd(some), int(number[0]), *number[1:]
                )
                found[number] = (*_common(some), *scalars)
            rows.append(found[number])
    return type(scalars), rows


class RowTable:
    """`host_rows` on the device, for one launch. What is constant is uploaded once, and again only when it changes."""

    def __init__(self) -> None:
        self._constants = np.empty(0)
        self._values = torch.empty(0)

    def rows(
        self, members: Sequence[Member], rates: Mapping[int, Number], numbers: ScalarStates
    ) -> tuple[type, DeviceRows]:
        """A rule's scalars are tensors, fp64 [members of a group] or [], where they depend on step or learning rate."""
        scalars: Any = None
        blocks: list[tuple[Number, ...]] = []
        sizes = []
        for some in same_group(members, members[0].rule.is_per_parameter):
            scalars = some[0].rule.scalars_at(_name(some), _rate(some, rates), _wd(some), *_numbers(some, numbers))
            blocks.append((*_common(some), *scalars))
            sizes.append(len(some))
        return type(scalars), self._fill(blocks, sizes, local(members[0].param).device)

    def _fill(self, blocks: Sequence[Sequence[Number]], sizes: Sequence[int], device: torch.device) -> DeviceRows:
        constants = np.array([[0.0 if isinstance(x, torch.Tensor) else x for x in row] for row in blocks])
        constants = np.repeat(constants, sizes, axis=0)
        if self._values.device != device or not np.array_equal(constants, self._constants):
            self._constants, self._values = constants, torch.from_numpy(constants.copy()).to(device)
        start = 0
        for row, n in zip(blocks, sizes, strict=True):
            for column, x in enumerate(row):
                if isinstance(x, torch.Tensor):
                    self._values[start : start + n, column] = x
            start += n
        return DeviceRows(self._values, range(start))


def _numbers(some: Sequence[Member], numbers: ScalarStates) -> list[torch.Tensor]:
    positions = [member.position for member in some]
    return [numbers.get(name, positions) for name in ("step", *some[0].rule.scalar_states)]


def _common(some: Sequence[Member]) -> tuple[float, float, float]:
    group = some[0].group
    bound = validate.bound_or(group["clip_value"], math.inf) if some[0].rule.clips else math.inf
    return -1.0 if group.get("maximize") else 1.0, bound, _wd(some)


def _wd(some: Sequence[Member]) -> float:
    return float(some[0].group.get("weight_decay", 0.0))


def _rate(some: Sequence[Member], rates: Mapping[int, Number]) -> Number:
    return rates[id(some[0].group)]


def _name(some: Sequence[Member]) -> Any:
    return key_of_shard(some[0].name, some[0].param)
