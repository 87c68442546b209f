"""The optimizers that torch lacks: they are the rules of the MXNet face, behind torch's protocol."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import pytest
import torch

import tritopt
from tests.support.training import CLASSES, Params, assert_same, clone, counts, everything, parameters, set_grads, train
from tritopt import optim
from tritopt.engine.launcher import n_launches
from tritopt.kernels.formats.weights import SPLIT16
from tritopt.optim.beyond_torch import BeyondTorch

PATHS = pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
MATRICES = ((5, 7), (2, 3))
STEPS = range(1, 5)


class Case(NamedTuple):
    """A class with hyperparameters, and the optimizer of the MXNet face with the same."""

    cls: Any
    options: dict[str, Any]
    name: str
    arguments: dict[str, Any]
    states: set[str]
    decays: bool = True

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of parameters that the class takes: some take matrices only."""
        try:
            self.cls([torch.zeros(6)])
        except ValueError:
            return MATRICES
        return (*MATRICES, (6,), ())


BETAS = {"betas": (0.6, 0.8)}, {"beta1": 0.6, "beta2": 0.8}
BOUNDS = {"lower_bound": 0.1, "upper_bound": 1.5}
MOMENTS = {"exp_avg", "exp_avg_sq"}
WITH_OPTIONS = [
    Case(optim.LAMB, {"eps": 1e-6}, "lamb", {"epsilon": 1e-6}, MOMENTS),
    Case(
        optim.LAMB, {**BETAS[0], **BOUNDS, "eps": 1e-3, "bias_correction": False}, "lamb",
        {**BETAS[1], **BOUNDS, "epsilon": 1e-3, "bias_correction": False}, MOMENTS,
    ),
    Case(optim.LANS, {**BETAS[0], **BOUNDS, "eps": 1e-3}, "lans", {**BETAS[1], **BOUNDS, "epsilon": 1e-3}, MOMENTS),
    Case(
        optim.LARS, {"momentum": 0.7, "trust_coefficient": 0.5, "eps": 0.1}, "lars",
        {"momentum": 0.7, "eta": 0.5, "epsilon": 0.1}, {"momentum_buffer"},
    ),
    Case(optim.LARS, {"momentum": 0.0, "trust_coefficient": 0.5}, "lars", {"momentum": 0.0, "eta": 0.5}, set()),
    Case(optim.NAG, {"momentum": 0.7}, "nag", {"momentum": 0.7}, {"momentum_buffer"}),
    Case(optim.NAG, {"momentum": 0.0}, "nag", {"momentum": 0.0}, set()),
    Case(
        optim.Signum, {"momentum": 0.7, "wd_lh": 0.05}, "signum", {"momentum": 0.7, "wd_lh": 0.05},
        {"momentum_buffer"},
    ),
    Case(optim.Signum, {"momentum": 0.0, "wd_lh": 0.05}, "signum", {"momentum": 0.0, "wd_lh": 0.05}, set()),
    Case(optim.Lion, BETAS[0], "lion", BETAS[1], {"exp_avg"}),
    Case(
        optim.Adan, {"betas": (0.6, 0.7, 0.8), "eps": 1e-3}, "adan",
        {"beta1": 0.6, "beta2": 0.7, "beta3": 0.8, "epsilon": 1e-3},
        {"exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"},
    ),
    Case(
        optim.AdaBelief, {**BETAS[0], "eps": 1e-3}, "adabelief", {**BETAS[1], "epsilon": 1e-3},
        {"exp_avg", "exp_avg_var"},
    ),
    Case(
        optim.AdaBelief, {"eps": 1e-8, "correct_bias": False}, "adabelief", {"epsilon": 1e-8, "correct_bias": False},
        {"exp_avg", "exp_avg_var"},
    ),
    Case(optim.Ftrl, {"lambda1": 0.3, "beta": 0.5}, "ftrl", {"lamda1": 0.3, "beta": 0.5}, {"z", "n"}),
    Case(optim.FTML, {**BETAS[0], "eps": 0.1}, "ftml", {**BETAS[1], "epsilon": 0.1}, {"d", "v", "z"}),
    Case(optim.DCASGD, {"momentum": 0.7, "lambd": 2.0}, "dcasgd", {"momentum": 0.7, "lamda": 2.0},
         {"momentum_buffer", "previous_weight"}),
    Case(optim.DCASGD, {"lambd": 2.0}, "dcasgd", {"lamda": 2.0}, {"previous_weight"}),
    Case(optim.SGLD, {"seed": 3}, "sgld", {"seed": 3}, set()),
    Case(optim.GroupAdaGrad, {"eps": 0.1}, "groupadagrad", {"epsilon": 0.1}, {"history"}, decays=False),
]  # fmt: skip
OTHERS = [cls for cls in CLASSES if issubclass(cls, BeyondTorch)]


