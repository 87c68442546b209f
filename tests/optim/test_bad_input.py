"""Input that does not fit is refused before anything is written: in torch's words where torch refuses it too."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch

from tests.support.training import (
    CLASSES,
    EVERY_CLASS,
    assert_same,
    counts,
    everything,
    options_of,
    parameters,
    set_grads,
    train,
    twin,
)
from tritopt import optim
from tritopt.optim import SGD, Adagrad, Adam, AdamW

Class: TypeAlias = Any  # a class of tritopt.optim, with a signature of its own
BF16 = torch.bfloat16


def error_of(make: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is the question
        make()
    return caught.type, str(caught.value)


# Arguments.

BAD_ARGUMENTS: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": torch.tensor([0.1, 0.2])},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"eps": -1e-8},
    {"eps": math.nan},
    {"weight_decay": -0.1},
    {"weight_decay": math.nan},
    {"momentum": -0.5},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"rho": 1.5},
    {"alpha": -0.1},
    {"lr_decay": -1.0},
    {"initial_accumulator_value": -1.0},
    {"momentum_decay": -1.0},
    {"beta2_decay": 1.0},
    {"d": 0.5},
    {"foreach": True, "fused": True},
    {"fused": True, "differentiable": True},
    {"lr": torch.tensor(0.1), "foreach": True, "capturable": False},
]
TORCHS = [
    pytest.param(cls, bad, id=f"{cls.__name__}-{bad}")
    for cls in CLASSES
    if twin(cls)
    for bad in BAD_ARGUMENTS
    if set(bad) <= set(options_of(twin(cls), **bad)) and not (cls.__name__ == "Adafactor" and "eps" in bad)  # a pair
    if not (cls is optim.Muon and "eps" in bad)  # of any sign in torch: a norm is at least 0
    if not (cls is SGD and any(value is math.nan for value in bad.values()))  # torch's takes NaN, see below
]
OURS = [
    pytest.param(cls, bad, id=f"{cls.__name__}-{bad}")
    for cls in CLASSES
    if not twin(cls)
    for bad in BAD_ARGUMENTS
    if len(bad) == 1 and set(bad) <= set(options_of(cls, **bad)) and "nesterov" not in bad
]


@pytest.mark.parametrize(("cls", "bad"), TORCHS)
def test_arguments_are_refused_in_torchs_words_and_taken_where_it_takes_them(cls: Class, bad: dict[str, Any]) -> None:
    try:
        twin(cls)(parameters(), **bad)
    except (ValueError, RuntimeError) as error:
        expected = type(error), str(error)
    else:
        if any(value is math.nan for value in bad.values()):  # torch's SGD takes it
            with pytest.raises(ValueError, match="nan must not be NaN"):
                cls(parameters(), **bad)
        else:
            cls(parameters(), **bad)
        return
    assert error_of(lambda: cls(parameters(), **bad)) == expected


@pytest.mark.parametrize(("cls", "bad"), OURS)
def test_arguments_of_classes_that_torch_lacks(cls: Class, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Invalid|must|needs|one element"):
        cls(parameters(), **options_of(cls, **bad))


@EVERY_CLASS
@pytest.mark.parametrize("name", ["max_grad_norm", "clip_value"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, -math.inf])
def test_bounds_that_are_not_positive(cls: Class, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be > 0; None does not clip"):
        cls(parameters(), **options_of(cls), **{name: value})


@pytest.mark.parametrize("name", ["max_grad_norm", "clip_value"])
def test_bounds_that_are_no_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=nan must not be NaN"):
        AdamW(parameters(), **{name: math.nan})  # type: ignore[arg-type]
    for value in ("1", True, [1.0]):
        with pytest.raises(TypeError, match="must be a number"):
            AdamW(parameters(), **{name: value})  # type: ignore[arg-type]


@EVERY_CLASS
def test_unknown_keywords(cls: Class) -> None:
    with pytest.raises(
        TypeError,
        match=r"unexpected keyword argument 'max_norm'.*multi_precision, master, state_dtype, rounding_seed",
    ):
        cls(parameters(), **options_of(cls), max_norm=1.0)


@EVERY_CLASS
@pytest.mark.parametrize("value", ["False", 1, None])
def test_multi_precision_that_is_no_bool(cls: Class, value: Any) -> None:
    with pytest.raises(TypeError, match=f"multi_precision={value!r} must be True or False"):
        cls(parameters(), **options_of(cls), multi_precision=value)


@EVERY_CLASS
def test_an_argument_is_named_as_it_was_given(cls: Class) -> None:
    """The rule may have another name for it, as for eps; and a word in place of a switch is no switch."""
    taken = inspect.signature(cls).parameters
    for name in taken.keys() & cls.arguments.keys() - {"adjust_lr_fn"}:  # in torch's words
        value = ("False",) * len(default) if isinstance(default := taken[name].default, tuple) else "False"
        with pytest.raises((TypeError, ValueError), match=f"^{name}={re.escape(repr(value))} must be"):
            cls(parameters(), **{**options_of(cls), name: value})
    with pytest.raises(ValueError, match=r"^clip_value=nan must"):
        cls(parameters(), **options_of(cls), clip_value=math.nan)


# Parameters.


def leafless() -> Any:
    return [torch.ones(2, requires_grad=True) * 2]


def in_two_groups() -> Any:
    params = parameters()
    return [{"params": params}, {"params": params[:1]}]


def named_in_part() -> Any:
    params = parameters()
    return [("a", params[0]), params[1]]


BAD_PARAMETERS: dict[str, Callable[[], Any]] = {
    "empty": list,
    "a tensor": lambda: torch.ones(2),
    "a string": lambda: "abc",
    "numbers": lambda: [1.0],
    "a set": lambda: [{"params": set(parameters())}],
    "not a leaf": leafless,
    "in two groups": in_two_groups,
    "named in part": named_in_part,
    "a group without params": lambda: [{"lr": 0.1}],
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_parameters_that_torch_refuses_are_refused_in_its_words(name: str, cls: Class) -> None:
    expected = error_of(lambda: twin(cls)(BAD_PARAMETERS[name]()))
    assert error_of(lambda: cls(BAD_PARAMETERS[name]())) == expected


def test_a_parameter_twice_in_a_group() -> None:
    """torch warns, and updates it twice; here it is refused in the step, before anything is written."""
    params = parameters()
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        torch.optim.AdamW([params[0], params[0]])
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        opt = AdamW([params[0], params[1], params[0]])
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="parameters 0 and 2 share memory"):
        opt.step()
    assert_same([p.detach() for p in params], before)
    assert not opt.state


@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_frozen_parameters_may_have_any_dtype(cls: Class, dtype: torch.dtype) -> None:
    """A model with packed integers hands all its parameters over, as it does to torch's."""
    frozen, params = torch.nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False), parameters()
    opt = cls([frozen, *params], **options_of(cls))
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(frozen, torch.ones(2, 2).to(dtype))
    assert frozen not in opt.state
    again = cls([frozen, *params], **options_of(cls))
    again.load_state_dict(opt.state_dict())
    again.step()
    assert len(again.master_weights()) == 1 + len(params)


