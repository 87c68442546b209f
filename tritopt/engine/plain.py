"""Attributes of rules that are saved as plain data."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])


class AsTuple(Generic[T]):
    """Attribute of a class of NamedTuples, kept as a plain tuple.

    A dumped optimizer is read back with weights_only=True, which takes no classes of ours (mxnet/updater.py).
    """

    def __init__(self, cls: type[T]) -> None:
        self._cls = cls

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, rule: Any, owner: type[Any]) -> T:
        return self._cls(*vars(rule)[self._name])

    def __set__(self, rule: Any, value: T) -> None:
        vars(rule)[self._name] = tuple(value)