def by_default(cls: Any) -> Case:
    """A class without a case above, as both faces name what its constructor takes."""
    opt = cls([torch.zeros(2, 2)])
    group, arguments = opt.param_groups[0], dict[str, Any]()
    for name, target in cls.arguments.items():
        if name != "weight_decay":
            one = isinstance(target, str)
            arguments.update([(target, group[name])] if one else zip(target, group[name], strict=True))
    rule = cls.rule()
    states = {cls.state_keys.get(name, name) for name in rule.state_names}
    return Case(cls, {}, cls.rule.__name__.removesuffix("Rule").lower(), arguments, states, rule.decays)


CASES = [*WITH_OPTIONS, *(by_default(cls) for cls in OTHERS if cls not in [case.cls for case in WITH_OPTIONS])]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=[f"{case.cls.__name__}-{i}" for i, case in enumerate(CASES)])
EVERY_OTHER = pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)


def shapes_of(cls: type[optim.Optimizer]) -> tuple[tuple[int, ...], ...]:
    return next(case.shapes for case in CASES if case.cls is cls)


def flat(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [] if state is None else [tensor for item in state for tensor in flat(item)]


def test_torch_has_none_of_them() -> None:
    assert OTHERS
    assert all(not hasattr(torch.optim, cls.__name__) for cls in OTHERS)


@EVERY_CASE
@pytest.mark.parametrize(
    ("fused", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)],
    ids=["kernel", "reference", "kernel bf16"],
)
def test_is_the_rule_of_the_mxnet_face(case: Case, fused: bool, dtype: torch.dtype) -> None:
    """Weights, masters and states, in every bit and after every step; decay, clip and scale are the rule's too."""
    wd = 0.1 if case.decays else 0.0
    params = parameters(dtype, case.shapes)
    weights, names = [p.detach().clone() for p in params], list(range(len(params)))
    opt = case.cls(params, lr=0.05, weight_decay=wd, clip_value=0.5, fused=fused, **case.options)
    other = tritopt.create(
        case.name,
        learning_rate=0.05,
        wd=wd,
        clip_gradient=0.5,
        use_fused_step=fused,
        multi_precision=True,
        master="split16",
        **case.arguments,
    )
    states = [other.create_state_multi_precision(i, w) for i, w in zip(names, weights, strict=True)]
    start = [w.clone() for w in weights]
    for step in STEPS:
        set_grads(params, step)
        opt.step()
        other.update_multi_precision(names, weights, [p.grad for p in params], states)
        assert_same([p.detach() for p in params], weights)
        for p, state in zip(params, states, strict=True):
            kept = {name: value for name, value in opt.state[p].items() if name != "step"}
            assert set(kept) == case.states | ({SPLIT16.companion} if dtype == torch.bfloat16 else set())
            expected = {id(tensor): tensor for tensor in flat(state)}
            assert len(kept) == len(expected)
            for value in kept.values():
                same = [key for key, tensor in expected.items() if torch.equal(tensor, value)]
                assert same, "a state that the other face does not have"
                del expected[same[0]]
        assert counts(opt, params) == [step] * len(params)
    assert all(torch.any(w != first) for w, first in zip(weights, start, strict=True))


