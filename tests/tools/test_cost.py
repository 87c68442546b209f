"""Bytes per parameter, against sums done by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tritopt
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.weights import KAHAN, MASTER_FP32, MASTERS, SPLIT8, SPLIT16, STOCHASTIC
from tritopt.tools.cost import (
    PRECISIONS,
    Traffic,
    bytes_per_parameter,
    listings,
    resident_bytes,
    tensors_of,
    traffic_by_tensor,
)

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
        # g 2, w 2, master 4, m and v 8; the same without g
        ("adam", {}, BF16, BF16, MASTER_FP32, 16, 14),
        ("adamw", {}, BF16, FP32, MASTER_FP32, 18, 14),
        # Phase 1: g 2, w 2, master 4, m and v 8; m and v 8. Phase 2: w 2, master 4, m and v 8; master 4, w 2.
        ("lamb", {}, BF16, BF16, MASTER_FP32, 16 + 14, 8 + 6),
        # w 2, remainder 1, g 2, m and v 1 and a 64th of 2 each; the same without g
        ("adamw", {"state_dtype": "int8"}, BF16, BF16, SPLIT8, 7 + 4 / 64, 5 + 4 / 64),
        # Only one of the states
        ("adamw", {"state_dtype": {"var": "fp8"}}, BF16, BF16, SPLIT16, 2 + 2 + 2 + 4 + 1 + 2 / 64, 4 + 4 + 1 + 2 / 64),
        ("adamw", {"state_dtype": "bf16"}, FP32, FP32, PLAIN, 4 + 4 + 4, 4 + 4),
        ("adamw", {"state_dtype": "fp32"}, BF16, BF16, PLAIN, 2 + 2 + 8, 2 + 8),
        ("lion", {}, BF16, BF16, STOCHASTIC, 2 + 2 + 4, 2 + 4),
        ("lion", {}, BF16, BF16, KAHAN, 4 + 2 + 4, 4 + 4),
        ("lion", {"state_dtype": "fp16"}, BF16, BF16, KAHAN, 4 + 2 + 2 + 2 / 64, 4 + 2 + 2 / 64),
        # Four states of 2
        ("adan", {"state_dtype": "bf16"}, BF16, BF16, SPLIT16, 4 + 2 + 8, 4 + 8),
        # Large matrices: their rows' states do not count. g three times, w twice; w.
        ("adafactor", {}, BF16, BF16, SPLIT16, 6 + 8, 4),
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
    read: float,
    written: float,
) -> None:
    opt = tritopt.create(name, **arguments)
    assert bytes_per_parameter(opt, weight, grad, fmt) == Traffic(read, written)
    assert bytes_per_parameter(opt, weight, grad, fmt).total == read + written


@pytest.mark.parametrize("fmt", [PLAIN, *MASTERS.values()], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "sgd", "groupadagrad"])
def test_traffic_by_tensor_adds_up(name: str, fmt: Format) -> None:
    opt = tritopt.create(name, state_dtype={"mean": "int8"} if name in ("adamw", "lamb") else None)
    if fmt.draws and name == "groupadagrad":
        with pytest.raises(ValueError, match="draw no random bits"):
            traffic_by_tensor(opt, BF16, BF16, fmt)
        return
    parts = traffic_by_tensor(opt, BF16, BF16, fmt)
    total = bytes_per_parameter(opt, BF16, BF16, fmt)
    assert sum(part.read for part in parts.values()) == total.read
    assert sum(part.written for part in parts.values()) == total.written
    assert parts["gradient"].written == 0
    assert ("master" in parts) == bool(fmt.companion)


def test_traffic_by_tensor_of_adamw() -> None:
    """Weight and its other 16 bits, int8 codes with a 64th of a bf16 scale, and fp32."""
    opt = tritopt.create("adamw", state_dtype={"mean": "int8"})
    assert traffic_by_tensor(opt, BF16, BF16, SPLIT16) == {
        "gradient": Traffic(2, 0),
        "weight": Traffic(2, 2),
        "master": Traffic(2, 2),
        "mean": Traffic(1 + 2 / 64, 1 + 2 / 64),
        "var": Traffic(4, 4),
    }


def test_the_optimizer_is_left_as_it_was() -> None:
    opt = tritopt.create("adam")
    bytes_per_parameter(opt, BF16, BF16, MASTER_FP32)
    assert opt.multi_precision is False


@pytest.mark.parametrize(
    ("weight", "fmt", "state_dtype", "expected"),
    [
        (FP32, PLAIN, None, 12),
        (FP32, PLAIN, "fp8", 4 + 2 + 4 / 64),
        (BF16, MASTER_FP32, None, 2 + 4 + 8),
        (FP16, MASTER_FP32, "fp16", 2 + 4 + 4 + 4 / 64),
        (BF16, SPLIT16, None, 2 + 2 + 8),
        (BF16, SPLIT16, "bf16", 2 + 2 + 4),
        (BF16, SPLIT8, None, 2 + 1 + 8),
        (BF16, SPLIT8, "int8", 2 + 1 + 2 + 4 / 64),
        (BF16, SPLIT8, {"mean": "bf16", "var": "int8"}, 2 + 1 + 2 + 1 + 2 / 64),
        (BF16, KAHAN, None, 2 + 2 + 8),
        (BF16, STOCHASTIC, None, 2 + 8),
        (BF16, PLAIN, None, 6),
        (BF16, PLAIN, "fp32", 10),
        (FP64, PLAIN, None, 24),
    ],
)
def test_resident_bytes_of_adam(weight: torch.dtype, fmt: Format, state_dtype: Any, expected: float) -> None:
    assert resident_bytes(tritopt.create("adam", state_dtype=state_dtype), weight, fmt) == expected


@pytest.mark.parametrize("name", ["adafactor", "groupadagrad"])
def test_what_a_row_shares_does_not_count(name: str) -> None:
    opt = tritopt.create(name)
    assert (resident_bytes(opt, FP32), resident_bytes(opt, BF16, MASTER_FP32)) == (4, 6)


def test_whole_numbers_print_as_such() -> None:
    assert repr(bytes_per_parameter(tritopt.create("adam"), FP32, FP32)) == "Traffic(read=16, written=12)"
    assert repr(resident_bytes(tritopt.create("adam"), FP32)) == "12"


@pytest.mark.parametrize("fmt", [fmt for fmt in MASTERS.values() if fmt.draws], ids=lambda fmt: fmt.name)
def test_what_an_optimizer_refuses_is_refused(fmt: Format) -> None:
    with pytest.raises(ValueError, match="not for Adafactor, whose kernels draw no random bits"):
        bytes_per_parameter(tritopt.create("adafactor"), BF16, BF16, fmt)


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


def test_listings_leave_out_what_is_refused() -> None:
    class Stepping(tritopt.Optimizer):
        """Sees its states as they are."""

        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            raise NotImplementedError

    (own,) = listings([Stepping])
    assert list(own.resident) == ["fp32", "bf16 + fp32 master", "bf16"]
    (adafactor,) = listings([tritopt.Adafactor])
    assert list(adafactor.moved) == list(adafactor.resident)
    assert set(PRECISIONS) - set(adafactor.moved) == {"split8, int8 states"}


def test_listings_have_a_row_for_each_set_of_launches() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = list(listings([tritopt.SGD, tritopt.Adam]))
    assert [(row.optimizer, row.arguments) for row in rows] == [("sgd", {}), ("sgd", {"momentum": 0.9}), ("adam", {})]
    assert rows[2].states == ("mean", "var")
    assert {name: traffic.total for name, traffic in rows[2].moved.items()} == {
        "fp32": 28,
        "bf16 + fp32 master": 30,
        "bf16 + 16-bit remainder": 26,
        "split16, bf16 states": 18,
        "split8, int8 states": 12.125,
        "bf16": 14,
    }


def test_tensors_of_a_state() -> None:
    a, b, c = torch.zeros(3)
    assert len(tensors_of((a, (b, None, [c])))) == 3
    with pytest.raises(TypeError, match="got 7"):
        tensors_of((a, 7))
