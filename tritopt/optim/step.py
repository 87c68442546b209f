"""One step: from parameters and gradients to launches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tritopt.fused import DeviceRows, Launch, Planner, Task, unavailable
from tritopt.optim import distributed
from tritopt.optim.clip import clip_factor, global_norm
from tritopt.optim.distributed import ShardSums, local
from tritopt.optim.members import Member, lives_on_device, members_of, rate, same_group
from tritopt.optim.rows import RowTable, host_rows
from tritopt.optim.scalar_states import CPU, ScalarStates
from tritopt.optim.states import MasterVersions, check_aliases, create_missing, task_of
from tritopt.warning import warn

if TYPE_CHECKING:
    from tritopt.optim.optimizer import Optimizer


class Stepper:
    """The steps of one optimizer, with what is derived from its parameters and states and may be thrown away.

    Args:
        scalar_states: names and first values of the numbers kept per parameter.
    """

    def __init__(self, scalar_states: Mapping[str, float]) -> None:
        self._numbers = ScalarStates(scalar_states)
        self._planner = Planner()
        self._tables: dict[Hashable, RowTable] = {}
        self._reductions: dict[Hashable, ShardSums] = {}
        self._versions = MasterVersions()

    def update(self, opt: Optimizer) -> None:
        """Update every parameter that has a gradient. Checks all before it writes anything."""
        members = members_of(opt)
        if not members:
            return
        found_inf, grad_scale = (_scalar(getattr(opt, name, None)) for name in ("found_inf", "grad_scale"))
        on_device = (
            found_inf is not None
            or self._numbers.device != CPU
            or any(group["capturable"] or lives_on_device(group["lr"]) for group in opt.param_groups)
        )
        device = local(members[0].param).device if on_device else CPU
        new: list[torch.Tensor] = []
        try:
            create_missing(opt, members, self._numbers, device, new)
            tasks = [task_of(opt, member) for member in members]
            fused = [_runs_fused(opt, member) for member in members]
            check_aliases(self._planner, members, tasks)
            rates = {id(member.group): rate(member.group) for member in members}
        except Exception:
            for param in new:
                del opt.state[param]
            raise
        self._versions.refresh(opt, members)
        rescale = self._gradient_scale(opt, members, grad_scale)
        skip = _skip(found_inf, rescale, device) if on_device else None
        self._advance(members, skip)
        for key, chosen in _buckets(members, tasks, fused).items():
            some, their_tasks = [members[i] for i in chosen], [tasks[i] for i in chosen]
            rows: list[tuple[float, ...]] | DeviceRows
            if on_device:
                scalars, rows = self._tables.setdefault(key, RowTable()).rows(some, rates, self._numbers)
            else:
                scalars, rows = host_rows(some, rates, self._numbers)
            if fused[chosen[0]]:
                launch = Launch(some[0].rule.phases, scalars, some[0].rule.preamble, rescale, found_inf)
                self._launch(key, some, their_tasks, rows, launch)
            elif found_inf is None or not found_inf.item():
                numbers = rows.values.tolist() if isinstance(rows, DeviceRows) else rows
                for member, task, row in zip(some, their_tasks, numbers, strict=True):
                    member.rule.apply_reference(task, row[:3], scalars(*row[3:]), rescale)
        self._versions.remember(opt, members)

    def _gradient_scale(
        self, opt: Optimizer, members: Sequence[Member], grad_scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What gradients are multiplied by, fp64 [] on the device: loss scale and clip. NaN: skip."""
        opt.grad_norm = None
        inverse = None if grad_scale is None else 1.0 / grad_scale.double()
        if opt.max_grad_norm is None:
            return inverse
        key = tuple(member.position for member in members)
        norm = global_norm(self._planner, key, [m.param for m in members], [m.grad for m in members])
        norm = norm if inverse is None else norm * inverse.to(norm.device)
        opt.grad_norm = norm.float()
        factor = clip_factor(norm, opt.max_grad_norm)
        return factor if inverse is None else factor * inverse.to(norm.device)

    def _advance(self, members: Sequence[Member], skip: torch.Tensor | None) -> None:
        self._numbers.advance([member.position for member in members], skip)
        for name in members[0].rule.scalar_states:
            for some in same_group(members):
                positions = [member.position for member in some]
                factors = some[0].rule.factors(name, self._numbers.get("step", positions))
                self._numbers.multiply(name, positions, factors, skip)

    def _launch(
        self,
        key: Hashable,
        members: Sequence[Member],
        tasks: Sequence[Task],
        rows: list[tuple[float, ...]] | DeviceRows,
        launch: Launch,
    ) -> None:
        device = tasks[0].weight[0].device
        launch.rescale = None if launch.rescale is None else launch.rescale.to(device)
        launch.noop = None if launch.noop is None else launch.noop.to(device)
        key = (key, tuple(member.position for member in members))
        if any(phase.sums_elements for phase in launch.phases):
            if key not in self._reductions:
                self._reductions[key] = ShardSums([member.param for member in members])
            launch.reduce = self._reductions[key] or None
        self._planner.apply(key, tasks, rows, launch)


def _runs_fused(opt: Optimizer, member: Member) -> bool:
    wanted, part = member.group["fused"], local(member.param)
    if wanted is False or member.group.get("differentiable"):
        return False
    reason = unavailable(part)
    if reason is None and member.needs_whole:
        reason = f"{type(opt).__name__} has no kernel for tensors that are sharded over processes"
    if reason and wanted and part.device.type == "cpu":
        warn(f"fused=True on the CPU runs the reference: {reason}")
    elif reason and wanted:
        raise RuntimeError(f"`fused=True`, parameter {member.name!r}: {reason}")
    return reason is None


def _buckets(members: Sequence[Member], tasks: Sequence[Task], fused: Sequence[bool]) -> dict[Hashable, list[int]]:
    """Members by launch; those that a learning rate of 0 leaves alone are in none."""
    found: dict[Hashable, list[int]] = {}
    for i, (member, task) in enumerate(zip(members, tasks, strict=True)):
        lr = member.group["lr"]
        if member.rule.skips_zero_lr and not lives_on_device(lr) and float(lr) == 0:
            continue
        key = (member.rule.phases, member.rule.preamble, task.weight[0].device, fused[i])
        found.setdefault(key, []).append(i)
    return found


def _scalar(value: object) -> torch.Tensor | None:
    """What a GradScaler left on the optimizer, as a tensor []."""
    if value is None:
        return None
    return distributed.whole(torch.as_tensor(value)).detach().reshape(())


def _skip(found_inf: torch.Tensor | None, rescale: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Whether this step writes nothing, bool [] on the device; None: it does."""
    reasons = []
    if found_inf is not None:
        reasons.append((found_inf != 0).to(device))
    if rescale is not None:
        reasons.append(~rescale.isfinite().to(device))
    return torch.stack(reasons).any() if reasons else None
