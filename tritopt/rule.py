"""Rule: what an optimizer computes, for both faces: hyperparameters, scalars, states, launches, and the reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch

from tritopt.engine import validate
from tritopt.engine.arrays import arrays_of
from tritopt.engine.driver import Apply
from tritopt.engine.phase import Phase
from tritopt.engine.plan import Task, compute_dtype
from tritopt.engine.telemetry import Tracked, whole
from tritopt.engine.walk import walk
from tritopt.kernels.formats.format import Format
from tritopt.kernels.formats.states import SIGNED, SQUARES
from tritopt.kernels.preambles import PREAMBLES
from tritopt.kernels.telemetry import measure
from tritopt.kernels.twins.random import Noise

State: TypeAlias = Any  # None, a tensor or a tuple; under multi_precision (companion of the weight, one of these)
Values: TypeAlias = tuple[torch.Tensor, ...]
Stored: TypeAlias = Callable[[Values], Values]
Encode: TypeAlias = Callable[[Format, Sequence[torch.Tensor], torch.Tensor, Any], None]
Reference = TypeVar("Reference", bound=Callable[..., Any])


_KINDS = {"mean": SIGNED, "momentum": SIGNED, "momentum_buffer": SIGNED, "mom": SIGNED, "var": SQUARES}
"""Kinds of states that are called so, where `Rule.state_kinds` does not say."""


class Rule:
    """Mathematics of an optimizer; how a face of the package asks for it is no business of a rule.

    A subclass declares `phases`, `state_names` and `preamble`, and defines `scalars` and `reference`; its constructor
    takes and checks hyperparameters, but for the learning rate and the weight decay, which come with each parameter.

    Args:
        clip_gradient: bound on each element of the rescaled gradient. None or <= 0: off.
        begin_num_update: count that a parameter's first update follows.
    """

    clips: ClassVar[bool] = True
    """Whether `clip_gradient` applies; False: gradients are not clipped."""
    decays: ClassVar[bool] = True
    """Whether `wd` applies; False: the optimizer refuses any but 0."""
    skips_zero_rescale: ClassVar[bool] = False
    """Whether rescale_grad = 0 skips the update as NaN and Inf do."""
    skips_zero_lr: ClassVar[bool] = False
    """Whether a learning rate of 0 leaves weight and states alone, because the formula divides by it."""
    least_state_dtype: ClassVar[torch.dtype | None] = None
    """Narrowest dtype of states, float32 or None; None: states have the (master) weight's dtype."""
    wide_states: ClassVar[tuple[str, ...]] = ()
    """Names of states whose dtype is at least float32, whatever that of the others is."""
    rereads_states: ClassVar[bool] = False
    """Whether a later launch reads the new states again, as they are stored. `reference` then takes `stored`: what the
    states are after they have been."""
    is_per_parameter: ClassVar[bool] = False
    """Whether scalars differ between parameters of equal counts and rates."""
    scalar_states: ClassVar[Mapping[str, float]] = {}
    """Numbers that tritopt.optim keeps per parameter beside the step, and passes to `scalars`: names, first values."""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Constructor arguments that reach every branch of the formula: what the checker and the tests run."""

    def __init__(self, clip_gradient: float | None = None, begin_num_update: int = 0) -> None:
        self.clip_gradient = validate.positive_or_none("clip_gradient", clip_gradient)
        self.begin_num_update = validate.count("begin_num_update", begin_num_update)

    @classmethod
    def check_decay(cls, wd: float, argument: str = "wd") -> None:
        """ValueError for a decay that the formula does not have."""
        if wd != 0 and not cls.decays:
            name, multiplied = cls.__name__.removesuffix("Rule"), " (times wd_mult)" if argument == "wd" else ""
            raise ValueError(f"{name} has no weight decay, got {argument}={wd!r}: set {argument}{multiplied} to 0")

    @property
    def preamble(self) -> str:
        """Treatment of the gradient before the update, a key of kernels/preambles.py.

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
    def product_dtype(self) -> torch.dtype | None:
        """Dtype that matrix products inside the update are rounded to; None: there are none."""
        return None

    @property
    def state_kinds(self) -> Mapping[str, str | None]:
        """Kinds of states by name, by which `state_dtype` stores them: "signed", "squares", or None: as they are.

        A state called mean, momentum, momentum_buffer or mom is signed and one called var holds squares, unless this
        says otherwise. Any other that is not here stays as it is: a number per row or column, which takes no memory; a
        largest value so far, which rounding would only raise; and what the weight itself is computed from.
        """
        return {}

    def kind_of(self, name: str) -> str | None:
        """Kind of a state. ValueError where `state_kinds` has no such kind or state."""
        kinds = self.state_kinds
        for state, kind in kinds.items():
            if state not in self.state_names or kind not in (SIGNED, SQUARES, None):
                raise ValueError(
                    f"{type(self).__name__}.state_kinds says {kind!r} of {state!r}: give names in state_names, "
                    f"{self.state_names!r}, and {SIGNED!r}, {SQUARES!r} or None"
                )
        return kinds.get(name, _KINDS.get(name))

    def scalars(self, lr: float, wd: float, count: int) -> tuple[float, ...]:
        """The NamedTuple that `reference` and the kernel read, computed in double.

        lr, wd: rates of this parameter at this step, multipliers included. count: its updates, this one included.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no scalars()")

    def scalars_at(self, index: Hashable, lr: Any, wd: float, count: Any, *numbers: Any) -> tuple[Any, ...]:
        """`scalars` of a parameter, where lr, count and its `scalar_states` may be fp64 tensors on the device."""
        return self.scalars(lr, wd, count, *numbers)

    def factors(self, name: str, counts: torch.Tensor) -> torch.Tensor:
        """Factors that the scalar state `name` of parameters is multiplied by at these counts, fp64 [parameters]."""
        raise NotImplementedError(f"{type(self).__name__} defines no factors() of {name}")

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: Any) -> tuple[torch.Tensor, Values]:
        """One parameter's update in PyTorch: the new weight and states. What this says is right."""
        if type(self).update_parts is Rule.update_parts:
            raise NotImplementedError(f"{type(self).__name__} defines no reference()")
        return run_parts(self.update_parts(w, g, state, s), self.orthogonalized)

    def state_shapes(self, shape: torch.Size) -> Sequence[tuple[int, ...]]:
        """Shapes of the states of a weight of this shape: the weight's, unless the optimizer says otherwise."""
        return [shape] * len(self.state_names)

    def plain_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of a state that is stored as it is, beside a (master) weight of this dtype."""
        least = torch.float32 if name in self.wide_states else self.least_state_dtype
        return dtype if least is None else torch.promote_types(least, dtype)

    def create_state(self, index: Hashable, weight: torch.Tensor) -> State:
        """Fresh state for a weight: zeros, laid out like it. None, a tensor, or a tuple if there are several."""
        dtypes = [self.plain_dtype(name, weight.dtype) for name in self.state_names]
        zeros = tuple(
            torch.zeros_like(weight, dtype=dtype, requires_grad=False)
            if shape == weight.shape
            else torch.zeros(shape, dtype=dtype, device=weight.device)
            for shape, dtype in zip(self.state_shapes(weight.shape), dtypes, strict=True)
        )
        return zeros if len(zeros) > 1 else next(iter(zeros), None)

    def apply_reference(self, *args: Any, **kwargs: Any) -> None:
        """Update one task in PyTorch. Arguments are those of `applying`."""
        apply_together([(self.applying(*args, **kwargs), None)], self.orthogonalized)

    def orthogonalized(self, values: Sequence[Values]) -> Sequence[Values]:
        """Make of the tensors that each `update_parts` yields those that it goes on with."""
        raise NotImplementedError(f"{type(self).__name__} defines no orthogonalized()")

    def update_parts(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: Any, **again: Any
    ) -> Generator[Values, Values, tuple[torch.Tensor, Values]]:
        """`reference`, which may yield a direction in between, and goes on with what that becomes."""
        return self.reference(w, g, state, s, **again)
        yield (w,)  # never reached: without it this is no generator

    def applying(
        self,
        task: Task,
        common: tuple[float, ...],
        s: tuple[float, ...],
        device_rescale: torch.Tensor | None,
        encode: Encode = lambda fmt, planes, value, noise: fmt.encode(planes, value, noise),
        noise: Noise | None = None,
        tracked: list[Tracked] | None = None,
        place: int = 0,
    ) -> Generator[Values, Values, None]:
        """Update one task in PyTorch, as far as a direction that is to be orthogonalised, and then to the end.

        The direction lies as the weight does. Nothing is written before.

        Args:
            task: the parameter's tensors.
            common: rescale, clip bound (inf: none), weight decay. A rescale that is NaN skips the update.
            s: the rule's scalars.
            device_rescale: multiplies the rescale; None: 1.
            encode: stores a result in the planes of a format.
            noise: source of the random bits that formats draw; None: no format draws.
            tracked: gets what telemetry is made of; None: there is none.
            place: place of the task in `tracked`.
        """
        rescale, bound, wd = common
        rescale = self._total_rescale(rescale, device_rescale)
        if math.isnan(rescale):
            if tracked is not None:
                tracked.append(whole(place, measure(task.grad)))
            return
        dtype = compute_dtype(task.weight[0])
        bound = bound if bound <= torch.finfo(dtype).max else math.inf
        if noise is None and tracked is None and getattr(self.reference, "takes_arrays", False):
            arrays = arrays_of(task)
            if arrays is not None:
                self._update_arrays(task, arrays, (rescale, bound, wd), s)
                return
        w = task.format.decode([_kept(plane) for plane in task.weight], dtype)
        g = PREAMBLES[self.preamble].reference(w, task.grad.to(dtype), rescale, bound, wd)
        if g is task.grad:  # where nothing was done to it: a reference may write to what it is given
            g = g.clone()
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
        new_weight, new_state = yield from self.update_parts(w, g, load(), s, **again)
        self._check_states(new_state, states)
        store(new_state)
        before = None if tracked is None else (w.clone(), task.weight[0].clone())
        # Last: a new state may be the old weight itself.
        encode(task.format, task.weight, new_weight, noise)
        if before is not None and tracked is not None:
            tracked.append(whole(place, measure(task.grad, (before[0], new_weight), (before[1], task.weight[0]))))

    def _check_states(self, new: Any, old: Sequence[Any]) -> None:
        """ValueError unless a reference returned as many states as there are."""
        if not isinstance(new, tuple | list) or len(new) != len(old):
            what = f"{len(new)} states" if isinstance(new, tuple | list) else f"a {type(new).__name__}"
            raise ValueError(
                f"{type(self).__name__}.reference must return the weight and a tuple of {len(old)} states, as "
                f"state_names has them: {self.state_names!r}; got {what}"
            )

    def _total_rescale(self, on_host: float, on_device: torch.Tensor | None) -> float:
        """Factor of the gradient; NaN where the update is skipped."""
        if on_device is None:
            return on_host
        rescale = on_host * float(on_device)
        is_skipped = not math.isfinite(rescale) or (rescale == 0 and self.skips_zero_rescale)
        return math.nan if is_skipped else rescale

    def _update_arrays(
        self, task: Task, arrays: list[np.ndarray[Any, Any]], common: tuple[float, float, float], s: Any
    ) -> None:
        w, g, *state = arrays
        s = s._make(map(float, s))  # a number of NumPy's own would widen the arithmetic
        with np.errstate(all="ignore"):
            g = PREAMBLES[self.preamble].reference(w, g, *common)  # type: ignore[arg-type, assignment]
            new_weight, new_state = self.reference(w, g, tuple(state), s)  # type: ignore[arg-type]
        self._check_states(new_state, state)
        # Before, since an interrupt may come at any moment: autograd and a failed step ask what was written.
        walk().mark_written(list(task.written()))
        for old, new in zip(state, new_state, strict=True):
            old[...] = new
        w[...] = new_weight


def _kept(plane: torch.Tensor) -> torch.Tensor:
    """A plane of the weight; a copy where autograd, as for a norm's derivative, needs it after it was overwritten."""
    plane = plane.resolve_neg()
    return plane.clone() if plane.requires_grad and torch.is_grad_enabled() else plane


