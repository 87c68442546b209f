"""Checkpoints: nothing is lost, torch's are taken, and what does not fit is refused before anything is loaded."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any, TypeAlias

import pytest
import torch

from tests.support.training import (
    CLASSES,
    EVERY_CLASS,
    assert_follows,
    assert_same,
    clone,
    everything,
    named,
    options_of,
    parameters,
    set_grads,
    train,
    twin,
)
from tritopt.optim import SGD, Adam, AdamW

Class: TypeAlias = Any  # a class of tritopt.optim, with a signature of its own
WITH_TWIN = pytest.mark.parametrize("cls", [c for c in CLASSES if twin(c)], ids=lambda cls: cls.__name__)
NO_MASTER = "the checkpoint has no master for 3 fp16 or bf16 parameters"


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Saved, and read without running what is in it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def make(cls: type, params: Any, **options: Any) -> Any:
    """Construct a class with those of the options that it has."""
    known = options_of(cls, **options) if cls in CLASSES else {"lr": 0.01, **options}
    return cls(params, **known)


def variants(cls: Class) -> list[dict[str, Any]]:
    """Options that change which states there are."""
    arguments: list[dict[str, Any]] = [{}]
    known = options_of(cls, amsgrad=True, momentum=0.9, centered=True)
    return arguments + [{name: value} for name, value in known.items() if name != "lr"]


CASES = pytest.mark.parametrize(
    ("cls", "options"),
    [pytest.param(cls, options, id=f"{cls.__name__}-{options}") for cls in CLASSES for options in variants(cls)],
)


@CASES
def test_a_resumed_run_goes_on_bit_exactly(cls: Class, options: dict[str, Any]) -> None:
    params = parameters(torch.bfloat16)
    opt = make(cls, named(params), **options)
    train(opt, params, range(2))
    saved, weights = through_file(opt.state_dict()), clone(params)
    dtypes = [t.dtype for t in everything(opt)]
    resumed = make(cls, named(weights), **options)
    resumed.load_state_dict(saved)
    assert_same(everything(resumed), everything(opt))
    train(opt, params, range(2, 4))
    train(resumed, weights, range(2, 4))
    assert_same(everything(resumed), everything(opt))
    assert [t.dtype for t in everything(resumed)] == dtypes


@EVERY_CLASS
def test_masters_and_states_of_bf16_parameters_are_fp32_and_stay(cls: Class) -> None:
    params = parameters(torch.bfloat16)
    opt = make(cls, params)
    opt.param_groups[0]["master"] = "fp32"
    train(opt, params, range(3))
    saved = through_file(opt.state_dict())
    for i, p in enumerate(params):
        master = saved["state"][i]["master_param"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), p)
        assert not torch.equal(master, p.detach().float())  # bits that the weight does not have
        tensors = [t for t in saved["state"][i].values() if isinstance(t, torch.Tensor)]
        assert all(t.dtype == torch.float32 for t in tensors)


@EVERY_CLASS
def test_a_state_dict_is_laid_out_as_torchs(cls: Class) -> None:
    params = parameters()
    opt = make(cls, [{"params": params[:1]}, {"params": params[1:]}])
    train(opt, params, range(1))
    saved = opt.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2]]
    assert set(saved["state"]) == ({0, 1, 2} if cls is not SGD else set())
    reference = twin(cls)
    if reference is not None:
        theirs = make(reference, clone(params))
        train(theirs, theirs.param_groups[0]["params"], range(1))
        for i in range(3):
            expected = theirs.state_dict()["state"].get(i, {})
            ours = saved["state"].get(i, {})
            assert set(expected) <= set(ours)
            for name, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert ours[name].shape == value.shape, name


# torch's checkpoints.


def torch_options(cls: Class) -> dict[str, Any]:
    return options_of(cls, weight_decay=0.1, momentum=0.9)


@WITH_TWIN
def test_a_checkpoint_of_torch_goes_on_as_in_torch(cls: Class) -> None:
    params = parameters()
    theirs = twin(cls)(params, **torch_options(cls))
    train(theirs, params, range(3))
    ours = clone(params)
    opt = cls(ours, **torch_options(cls))
    opt.load_state_dict(through_file(theirs.state_dict()))
    start = clone(params)
    train(theirs, params, range(3, 8))
    train(opt, ours, range(3, 8))
    assert_follows(ours, params, start, 5, cls)


@WITH_TWIN
def test_torch_goes_on_from_our_checkpoint(cls: Class) -> None:
    """The way back is open too."""
    params = parameters()
    opt = cls(params, **torch_options(cls))
    train(opt, params, range(3))
    theirs_params = clone(params)
    theirs = twin(cls)(theirs_params, **torch_options(cls))
    theirs.load_state_dict(through_file(opt.state_dict()))
    start = clone(params)
    train(opt, params, range(3, 8))
    train(theirs, theirs_params, range(3, 8))
    assert_follows(params, theirs_params, start, 5, cls)


@WITH_TWIN
def test_a_bf16_checkpoint_of_torch_gets_masters_with_one_warning(cls: Class) -> None:
    params = parameters(torch.bfloat16)
    theirs = twin(cls)(params, **torch_options(cls))
    train(theirs, params, range(3))
    saved = through_file(theirs.state_dict())
    if not any(saved["state"].values()):
        pytest.skip("torch keeps no state")
    opt = cls(params, **torch_options(cls))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    assert [NO_MASTER in str(warning.message) for warning in seen] == [True]
    assert seen[0].filename == __file__
    assert_same(opt.master_weights(), [p.detach().float() for p in params])
    for i, p in enumerate(params):
        for name, value in saved["state"][i].items():
            if isinstance(value, torch.Tensor):
                loaded_state = opt.state[p][name]
                assert loaded_state.dtype == torch.float32
                assert torch.equal(loaded_state, value.float())
    train(opt, params, range(3, 5))
    assert not torch.equal(opt.master_weights()[0], params[0].detach().float())


def test_a_step_that_is_a_plain_int() -> None:
    """torch saved it so before 1.12."""
    params = parameters()
    theirs = torch.optim.Adam(params, lr=0.01)
    train(theirs, params, range(3))
    saved = through_file(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    ours, start = clone(params), clone(params)
    opt = Adam(ours, lr=0.01)
    opt.load_state_dict(saved)
    train(theirs, params, range(3, 6))
    train(opt, ours, range(3, 6))
    assert_follows(ours, params, start, 3)
    assert [float(state["step"]) for state in opt.state.values()] == [6.0] * 3


def test_keys_that_an_older_checkpoint_lacks_are_as_constructed_by_default() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.02, weight_decay=0.3, clip_value=0.5)
    train(opt, params, range(2))
    saved = copy.deepcopy(opt.state_dict())
    for name in ("amsgrad", "maximize", "clip_value", "multi_precision", "decoupled_weight_decay", "fused"):
        saved["param_groups"][0].pop(name, None)
    saved["param_groups"][0]["something_new"] = 3
    other = AdamW(clone(params), lr=0.5, clip_value=0.5)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["lr"] == 0.02
    assert group["weight_decay"] == 0.3
    assert group["decoupled_weight_decay"] is True
    assert group["clip_value"] == 0.5
    assert group["something_new"] == 3
    train(opt, params, range(2, 4))
    train(other, group["params"], range(2, 4))
    assert_same(everything(other), everything(opt))


def test_how_to_compute_stays_as_constructed() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, foreach=True)
    opt = AdamW(clone(params), fused=False, max_grad_norm=2.0)
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["fused"] is False
    assert opt.param_groups[0]["foreach"] is None
    assert opt.max_grad_norm == 2.0


# Other precisions than the checkpoint's.


def test_a_checkpoint_of_fp32_training_for_bf16_parameters() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.01)
    train(opt, params, range(3))
    low = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    resumed = AdamW(low, lr=0.01)
    with pytest.warns(UserWarning, match=NO_MASTER):
        resumed.load_state_dict(through_file(opt.state_dict()))
    for p, q in zip(params, low, strict=True):
        assert_same([resumed.state[q]["exp_avg"]], [opt.state[p]["exp_avg"]])  # not rounded


def test_a_checkpoint_of_bf16_training_for_fp32_parameters() -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW(params, lr=0.01)
    train(opt, params, range(3))
    high = [torch.nn.Parameter(master.clone()) for master in opt.master_weights()]
    resumed = AdamW(high, lr=0.01)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert all("master_remainder" not in state for state in resumed.state.values())
    for p, q in zip(params, high, strict=True):
        set_grads([p], 7)
        q.grad = p.grad.float() if p.grad is not None else None
        opt.param_groups[0]["lr"] = resumed.param_groups[0]["lr"] = 0.01
    for p, q in zip(params, high, strict=True):
        assert p.grad is not None
        assert q.grad is not None
    opt.step()
    resumed.step()
    assert_same([p.detach() for p in high], opt.master_weights())


def test_fp64_states_are_not_rounded() -> None:
    params = parameters(torch.float64)
    opt = AdamW(params, lr=0.01)
    train(opt, params, range(3))
    resumed = AdamW(clone(params), lr=0.01)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert_same(everything(resumed), everything(opt))
    assert resumed.state[resumed.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float64


def test_weights_may_be_loaded_before_or_after() -> None:
    for model_first in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).bfloat16()
        opt = AdamW(model.parameters(), lr=0.01)
        train(opt, list(model.parameters()), range(3))
        saved = through_file({"model": model.state_dict(), "opt": opt.state_dict()})
        fresh = torch.nn.Linear(5, 3).bfloat16()
        resumed = AdamW(fresh.parameters(), lr=0.01)
        train(resumed, list(fresh.parameters()), range(10, 12))  # loading replaces what is there
        if model_first:
            fresh.load_state_dict(saved["model"])
            resumed.load_state_dict(saved["opt"])
        else:
            resumed.load_state_dict(saved["opt"])
            fresh.load_state_dict(saved["model"])
        train(opt, list(model.parameters()), range(3, 5))
        train(resumed, list(fresh.parameters()), range(3, 5))
        assert_same(everything(resumed), everything(opt))


@EVERY_CLASS
def test_loading_into_an_optimizer_that_has_stepped(cls: Class) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    opt, resumed = make(cls, named(params)), make(cls, named(others), lr=0.5)
    train(opt, params, range(2))
    saved = copy.deepcopy(opt.state_dict())
    train(resumed, others, range(5, 8))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    resumed.load_state_dict(saved)
    assert_same(everything(resumed), everything(opt))
    train(opt, params, range(2, 4))
    train(resumed, others, range(2, 4))
    assert_same(everything(resumed), everything(opt))


def test_a_state_dict_of_an_optimizer_that_has_not_stepped() -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW(params)
    train(opt, params, range(2))
    opt.load_state_dict(AdamW(clone(params), lr=0.5).state_dict())
    assert not opt.state
    assert opt.param_groups[0]["lr"] == 0.5
    train(opt, params, range(1))
    assert [float(state["step"]) for state in opt.state.values()] == [1.0] * 3


# Refused, and nothing loaded.


def broken_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"] = saved["param_groups"][:1]


def broken_sizes(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"], saved["param_groups"][1]["params"] = [0, 1], [2]


def broken_shape(saved: dict[str, Any]) -> None:
    saved["state"][2]["exp_avg_sq"] = torch.zeros(4, 1)


def broken_master(saved: dict[str, Any]) -> None:
    saved["state"][1]["master_remainder"] = torch.zeros(2, 3, dtype=torch.int16)


def broken_value(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = [[0.0, 0.0]] * 3


def broken_step(saved: dict[str, Any]) -> None:
    saved["state"][1]["step"] = torch.zeros(2)


def broken_complex(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = torch.zeros(3, 2, dtype=torch.complex64)


def broken_betas(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["betas"] = (0.9, 2.0)


REFUSED = {
    broken_groups: "loaded state dict has a different number of parameter groups",
    broken_sizes: "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    broken_shape: r"exp_avg_sq of parameter 2 has shape \(4, 1\), but a parameter of shape \(1, 4\) needs \(1, 4\)",
    broken_master: r"master_remainder of parameter 1 has shape \(2, 3\)",
    broken_value: "exp_avg of parameter 1 is a list",
    broken_step: r"step of parameter 1 has shape \(2,\)",
    broken_complex: "exp_avg of parameter 1 is torch.complex64",
    broken_betas: "loaded state dict: Invalid beta parameter at index 1: 2.0",
}


@pytest.mark.parametrize("break_it", REFUSED, ids=lambda f: f.__name__)
def test_what_does_not_fit_is_refused_and_nothing_loaded(break_it: Any) -> None:
    params = parameters(torch.bfloat16)
    groups: list[dict[str, Any]] = [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}]
    opt = AdamW(groups)
    untouched = copy.deepcopy((params, opt))
    train(opt, params, range(2))
    train(untouched[1], untouched[0], range(2))
    others = clone(params)
    saver = AdamW([{"params": others[:1]}, {"params": others[1:]}], lr=0.25)
    train(saver, others, range(5))
    saved = saver.state_dict()
    break_it(saved)
    before, kept = everything(opt), [{**group, "params": None} for group in opt.param_groups]
    with pytest.raises(ValueError, match=REFUSED[break_it]):
        opt.load_state_dict(saved)
    assert_same(everything(opt), before)
    assert [{**group, "params": None} for group in opt.param_groups] == kept
    train(opt, params, range(2, 4))
    train(untouched[1], untouched[0], range(2, 4))
    assert_same(everything(opt), everything(untouched[1]))


def test_groups_are_checked_where_there_is_no_state_yet() -> None:
    opt = AdamW(parameters(), lr=0.5)
    saved = AdamW(parameters()).state_dict()
    saved["param_groups"][0]["betas"] = (0.9, 2.0)
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 2\.0"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.5
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)


def test_what_is_loaded_from_is_not_changed() -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW(params)
    train(opt, params, range(2))
    saved = through_file(opt.state_dict())
    kept = copy.deepcopy(saved)
    other = AdamW(clone(params))
    other.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    for i in range(3):
        assert list(saved["state"][i]) == list(kept["state"][i])
        assert_same(list(saved["state"][i].values()), list(kept["state"][i].values()))


def test_state_of_no_parameter_is_kept() -> None:
    """torch keeps it, too."""
    params = parameters()
    opt: Any = SGD(params, momentum=0.9)
    train(opt, params, range(1))
    saved = opt.state_dict()
    saved["state"]["extra"] = {"seen": 3}
    opt.load_state_dict(saved)
    assert opt.state["extra"] == {"seen": 3}
    train(opt, params, range(1, 2))
