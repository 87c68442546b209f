"""The parameters of a step: what each of them brings along."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.matrix_phase import ApplyMatrices
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import unavailable
from tritopt.engine.row_phase import ApplyRows
from tritopt.kernels.preambles import without_clip
from tritopt.optim.distributed import ShardSums, aligned, has_whole_rows, is_sharded, local
from tritopt.optim.exchange import Exchange
from tritopt.optim.layout import Layout
from tritopt.optim.param_group import refusal
from tritopt.optim.step.owner import Owner
from tritopt.rule import Rule

Number: TypeAlias = float | torch.Tensor


class Member(NamedTuple):
    """A parameter that has a gradient in this step."""

    position: int
    """Position among all parameters of the optimizer."""
    name: Hashable
    """Name, where parameters are named; otherwise the position."""
    param: torch.Tensor
    grad: torch.Tensor
    group: dict[str, Any]
    rule: Rule
    layout: Layout
    needs_whole: bool
    """Whether sums over a sharded tensor are left to DTensor's operations, because no launch completes them."""

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """Part of a tensor (the parameter, its gradient or a state) that takes part in the step here."""
        return tensor if self.needs_whole else local(tensor)


def member_of(
    opt: Owner, position: int, name: Hashable, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any],
    rule: Rule,
) -> Member:  # fmt: skip
    """Make the member for a parameter of a group with this rule."""
    layout = opt.of_class(group).layouts.of(param, group, rule)
    return Member(position, name, param, grad, group, rule, layout, _needs_whole(param, group, rule))


def _needs_whole(param: torch.Tensor, group: dict[str, Any], rule: Rule) -> bool:
    if not is_sharded(param) or not any(phase.sums_elements for phase in rule.phases):
        return False
    if all(isinstance(phase, ApplyMatrices) for phase in rule.phases):
        return False
    if all(isinstance(phase, ApplyRows) for phase in rule.phases) and has_whole_rows(param):
        return False
    has_kernel = all(isinstance(phase, Apply) for phase in rule.phases)
    return not (has_kernel and group["fused"] is not False and unavailable(local(param)) is None)


def is_in_norm(member: Member) -> bool:
    """Whether its gradient counts in the global norm, and is clipped by it."""
    return bool(member.group.get("in_norm", True))


class LaunchPlan(NamedTuple):
    """Members that one launch updates, or the reference one after the other."""

    key: Hashable
    """Phases, preamble, device, whether a kernel runs, and whether storing draws: what members have in common."""
    by_group: list[list[Member]]
    """The members, those of one param_group in a list of their own, in the order of `places`."""
    places: list[int]
    """Places of the members among all members of the step."""
    is_fused: bool
    draws: bool
    """Whether storing weights or states takes random bits."""
    device: torch.device
    """Device of the members' parts."""

    @property
    def is_in_norm(self) -> bool:
        """Whether its members' gradients are clipped by the global norm."""
        return is_in_norm(self.by_group[0][0])


def launch_for(
    plan: LaunchPlan, scalars: type, shard_sums: Callable[[Hashable, list[Member]], ShardSums]
) -> LaunchSpec:
    """Launch of a plan, without what comes with each step: rescale, noop and telemetry."""
    members = [member for members in plan.by_group for member in members]
    rule = members[0].rule
    sums = shard_sums(plan.key, members) if any(phase.sums_elements for phase in rule.phases) else None
    exchange = None
    for phase in rule.phases:
        if isinstance(phase, ApplyMatrices) and any(is_sharded(member.param) for member in members):
            iteration = phase.iteration if plan.is_fused else phase.iteration._replace(symmetric=False)
            exchange = Exchange([member.param for member in members], phase.cut, iteration)
    bounds = (validate.bound_or(each[0].group["clip_value"], math.inf) for each in plan.by_group)
    clips = rule.clips and any(bound < math.inf for bound in bounds)
    preamble = rule.preamble if clips else without_clip(rule.preamble)
    return LaunchSpec(rule.phases, scalars, preamble, draws=plan.draws, reduce=sums or None, exchange=exchange)


class SingleParameter(NamedTuple):
    """The only parameter that a step is for, as its gradient is released; those of others are not final yet."""

    position: int
    name: Hashable
    param: torch.Tensor
    group: dict[str, Any]


def groups_of(opt: Owner, single: SingleParameter | None) -> list[dict[str, Any]]:
    """The param_groups that a step looks at: all, or that of the single parameter."""
    return opt.param_groups if single is None else [single.group]


def params_of(opt: Owner, single: SingleParameter | None) -> list[torch.Tensor]:
    """The parameters that a step looks at: all, or the single one."""
    if single is not None:
        return [single.param]
    return [param for group in opt.param_groups for param in group["params"]]


def names_of(opt: Owner) -> list[Hashable]:
    """Names of all parameters; positions of those in groups without names."""
    names: list[Hashable] = []
    for group in opt.param_groups:
        names.extend(group.get("param_names") or range(len(names), len(names) + len(group["params"])))
    return names


def members_of(opt: Owner, single: SingleParameter | None = None) -> list[Member]:
    """Members for all parameters that have a gradient, or for the single one."""
    if single is not None:
        assert single.param.grad is not None
        _check_dtype(opt, single.name, single.param)
        grad = aligned(single.param.grad, single.param)
        return [
            member_of(opt, single.position, single.name, single.param, grad, single.group, opt.rule_of(single.group))
        ]
    members, position = [], 0
    for group in opt.param_groups:
        rule, names = opt.rule_of(group), group.get("param_names")
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                name = names[i] if names else position
                _check_dtype(opt, name, param)
                grad = aligned(param.grad, param)
                members.append(member_of(opt, position, name, param, grad, group, rule))
            position += 1
    return members


def _check_dtype(opt: Owner, name: Hashable, param: torch.Tensor) -> None:
    """RuntimeError, as torch raises it, for a parameter that was frozen when it was added and now has a gradient."""
    if why := refusal(param):
        raise RuntimeError(f"parameter {name!r} is {param.dtype}, and {type(opt).__name__} {why}")


def split_by_group(members: Sequence[Member], each: bool = False) -> list[list[Member]]:
    """Lists of consecutive members that share a param_group. each: a list for every member."""
    by_group: list[list[Member]] = []
    for member in members:
        if each or not by_group or by_group[-1][0].group is not member.group:
            by_group.append([])
        by_group[-1].append(member)
    return by_group


def lives_on_device(lr: Any) -> bool:
    """Whether reading a learning rate would wait for a device."""
    return isinstance(lr, torch.Tensor) and lr.device.type != "cpu"


def rate(group: dict[str, Any]) -> Number:
    """The learning rate: fp64 [] where it is to be read on the device."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and (group["capturable"] or lives_on_device(lr)):
        return lr.detach().double().reshape(())
    return validate.finite("lr", float(lr))
