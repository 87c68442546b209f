"""Small matrices that the reference updates as one stack: a call of PyTorch takes longer than their arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch

from tritopt.engine.group import ScalarTable
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Task
from tritopt.optim.distributed import is_dtensor
from tritopt.optim.step.members import Member

Values: TypeAlias = tuple[torch.Tensor, ...]
Update: TypeAlias = Generator[Values, Values, None]
LONGEST = 2**16
"""Largest number of elements of a matrix that is copied into a stack."""


def stacks_of(
    members: Sequence[Member], tasks: Sequence[Task], table: ScalarTable, launch: LaunchSpec, places: Sequence[int]
) -> list[list[int]]:
    """Lists of places whose tasks are alike: of one shape, stored alike, and with the same scalars."""
    if launch.exchange is not None or launch.tracked is not None or launch.draws:
        return []
    alike: dict[Hashable, list[int]] = {}
    for place in places:
        member, grad = members[place], tasks[place].grad
        if 0 < grad.numel() <= LONGEST and not is_dtensor(member.param):
            # A layout is of one shape, dtype and rule.
            key = (id(member.layout), int(table.place_of[place]), grad.dtype, grad.device)
            alike.setdefault(key, []).append(place)
    has_blocks = {key: any(fmt.block for fmt in tasks[stack[0]].formats) for key, stack in alike.items()}
    return [stack for key, stack in alike.items() if len(stack) > 1 and not has_blocks[key]]


def update_stack(tasks: Sequence[Task], update: Callable[[Task], Update]) -> Update:
    """Update tasks that are alike as one task; what is made of its tensors is copied back in the end."""
    first = tasks[0]
    weight, state = (
        tuple(map(torch.stack, zip(*of_each, strict=True)))
        for of_each in ([task.weight for task in tasks], [task.state for task in tasks])
    )
    stack = Task(weight, first.format, torch.stack([task.grad for task in tasks]), state, None, first.noise)
    stack = stack._replace(state_formats=first.state_formats)
    updating = update(stack)
    directions = next(updating, None)
    if directions is None:
        return
    results = yield directions
    with suppress(StopIteration):
        updating.send(results)
    for made, *originals in zip(stack.written(), *[task.written() for task in tasks], strict=True):
        for original, value in zip(originals, made, strict=True):
            original.copy_(value)