RATES = {"LARS": 5.0, "Ftrl": 1.0, "FTML": 0.05, "GroupAdaGrad": 0.1, "SGLD": 1e-4, "LAMB": 0.05, "LANS": 0.05}


@EVERY_OTHER
def test_trains(cls: Any) -> None:
    """A linear model on linear data: the loss falls to a tenth in 150 steps."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    y = x @ torch.randn(6, 3, generator=generator)
    weight = torch.nn.Parameter(0.1 * torch.randn(6, 3, generator=generator))
    # SGLD wants the gradient of the whole log posterior, the others are content with a mean.
    scale = 64 * 100 if cls is optim.SGLD else 1
    opt = cls([weight], lr=RATES.get(cls.__name__, 0.02), fused=False, weight_decay=0.0)
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = (x @ weight - y).square().mean()
        (scale * loss).backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@EVERY_CASE
def test_groups_with_their_own_options_share_the_launches(case: Case) -> None:
    """Each group goes where it would go alone, in as many launches as one group takes."""

    def groups(params: Params) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = [
            {"params": [p], "lr": 0.01 * (i + 1), "clip_value": 0.5 + i} for i, p in enumerate(params)
        ]
        for i, group in enumerate(made):
            group["weight_decay"] = 0.1 * i if case.decays else 0.0
            if "betas" in case.options:
                group["betas"] = tuple(0.5 + 0.1 * i + 0.05 * j for j in range(len(case.options["betas"])))
            if "eps" in case.options:
                group["eps"] = 1e-3 * (i + 1)
        return made

    params = parameters(shapes=case.shapes)
    opt = case.cls(groups(params), lr=1.0, **case.options)
    before = n_launches()
    train(opt, params, range(1, 2))
    together = n_launches() - before
    assert together > 0
    train(opt, params, range(2, 4))
    assert n_launches() - before == 3 * together

    # SGLD's noise goes by the name, or else the position.
    alone = clone(parameters(shapes=case.shapes))
    alone_opts = [
        case.cls([{**group, "params": [(i, p)]}], lr=1.0, **case.options)
        for i, (group, p) in enumerate(zip(groups(alone), alone, strict=True))
    ]
    for step in range(1, 4):
        set_grads(alone, step)
        before = n_launches()
        alone_opts[0].step()
        assert n_launches() - before == together
        for single in alone_opts[1:]:
            single.step()
    assert_same([p.detach() for p in params], [p.detach() for p in alone])


@EVERY_CASE
def test_maximize_descends_the_negative(case: Case) -> None:
    up, down = parameters(shapes=case.shapes), parameters(shapes=case.shapes)
    ascending = case.cls(up, lr=0.05, maximize=True, **case.options)
    descending = case.cls(down, lr=0.05, **case.options)
    for step in STEPS:
        set_grads(up, step)
        set_grads(down, step, scale=-1.0)
        ascending.step()
        descending.step()
    assert_same(everything(ascending), everything(descending))
    other = parameters(shapes=case.shapes)
    train(case.cls(other, lr=0.05, **case.options), other, STEPS)
    assert not torch.equal(other[0], up[0])


@PATHS
@EVERY_CASE
def test_sparse_gradient_is_the_dense_one(case: Case, fused: bool) -> None:
    dense, sparse = parameters(shapes=MATRICES), parameters(shapes=MATRICES)
    opts = [case.cls(params, lr=0.05, fused=fused, **case.options) for params in (dense, sparse)]
    for step in STEPS:
        set_grads(dense, step)
        for p, q in zip(dense, sparse, strict=True):
            assert p.grad is not None
            p.grad[1::2] = 0
            q.grad = p.grad.to_sparse(1)
        for opt in opts:
            opt.step()
    assert_same(everything(opts[1]), everything(opts[0]))


NO_BOUNDS: dict[str, Any] = dict.fromkeys(("lower_bound", "upper_bound"))
DEFAULTS: dict[str, dict[str, Any]] = {
    "LAMB": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True,
             **NO_BOUNDS},
    "LANS": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, **NO_BOUNDS},
    "LARS": {"lr": 0.1, "momentum": 0.9, "trust_coefficient": 1e-3, "eps": 1e-8, "layer_wise": True},
    "NAG": {"lr": 1e-3, "momentum": 0.9},
    "Signum": {"lr": 0.01, "momentum": 0.9, "wd_lh": 0.0},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99)},
    "Adan": {"lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.02},
    "AdaBelief": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-16, "correct_bias": True},
    "Ftrl": {"lr": 0.1, "lambda1": 0.01, "beta": 1.0},
    "FTML": {"lr": 0.0025, "betas": (0.6, 0.999), "eps": 1e-8},
    "DCASGD": {"lr": 0.1, "momentum": 0.0, "lambd": 0.04},
    "SGLD": {"lr": 0.1, "seed": 0},
    "GroupAdaGrad": {"lr": 0.01, "eps": 1e-6},
}  # fmt: skip
"""Defaults that papers, the authors' code or MXNet have; of a class that is not here, those of its signature."""
COMMON = {
    "weight_decay": 0.0,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "clip_value": None,
    "multi_precision": True,
    "master": "auto",
    "state_dtype": None,
}


