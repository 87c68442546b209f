"""Adafactor against the paper's algorithm and torch's implementation, and its corners."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("adafactor.py", "return g * g", {"gradient not squared": "return tl.abs(g)"}),
    (
        "adafactor.py",
        "return s.beta2 * var + s.one_minus_beta2 * squares",
        {
            "a sum": "return var + squares",
            "not averaged": "return s.beta2 * var + squares",
            "forgets the past": "return s.one_minus_beta2 * squares",
            "betas swapped": "return s.one_minus_beta2 * var + s.beta2 * squares",
        },
    ),
    (
        "adafactor.py",
        "div(row_var, _at_least(row_mean, floor)) * col_var",
        {
            "not normalised": "row_var * col_var",
            "no floor of the mean": "div(row_var, row_mean) * col_var",
            "rows only": "row_var",
            "columns only": "col_var",
        },
    ),
    (
        "adafactor.py",
        "_at_least(epsilon * epsilon, TINY)",
        {"floor not squared": "epsilon", "no floor": "TINY"},
    ),
    ("adafactor.py", "sqrt(_at_least(var", {"no root": "(_at_least(var"}),
    ("adafactor.py", "s.epsilon2.to(tl.float64))", {"no floor of the size": "0.0)"}),
    (
        "adafactor.py",
        "sqrt(direction_square) / s.clip_threshold.to(tl.float64)",
        {
            "no threshold": "sqrt(direction_square)",
            "never clips": "direction_square * 0",
            "no root of the excess": "direction_square / s.clip_threshold.to(tl.float64)",
        },
    ),
    ("adafactor.py", "s.rate.to(tl.float64) * size", {"absolute step": "s.rate.to(tl.float64)"}),
    ("adafactor.py", "s.keep * w", {"no decay": "w", "weights grow": "(2 - s.keep) * w"}),
    ("adafactor.py", "- step * direction", {"ascends": "+ step * direction"}),
    (
        "drivers/factored_apply.py",
        "div(tl.sum(totals, axis=0), length.to(COMPUTE_DTYPE))",
        {"sum for mean": "tl.sum(totals, axis=0)"},
    ),
]

SHAPES = ((), (1,), (9,), (5, 6), (6, 1), (1, 4), (2, 3, 4), (2, 2, 3, 3), (40, 21), (3, 17, 16), (130,))
OPTIONS = {"beta2_decay": -0.6, "epsilon1": 0.2, "epsilon2": 0.5, "clip_threshold": 1.1}


@pytest.fixture
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=64, chunk_size=128, num_warps=1))


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_formula(options: dict[str, float]) -> None:
    """Algorithm 4 with sums as the paper has them, and epsilon1 where torch has it."""
    epsilon1, epsilon2 = options.get("epsilon1", np.finfo(float).eps), options.get("epsilon2", 1e-3)
    threshold, decay_rate = options.get("clip_threshold", 1.0), options.get("beta2_decay", -0.8)
    rate, wd = 0.3, 0.2

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        n, m = w.shape
        beta = 1 - t**decay_rate
        state["R"] = beta * zeros_at_first(state, "R", np.zeros(n)) + (1 - beta) * (g**2) @ np.ones(m)
        state["C"] = beta * zeros_at_first(state, "C", np.zeros(m)) + (1 - beta) * np.ones(n) @ g**2
        v = np.outer(state["R"], state["C"]) / (n * m) / max(state["R"].sum() / (n * m), epsilon1)
        u: Array = g / np.maximum(np.sqrt(v), epsilon1)
        u = u / max(1, np.linalg.norm(u) / np.sqrt(u.size) / threshold)
        alpha = max(epsilon2, float(np.linalg.norm(w)) / math.sqrt(w.size)) * min(rate, t**-0.5)
        new: Array = (1 - rate * wd) * w - alpha * u
        return new

    assert_follows(formula, "adafactor", learning_rate=rate, wd=wd, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_follows_torch(
    dtype: torch.dtype, use_fused_step: bool, options: dict[str, float], several_tiles: None
) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    starts = [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]
    ours, theirs = [w.clone() for w in starts], [w.clone().requires_grad_() for w in starts]
    opt = tritopt.create("adafactor", learning_rate=0.4, wd=0.1, use_fused_step=use_fused_step, **options)
    states = [opt.create_state(i, w) for i, w in enumerate(ours)]
    kwargs: dict[str, Any] = {"beta2_decay": options.get("beta2_decay", -0.8), "d": options.get("clip_threshold", 1.0)}
    eps = (options.get("epsilon1"), options.get("epsilon2", 1e-3))
    reference = torch.optim.Adafactor(theirs, lr=0.4, weight_decay=0.1, eps=eps, **kwargs)
    for _ in range(3):
        grads = [torch.randn(w.shape, dtype=dtype, generator=generator) for w in ours]
        opt.update(list(range(len(ours))), ours, grads, states)
        for weight, grad in zip(theirs, grads, strict=True):
            weight.grad = grad
        reference.step()
    for w, expected, start in zip(ours, theirs, starts, strict=True):
        error, moved = (w - expected).abs().max(), (expected - start).abs().max()
        # In three steps: roundings of the weight, and of the sums and roots that make the movement.
        limit = torch.finfo(dtype).eps * (3 * start.abs().max() + 50 * moved)
        assert error <= limit, f"{tuple(w.shape)}: off by {error} of {moved} moved"


def test_by_hand() -> None:
    # u = sign(g), of RMS 1; the step is a quarter of the weight's size
    assert one_step("adafactor", 2.0, 5.0, learning_rate=0.25) == 1.5
    # at t = 4 it is 1 / sqrt(t) that bounds the step: 2 - (1 + 1 / sqrt 2 + ...) of the weight's size
    expected = 1.0
    for t in range(1, 5):
        expected *= 1 + min(0.6, 1 / math.sqrt(t))
    stepped = one_step("adafactor", 1.0, *[-3.0] * 4, learning_rate=0.6)
    assert stepped == pytest.approx(expected, rel=1e-6)


def test_states_are_as_small_as_promised() -> None:
    opt = tritopt.create("adafactor")
    for shape, expected in [
        ((5, 6), [(5, 1), (1, 6)]),
        ((2, 3, 4), [(2, 3, 1), (2, 1, 4)]),
        ((7,), [(0,), (7,)]),
        ((), [(0,), ()]),
    ]:
        states = opt.create_state(0, torch.ones(shape, dtype=torch.bfloat16))
        assert [tuple(s.shape) for s in states] == expected
        assert {s.dtype for s in states} == {torch.float32}


@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("epsilon1", [None, 0.0, 1e-30])
@pytest.mark.parametrize("shape", [(3, 4), (5,)])
def test_zero_gradient_moves_nothing(use_fused_step: bool, epsilon1: float | None, shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    opt = tritopt.create("adafactor", epsilon1=epsilon1, use_fused_step=use_fused_step)
    state = opt.create_state(0, weight)
    for grad in (torch.zeros(shape), torch.ones(shape), torch.zeros(shape)):
        before = weight.clone()
        opt.update(0, weight, grad, state)
        assert weight.isfinite().all()
        assert weight.equal(before) == (not grad.any())


def test_zero_weights_move() -> None:
    """Weights of 0 move as if their RMS were epsilon2."""
    weight = torch.zeros(2, 3)
    opt = tritopt.create("adafactor", learning_rate=0.5, epsilon2=0.125)
    opt.update(0, weight, torch.ones(2, 3), opt.create_state(0, weight))
    torch.testing.assert_close(weight, torch.full((2, 3), -0.0625))


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_tensor_only(use_fused_step: bool) -> None:
    opt = tritopt.create("adafactor", use_fused_step=use_fused_step)
    weights = [torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)]
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    grads = [torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)]
    grads[0][1, 1] = torch.nan
    opt.update([0, 1, 2], weights, grads, states)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()
    assert weights[2].isfinite().all()


def test_size_is_that_of_the_master() -> None:
    """Rounded to bf16 the weight, and so the step, would be 0.2% larger."""
    weight = torch.full((10, 10), 1.0, dtype=torch.bfloat16)
    opt = tritopt.create("adafactor", learning_rate=0.1, multi_precision=True)
    master, state = opt.create_state_multi_precision(0, weight)
    master.fill_(1 - 2**-9)
    opt.update_multi_precision([0], [weight], [torch.ones(10, 10)], [(master, state)])
    torch.testing.assert_close(master, torch.full((10, 10), (1 - 2**-9) * 0.9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta2_decay", 0.1),
        ("epsilon1", -1e-3),
        ("epsilon2", -1.0),
        ("clip_threshold", 0.5),
        ("clip_threshold", math.nan),
        ("epsilon2", math.inf),
    ],
)
def test_arguments_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r} must"):
        tritopt.create("adafactor", **{name: value})


# The kernels' tiles.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_views_touch_nothing_around_them(dtype: torch.dtype, offset: int, several_tiles: None) -> None:
    """Aligned and not: NaN around what is read, a sentinel around what is written, the result that of a copy."""
    shapes = ((20, 32), (20, 19), (33,), (3, 2, 5))
    for shape in shapes:
        size = math.prod(shape)
        buffer, around = torch.full((size + 64,), 7.0, dtype=dtype), torch.full((size + 64,), math.nan, dtype=dtype)
        inside = slice(offset, offset + size)
        buffer[inside] = torch.randn(size).to(dtype)
        around[inside] = torch.randn(size).to(dtype)
        weight, grad = buffer[inside].view(shape), around[inside].view(shape)
        copy = weight.clone()
        opt = tritopt.create("adafactor", learning_rate=0.1)
        for w, g in ((weight, grad), (copy, grad.clone())):
            opt.update(0, w, g, tuple(torch.zeros(s) for s in opt.state_shapes(w.shape)))
            opt._index_update_count.clear()
        assert torch.equal(weight, copy)
        assert torch.all(buffer[:offset] == 7.0)
        assert torch.all(buffer[offset + size :] == 7.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeats_to_the_bit_whatever_else_is_in_the_list(shape: tuple[int, ...], several_tiles: None) -> None:
    grad, others = torch.randn(shape), [torch.ones(7, 9), torch.ones(50)]
    results = []
    for before, after in (([], []), (others, []), (others[:1], others[1:])):
        weights = [w.clone() for w in (*before, torch.ones(shape), *after)]
        grads = [*before, grad, *after]
        opt = tritopt.create("adafactor", learning_rate=0.3)
        states = [opt.create_state(i, w) for i, w in enumerate(weights)]
        opt.update(list(range(len(weights))), weights, grads, states)
        results.append([weights[len(before)], *states[len(before)]])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("rescale", "is_skipped"), [(math.nan, True), (math.inf, True), (0.5, False)], ids=["nan", "inf", "half"]
)
def test_device_rescale(rescale: float, is_skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = tritopt.create("adafactor", use_fused_step=True)
    monkeypatch.setattr(opt, "_rescale", lambda: (1.0, torch.tensor(rescale)))
    tensors = []
    for shape in ((5, 6), (7,)):
        weight = torch.ones(shape)
        state = opt.create_state(0, weight)
        opt.update(0, weight, torch.ones(shape), state)
        tensors += [weight - 1, *state]
    assert all(bool(t.any()) != is_skipped for t in tensors if t.numel())
