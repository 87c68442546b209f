"""Keys of random numbers: what they tell apart, and that they last."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.support.world import forks
from tritopt.engine.random_keys import halves, key_words

WORD = 2**32 - 1


def test_key_says_apart_what_differs() -> None:
    indices = [0, 1, "0", "1", "weight", (0,), (0, 1), ("0", 1), ((0, 1),), "(0, 1)"]
    keys = [key_words(seed, index) for seed in (0, 1, 10) for index in indices]
    assert len(set(keys)) == len(keys)
    assert all(0 <= word <= WORD for key in keys for word in key)


def test_key_is_the_same_for_what_is_equal() -> None:
    assert key_words(0, 3) == key_words(0, np.int64(3)) == key_words(np.int32(0), 3)  # type: ignore[arg-type]
    assert key_words(0, "w") == key_words(0, np.str_("w"))


def test_key_is_the_same_in_another_process() -> None:
    """Python's own hash of a str is not."""
    name = ("layer", 7, "größe")
    with forks().Pool(1) as pool:
        words, other = pool.apply(key_words, (5, name)), pool.apply(hash, (name,))
    assert words == key_words(5, name)
    assert other != hash(name) or "PYTHONHASHSEED" in os.environ


@pytest.mark.parametrize("index", [object(), 1.5, None, (0, object())], ids=["object", "float", "None", "tuple"])
def test_key_refuses_an_index_that_may_not_last(index: object) -> None:
    with pytest.raises(TypeError, match=r"parameter .* use an int, a str or a tuple of such"):
        key_words(0, index)


def test_halves_put_together_are_the_words() -> None:
    assert halves((0x12345678, 0x9ABCDEF0)) == (0x5678, 0x1234, 0xDEF0, 0x9ABC)
