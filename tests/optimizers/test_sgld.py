"""SGLD against its formula; its noise: normal, independent where it should be, the same where it should be."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows
from tritopt.engine.plan import Planner
from tritopt.engine.random_keys import halves, key_words
from tritopt.engine.tuning.config import Config
from tritopt.kernels.twins.random import normal
from tritopt.optimizers.sgld import SGLDScalars

LR, WD, CLIP, RESCALE, SEED = 0.1, 0.05, 0.4, 0.7, 5
N = 200_000


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "sgld.py",
        "w - s.half_lr * g",
        {"ascends": "w + s.half_lr * g", "a whole step": "w - 2 * s.half_lr * g", "gradient ignored": "w"},
    ),
    (
        "sgld.py",
        "+ s.deviation * noise",
        {
            "no noise": "",
            "sign of the noise": "- s.deviation * noise",
            "variance for deviation": "+ 2 * s.half_lr * noise",
            "noise of the gradient's size": "+ s.deviation * noise * g",
        },
    ),
    (
        "sgld.py",
        "(s.key_0, s.key_1, s.key_2, s.key_3)",
        {
            "key's words change places": "(s.key_2, s.key_3, s.key_0, s.key_1)",
            "half a key": "(s.key_0, s.key_1, s.key_0, s.key_1)",
        },
    ),
    (
        "sgld.py",
        "place, s.step, 0",
        {"the same noise in every block": "(place[0] % 32, ()), s.step, 0", "at every step": "place, s.step * 0, 0"},
    ),
    ("random.py", "tl.where((for_angle & 1) == 0, first, -first)", {"noise is never negative": "first"}),
    ("random.py", "sqrt(_minus_two_log(for_size))", {"radius not rooted": "_minus_two_log(for_size)"}),
    ("random.py", "(for_angle >> 2)", {"one word for both": "(for_size >> 2)"}),
    ("random.py", "_sine(1.0 - x)", {"neighbours alike": "_sine(x)"}),
    ("random.py", "_normals(words[2], words[3])", {"pairs alike": "_normals(words[0], words[1])"}),
    (
        "random.py",
        "return tl.philox(seed, low, (offsets >> 32)",
        {"offset's words": "return tl.philox(seed, low, (offsets)"},
    ),
    ("random.py", "third, fourth, _ROUNDS)", {"step and stream change places": "fourth, third, _ROUNDS)"}),
]


def noise_of(count: int, index: Any, shape: Sequence[int], seed: int = SEED) -> torch.Tensor:
    """Standard normal; tests/engine/test_random.py says that it is."""
    return normal(halves(key_words(seed, index)), torch.arange(math.prod(shape)), count, 0).view(*shape)


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        moved: Array = np.sqrt(LR) * noise_of(t, 0, w.shape).double().cpu().numpy()
        moved = moved - LR / 2 * (np.clip(RESCALE * g, -CLIP, CLIP) + WD * w)
        return w + moved

    options = {"wd": WD, "clip_gradient": CLIP, "rescale_grad": RESCALE}
    assert_follows(formula, "sgld", learning_rate=LR, seed=SEED, **options)


def test_by_hand() -> None:
    """The first number of Philox's first known answer, under a key of 0."""
    radius = math.sqrt(-2 * math.log(0x5F6FB709 / 2**32))
    expected = radius * math.sin(math.pi / 2 * (0x0D893F64 >> 1) / 2**31)
    weight, opt = torch.tensor([1.0]), tritopt.create("sgld", learning_rate=0.25)
    vars(opt)["scalars_of"] = lambda *item: SGLDScalars(0.125, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    opt.update([0], [weight], [torch.tensor([0.5])], [None])
    assert weight.item() == pytest.approx(1 - 0.125 * 0.5 + 0.5 * expected, rel=1e-6)


def drawn(
    opt: tritopt.Optimizer, *shapes: tuple[int, ...], indices: Sequence[Any] | None = None, **how: Any
) -> list[torch.Tensor]:
    """The noise of one step: weights and gradients are 0 before."""
    weights = [torch.zeros(shape, **how) for shape in shapes]
    known = range(len(weights)) if indices is None else indices
    opt.update(list(known), weights, [torch.zeros_like(w) for w in weights], [None] * len(weights))
    return weights


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation in standard deviations of that of independent numbers."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]) * math.sqrt(len(a))


@pytest.fixture
def long_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a long block as for a short one."""
    monkeypatch.setattr(Planner, "config", Config(block_size=2**16, chunk_size=2**17))


@pytest.mark.usefixtures("long_blocks")
def test_noise_is_normal_and_white() -> None:
    """MXNet's is, too: its moments over as many numbers, which were recorded, lie within 4 deviations."""
    z = drawn(tritopt.create("sgld", learning_rate=0.04), (N,))[0].double() / 0.2
    moments = [float(z.pow(k).mean()) for k in (1, 2, 3, 4)]
    for moment, expected, deviation in zip(
        moments, (0, 1, 0, 3), (1, math.sqrt(2), math.sqrt(15), math.sqrt(96)), strict=True
    ):
        assert moment == pytest.approx(expected, abs=4 * deviation / math.sqrt(N))
    for lag in (1, 2, 32, 1024, 2**16):
        assert abs(correlation(z[:-lag], z[lag:])) < 4


@pytest.mark.usefixtures("long_blocks")
def test_noise_of_steps_parameters_and_seeds_is_independent() -> None:
    opt = tritopt.create("sgld")
    first, other = drawn(opt, (N,), (N,))
    (second,) = drawn(opt, (N,))
    (seeded,) = drawn(tritopt.create("sgld", seed=1), (N,))
    for draw in (other, second, seeded):
        assert abs(correlation(first, draw)) < 4
        assert abs(correlation(first.abs(), draw.abs())) < 4


def test_noise_does_not_depend_on_how_the_update_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, other tensors in the call and their order, the path, the layout."""
    shapes = [(70,), (3, 50), (2, 5, 3, 4), (1,)]
    expected = drawn(tritopt.create("sgld", use_fused_step=False), *shapes)
    monkeypatch.setattr(Planner, "config", Config(block_size=16, chunk_size=32, num_warps=1))
    assert all(map(torch.equal, drawn(tritopt.create("sgld"), *shapes), expected))
    backwards = drawn(tritopt.create("sgld"), *shapes[::-1], indices=[3, 2, 1, 0])
    assert all(map(torch.equal, backwards[::-1], expected))
    alone = [drawn(tritopt.create("sgld"), shape, indices=[i])[0] for i, shape in enumerate(shapes)]
    assert all(map(torch.equal, alone, expected))
    for use_fused_step in (True, False):
        weight = torch.zeros(2, 5, 3, 4).to(memory_format=torch.channels_last)
        opt = tritopt.create("sgld", use_fused_step=use_fused_step)
        opt.update([2], [weight], [torch.zeros(2, 5, 3, 4)], [None])
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(weight, expected[2])


def test_noise_does_not_depend_on_dtype() -> None:
    (single,) = drawn(tritopt.create("sgld"), (99,))
    (double,) = drawn(tritopt.create("sgld"), (99,), dtype=torch.float64)
    torch.testing.assert_close(double, single.double(), rtol=2**-22, atol=0)


def test_training_continues_with_the_same_noise() -> None:
    """It continues after a copy, after pickling, and in a new optimizer that starts from the count."""
    opt = tritopt.create("sgld", seed=3)
    drawn(opt, (9,))
    others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), tritopt.create("sgld", seed=3, begin_num_update=1)]
    expected = drawn(opt, (9,))
    for other in others:
        assert torch.equal(drawn(other, (9,))[0], expected[0])


def test_steps_stay_exact_in_fp32() -> None:
    """Beyond 2^24 they begin anew, rather than being the same twice."""
    opt = tritopt.SGLD()
    assert [opt.scalars(0.1, 0.0, count).step for count in (1, 2**24 - 1, 2**24, 2**24 + 3)] == [1, 2**24 - 1, 0, 3]
    expected = drawn(tritopt.create("sgld", use_fused_step=False, begin_num_update=2**24 - 2), (9,))
    assert torch.equal(drawn(tritopt.create("sgld", begin_num_update=2**24 - 2), (9,))[0], expected[0])
    assert not torch.equal(drawn(tritopt.create("sgld", begin_num_update=2**24 - 3), (9,))[0], expected[0])


def test_noise_is_not_clipped_nor_rescaled() -> None:
    plain = drawn(tritopt.create("sgld"), (99,))
    assert torch.equal(drawn(tritopt.create("sgld", clip_gradient=1e-6, rescale_grad=1e-6), (99,))[0], plain[0])


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_learning_rate_of_zero_leaves_the_weight(use_fused_step: bool) -> None:
    weight = torch.linspace(-1, 1, 9)
    opt = tritopt.create("sgld", learning_rate=0.0, wd=0.5, use_fused_step=use_fused_step)
    opt.update([0], [weight], [torch.ones(9)], [None])
    assert torch.equal(weight, torch.linspace(-1, 1, 9))


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError), ("0", TypeError), (True, TypeError)])
def test_seed_is_a_count(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed="):
        tritopt.create("sgld", seed=seed)


def test_index_that_may_not_last() -> None:
    weight, opt = torch.zeros(3), tritopt.create("sgld")
    with pytest.raises(TypeError, match="use an int, a str or a tuple of such"):
        opt.update([object()], [weight], [torch.ones(3)], [None])
    assert weight.eq(0).all()
    assert opt.num_update == 0
