"""Optimizer: learning rate, decay, multipliers, update counts, rescale, clip, master weights, step or fused step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import promote_types as promote

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.launcher import Updates
from tritopt.engine.phase import Launch, Phase
from tritopt.engine.plan import Planner, Task, compute_dtype, is_low_precision, unavailable
from tritopt.engine.random import STEPS, Noise, noise_key
from tritopt.engine.state_dtype import FP32, Choice, checked, format_of_planes, formats_of, stored
from tritopt.engine.telemetry import Telemetry, Tracked, Tracker, check_asked, measure, refuse, telemetry, whole
from tritopt.engine.warning import warn
from tritopt.kernels.formats.states import SIGNED, SQUARES
from tritopt.kernels.formats.weights import MASTER_FP32, MASTERS, PLAIN, Format
from tritopt.kernels.preambles import PREAMBLES
from tritopt.mxnet import registry
from tritopt.mxnet.settings import check_settings, parameters_of
from tritopt.mxnet.sparse import StandIn

if TYPE_CHECKING:
    from tritopt.lr_scheduler import LRScheduler

State: TypeAlias = Any  # None, a tensor or a tuple; under multi_precision (companion of the weight, one of these)
Values: TypeAlias = tuple[torch.Tensor, ...]
Stored: TypeAlias = Callable[[Values], Values]
Encode: TypeAlias = Callable[[Format, Sequence[torch.Tensor], torch.Tensor, Any], None]


class Optimizer:
    """Base of all optimizers: the API of `mxnet.optimizer.Optimizer` 2.0 for PyTorch tensors.

    The gradient that an update sees is ``g = clip(rescale_grad * grad, +-clip_gradient)``, plus ``wd * weight`` where
    the `preamble` is "coupled". Gradients are never written to.

    A new optimizer declares `phases`, `state_names`, `preamble`, and defines `scalars` and `reference`; one that is
    ported from MXNet may instead override `create_state` and `step` (and `fused_step`) with MXNet's list signatures.

    Args:
        rescale_grad: multiplies every gradient (torch's `grad_scale` divides). A number, or a 0-d tensor on the
            weights' device. NaN or Inf skips the update: weights and states stay, counts advance.
        param_idx2name: names by index, for multipliers by name.
        wd: weight decay, a factor of the weight per unit of learning rate.
        clip_gradient: bound on each *element* of the rescaled gradient (not on a norm). None or <= 0: off.
        learning_rate: per update. None: the scheduler's own base, or 0.01 without a scheduler.
        lr_scheduler: called with `num_update`; `learning_rate`, if given, becomes its `base_lr`.
        sym: anything with MXNet's `attr_dict()` and `list_arguments()`; its `__lr_mult__`/`__wd_mult__` are read.
        begin_num_update: count that every parameter starts from.
        multi_precision: keep a master and fp32 states for fp16 and bf16 weights.
        master: how it is kept. "fp32": a copy. "split16": 16 bits that complete a bf16 weight to exactly the fp32
            master, for the same trajectory; such a weight is the master rounded to nearest, away from zero at a tie.
            "split8": 8 bits in their place, rounded stochastically. "kahan": what the weight lacks, in its dtype;
            updates below 2^-17 of a bf16 weight can be lost. "stochastic": nothing beside a bf16 weight, which is
            rounded stochastically. None: as without multi_precision. An optimizer that overrides `step` sees fp32
            masters, so it takes "fp32" or None.
        state_dtype: how states are stored: "fp32", "bf16", "fp16", "int8", "fp8" (torch's dtypes do as well), or a dict
            of these by name of the state, the others fp32. All but fp32 round stochastically; the last three share a
            scale among 64 neighbours in memory (kernels/formats/states.py). A state that would not bear it stays fp32:
            see `state_kinds`. None: the (master) weight's dtype.
        rounding_seed: of the bits of stochastic rounding, which are a function of it, the index, the count and the
            element.
        track: sum up in each step, from registers, what `telemetry` shows.
        param_dict: objects by index, such as `nn.Parameter`, whose `lr_mult`/`wd_mult` attributes are read live.
        aggregate_num: tensors per call that an Updater makes. None: all at once.
        use_fused_step: True: fused or an error. False: the reference `step`. None: fused where it can run.
        lazy_update: with a row-sparse gradient, update only the rows present; for optimizers that support it.

    Raises:
        ValueError: a hyperparameter out of its range. TypeError: one of the wrong type, or an unknown keyword.
    """

    opt_registry: ClassVar[dict[str, type[Optimizer]]] = registry.OPTIMIZERS
    register = staticmethod(registry.register)
    create_optimizer = staticmethod(registry.create)

    clips: ClassVar[bool] = True
    """Whether `clip_gradient` applies."""
    decays: ClassVar[bool] = True
    """Whether `wd` applies; False: the optimizer refuses any but 0."""
    supports_lazy_update: ClassVar[bool] = False
    skips_zero_rescale: ClassVar[bool] = False
    """Whether rescale_grad = 0 skips the update as NaN and Inf do."""
    skips_zero_lr: ClassVar[bool] = False
    """Whether a learning rate of 0 leaves weight and states alone, because the formula divides by it."""
    least_state_dtype: ClassVar[torch.dtype | None] = None
    """None: states have the (master) weight's dtype. float32: at least that."""
    rereads_states: ClassVar[bool] = False
    """Whether a later launch reads the new states again, as they are stored. `reference` then takes `stored`: what the
    states are after they have been."""
    is_per_parameter: ClassVar[bool] = False
    """Whether scalars differ between parameters of equal counts and rates."""
    scalar_states: ClassVar[Mapping[str, float]] = {}
    """Numbers that tritopt.optim keeps per parameter beside the step, and passes to `scalars`: names, first values."""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Constructor arguments that reach every branch of the formula: what the checker and the tests run."""

    def __init__(
        self,
        rescale_grad: float | torch.Tensor = 1.0,
        param_idx2name: dict[Any, str] | None = None,
        wd: float = 0.0,
        clip_gradient: float | None = None,
        learning_rate: float | None = None,
        lr_scheduler: LRScheduler | None = None,
        sym: Any = None,
        begin_num_update: int = 0,
        multi_precision: bool = False,
        master: str | None = "fp32",
        state_dtype: Any = None,
        rounding_seed: int = 0,
        track: bool = False,
        param_dict: Mapping[Any, Any] | None = None,
        aggregate_num: float | None = None,
        use_fused_step: bool | None = None,
        lazy_update: bool = False,
        **unknown: Any,
    ) -> None:
        if lazy_update and not self.supports_lazy_update:
            unknown["lazy_update"] = lazy_update
        if unknown:
            raise TypeError(_unknown_keywords(type(self), unknown))
        if lazy_update and use_fused_step is False:
            raise ValueError("lazy_update=True needs a fused step: drop use_fused_step=False")
        validate.rescale(rescale_grad)
        if param_dict is not None and not isinstance(param_dict, Mapping):
            raise TypeError(f"param_dict={param_dict!r} must be a dict of parameters by index")
        if lr_scheduler is not None and not callable(lr_scheduler):
            raise TypeError(f"lr_scheduler={lr_scheduler!r} must be an LRScheduler, or any callable with a base_lr")
        if param_idx2name is not None and not isinstance(param_idx2name, dict):
            raise TypeError(f"param_idx2name={param_idx2name!r} must be a dict of names by index")
        self.rescale_grad = rescale_grad
        self.clip_gradient = validate.positive_or_none("clip_gradient", clip_gradient)
        self.wd = validate.finite("wd", wd)
        self.lr_scheduler = lr_scheduler
        self.lr = _initial_lr(learning_rate, lr_scheduler)
        self.begin_num_update = validate.count("begin_num_update", begin_num_update)
        self.num_update = self.begin_num_update
        self._all_index_update_counts: dict[Hashable, dict[Hashable, int]] = {0: {}}
        self._index_update_count = self._all_index_update_counts[0]
        self.multi_precision = validate.boolean("multi_precision", multi_precision)
        self.master = _checked_master(type(self), master, self._overrides_step(), lazy_update)
        self.state_dtype = _checked_state_dtype(type(self), state_dtype, self._overrides_step(), lazy_update)
        self.rounding_seed = validate.count("rounding_seed", rounding_seed)
        self.track = validate.boolean("track", track)
        self._tracker = Tracker()
        self._sizes: dict[Hashable, int] = {}
        self.aggregate_num = (
            math.inf if aggregate_num is None else validate.nonnegative_count("aggregate_num", aggregate_num)
        )
        self.use_fused_step = None if use_fused_step is None else validate.boolean("use_fused_step", use_fused_step)
        self.lazy_update = validate.boolean("lazy_update", lazy_update)
        self.idx2name = dict(param_idx2name or {})
        self.param_dict: Mapping[Any, Any] = param_dict or {}
        self.sym_info = () if sym is None else (sym.attr_dict(), sym.list_arguments())
        self.lr_mult: dict[Any, float] = {}
        self.wd_mult: dict[Any, float] = {}
        self.set_lr_mult({})
        self.set_wd_mult({})
        self._planner = Planner()
        self._known_scalars: dict[tuple[float, float, int], tuple[float, ...]] = {}
        self._checked: tuple[Any, ...] = ()
        """Values of attributes that `check_settings` has found right."""

    # What an optimizer defines.

    @property
    def preamble(self) -> str:
        """What is done to the gradient first, a key of kernels/preambles.py.

        "coupled": clip(rescale g) + wd w. "decoupled": clip(rescale g), and wd is left to the update.
        """
        return "coupled"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The launches of a fused step, in order."""
        return ()

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors, in the order of `create_state`."""
        return ()

    @property
    def state_kinds(self) -> Mapping[str, str | None]:
        """What may be stored in fewer bits, by name: SIGNED or SQUARES of kernels/formats/states.py.

        A state that is not here stays as it is: a number per row or column, which takes no memory; a largest value so
        far, which rounding would only raise; and what the weight itself is computed from.
        """
        return {"mean": SIGNED, "momentum": SIGNED, "momentum_buffer": SIGNED, "mom": SIGNED, "var": SQUARES}

    def scalars(self, lr: float, wd: float, count: int) -> tuple[float, ...]:
        """The NamedTuple that `reference` and the kernel read, computed in double.

        lr, wd: of this parameter at this step, multipliers included. count: its updates, this one included.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no scalars()")

    def scalars_at(self, index: Hashable, lr: Any, wd: float, count: Any, *numbers: Any) -> tuple[Any, ...]:
        """`scalars` of a parameter, where lr, count and its `scalar_states` may be fp64 tensors on the device."""
        return self.scalars(lr, wd, count, *numbers)

    def scalars_of(self, index: Hashable, lr: float, wd: float, count: int) -> tuple[float, ...]:
        """`scalars`, for an optimizer whose parameters differ in more than these; computed once for equal arguments."""
        key = (lr, wd, count)
        if key not in self._known_scalars:
            self._known_scalars[key] = self.scalars(*key)
        return self._known_scalars[key]

    def factors(self, name: str, counts: torch.Tensor) -> torch.Tensor:
        """What the scalar state `name` of parameters is multiplied by at these counts, fp64 [parameters]."""
        raise NotImplementedError(f"{type(self).__name__} defines no factors() of {name}")

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: Any) -> tuple[torch.Tensor, Values]:
        """One parameter's update in PyTorch: the new weight and states. What this says is right."""
        raise NotImplementedError(f"{type(self).__name__} defines no reference()")

    # Learning rate and multipliers.

    @property
    def learning_rate(self) -> float:
        """The learning rate before multipliers, per update; asks the scheduler if there is one."""
        return self.lr if self.lr_scheduler is None else self.lr_scheduler(self.num_update)

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate. Raises UserWarning, as MXNet does, if a scheduler decides it."""
        if self.lr_scheduler is not None:
            raise UserWarning(f"learning_rate={lr} has no effect beside an lr_scheduler; set lr_scheduler.base_lr")
        self.lr = validate.nonnegative("learning_rate", lr)

    def set_lr_mult(self, args_lr_mult: Mapping[Any, float]) -> None:
        """Replace the multipliers of the learning rate, by index or name."""
        self.lr_mult = {**self._symbol_multipliers("__lr_mult__"), **args_lr_mult}

    def set_wd_mult(self, args_wd_mult: Mapping[Any, float]) -> None:
        """Replace the multipliers of the weight decay, by index or name."""
        self.wd_mult = {**self._symbol_multipliers("__wd_mult__"), **args_wd_mult}

    def _symbol_multipliers(self, attribute: str) -> dict[str, float]:
        if not self.sym_info:
            return {}
        attributes, arguments = self.sym_info
        return {name: float(attributes[name][attribute]) for name in arguments if attribute in attributes.get(name, {})}

    def _multiplied(self, value: float, indices: Sequence[Hashable], kind: str) -> list[float]:
        multipliers: dict[Any, float] = getattr(self, kind)
        if not (self.param_dict or multipliers):
            return [value] * len(indices)
        products = [value * self._multiplier(index, kind, multipliers) for index in indices]
        if not all(map(math.isfinite, products)):
            index, product = next((i, p) for i, p in zip(indices, products, strict=True) if not math.isfinite(p))
            raise ValueError(f"parameter {index!r}: {kind} makes {value!r} into {product!r}; give a finite multiplier")
        return products

    def _multiplier(self, index: Hashable, kind: str, multipliers: Mapping[Any, float]) -> float:
        carried = getattr(self.param_dict.get(index), kind, None)  # an nn.Parameter may carry none
        if carried is not None:
            return float(carried)
        if index in multipliers:
            return multipliers[index]
        return multipliers.get(self.idx2name.get(index), 1.0)

    def _get_lrs(self, indices: Sequence[Hashable]) -> list[float]:
        """Learning rates of the parameters: one evaluation of the schedule, times their multipliers."""
        lr = self.learning_rate
        source = "" if self.lr_scheduler is None else f" from {self.lr_scheduler!r} at num_update={self.num_update}"
        validate.nonnegative(f"learning rate{source}", lr)
        return self._multiplied(lr, indices, "lr_mult")

    def _get_lr(self, index: Hashable) -> float:
        return self._get_lrs([index])[0]

    def _get_wds(self, indices: Sequence[Hashable]) -> list[float]:
        """Weight decays of the parameters, multipliers included."""
        validate.finite("wd", self.wd)
        return self._multiplied(self.wd, indices, "wd_mult")

    def _get_wd(self, index: Hashable) -> float:
        return self._get_wds([index])[0]

    # Update counts.

    def _set_current_device(self, device_id: Hashable) -> None:
        """Select the counts of a device; `num_update` is shared by all."""
        self._index_update_count = self._all_index_update_counts.setdefault(device_id, {})

    def _set_current_context(self, device_id: Hashable) -> None:
        warn("_set_current_context is now _set_current_device", DeprecationWarning)
        self._set_current_device(device_id)

    def _update_count(self, index: Hashable | list[Hashable] | tuple[Hashable, ...]) -> None:
        """Count one update of each index; one that is new starts from begin_num_update."""
        counts = self._index_update_count
        for i in index if isinstance(index, list | tuple) else (index,):
            counts[i] = counts.get(i, self.begin_num_update) + 1
            self.num_update = max(self.num_update, counts[i])

    # States.

    def state_shapes(self, shape: torch.Size) -> Sequence[tuple[int, ...]]:
        """Shapes of the states of a weight of this shape: the weight's, unless the optimizer says otherwise."""
        return [shape] * len(self.state_names)

    def create_state(self, index: Hashable, weight: torch.Tensor) -> State:
        """Fresh state for a weight: zeros, laid out like it. None, a tensor, or a tuple if there are several."""
        dtype = weight.dtype if self.least_state_dtype is None else promote(self.least_state_dtype, weight.dtype)
        zeros = tuple(
            torch.zeros_like(weight, dtype=dtype, requires_grad=False)
            if shape == weight.shape
            else torch.zeros(shape, dtype=dtype, device=weight.device)
            for shape in self.state_shapes(weight.shape)
        )
        return zeros if len(zeros) > 1 else next(iter(zeros), None)

    def create_state_multi_precision(self, index: Hashable, weight: torch.Tensor) -> State:
        """`create_state`, or (companion, its state) for an fp16 or bf16 weight under multi_precision.

        The companion is what `master` keeps beside the weight, of its shape: the fp32 master ("fp32"), the int16 or
        int8 remainder ("split16", "split8") or the compensation in the weight's dtype ("kahan"). "stochastic" has none,
        so its state stands alone. States are those of an fp32 weight.

        Raises:
            ValueError: `master` does not go with the weight's dtype, or not with this optimizer.
        """
        check_settings(self, Optimizer)
        fmt = self._format_of(index, weight)
        if fmt is not PLAIN:
            master = weight.detach().to(torch.float32, copy=True)
            inner = self._stored(weight, self.create_state(index, master))
            if fmt.companion_of is None:
                return inner
            return master if fmt is MASTER_FP32 else fmt.companion_of(weight.detach(), master), inner
        if is_low_precision(weight.dtype) and self.master is not None:
            # The same text for every parameter, so that Python shows it once.
            warn(
                f"{type(self).__name__} accumulates in {weight.dtype} and loses small updates; multi_precision=True "
                "keeps an fp32 master"
            )
        if self.state_dtype is None:
            return self.create_state(index, weight.detach())
        return self._stored(weight, self.create_state(index, weight.detach().float()))

    def convert_state(self, index: Hashable, weight: torch.Tensor, state: State) -> State:
        """A state that was saved under another `master` or `state_dtype`, as this optimizer keeps it.

        What needs no conversion is returned as it is. weight: the one that was saved with it. "stochastic" and None
        save no companion, so nothing is made of theirs.
        Where an fp32 master lies at a tie above its weight, it becomes its neighbour towards the weight, in fp32 for
        "split16" and in 24 bits for "split8": a remainder cannot say all of half an ulp.
        """
        fmt = self._format_of(index, weight)
        if fmt is PLAIN or self._has_companion(fmt, weight, state):
            inner = state[1] if fmt.companion else state
            converted = self._stored(weight, inner)
            return state if converted is inner else (state[0], converted) if fmt.companion else converted
        others = [other for other in MASTERS.values() if other.companion and weight.dtype in other.weight_dtypes]
        for other in others:
            if self._has_companion(other, weight, state) and state[0].shape == weight.shape:
                inner = self._stored(weight, state[1])
                if fmt.companion_of is None:
                    return inner
                value = other.decode((weight.detach(), state[0]), torch.float32)
                return fmt.companion_of(weight.detach(), value), inner
        return state

    def state_formats(self) -> tuple[Format, ...]:
        """Of each state. ValueError if `state_dtype` names what is none, or must not be stored so."""
        kinds = self.state_kinds
        return formats_of(checked(self.state_dtype), {name: kinds.get(name) for name in self.state_names})

    def _stored(self, weight: torch.Tensor, inner: State) -> State:
        """States as `state_dtype` has them, and no narrower than without it; the same object if they are."""
        if self._overrides_step():
            return inner
        values = self._values(inner)
        wanted = self.state_formats()
        if len(values) != len(wanted) or not all(map(_is_planes, values)):
            return inner  # the next step says what is wrong
        plain = weight.dtype if self.least_state_dtype is None else promote(self.least_state_dtype, weight.dtype)
        if self.state_dtype is not None or self._format_of(None, weight) is not PLAIN:
            plain = promote(torch.float32, weight.dtype)
        found = []
        for name, value, fmt in zip(self.state_names, values, wanted, strict=True):
            planes = value if isinstance(value, tuple) else (value,)
            old = format_of_planes(planes, self.state_kinds.get(name))
            if fmt is PLAIN and old is PLAIN:
                value = value if value.dtype.itemsize >= plain.itemsize else value.to(plain)
            elif [plane.dtype for plane in planes] != list(fmt.dtypes):
                planes = stored(fmt, old.decode(planes, plain if fmt is PLAIN else torch.float32))
                value = planes if len(planes) > 1 else planes[0]
            found.append(value)
        if all(new is old for new, old in zip(found, values, strict=True)):
            return inner
        return found[0] if len(found) == 1 else tuple(found)

    def _values(self, inner: State) -> list[Any]:
        """The states one by one: tensors, or tuples of codes and scales."""
        values = [value for value in (inner if isinstance(inner, tuple) else (inner,)) if value is not None]
        is_one = len(self.state_names) == 1 and len(values) == 2 and isinstance(values[0], torch.Tensor)
        return [tuple(values)] if is_one else values

    def _format_of(self, index: Hashable, weight: torch.Tensor) -> Format:
        """How the weight is stored. ValueError if `master` does not go with it."""
        if not (self.multi_precision and self.master is not None and is_low_precision(weight.dtype)):
            return PLAIN
        fmt = MASTERS[self.master]
        if weight.dtype not in fmt.weight_dtypes:
            raise ValueError(
                f"parameter {index!r}: master={self.master!r} completes bfloat16 weights, not {weight.dtype}: take "
                "master='fp32' or 'kahan'"
            )
        if fmt.draws and not all(isinstance(phase, Apply) for phase in self.phases):
            raise ValueError(
                f"parameter {index!r}: master={self.master!r} is not for {type(self).__name__}, whose kernels draw no "
                "random bits: take 'fp32', 'split16' or 'kahan'"
            )
        return fmt

    # Updating.

    def update(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update weights and states in place: fused or by `step`, as `use_fused_step` says.

        Lists of equal length, or one of each. A parameter whose gradient is None is left alone and not counted. Shapes
        and devices of a weight, its gradient and its states agree; gradients may have another floating dtype.

        Raises:
            ValueError, TypeError: bad input. Weights, states and counts are then as they were.
        """
        check_settings(self, Optimizer)
        self._dispatch(*_with_gradients(indices, weights, grads, states))

    def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """`update` with states from `create_state_multi_precision`."""
        check_settings(self, Optimizer)
        indices, weights, grads, states = _with_gradients(indices, weights, grads, states)
        masters = self._masters(indices, weights, states)
        if not self._overrides_step():
            return self._dispatch(indices, weights, grads, states)
        # MXNet's way, for optimizers that bring their own step: it sees fp32 masters and fp32 gradients.
        with torch.no_grad():
            for weight, state, m in zip(weights, states, masters, strict=True):
                if m:  # a weight that somebody has written to is no longer the master, rounded, and counts
                    state[0].copy_(MASTER_FP32.decode((weight, state[0]), torch.float32))
            self._dispatch(
                indices,
                [state[0] if m else weight for weight, state, m in zip(weights, states, masters, strict=True)],
                [grad.to(torch.float32) if m else grad for grad, m in zip(grads, masters, strict=True)],
                [state[1] if m else state for state, m in zip(states, masters, strict=True)],
            )
            for weight, state, m in zip(weights, states, masters, strict=True):
                if m:
                    PLAIN.encode((weight,), state[0])
        return None

    def check(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Raise what `update_multi_precision` would raise about these arguments; update and count nothing."""
        check_settings(self, Optimizer)
        indices, weights, grads, states = _with_gradients(indices, weights, grads, states)
        self._masters(indices, weights, states)
        self._multiplied(1.0, indices, "lr_mult")
        self._get_wds(indices)
        if not self._overrides_step():
            self._tasks(indices, weights, grads, states, self.use_fused_step)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """The reference: each parameter in turn, in PyTorch operations."""
        self._run(*_with_gradients(indices, weights, grads, states), fused=False)

    def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """All parameters in one launch per phase, device and list of dtypes."""
        self._run(*_with_gradients(indices, weights, grads, states), fused=True)

    def _masters(
        self, indices: Sequence[Hashable], weights: Sequence[torch.Tensor], states: Sequence[State]
    ) -> list[bool]:
        """Which weights have a companion; ValueError for a state without the one that it must have."""
        formats = [self._format_of(*item) for item in zip(indices, weights, strict=True)]
        for index, weight, state, fmt in zip(indices, weights, states, formats, strict=True):
            if fmt.companion and not self._has_companion(fmt, weight, state):
                dtype = str(fmt.dtype_of_companion(weight.dtype)).removeprefix("torch.")
                raise ValueError(
                    f"parameter {index!r}: multi_precision with master={self.master!r} needs a state ({dtype} "
                    f"{_COMPANIONS[fmt.name]}, state), got {_structure(state)}; create it with "
                    "create_state_multi_precision(index, weight), or bring one of another master with "
                    "convert_state(index, weight, state)"
                )
        return [bool(fmt.companion) for fmt in formats]

    def _has_companion(self, fmt: Format, weight: torch.Tensor, state: State) -> bool:
        """Whether this is (companion, state) of this format by its structure, and not a plain pair of states."""
        if not (fmt.companion and isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], torch.Tensor)):
            return False
        is_pair_of_states = len(self.state_names) > 1 and isinstance(state[1], torch.Tensor)
        is_companion = state[0].dtype == fmt.dtype_of_companion(weight.dtype)
        return is_companion and (self._overrides_step() or not is_pair_of_states)

    def _overrides_step(self) -> bool:
        return type(self).step is not Optimizer.step or type(self).fused_step is not Optimizer.fused_step

    def _dispatch(self, indices: list[Any], weights: list[Any], grads: list[Any], states: list[Any]) -> None:
        if not self._overrides_step():
            return self._run(indices, weights, grads, states, fused=self.use_fused_step)
        has_kernel = type(self).fused_step is not Optimizer.fused_step
        fused = has_kernel if self.use_fused_step is None else self.use_fused_step
        with torch.no_grad(), self._counts_restored_on_error():
            return (self.fused_step if fused else self.step)(indices, weights, grads, states)

    @contextmanager
    def _counts_restored_on_error(self) -> Iterator[Updates[Hashable]]:
        """Counts as they were, but for those of indices that were updated."""
        num_update, counts = self.num_update, dict(self._index_update_count)
        updates: Updates[Hashable] = Updates()
        try:
            yield updates
        except BaseException:
            updated = {index: self._index_update_count[index] for index in updates.written()}
            counts.update(updated)
            self.num_update = max([num_update, *updated.values()])
            self._index_update_count.clear()
            self._index_update_count.update(counts)
            self._planner.forget()
            raise

    @torch.no_grad()
    def _run(
        self,
        indices: Sequence[Hashable],
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        fused: bool | None,
    ) -> None:
        tasks, on_kernel = self._tasks(indices, weights, grads, states, fused)
        sparse = {
            i: StandIn(indices[i], task, self.lazy_update, on_kernel[i])
            for i, task in enumerate(tasks)
            if task.grad.layout != torch.strided
        }
        tasks = [sparse[i].task if i in sparse else task for i, task in enumerate(tasks)]
        with self._counts_restored_on_error() as updates:
            self._update_count(list(indices))
            self._apply(indices, tasks, on_kernel, updates)
        for stand_in in sparse.values():
            stand_in.write_back()

    def _tasks(
        self,
        indices: Sequence[Hashable],
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        fused: bool | None,
    ) -> tuple[list[Task], list[bool]]:
        """The parameters' tensors, checked, and for each whether it runs on the kernel."""
        validate.rescale(self.rescale_grad)
        tasks = [self._task(*item) for item in zip(indices, weights, grads, states, strict=True)]
        on_kernel = [self._runs_fused(index, weight, fused) for index, weight in zip(indices, weights, strict=True)]
        if self.track and any(on_kernel) and not all(isinstance(phase, Apply) for phase in self.phases):
            refuse(type(self).__name__, "use_fused_step=False")
        self._planner.check_aliases(tuple(indices), indices, tasks)
        return tasks, on_kernel

    def _runs_fused(self, index: Hashable, weight: torch.Tensor, wanted: bool | None) -> bool:
        if wanted is False:
            return False
        reason = (
            unavailable(weight, "pass use_fused_step=False to run the reference step")
            if self.phases
            else f"{type(self).__name__} has no kernel; pass use_fused_step=False"
        )
        if reason and wanted:
            raise ValueError(f"parameter {index!r}, use_fused_step=True: {reason}")
        return reason is None

    def _task(self, index: Hashable, weight: torch.Tensor, grad: torch.Tensor, state: State) -> Task:
        """The parameter's tensors, checked."""
        n_states = len(self.state_names)
        planes: Values = (weight.detach(),)
        fmt, inner = self._format_of(index, weight), state
        if self._has_companion(fmt, weight, state):
            planes, inner = (*planes, state[0].detach()), state[1]
        elif fmt.companion:
            fmt = PLAIN  # a state of `create_state`, which `update` takes
        values, wanted = self._values(inner), self.state_formats()
        is_right = len(values) == n_states and all(map(_is_planes, values))
        if not is_right or any(isinstance(v, tuple) and not f.block for v, f in zip(values, wanted, strict=True)):
            raise ValueError(
                f"parameter {index!r}: {type(self).__name__} keeps states ({', '.join(self.state_names)}) per weight, "
                f"got {_structure(state)}; create them with create_state_multi_precision(index, weight), or bring "
                "those of another state_dtype with convert_state(index, weight, state)"
            )
        for plane in planes[1:]:
            validate.state_tensor(index, plane, weight, weight.shape, fmt.dtype_of_companion(weight.dtype))
        formats: list[Format] = []
        flat: list[torch.Tensor] = []
        for value, stored_as, shape in zip(values, wanted, self.state_shapes(weight.shape), strict=True):
            of_state = value if isinstance(value, tuple) else (value,)
            is_plain = stored_as is PLAIN or (len(of_state) == 1 and value.dtype == torch.float32)
            formats.append(PLAIN if is_plain else stored_as)
            validate.state_planes(index, of_state, weight, shape, formats[-1])
            flat.extend(of_state)
        task = Task(planes, fmt, grad.detach(), tuple(flat), state_formats=tuple(formats))
        return task._replace(noise=(noise_key(self.rounding_seed, index), 0, 0, 0)) if task.draws else task

    def _apply(
        self, indices: Sequence[Hashable], tasks: Sequence[Task], on_kernel: Sequence[bool], updates: Updates[Hashable]
    ) -> None:
        """One update of each task, whose counts have been advanced, all of them first. `updates` is told of each."""
        lrs, wds = self._get_lrs(indices), self._get_wds(indices)
        counts = [self._index_update_count[index] for index in indices]
        self._known_scalars = {}  # of this step alone: hyperparameters may be assigned between steps
        scalars = [self.scalars_of(*item) for item in zip(indices, lrs, wds, counts, strict=True)]
        rescale, device_rescale = self._rescale()
        if self.track:
            self._sizes.update((index, task.grad.numel()) for index, task in zip(indices, tasks, strict=True))
        if not math.isfinite(rescale) or (rescale == 0 and self.skips_zero_rescale):
            if self.track:
                self._tracker.add(indices, [whole(i, measure(task.grad)) for i, task in enumerate(tasks)])
            return
        bound = validate.bound_or(self.clip_gradient, math.inf) if self.clips else math.inf
        live = [i for i, lr in enumerate(lrs) if not (lr == 0 and self.skips_zero_lr)]
        by_launch: dict[tuple[bool, torch.device], list[int]] = {}
        for i in live:
            if on_kernel[i]:
                by_launch.setdefault((tasks[i].draws, tasks[i].grad.device), []).append(i)
        for (draws, device), kernel in by_launch.items():
            launch = Launch(
                self.phases,
                type(scalars[0]),
                self.preamble,
                None if device_rescale is None else device_rescale.to(device),
                skip_zero_rescale=self.skips_zero_rescale,
                draws=draws,
                tracked=[] if self.track else None,
            )
            steps = [(float(counts[i] % STEPS),) if draws else () for i in kernel]
            launched = [indices[i] for i in kernel]
            updates.begin(launched)
            self._planner.apply(
                tuple(launched),
                [tasks[i] for i in kernel],
                [(rescale, bound, wds[i], *scalars[i], *step) for i, step in zip(kernel, steps, strict=True)],
                launch,
            )
            if launch.tracked is not None:
                self._tracker.add(launched, launch.tracked)
        for i in live:
            if not on_kernel[i]:
                noise = Noise(*tasks[i].noise, counts[i] % STEPS) if tasks[i].draws else None
                tracked: list[Tracked] | None = [] if self.track else None
                common = (rescale, bound, wds[i])
                updates.begin([indices[i]], tasks[i].versions)
                self.apply_reference(tasks[i], common, scalars[i], device_rescale, noise=noise, tracked=tracked)
                if tracked is not None:
                    self._tracker.add([indices[i]], tracked)

    def telemetry(self) -> Telemetry:
        """A row for each parameter, by index, of its last step: norms, share of weights that stayed, and so on.

        Waits for the device. Empty before the first step.

        Raises:
            ValueError: constructed without `track=True`.
        """
        check_asked(self.track, type(self).__name__)
        indices = list(self._sizes)
        return telemetry(indices, list(self._sizes.values()), self._tracker.sums(indices))

    def _rescale(self) -> tuple[float, torch.Tensor | None]:
        """rescale_grad as a number, and as a device scalar if it lives on a GPU (then the number is 1)."""
        value = self.rescale_grad
        on_device = isinstance(value, torch.Tensor) and value.device.type != "cpu"
        return (1.0, value) if on_device else (float(value), None)  # type: ignore[return-value]

    def apply_reference(
        self,
        task: Task,
        common: tuple[float, ...],
        s: tuple[float, ...],
        device_rescale: torch.Tensor | None,
        encode: Encode = lambda fmt, planes, value, noise: fmt.encode(planes, value, noise),
        noise: Noise | None = None,
        tracked: list[Tracked] | None = None,
        place: int = 0,
    ) -> None:
        """Update one task in PyTorch. `common`: rescale, clip bound, wd.

        `device_rescale` multiplies the first. NaN skips. `encode` stores a result in the planes of a format.
        `noise`: of the random bits that formats take. `tracked` gets what telemetry is made of, for this `place`.
        """
        rescale, bound, wd = common
        is_skipped = math.isnan(rescale)
        if device_rescale is not None:
            rescale *= float(device_rescale)
            is_skipped |= not math.isfinite(rescale) or (rescale == 0 and self.skips_zero_rescale)
        if is_skipped:
            if tracked is not None:
                tracked.append(whole(place, measure(task.grad)))
            return
        dtype = compute_dtype(task.weight[0])
        w = task.format.decode([plane.resolve_neg() for plane in task.weight], dtype)
        bound = bound if bound <= torch.finfo(dtype).max else math.inf
        g = PREAMBLES[self.preamble].reference(w, task.grad.to(dtype), rescale, bound, wd)
        if noise is not None:
            # A kernel that reads offsets runs on tensors that lie in the usual order.
            noise = noise._replace(row_major=any(isinstance(p, Apply) and p.reads_offsets for p in self.phases))
        states, formats = task.states(), task.formats

        def load() -> Values:
            return tuple(fmt.decode(planes, dtype) for planes, fmt in zip(states, formats[1:], strict=True))

        def store(values: Values) -> None:
            for i, (planes, value) in enumerate(zip(states, values, strict=True), start=1):
                encode(formats[i], planes, value, noise and noise._replace(shift=i))

        def stored(values: Values) -> Values:
            store(values)
            return load()

        again = {"stored": stored} if self.rereads_states and task.state_formats else {}
        new_weight, new_state = self.reference(w, g, load(), s, **again)
        store(new_state)
        before = None if tracked is None else (w.clone(), task.weight[0].clone())
        # Last: a new state may be the old weight itself.
        encode(task.format, task.weight, new_weight, noise)
        if before is not None and tracked is not None:
            tracked.append(whole(place, measure(task.grad, (before[0], new_weight), (before[1], task.weight[0]))))

    # Pickling.

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but param_dict, whose objects belong to the model."""
        return {name: value for name, value in self.__dict__.items() if name != "param_dict"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.param_dict = {}


_COMPANIONS = {
    "fp32 master": "master weight",
    "split16": "remainder of the weight",
    "split8": "remainder of the weight",
    "kahan": "compensation of the weight",
}


def _checked_master(cls: type, master: Any, overrides_step: bool, lazy_update: bool) -> str | None:
    if master is None:
        return None
    if not isinstance(master, str) or master not in MASTERS:
        raise ValueError(f"master={master!r} must be one of {', '.join(map(repr, MASTERS))}, or None")
    if master != "fp32" and overrides_step:
        raise ValueError(
            f"master={master!r} is not for {cls.__name__}, which overrides step and sees fp32 masters: take "
            "master='fp32', or define scalars() and reference() in place of step()"
        )
    if MASTERS[master].draws and lazy_update:
        raise ValueError(
            f"lazy_update=True draws no random bits, which master={master!r} needs: take 'fp32', 'split16' or 'kahan'"
        )
    return master


def _checked_state_dtype(cls: type, state_dtype: Any, overrides_step: bool, lazy_update: bool) -> Choice:
    choice = checked(state_dtype)
    if choice is not None and overrides_step:
        raise ValueError(
            f"state_dtype={state_dtype!r} is not for {cls.__name__}, which overrides step and sees its states as they "
            "are: leave it out, or define scalars() and reference() in place of step()"
        )
    if choice not in (None, FP32) and lazy_update:
        raise ValueError(
            f"lazy_update=True draws no random bits and touches parts of blocks, so state_dtype={state_dtype!r} does "
            "not go with it: take state_dtype='fp32'"
        )
    return choice


def _is_planes(value: Any) -> bool:
    """Whether it is a tensor, or codes and scales."""
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(plane, torch.Tensor) for plane in value)
    return isinstance(value, torch.Tensor)


def _initial_lr(learning_rate: float | None, lr_scheduler: LRScheduler | None) -> Any:
    if learning_rate is not None:
        learning_rate = validate.nonnegative("learning_rate", learning_rate)
    if lr_scheduler is None:
        return 0.01 if learning_rate is None else learning_rate
    if learning_rate is not None and getattr(lr_scheduler, "base_lr", learning_rate) != learning_rate:
        warn(
            f"learning_rate={learning_rate} replaces base_lr={lr_scheduler.base_lr} of {type(lr_scheduler).__name__}; "
            "pass learning_rate=None to keep the schedule's own base"
        )
        lr_scheduler.base_lr = learning_rate
    return learning_rate


def _unknown_keywords(cls: type[Optimizer], unknown: Iterable[str]) -> str:
    names = {name for base in cls.__mro__[:-1] for name in parameters_of(vars(base).get("__init__"))}
    known = sorted(names if cls.supports_lazy_update else names - {"lazy_update"})
    found = [f"{name!r}{registry.did_you_mean(name, known)}" for name in unknown]
    return f"{cls.__name__}() has no argument {' '.join(found)} known: {', '.join(known)}"


def _with_gradients(
    indices: Any, weights: Any, grads: Any, states: Any
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The four lists without the parameters whose gradient is None; a single parameter becomes lists of one."""
    if not isinstance(indices, list | tuple):
        indices, weights, grads, states = [indices], [weights], [grads], [states]
    validate.same_length(indices=indices, weights=weights, gradients=grads, states=states)
    keep = [i for i, grad in enumerate(grads) if grad is not None]
    kept = [[items[i] for i in keep] for items in (indices, weights, grads, states)]
    for index, weight, grad in zip(*kept[:3], strict=True):
        validate.weight_and_grad(index, weight, grad)
    return kept[0], kept[1], kept[2], kept[3]


def _structure(state: Any) -> str:
    if isinstance(state, torch.Tensor):
        return f"a {str(state.dtype).removeprefix('torch.')} tensor of shape {tuple(state.shape)}"
    if isinstance(state, tuple | list):
        return f"a {type(state).__name__} of [{', '.join(map(_structure, state))}]"
    return repr(state)
