"""Optimizers by name: `create`, `find`, `names`; and by rule. `register` stands beside `Optimizer`."""

from __future__ import annotations

from typing import Any

from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.optimizer import find as find
from tritopt.mxnet.optimizer import registered as registered
from tritopt.rule import Rule


def create(name: str, **kwargs: Any) -> Optimizer:
    """Construct the optimizer registered as `name` (case does not matter) with `kwargs`.

    Raises ValueError for an unknown name, with the nearest known ones.

    >>> import tritopt
    >>> tritopt.create("sgd", learning_rate=0.5).learning_rate
    0.5
    >>> tritopt.create("lambb")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: unknown optimizer 'lambb'; did you mean 'lamb'...? known: ...
    """
    return find(name)(**kwargs)


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(registered())


_MADE: dict[type[Rule], type[Optimizer]] = {}


def with_api(rule: type[Rule]) -> type[Optimizer]:
    """The rule with this API: the registered class that has it, or one that is made here, once."""
    if issubclass(rule, Optimizer):
        return rule
    known = next((cls for cls in Optimizer.opt_registry.values() if cls.rule is rule), None)
    if known is None and rule not in _MADE:
        _MADE[rule] = type(rule.__name__, (rule, Optimizer), {}, learning_rate=0.01)
    return known or _MADE[rule]


def optimizer_of(rule: Rule) -> Optimizer:
    """An optimizer with this API that computes what the rule computes."""
    made = with_api(type(rule))()
    vars(made).update(vars(rule))
    return made
