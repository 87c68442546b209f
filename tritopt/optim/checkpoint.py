"""Loading a state dict without losing precision; ours or torch's, on one device or sharded."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch.nn.parameter import is_lazy

from tritopt.engine import private
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.states import STATE_FORMATS
from tritopt.kernels.formats.weights import MASTERS
from tritopt.optim.convert import COMPANIONS, received, take_companion, take_states
from tritopt.optim.defaults import HOW, WrongKindError
from tritopt.optim.distributed import laid_out, local
from tritopt.optim.layout import Expected, Layout, Layouts, expected_planes
from tritopt.optim.origin import is_foreign_key, known_states, same_keys, savers_of, states_of_class, stranger

_ENDING = re.compile(r"_(fp16|int8|fp8)(_scale)?$")


class Loads(Protocol):
    """The torch face's optimizer, as loading sees it."""

    rule: ClassVar[Any]
    layouts: Layouts
    param_groups: list[dict[str, Any]]
    state: Any
    defaults: dict[str, Any]
    may_lack: ClassVar[frozenset[str]]
    _handed_out: dict[int, tuple[torch.Tensor, tuple[int, ...]]]

    def of_class(self, group: Mapping[str, Any]) -> Loads:
        """An optimizer of the class that a group's parameters follow."""
        ...

    def layout_of(self, param: torch.Tensor, group: dict[str, Any]) -> Layout:
        """Layout by which a parameter of a group is kept."""
        ...

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError unless a group's values are such as the constructor takes."""
        ...

    def __setstate__(self, state: dict[str, Any]) -> None: ...


def load(opt: Loads, state_dict: dict[str, Any]) -> None:
    """Load a state dict into an optimizer: `Optimizer.load_state_dict`."""
    state_dict = state_dict.copy()
    before, after = private.load_hooks(opt)
    for pre_hook in before:
        state_dict = pre_hook(opt, state_dict) or state_dict
    groups, saved_groups = opt.param_groups, deepcopy(state_dict["param_groups"])
    state_of = {key: _given(values) for key, values in state_dict["state"].items()}
    saved_names = {_name_of_state(name) for values in state_of.values() if isinstance(values, dict) for name in values}
    _check_sizes(groups, saved_groups)
    _check_routing(groups, saved_groups)
    merged = [_merged(group, saved, opt.of_class(group)) for group, saved in zip(groups, saved_groups, strict=True)]
    is_mixed = any("algorithm" in group for group in groups)
    warning = None if is_mixed else stranger(opt, saved_groups, saved_names - COMPANIONS)
    _check_groups(opt, merged, warning[0] if warning else "")
    saved_ids = chain.from_iterable(saved["params"] for saved in saved_groups)
    owners = ((param, group) for group in merged for param in group["params"])
    owner_of = dict(zip(saved_ids, owners, strict=True))
    state: defaultdict[Any, Any] = defaultdict(dict)
    without_master: list[Any] = []
    for key, values in state_of.items():
        if key not in owner_of:
            state[key] = values
        elif loaded := _loaded_state(opt, key, values, owner_of[key], without_master):  # others at their first gradient
            state[owner_of[key][0]] = loaded
    if warning:
        warn(": ".join(warning))
    if without_master:
        warn(
            f"the checkpoint has no master for {len(without_master)} fp16 or bf16 parameters: their masters start from "
            "the rounded weights"
        )
    opt.__setstate__({"state": state, "param_groups": merged})
    for post_hook in after:
        post_hook(opt)


