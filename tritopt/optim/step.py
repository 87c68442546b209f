"""One step: from parameters and gradients to launches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tritopt import validate
from tritopt.fused import Planner
from tritopt.group import Launch, Rows
from tritopt.optim import distributed
from tritopt.optim.clip import clip_factor
from tritopt.optim.cold import ColdStep, check_tracked, runs_fused
from tritopt.optim.distributed import ShardSums, local
from tritopt.optim.members import (
    Bucket,
    Member,
    Number,
    Only,
    groups_of,
    lives_on_device,
    members_of,
    names_of,
    params_of,
    rate,
    same_group,
)
from tritopt.optim.rows import RowTable, host_rows
from tritopt.optim.scalar_states import CPU, ScalarStates
from tritopt.optim.states import MasterVersions, Replaced, check_aliases, create_missing, put_back, task_of
from tritopt.optim.warm import WarmStep
from tritopt.telemetry import Telemetry, Tracker, telemetry

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
        self.tracker = Tracker()
        self._warm: WarmStep | None = None
        self._warm_of: dict[int, WarmStep] = {}
        """Of steps for one parameter, by its position."""

    def update(self, opt: Optimizer, only: Only | None = None) -> None:
        """Update every parameter that has a gradient, or only one. Checks all before it writes anything."""
        validate.clip_bound("max_grad_norm", opt.max_grad_norm)
        found_inf, grad_scale = (_scalar(getattr(opt, name, None)) for name in ("found_inf", "grad_scale"))
        on_device = (
            found_inf is not None
            or self._numbers.device != CPU
            or any(group["capturable"] or lives_on_device(group["lr"]) for group in opt.param_groups)
        )
        rates = {id(group): rate(group) for group in groups_of(opt, only)}
        warm = self._take_warm(only)
        replaced: Replaced = []
        try:
            step = self._step(opt, warm, rates, on_device, replaced, only)
            if step is None:
                return
            rescale = self._gradient_scale(opt, step, grad_scale)
            skip = _skip(found_inf, rescale, self._numbers.device) if on_device else None
            with self._numbers.restored_on_error():
                self._advance(step.members, skip)
                rows = [self._rows(bucket, rates, on_device, only) for bucket in step.buckets]
        except Exception:
            put_back(opt, replaced)
            raise
        for bucket, (scalars, values) in zip(step.buckets, rows, strict=True):
            launch = self._launch_of(bucket, scalars, rescale, found_inf)
            launch.tracked = [] if opt.track else None
            step.launch(bucket, values, launch)
            if launch.tracked is not None:
                self.tracker.add([member.position for some in bucket.runs for member in some], launch.tracked)
        step.finish()
        self._keep_warm(only, step.next(opt))
        if isinstance(step, ColdStep):
            self._versions.remember(opt, step.members)

    def _step(
        self,
        opt: Optimizer,
        warm: WarmStep | None,
        rates: Mapping[int, Number],
        on_device: bool,
        replaced: Replaced,
        only: Only | None,
    ) -> ColdStep | WarmStep | None:
        """What is to be done, checked. `replaced` gets the states that were, as they had been."""
        if warm is not None and self._numbers.device == (warm.device if on_device else CPU) and warm.holds(opt, rates):
            return warm
        members = members_of(opt, only)
        if not members:
            return None
        device = local(members[0].param).device if on_device else CPU
        create_missing(opt, members, self._numbers, device, replaced)
        tasks = [task_of(opt, member) for member in members]
        fused = [runs_fused(opt, member) for member in members]
        if opt.track:
            check_tracked(opt, members, fused)
        check_aliases(self._planner, members, tasks)
        self._versions.refresh(opt, members)
        return ColdStep(self._planner, members, tasks, rates, fused, only)

    def telemetry(self, opt: Optimizer) -> Telemetry:
        """`Optimizer.telemetry`."""
        if not opt.track:
            return Telemetry()
        params = params_of(opt, None)
        sums = self.tracker.sums(range(len(params)))
        reduce = ShardSums(params)
        if reduce:
            on_device = sums.to(reduce.device)
            reduce(on_device)
            sums = on_device.cpu()
        return telemetry(names_of(opt), [param.numel() for param in params], sums)

    def _take_warm(self, only: Only | None) -> WarmStep | None:
        """What the step may be like. It is kept again after the step: what follows a failure starts cold."""
        if only is not None:
            found = self._warm_of.pop(only.position, None)
            return found if found is not None and found.members[0].group is only.group else None
        warm, self._warm = self._warm, None
        return warm

    def _keep_warm(self, only: Only | None, step: WarmStep | None) -> None:
        if only is None:
            self._warm = step
        elif step is not None:
            self._warm_of[only.position] = step

    def _gradient_scale(
        self, opt: Optimizer, step: ColdStep | WarmStep, grad_scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What gradients are multiplied by, fp64 [] on the device: loss scale and clip. NaN: skip."""
        opt.grad_norm = None
        inverse = None if grad_scale is None else 1.0 / grad_scale.double()
        if opt.max_grad_norm is None:
            return inverse
        norm = step.norm(self._shard_sums("norm", step.members))
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

    def _rows(
        self, bucket: Bucket, rates: Mapping[int, Number], on_device: bool, only: Only | None
    ) -> tuple[type, Rows]:
        if on_device:
            key = (bucket.key, None if only is None else only.position)
            return self._tables.setdefault(key, RowTable()).rows(bucket.runs, rates, self._numbers, bucket.draws)
        return host_rows(bucket.runs, rates, self._numbers, bucket.draws)

    def _launch_of(
        self, bucket: Bucket, scalars: type, rescale: torch.Tensor | None, found_inf: torch.Tensor | None
    ) -> Launch:
        members = [member for some in bucket.runs for member in some]
        rule, device = members[0].rule, local(members[0].param).device
        launch = Launch(
            rule.phases,
            scalars,
            rule.preamble,
            None if rescale is None else rescale.to(device),
            None if found_inf is None else found_inf.to(device),
            draws=bucket.draws,
        )
        if any(phase.sums_elements for phase in launch.phases):
            launch.reduce = self._shard_sums(bucket.key, members) or None
        return launch

    def _shard_sums(self, key: Hashable, members: Sequence[Member]) -> ShardSums:
        """Of these parameters; made once, because that uploads."""
        key = (key, tuple(member.position for member in members))
        if key not in self._reductions:
            self._reductions[key] = ShardSums([member.param for member in members])
        return self._reductions[key]


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
