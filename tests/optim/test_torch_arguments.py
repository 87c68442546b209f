"""Signatures, defaults, error messages and checkpoints of tritopt.optim beside those of torch.optim."""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tritopt.optim
from tests.optim.test_torch_parity import (
    OPTIONS,
    STEPS,
    Case,
    Run,
    arguments_of,
    assert_near,
    cases,
    groups_of,
    problem_of,
)

# With that file, whose runs of torch's classes are kept for both.
pytestmark = pytest.mark.xdist_group("optim.test_torch_parity")

NAMES = tuple(OPTIONS)
OURS_ALONE = {"SGD": {"step"}}  # in the state: without it the first step of a buffer could not be told from the others

BAD: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": -1.0}, {"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}],
    "Adagrad": [{"lr_decay": -1.0}, {"initial_accumulator_value": -0.5}],
    "Adadelta": [{"rho": 1.5}, {"rho": -0.1}],
    "RMSprop": [{"alpha": -1.0}, {"momentum": -1.0}],
    "NAdam": [{"momentum_decay": -1.0}],
    "Adafactor": [
        {"eps": (-1.0, 1e-3)},
        {"eps": (None, -1.0)},
        {"d": 0.5},
        {"beta2_decay": 1.0},
        {"lr": math.nan},
    ],
    "Adam": [
        {"lr": torch.tensor(0.1), "foreach": True},
        {"betas": (torch.tensor(0.9), 0.999)},
        {"betas": (torch.ones(2), torch.ones(2)), "capturable": True},
        {"eps": math.nan},
    ],
    "AdamW": [{"lr": torch.tensor(0.1), "foreach": True}, {"betas": (torch.tensor(0.9), 0.999)}],
}
BAD_RATES: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": torch.ones(2)},
    {"lr": torch.tensor(-1.0)},
    {"weight_decay": -1.0},
]
BAD_BETAS: list[dict[str, Any]] = [{"betas": (1.0, 0.9)}, {"betas": (-0.1, 0.9)}, {"betas": (0.9, 1.0)}]
TOGETHER: list[dict[str, Any]] = [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}]


def torch_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    cls: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    return cls


def our_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    cls: Callable[..., torch.optim.Optimizer] = getattr(tritopt.optim, name)
    return cls


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape))


def bad_arguments() -> list[Any]:
    params = []
    for name in NAMES:
        known = inspect.signature(torch_class(name)).parameters
        cases = [*BAD_RATES, *BAD.get(name, [])]
        cases += BAD_BETAS if "betas" in known else []
        cases += [{"eps": -1.0}] if "eps" in known and name != "Adafactor" else []
        cases += TOGETHER if "fused" in known else []
        params += [pytest.param(name, case, id=f"{name}-{case}".replace("\n", "")) for case in cases]
    return params


