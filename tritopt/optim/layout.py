"""Layout of one parameter: its format, those of its states, and what stands in its state."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch

from tritopt.engine.plan import is_low_precision
from tritopt.engine.state_dtype import FP32, checked, formats_of
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import BLOCK, scales_shape
from tritopt.kernels.formats.weights import KAHAN, MASTER_FP32, MASTERS, SPLIT16
from tritopt.optim.distributed import is_dtensor, takes_blocks
from tritopt.rule import Rule

MAX_LAYOUTS = 4096
AUTO = "auto"
"""The `master` that goes by a parameter's dtype."""
State = dict[str, Any]


class Expected(NamedTuple):
    """Shape and dtype of a state tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_block: bool = False
    """Whether it has a number for each run of elements."""


class Layout(NamedTuple):
    """Formats and state tensors of all parameters of one shape, dtype and sharding under one group's settings."""

    rule: Rule
    format: Format
    """Format of the parameter with its master."""
    kinds: dict[str, str | None]
    """Kind of number that each state holds (`state_kinds` of the rule), by its name."""
    formats: dict[str, Format]
    """Format of each state, by its name, in the rule's order."""
    expected: dict[str, Expected]
    """Shape and dtype of each tensor of the state but numbers, by its key."""
    keys: tuple[str, ...]
    """Keys in the state of all states' planes, in the rule's order."""
    shows_numbers: bool
    """Whether the step stands in the state."""

    state_formats: tuple[Format, ...]
    """Formats of the states, in the rule's order."""
    draws: bool
    """Whether storing takes random bits."""
    owner: Layouts
    """The layouts of the class that this one is of."""


class Layouts:
    """The layouts of one optimizer, each derived once. A class with states of its own kind overrides what follows `of`.

    Args:
        name: the optimizer's class, for errors.
        state_keys: its name for a state of the rule; others keep their own.
    """

    def __init__(self, name: str, state_keys: Mapping[str, str]) -> None:
        self._name = name
        self._state_keys = state_keys
        self._known: dict[Hashable, Layout] = {}

    def of(self, param: torch.Tensor, group: dict[str, Any], rule: Rule) -> Layout:
        """Return a parameter's layout. ValueError if its group says what cannot be.

        rule: the group's.
        """
        choice = group["state_dtype"]
        key = (
            # Kept in the layout, so that no other rule gets its identity.
            id(rule), param.shape, param.dtype, group["multi_precision"], group["master"],
            tuple(choice.items()) if isinstance(choice, dict) else choice, group.get("differentiable"), _spread(param),
        )  # fmt: skip
        layout = self._known.get(key)
        if layout is None:
            if len(self._known) >= MAX_LAYOUTS:
                self._known.clear()
            layout = self._known[key] = self._derived(param, group, rule)
        return layout

    def names(self, rule: Rule, param: torch.Tensor) -> tuple[str, ...]:
        """Names of the states in `state[param]`, in the rule's order."""
        return tuple(self._state_keys.get(name, name) for name in rule.state_names)

    def shows_numbers(self, formats: tuple[Format, ...]) -> bool:
        """Whether the step stands in a state. Without it, `first_count` says how far a state has come.

        formats: the parameter's and its states'.
        """
        return True

    def first_count(self, state: State) -> float:
        """Steps that a state stands for which does not show them."""
        return 0.0

    def begins_anew(self, state: State) -> bool:
        """Whether steps are counted from 0 where this state is about to get tensors that it lacks."""
        return False

    def complete_loaded(self, state: State) -> None:
        """Add what a checkpoint of torch's class does not hold."""

    def expected(
        self, param: torch.Tensor, group: dict[str, Any], rule: Rule, fmt: Format, formats: Mapping[str, Format]
    ) -> dict[str, Expected]:
        """Shape and dtype of each state tensor of a parameter, by its key."""
        is_wide = fmt is not PLAIN or group["state_dtype"] is not None
        dtype = torch.promote_types(torch.float32, param.dtype) if is_wide else param.dtype
        planes: dict[str, Expected] = {}
        shapes = zip(rule.state_names, rule.state_shapes(param.shape), strict=True)
        for (key, of_state), (name, shape) in zip(formats.items(), shapes, strict=True):
            planes.update(expected_planes(key, of_state, tuple(shape), rule.plain_dtype(name, dtype)))
        if fmt.companion:
            planes[fmt.companion] = Expected(tuple(param.shape), fmt.dtype_of_companion(param.dtype))
        return planes

    def planes(self, layout: Layout, state: State) -> tuple[torch.Tensor, ...]:
        """The planes of a parameter's states, in the rule's order."""
        return tuple([state[key] for key in layout.keys])

    def _derived(self, param: torch.Tensor, group: dict[str, Any], rule: Rule) -> Layout:
        names = self.names(rule, param)
        kinds = {key: rule.kind_of(name) for key, name in zip(names, rule.state_names, strict=True)}
        fmt, formats = self._format_of(param, group, rule), _state_formats(param, group, kinds)
        return Layout(
            rule,
            fmt,
            kinds,
            formats,
            self.expected(param, group, rule, fmt, formats),
            tuple(key for name, of_state in formats.items() for key in keys_of(name, of_state)),
            self.shows_numbers((fmt, *formats.values())),
            tuple(formats.values()),
            any(one.draws for one in (fmt, *formats.values())),
            self,
        )

    def _format_of(self, param: torch.Tensor, group: dict[str, Any], rule: Rule) -> Format:
        """Storage format of the parameter. ValueError if its group wants a master that does not go with its dtype."""
        if not (group["multi_precision"] and group["master"] is not None and is_low_precision(param.dtype)):
            return PLAIN
        if group["master"] == AUTO:
            # A remainder is made of bits, through which nothing can be differentiated.
            is_split = param.dtype == torch.bfloat16 and not group.get("differentiable")
            return SPLIT16 if is_split else MASTER_FP32
        fmt = MASTERS[group["master"]]
        if param.dtype not in fmt.weight_dtypes:
            raise ValueError(
                f"master={group['master']!r} completes bfloat16 parameters, not {param.dtype}: take master='fp32' or "
                "'kahan' for their param_group"
            )
        if group.get("differentiable") and fmt not in (MASTER_FP32, KAHAN):
            raise ValueError(
                f"master={group['master']!r} is not for differentiable=True: it is made of bits, through which nothing "
                "can be differentiated: take 'auto', 'fp32' or 'kahan'"
            )
        if fmt.draws and not all(phase.is_driver for phase in rule.phases):
            raise ValueError(
                f"master={group['master']!r} is not for {self._name}, whose kernels draw no random bits: take "
                "'fp32', 'split16' or 'kahan'"
            )
        return fmt