def test_a_complex_parameter_that_was_frozen_is_refused_with_its_first_gradient() -> None:
    z, p = (
        torch.nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False),
        torch.nn.Parameter(torch.ones(2)),
    )
    opt = AdamW([z, p], lr=0.1)
    z.requires_grad_()
    z.grad, p.grad = torch.ones_like(z), torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 is torch.complex64.*view_as_real"):
        opt.step()
    assert_same([p.detach()], [torch.ones(2)])
    assert not opt.state


@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e5m2])
def test_dtypes_that_no_kernel_takes(cls: Class, dtype: torch.dtype) -> None:
    wrong = torch.zeros(2, 2).to(dtype).requires_grad_()
    why = "does not support complex parameters.*view_as_real" if dtype.is_complex else "takes float16 to float64"
    message = f"{dtype}, and {cls.__name__} {why}"
    with pytest.raises(ValueError, match=message):
        cls([*parameters(), wrong], **options_of(cls))
    opt = cls(parameters(), **options_of(cls))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [wrong]})
    assert len(opt.param_groups) == 1


def test_view_as_real_is_the_way_out() -> None:
    z = torch.randn(3, 2, dtype=torch.complex64)
    p = torch.view_as_real(z).requires_grad_()
    opt = AdamW([p], lr=0.1)
    before = z.clone()
    p.grad = torch.ones_like(p)
    opt.step()
    assert not torch.equal(z, before)


# Steps that fail leave everything as it was.


