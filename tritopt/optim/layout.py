"""How one parameter is kept: its format, those of its states, and what stands in its state."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tritopt.kernels.formats.format import Format
from tritopt.optim.checkpoint import Expected, keys_of
from tritopt.optim.distributed import is_dtensor

if TYPE_CHECKING:
    from tritopt.mxnet.optimizer import Optimizer as Rule
    from tritopt.optim.optimizer import Optimizer

MAX_LAYOUTS = 4096


class Layout(NamedTuple):
    """Formats and state tensors of all parameters of one shape, dtype and sharding under one group's settings."""

    rule: Rule
    format: Format
    """Format of the parameter with its master."""
    kinds: dict[str, str | None]
    """Kind of number that each state holds (`state_kinds` of the rule), by its name."""
    formats: dict[str, Format]
    """Format of each state, by its name, in the rule's order."""
    expected: dict[str, Expected]
    """Shape and dtype of each tensor of the state but numbers, by its key."""
    keys: tuple[str, ...]
    """Keys in the state of all states' planes, in the rule's order."""
    shows_numbers: bool
    """Whether the step stands in the state."""


class Layouts:
    """The layouts of one optimizer, each derived once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Layout] = {}

    def of(self, opt: Optimizer, param: torch.Tensor, group: dict[str, Any], rule: Rule | None = None) -> Layout:
        """Return a parameter's layout. ValueError if its group says what cannot be.

        rule: the group's, where it is known.
        """
        rule = opt.rule_of(group) if rule is None else rule
        choice = group["state_dtype"]
        key = (
            # Kept in the layout, so that no other rule gets its identity.
            id(rule), param.shape, param.dtype, group["multi_precision"], group["master"],
            tuple(choice.items()) if isinstance(choice, dict) else choice, group.get("differentiable"), _spread(param),
        )  # fmt: skip
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MAX_LAYOUTS:
                self._known.clear()
            found = self._known[key] = _derived(opt, param, group, rule)
        return found


def _spread(param: torch.Tensor) -> Hashable:
    """How a parameter is spread over processes; None if it is not."""
    return (param.device_mesh, tuple(param.placements)) if is_dtensor(param) else None


def _derived(opt: Optimizer, param: torch.Tensor, group: dict[str, Any], rule: Rule) -> Layout:
    formats = opt.state_formats_of(param, group)
    return Layout(
        rule,
        opt.format_of(param, group),
        opt.state_kinds_of(param, group),
        formats,
        opt.expected_states(param, group),
        tuple(key for name, fmt in formats.items() for key in keys_of(name, fmt)),
        opt.shows_numbers(param, group),
    )
