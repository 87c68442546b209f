"""The reference's part of a step: parameters that no kernel updates, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

from tritopt.engine.group import ScalarTable
from tritopt.engine.matrix_phase import ApplyMatrices
from tritopt.engine.phase import Exchange, LaunchSpec
from tritopt.engine.plan import Task
from tritopt.kernels.twins.random import Noise
from tritopt.optim import distributed
from tritopt.optim.step.members import Member
from tritopt.optim.step.stacks import Update, Values, stacks_of, update_stack
from tritopt.optim.step.undo import Undo
from tritopt.rule import apply_together


def update_by_reference(
    members: Sequence[Member], tasks: Sequence[Task], table: ScalarTable, launch: LaunchSpec, undo: Undo
) -> None:
    """Update these parameters in PyTorch, one after the other; those that hand out directions in batches."""
    values, end = table.values.tolist(), launch.n_scalars - launch.draws
    scalars = [launch.scalars(*row[3:end]) for row in values]
    is_skipped = launch.noop is not None and bool(launch.noop.item())
    is_matrices = any(isinstance(phase, ApplyMatrices) for phase in launch.phases)

    def applying(place: int, task: Task) -> Update:
        member, i = members[place], int(table.place_of[place])
        common = (math.nan, *values[i][1:3]) if is_skipped else values[i][:3]
        noise = Noise(*task.noise, values[i][-1]) if launch.draws else None
        return member.rule.applying(
            task, common, scalars[i], launch.rescale, distributed.encode, noise, launch.tracked, place
        )

    for places in _batches(tasks, launch):
        orthogonalized = members[places[0]].rule.orthogonalized
        if launch.exchange is not None:
            orthogonalized = partial(_exchanged, launch.exchange)
        stacks = stacks_of(members, tasks, table, launch, places) if is_matrices else []
        stacked = set(chain.from_iterable(stacks))
        updates: list[tuple[Update, int | None]] = []
        for place in places:
            if place not in stacked:
                undo.updates.begin([members[place]], tasks[place].versions)
                updates.append((applying(place, tasks[place]), None))
        for stack in stacks:
            alike = [tasks[place] for place in stack]
            undo.updates.begin([members[place] for place in stack], partial(_versions, alike))
            updates.append((update_stack(alike, partial(applying, stack[0])), len(stack)))
        apply_together(updates, orthogonalized)


def _versions(tasks: Sequence[Task]) -> list[list[int]]:
    return [task.versions() for task in tasks]


def _batches(tasks: Sequence[Task], launch: LaunchSpec) -> Iterator[list[int]]:
    """Places of tasks that are updated together: each alone, unless they hand out directions."""
    bound = next((phase.scratch_bytes for phase in launch.phases if isinstance(phase, ApplyMatrices)), None)
    if bound is None:
        yield from ([place] for place in range(len(tasks)))
    elif launch.exchange is not None:
        yield list(range(len(tasks)))
    else:
        batch: list[int] = []
        size = 0
        for place, task in enumerate(tasks):
            # Weight, gradient and states as they are computed with, and the direction.
            size += 4 * 4 * task.grad.numel()
            if batch and size > bound:
                yield batch
                batch, size = [], 4 * 4 * task.grad.numel()
            batch.append(place)
        if batch:
            yield batch


def _exchanged(exchange: Exchange, values: Sequence[Values]) -> list[Values]:
    """Directions of shards, orthogonalised by the processes together; one that is empty here takes part as None."""
    copies = [tuple(value.clone() for value in of_one) for of_one in values]
    directions = [direction if direction.numel() else None for direction, *_ in copies]
    exchange(directions, [moments[0] if moments else None for _, *moments in copies])
    return copies