def one_too_short(opt: Any, params: Any) -> None:
    opt.state[params[1]]["exp_avg"] = torch.zeros(2, 2)


def elsewhere(opt: Any, params: Any) -> None:
    opt.state[params[1]]["exp_avg"] = torch.zeros(3, 2, device="meta")


def integers(opt: Any, params: Any) -> None:
    opt.state[params[1]]["exp_avg_sq"] = torch.zeros(3, 2, dtype=torch.int64)


def shared(opt: Any, params: Any) -> None:
    opt.state[params[1]]["exp_avg_sq"] = opt.state[params[1]]["exp_avg"]


def resized(opt: Any, params: Any) -> None:
    params[1].data = torch.zeros(3, 1)


def lr_is_nan(opt: Any, params: Any) -> None:
    opt.param_groups[1]["lr"] = math.nan


def lr_is_infinite(opt: Any, params: Any) -> None:
    opt.param_groups[1]["lr"] = math.inf


def lr_is_a_string(opt: Any, params: Any) -> None:
    opt.param_groups[1]["lr"] = "fast"


def beta_is_two(opt: Any, params: Any) -> None:
    opt.param_groups[1]["betas"] = (0.9, 2.0)


def clip_is_nan(opt: Any, params: Any) -> None:
    opt.param_groups[1]["clip_value"] = math.nan


def decay_is_nan(opt: Any, params: Any) -> None:
    opt.param_groups[1]["weight_decay"] = math.nan


def master_is_short(opt: Any, params: Any) -> None:
    opt.state[params[1]]["master_remainder"] = torch.zeros(2, 2, dtype=torch.int16)


def expanded(opt: Any, params: Any) -> None:
    params[1].data = torch.zeros(1).bfloat16().expand(3, 2)


FAILURES: dict[Callable[..., None], str] = {
    one_too_short: r"state of shape \(2, 2\) on cpu for a weight of shape \(3, 2\)",
    elsewhere: "on meta",
    integers: "a state is torch.int64",
    shared: "share memory",
    resized: r"gradient of shape \(3, 2\) for a weight of shape \(3, 1\)",
    lr_is_nan: "Invalid learning rate: nan",
    lr_is_infinite: "lr=inf must be finite",
    lr_is_a_string: "fast",
    beta_is_two: "Invalid beta parameter at index 1: 2.0",
    clip_is_nan: "nan",
    decay_is_nan: "Invalid weight_decay value: nan",
    master_is_short: r"state of shape \(2, 2\)",
    expanded: "share memory",
}


@pytest.mark.parametrize("break_it", FAILURES, ids=lambda f: f.__name__)
def test_a_step_that_fails_changes_nothing(break_it: Callable[..., None]) -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.01)
    train(opt, params, range(2))
    set_grads(params, 2)
    break_it(opt, params)
    before = everything(opt)
    with pytest.raises((ValueError, TypeError), match=FAILURES[break_it]):
        opt.step()
    assert_same([t for t in everything(opt) if t.device.type != "meta"], [t for t in before if t.device.type != "meta"])


@EVERY_CLASS
def test_a_first_step_that_fails_leaves_no_states(cls: Class) -> None:
    params = parameters()
    opt = cls(params, **options_of(cls))
    set_grads(params, 0)
    kept, params[2].data = params[2].data, torch.zeros(4, 4)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"gradient of shape \(1, 4\) for a weight of shape \(4, 4\)"):
        opt.step()
    assert_same([p.detach() for p in params], before)
    assert not opt.state or (cls is Adagrad and counts(opt, params) == [0] * 3)  # whose states the constructor makes
    params[2].data = kept  # mended, it goes on as if nothing had been
    opt.step()
    expected = parameters()
    plain = cls(expected, **options_of(cls))
    train(plain, expected, range(1))
    assert_same(everything(opt), everything(plain))


def test_a_step_that_failed_may_be_repeated() -> None:
    params, expected = parameters(torch.bfloat16), parameters(torch.bfloat16)
    opt, plain = AdamW(params, lr=0.01), AdamW(expected, lr=0.01)
    train(opt, params, range(2))
    train(plain, expected, range(3))
    set_grads(params, 2)
    opt.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        opt.step()
    opt.param_groups[0]["lr"] = 0.01
    opt.step()
    assert_same(everything(opt), everything(plain))


