"""The torch.optim face: param_groups, state and hooks as torch has them, the update in one launch per phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypedDict

import torch

from tritopt import validate
from tritopt.fused import DeviceRows, Launch, Planner, Task, is_low_precision, unavailable
from tritopt.kernels.formats import MASTER_FP32, PLAIN
from tritopt.optim import checkpoint, distributed
from tritopt.optim.checkpoint import MASTER, Expected
from tritopt.optim.clip import clip_factor, global_norm
from tritopt.optim.device_rows import RowTable
from tritopt.optim.distributed import ShardSums, local
from tritopt.optim.scalar_states import CPU, ScalarStates
from tritopt.optimizer import Optimizer as Rule
from tritopt.phases import Apply
from tritopt.warning import warn

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
Number: TypeAlias = float | torch.Tensor
MAX_RULES = 4096


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside torch's.

    multi_precision: keep an fp32 master and fp32 states for fp16 and bf16 parameters; default True.
    max_grad_norm: clip the gradients' global norm to this in the step, on the device; `opt.grad_norm` holds the norm.
        Gradients are not rewritten. A norm that is not finite skips the update. None: off.
    clip_value: bound on each element of the gradient, after the norm is clipped. None: off.
    """

    multi_precision: bool
    max_grad_norm: float | None
    clip_value: float | None


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