def run_parts(
    parts: Generator[Values, Values, tuple[torch.Tensor, Values]],
    orthogonalize: Callable[[Sequence[Values]], Sequence[Values]],
) -> tuple[torch.Tensor, Values]:
    """Run one `Rule.update_parts` to its end: the new weight and states."""
    try:
        parts.send(orthogonalize([next(parts)])[0])
    except StopIteration as end:
        weight_and_states: tuple[torch.Tensor, Values] = end.value
        return weight_and_states
    raise RuntimeError("update_parts yielded more than once")


def apply_together(
    updates: Sequence[tuple[Generator[Values, Values, None], int | None]],
    orthogonalize: Callable[[Sequence[Values]], Sequence[Values]],
) -> None:
    """Run updates to their end, their directions orthogonalised together.

    updates: `Rule.applying` of a task, and None; or of a stack of tasks, and how many they are.
    """
    waiting: list[tuple[Generator[Values, Values, None], int | None]] = []
    directions: list[Values] = []
    for update, n in updates:
        values = next(update, None)
        if values is not None:
            waiting.append((update, n))
            directions += [values] if n is None else zip(*[value.unbind() for value in values], strict=True)
    if not waiting:
        return
    results = iter(orthogonalize(directions))
    for update, n in waiting:
        values = next(results) if n is None else tuple(map(torch.stack, zip(*islice(results, n), strict=True)))
        with contextlib.suppress(StopIteration):
            update.send(values)


def takes_arrays(reference: Reference) -> Reference:
    """Mark a `reference` made of operators and kernels/twins/ops.py alone: it may be given NumPy's arrays."""
    reference.takes_arrays = True  # type: ignore[attr-defined]
    return reference