@pytest.mark.parametrize(("name", "arguments"), bad_arguments())
def test_bad_argument_has_torchs_error(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        torch_class(name)([parameter(3)], **arguments)
    with pytest.raises(expected.type) as raised:
        our_class(name)([parameter(3)], **arguments)
    assert str(raised.value) == str(expected.value)


def shared() -> Any:
    param = parameter(3)
    return [{"params": [param]}, {"params": [param]}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "params",
    [
        list,
        lambda: parameter(3),
        lambda: [1.0],
        lambda: [parameter(3) * 2],
        lambda: [{"params": {parameter(3)}}],
        lambda: [("w", parameter(3)), parameter(3)],
        shared,
    ],
    ids=["none", "tensor", "number", "no leaf", "set", "half named", "two groups"],
)
def test_bad_parameters_have_torchs_error(name: str, params: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        torch_class(name)(params())
    with pytest.raises(expected.type) as raised:
        our_class(name)(params())
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs(name: str) -> None:
    """Names, order, kinds and defaults; what is ours alone stands behind, by keyword."""
    theirs = list(inspect.signature(torch_class(name)).parameters.values())
    known = {parameter.name for parameter in theirs}
    ours = list(inspect.signature(our_class(name)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours if p.name in known] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    extra = [p for p in ours if p.name not in known]
    assert {p.kind for p in extra} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert {"capturable", "fused", "foreach", "maximize"} <= {p.name for p in ours}


@pytest.mark.parametrize("name", NAMES)
def test_groups_hold_torchs_defaults(name: str) -> None:
    (theirs,) = torch_class(name)([parameter(3)]).param_groups
    (ours,) = our_class(name)([parameter(3)]).param_groups
    assert {key: ours[key] for key in theirs if key != "params"} == {
        key: value for key, value in theirs.items() if key != "params"
    }
    extra = set(ours) - set(theirs)
    assert extra <= {"capturable", "fused", "clip_value", "multi_precision", "master", "state_dtype"}


@pytest.mark.parametrize("name", NAMES)
def test_bad_value_in_a_group_is_refused(name: str) -> None:
    """torch does not look at those, and computes nonsense."""
    key, value = next(
        (key, value)
        for key, value in (("eps", -1.0), ("betas", (0.9, 1.0)), ("momentum", -1.0), ("d", 0.5))
        if key in OPTIONS[name] and (name, key) != ("Adafactor", "eps")
    )
    opt = our_class(name)([parameter(3)])
    with pytest.raises(ValueError, match=r"-1\.0|1\.0|0\.5"):
        opt.add_param_group({"params": [parameter(2)], key: value})
    assert len(opt.param_groups) == 1


def test_nesterov_with_dampening_is_refused_in_a_group_too() -> None:
    opt = our_class("SGD")([parameter(3)], momentum=0.9, dampening=0.1)
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        opt.add_param_group({"params": [parameter(2)], "nesterov": True})


# Sparse gradients.


def sparse_grad(seed: int) -> torch.Tensor:
    """Sparse gradient of shape [5, 3], with a row that is there twice."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows = torch.tensor([[0, 3, 3]])
    return torch.sparse_coo_tensor(rows, torch.randn(3, 3, generator=generator), (5, 3), check_invariants=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("SGD", "Adagrad")])
def test_sparse_gradient_has_torchs_error(name: str) -> None:
    for make, messages in ((torch_class, []), (our_class, [])):
        param = parameter(5, 3)
        param.grad = sparse_grad(0)
        with pytest.raises(RuntimeError) as error:
            make(name)([param]).step()
        messages.append(str(error.value))
    assert len(set(messages)) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("SGD", "Adagrad")])
def test_refused_sparse_gradient_changes_nothing(name: str) -> None:
    param, other = parameter(5, 3), parameter(2)
    opt = our_class(name)([other, param])
    param.grad, other.grad = sparse_grad(0), torch.ones(2)
    before = [param.detach().clone(), other.detach().clone()]
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(param, before[0])
    assert torch.equal(other, before[1])
    assert not opt.state


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("SGD", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "nesterov": True}), ("Adagrad", {})],
    ids=str,
)
@pytest.mark.parametrize("fused", [None, False])
def test_sparse_gradients_that_torch_takes(name: str, arguments: dict[str, Any], fused: bool | None) -> None:
    """A checkpoint of torch's is taken too, whose momentum is sparse."""
    param, other = parameter(5, 3), parameter(5, 3)
    ours, theirs = our_class(name)([param], **arguments, fused=fused), torch_class(name)([other], **arguments)
    for seed in range(8):
        if seed == 4:
            with torch.no_grad():
                param.copy_(other)
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        param.grad, other.grad = sparse_grad(seed), sparse_grad(seed)
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, other, rtol=0, atol=1e-6)
    assert float((param.detach() - parameter(5, 3).detach()).abs().max()) > 1e-3


def test_adagrad_takes_no_sparse_gradient_with_decay() -> None:
    for make in (torch_class, our_class):
        param = parameter(5, 3)
        param.grad = sparse_grad(0)
        with pytest.raises(RuntimeError, match=r"^weight_decay option is not compatible with sparse gradients$"):
            make("Adagrad")([param], weight_decay=0.1).step()


# Checkpoints of one class, read by the other.


def without_schedule(name: str) -> list[Case]:
    """The cases of the trajectories, once each: schedulers keep a state of their own."""
    dropped = [Case(name, tuple({**dict(case.options), "scheduler": None}.items())) for case in cases(name)]
    return list(dict.fromkeys(dropped))


def make_opt(case: Case, is_ours: bool, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    options, arguments = dict(case.options), arguments_of(case, params[0].dtype)
    groups = groups_of(params, options, float(arguments["lr"]))
    if is_ours:
        return our_class(case.name)(groups, **arguments, capturable=options["capturable"], fused=False)
    return torch_class(case.name)(groups, **arguments)


def through_a_file(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def run_and_switch(case: Case, ours_first: bool) -> Run:
    problem = problem_of(case.name, STEPS)
    params = problem.parameters(torch.float32)
    opt = make_opt(case, ours_first, params)
    for step in range(STEPS):
        if step == STEPS // 3:
            saved = through_a_file(opt.state_dict())
            opt = make_opt(case, not ours_first, params)
            opt.load_state_dict(saved)
        problem.set_grads(step, params)
        opt.step()
    return problem.outcome(params)


@pytest.mark.parametrize("case", [case for name in NAMES for case in without_schedule(name)], ids=str)
def test_goes_on_from_torchs_checkpoint(case: Case) -> None:
    assert_near(run_and_switch(case, ours_first=False), case, torch.float32)


@pytest.mark.parametrize("case", [case for name in NAMES for case in without_schedule(name)], ids=str)
def test_torch_goes_on_from_our_checkpoint(case: Case) -> None:
    if dict(case.options)["capturable"]:  # which torch takes over with the group, and refuses on a CPU
        case = Case(case.name, tuple({**dict(case.options), "capturable": False}.items()))
    assert_near(run_and_switch(case, ours_first=True), case, torch.float32)


@pytest.mark.parametrize("case", [case for name in NAMES for case in without_schedule(name)], ids=str)
def test_state_has_torchs_names_shapes_and_dtypes(case: Case) -> None:
    problem = problem_of(case.name, 3)
    described = []
    for is_ours in (True, False):
        params = problem.parameters(torch.float32)
        opt = make_opt(case, is_ours, params)
        for step in range(3):
            problem.set_grads(step, params)
            opt.step()
        extra = OURS_ALONE.get(case.name, set()) if is_ours else set()
        described.append(
            [
                {k: (v.shape, v.dtype) for k, v in opt.state[p].items() if v is not None and k not in extra}
                for p in params
            ]
        )
    assert described[0] == described[1]


def test_sgd_begins_a_buffer_that_the_checkpoint_does_not_have() -> None:
    arguments: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    outcome = []
    for is_ours in (False, True):
        params = [parameter(3), parameter(4)]
        opt = torch_class("SGD")(params, **arguments)
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
        saved = opt.state_dict()
        saved["state"][1]["momentum_buffer"] = None
        opt = our_class("SGD")(params, **arguments) if is_ours else opt
        opt.load_state_dict(saved)
        for _ in range(3):
            opt.step()
        outcome.append(torch.cat([param.detach() for param in params]))
    torch.testing.assert_close(outcome[1], outcome[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [None, False])
def test_sgd_begins_a_buffer_when_momentum_is_switched_on(fused: bool | None) -> None:
    """The buffer is kept where momentum is switched off for a while."""
    params = [parameter(3), parameter(3)]
    opts = [
        torch_class("SGD")([params[0]], lr=0.1, dampening=0.5),
        our_class("SGD")([params[1]], lr=0.1, dampening=0.5, fused=fused),
    ]
    for momentum in (0.0, 0.0, 0.9, 0.9, 0.0, 0.9):
        for opt, param in zip(opts, params, strict=True):
            opt.param_groups[0]["momentum"] = momentum
            param.grad = torch.full_like(param, 0.5)
            opt.step()
    torch.testing.assert_close(params[1], params[0], rtol=0, atol=1e-6)


def test_adagrad_takes_the_first_sum_from_the_constructor() -> None:
    outcome = []
    for make in (torch_class, our_class):
        param = parameter(3)
        opt = make("Adagrad")(
            [{"params": [param], "initial_accumulator_value": 5.0}], lr=0.1, initial_accumulator_value=0.5
        )
        param.grad = torch.ones_like(param)
        opt.step()
        outcome.append(param.detach())
    torch.testing.assert_close(outcome[1], outcome[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize("fused", [None, False])
def test_adagrad_shares_its_sums(n_before: int, fused: bool | None) -> None:
    outcome = []
    for make, options in ((torch_class, {}), (our_class, {"fused": fused})):
        params = [parameter(3), parameter(4)]
        opt: Any = make("Adagrad")(params, lr=0.1, initial_accumulator_value=0.5, **options)
        for step in range(4):
            if step == n_before:
                opt.share_memory()
                assert all(opt.state[param]["sum"].is_shared() for param in params)
            for param in params:
                param.grad = torch.ones_like(param)
            opt.step()
        assert all(opt.state[param]["sum"].is_shared() for param in params)
        outcome.append(torch.cat([*params, *[opt.state[param]["sum"] for param in params]]).detach())
    torch.testing.assert_close(outcome[1], outcome[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "SGD"])
def test_step_saved_as_a_number_is_taken(name: str) -> None:
    """torch's optimizers of 2021 saved it so."""
    params = [parameter(3), parameter(3)]
    opts = [torch_class(name)([params[0]]), our_class(name)([params[1]])]
    for opt, param in zip(opts, params, strict=True):
        param.grad = torch.ones_like(param)
        opt.step()
    saved = opts[0].state_dict()
    saved["state"][0]["step"] = 6
    for opt in opts:
        opt.load_state_dict(copy.deepcopy(saved))  # tensors are taken as they are
        opt.step()
    torch.testing.assert_close(params[1], params[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_differentiable_refuses_hyperparameters_that_require_a_gradient(name: str) -> None:
    """Their derivative would be None, where torch's class has one."""
    param = torch.ones(3, requires_grad=True).clone()
    param.grad = torch.ones(3)
    value = torch.tensor(0.1, requires_grad=True)
    options: dict[str, Any] = {name: value}
    opt = tritopt.optim.AdamW([param], differentiable=True, **options)
    with pytest.raises(ValueError, match=f"{name}=.*requires a gradient: pass numbers"):
        opt.step()