@EVERY_OTHER
def test_defaults_and_signature(cls: Any) -> None:
    signature = inspect.signature(cls).parameters
    own = {name: p.default for name, p in signature.items() if p.default is not p.empty}
    assert cls([torch.zeros(2, 2)]).defaults == {**COMMON, **DEFAULTS.get(cls.__name__, own)}
    kinds = {name: parameter.kind for name, parameter in signature.items()}
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused"):
        assert kinds[name] == inspect.Parameter.KEYWORD_ONLY
    assert all(argument in cls.__doc__ for argument in kinds if argument not in COMMON)


@PATHS
def test_lars_rates_are_layer_wise_where_the_group_says_so(fused: bool) -> None:
    shapes = ((5, 7), (6,), (2, 3), (4,))
    params, expected = parameters(shapes=shapes), parameters(shapes=shapes)
    plain: dict[str, Any] = {"params": params[1:], "layer_wise": False, "weight_decay": 0.0}
    opt = optim.LARS([{"params": params[:1]}, plain], lr=0.1, trust_coefficient=0.5, weight_decay=0.1, fused=fused)
    names = {0: "fc_weight", 1: "fc_bias", 2: "bn_gamma", 3: "bn_beta"}
    mxnet = tritopt.create("lars", learning_rate=0.1, momentum=0.9, eta=0.5, wd=0.1, param_idx2name=names)
    mxnet.set_wd_mult({1: 0.0, 2: 0.0, 3: 0.0})
    mxnet.use_fused_step = fused
    weights = [p.detach() for p in expected]
    states = [mxnet.create_state(i, w) for i, w in enumerate(weights)]
    for step in STEPS:
        set_grads(params, step)
        opt.step()
        mxnet.update(list(names), weights, [p.grad for p in params], states)
    assert_same([p.detach() for p in params], weights)


def test_nag_is_torchs_nesterov_momentum_at_a_constant_rate() -> None:
    params, expected = parameters(torch.float64), parameters(torch.float64)
    train(optim.NAG(params, lr=0.05, momentum=0.8, weight_decay=0.1), params, STEPS)
    train(torch.optim.SGD(expected, lr=0.05, momentum=0.8, weight_decay=0.1, nesterov=True), expected, STEPS)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