def test_parameters_on_several_devices() -> None:
    """A device each in turn; here the meta device stands for another."""
    (here,), elsewhere = parameters(shapes=((3, 2),)), torch.nn.Parameter(torch.zeros(2, 2, device="meta"))
    opt = AdamW([here, elsewhere], lr=0.01)
    (expected,) = parameters(shapes=((3, 2),))
    plain = AdamW([expected], lr=0.01)
    for step in range(2):
        set_grads([here], step)
        set_grads([expected], step)
        elsewhere.grad = torch.zeros_like(elsewhere)
        opt.step()
        plain.step()
    assert torch.equal(here, expected)
    assert opt.state[elsewhere]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("cls", [c for c in CLASSES if twin(c)], ids=lambda cls: cls.__name__)
def test_sparse_gradients_that_torch_refuses_are_refused_in_its_words(cls: Class) -> None:
    def step(kind: Any) -> None:
        (p,) = parameters(shapes=((4, 3),))
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (4, 3))
        kind([p], **options_of(cls)).step()

    try:
        step(twin(cls))
    except (RuntimeError, NotImplementedError):
        assert error_of(lambda: step(cls)) == error_of(lambda: step(twin(cls)))
    else:
        step(cls)


def test_fused_true_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    opt = Adam(params, fused=True)
    monkeypatch.setattr("tritopt.optim.step.build.unavailable", lambda *_: "no kernel here")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            opt.add_param_group({"params": parameters(shapes=((step + 1,),))})  # such a step is not like the last
            set_grads([p for group in opt.param_groups for p in group["params"]], step)
            opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
    (warning,) = caught
    assert "fused=True on the CPU runs the reference: no kernel here" in str(warning.message)


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize(("before", "after"), [(BF16, torch.float16), (torch.float16, BF16)])
def test_states_that_do_not_fit_any_more_name_torchs_way_out(
    before: torch.dtype, after: torch.dtype, fused: bool | None
) -> None:
    model = torch.nn.Linear(5, 3).to(before)
    opt = Adam(model.parameters(), fused=fused, master="kahan")
    set_grads(list(model.parameters()), 0)
    opt.step()
    model.to(after)
    set_grads(list(model.parameters()), 1)
    opt.step()  # a master that is one of another dtype's is made anew
    opt.state[model.weight]["exp_avg"] = torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"a state is torch.int64 beside a weight that is {after}") as caught:
        opt.step()
    assert "create_state" not in str(caught.value)
    assert "optimizer.load_state_dict(optimizer.state_dict())" in str(caught.value)
    opt.state[model.weight]["exp_avg"] = torch.zeros(3, 5)
    model.weight.data, model.weight.grad = torch.zeros(2, 5, dtype=after), None
    model.weight.grad = torch.ones(2, 5, dtype=after)
    with pytest.raises(ValueError, match="a parameter of another shape needs a new optimizer"):
        opt.step()


def test_a_norm_for_one_group_is_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="not a param_group's"):
        optim.AdamW([{"params": params, "max_grad_norm": 1.0}])
    opt = optim.AdamW(params[:1])
    with pytest.raises(ValueError, match="not a param_group's"):
        opt.add_param_group({"params": params[1:], "max_grad_norm": 1.0})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), "x"])
def test_a_norm_that_is_assigned_later_is_checked(bad: Any) -> None:
    params = parameters()
    opt = optim.AdamW(params)
    set_grads(params, 0)
    opt.max_grad_norm = bad
    before = [param.detach().clone() for param in params]
    with pytest.raises((ValueError, TypeError), match="max_grad_norm="):
        opt.step()
    assert_same([param.detach() for param in params], before)
    assert not opt.state


@pytest.mark.parametrize(("one", "other"), [(optim.SGD, optim.AdamW), (optim.AdamW, optim.SGD)])
def test_a_checkpoint_of_another_optimizer_is_refused(one: Any, other: Any) -> None:
    params = parameters()
    options = {optim.SGD: {"momentum": 0.9}, optim.AdamW: {}}
    saved = one(params, lr=0.1, **options[one])
    set_grads(params, 0)
    saved.step()
    state = saved.state_dict()
    opt = other(params, lr=0.1, **options[other])
    state["param_groups"] = opt.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="another optimizer's"):
        opt.load_state_dict(state)
    assert not opt.state
