"""The optimizer, as a step sees it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tritopt.optim.layout import Layout, Layouts
from tritopt.rule import Rule


class Owner(Protocol):
    """The torch face's optimizer, as a step sees it."""

    param_groups: list[dict[str, Any]]
    state: Any
    """States, dicts by parameter."""
    layouts: Layouts
    max_grad_norm: float | None
    rounding_seed: int
    track: bool

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with a group's hyperparameters."""
        ...

    def of_class(self, group: dict[str, Any]) -> Owner:
        """An optimizer of the class that a group's parameters follow."""
        ...

    def first_count(self, state: dict[str, Any]) -> float:
        """Steps that a state stands for which does not show them."""
        ...

    def layout_of(self, param: torch.Tensor, group: dict[str, Any]) -> Layout:
        """Derive how a parameter of a group is kept."""
        ...

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError unless a group's values are such as the constructor takes."""
        ...

    def sparse_error_of(self, group: dict[str, Any]) -> str | None:
        """Reason why a group's parameters take no sparse gradients; None: they do."""
        ...
