"""Origin of a checkpoint: the classes it may come from, by the names of its states and hyperparameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from tritopt.optim.defaults import HOW, arguments_of

CLASSES: dict[str, Any] = {}
"""This package's classes by name, which each class of it enters."""
_NEUTRAL = {
    *HOW,
    "maximize",
    "clip_value",
    "flatten",
    "split",
    "split_dim",
    "ns_dtype",
    "scratch_bytes",
    "beta2",
    "ns_symmetric",
}
"""Arguments that tell no optimizer from another: all have them, or torch's class of the same name lacks them."""
_TORCH_ONLY = {
    "ASGD": {"step", "eta", "mu", "ax"},
    "LBFGS": {
        "func_evals",
        "n_iter",
        "d",
        "t",
        "old_dirs",
        "old_stps",
        "ro",
        "H_diag",
        "prev_flat_grad",
        "prev_loss",
        "al",
    },
    "Rprop": {"step", "prev", "step_size"},
    "SparseAdam": {"step", "exp_avg", "exp_avg_sq"},
}
"""States of torch's classes that have no counterpart here."""
_TORCHS = {name: getattr(torch.optim, name) for name in _TORCH_ONLY if hasattr(torch.optim, name)}


@cache
def variants_of(cls: Any) -> tuple[frozenset[str], ...]:
    """Names of the states that a class keeps for a parameter, for every choice of hyperparameters and dimensions."""
    layouts, numbers = cls.layouts_class(cls.__name__, cls.state_keys), {"step", *cls.rule.scalar_states}
    params = [torch.empty((1,) * n, device="meta", dtype=torch.float32) for n in (1, 2)]
    rules = [cls.rule(**variant) for variant in cls.rule.variants]
    return tuple(frozenset({*layouts.names(rule, param), *numbers}) for rule in rules for param in params)


def states_of_class(cls: Any) -> frozenset[str]:
    """Names of the states that a class keeps for some choice of hyperparameters."""
    return frozenset().union(*variants_of(cls))


@cache
def known_states() -> frozenset[str]:
    """Names of the states of all classes, ours and torch's."""
    return frozenset().union(*(names for variants in _states().values() for names in variants))


def savers_of(saved: Collection[str]) -> list[str]:
    """Classes that keep states of these very names."""
    saved = {*saved, "step"}  # which SGD and Muon do not keep
    return sorted(name for name, variants in _states().items() if saved in [{*names, "step"} for names in variants])


@cache
def _states() -> Mapping[str, Sequence[Collection[str]]]:
    ours = {name: variants_of(cls) for name, cls in CLASSES.items()}
    return {**{name: (names,) for name, names in _TORCH_ONLY.items()}, **ours}


@cache
def _hyperparameters() -> Mapping[str, Collection[str]]:
    classes = {name: CLASSES.get(name) or _TORCHS.get(name) for name in _states()}
    return {name: arguments_of(cls).keys() - _NEUTRAL for name, cls in classes.items() if cls is not None}


def is_foreign_key(opt: Any, name: str) -> bool:
    """Whether a key of a param_group is another class's hyperparameter, and none of this optimizer's."""
    return name not in opt.defaults and any(name in names for names in _hyperparameters().values())


def same_keys(cls: Any) -> list[str]:
    """Classes whose hyperparameters have the names that a class's have, itself included."""
    names = _hyperparameters()
    return sorted(name for name in names if names[name] == names.get(cls.__name__))


def stranger(opt: Any, groups: Sequence[Mapping[str, Any]], states: Collection[str]) -> tuple[str, str] | None:
    """Complaint about param_groups that are another class's, with what becomes of them; None if they are this one's."""
    own, cls = opt.defaults.keys() - _NEUTRAL, type(opt).__name__
    for group in groups:
        foreign = {name for name in group if is_foreign_key(opt, name)}
        taken = own & group.keys()
        given = taken | foreign
        # Checkpoints of older versions of torch lack flags, and those alone.
        lacking = {name for name in own - given if not isinstance(opt.defaults[name], bool)}
        fit = savers_of(states) if states else list(_states())
        savers = sorted(name for name in fit if _hyperparameters().get(name) == given)
        if not foreign and not lacking and (not savers or given == own):
            continue
        becomes = ((taken, "taken from it"), (foreign, "left out"), (lacking, "kept"))
        return (
            f"the checkpoint's param_groups are not those of {cls}"
            + (f" but of {' or '.join(savers)}" if savers else ""),
            "; ".join(f"{', '.join(sorted(names))} {verb}" for names, verb in becomes if names)
            + ". States of the same names are taken too; set the hyperparameters that are not meant",
        )
    return None
