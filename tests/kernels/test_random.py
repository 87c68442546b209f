"""Philox and the normal numbers made of it: known answers, kernel against twin, other ways to compute the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tritopt.engine.random_keys import halves, key_words
from tritopt.kernels.language import HAS_TRITON, tl, triton
from tritopt.kernels.random import normal, philox
from tritopt.kernels.twins import random
from tritopt.kernels.twins.random import STEPS, philox4x32

WORD = 2**32 - 1


def scalar_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The paper's round function (Salmon et al. 2011, section 3.3) on Python's own integers."""
    for r in range(7):
        products = [0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]]
        keys = [(key[0] + r * 0x9E3779B9) & WORD, (key[1] + r * 0xBB67AE85) & WORD]
        counter = (
            (products[1] >> 32) ^ counter[1] ^ keys[0],
            products[1] & WORD,
            (products[0] >> 32) ^ counter[3] ^ keys[1],
            products[0] & WORD,
        )
    return counter


# Of Random123 1.14, kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    counters, keys, words = (tuple(int(word, 16) for word in text.split()) for text in (counter, key, expected))
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counters)
    assert tuple(int(word) for word in philox4x32((keys[0], keys[1]), (c0, c1, c2, c3))) == words
    assert scalar_philox(counters, keys) == words


def some_offsets() -> torch.Tensor:
    """Small, on either side of 2^31 and 2^32, and large."""
    edges = [start + i for start in (0, 2**31 - 4, 2**32 - 4, 2**45) for i in range(8)]
    scattered = np.random.default_rng(0).integers(0, 2**50, 512 - len(edges)).tolist()
    return torch.tensor(edges + scattered)


@triton.jit  # type: ignore[untyped-decorator]
def draw(word_ptr, normal_ptr, key_ptr, offset_ptr, STREAM: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    key = (tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2), tl.load(key_ptr + 3))
    step = tl.load(key_ptr + 4)
    offsets = tl.load(offset_ptr + i)
    words = philox(key, offsets, step, STREAM)
    for j in tl.static_range(4):
        tl.store(word_ptr + SIZE * j + i, words[j].to(tl.int64))
    tl.store(normal_ptr + i, normal(key, (offsets, ()), step, STREAM))


@triton.jit  # type: ignore[untyped-decorator]
def draw_run(normal_ptr, key_ptr, first_ptr, STREAM: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i, first = tl.arange(0, SIZE), tl.load(first_ptr)
    key = (tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2), tl.load(key_ptr + 3))
    tl.store(normal_ptr + i, normal(key, (first + i, (first,)), tl.load(key_ptr + 4), STREAM))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_and_twin_are_equal_in_every_bit(dtype: torch.dtype) -> None:
    offsets = some_offsets()
    for words, step, stream in [
        ((0, 0), 0, 0),
        ((WORD, WORD), STEPS - 1, 2**31 - 1),
        ((0x12345678, 0x9ABCDEF0), 1, 2),
        (key_words(7, "weight"), 3, 1),
    ]:
        key = halves(words)
        drawn = torch.zeros(4, len(offsets), dtype=torch.int64), torch.zeros(len(offsets))
        with np.errstate(all="ignore"):
            numbers = torch.tensor((*key, step), dtype=dtype)
            draw[(1,)](*drawn, numbers, offsets, STREAM=stream, SIZE=len(offsets), enable_fp_fusion=False)
        assert torch.equal(drawn[0], torch.stack(random.philox(key, offsets, step, stream)))
        assert torch.equal(drawn[1], random.normal(key, offsets, step, stream))
        for offset, words_drawn in zip(offsets.tolist()[::37], drawn[0].T.tolist()[::37], strict=True):
            assert tuple(words_drawn) == scalar_philox((offset & WORD, offset >> 32, step, stream), words)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("first", [0, 64, 2**32 - 64, 2**45])
def test_a_run_draws_the_same_with_fewer_calls(first: int) -> None:
    key, drawn = halves(key_words(7, "weight")), torch.zeros(128)
    with np.errstate(all="ignore"):
        arguments = drawn, torch.tensor((*key, 3.0)), torch.tensor(first)
        draw_run[(1,)](*arguments, STREAM=0, SIZE=128, enable_fp_fusion=False)
    assert torch.equal(drawn, random.normal(key, first + torch.arange(128), 3, 0))


def test_neighbours_are_independent() -> None:
    """Neighbours that share a call are uncorrelated: the numbers, their sizes and their squares."""
    n = 100_000
    z = random.normal(halves(key_words(0, 0)), torch.arange(4 * n), 1, 0).double().view(n, 4)
    for powers in (z, z.abs(), z.square()):
        correlation = torch.corrcoef(powers.T) - torch.eye(4, dtype=torch.float64)
        assert correlation.abs().max() < 5 / n**0.5


def test_normal_is_box_and_mullers_to_fp32_precision() -> None:
    """Relatively, near 0 as well: within 4 epsilons."""
    key, offsets = halves(key_words(0, 0)), torch.arange(200_000)
    words = [word.cpu().numpy() for word in random.philox(key, offsets[: len(offsets) // 4], 1, 0)]
    drawn = random.normal(key, offsets, 1, 0).double().cpu().numpy().reshape(-1, 4)
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log((words[pair] | 1).astype(np.float32) / 2.0**32))
        x = ((words[pair + 1] >> 2).astype(np.float32) * np.float32(2.0**-30)).astype(np.float64)
        for bit, part in ((1, x), (2, 1 - x)):
            expected = np.where(words[pair + 1] & bit, -1.0, 1.0) * radius * np.sin(np.pi / 2 * part)
            assert (np.abs(drawn[:, pair + bit - 1] - expected) <= 4 * 2.0**-23 * np.abs(expected)).all()


def test_normal_at_the_ends_of_the_words() -> None:
    """The smallest word makes the largest number, the largest one 0; never NaN or infinity."""
    words = torch.tensor([0, 1, 2, 3, 2**24, 2**31, WORD - 300, WORD - 1, WORD])
    squares = random._minus_two_log(words).double()
    expected = -2 * torch.log((words | 1).float().double() / 2**32)
    torch.testing.assert_close(squares, expected, rtol=2**-22, atol=0)
    assert squares.min() == 0
    assert math.sqrt(float(squares.max())) == pytest.approx(6.66, abs=0.01)
    torch.testing.assert_close(random._sine(torch.tensor([0.0, 1 / 3, 1.0])), torch.tensor([0.0, 0.5, 1.0]))


def test_normal_is_normal() -> None:
    """Kolmogorov-Smirnov at the level of 1e-4, and the share beyond three deviations."""
    n = 200_000
    z = random.normal(halves(key_words(0, 0)), torch.arange(n), 2, 0).double().sort().values
    distribution = torch.special.ndtr(z)
    steps = torch.arange(n) / n
    distance = torch.maximum(distribution - steps, steps + 1 / n - distribution).max()
    assert float(distance) < math.sqrt(math.log(2 / 1e-4) / 2 / n)
    assert int((z.abs() > 3).sum()) == pytest.approx(0.0027 * n, abs=4 * math.sqrt(0.0027 * n))
