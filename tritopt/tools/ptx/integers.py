"""Integer and bit instructions, as functions of arrays of one type."""

from __future__ import annotations

import numpy as np

from tritopt.tools.ptx.floats import Array


def widened(x: Array) -> Array:
    """Convert to the type of twice the width."""
    return x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")


def multiply_high(x: Array, y: Array) -> Array:
    """Upper half of the product (mul.hi)."""
    if x.dtype.itemsize == 8:
        return np.asarray(x.astype(object) * y.astype(object) >> 64).astype(x.dtype)
    return (widened(x) * widened(y) >> (8 * x.dtype.itemsize)).astype(x.dtype)


def shift_left(x: Array, n: Array) -> Array:
    """Shift left; by the width or more gives 0."""
    width = 8 * x.dtype.itemsize
    return np.asarray(np.where(n < width, x << (n % width).astype(x.dtype), x.dtype.type(0)))


def shift_right(x: Array, n: Array) -> Array:
    """Shift right; by the width or more gives 0, or the sign of signed numbers."""
    last = 8 * x.dtype.itemsize - 1
    shifted = np.asarray(x >> np.minimum(n, last).astype(x.dtype))
    return shifted if x.dtype.kind == "i" else np.where(n > last, x.dtype.type(0), shifted)


def quotient(x: Array, y: Array) -> Array:
    """Quotient towards zero; by 0 all ones, which PTX leaves open."""
    floor = x // y
    if x.dtype.kind == "i":
        floor = floor + ((floor * y != x) & ((x < 0) != (y < 0)))
    return np.where(y == 0, ~x.dtype.type(0), floor).astype(x.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Pick bytes of a and b (prmt): four bits of the selector each, the highest of which asks for the byte's sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(1, np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (8 * (choice & np.uint32(7))).astype(np.uint64)) & np.uint64(255)
        picked = np.where(choice < 8, byte, np.where(byte < 128, np.uint64(0), np.uint64(255)))
        result = result | (picked.astype(np.uint32) << np.uint32(8 * i))
    return result


def logic3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Combine bits by a truth table (lop3): bit 4 a + 2 b + c of the table is the result's."""
    result = np.zeros(1, a.dtype)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result = result | np.where((table >> np.uint32(i)) & np.uint32(1), term, term ^ term)
    return result


def extract(x: Array, start: Array, length: Array) -> Array:
    """Extract a field of bits (bfe); of signed numbers its highest bit, or the number's sign, fills the rest."""
    width = 8 * x.dtype.itemsize
    start, length = (n.astype(np.int64) & 255 for n in (start, length))
    kept = np.clip(np.minimum(length, width - start), 0, width)
    beyond = shift_left(np.full(kept.shape, ~x.dtype.type(0)), kept)
    field = shift_right(x, start) & ~beyond
    last = np.clip(start + length - 1, 0, width - 1)
    is_negative = (shift_right(x, last) & 1 == 1) & (length > 0) & (x.dtype.kind == "i")
    return np.where(is_negative, field | beyond, field)


def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    """Put the lowest bits of a into b (bfi)."""
    start, length = start & np.uint32(255), length & np.uint32(255)
    mask = shift_left(~shift_left(np.full(length.shape, ~a.dtype.type(0)), length), start)
    return (shift_left(a, start) & mask) | (b & ~mask)