def test_sgld_goes_by_name_or_position_and_by_seed() -> None:
    def noise(seed: int, *names: str, reverse: bool = False) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
        given: Any = list(zip(names, params, strict=True)) if names else params
        opt = optim.SGLD(given[::-1] if reverse else given, seed=seed)
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        return [p.detach() for p in params]

    first, second = noise(0, "a", "b")
    assert_same(noise(0, "a", "b", reverse=True), [first, second])
    drawn = [first, second, *noise(0), *noise(1), *noise(1, "a", "b")]
    assert all(not torch.equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    *[(cls, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0") for cls in OTHERS],
    *[(cls, {"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1") for cls in OTHERS],
    *[
        (cls, {"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0")
        for cls in OTHERS
        if "eps" in inspect.signature(cls).parameters
    ],
    *[
        (cls, {"betas": (0.5, 1.0, 0.5)[: len(betas.default)]}, ValueError, "beta parameter at index 1: 1.0")
        for cls in OTHERS
        if (betas := inspect.signature(cls).parameters.get("betas"))
    ],
    *[
        (cls, {"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5")
        for cls in OTHERS
        if "momentum" in inspect.signature(cls).parameters
    ],
    (optim.Adan, {"betas": (0.9, 0.999)}, ValueError, "betas=(0.9, 0.999) must be 3 numbers"),
    (optim.Adan, {"betas": (0.9, 0.999, -0.1)}, ValueError, "Invalid beta parameter at index 2: -0.1"),
    (optim.Lion, {"betas": 0.9}, ValueError, "betas=0.9 must be 2 numbers"),
    (optim.LAMB, {"betas": (0.9, 0.99, 0.999)}, ValueError, "must be 2 numbers"),
    (optim.Signum, {"momentum": 1.0}, ValueError, "momentum=1.0 must be in [0, 1)"),
    (optim.Signum, {"wd_lh": "0"}, TypeError, "wd_lh='0' must be a number"),
    (optim.LARS, {"trust_coefficient": -1.0}, ValueError, "trust_coefficient=-1.0 must be >= 0"),
    (optim.LARS, {"layer_wise": "no"}, TypeError, "layer_wise='no' must be True or False"),
    (optim.AdaBelief, {"correct_bias": 1}, TypeError, "correct_bias=1 must be True or False"),
    (optim.Ftrl, {"lambda1": -1.0}, ValueError, "lambda1=-1.0 must be >= 0"),
    (optim.Ftrl, {"beta": -1.0}, ValueError, "beta=-1.0 must be >= 0"),
    (optim.DCASGD, {"lambd": float("nan")}, ValueError, "lambd=nan must not be NaN"),
    (optim.SGLD, {"seed": -1}, ValueError, "seed=-1 must be >= 0"),
    (optim.SGLD, {"seed": 0.5}, TypeError, "seed=0.5 must be an int"),
    (optim.GroupAdaGrad, {"weight_decay": 0.1}, ValueError, "got weight_decay=0.1: set weight_decay to 0"),
    (optim.LAMB, {"max_grad_norm": 0.0}, ValueError, "max_grad_norm=0.0 must be > 0"),
    (optim.LAMB, {"beta1": 0.9}, TypeError, "unexpected keyword argument 'beta1'"),
    (optim.Lion, {"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
]


@pytest.mark.parametrize(("cls", "options", "error", "message"), BAD)
def test_bad_arguments(cls: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cls([torch.zeros(2, 2)], **options)


def test_bad_group_is_not_added() -> None:
    opt = optim.GroupAdaGrad([torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="no weight decay"):
        opt.add_param_group({"params": [torch.zeros(3, 3)], "weight_decay": 0.1})
    assert len(opt.param_groups) == 1


def test_groupadagrad_refuses_what_is_no_matrix_when_it_is_given() -> None:
    params = parameters(shapes=((2, 3), (4,)))
    with pytest.raises(ValueError, match="needs a 2-D weight"):
        optim.GroupAdaGrad(params)
    opt = optim.GroupAdaGrad(params[:1])
    with pytest.raises(ValueError, match="needs a 2-D weight"):
        opt.add_param_group({"params": params[1:]})
    assert len(opt.param_groups) == 1
    set_grads(params[:1], 1)
    opt.step()
    assert opt.state[params[0]]["step"] == 1


def test_decay_that_is_assigned_later_is_refused_before_the_step_counts() -> None:
    params = parameters(shapes=MATRICES)
    opt = optim.GroupAdaGrad(params)
    train(opt, params, range(1, 2))
    before = everything(opt)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="no weight decay"):
        train(opt, params, range(2, 3))
    assert_same(everything(opt), before)
