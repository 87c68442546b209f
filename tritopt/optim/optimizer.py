"""The torch.optim face: param_groups, state and hooks as torch has them, the update in one launch per phase."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, TypedDict

import torch

from tritopt import validate
from tritopt.fused import is_low_precision
from tritopt.kernels.formats import MASTERS, PLAIN, Format
from tritopt.kernels.state_formats import BLOCK
from tritopt.optim import checkpoint
from tritopt.optim.checkpoint import Expected, keys_of
from tritopt.optim.distributed import like, local, takes_blocks
from tritopt.optim.members import Only
from tritopt.optim.observed import observed, uncompiled
from tritopt.optim.step import Stepper
from tritopt.optimizer import Optimizer as Rule
from tritopt.phases import Apply
from tritopt.states import FP32, checked, formats_of
from tritopt.telemetry import Telemetry

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
MAX_RULES = 4096
HOW_BY_DEFAULT = {"capturable": False, "fused": None}


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside torch's.

    multi_precision: keep a master and fp32 states for fp16 and bf16 parameters; default True.
    master: how it is kept. "fp32", the default: a copy, 4 bytes. "split16": 16 bits that complete a bf16 parameter to
        exactly the fp32 master; 2 bytes less to keep and 2 to move, and the same trajectory. Such a parameter is the
        master rounded to nearest, away from zero at a tie. "split8": 8 bits in their place, 24 in all, rounded
        stochastically. "kahan": what the parameter lacks, in its own dtype; updates below 2^-17 of a bf16 weight can be
        lost. "stochastic": nothing beside a bf16 parameter, which is rounded stochastically. None is
        multi_precision=False.
    state_dtype: how states are stored: "fp32", "bf16", "fp16", "int8" or "fp8" (torch's dtypes do as well), or a dict
        of these by name of the state, such as {"exp_avg": "int8", "exp_avg_sq": "bf16"}, the others fp32. All but fp32
        round stochastically. "fp16", "int8" and "fp8" share a scale among 64 neighbours in memory; `state` then holds,
        in place of "exp_avg", "exp_avg_int8" and "exp_avg_int8_scale", or likewise. A state that would not bear it
        stays fp32: a largest value so far, factors, what weights are computed from. So does one with scales unless the
        parameter's rows (what has one index along the first dimension) are multiples of 64 elements, so that they may
        be split over any number of processes, or it has 32768 elements and is not split. None, the default: fp32 where
        there is a master, otherwise the parameter's dtype.
    rounding_seed: of the random bits of stochastic rounding, an int >= 0; default 0. They are a function of the seed,
        the parameter (its name where parameters are named, else its position), the step and the element.
    max_grad_norm: clip the gradients' global norm to this in the step, on the device; `opt.grad_norm` holds the norm.
        Gradients are not rewritten. A norm that is not finite skips the update. None: off.
        The norm is that of this optimizer's parameters, over all processes that share one of them. ZeRO's
        ZeroRedundancyOptimizer gives each process parameters of its own, and cannot be told from a caller that wants
        this: there call `tritopt.clip_grad_norm_` before the step instead.
    clip_value: bound on each element of the gradient, after the norm is clipped. None: off.
    track: sum up in each step, from registers, what `telemetry` shows; default False.
    """

    multi_precision: bool
    master: str | None
    state_dtype: Any
    rounding_seed: int
    max_grad_norm: float | None
    clip_value: float | None
    track: bool


