"""Param_groups that hold more than checkpoints do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


class ParamGroup(dict[str, Any]):
    """A param_group that has everything for who asks, and for who iterates over it what a checkpoint holds.

    By `for key in param_group`, torch.distributed.checkpoint finds out which keys a flattened checkpoint must have.

    Args:
        group: its keys and values.
        unsaved: keys that checkpoints do not hold.
    """

    def __init__(self, group: Mapping[str, Any], unsaved: Collection[str]) -> None:
        super().__init__(group)
        self.unsaved = unsaved

    def __iter__(self) -> Iterator[str]:
        """The keys that `state_dict` has."""
        return iter(saved(self, self.unsaved))


def saved(group: Mapping[str, Any], unsaved: Collection[str]) -> dict[str, Any]:
    """The part of a group that a checkpoint holds: what torch's does, and a bound if there is one."""
    return {
        name: value
        for name, value in group.items()
        if name not in unsaved and not (name == "clip_value" and value is None)
    }
