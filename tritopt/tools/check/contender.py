"""An optimizer in a check, the tensors that it updates, and the numbers that their formats know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch

from tritopt.engine import plan
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.weights import MASTERS
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.cost import fresh_state, tensors_of

LR_MULT = {2: 0.5}
"""One parameter has its own rate, so the table of scalars has two rows."""


@dataclass
class Contender:
    """An optimizer and the tensors that it updates."""

    optimizer: Optimizer
    weights: list[torch.Tensor]
    master: str | None
    """Format of masters, a key of MASTERS; None: there are none. The truth's weights stand for both."""

    def __post_init__(self) -> None:
        self.optimizer.set_lr_mult(LR_MULT)
        self.states = [fresh_state(self.optimizer, i, weight) for i, weight in enumerate(self.weights)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Collect by name the weight, the master if there is one, and the states of each parameter, decoded."""
        tensors = {}
        for i, (weight, state) in enumerate(zip(self.weights, self.states, strict=True)):
            tensors[f"weight {i}"] = weight
            if self._format.companion:
                planes = (weight, *tensors_of(state)[:1])
                tensors[f"master {i}"] = (
                    self._format.decode(planes, torch.float32) if self._has_companion(weight) else weight
                )
        for name, (fmt, planes) in self._planes().items():
            tensors[name] = planes[0] if fmt is PLAIN else fmt.decode(planes, torch.float32)
        return tensors

    def neighbours(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Find the next lower and next higher number that each state in fewer bits could have held, by name.

        The format's largest and smallest number are their own.
        """
        return {
            name: (_neighbour(fmt, planes, -1), _neighbour(fmt, planes, 1))
            for name, (fmt, planes) in self._planes().items()
            if fmt is not PLAIN
        }

    @property
    def _format(self) -> Format:
        return PLAIN if self.master is None else MASTERS[self.master]

    def _has_companion(self, weight: torch.Tensor) -> bool:
        return bool(self._format.companion) and plan.is_low_precision(weight.dtype)

    def _planes(self) -> dict[str, tuple[Format, tuple[torch.Tensor, ...]]]:
        """Find the format and planes of each parameter's states, by name."""
        planes_of = {}
        for i, (weight, state) in enumerate(zip(self.weights, self.states, strict=True)):
            tensors = tensors_of(state)[self._has_companion(weight) :]
            formats = [PLAIN] * len(tensors) if self.optimizer.state_dtype is None else self.optimizer.state_formats()
            rest = iter(tensors)
            for at, fmt in enumerate(formats):
                planes_of[f"state {at} of weight {i}"] = fmt, tuple(islice(rest, fmt.n_planes))
        return planes_of

    def start_from(self, other: Contender) -> None:
        """Take over all values. The truth's weights come from the masters, which stand behind the weights."""
        if self.weights[0].dtype == other.weights[0].dtype:
            for mine, value in zip(self._stored(), other._stored(), strict=True):
                mine.copy_(value)
            return
        values = other.tensors()
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])

    def _stored(self) -> list[torch.Tensor]:
        return [*self.weights, *tensors_of(self.states)]

    def step(self, grads: Sequence[torch.Tensor]) -> None:
        """Update all parameters once."""
        self.optimizer.update_multi_precision(list(range(len(grads))), self.weights, list(grads), self.states)


def _neighbour(fmt: Format, planes: Sequence[torch.Tensor], places: int) -> torch.Tensor:
    """Find the numbers so many places from those stored, among all that the format has under the same scales."""
    in_order, place_of = (table.to(planes[0].device) for table in _order(fmt))
    places_now = place_of[planes[0].view(_INTEGERS[planes[0].itemsize]).long() % len(place_of)]
    codes = in_order[(places_now + places).clamp(0, len(in_order) - 1)]
    # Codes are decoded as they lie in memory.
    return fmt.decode((torch.empty_like(planes[0]).copy_(codes), *planes[1:]), torch.float32)


_INTEGERS = {1: torch.int8, 2: torch.int16}


@cache
def _order(fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the codes of finite numbers, one for each number; and tell the place of each code, read unsigned."""
    n = 256 ** fmt.dtypes[0].itemsize
    codes = torch.arange(n, dtype=torch.int64, device="cpu").to(_INTEGERS[fmt.dtypes[0].itemsize]).view(fmt.dtypes[0])
    scales = [torch.ones(n // fmt.block, dtype=fmt.dtypes[1], device="cpu")] if fmt.block else []
    numbers = fmt.decode((codes, *scales), torch.float32)
    order = numbers.argsort()
    order = order[numbers[order].isfinite()]
    is_new = torch.ones_like(order, dtype=torch.bool)
    is_new[1:] = numbers[order].diff() > 0  # zero has two codes
    order = order[is_new]
    places = torch.searchsorted(numbers[order], numbers).clamp(max=len(order) - 1)
    return codes[order], places
