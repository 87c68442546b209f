"""The reference's part of a step: parameters that no kernel updates, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tritopt.engine.group import ScalarTable
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Task
from tritopt.kernels.twins.random import Noise
from tritopt.optim import distributed
from tritopt.optim.step.members import Member
from tritopt.optim.step.undo import Undo


def update_by_reference(
    members: Sequence[Member], tasks: Sequence[Task], table: ScalarTable, launch: LaunchSpec, undo: Undo
) -> None:
    """Update these parameters in PyTorch."""
    values, end = table.values.tolist(), launch.n_scalars - launch.draws
    scalars = [launch.scalars(*row[3:end]) for row in values]
    is_skipped = launch.noop is not None and bool(launch.noop.item())
    for place, (member, task, i) in enumerate(zip(members, tasks, table.place_of.tolist(), strict=True)):
        common = (math.nan, *values[i][1:3]) if is_skipped else values[i][:3]
        noise = Noise(*task.noise, values[i][-1]) if launch.draws else None
        undo.updates.begin([member], task.versions)
        member.rule.apply_reference(
            task, common, scalars[i], launch.rescale, distributed.encode, noise, launch.tracked, place
        )