class Optimizer(torch.optim.Optimizer):
    """Base of tritopt.optim: a `torch.optim.Optimizer` whose step is one launch per phase for all param_groups.

    A subclass says which `rule` it follows, how that names `arguments` and states, and has a constructor with torch's
    names. Everything else is here. `Options` are the keyword arguments that all of them take.

    `foreach` is accepted and means nothing. `fused=False` runs the reference in PyTorch, `fused=True` insists on the
    kernel, None takes it where it can run: on a GPU, or under TRITON_INTERPRET=1. `capturable=True` keeps steps, scales
    and tensor learning rates on the device, so that a CUDA graph can capture the step.

    State per parameter: what torch's class of the same name keeps, under its names; `step`; and under multi_precision
    `master_param`, the fp32 weight. A parameter that something else has written to since the last step (a loaded
    checkpoint, a clamp) takes its master along. `grad_scale` and `found_inf`, which torch.amp.GradScaler sets, are read
    on the device: a skipped step writes nothing and does not count.
    """

    rule: ClassVar[type[Rule]]
    arguments: ClassVar[Mapping[str, str | tuple[str, ...]]] = {"betas": ("beta1", "beta2"), "eps": "epsilon"}
    """What the rule calls a key of a param_group."""
    state_keys: ClassVar[Mapping[str, str]] = {
        "mean": "exp_avg",
        "var": "exp_avg_sq",
        "max_var": "max_exp_avg_sq",
        "momentum": "momentum_buffer",
    }
    """torch's name for a state of the rule; others keep their own."""
    sparse_error: ClassVar[str | None] = None
    """torch's message, where it refuses sparse gradients; others are taken as dense ones with zero rows."""

    _step_supports_amp_scaling = True

    def __init__(self, params: Params, defaults: dict[str, Any], options: Options) -> None:
        unknown = sorted(set(options) - set(Options.__annotations__))
        if unknown:
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}; beside torch's there are "
                + ", ".join(Options.__annotations__)
            )
        if defaults.get("fused") and defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if defaults.get("fused") and defaults.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        for name in ("max_grad_norm", "clip_value"):
            bound = options.get(name)
            if bound is not None and not validate.number(name, bound) > 0:
                raise ValueError(f"{name}={bound!r} must be > 0; None does not clip")
        self.max_grad_norm = options.get("max_grad_norm")
        self.grad_norm: torch.Tensor | None = None
        """Norm of the last step's gradients before the clip, fp32 [] on the device; None without max_grad_norm."""
        self._forget()
        ours = {
            "clip_value": options.get("clip_value"),
            "multi_precision": validate.boolean("multi_precision", options.get("multi_precision", True)),
        }
        super().__init__(params, {**defaults, **ours})

    def _forget(self) -> None:
        """Start without what is derived from parameters and states."""
        self._planner = Planner()
        self._rules: dict[Hashable, Rule] = {}
        self._tables: dict[Hashable, RowTable] = {}
        self._reductions: dict[Hashable, ShardSums] = {}
        self._versions: dict[int, int] = {}
        self._numbers = ScalarStates({"step": 0.0, **self.rule.scalar_states})

    # torch's protocol.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch; ValueError also for parameters that no kernel takes. Nothing is added then."""
        super().add_param_group(param_group)
        try:
            for param in param_group["params"]:
                if param.is_complex():
                    raise ValueError(
                        f"{type(self).__name__} takes no complex parameters, and one is {param.dtype}: optimize "
                        "torch.view_as_real(parameter)"
                    )
                if param.dtype not in validate.WEIGHT_DTYPES:
                    raise ValueError(f"{type(self).__name__} takes float16 to float64 parameters, not {param.dtype}")
            self._rule_of(param_group)
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """What torch copies, and the option that is in no group."""
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "grad_norm": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, deep-copied and loaded states pass here."""
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch, but states keep their precision, and masters stay.

        Takes checkpoints of this class and of torch's class of the same name. A state keeps the dtype it was saved in
        where that is wider than this optimizer's own. An fp16 or bf16 parameter without a master in the checkpoint
        gets one from its weight, with a warning. `fused`, `foreach`, `capturable` and `differentiable` say how, not
        what, to compute, and stay as constructed.

        Raises:
            ValueError: other groups, or a state of another shape. Nothing is loaded then.
        """
        checkpoint.load(self, state_dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. A failed step leaves weights, states and counts untouched.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._update()
        return loss

    def master_weights(self) -> list[torch.Tensor]:
        """The weights as the arithmetic sees them, in the order of the parameters: masters where there are some."""
        return [
            self.state[param][MASTER] if MASTER in self.state.get(param, ()) else param.detach()
            for group in self.param_groups
            for param in group["params"]
        ]

    # What a subclass may say about its states.

    def names_of_states(self, rule: Rule, param: torch.Tensor) -> tuple[str, ...]:
        """Keys of `state[param]`, in the rule's order."""
        return tuple(self.state_keys.get(name, name) for name in rule.state_names)

    def expected_states(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Expected]:
        """Shape and dtype of each state tensor of a parameter."""
        rule = self._rule_of(group)
        has_master = group["multi_precision"] and is_low_precision(param.dtype)
        dtype = torch.float32 if has_master else param.dtype
        of_states = dtype if rule.state_dtype is None else torch.promote_types(rule.state_dtype, dtype)
        shapes = rule.state_shapes(param.shape)
        found = {
            name: Expected(tuple(shape), of_states)
            for name, shape in zip(self.names_of_states(rule, param), shapes, strict=True)
        }
        return {**found, MASTER: Expected(tuple(param.shape), dtype)} if has_master else found

    def complete_loaded_state(self, state: dict[str, Any]) -> None:
        """Add what a checkpoint of torch's class does not hold."""

    # A step.

    def _update(self) -> None:
        members = self._members()
        if not members:
            return
        found_inf, grad_scale = (_scalar(getattr(self, name, None)) for name in ("found_inf", "grad_scale"))
        on_device = (
            found_inf is not None
            or self._numbers.device != CPU
            or any(group["capturable"] or _lives_on_device(group["lr"]) for group in self.param_groups)
        )
        device = local(members[0].param).device if on_device else CPU
        new: list[torch.Tensor] = []
        try:
            self._create_states(members, device, new)
            tasks = [self._task(member) for member in members]
            fused = [self._runs_fused(member, task) for member, task in zip(members, tasks, strict=True)]
            self._check_aliases(members, tasks)
            rates = {id(member.group): _rate(member.group) for member in members}
        except Exception:
            for param in new:
                del self.state[param]
            raise
        self._refresh_masters(members)
        rescale = self._gradient_scale(members, grad_scale)
        skip = _skip(found_inf, rescale, device) if on_device else None
        self._advance(members, skip)
        for key, chosen in self._buckets(members, tasks, fused).items():
            some, their_tasks = [members[i] for i in chosen], [tasks[i] for i in chosen]
            scalars, rows = self._rows(key, some, rates, on_device)
            if fused[chosen[0]]:
                self._launch(key, some, their_tasks, scalars, rows, rescale, found_inf)
            elif found_inf is None or not found_inf.item():
                numbers = rows.values.tolist() if isinstance(rows, DeviceRows) else rows
                for member, task, row in zip(some, their_tasks, numbers, strict=True):
                    member.rule.apply_reference(task, row[:3], scalars(*row[3:]), rescale)
        for member, task in zip(members, tasks, strict=True):
            if len(task.weight) > 1:
                self._versions[member.position] = local(task.weight[0])._version

    def _members(self) -> list[Member]:
        members, position = [], 0
        for group in self.param_groups:
            rule, names = self._rule_of(group), group.get("param_names")
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    name = names[i] if names else position
                    members.append(Member(position, name, param, param.grad, group, rule))
                position += 1
        return members

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with a group's hyperparameters, but for the learning rate and the decay."""
        values = {name: _plain(group[name]) for name in self.arguments}
        key = (*values.values(), group["clip_value"])
        if key not in self._rules:
            if len(self._rules) > MAX_RULES:
                self._rules.clear()
            arguments: dict[str, Any] = {"clip_gradient": group["clip_value"]}
            for name, target in self.arguments.items():
                pairs = ((target, values[name]),) if isinstance(target, str) else zip(target, values[name], strict=True)
                arguments.update(pairs)
            self._rules[key] = self.rule(**arguments)
        return self._rules[key]

    def _create_states(self, members: Sequence[Member], device: torch.device, new: list[torch.Tensor]) -> None:
        """Create what is missing. `new` gets the parameters that had no state."""
        states = [self.state.get(param, {}) for group in self.param_groups for param in group["params"]]
        self._numbers.bind(states, device)
        for member in members:
            param = member.param
            expected = self.expected_states(param, member.group)
            state = self.state.get(param, {})
            if "step" in state and all(name in state for name in expected):
                continue
            made = {**state, **self._numbers.views(member.position)}
            weight = local(param).detach()
            if MASTER in expected and MASTER not in made:
                made[MASTER] = distributed.like(param, weight.to(torch.float32, copy=True), expected[MASTER].shape)
            inner = member.rule.create_state(member.name, local(made[MASTER]) if MASTER in expected else weight)
            values = [value for value in (inner if isinstance(inner, tuple) else (inner,)) if value is not None]
            for name, value in zip(self.names_of_states(member.rule, param), values, strict=True):
                if name not in made:
                    made[name] = distributed.like(param, value, expected[name].shape)
            if not state:
                new.append(param)
            self.state[param] = made

    def _task(self, member: Member) -> Task:
        """The parameter's tensors, checked: their local parts, unless the reference must see them whole."""
        param, rule, state = member.param, member.rule, self.state[member.param]
        grad = distributed.aligned(member.grad, param)
        if grad.layout != torch.strided:
            if self.sparse_error is not None:
                raise RuntimeError(self.sparse_error)
            grad = grad.to_dense()
        part = (lambda t: t) if self._needs_whole(member) else local
        weight = part(param) if member.group.get("differentiable") else part(param).detach()
        planes = (weight, part(state[MASTER])) if MASTER in state else (weight,)
        values = tuple(part(state[name]) for name in self.names_of_states(rule, param))
        validate.weight_and_grad(member.name, weight, part(grad))
        for value in planes[1:]:
            validate.state_tensor(member.name, value, weight, weight.shape)
        for value, shape in zip(values, rule.state_shapes(weight.shape), strict=True):
            validate.state_tensor(member.name, value, weight, shape)
        return Task(planes, MASTER_FP32 if MASTER in state else PLAIN, part(grad), values)

    def _check_aliases(self, members: Sequence[Member], tasks: Sequence[Task]) -> None:
        """ValueError if the step would write an element twice."""
        pairs = [
            (m.name, task) for m, task in zip(members, tasks, strict=True) if task.weight[0] is local(task.weight[0])
        ]
        self._planner.check_aliases("step", [name for name, _ in pairs], [task for _, task in pairs])

    def _needs_whole(self, member: Member) -> bool:
        """Whether sums over a sharded tensor are left to DTensor's operations, because no launch completes them."""
        if not distributed.is_sharded(member.param) or not any(p.sums_elements for p in member.rule.phases):
            return False
        has_kernel = all(isinstance(phase, Apply) for phase in member.rule.phases)
        return not (has_kernel and member.group["fused"] is not False and unavailable(local(member.param)) is None)

    def _runs_fused(self, member: Member, task: Task) -> bool:
        wanted = member.group["fused"]
        if wanted is False or member.group.get("differentiable"):
            return False
        reason = unavailable(local(task.weight[0]))
        if self._needs_whole(member):
            reason = reason or f"{type(self).__name__} has no kernel for tensors that are sharded over processes"
        if reason and wanted and local(task.weight[0]).device.type == "cpu":
            warn(f"fused=True on the CPU runs the reference: {reason}")
        elif reason and wanted:
            raise RuntimeError(f"`fused=True`, parameter {member.name!r}: {reason}")
        return reason is None

    def _refresh_masters(self, members: Sequence[Member]) -> None:
        """Take along masters whose weight was written to by someone else since the last step."""
        for member in members:
            master = self.state[member.param].get(MASTER)
            weight = local(member.param).detach()
            if master is not None and self._versions.get(member.position, weight._version) != weight._version:
                kept = local(master)
                kept.copy_(torch.where(kept.to(weight.dtype) == weight, kept, weight.to(kept.dtype)))

    def _gradient_scale(self, members: Sequence[Member], grad_scale: torch.Tensor | None) -> torch.Tensor | None:
        """What gradients are multiplied by, fp64 [] on the device: loss scale and clip. NaN: skip."""
        self.grad_norm = None
        inverse = None if grad_scale is None else 1.0 / grad_scale.double()
        if self.max_grad_norm is None:
            return inverse
        key = tuple(member.position for member in members)
        norm = global_norm(self._planner, key, [m.param for m in members], [m.grad for m in members])
        norm = norm if inverse is None else norm * inverse.to(norm.device)
        self.grad_norm = norm.float()
        factor = clip_factor(norm, self.max_grad_norm)
        return factor if inverse is None else factor * inverse.to(norm.device)

    def _advance(self, members: Sequence[Member], skip: torch.Tensor | None) -> None:
        self._numbers.advance([member.position for member in members], skip)
        for name in self.rule.scalar_states:
            for some in _same_group(members):
                positions = [member.position for member in some]
                factors = some[0].rule.factors(name, self._numbers.get("step", positions))
                self._numbers.multiply(name, positions, factors, skip)

    def _buckets(
        self, members: Sequence[Member], tasks: Sequence[Task], fused: Sequence[bool]
    ) -> dict[Hashable, list[int]]:
        """Members by launch; those that a learning rate of 0 leaves alone are in none."""
        found: dict[Hashable, list[int]] = {}
        for i, (member, task) in enumerate(zip(members, tasks, strict=True)):
            lr = member.group["lr"]
            if member.rule.skips_zero_lr and not _lives_on_device(lr) and float(lr) == 0:
                continue
            key = (member.rule.phases, member.rule.preamble, task.weight[0].device, fused[i])
            found.setdefault(key, []).append(i)
        return found

    def _rows(
        self, key: Hashable, members: Sequence[Member], rates: Mapping[int, Number], on_device: bool
    ) -> tuple[type, list[tuple[float, ...]] | DeviceRows]:
        """The type of the rule's scalars, and a row for each member: rescale, clip bound, wd, scalars."""
        blocks: list[tuple[Number, ...]] = []
        sizes: list[int] = []
        scalars: Any = None
        for some in _same_group(members, each=self.rule.is_per_parameter):
            positions = [member.position for member in some]
            group, rule, lr = some[0].group, some[0].rule, rates[id(some[0].group)]
            numbers = [self._numbers.get(name, positions) for name in ("step", *rule.scalar_states)]
            wd = float(group.get("weight_decay", 0.0))
            bound = validate.bound_or(group["clip_value"], math.inf) if rule.clips else math.inf
            common = (-1.0 if group.get("maximize") else 1.0, bound, wd)
            name = distributed.key_of_shard(some[0].name, some[0].param)
            if on_device:
                scalars = rule.scalars_at(name, lr, wd, *numbers)
                blocks.append((*common, *scalars))
                sizes.append(len(some))
                continue
            of_numbers: dict[tuple[float, ...], tuple[Number, ...]] = {}
            for row in zip(*(vector.tolist() for vector in numbers), strict=True):
                if row not in of_numbers:
                    scalars = rule.scalars_at(name, lr, wd, int(row[0]), *row[1:])
                    of_numbers[row] = (*common, *scalars)
                blocks.append(of_numbers[row])
        if on_device:
            device = local(members[0].param).device
            return type(scalars), self._tables.setdefault(key, RowTable()).fill(blocks, sizes, device)
        return type(scalars), blocks  # type: ignore[return-value]

    def _launch(
        self,
        key: Hashable,
        members: Sequence[Member],
        tasks: Sequence[Task],
        scalars: type,
        rows: list[tuple[float, ...]] | DeviceRows,
        rescale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        rule, device = members[0].rule, tasks[0].weight[0].device
        key = (key, tuple(member.position for member in members))
        launch = Launch(
            rule.phases,
            scalars,
            rule.preamble,
            None if rescale is None else rescale.to(device),
            None if found_inf is None else found_inf.to(device),
        )
        if any(phase.sums_elements for phase in rule.phases):
            if key not in self._reductions:
                self._reductions[key] = ShardSums([member.param for member in members])
            launch.reduce = self._reductions[key] or None
        self._planner.apply(key, tasks, rows, launch)


def _same_group(members: Sequence[Member], each: bool = False) -> list[list[Member]]:
    """Runs of members of one param_group; each by itself if wanted."""
    runs: list[list[Member]] = []
    for member in members:
        if each or not runs or runs[-1][0].group is not member.group:
            runs.append([])
        runs[-1].append(member)
    return runs


def _plain(value: Any) -> Any:
    """Hashable, and without tensors: a hyperparameter as the rule takes it."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _lives_on_device(lr: Any) -> bool:
    return isinstance(lr, torch.Tensor) and lr.device.type != "cpu"


def _rate(group: dict[str, Any]) -> Number:
    """The learning rate: fp64 [] where it is to be read on the device."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and (group["capturable"] or _lives_on_device(lr)):
        return lr.detach().double().reshape(())
    return validate.finite("lr", float(lr))


def _scalar(value: Any) -> torch.Tensor | None:
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
