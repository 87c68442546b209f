"""Keys of random numbers: the seed and a parameter's index, hashed on the host.

kernels/twins/random.py says what numbers are made of a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from numbers import Integral
from typing import Any

from tritopt.kernels.twins.random import Key


def noise_key(seed: int, index: Hashable) -> int:
    """The key of `Noise`, as an int64."""
    low, high = key_words(seed, index)
    return (low | high << 32) - (high >> 31 << 64)


def key_words(seed: int, index: Hashable) -> tuple[int, int]:
    """The two 32-bit words, low one first, of the key for one parameter.

    >>> [hex(word) for word in key_words(0, "weight")]
    ['0xc0ac88e1', '0xf14daa9d']

    Raises:
        TypeError: an index that may look different in the next process.
    """
    text = ascii((int(seed), _canonical(index)))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"tritopt").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _canonical(index: Any) -> Any:
    """The index in plain Python values, equal ones for equal indices."""
    if isinstance(index, Integral):
        return int(index)
    if isinstance(index, str):
        return str.__str__(index)
    if isinstance(index, tuple):
        return tuple(map(_canonical, index))
    raise TypeError(
        f"parameter {index!r}: random numbers are keyed by the index, which must mean the same in every process; use "
        "an int, a str or a tuple of such"
    )


def halves(words: tuple[int, int]) -> Key:
    """The words as kernels and their twins take a key: four numbers of 16 bits, which every compute dtype holds."""
    low, high = words
    return float(low & 0xFFFF), float(low >> 16), float(high & 0xFFFF), float(high >> 16)
