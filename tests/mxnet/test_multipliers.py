"""Multipliers by name pattern: which rule wins, what matches nothing, how they are saved, and that changes are seen."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch

import tritopt

NAMES = {0: "fc.weight", 1: "fc.bias", 2: "norm.weight", 3: "norm.bias"}
ALL = list(NAMES)
KINDS = pytest.mark.parametrize("kind", ["lr_mult", "wd_mult"])


def optimizer(**arguments: Any) -> Any:
    return tritopt.create("sgd", learning_rate=1.0, wd=1.0, param_idx2name=NAMES, **arguments)


def factors(opt: Any, kind: str) -> list[float]:
    products: list[float] = (opt._get_lrs if kind == "lr_mult" else opt._get_wds)(ALL)
    return products


@KINDS
def test_index_then_name_then_the_first_pattern(kind: str) -> None:
    opt = optimizer()
    getattr(opt, f"set_{kind}")({"*": 0.5, re.compile(r"\.bias$"): 3.0, "fc.bias": 4.0, 3: 5.0})
    assert factors(opt, kind) == [0.5, 4.0, 0.5, 5.0]
    getattr(opt, f"set_{kind}")({re.compile(r"\.bias$"): 3.0, "*": 0.5})
    assert factors(opt, kind) == [0.5, 3.0, 0.5, 3.0]


@KINDS
def test_what_a_parameter_carries_comes_before_all(kind: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in ALL]
    opt = optimizer(param_dict=dict(enumerate(params)))
    getattr(opt, f"set_{kind}")({"*.bias": 2.0})
    assert factors(opt, kind) == [1.0, 2.0, 1.0, 2.0]
    setattr(params[3], kind, 0.0)
    assert factors(opt, kind) == [1.0, 2.0, 1.0, 0.0]
    delattr(params[3], kind)
    assert factors(opt, kind) == [1.0, 2.0, 1.0, 2.0]


@KINDS
def test_changes_are_seen(kind: str) -> None:
    """Changes that nobody announces count too."""
    opt = optimizer()
    getattr(opt, f"set_{kind}")({"*.bias": 2.0, "*.*": 4.0})
    assert factors(opt, kind) == [4.0, 2.0, 4.0, 2.0]
    multipliers = getattr(opt, kind)
    multipliers["*.bias"] = 3.0
    assert factors(opt, kind) == [4.0, 3.0, 4.0, 3.0]
    multipliers["*.bias"] = multipliers.pop("*.bias")  # now the last
    assert factors(opt, kind) == [4.0, 4.0, 4.0, 4.0]
    del multipliers["*.*"]
    assert factors(opt, kind) == [1.0, 3.0, 1.0, 3.0]
    opt.idx2name[0] = "fc.bias"
    assert factors(opt, kind) == [3.0, 3.0, 1.0, 3.0]
    opt.idx2name = {0: "a"}
    assert factors(opt, kind) == [1.0] * 4


@KINDS
def test_what_matches_nothing_is_a_warning(kind: str) -> None:
    opt = optimizer()
    for key, nearest in (("*.biass", "'fc.bias'"), ("fc.wieght", "'fc.weight'"), (re.compile("nrom"), "'norm.bias'")):
        with pytest.warns(UserWarning, match=rf"^{kind}: .* matches no parameter; the nearest are {nearest}.*strict"):
            getattr(opt, f"set_{kind}")({key: 2.0, "*.bias": 3.0})
        assert factors(opt, kind) == [1.0, 3.0, 1.0, 3.0]


@KINDS
def test_strict_makes_it_an_error_and_changes_nothing(kind: str) -> None:
    opt = optimizer()
    getattr(opt, f"set_{kind}")({"*.bias": 3.0})
    with pytest.raises(ValueError, match=rf"^{kind}: '\*.biass' matches no parameter; the nearest are 'fc.bias'"):
        getattr(opt, f"set_{kind}")({"fc.bias": 1.0, "*.biass": 2.0}, strict=True)
    assert factors(opt, kind) == [1.0, 3.0, 1.0, 3.0]
    getattr(opt, f"set_{kind}")({"fc.bias": 2.0, "norm*": 4.0}, strict=True)
    assert factors(opt, kind) == [1.0, 2.0, 4.0, 4.0]


@KINDS
@pytest.mark.parametrize("key", ["*.bias", re.compile("bias")], ids=str)
def test_patterns_need_names(kind: str, key: Any) -> None:
    for arguments in ({}, {"param_dict": {0: torch.nn.Parameter(torch.zeros(1))}}):
        opt = tritopt.create("sgd", **arguments)
        with pytest.raises(ValueError, match=rf"{kind}: .*none has a name.*param_idx2name=tritopt.module_parameters"):
            getattr(opt, f"set_{kind}")({key: 2.0})
        assert getattr(opt, kind) == {}


def test_indices_that_are_names_are_known() -> None:
    """Any hashable is an index, a str too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = {"a": torch.nn.Parameter(torch.zeros(1))}
        opt = tritopt.create("sgd", learning_rate=1.0, param_dict=params)
        opt.set_lr_mult({"a": 2.0})
        tritopt.create("sgd").set_lr_mult({"whatever": 2.0})
    assert opt._get_lr("a") == 2.0


@KINDS
@pytest.mark.parametrize("how", ["states", "pickle", "deepcopy"])
def test_patterns_are_saved(kind: str, how: str) -> None:
    opt = optimizer()
    getattr(opt, f"set_{kind}")({re.compile(r"FC\.bias", re.IGNORECASE): 3.0, "norm*": 4.0, 0: 5.0, "norm.bias": 6.0})
    expected = factors(opt, kind)
    assert expected == [5.0, 3.0, 4.0, 6.0]
    if how == "states":
        updater = tritopt.get_updater(tritopt.create("sgd"))
        updater.set_states(tritopt.get_updater(opt).get_states(dump_optimizer=True))
        twin = updater.optimizer
    else:
        twin = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
    assert getattr(twin, kind) == getattr(opt, kind)
    assert factors(twin, kind) == expected


@pytest.mark.parametrize("fused", [True, False])
def test_patterns_reach_the_update(fused: bool) -> None:
    if fused:
        pytest.importorskip("triton")
    by_index, by_pattern = optimizer(use_fused_step=fused), optimizer(use_fused_step=fused)
    by_index.set_lr_mult({1: 2.0, 3: 2.0})
    by_index.set_wd_mult({2: 0.0, 3: 0.0})
    by_pattern.set_lr_mult({"*.bias": 2.0})
    by_pattern.set_wd_mult({"*norm*": 0.0})
    results = []
    for opt in (by_index, by_pattern):
        weights = [torch.full((3,), 8.0) for _ in ALL]
        updater = tritopt.get_updater(opt)
        for step in range(3):
            updater(list(ALL), [torch.full((3,), 0.25 * (i + step)) for i in ALL], weights)
        results.append(weights)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert len({float(weight[0]) for weight in results[0]}) == 4
