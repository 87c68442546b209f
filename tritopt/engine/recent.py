"""A cache of what was used last, bounded by the size of what it keeps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")
MAX_SIZE = 2**15
MIN_ENTRIES = 8
"""Entries that stay whatever their size: one step of a large model may use several."""


class Recent(Generic[Value]):
    """Values by key, of which the least recently used go when their sizes add up to more than `max_size`.

    A set of gradients that differs from step to step makes a new entry in each of them, so what bounds the memory is
    not the number of entries.
    """

    def __init__(self, max_size: int = MAX_SIZE) -> None:
        self._max_size = max_size
        self._entries: OrderedDict[Hashable, tuple[int, Value]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """Number of entries that are kept."""
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        """The value of a key, which thereby was used last; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def put(self, key: Hashable, value: Value, size: int) -> Value:
        """Keep a value of this size, in numbers of tensors; returns it."""
        replaced = self._entries.pop(key, None)
        self._size += size - (0 if replaced is None else replaced[0])
        self._entries[key] = size, value
        while self._size > self._max_size and len(self._entries) > MIN_ENTRIES:
            self._size -= self._entries.popitem(last=False)[1][0]
        return value

    def values(self) -> list[Value]:
        """All values, the least recently used first."""
        return [value for _, value in self._entries.values()]
