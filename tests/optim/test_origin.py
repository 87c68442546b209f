"""Checkpoints of other classes: refused where states differ, warned about where only hyperparameters do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.optim.training import CLASSES, assert_same, everything, parameters, set_grads
from tritopt import optim

TORCHS = [
    getattr(torch.optim, name)
    for name in ("ASGD", "Adam", "AdamW", "Adafactor", "Adagrad", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
]
SAVERS = [*CLASSES, *TORCHS]
# States of the same names and shapes, which mean much the same.
ALIKE = (
    {"Adam", "AdamW", "LAMB", "LANS", "RAdam"},
    {"LARS", "NAG", "SGD", "Signum", "Muon"},
)
SAME = {"Adam", "AdamW"}  # torch takes one for the other


def trained(cls: Any) -> tuple[Any, Any]:
    params = parameters()
    opt = cls(params, lr=0.01, **({"fused": False} if cls in CLASSES else {}))
    for step in range(2):
        set_grads(params, step)
        opt.step()
    return params, opt


def name_of(cls: Any) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("saver", SAVERS, ids=name_of)
def test_every_pair_of_classes(saver: Any) -> None:
    saved = trained(saver)[1].state_dict()
    for loader in CLASSES:
        names = {saver.__name__, loader.__name__}
        if len(names) == 1:
            continue
        params, opt = trained(loader)
        before = [t.clone() for t in everything(opt)]
        groups = [dict(group) for group in opt.param_groups]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            error = error_of(lambda opt=opt: opt.load_state_dict(copy.deepcopy(saved)))  # type: ignore[misc]
        if error is not None:
            assert loader.__name__ in error
            assert not any(names <= alike for alike in ALIKE) or "without step" in error
            assert_same(everything(opt), before)
            assert [dict(group) for group in opt.param_groups] == groups
            continue
        is_empty = not any(value.numel() > 1 for state in saved["state"].values() for value in state.values())
        assert is_empty or any(names <= alike for alike in ALIKE), f"{loader.__name__} takes {saver.__name__}'s"
        assert (len(seen) == 0) == (names == SAME)
        set_grads(params, 2)
        opt.step()


def test_the_error_names_both_classes() -> None:
    saved = trained(optim.RMSprop)[1].state_dict()
    with pytest.raises(ValueError, match=r"square_avg.* and Lion keeps exp_avg.* such as .*RMSprop"):
        trained(optim.Lion)[1].load_state_dict(saved)


def test_the_warning_says_what_becomes_of_hyperparameters() -> None:
    saved = trained(optim.LAMB)[1].state_dict()
    opt = trained(optim.AdamW)[1]
    with pytest.warns(UserWarning, match=r"not those of AdamW but of LAMB.*betas, eps, lr.*taken from it"):
        opt.load_state_dict(saved)


STATES = [("AdamW", {}), ("AdamW", {"state_dtype": "int8"}), ("SGD", {"momentum": 0.9}), ("Lion", {}), ("NAdam", {})]


@pytest.mark.parametrize(("name", "options"), STATES, ids=str)
def test_a_plane_that_is_lost_is_named(name: str, options: dict[str, Any]) -> None:
    cls = getattr(optim, name)
    params = [torch.nn.Parameter(torch.ones(2, 64, dtype=torch.bfloat16))]
    opt = cls(params, lr=0.01, **options)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    saved = opt.state_dict()
    lost = [key for key in saved["state"][0] if key not in ("step", "master_remainder")]
    for key in lost if len(lost) > 1 else []:
        less = copy.deepcopy(saved)
        del less["state"][0][key]
        before = [t.clone() for t in everything(opt)]
        with pytest.raises(ValueError, match=rf"without {key}, which {name} keeps"):
            opt.load_state_dict(less)
        assert_same(everything(opt), before)
    opt.step()
