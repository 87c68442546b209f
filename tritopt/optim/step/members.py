"""The parameters of a step: what each of them brings along."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.phase import Launch
from tritopt.engine.plan import unavailable
from tritopt.engine.row_phase import ApplyRows
from tritopt.kernels.preambles import without_clip
from tritopt.optim.distributed import ShardSums, aligned, has_whole_rows, is_sharded, local
from tritopt.optim.layout import Layout
from tritopt.optim.step.owner import Owner
from tritopt.rule import Rule

Number: TypeAlias = float | torch.Tensor


class Member(NamedTuple):
    """A parameter that has a gradient in this step."""

    position: int
    """Among all parameters of the optimizer."""
    name: Hashable
    """From named parameters, otherwise the position."""
    param: torch.Tensor
    grad: torch.Tensor
    group: dict[str, Any]
    rule: Rule
    layout: Layout
    needs_whole: bool
    """Whether sums over a sharded tensor are left to DTensor's operations, because no launch completes them."""

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """What of the parameter, its gradient or a state takes part in the step here."""
        return tensor if self.needs_whole else local(tensor)


def member_of(
    opt: Owner, position: int, name: Hashable, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any],
    rule: Rule,
) -> Member:  # fmt: skip
    """A parameter of a group with this rule."""
    layout = opt.layouts.of(param, group, rule)
    return Member(position, name, param, grad, group, rule, layout, _needs_whole(param, group, rule))


def _needs_whole(param: torch.Tensor, group: dict[str, Any], rule: Rule) -> bool:
    if not is_sharded(param) or not any(phase.sums_elements for phase in rule.phases):
        return False
    if all(isinstance(phase, ApplyRows) for phase in rule.phases) and has_whole_rows(param):
        return False
    has_kernel = all(isinstance(phase, Apply) for phase in rule.phases)
    return not (has_kernel and group["fused"] is not False and unavailable(local(param)) is None)


class Bucket(NamedTuple):
    """What one launch updates, or the reference."""

    key: Hashable
    runs: list[list[Member]]
    """Its members, those of one param_group together."""
    places: list[int]
    """Of its members among all."""
    is_fused: bool
    draws: bool
    """Whether its weights' format takes random bits."""
    device: torch.device


def launch_for(bucket: Bucket, scalars: type, shard_sums: Callable[[Hashable, list[Member]], ShardSums]) -> Launch:
    """A bucket's launch, but for what comes with each step."""
    members = [member for some in bucket.runs for member in some]
    rule = members[0].rule
    sums = shard_sums(bucket.key, members) if any(phase.sums_elements for phase in rule.phases) else None
    clips = rule.clips and any(
        validate.bound_or(run[0].group["clip_value"], math.inf) < math.inf for run in bucket.runs
    )
    preamble = rule.preamble if clips else without_clip(rule.preamble)
    return Launch(rule.phases, scalars, preamble, draws=bucket.draws, reduce=sums or None)


class Only(NamedTuple):
    """The one parameter that a step is for: the gradients of others are not final yet."""

    position: int
    name: Hashable
    param: torch.Tensor
    group: dict[str, Any]


def groups_of(opt: Owner, only: Only | None) -> list[dict[str, Any]]:
    """The param_groups that a step looks at."""
    return opt.param_groups if only is None else [only.group]


def params_of(opt: Owner, only: Only | None) -> list[torch.Tensor]:
    """The parameters that a step looks at."""
    if only is not None:
        return [only.param]
    return [param for group in opt.param_groups for param in group["params"]]


def names_of(opt: Owner) -> list[Hashable]:
    """Of all parameters: their names where they have some, else their positions."""
    found: list[Hashable] = []
    for group in opt.param_groups:
        found.extend(group.get("param_names") or range(len(found), len(found) + len(group["params"])))
    return found


def members_of(opt: Owner, only: Only | None = None) -> list[Member]:
    """All parameters that have a gradient, or the only one."""
    if only is not None:
        assert only.param.grad is not None
        grad = aligned(only.param.grad, only.param)
        return [member_of(opt, only.position, only.name, only.param, grad, only.group, opt.rule_of(only.group))]
    members, position = [], 0
    for group in opt.param_groups:
        rule, names = opt.rule_of(group), group.get("param_names")
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                grad = aligned(param.grad, param)
                name = names[i] if names else position
                members.append(member_of(opt, position, name, param, grad, group, rule))
            position += 1
    return members


def same_group(members: Sequence[Member], each: bool = False) -> list[list[Member]]:
    """Runs of members of one param_group; each by itself if wanted."""
    runs: list[list[Member]] = []
    for member in members:
        if each or not runs or runs[-1][0].group is not member.group:
            runs.append([])
        runs[-1].append(member)
    return runs


def lives_on_device(lr: Any) -> bool:
    """Whether reading it would wait for a device."""
    return isinstance(lr, torch.Tensor) and lr.device.type != "cpu"


def rate(group: dict[str, Any]) -> Number:
    """The learning rate: fp64 [] where it is to be read on the device."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and (group["capturable"] or lives_on_device(lr)):
        return lr.detach().double().reshape(())
    return validate.finite("lr", float(lr))
