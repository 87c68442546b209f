"""A checkpoint of another class is refused or warned of, with both names; an incomplete one is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeAlias

import pytest
import torch

from tests.support.training import (
    CLASSES,
    EVERY_CLASS,
    assert_same,
    everything,
    options_of,
    parameters,
    set_grads,
    train,
)
from tritopt import optim

Class: TypeAlias = Any  # a class of tritopt.optim or of torch.optim, with a signature of its own
TORCHS: list[Any] = [
    cls
    for cls in vars(torch.optim).values()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]
SAVERS = [*CLASSES, *TORCHS]
ALIKE = [{"Adam", "AdamW"}]
"""Adam with either decay: the same states and hyperparameters, of which one says which it is."""
ALIKE_WHEN_FRESH = [{"Adamax", "FTML"}]
"""The names of their hyperparameters are the same, and there are no states yet."""


def saver_id(cls: Class) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def saved_by(cls: Class, has_stepped: bool, **options: Any) -> dict[str, Any]:
    params = parameters()
    opt = cls(params, **options, **({"fused": False} if cls in CLASSES else {}))
    if has_stepped:
        for step in range(2):
            set_grads(params, step)
            if cls.__name__ == "SparseAdam":
                for p in params:
                    p.grad = p.grad.to_sparse()  # type: ignore[union-attr]
            opt.step((lambda: (params[0] * 2).sum()) if cls.__name__ == "LBFGS" else None)
    return copy.deepcopy(opt.state_dict())


def outcome(cls: Class, saved: dict[str, Any]) -> tuple[str, str]:
    """Load a checkpoint, and return what becomes of it and what is said. Steps are the reference's: loading is the
    same."""
    params = parameters()
    opt = cls(params, fused=False, **options_of(cls))
    train(opt, params, range(1))
    before = everything(opt)
    groups = [{**group, "params": None} for group in opt.param_groups]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            opt.load_state_dict(saved)
        except ValueError as error:
            assert_same(everything(opt), before)
            assert [{**group, "params": None} for group in opt.param_groups] == groups
            return "refused", str(error)
    train(opt, params, range(1, 3))  # what was taken can be used
    assert all(value.isfinite().all() for value in everything(opt))
    return ("warned", str(seen[0].message)) if seen else ("taken", "")


@pytest.mark.parametrize("has_stepped", [False, True], ids=["fresh", "stepped"])
@pytest.mark.parametrize("saver", SAVERS, ids=saver_id)
def test_all_pairs(saver: Class, has_stepped: bool) -> None:
    momentum = {"momentum": 0.9} if saver.__name__ in ("SGD", "RMSprop", "DCASGD") else {}
    for options in ({}, momentum) if momentum else ({},):
        saved = saved_by(saver, has_stepped, **options)
        for cls in CLASSES:
            what, message = outcome(cls, copy.deepcopy(saved))
            one, other = saver.__name__, cls.__name__
            if one == other or {one, other} in ALIKE or (not has_stepped and {one, other} in ALIKE_WHEN_FRESH):
                assert what == "taken", message
                continue
            assert what in ("refused", "warned"), f"{one} -> {other}"
            assert other in message, message
            assert one in message, message


def test_another_classs_hyperparameters_are_left_out() -> None:
    params = parameters()
    opt = optim.LAMB(params, lower_bound=0.5)
    with pytest.warns(UserWarning, match=r"not those of LAMB but of Adam or AdamW: betas.*taken.*amsgrad.*left out"):
        opt.load_state_dict(saved_by(torch.optim.AdamW, True))
    (group,) = opt.param_groups
    assert "amsgrad" not in group
    assert group["lower_bound"] == 0.5


def test_a_name_that_means_something_else_is_refused_by_its_value() -> None:
    """AdEMAMix's alpha weighs a mean; as RMSprop's decay rate it would make a mean of squares negative."""
    opt = optim.RMSprop(parameters())
    with pytest.raises(ValueError, match=r"alpha=5\.0 must be in \[0, 1\].* not those of RMSprop but of AdEMAMix"):
        opt.load_state_dict(saved_by(optim.AdEMAMix, False))
    assert opt.param_groups[0]["alpha"] == 0.99
    with pytest.raises(ValueError, match=r"alpha=1\.5 must be in \[0, 1\]"):
        optim.RMSprop(parameters(), alpha=1.5)
    optim.RMSprop(parameters(), alpha=1.0)


def test_checkpoints_of_older_versions_have_fewer_flags() -> None:
    saved = saved_by(torch.optim.AdamW, True)
    for name in ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(name, None)
    for cls in (optim.AdamW, optim.Adam):
        assert outcome(cls, copy.deepcopy(saved)) == ("taken", "")
    saved["param_groups"][0].update(initial_lr=0.1, swa_lr=0.2, something_new=3)
    assert outcome(optim.AdamW, saved) == ("taken", "")


def test_what_users_keep_beside_is_kept() -> None:
    saved = saved_by(torch.optim.AdamW, True)
    for state in saved["state"].values():
        state["ema"] = torch.ones(2)
    params = parameters()
    opt = optim.AdamW(params)
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[params[0]]["ema"], torch.ones(2))


@EVERY_CLASS
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"state_dtype": "fp16"}], ids=str)
def test_a_lost_plane_is_named(cls: Class, options: dict[str, Any]) -> None:
    """Each in turn. What torch itself does without may be lacking: SGD's buffer, which then begins anew."""
    params = parameters(torch.bfloat16, shapes=((4, 64), (2, 128)))
    known = options_of(cls, amsgrad=True, momentum=0.9, centered=True)
    opt = cls(params, **known, **options)
    train(opt, params, range(2))
    saved = copy.deepcopy(opt.state_dict())
    before = everything(opt)
    for name in list(saved["state"][1]):
        if name in opt.may_lack or name.startswith("master") or len(saved["state"][1]) == 2:
            continue  # beside the master, SGLD has nothing but its step
        broken = copy.deepcopy(saved)
        del broken["state"][1][name]
        with pytest.raises(ValueError, match=rf"parameter 1 has .* without {name}\b.*incomplete"):
            opt.load_state_dict(broken)
        assert_same(everything(opt), before)
    opt.load_state_dict(saved)