class Optimizer(torch.optim.Optimizer):
    """Base of tritopt.optim: a `torch.optim.Optimizer` whose step is one launch per phase for all param_groups.

    A subclass says which `rule` it follows, how that names `arguments` and states, and has a constructor with torch's
    names. Everything else is here. `Options` are the keyword arguments that all of them take.

    `foreach` is accepted and means nothing. `fused=False` runs the reference in PyTorch, `fused=True` insists on the
    kernel (for parameters on the CPU it warns and runs the reference), None takes it where it can run: on a GPU, or
    under TRITON_INTERPRET=1. `capturable=True` keeps steps, scales and tensor learning rates on the device, so that a
    CUDA graph can capture the step.

    State per parameter: what torch's class of the same name keeps, under its names; `step`; and under multi_precision
    what `master` keeps: `master_param` (fp32), `master_remainder`, `master_remainder8` or `compensation`. A parameter
    that something else has written to since the last step (a loaded checkpoint, a clamp) takes its master along.
    `grad_scale` and `found_inf`, which torch.amp.GradScaler sets, are read on the device: a skipped step writes nothing
    and does not count.
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
            validate.clip_bound(name, options.get(name))
        self.max_grad_norm = options.get("max_grad_norm")
        self.rounding_seed = validate.count("rounding_seed", options.get("rounding_seed", 0))
        self.track = validate.boolean("track", options.get("track", False))
        self._forget()
        master = options.get("master", "fp32")
        if master is not None and master not in MASTERS:
            raise ValueError(f"master={master!r} must be one of {', '.join(map(repr, MASTERS))}, or None")
        ours = {
            "master": master,
            "state_dtype": checked(options.get("state_dtype")),
            "clip_value": options.get("clip_value"),
            "multi_precision": validate.boolean("multi_precision", options.get("multi_precision", True)),
        }
        super().__init__(params, {**HOW_BY_DEFAULT, **defaults, **ours})

    def _forget(self) -> None:
        """Start without what is derived from parameters and states."""
        self._rules: dict[Hashable, Rule] = {}
        self._stepper = Stepper({"step": 0.0, **self.rule.scalar_states})

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Norm of the last step's gradients before the clip, fp32 [] on the device; None without max_grad_norm."""
        norm = self._stepper.grad_norm
        return None if norm is None else norm.clone()

    # torch's protocol.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch; ValueError also for parameters that no kernel takes. Nothing is added then."""
        # ZeroRedundancyOptimizer puts every argument into its groups, so the same value passes.
        if isinstance(param_group, dict) and param_group.get("max_grad_norm", self.max_grad_norm) != self.max_grad_norm:
            raise ValueError(
                "max_grad_norm is the optimizer's, of all gradients together, not a param_group's: pass it beside lr"
            )
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
                self.expected_states(param, param_group)
            self.rule_of(param_group)
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """What torch copies, and the option that is in no group."""
        ours = {name: getattr(self, name) for name in ("max_grad_norm", "rounding_seed", "track")}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled, deep-copied and loaded states pass here."""
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @uncompiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch, but states keep their precision, and masters stay.

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
        """Update all parameters that have a gradient. A failed step leaves weights, states and counts untouched.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _update(self, only: Only | None = None) -> None:
        is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if is_captured:
            self._check_capturable()
        if torch.is_inference_mode_enabled():
            # What is made there could not be written outside of it.
            with torch.inference_mode(False):
                self._update(only)
            return
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._stepper.update(self, only, is_captured)

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

        By name where parameters are named, else by position. Waits for the device, and for the other processes that
        hold shards, all of which must call it. Empty before the first step.

        Raises:
            ValueError: constructed without `track=True`.
        """
        return self._stepper.telemetry(self)

    def _master_weight(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        fmt, state, weight = self.format_of(param, group), self.state.get(param, {}), param.detach()
        if fmt.companion not in state:
            return weight
        return like(param, fmt.decode((local(weight), local(state[fmt.companion])), torch.float32), tuple(param.shape))

    # What a subclass may say about its states.

    def names_of_states(self, rule: Rule, param: torch.Tensor) -> tuple[str, ...]:
        """Keys of `state[param]`, in the rule's order."""
        return tuple(self.state_keys.get(name, name) for name in rule.state_names)

    def expected_states(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Expected]:
        """Shape and dtype of each state tensor of a parameter."""
        rule = self.rule_of(group)
        fmt = self.format_of(param, group)
        is_wide = fmt is not PLAIN or group["state_dtype"] is not None
        dtype = torch.promote_types(torch.float32, param.dtype) if is_wide else param.dtype
        plain = dtype if rule.least_state_dtype is None else torch.promote_types(rule.least_state_dtype, dtype)
        formats = self.state_formats_of(param, group)
        found: dict[str, Expected] = {}
        for (name, of_state), shape in zip(formats.items(), rule.state_shapes(param.shape), strict=True):
            found.update(checkpoint.expected_planes(name, of_state, tuple(shape), plain))
        if fmt.companion:
            found[fmt.companion] = Expected(tuple(param.shape), fmt.dtype_of_companion(param.dtype))
        return found

    def state_formats_of(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, Format]:
        """How each state of a parameter is stored, in the rule's order. ValueError if its group says what cannot be."""
        choice, kinds = group["state_dtype"], self.state_kinds_of(param, group)
        formats = formats_of(choice, kinds)
        if choice not in (None, FP32) and param.dtype == torch.float64:
            raise ValueError(
                f"state_dtype={choice!r} is not for float64 parameters: give their param_group state_dtype=None"
            )
        fits = takes_blocks(param, BLOCK)
        return {name: PLAIN if fmt.block and not fits else fmt for name, fmt in zip(kinds, formats, strict=True)}

    def state_kinds_of(self, param: torch.Tensor, group: dict[str, Any]) -> dict[str, str | None]:
        """What the states of a parameter hold, by their keys: see `state_kinds` of the rule."""
        rule = self.rule_of(group)
        names = zip(self.names_of_states(rule, param), rule.state_names, strict=True)
        return {key: rule.state_kinds.get(name) for key, name in names}

    def format_of(self, param: torch.Tensor, group: dict[str, Any]) -> Format:
        """How the parameter is stored. ValueError if its group wants a master that does not go with its dtype."""
        if not (group["multi_precision"] and group["master"] is not None and is_low_precision(param.dtype)):
            return PLAIN
        fmt = MASTERS[group["master"]]
        if param.dtype not in fmt.weight_dtypes:
            raise ValueError(
                f"master={group['master']!r} completes bfloat16 parameters, not {param.dtype}: take master='fp32' or "
                "'kahan' for their param_group"
            )
        if fmt.draws and not all(isinstance(phase, Apply) for phase in self.rule_of(group).phases):
            raise ValueError(
                f"master={group['master']!r} is not for {type(self).__name__}, whose kernels draw no random bits: take "
                "'fp32', 'split16' or 'kahan'"
            )
        return fmt

    def states_of(self, param: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The planes of a parameter's states, in the rule's order."""
        formats = self.state_formats_of(param, group)
        return tuple(state[key] for name, fmt in formats.items() for key in keys_of(name, fmt))

    def sparse_error_of(self, group: dict[str, Any]) -> str | None:
        """`sparse_error`, where it depends on the group."""
        return self.sparse_error

    def before_new_states(self, state: dict[str, Any]) -> None:
        """A parameter that has this state is about to get tensors that it lacks."""

    def complete_loaded_state(self, state: dict[str, Any]) -> None:
        """Add what a checkpoint of torch's class does not hold."""

    def rule_of(self, group: dict[str, Any]) -> Rule:
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


def _plain(value: Any) -> Any:
    """Hashable, and without tensors: a hyperparameter as the rule takes it."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
