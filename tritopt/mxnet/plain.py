"""Plain data: what an optimizer is dumped as, and read back from with weights_only=True, which runs no code."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T", bound=tuple[Any, ...])


class AsTuple(Generic[T]):
    """Attribute of a class of NamedTuples, kept as a plain tuple.

    Plain data has no classes of ours.
    """

    def __init__(self, cls: type[T]) -> None:
        self._cls = cls

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, rule: Any, owner: type[Any]) -> T:
        return self._cls(*vars(rule)[self._name])

    def __set__(self, rule: Any, value: T) -> None:
        vars(rule)[self._name] = tuple(value)


def require_plain(value: Any, path: str) -> None:
    """TypeError unless `torch.load(weights_only=True)` reads the value back."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(key, f"{path}, a key")
            require_plain(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for item in value:
            require_plain(item, path)
    elif not (
        value is None or isinstance(value, (torch.Tensor, torch.dtype)) or type(value) in (bool, int, float, str)
    ):
        raise TypeError(
            f"{path} is {value!r:.80}, which cannot be saved as plain data; call get_states(dump_optimizer=False)"
        )
