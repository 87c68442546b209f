"""Muon against its formula, torch's implementation and singular values; what is a matrix, and what spoils one."""

from __future__ import annotations

import copy
import importlib
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, zeros_at_first
from tritopt import optim
from tritopt.engine.matrices import Cut
from tritopt.engine.matrix_phase import ApplyMatrices, layouts_of
from tritopt.engine.newton_schulz import POLAR_EXPRESS, QUINTIC, Iteration, orthogonalize, steps_of
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config
from tritopt.kernels.muon import muon_direction, muon_update
from tritopt.optimizers.muon import MuonRule

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "muon.py",
        "s.momentum * state[0] + s.one_minus_momentum * g\n",
        {
            "a sum": "state[0] + g\n",
            "no past": "s.one_minus_momentum * g\n",
            "no gradient": "s.momentum * state[0]\n",
            "decay rates swapped": "s.one_minus_momentum * state[0] + s.momentum * g\n",
        },
    ),
    (
        "muon.py",
        "s.ahead * momentum + s.one_minus_ahead * g)",
        {
            "not ahead": "momentum)",
            "ahead of the old momentum": "s.ahead * state[0] + s.one_minus_ahead * g)",
            "the gradient": "g)",
        },
    ),
    ("muon.py", "w, (momentum,", {"momentum is not kept": "w, (state[0],"}),
    (
        "muon.py",
        "s.keep * w - s.lr * direction",
        {
            "no decay": "w - s.lr * direction",
            "decays the moved weight": "s.keep * (w - s.lr * direction)",
            "ascends": "s.keep * w + s.lr * direction",
            "no rate": "s.keep * w - direction",
        },
    ),
    (
        "muon.py",
        "s.beta2 * moments + s.one_minus_beta2 * squares",
        {
            "a sum": "moments + squares",
            "no past": "s.one_minus_beta2 * squares",
            "no present": "s.beta2 * moments",
            "decay rates swapped": "s.one_minus_beta2 * moments + s.beta2 * squares",
        },
    ),
]

IN_BF16 = Iteration(steps_of(QUINTIC, 5), 1e-7, torch.bfloat16, "original", 1.0)
# Of the largest element of what an iteration makes: products may add up in any order (tools/check/tolerance.py).
ROUNDING = 8 * torch.finfo(torch.bfloat16).eps
FUSED = pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=32, chunk_size=64, num_warps=1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(random(*shape, seed=seed).to(dtype))


