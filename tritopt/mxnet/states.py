"""States beside weights, as MXNet's optimizers hand them out: created, converted, and looked at before an update."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from tritopt.engine.plan import is_low_precision
from tritopt.engine.state_dtype import FP32, Choice, checked, format_of_planes, formats_of, stored
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.weights import MASTER_FP32, MASTERS
from tritopt.mxnet.rates import Rates
from tritopt.rule import State


class States(Rates):
    """A rule whose states lie outside of it: a tensor or tuple per weight, with the master's companion in front."""

    multi_precision: bool
    master: str | None
    state_dtype: Choice
    rounding_seed: int
    track: bool
    use_fused_step: bool | None
    max_grad_norm: float | None

    def _check_settings(self) -> None:
        raise NotImplementedError

    def _overrides_step(self) -> bool:
        raise NotImplementedError

    def create_state_multi_precision(self, index: Hashable, weight: torch.Tensor) -> State:
        """`create_state`, or (companion, its state) for an fp16 or bf16 weight under multi_precision.

        The companion is what `master` keeps beside the weight, of its shape: the fp32 master ("fp32"), the int16 or
        int8 remainder ("split16", "split8") or the compensation in the weight's dtype ("kahan"). "stochastic" has none,
        so its state stands alone. States are those of an fp32 weight.

        Raises:
            ValueError: `master` does not go with the weight's dtype, or not with this optimizer.
        """
        self._check_settings()
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
        """Format of each state. ValueError if `state_dtype` names what is none, or must not be stored so."""
        return formats_of(checked(self.state_dtype), {name: self.kind_of(name) for name in self.state_names})

    def _stored(self, weight: torch.Tensor, inner: State) -> State:
        """States as `state_dtype` has them, and no narrower than without it; the same object if they are."""
        if self._overrides_step():
            return inner
        values = self._values(inner)
        wanted = self.state_formats()
        if len(values) != len(wanted) or not all(map(is_planes, values)):
            return inner  # the next step says what is wrong
        converted = []
        for name, value, fmt in zip(self.state_names, values, wanted, strict=True):
            plain, planes = self._plain_dtype(name, weight), value if isinstance(value, tuple) else (value,)
            old = format_of_planes(planes, self.kind_of(name))
            if fmt is PLAIN and old is PLAIN:
                value = value if value.dtype.itemsize >= plain.itemsize else value.to(plain)
            elif [plane.dtype for plane in planes] != list(fmt.dtypes):
                planes = stored(fmt, old.decode(planes, plain if fmt is PLAIN else torch.float32))
                value = planes if len(planes) > 1 else planes[0]
            converted.append(value)
        if all(new is old for new, old in zip(converted, values, strict=True)):
            return inner
        return converted[0] if len(converted) == 1 else tuple(converted)

    def _plain_dtype(self, name: str, weight: torch.Tensor) -> torch.dtype:
        """Dtype of a state of this weight that is stored as it is."""
        is_wide = self.state_dtype is not None or self._format_of(None, weight) is not PLAIN
        return self.plain_dtype(name, torch.promote_types(torch.float32, weight.dtype) if is_wide else weight.dtype)

    def _values(self, inner: State) -> list[Any]:
        """The states one by one: tensors, or tuples of codes and scales."""
        values = [value for value in (inner if isinstance(inner, tuple) else (inner,)) if value is not None]
        is_one = len(self.state_names) == 1 and len(values) == 2 and isinstance(values[0], torch.Tensor)
        return [tuple(values)] if is_one else values

    def _format_of(self, index: Hashable, weight: torch.Tensor) -> Format:
        """Storage format of the weight. ValueError if `master` does not go with it."""
        if not (self.multi_precision and self.master is not None and is_low_precision(weight.dtype)):
            return PLAIN
        fmt = MASTERS[self.master]
        if weight.dtype not in fmt.weight_dtypes:
            raise ValueError(
                f"parameter {index!r}: master={self.master!r} completes bfloat16 weights, not {weight.dtype}: take "
                "master='fp32' or 'kahan'"
            )
        if fmt.draws and not all(phase.is_driver for phase in self.phases):
            raise ValueError(
                f"parameter {index!r}: master={self.master!r} is not for {type(self).__name__}, whose kernels draw no "
                "random bits: take 'fp32', 'split16' or 'kahan'"
            )
        return fmt

    def _masters(
        self, indices: Sequence[Hashable], weights: Sequence[torch.Tensor], states: Sequence[State]
    ) -> list[bool]:
        """Whether each weight has a companion; ValueError for a state without the one that it must have."""
        formats = [self._format_of(*item) for item in zip(indices, weights, strict=True)]
        for index, weight, state, fmt in zip(indices, weights, states, formats, strict=True):
            if fmt.companion and not self._has_companion(fmt, weight, state):
                dtype = str(fmt.dtype_of_companion(weight.dtype)).removeprefix("torch.")
                raise ValueError(
                    f"parameter {index!r}: multi_precision with master={self.master!r} needs a state ({dtype} "
                    f"{_COMPANIONS[fmt.name]}, state), got {structure(state)}; create it with "
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


_COMPANIONS = {
    "fp32 master": "master weight",
    "split16": "remainder of the weight",
    "split8": "remainder of the weight",
    "kahan": "compensation of the weight",
}


def checked_master(cls: type, master: Any, overrides_step: bool, lazy_update: bool) -> str | None:
    """A constructor's `master` as it is; ValueError for one that does not exist or does not go with the rest."""
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


def checked_state_dtype(cls: type, state_dtype: Any, overrides_step: bool, lazy_update: bool) -> Choice:
    """A constructor's `state_dtype` as it is kept; ValueError for one that does not go with the rest."""
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


def is_planes(value: Any) -> bool:
    """Whether it is a tensor, or codes and scales."""
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(plane, torch.Tensor) for plane in value)
    return isinstance(value, torch.Tensor)


def structure(state: Any) -> str:
    """Description of a state, for an error message."""
    if isinstance(state, torch.Tensor):
        return f"a {str(state.dtype).removeprefix('torch.')} tensor of shape {tuple(state.shape)}"
    if isinstance(state, tuple | list):
        return f"a {type(state).__name__} of [{', '.join(map(structure, state))}]"
    return repr(state)
