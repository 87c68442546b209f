"""Products of matrices with their transposes by a kernel that computes one triangle."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.optimizers.test_muon import ROUNDING, parameter, random
from tritopt import optim
from tritopt.engine import gram
from tritopt.engine.gram import symmetric_product
from tritopt.engine.launcher import n_launches
from tritopt.engine.tuning.config import Tiles
from tritopt.kernels.language import INTERPRETED
from tritopt.tools.interpreter import live

ROOT = Path(__file__).resolve().parents[2]
TILES = Tiles(block_size=16, block_k=32, group=2, num_warps=4, num_stages=2)
# What tiles divide; what 8 divides; what nothing divides; M > K, and one row of tiles; three rows, which are odd.
SHAPES = [(1, 64, 96), (3, 48, 32), (1, 40, 72), (3, 33, 50), (1, 80, 16), (2, 17, 5), (1, 20, 1)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that matrices of a test have several."""
    monkeypatch.setattr(gram, "choose", lambda *_: TILES)


def operands(shape: tuple[int, int, int], dtype: torch.dtype, is_transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """X, which lies in memory as itself or as its transpose, and a symmetric matrix for each."""
    x = random(*shape).to(dtype)
    added = random(shape[0], shape[1], shape[1], seed=1)
    return x.mT.contiguous().mT if is_transposed else x, (added + added.mT).to(dtype)


@DTYPES
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], is_transposed: bool, dtype: torch.dtype) -> None:
    """Products are within rounding of the sum's terms in fp32 and of the result, and symmetric to the bit."""
    x, added = operands(shape, dtype, is_transposed)
    for alpha, beta, y in ((1.0, 0.0, None), (0.7, -1.3, added)):
        before = n_launches()
        product = symmetric_product(x, y, alpha, beta, TILES)
        assert n_launches() == before + 1
        assert torch.equal(product, product.mT)
        y64 = torch.zeros_like(added).double() if y is None else y.double()
        truth = alpha * x.double() @ x.double().mT + beta * y64
        terms = alpha * x.double().abs() @ x.double().abs().mT + (beta * y64).abs()
        allowed = truth.abs() * torch.finfo(dtype).eps / 2 + terms * shape[2] * torch.finfo(torch.float32).eps
        assert ((product.double() - truth).abs() <= allowed).all()
        torchs = torch.bmm(x, x.mT) if y is None else torch.baddbmm(y, x, x.mT, beta=beta, alpha=alpha)
        assert ((product.double() - torchs.double()).abs() <= 2 * allowed).all()


@pytest.mark.skipif(not INTERPRETED, reason="replaces a part of the interpreter")
def test_symmetric_though_sums_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may add up an element's terms in another order than its mirror image's; NumPy does not, unless made to."""
    from triton.runtime.interpreter import InterpreterBuilder

    real = InterpreterBuilder.create_dot

    def dot(*args: Any) -> Any:
        result = real(*args)
        result.data = result.data * (1 + 1e-3 * np.triu(np.ones_like(result.data), 1))
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    with live():
        product = symmetric_product(random(2, 33, 50), tiles=TILES)
    assert torch.equal(product, product.mT)


def test_views_of_a_scratch() -> None:
    """Matrices with gaps between them, columns of a wider one, and strides of which none is 1."""
    buffer = random(3, 40, 200).bfloat16()
    for x in (buffer[:, :33, :64], buffer[:, :, 7:71], buffer[:, ::2, ::2], buffer[1:2, :, :48].mT):
        expected = symmetric_product(x.contiguous(), tiles=TILES)
        assert torch.equal(symmetric_product(x, tiles=TILES), expected)


def test_nothing_outside_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, whose tiles stand out: rows of the next matrix, and what lies behind the last."""
    results = []

    def fenced(*shape: int, **options: Any) -> torch.Tensor:
        buffer = torch.full((math.prod(shape) + 64,), 7.0, **options)
        results.append(buffer)
        return buffer[: math.prod(shape)].view(shape)

    x = random(2, 33, 50).bfloat16()
    monkeypatch.setattr(torch, "empty", fenced)
    product = symmetric_product(x, tiles=TILES)
    (buffer,) = results
    assert product.data_ptr() == buffer.data_ptr()
    assert (buffer[product.numel() :] == 7.0).all()


def test_a_nan_spoils_its_own_matrix() -> None:
    x = random(3, 40, 48).bfloat16()
    x[1, 39, 3] = math.nan
    product = symmetric_product(x, tiles=TILES)
    assert product[1, 39].isnan().all()
    assert product[1, :, 39].isnan().all()
    assert product[1, :39, :39].isfinite().all()
    assert product[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("side", "dtype"), [(16, torch.bfloat16), (40, torch.float64)], ids=["one tile", "fp64"])