def step(params: Sequence[torch.nn.Parameter], grads: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Distance that one step moves each, per learning rate; there is no decay."""
    before = [p.detach().clone() for p in params]
    opt = optim.Muon(params, lr=1.0, weight_decay=0.0, **options)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    opt.step()
    return [(old - p.detach()).float() for old, p in zip(before, params, strict=True)]


def orthogonal(direction: torch.Tensor) -> torch.Tensor:
    """U V^T of its singular value decomposition."""
    u, _, v = torch.linalg.svd(direction.double(), full_matrices=False)
    product: torch.Tensor = u @ v
    return product


# The formula.


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("coefficients", [QUINTIC, POLAR_EXPRESS], ids=["quintic", "polar express"])
@pytest.mark.parametrize("ratio", [None, "match_rms_adamw", "spectral_unclamped"])
def test_formula(nesterov: bool, coefficients: Any, ratio: str | None) -> None:
    """Singular values give it: the iteration applies a polynomial to each, whatever the vectors are."""
    momentum, lr, wd, steps = 0.8, 0.3, 0.2, 4

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        m = state["m"] = momentum * zeros_at_first(state, "m", w) + (1 - momentum) * g
        d = momentum * m + (1 - momentum) * g if nesterov else m
        u, s, v = np.linalg.svd(d, full_matrices=False)
        s = s / np.linalg.norm(d) / (1.01 if coefficients == POLAR_EXPRESS else 1)
        for a, b, c in steps_of(coefficients, steps):
            s = a * s + b * s**3 + c * s**5
        rows, columns = w.shape
        of_shape = {
            None: math.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
            "spectral_unclamped": math.sqrt(rows / columns),
        }
        moved: Array = lr * of_shape[ratio] * (u * s) @ v
        return (1 - lr * wd) * w - moved

    assert_follows(
        formula, "muon", learning_rate=lr, wd=wd, momentum=momentum, nesterov=nesterov, ns_steps=steps,
        ns_coefficients=coefficients, ns_dtype="fp32", adjust_lr_fn=ratio,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [(QUINTIC, 0.65, 1.25), (POLAR_EXPRESS, 0.85, 1.15)], ids=["quintic", "polar"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_singular_values_come_near_one(coefficients: Any, low: float, high: float, dtype: torch.dtype) -> None:
    """Singular values below a hundredth of the norm are left out."""
    u, v = (torch.linalg.qr(random(n, 24, seed=n))[0] for n in (40, 24))
    x = ((u * torch.linspace(1.0, 0.05, 24)) @ v.T).to(dtype)[None]
    safety = 1.01 if coefficients == POLAR_EXPRESS else 1.0
    orthogonalize(x, Iteration(steps_of(coefficients, 5), 1e-7, dtype, "original", safety), 1.0)
    singular_values = torch.linalg.svdvals(x[0].double())
    assert low < singular_values.min()
    assert singular_values.max() < high


# torch. Its own tests are parametrised over a database of optimizers: arguments, and what must be refused.

UNLISTED: list[dict[str, Any]] = [  # by the database
    {"momentum": 0.0},
    {"nesterov": False},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"eps": 10.0},
]
SHAPES = ((6, 4), (5, 5), (4, 6), (4, 6))


@pytest.fixture(scope="module")
def database() -> Any:
    """Import torch's where it is read: it would take each worker that collects tests three seconds."""
    return importlib.import_module("torch.testing._internal.common_optimizers")


def assert_goes_where_torch_goes(options: dict[str, Any], fused: bool | None) -> None:
    """Take a hundred steps; each of ours is within rounding of torch's from the same weights and momentum."""
    ours = [parameter(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt, torchs = optim.Muon(ours, fused=fused, **options), torch.optim.Muon(theirs, **options)
    lr = float(options.get("lr", 1e-3))
    start = [p.detach().clone() for p in ours]
    for t in range(100):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = random(*p.shape, seed=1000 * t + i)
            q.grad = p.grad.clone()
        opt.step()
        torchs.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        # Errors of 100 steps, each of at most `ROUNDING` of its largest element, in directions that are not one.
        ratio = 0.2 * math.sqrt(max(p.shape)) if options.get("adjust_lr_fn") == "match_rms_adamw" else 1.0
        allowed = math.sqrt(100) * ROUNDING * lr * max(ratio, math.sqrt(max(1, p.shape[0] / p.shape[1])))
        assert (p - q).abs().max() <= allowed
        assert (q.detach() - first).abs().max() > allowed
        torch.testing.assert_close(
            opt.state[p]["momentum_buffer"], torchs.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("options", "fused"),
    [*[(options, False) for options in UNLISTED], ({}, None), ({"nesterov": False}, None)],
    ids=str,
)
def test_a_hundred_steps_go_where_torch_goes(options: dict[str, Any], fused: bool | None) -> None:
    assert_goes_where_torch_goes(options, fused)


def test_a_hundred_steps_of_torchs_cases_go_where_torch_goes(database: Any) -> None:
    cases = database.optim_inputs_func_muon("cpu")
    assert cases
    for case in cases:
        print(case)  # a failing test ends with the one that failed
        assert_goes_where_torch_goes(case.kwargs, False)


def test_what_torch_refuses_is_refused_in_its_words(database: Any) -> None:
    """Complex parameters in the step, everything else where the optimizer is made."""
    in_step = []
    for case in database.optim_error_inputs_func_muon("cpu", torch.float32):
        given = case.optimizer_error_input
        print(given.desc)
        if case.error_on is database.OptimizerErrorEnum.STEP_ERROR:
            opt = optim.Muon(given.params, **given.kwargs)
            in_step.append(given.desc)
            with pytest.raises(case.error_type, match=case.error_regex):
                opt.step()
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                optim.Muon(given.params, **given.kwargs)
    assert in_step == ["does not support complex parameters"]


def assert_goes_in_the_right_direction(options: dict[str, Any], is_contiguous: bool) -> None:
    weight, x = torch.nn.Parameter(random(10, 5) if is_contiguous else random(10, 5, 2)[..., 0]), random(5, seed=1)
    opt = optim.Muon([weight], **options)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (weight @ x).square().sum()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_goes_in_the_right_direction(is_contiguous: bool, database: Any) -> None:
    """The model of torch's test of this name, with its seed's sizes and without the bias, which is no matrix."""
    for case in database.optim_inputs_func_muon("cpu"):
        print(case)
        assert_goes_in_the_right_direction(case.kwargs, is_contiguous)


def test_checkpoints_are_torchs() -> None:
    """Keys of both parts, there and back; and what torch lacks is there where it is set."""
    (ours,), (theirs,) = [parameter(4, 6)], [parameter(4, 6)]
    opt, torchs = optim.Muon([ours]), torch.optim.Muon([theirs])
    for p, o in ((ours, opt), (theirs, torchs)):
        p.grad = random(4, 6, seed=1)
        o.step()
    actual, expected = opt.state_dict(), torchs.state_dict()
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"][0].keys() == expected["state"][0].keys() == {"momentum_buffer"}
    torchs.load_state_dict(actual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(expected)
    split = optim.Muon([parameter(4, 6)], split=2, state_dtype="int8").state_dict()["param_groups"][0]
    assert split.keys() - expected["param_groups"][0].keys() == {"split"}


@pytest.mark.parametrize("lacking", [(), ("nesterov", "adjust_lr_fn")], ids=["now", "older"])
def test_a_loaded_checkpoint_goes_on_as_torchs(lacking: tuple[str, ...]) -> None:
    """The first step after it too, also where an older torch has not saved all keys."""
    (theirs,) = [parameter(4, 6)]
    torchs = torch.optim.Muon([theirs], lr=0.1, momentum=0.8)
    theirs.grad = random(4, 6, seed=1)
    torchs.step()
    saved = copy.deepcopy(torchs.state_dict())
    for key in lacking:
        del saved["param_groups"][0][key]
    ours = torch.nn.Parameter(theirs.detach().clone())
    opt = optim.Muon([ours])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are kept
        opt.load_state_dict(saved)
    for p, o in ((ours, opt), (theirs, torchs)):
        p.grad = random(4, 6, seed=2)
        o.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 * ROUNDING)
    buffers = (o.state[p]["momentum_buffer"] for p, o in ((ours, opt), (theirs, torchs)))
    torch.testing.assert_close(*buffers, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_step() -> None:
    (theirs,) = [parameter(4, 6)]
    torchs = torch.optim.Muon([theirs])
    theirs.grad = random(4, 6, seed=1)
    torchs.step()
    saved = copy.deepcopy(torchs.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 has shape \(6, 4\)"):
        optim.Muon([parameter(4, 6)]).load_state_dict(saved)
    saved["param_groups"][0]["ns_steps"] = 0
    with pytest.raises(ValueError, match="ns_steps=0 must be 1 to 99"):
        optim.Muon([parameter(4, 6)]).load_state_dict(saved)


def test_random_bits_need_a_step_in_the_checkpoint() -> None:
    p = parameter(2, 64, dtype=torch.bfloat16)
    opt = optim.Muon([p], master="stochastic")
    p.grad = random(2, 64).bfloat16()
    opt.step()
    assert opt.state_dict()["state"][0].keys() == {"momentum_buffer", "step"}


# What is a matrix.


@FUSED
def test_each_matrix_of_a_stack_is_orthogonalised_by_itself(fused: bool | None) -> None:
    """Experts, also where they lie in memory in another order: what a step does to each alone."""
    grads = random(3, 4, 6, seed=1)
    alone = [step([parameter(4, 6, seed=i)], [grads[i]], fused=fused)[0] for i in range(3)]
    for relaid in (grads, grads.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        stack = torch.nn.Parameter(torch.empty_strided((3, 4, 6), relaid.stride()).normal_())
        (moved,) = step([stack], [relaid], fused=fused, flatten=False)
        torch.testing.assert_close(moved, torch.stack(alone), rtol=0, atol=ROUNDING)
    (as_one,) = step([parameter(12, 6)], [grads.reshape(12, 6)], fused=fused)
    assert (as_one.view(3, 4, 6) - torch.stack(alone)).abs().max() > 0.1


@FUSED
def test_a_convolution_is_flattened_where_asked(fused: bool | None) -> None:
    grad = random(4, 3, 2, 2, seed=1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(random(4, 3, 2, 2).to(memory_format=memory_format))
        (moved,) = step([weight], [grad.to(memory_format=memory_format)], fused=fused, flatten=True)
        (flat,) = step([parameter(4, 12)], [grad.reshape(4, 12)], fused=fused)
        torch.testing.assert_close(moved.reshape(4, 12), flat, rtol=0, atol=ROUNDING)


SPLITS: list[tuple[dict[str, Any], int, tuple[int, ...]]] = [
    ({"split": 3}, 0, (4, 4, 4)),
    ({"split": (6, 3, 3)}, 0, (6, 3, 3)),
    ({"split": [3, 6, 3]}, 0, (3, 6, 3)),
    ({"split": 2, "split_dim": -1}, 1, (5, 5)),
    ({"split": (2, 4, 4), "split_dim": -1}, 1, (2, 4, 4)),
]


@FUSED
@pytest.mark.parametrize(("options", "dim", "sizes"), SPLITS)
def test_parts_of_a_fused_projection_are_matrices_of_their_own(
    options: dict[str, Any], dim: int, sizes: tuple[int, ...], fused: bool | None
) -> None:
    """Query, key and value, or gate and up: each as if it were a parameter, its ratio included; two such parameters."""
    grads = [random(12, 10, seed=seed) for seed in (1, 2)]
    moved = step([parameter(12, 10, seed=i) for i in range(2)], grads, fused=fused, **options)
    for actual, grad in zip(moved, grads, strict=True):
        parts = grad.split(sizes, dim)
        alone = [step([parameter(*part.shape)], [part.contiguous()], fused=fused)[0] for part in parts]
        torch.testing.assert_close(actual, torch.cat(alone, dim), rtol=0, atol=ROUNDING * math.sqrt(3))
        (as_one,) = step([parameter(12, 10)], [grad], fused=fused)
        assert (as_one - actual).abs().max() > 0.1


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5,), {}, r"parameter 'layer.w': Muon only supports 2D .*\(5,\); give it to another .* AdamW"),
        ((), {}, r"parameter 'layer.w': Muon only supports 2D .*\(\); give it to another"),
        ((2, 3, 4), {}, r"parameter 'layer.w': Muon only supports 2D .*flatten=False for a stack"),
        ((5,), {"flatten": False}, "give it to another optimizer"),
        ((7, 3), {"split": 2}, r"split=2: 7 does not divide"),
        ((7, 3), {"split": (3, 3)}, r"split=\(3, 3\) adds up to 6, and the dimension has 7"),
        ((6, 7), {"split": 2, "split_dim": -1}, r"split=2: 7 does not divide"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Muon([("layer.w", parameter(*shape))], **options)
    with pytest.raises(ValueError, match=message):
        tritopt.create("muon", **options).create_state("layer.w", random(*shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1\.0 must be in \[0, 1\)"),
        ({"momentum": -0.5}, r"momentum should be >= 0 but is: -0\.5"),
        ({"ns_steps": 0}, "ns_steps=0 must be 1 to 99"),
        ({"ns_steps": 100}, "ns_steps=100 must be 1 to 99"),
        ({"ns_coefficients": (1.0, 0.0, 0.0)}, r"ns_coefficients=\(1\.0, 0\.0, 0\.0\) do not converge"),
        ({"ns_coefficients": (3.4445, 4.775, 2.0315)}, "do not converge"),
        ({"ns_coefficients": (-1.5, 0.5, 0.0)}, "do not converge"),
        ({"ns_coefficients": (1e308, 1e308, 1e308)}, "do not converge"),
        ({"ns_coefficients": (float("nan"), 0.0, 0.0)}, "do not converge"),
        ({"ns_coefficients": (1.0, 2.0)}, "3 numbers"),
        ({"ns_coefficients": "polar"}, "'polar' must be three numbers or 'polar_express'"),
        ({"ns_dtype": "fp16"}, "ns_dtype='fp16' must be one of 'bf16', 'fp32'"),
        ({"eps": 0.0}, "eps=0 must be > 0"),
        ({"adjust_lr_fn": "spectral"}, "function spectral is not supported: adjust_lr_fn must be one of 'original'"),
        ({"beta2": 1.0}, r"beta2=1\.0 must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2=-0\.1 must be in \[0, 1\)"),
        ({"beta2": math.nan}, "beta2=nan"),
        ({"split": 0}, "split=0 must be a number of equal parts"),
        ({"split": (2, 0)}, r"split=\(2, 0\) must be"),
        ({"split_dim": 0}, "split_dim=0 must be -2"),
        ({"scratch_bytes": 0}, "scratch_bytes=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    p = parameter(4, 6)
    with pytest.raises((ValueError, TypeError), match=message):
        optim.Muon([p], **options)


# What spoils a matrix.


@FUSED
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e18], ids=str)
def test_a_zero_tiny_or_huge_gradient_moves_by_numbers(size: float, fused: bool | None) -> None:
    """No 0 / 0, and nothing beside it in the stack notices."""
    grads = [size * random(4, 6, seed=1), random(4, 6, seed=2)]
    moved = step([parameter(4, 6, seed=i) for i in range(2)], grads, fused=fused)
    assert moved[0].isfinite().all()
    assert moved[0].any() == (size > 1e-20)  # far below eps, the step is too
    assert moved[0].abs().max() <= 1.2
    (alone,) = step([parameter(4, 6, seed=1)], grads[1:], fused=fused)
    torch.testing.assert_close(moved[1], alone, rtol=0, atol=ROUNDING)


@FUSED
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_matrix(bad: float, fused: bool | None) -> None:
    """Not others of its stack, in the same parameter or another."""
    grads = [random(3, 4, 6, seed=1), random(3, 4, 6, seed=2)]
    grads[0][1, 2, 3] = bad
    moved = step([parameter(3, 4, 6, seed=i) for i in range(2)], grads, fused=fused, flatten=False)
    assert moved[0][1].isnan().all()
    assert moved[0][[0, 2]].isfinite().all()
    assert moved[1].isfinite().all()


def test_alignment_is_not_orthogonalised() -> None:
    """Matrices of 3 by 5 begin at multiples of 16 bytes in the scratch: what lies between enters no product."""
    grads = [random(3, 5, seed=i) for i in range(4)]
    together = step([parameter(3, 5, seed=i) for i in range(4)], grads, fused=True)
    for actual, grad in zip(together, grads, strict=True):
        expected = orthogonal(grad)
        # The iteration ends between 0.68 and 1.2 times the orthogonal matrix, singular value by singular value.
        ratios = torch.linalg.svdvals(actual.double())
        assert ((ratios > 0.6) & (ratios < 1.25)).all()
        assert torch.nn.functional.cosine_similarity(actual.double().flatten(), expected.flatten(), dim=0) > 0.95


def test_one_step_per_step() -> None:
    """Micro-batches add up in the gradient; the momentum and the iteration see their sum."""
    accumulated, at_once = parameter(4, 6), parameter(4, 6)
    grads = [random(4, 6, seed=i) for i in (1, 2, 3)]
    opts = [optim.Muon([p], lr=1.0) for p in (accumulated, at_once)]
    accumulated.grad = grads[0].clone()
    for grad in grads[1:]:
        accumulated.grad += grad
    at_once.grad = torch.stack(grads).cumsum(0)[-1]
    for opt in opts:
        opt.step()
    torch.testing.assert_close(accumulated, at_once, rtol=0, atol=ROUNDING)


def test_a_skipped_step_leaves_everything() -> None:
    p = parameter(4, 6, dtype=torch.bfloat16)
    opt: Any = optim.Muon([p])
    p.grad = random(4, 6, seed=1).bfloat16()
    opt.step()
    before = [p.detach().clone(), opt.state[p]["momentum_buffer"].clone()]
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert torch.equal(p, before[0])
    assert torch.equal(opt.state[p]["momentum_buffer"], before[1])
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    assert not torch.equal(p, before[0])


# The scratch.


def test_parts_of_a_list_fit_into_the_scratch() -> None:
    iteration, cut = IN_BF16, Cut(None, None, -2)
    shapes = [torch.Size(s) for s in ((8, 16), (16, 8), (8, 16), (3, 5), (8, 16), (64, 64))]
    strides = [(s[1], 1) for s in shapes]
    each = 2 * 2 * (8 * 16 + 8 * 8)
    phase = ApplyMatrices(muon_direction, muon_update, cut, iteration, scratch_bytes=2 * each)
    layouts = layouts_of(phase, shapes, strides, 2)
    # One that does not fit has a part of its own.
    assert [layout.members for layout in layouts] == [[0, 2], [4, 1], [3], [5]]
    assert [layout.size for layout in layouts] == [256, 256, 16, 4096]
    assert layouts[1].at[[4, 1]].tolist() == [0, 128]


def test_a_small_scratch_changes_nothing() -> None:
    """Only the number of launches changes; the largest error is that of stacks of another size."""
    grads = [random(4, 6, seed=i) for i in range(5)]
    whole = step([parameter(4, 6, seed=i) for i in range(5)], grads, fused=True)
    parts = step([parameter(4, 6, seed=i) for i in range(5)], grads, fused=True, scratch_bytes=1)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


def test_convergence_is_asked_at_construction() -> None:
    for good in (QUINTIC, (3.4, -4.7, 2.0), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375)):
        assert MuonRule(ns_coefficients=good).iteration.steps == (tuple(map(float, good)),) * 5
    assert len(MuonRule(ns_coefficients=POLAR_EXPRESS, ns_steps=10).iteration.steps) == 10


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (128, 32)])
def test_small_matrices_on_the_cpu_take_a_third_of_torchs_time(shape: tuple[int, int]) -> None:
    """126 matrices: 4, 10 and 5 times as fast when this was written. Time of one thread, the least of many steps."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("times the CPU")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        opts = []
        kinds: list[tuple[Any, dict[str, Any]]] = [(optim.Muon, {"fused": False}), (torch.optim.Muon, {})]
        for cls, options in kinds:
            params = [parameter(*shape, seed=i) for i in range(126)]
            for p in params:
                p.grad = random(*shape, seed=1)
            opts.append(cls(params, **options))
        times: list[list[float]] = [[], []]
        give_up = time.monotonic() + 20
        while len(times[0]) < 15 or (3 * min(times[0]) >= min(times[1]) and time.monotonic() < give_up):
            # Others who share the caches slow what is done for all matrices at once, until they let it be seen.
            for opt, taken in zip(opts, times, strict=True):
                start = time.thread_time()
                opt.step()
                taken.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(n_threads)
    ours, torchs = map(min, times)
    assert 3 * ours < torchs
