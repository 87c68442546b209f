"""Optimizer: the API of MXNet's optimizers: constructor, `update`, `step`, `fused_step`, telemetry, pickling."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from importlib import import_module
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from tritopt.engine import validate
from tritopt.engine.clip import Clip
from tritopt.engine.plan import Planner
from tritopt.engine.telemetry import Telemetry, Tracker, check_asked, telemetry
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.weights import MASTER_FP32
from tritopt.mxnet.constructor import constructor_of, unknown_keywords
from tritopt.mxnet.multipliers import Factors
from tritopt.mxnet.rates import initial_lr
from tritopt.mxnet.replay import Repeated
from tritopt.mxnet.scalars import Partition
from tritopt.mxnet.settings import check_clip, check_kinds, check_settings
from tritopt.mxnet.states import checked_master, checked_state_dtype
from tritopt.mxnet.update import Update
from tritopt.rule import Rule

if TYPE_CHECKING:
    from tritopt.lr_scheduler import LRScheduler

OptimizerClass = TypeVar("OptimizerClass", bound="type[Optimizer]")
MULTI_PRECISION = "update_multi_precision"


class Optimizer(Update):
    """Base of all optimizers: the API of `mxnet.optimizer.Optimizer` 2.0 for PyTorch tensors.

    The gradient that an update sees is ``g = clip(rescale_grad * grad, +-clip_gradient)``, plus ``wd * weight`` where
    the `preamble` is "coupled". Gradients are never written to.

    A new optimizer declares `phases`, `state_names`, `preamble`, and defines `scalars` and `reference` (`Rule`); one
    that is ported from MXNet may instead override `create_state` and `step` (and `fused_step`) with MXNet's list
    signatures. `class Lion(LionRule, Optimizer, learning_rate=1e-4)` gives a rule this API: the constructor takes the
    learning rate, what the rule's takes, and the keywords below.

    Args:
        rescale_grad: multiplies every gradient (torch's `grad_scale` divides). A number, or a 0-d tensor on the
            weights' device. NaN or Inf skips the update: weights and states stay, counts advance.
        param_idx2name: names by index, for multipliers by name.
        wd: weight decay, a factor of the weight per unit of learning rate.
        clip_gradient: bound on each *element* of the rescaled gradient (not on a norm). None or <= 0: off.
        learning_rate: rate per update. None: the scheduler's own base, or 0.01 without a scheduler.
        lr_scheduler: called with `num_update`; `learning_rate`, if given, becomes its `base_lr`.
        sym: anything with MXNet's `attr_dict()` and `list_arguments()`; its `__lr_mult__`/`__wd_mult__` are read.
        begin_num_update: count that every parameter starts from.
        multi_precision: keep a master and fp32 states for fp16 and bf16 weights.
        master: format of the master. "fp32": a copy. "split16": 16 bits that complete a bf16 weight to exactly the fp32
            master, the same from the same gradients; such a weight is the master rounded to nearest, away from zero at
            a tie. "split8": 8 bits in their place, rounded stochastically. "kahan": what the weight lacks, in its
            dtype; updates below 2^-17 of a bf16 weight can be lost. "stochastic": nothing beside a bf16 weight, which
            is rounded stochastically. None: as without multi_precision. An optimizer that overrides `step` sees fp32
            masters, so it takes "fp32" or None.
        state_dtype: format of states: "fp32", "bf16", "fp16", "int8", "fp8" (torch's dtypes do as well), or a dict
            of these by name of the state, the others fp32. All but fp32 round stochastically; the last three share a
            scale among 64 neighbours in memory (kernels/formats/scales.py). A state that would not bear it stays fp32:
            see `state_kinds`. None: the (master) weight's dtype.
        rounding_seed: seed of the bits of stochastic rounding, which are a function of it, the index, the count and
            the element.
        track: sum up in each step, from registers, what `telemetry` shows.
        param_dict: objects by index, such as `nn.Parameter`, whose `lr_mult`/`wd_mult` attributes are read live.
        aggregate_num: tensors per call that an Updater makes. None: all at once.
        use_fused_step: True: fused or an error. False: the reference `step`. None: fused where it can run.
        lazy_update: update only the rows present in a row-sparse gradient; for optimizers that support it.
        max_grad_norm: bound on the norm of all rescaled gradients of an update together, clipped on the device before
            elements are; infinity measures only. A norm that is not finite skips the update, as NaN in rescale_grad,
            and the update counts.

    Raises:
        ValueError: a hyperparameter out of its range. TypeError: one of the wrong type, or an unknown keyword.
    """

    opt_registry: ClassVar[dict[str, type[Optimizer]]] = {}
    """Registered classes by lower-cased class name."""

    supports_lazy_update: ClassVar[bool] = False
    rule: ClassVar[type[Rule]]
    """Rule that is computed; the class itself where it was written as one."""

    def __init_subclass__(cls, learning_rate: float | None = None, **kwargs: Any) -> None:
        """Give a rule this API. learning_rate: the default, where the class's first base is a rule."""
        super().__init_subclass__(**kwargs)
        rule: Any = cls.__bases__[0]
        is_given_api = issubclass(rule, Rule) and not issubclass(rule, Optimizer)
        cls.rule = rule if is_given_api else cls
        if learning_rate is not None and "__init__" not in vars(cls):
            cls.__init__ = constructor_of(cls, rule, learning_rate)  # type: ignore[method-assign]
        if cls.__doc__ is None and is_given_api:
            cls.__doc__ = rule.__doc__

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
        max_grad_norm: float | None = None,
        **unknown: Any,
    ) -> None:
        if lazy_update and not self.supports_lazy_update:
            unknown["lazy_update"] = lazy_update
        if unknown:
            raise TypeError(unknown_keywords(type(self), unknown))
        if lazy_update and use_fused_step is False:
            raise ValueError("lazy_update=True needs a fused step: drop use_fused_step=False")
        check_kinds(rescale_grad, param_dict, lr_scheduler, param_idx2name)
        self.rescale_grad, self.max_grad_norm, self._clip = rescale_grad, max_grad_norm, Clip()
        super().__init__(clip_gradient, begin_num_update)
        self.wd = validate.finite("wd", wd)
        self.check_decay(self.wd)
        self.lr_scheduler = lr_scheduler
        self.lr = initial_lr(learning_rate, lr_scheduler)
        self.num_update = self.begin_num_update
        self._all_index_update_counts: dict[Hashable, dict[Hashable, int]] = {0: {}}
        self._index_update_count = self._all_index_update_counts[0]
        self.multi_precision = validate.boolean("multi_precision", multi_precision)
        self.master = checked_master(type(self), master, self._overrides_step(), lazy_update)
        self.state_dtype = checked_state_dtype(type(self), state_dtype, self._overrides_step(), lazy_update)
        self.rounding_seed = validate.count("rounding_seed", rounding_seed)
        self.track = validate.boolean("track", track)
        self._tracker = Tracker()
        self._sizes: dict[Hashable, int] = {}
        self.aggregate_num = (
            math.inf if aggregate_num is None else validate.nonnegative_count("aggregate_num", aggregate_num)
        )
        check_clip(self)
        self.use_fused_step = None if use_fused_step is None else validate.boolean("use_fused_step", use_fused_step)
        self.lazy_update = validate.boolean("lazy_update", lazy_update)
        self.idx2name = dict(param_idx2name or {})
        self.param_dict: Mapping[Any, Any] = param_dict or {}
        self.sym_info = () if sym is None else (sym.attr_dict(), sym.list_arguments())
        self.lr_mult: dict[Any, float] = {}
        self.wd_mult: dict[Any, float] = {}
        self._factors = {"lr_mult": Factors(), "wd_mult": Factors()}
        self.set_lr_mult({})
        self.set_wd_mult({})
        self._planner, self._partition = Planner(), Partition()
        self._known_scalars: dict[tuple[float, float, int], tuple[float, ...]] = {}
        self._checked: tuple[Any, ...] = ()
        """Values of attributes that `check_settings` has found right."""

    @staticmethod
    def create_optimizer(name: str, **kwargs: Any) -> Optimizer:
        """MXNet's other name of `tritopt.create`."""
        return find(name)(**kwargs)

    @staticmethod
    def register(cls: OptimizerClass) -> OptimizerClass:
        """Class decorator: make `cls` known to `create` under its lower-cased name.

        A name that is taken is given to the new class, with a UserWarning. Raises TypeError for anything but a
        subclass.
        """
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise TypeError(f"register() takes an Optimizer subclass, got {cls!r}")
        name, known = cls.__name__.lower(), Optimizer.opt_registry
        old = known.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            new_name, old_name = (f"{one.__module__}.{one.__qualname__}" for one in (cls, old))
            warn(f"optimizer {name!r}: {new_name} replaces {old_name}")
        known[name] = cls
        return cls

    def _check_settings(self) -> None:
        check_settings(self)

    def _overrides_step(self) -> bool:
        return type(self).step is not Optimizer.step or type(self).fused_step is not Optimizer.fused_step

    def update(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """Update weights and states in place: fused or by `step`, as `use_fused_step` says.

        Lists of equal length, or one of each. A parameter whose gradient is None is left alone and not counted. Shapes
        and devices of a weight, its gradient and its states agree; gradients may have another floating dtype.

        Raises:
            ValueError, TypeError: bad input. Weights, states and counts are then as they were.
        """
        self._check_settings()
        if not self._replayed("update", indices, weights, grads, states):
            self._dispatch(*_with_gradients(indices, weights, grads, states), key="update")

    def update_multi_precision(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        """`update` with states from `create_state_multi_precision`."""
        self._check_settings()
        if self._replayed(MULTI_PRECISION, indices, weights, grads, states):
            return None
        indices, weights, grads, states = _with_gradients(indices, weights, grads, states)
        masters = self._masters(indices, weights, states)
        if not self._overrides_step():
            return self._dispatch(indices, weights, grads, states, key=MULTI_PRECISION)
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
        self._check_settings()
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

    def _dispatch(
        self, indices: list[Any], weights: list[Any], grads: list[Any], states: list[Any], key: str | None = None
    ) -> None:
        if not self._overrides_step():
            return self._run(indices, weights, grads, states, self.use_fused_step, key)
        has_kernel = type(self).fused_step is not Optimizer.fused_step
        fused = has_kernel if self.use_fused_step is None else self.use_fused_step
        with torch.no_grad(), self._counts_restored_on_error():
            return (self.fused_step if fused else self.step)(indices, weights, grads, states)

    def repeats(self, indices: Any, weights: Any, grads: Any, states: Any) -> bool:
        """Whether `update_multi_precision` of these would repeat an earlier update, so that nothing needs a check."""
        return self._repeated(MULTI_PRECISION, indices, weights, grads, states) is not None

    def _replayed(self, key: str, indices: Any, weights: Any, grads: Any, states: Any) -> bool:
        """Whether these lists repeated an earlier update, which then was made."""
        repeated = self._repeated(key, indices, weights, grads, states)
        if repeated is not None:
            self._run_again(repeated)
        return repeated is not None

    def _repeated(self, key: str, indices: Any, weights: Any, grads: Any, states: Any) -> Repeated | None:
        """The earlier update that these lists repeat, without the parameters whose gradient is None."""
        if self._overrides_step() or not isinstance(indices, list | tuple):
            return None
        lists = [indices, weights, grads, states]
        if not all(isinstance(items, list | tuple) and len(items) == len(indices) for items in lists):
            return None
        if NoneType in set(map(type, grads)):
            keep = [i for i, grad in enumerate(grads) if grad is not None]
            lists = [[items[i] for i in keep] for items in lists]
        return self._replay_of(key, *map(list, lists))

    def telemetry(self) -> Telemetry:
        """A row for each parameter, by index, of its last step: norms, share of weights that stayed, and so on.

        Waits for the device. Empty before the first step.

        Raises:
            ValueError: constructed without `track=True`.
        """
        check_asked(self.track, type(self).__name__)
        indices = list(self._sizes)
        return telemetry(indices, list(self._sizes.values()), self._tracker.sums(indices))

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but param_dict, whose objects belong to the model."""
        return {name: value for name, value in self.__dict__.items() if name != "param_dict"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.param_dict = {}


register = Optimizer.register


def registered() -> dict[str, type[Optimizer]]:
    """All optimizers by name, those of the package among them."""
    # By name, since they stand on this module: a script's first import may be one that needs none of them.
    import_module("tritopt.optimizers")
    return Optimizer.opt_registry


def find(name: str) -> type[Optimizer]:
    """The class registered as `name`; ValueError if there is none."""
    if not isinstance(name, str):
        raise TypeError(f"an optimizer is created by its name, a str, got {name!r}")
    known = registered()
    if name.lower() not in known:
        nearest = validate.did_you_mean(name.lower(), sorted(known))
        raise ValueError(f"unknown optimizer {name!r}{nearest} known: {', '.join(sorted(known))}")
    return known[name.lower()]


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
        validate.not_spread(index, weight, grad)
    return kept[0], kept[1], kept[2], kept[3]
