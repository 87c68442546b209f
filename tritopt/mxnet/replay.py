"""An update that is made again: it holds while weights and states lie where they lay and gradients look as they did."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine.group import LaunchGroup, ScalarTable
from tritopt.engine.phase import LaunchSpec, run_phases
from tritopt.engine.replay import NormTables, table_of
from tritopt.engine.walk import n_words, walk
from tritopt.mxnet.states import States
from tritopt.rule import State

_device = torch.Tensor.get_device


class Launched(NamedTuple):
    """One launch of an update."""

    indices: list[Hashable]
    """Indices of the launch's parameters."""
    places: list[int]
    """Places of these parameters among all of the update."""
    draws: bool
    """Whether a set of scalars ends with the step, which random bits depend on."""
    device: torch.device
    """Device of the parameters."""
    groups: tuple[LaunchGroup, ...] = ()
    """The engine's groups that were launched; none before that."""


class Replay:
    """An update of parameters as it was launched; only gradients and scalars are new in the next.

    It holds no tensor alive.

    Args:
        opt: the optimizer.
        indices, weights, grads, states: the arguments of the update.
        launched: its launches.
        norm: tables of the gradients' norm, empty without one.
    """

    def __init__(
        self,
        opt: States,
        indices: Sequence[Hashable],
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        launched: list[Launched],
        norm: NormTables,
    ) -> None:
        self.indices = list(indices)
        self.launched = launched
        self._settings = _settings(opt)
        self._walk = walk()
        of_states, self._structure = _flattened(states)
        kept = [*weights, *of_states]
        self._kept_at = np.zeros(len(kept), np.int64)
        self._kept_are = self._walk.describe(kept, self._kept_at, n_words(kept))
        self._n_words = n_words(list(grads))
        self._grads = np.zeros(len(grads), np.int64)
        self._grads_are = self._walk.describe(list(grads), self._grads, self._n_words)
        self._devices = list(map(_device, grads))
        self._norm = norm
        self._place_of = [np.empty(0, np.int64) for _ in launched]
        self._tables = {
            id(one.indices): [table_of(group, np.array(one.places, np.int64)) for group in one.groups]
            for one in launched
        }

    def repeated(self, opt: States, weights: list[Any], grads: list[Any], states: list[State]) -> Repeated | None:
        """Tell whether an update of these tensors is this one again; then take the gradients' addresses."""
        if self._kept_are is None or self._grads_are is None or len(grads) != len(self._grads):
            return None
        if _settings(opt) != self._settings or not are_plain(grads):
            return None
        of_states, structure = _flattened(states)
        kept = [*weights, *of_states]
        # The structure has the types of states, which were plain.
        if structure != self._structure or not are_plain(weights) or len(kept) != len(self._kept_at):
            return None
        if not self._walk.are(kept, self._kept_are, self._kept_at):
            return None
        addresses = np.empty(len(grads), np.int64)
        if self._walk.describe(grads, addresses, self._n_words) != self._grads_are:
            return None
        # Their addresses say nothing of the device that they are on.
        if list(map(_device, grads)) != self._devices:
            return None
        if addresses.tobytes() != self._grads.tobytes():
            self._grads = addresses
        return Repeated(self, weights, grads, states)

    def squares(self) -> torch.Tensor:
        """Sum of squares of each gradient, fp64 [gradients, 1]."""
        return self._norm.squares(self._grads, self.launched[0].device)

    def launch(self, launched: Launched, table: ScalarTable, launch: LaunchSpec) -> None:
        """Launch once more, with these scalars."""
        place = next(i for i, one in enumerate(self.launched) if one is launched)
        if np.array_equal(table.place_of, self._place_of[place]):
            table = table._replace(place_of=self._place_of[place])  # the very array is known to be on the device
        self._place_of[place] = table.place_of
        tables = self._tables[id(launched.indices)]
        for replay_table in tables:
            replay_table.upload(self._grads, table.place_of, table.values)
        run_phases([replay_table.group for replay_table in tables], launch, len(launched.places))


class Repeated(NamedTuple):
    """An update that repeats an earlier one, and its arguments."""

    replay: Replay
    weights: list[torch.Tensor]
    grads: list[torch.Tensor]
    states: list[State]


def _settings(opt: States) -> tuple[Any, ...]:
    """Attributes that decide, beside tensors, which launches an update takes, and what they store."""
    return (
        opt.phases,
        opt.preamble,
        opt.state_names,
        opt.multi_precision,
        opt.master,
        opt.state_dtype,
        opt.rounding_seed,
        opt.track,
        opt.use_fused_step,
        opt.max_grad_norm is None,
    )


def are_plain(values: Sequence[Any]) -> bool:
    """Whether all are of torch's own two classes of tensors, which lie where they say."""
    return set(map(type, values)) <= {torch.Tensor, torch.nn.Parameter}


def can_be_replayed(weights: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], states: Sequence[State]) -> bool:
    """Whether an update of these can be described by where its tensors are."""
    return are_plain([*weights, *grads, *_flattened(states)[0]])


def _flattened(states: Sequence[State]) -> tuple[list[Any], list[Any]]:
    """Tensors of some states, in an order that depends on their structure alone; and that structure."""
    flat: list[Any] = list(states)
    types = set(map(type, flat))
    structure: list[Any] = [_answers(type, flat, types)]
    while any(issubclass(one, tuple) for one in types):
        tuples = flat if len(types) == 1 else [value for value in flat if isinstance(value, tuple)]
        others = [] if len(types) == 1 else [value for value in flat if not isinstance(value, tuple)]
        flat = others + list(chain.from_iterable(tuples))
        types = set(map(type, flat))
        structure += [_answers(len, tuples, set(map(len, tuples))), _answers(type, flat, types)]
    return [value for value in flat if value is not None] if NoneType in types else flat, structure


def _answers(ask: Callable[[Any], Any], values: list[Any], different: set[Any]) -> Any:
    """Answer for each value; the number of values and the one answer where all have the same."""
    return (len(values), *different) if len(different) == 1 else list(map(ask, values))