@EVERY_CLASS
def test_state_dicts_have_torchs_keys(cls: Class) -> None:
    params = parameters()
    opt = cls(params, **options_of(cls))
    theirs = getattr(torch.optim, cls.__name__, None)
    if theirs is not None:
        assert opt.state_dict()["param_groups"][0].keys() == theirs(parameters()).state_dict()["param_groups"][0].keys()
    before = opt.state_dict()["param_groups"]
    assert not {"master", "state_dtype", "multi_precision", "clip_value"} & before[0].keys()
    assert list(opt.param_groups[0]) == [*(k for k in before[0] if k != "params"), "params"] or set(
        opt.param_groups[0]
    ) == set(before[0])
    for again in (copy.deepcopy(opt), opt):
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert again.state_dict()["param_groups"] == before
        assert copy.deepcopy(copy.deepcopy(again)).state_dict()["param_groups"] == before


def test_a_bound_is_saved_where_there_is_one() -> None:
    params = parameters()
    groups: Any = [{"params": params[:1], "clip_value": 0.5}, {"params": params[1:]}]
    opt = optim.AdamW(groups)
    saved = opt.state_dict()["param_groups"]
    assert [group.get("clip_value") for group in saved] == [0.5, None]
    assert "clip_value" not in saved[1]
    other = optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], clip_value=0.25)
    other.load_state_dict(opt.state_dict())
    assert [group["clip_value"] for group in other.param_groups] == [0.5, 0.25]


def test_hooks_see_a_state_dict_and_change_it() -> None:
    params = parameters()
    opt = optim.AdamW(params)
    seen: list[Any] = []
    opt.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    opt.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
    saved = opt.state_dict()
    assert seen == ["pre"]
    assert saved["extra"] == 1
    opt.load_state_dict({name: value for name, value in saved.items() if name != "extra"})


def test_adafactor_gains_no_key() -> None:
    params = parameters()
    opt = optim.Adafactor(params)
    train(opt, params, range(1))
    keys = set(opt.param_groups[0].keys())
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert set(opt.param_groups[0].keys()) == keys
    assert set(copy.deepcopy(opt).param_groups[0].keys()) == keys
