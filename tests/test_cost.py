"""Bytes per parameter, against sums done by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tritopt
from tritopt.cost import Traffic, bytes_per_parameter, listings, resident_bytes, tensors_of
from tritopt.kernels.formats import MASTER_FP32, PLAIN, Format

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("name", "arguments", "weight", "grad", "fmt", "read", "written"),
    [
        # w 4, g 4; w 4
        ("sgd", {}, FP32, FP32, PLAIN, 8, 4),
        ("test", {}, FP32, FP32, PLAIN, 8, 4),
        ("nag", {"momentum": 0.0}, FP32, FP32, PLAIN, 8, 4),
        # w 8, g 8, m 8; w 8, m 8
        ("sgd", {"momentum": 0.9}, FP64, FP64, PLAIN, 24, 16),
        # w 2, g 2, m 2; w 2, m 2
        ("nag", {}, FP16, FP16, PLAIN, 6, 4),
        # g 2, master 4, m and v 8; w 2, master 4, m and v 8
        ("adam", {}, BF16, BF16, MASTER_FP32, 14, 14),
        ("adamw", {}, BF16, FP32, MASTER_FP32, 16, 14),
        # Phase 1: g 2, master 4, m and v 8; m and v 8. Phase 2: master 4, m and v 8; master 4, w 2.
        ("lamb", {}, BF16, BF16, MASTER_FP32, 14 + 12, 8 + 6),
        # States stay fp32. Phase 1: g 2, w 2, m and v 8; m and v 8. Phase 2: w 2, m and v 8; w 2.
        ("lamb", {}, BF16, BF16, PLAIN, 12 + 10, 8 + 2),
    ],
)
def test_traffic(
    name: str,
    arguments: dict[str, Any],
    weight: torch.dtype,
    grad: torch.dtype,
    fmt: Format,
    read: int,
    written: int,
) -> None:
    opt = tritopt.create(name, **arguments)
    assert bytes_per_parameter(opt, weight, grad, fmt) == Traffic(read, written)
    assert bytes_per_parameter(opt, weight, grad, fmt).total == read + written


def test_the_optimizer_is_left_as_it_was() -> None:
    opt = tritopt.create("adam")
    bytes_per_parameter(opt, BF16, BF16, MASTER_FP32)
    assert opt.multi_precision is False


@pytest.mark.parametrize(
    ("weight", "fmt", "expected"),
    [(FP32, PLAIN, 12), (BF16, MASTER_FP32, 2 + 4 + 8), (BF16, PLAIN, 6), (FP64, PLAIN, 24)],
)
def test_resident_bytes_of_adam(weight: torch.dtype, fmt: Format, expected: int) -> None:
    assert resident_bytes(tritopt.create("adam"), weight, fmt) == expected


def test_a_master_needs_16_bit_weights() -> None:
    with pytest.raises(ValueError, match=r"'fp32 master' stores float16 or bfloat16 weights, not torch.float32"):
        bytes_per_parameter(tritopt.create("sgd"), FP32, FP32, MASTER_FP32)


def test_without_phases_nothing_is_known() -> None:
    class Ported(tritopt.Optimizer):
        variants = ({}, {"wd": 0.1})

    with pytest.raises(ValueError, match="Ported declares no phases"):
        bytes_per_parameter(Ported(), FP32, FP32)
    (listing,) = listings([Ported])
    assert (listing.kernels, listing.moved, listing.resident["fp32"]) == ((), {}, 4)


def test_listings_have_a_row_for_each_set_of_launches() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = list(listings([tritopt.SGD, tritopt.Adam]))
    assert [(row.optimizer, row.arguments) for row in rows] == [("sgd", {}), ("sgd", {"momentum": 0.9}), ("adam", {})]
    assert rows[2].states == ("mean", "var")
    assert [traffic.total for traffic in rows[2].moved.values()] == [28, 28, 26, 14]


def test_tensors_of_a_state() -> None:
    a, b, c = torch.zeros(3)
    assert len(tensors_of((a, (b, None, [c])))) == 3
    with pytest.raises(TypeError, match="got 7"):
        tensors_of((a, 7))