def _state_formats(param: torch.Tensor, group: dict[str, Any], kinds: Mapping[str, str | None]) -> dict[str, Format]:
    """Storage format of each state of a parameter, in the rule's order. ValueError if its group says what cannot be."""
    choice = checked(group["state_dtype"])
    formats = formats_of(choice, kinds)
    if choice not in (None, FP32) and param.dtype == torch.float64:
        raise ValueError(
            f"state_dtype={choice!r} is not for float64 parameters: give their param_group state_dtype=None"
        )
    fits = takes_blocks(param, BLOCK)
    return {name: PLAIN if fmt.block and not fits else fmt for name, fmt in zip(kinds, formats, strict=True)}


def _spread(param: torch.Tensor) -> Hashable:
    """Mesh and placements of a parameter that is spread over processes; None if it is not."""
    return (param.device_mesh, tuple(param.placements)) if is_dtensor(param) else None


def keys_of(name: str, fmt: Format) -> tuple[str, ...]:
    """Keys of `state` for the planes of a state."""
    if not fmt.block:
        return (name,)
    codes = f"{name}_{fmt.name.partition(' ')[0]}"
    return codes, f"{codes}_scale"


def expected_planes(name: str, fmt: Format, shape: tuple[int, ...], plain: torch.dtype) -> dict[str, Expected]:
    """Planes of a state of this shape. `plain`: its dtype, if it is stored as it is."""
    shapes = (shape, scales_shape(shape, fmt.block)) if fmt.block else (shape,)
    planes = zip(keys_of(name, fmt), shapes, fmt.dtypes or (plain,), (False, True), strict=False)
    return {key: Expected(shape, dtype, per_block) for key, shape, dtype, per_block in planes}


def checked_master(value: Any) -> str | None:
    """A `master` as it is; ValueError for any other."""
    known = (AUTO, *MASTERS)
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ValueError(f"master={value!r} must be one of {', '.join(map(repr, known))}, or None")
    return value