def test_torch_computes_what_has_no_half_to_leave_out(side: int, dtype: torch.dtype) -> None:
    x, added = operands((2, side, 24), dtype, False)
    before = n_launches()
    assert torch.equal(symmetric_product(x, tiles=TILES), torch.bmm(x, x.mT))
    expected = torch.baddbmm(added, x, x.mT, beta=-1.3, alpha=0.7)
    assert torch.equal(symmetric_product(x, added, 0.7, -1.3, TILES), expected)
    assert n_launches() == before


class Programs:
    """Receiver of launches that counts their programs."""

    def __init__(self) -> None:
        self.n = 0

    def kernel(self, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        self.n += grid


def test_operations_of_the_guide() -> None:
    """The table of docs/guides/muon.md: five steps of two products of one triangle, as launched, and one full one."""
    text = (ROOT / "docs" / "guides" / "muon.md").read_text()
    lines = re.findall(r"^\| (\d+) x (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+) % \|$", text, re.MULTILINE)
    assert len(lines) == 4
    for m, k, torchs, ours, share in lines:
        m, k = int(m), int(k)
        programs = Programs(), Programs()
        for width, recording in zip((k, m), programs, strict=True):
            x = torch.empty(1, m, width, dtype=torch.bfloat16, device="meta")
            symmetric_product(x, tiles=Tiles(), record=recording)
        whole = 4 * m * m * k + 2 * m**3
        halves = 2 * 128 * 128 * (programs[0].n * k + programs[1].n * m) + 2 * m * m * k
        assert [torchs, ours, share] == [
            f"{5e-12 * n:.{len(t) - 2}f}" for n, t in ((whole, torchs), (halves, ours))
        ] + [f"{100 * halves / whole:.0f}"]


SIDES = ((40, 24), (24, 48), (24, 48), (33, 50), (8, 8))


def train(steps: int, fused: bool | None = None, **options: Any) -> tuple[list[torch.Tensor], int]:
    """Parameters after some steps of Muon, and the launches of the last one."""
    params = [parameter(*shape, seed=i) for i, shape in enumerate(SIDES)]
    opt = optim.Muon(params, lr=0.1, fused=fused, **options)
    before = 0
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=1000 * t + i)
        before = n_launches()
        opt.step()
    return [p.detach() for p in params], n_launches() - before


@pytest.mark.parametrize(
    ("options", "n_products"),
    [
        ({}, 3 * 5 * 2),  # three shapes of more than one tile
        ({"ns_dtype": "fp32", "beta2": 0.9}, 3 * 5 * 2),
        ({"split": 2, "split_dim": -1, "ns_steps": 3}, 2 * 3 * 2),
    ],
    ids=["bf16", "fp32, rows normalised", "split"],
)
def test_muon_goes_where_it_goes_without(options: dict[str, Any], n_products: int, small: None) -> None:
    """Wide and tall matrices: each step within rounding of what torch's products give, as `tritopt check` allows."""
    steps = 2
    (ours, launches), (torchs, fewer) = (train(steps, ns_symmetric=on, **options) for on in (True, False))
    assert fewer == (4 if "beta2" in options else 2)
    assert launches == fewer + n_products
    start = [parameter(*shape, seed=i) for i, shape in enumerate(SIDES)]
    for p, q, first in zip(ours, torchs, start, strict=True):
        ratio = math.sqrt(max(1, p.shape[0] / p.shape[1]))
        allowed = math.sqrt(steps) * (1e-3 if "ns_dtype" in options else 1) * ROUNDING * 0.1 * ratio
        assert (p - q).abs().max() <= allowed
        assert (p - first).abs().max() > 4 * allowed


def test_the_reference_is_torchs(small: None) -> None:
    """Neither the updates of tensors nor a step with fused=False launch anything."""
    (on, n), (off, _) = (train(2, False, ns_symmetric=symmetric) for symmetric in (True, False))
    assert n == 0
    assert all(map(torch.equal, on, off))


@pytest.mark.parametrize("given", [1, "yes", None])
def test_what_is_neither_true_nor_false(given: Any) -> None:
    with pytest.raises(ValueError, match=f"ns_symmetric={given!r}"):
        optim.Muon([parameter(4, 6)], ns_symmetric=given)


def test_a_checkpoint_does_not_hold_it() -> None:
    """It says how a step runs, not what it computes: a checkpoint is torch's, and may be loaded without it."""
    opt = optim.Muon([parameter(4, 6)], ns_symmetric=True)
    assert "ns_symmetric" not in opt.state_dict()["param_groups"][0]
    opt.load_state_dict(optim.Muon([parameter(4, 6)]).state_dict())
    assert opt.param_groups[0]["ns_symmetric"] is True