def _check_sizes(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    if len(groups) != len(saved_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(group["params"]) != len(saved["params"]) for group, saved in zip(groups, saved_groups, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )


def _check_routing(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """ValueError unless each group is of the class that saved it, where there are several classes."""
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        ours, theirs = group.get("algorithm"), saved.get("algorithm")
        if ours != theirs:
            raise ValueError(
                f"loaded state dict: parameter group {i} is {theirs or 'that of a single class'}'s there and "
                f"{ours or 'that of a single class'}'s here: route parameters as when it was saved"
            )


def _check_groups(opt: Loads, groups: list[dict[str, Any]], whose: str) -> None:
    """ValueError for hyperparameters out of range. whose: what is known of another class that saved them."""
    for group in groups:
        try:
            opt.check_group(group)
        except ValueError as error:
            if not whose and isinstance(error, WrongKindError):
                whose = f"{', '.join(same_keys(type(opt)))} have hyperparameters of the same names: whose are these?"
            raise ValueError(f"loaded state dict: {error}" + (whose and f"; {whose}")) from error


def _loaded_state(
    opt: Loads, key: Any, values: dict[str, Any], owner: tuple[torch.Tensor, dict[str, Any]], without_master: list[Any]
) -> dict[str, Any]:
    """A parameter's state out of a checkpoint, checked. `without_master` gets its key where the master starts anew."""
    param, group = owner
    if is_lazy(param):
        raise ValueError(
            f"loaded state dict: it has a state for parameter {key!r}, which is an uninitialized parameter without "
            "a shape: load the model's state dict before, or run the module once"
        )
    layout = opt.layout_of(param, group)
    expected, fmt = layout.expected, layout.format
    of_class = opt.of_class(group)
    for name in ("step", *of_class.rule.scalar_states):
        _check_number(key, name, values.get(name, 0.0))
    _check_states(key, values, expected, of_class)
    values = received(_without_stale_companion(opt, param, values))
    known = {**_other_forms(param, layout.kinds), **expected}
    loaded = {name: _loaded(key, name, value, param, known) for name, value in values.items()}
    if not loaded:
        return loaded
    # A master in another format waits for the next step: the model's weights may be loaded after its optimizer.
    is_waiting = fmt.companion not in ("", *loaded) and not COMPANIONS.isdisjoint(loaded)
    if not is_waiting and not take_companion(param, loaded, fmt):
        without_master.append(key)
    take_states(param, loaded, layout.formats, layout.kinds, expected)
    layout.owner.complete_loaded(loaded)
    return loaded


def versions(state: Mapping[Any, Any]) -> dict[int, tuple[torch.Tensor, tuple[int, ...]]]:
    """State tensors and their versions by `id`, which writing to one in place changes."""
    states = [values for values in state.values() if isinstance(values, dict)]
    return {id(value): (value, _version(value)) for values in states for value in values.values() if _is_many(value)}


def _version(tensor: torch.Tensor) -> tuple[int, ...]:
    """Version of a tensor: another after each write in place, to the tensor or to its part in this process."""
    return tuple(0 if part.is_inference() else private.version_of(part) for part in (tensor, local(tensor)))


def _without_stale_companion(opt: Loads, param: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """The states of a parameter, less a companion that was not loaded with them.

    torch.distributed.checkpoint loads into the tensors of `state_dict`. Those that a checkpoint lacks stay as they are
    with allow_partial_load, and then belong to weights that are gone.
    """
    live = opt.state.get(param, {})

    def is_loaded(name: str) -> bool:
        value = values[name]
        known = opt._handed_out.get(id(value))
        return value is not live.get(name) if known is None else known[1] != _version(value)

    others = [name for name, value in values.items() if _is_many(value) and name not in COMPANIONS]
    # Where there is nothing beside it, nothing tells.
    stale = {name for name in COMPANIONS & values.keys() if not is_loaded(name) and any(map(is_loaded, others))}
    return {name: value for name, value in values.items() if name not in stale}


def _merged(group: dict[str, Any], saved: dict[str, Any], opt: Loads) -> dict[str, Any]:
    """The saved group, with our parameters and our ways to compute. What it lacks stays as it is."""
    ours = {name: group.get(name, default) for name, default in opt.defaults.items()}
    theirs = {name: value for name, value in saved.items() if name not in HOW and not is_foreign_key(opt, name)}
    kept = {name: group[name] for name in HOW if name in group}
    names = {} if "param_names" in saved or "param_names" not in group else {"param_names": group["param_names"]}
    return {**ours, **theirs, **kept, **names, "params": group["params"]}


def _given(values: Any) -> Any:
    """States without those that are not there: torch has None, and an empty dict once it has unflattened a state."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _is_many(value: Any) -> bool:
    """Whether it is a tensor of more than a number."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _loaded(key: Any, name: str, value: Any, param: torch.Tensor, expected: Mapping[str, Expected]) -> Any:
    if value is None or name not in expected:
        # A number may be a view of the vector of an optimizer that goes on stepping.
        return value.clone() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
    is_real = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.dtype == expected[name].dtype)
    if not is_real:
        given = value.dtype if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"loaded state dict: {name} of parameter {key!r} is {given}, and must be a tensor of real numbers"
        )
    shape, dtype, per_block = expected[name]
    if tuple(value.shape) != shape:
        raise ValueError(
            f"loaded state dict: {name} of parameter {key!r} has shape {tuple(value.shape)}, but a parameter of "
            f"shape {tuple(param.shape)} needs {shape}; load the checkpoint of this very model"
        )
    if value.dtype.itemsize > dtype.itemsize and dtype.itemsize < 4:
        dtype = torch.float32 if value.dtype == torch.float64 else value.dtype
    return laid_out(param, value.to(device=param.device, dtype=dtype), per_block)


def _other_forms(param: torch.Tensor, kinds: Mapping[str, str | None]) -> dict[str, Expected]:
    """Shapes and dtypes of companions and states in other formats, which a checkpoint may have."""
    shape = tuple(param.shape)
    formats = [fmt for fmt in MASTERS.values() if fmt.companion and param.dtype in fmt.weight_dtypes]
    planes = {fmt.companion: Expected(shape, fmt.dtype_of_companion(param.dtype)) for fmt in formats}
    plain = torch.promote_types(torch.float32, param.dtype)
    for name, kind in kinds.items():
        if kind is not None:
            for fmt in (PLAIN, *[of_kind[kind] for of_kind in STATE_FORMATS.values()]):
                planes.update(expected_planes(name, fmt, shape, plain))
    return planes


def _name_of_state(key: str) -> str:
    """Name of the state that a key is of, without what `keys_of` adds."""
    return _ENDING.sub("", key)


def _check_states(key: Any, values: Mapping[str, Any], expected: Mapping[str, Expected], opt: Loads) -> None:
    """ValueError for states of another optimizer, and for some that lack others."""
    numbers = {"step", *opt.rule.scalar_states}
    saved = {_name_of_state(name) for name in values} - COMPANIONS
    if not saved:
        return
    needed = (set(map(_name_of_state, expected)) | numbers) - COMPANIONS
    own = states_of_class(type(opt))
    # What users keep beside is no optimizer's, and none of ours.
    foreign = (saved - own) & known_states() if saved & own else saved
    missing = needed - saved - opt.may_lack
    if not missing:  # and of each state all planes, where it has several
        codes = {name.removesuffix("_scale") for name in values if _ENDING.search(name) and _name_of_state(name) in own}
        missing = {plane for name in codes for plane in (name, f"{name}_scale")} - values.keys()
    if not foreign and not missing:
        return
    savers = [name for name in savers_of(saved) if name != type(opt).__name__]
    whose = "another optimizer's" + (f", such as {' or '.join(savers)}" if savers else "")
    has = f"loaded state dict: parameter {key!r} has {', '.join(sorted(values))}"
    if foreign:
        raise ValueError(
            f"{has}, and {type(opt).__name__} keeps {', '.join(sorted(needed))}: the checkpoint is {whose}; load it "
            "into that one"
        )
    raise ValueError(
        f"{has} without {', '.join(sorted(missing))}, which {type(opt).__name__} keeps beside: the checkpoint is "
        + (f"{whose}, or incomplete" if missing & needed else "incomplete")
    )


def _check_number(key: Any, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(
            f"loaded state dict: {name} of parameter {key!r} has shape {tuple(value.shape)}, and must be one number"
        )
    if not isinstance(value, torch.Tensor | int | float):
        raise ValueError(f"loaded state dict: {name} of parameter {key!r} is {value!r}, and must be a number")
