"""The torch.optim face: param_groups, state and hooks as torch has them, the update in one launch per phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from numbers import Real
from operator import is_
from typing import Any, ClassVar, TypeAlias

import torch

from tritopt.engine import private, validate
from tritopt.engine.device import is_capturing
from tritopt.engine.state_dtype import checked
from tritopt.engine.telemetry import Telemetry
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.weights import MASTERS
from tritopt.optim import checkpoint
from tritopt.optim.convert import sendable
from tritopt.optim.defaults import HOW, WrongKindError, arguments_of, floats, plain, torch_defaults
from tritopt.optim.distributed import like, local
from tritopt.optim.layout import AUTO, Layout, Layouts, checked_master
from tritopt.optim.observed import observed, uncompiled
from tritopt.optim.options import Options as Options
from tritopt.optim.options import check_known
from tritopt.optim.origin import CLASSES
from tritopt.optim.param_group import ParamGroup, check_dtypes, check_settings, declared, is_kept, rule_from, saved
from tritopt.optim.step.members import SingleParameter, lives_on_device
from tritopt.optim.step.stepper import Stepper
from tritopt.rule import Rule

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
MAX_RULES = 4096
HOW_BY_DEFAULT = {"capturable": False, "fused": None}


class Optimizer(torch.optim.Optimizer):
    """Base of tritopt.optim: a `torch.optim.Optimizer` whose step is one launch per phase for all param_groups.

    A subclass says which `rule` it follows, how that names `arguments` and states, and has a constructor with torch's
    names. Everything else is here. `Options` are the keyword arguments that all of them take.

    `foreach` is accepted and means nothing. `fused=False` runs the reference in PyTorch, `fused=True` insists on the
    kernel (for parameters on the CPU it warns and runs the reference), None takes it where it can run: on a GPU, or
    under TRITON_INTERPRET=1. `capturable=True` keeps steps, scales and tensor learning rates on the device, so that a
    CUDA graph can capture the step.

    State per parameter: what torch's class of the same name keeps, under its names; `step`; and under multi_precision
    what `master` keeps: `master_remainder` by default, `master_param` (fp32), `master_remainder8` or `compensation`. A
    step reads the parameter itself, so whoever writes to it, in whatever way, is heeded: where the parameter is not its
    master rounded, the master is forgotten. `grad_scale` and `found_inf`, which torch.amp.GradScaler sets, are read on
    the device: a skipped step writes nothing and does not count.
    """

    rule: ClassVar[type[Rule]]
    torch_class: ClassVar[Any] = None
    """torch's class of the same name, kept at import: frameworks are patched by assigning ours to its name."""
    arguments: ClassVar[Mapping[str, str | tuple[str, ...]]] = {"betas": ("beta1", "beta2"), "eps": "epsilon"}
    """Names that the rule has for keys of a param_group."""
    state_keys: ClassVar[Mapping[str, str]] = {
        "mean": "exp_avg",
        "var": "exp_avg_sq",
        "max_var": "max_exp_avg_sq",
        "momentum": "momentum_buffer",
    }
    """torch's name for a state of the rule; others keep their own."""
    layouts_class: ClassVar[type[Layouts]] = Layouts
    """Class that derives how parameters are kept, where that is special."""
    may_lack: ClassVar[frozenset[str]] = frozenset()
    """States that checkpoints of torch's class do not have, or not before a first gradient."""
    sparse_error: ClassVar[str | None] = None
    """torch's message, where it refuses sparse gradients; others are taken as dense ones with zero rows."""

    _step_supports_amp_scaling = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("tritopt.optim.") and hasattr(cls, "rule"):
            CLASSES[cls.__name__] = cls

    def __init__(self, params: Params, defaults: dict[str, Any], options: Options) -> None:
        check_known(type(self), options)
        if defaults.get("fused") and defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if defaults.get("fused") and defaults.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        for name in ("max_grad_norm", "clip_value"):
            validate.clip_bound(name, options.get(name))
        self.max_grad_norm = options.get("max_grad_norm")
        self.rounding_seed = validate.count("rounding_seed", options.get("rounding_seed", 0))
        self.track = validate.boolean("track", options.get("track", False))
        self._forget()
        ours = {
            "master": checked_master(options.get("master", AUTO)),
            "state_dtype": checked(options.get("state_dtype")),
            "clip_value": options.get("clip_value"),
            "multi_precision": validate.boolean("multi_precision", options.get("multi_precision", True)),
        }
        super().__init__(params, {**HOW_BY_DEFAULT, **defaults, **ours})

    def _forget(self) -> None:
        """Start without what is derived from parameters and states."""
        self._rules: dict[Hashable, Rule] = {}
        self.layouts = self.layouts_class(type(self).__name__, self.state_keys)
        """Layouts by which parameters are kept, each derived once."""
        self._checked: dict[int, tuple[Any, ...]] = {}
        """Keys and values of param_groups when they were last found right, by `id` of the group."""
        self._handed_out: dict[int, tuple[torch.Tensor, tuple[int, ...]]] = {}
        """Versions of state tensors when `state_dict` was last called, if there was no step since."""
        before: Stepper | None = getattr(self, "_stepper", None)
        self._stepper = Stepper({"step": 0.0, **(self.rule.scalar_states if hasattr(self, "rule") else {})})
        if before is not None:
            self._stepper.of_graphs = before.of_graphs

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Norm of the last step's gradients before the clip, fp32 [] on the device.

        None without max_grad_norm, and after a step in which no parameter had a gradient.
        """
        norm = self._stepper.grad_norm
        return None if norm is None else norm.clone()

    # torch's protocol.

    @uncompiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param_group as torch does. ValueError, and nothing added, also for parameters that no kernel takes."""
        # ZeroRedundancyOptimizer puts every argument into its groups, so the same value passes.
        if isinstance(param_group, dict) and param_group.get("max_grad_norm", self.max_grad_norm) != self.max_grad_norm:
            raise ValueError(
                "max_grad_norm is the optimizer's, of all gradients together, not a param_group's: pass it beside lr"
            )
        first = sum(len(group["params"]) for group in self.param_groups)
        private.without_dynamo(super().add_param_group)(param_group)
        try:
            check_dtypes(type(self).__name__, param_group["params"])
            self.check_group(param_group)
            names = param_group.get("param_names") or range(first, first + len(param_group["params"]))
            for name, param in zip(names, param_group["params"], strict=True):
                with validate.naming(name):
                    if is_kept(param):
                        self.layout_of(param, param_group)
        except Exception:
            self.param_groups.pop()
            raise
        self.param_groups[-1] = ParamGroup(param_group, self.of_class(param_group).unsaved)

    def __getstate__(self) -> dict[str, Any]:
        """Return what torch copies, and the option that is in no group."""
        ours = {name: getattr(self, name) for name in ("max_grad_norm", "rounding_seed", "track")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a state that was unpickled, deep-copied or loaded."""
        defaults = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        # Without "differentiable", which torch adds here for classes that lack it: no group is to get it.
        self.defaults = defaults
        self._forget()
        self.param_groups = [
            ParamGroup({**declared(self.of_class(group)), **self.defaults, **group}, self.of_class(group).unsaved)
            for group in self.param_groups
        ]

    @property
    def unsaved(self) -> frozenset[str]:
        """Keys of param_groups that checkpoints do not hold: how to compute, unless torch's class has it too."""
        return frozenset(HOW).difference(arguments_of(self.torch_class or type(self)))

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or write zeros into them where `set_to_none` is false."""
        private.without_dynamo(super().zero_grad)(set_to_none)

    @uncompiled
    def state_dict(self) -> dict[str, Any]:
        """State dict with torch's keys in param_groups, and `clip_value` where it is set.

        So `torch.distributed.checkpoint`, which compares keys, takes it for torch's class of the same name and back.
        The others are as the optimizer that loads it was constructed. A `master_remainder`, int16 in `state`, is shown
        as float16 of the same bits and memory, because NCCL and Gloo do not send int16.
        """
        state_dict: dict[str, Any] = private.without_dynamo(super().state_dict)()
        if "state" in state_dict:
            state_dict["state"] = sendable(state_dict["state"])
            self._handed_out = checkpoint.versions(state_dict["state"])
        if "param_groups" in state_dict:  # a hook may have made another dict of it
            groups = state_dict["param_groups"]
            state_dict["param_groups"] = [saved(group, self.of_class(group).unsaved) for group in groups]
        return state_dict

    @uncompiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but states keep their precision, and masters stay.

        Takes checkpoints of this class and of torch's class of the same name. A state keeps the dtype it was saved in
        where that is wider than this optimizer's own. An fp16 or bf16 parameter without a master in the checkpoint
        gets one from its weight, with a warning. `fused`, `foreach`, `capturable` and `differentiable` say how, not
        what, to compute, and stay as constructed. As in torch, a tensor that needs no conversion is taken over and not
        copied: load a deepcopy where the saved optimizer goes on training.

        Raises:
            ValueError: other groups, a state of another shape or kind, another optimizer's states, or hyperparameters
                out of range. Nothing is loaded then.
        """
        checkpoint.load(self, state_dict)

    @observed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        A step that fails or is interrupted leaves weights, states and counts untouched, unless it had begun to launch
        kernels: then parameters whose kernel was launched are updated and counted, and the others are untouched.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self, single: SingleParameter | None = None) -> None:
        self._handed_out = {}
        is_captured = is_capturing()
        if is_captured:
            self._check_capturable()
        if torch.is_inference_mode_enabled():
            # What is made there could not be written outside of it.
            with torch.inference_mode(False):
                self._update(single)
            return
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._stepper.update(self, single, is_captured)

    def _check_capturable(self) -> None:
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "Attempting CUDA graph capture of step() for an instance of "
                f"{type(self).__name__} but param_groups' capturable is False: construct it with capturable=True"
            )

    def master_weights(self) -> list[torch.Tensor]:
        """The weights as the arithmetic sees them, in the order of the parameters.

        fp32 where there is a master, also one that a remainder completes; else the parameter itself, detached.
        """
        return [self._master_weight(param, group) for group in self.param_groups for param in group["params"]]

    def telemetry(self) -> Telemetry:
        """A row for each parameter, of its last step: norms, share of weights that stayed, non-finite gradients.

        Rows go by name where parameters are named, else by position. This waits for the device, and for the other
        processes that hold shards, all of which must call it. Empty before the first step.

        Raises:
            ValueError: constructed without `track=True`.
        """
        return self._stepper.telemetry(self)

    def _master_weight(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, weight = self.state.get(param, {}), param.detach()
        # Not of `format_of` alone: what was loaded or changed is brought into that by the next step.
        fmt = next((fmt for fmt in MASTERS.values() if fmt.companion and fmt.companion in state), PLAIN)
        if fmt is PLAIN:
            return weight
        return like(param, fmt.decode((local(weight), local(state[fmt.companion])), torch.float32), tuple(param.shape))

    def of_class(self, group: Mapping[str, Any]) -> Optimizer:
        """An optimizer of the class that a group's parameters follow: this one, unless there are several."""
        return self

    def first_count(self, state: dict[str, Any]) -> float:
        """Steps that a state stands for which does not show them."""
        return self.layouts.first_count(state)

    def layout_of(self, param: torch.Tensor, group: dict[str, Any]) -> Layout:
        """Layout by which a parameter of a group is kept. ValueError if its group says what cannot be."""
        return self.of_class(group).layouts.of(param, group, self.rule_of(group))

    def sparse_error_of(self, group: dict[str, Any]) -> str | None:
        """torch's message where a group takes no sparse gradients; None: it takes them."""
        return self.sparse_error

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError, in the constructor's words, unless a param_group's values are such as the constructor takes.

        This is asked wherever values come from: when a group is added or loaded, and when it has changed between two
        steps. A learning rate that lives on a device is not waited for.
        """
        now = (*group.keys(), *group.values())
        before = self._checked.get(id(group), ())
        try:
            if len(now) != len(before) or not all(map(is_, now, before)):
                check_settings(type(self), self.defaults, group)
            # Under capturable the step reads a rate on the device, and the host would have to wait for it.
            if not (group["capturable"] and isinstance(group["lr"], torch.Tensor)):
                self._check_rate("lr", group["lr"])
            self._check_rate("weight_decay", group.get("weight_decay", 0.0))
            self.rule.check_decay(group.get("weight_decay", 0.0), "weight_decay")
            self.rule_of(group)
        except TypeError as error:
            raise WrongKindError(str(error)) from error
        if len(self._checked) > MAX_RULES:
            self._checked.clear()
        self._checked[id(group)] = now

    def _check_rate(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            if lives_on_device(value):
                return
            value = value.item()
        if isinstance(value, Real) and 0.0 <= float(value) < math.inf:
            return
        self.check_values({name: value})
        validate.nonnegative(name, validate.finite(name, float(value)))  # where torch's takes NaN or infinity

    def check_values(self, values: Mapping[str, Any]) -> None:
        """ValueError for hyperparameters out of range: in torch's words, those that torch's class has too."""
        if self.torch_class is None:
            return
        known = arguments_of(self.torch_class)
        torch_defaults(self.torch_class, **{name: value for name, value in values.items() if name in known})

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with a group's hyperparameters, but for the learning rate and the decay."""
        torchs = {} if self.torch_class is None else arguments_of(self.torch_class)
        values = {name: plain(group[name], torchs.get(name)) for name in self.arguments}
        key = (*values.values(), group["clip_value"])
        if key not in self._rules:
            if len(self._rules) > MAX_RULES:
                self._rules.clear()
            # Without flags: torch's constructor refuses combinations, such as nesterov without momentum, that its step
            # takes from a scheduler. It wants betas to be floats.
            self.check_values({name: floats(value) for name, value in values.items() if not isinstance(value, bool)})
            values["clip_value"] = group["clip_value"]
            self._rules[key] = rule_from(self.rule, {**self.arguments, "clip_value": "clip_gradient"}, values)
        return self._rules[key]
