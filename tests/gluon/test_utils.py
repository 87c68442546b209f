"""clip_global_norm: Gluon's signature, formula and return value, without a wait unless the check is asked for."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import record_launches
from tritopt.engine.plan import unavailable
from tritopt.gluon.utils import clip_global_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative: one rounding of the product, to the array's dtype."""


def arrays_of(dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shapes = [(5, 7), (130,), (1,), (0,), (2, 3, 4)]
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def norm_of(arrays: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(array.double().square().sum()) for array in arrays))


def test_names() -> None:
    assert tritopt.clip_global_norm is clip_global_norm is tritopt.gluon.utils.clip_global_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", [True, False])
def test_scales_to_the_norm(dtype: torch.dtype, check: bool) -> None:
    arrays = arrays_of(dtype)
    before, norm = [array.to(torch.float64, copy=True) for array in arrays], norm_of(arrays)
    returned = clip_global_norm(arrays, 0.5, check_isfinite=check)
    if check:
        assert type(returned) is float
    else:
        assert isinstance(returned, torch.Tensor)
        assert (returned.shape, returned.dtype, returned.device) == ((1,), torch.float32, arrays[0].device)
    assert float(returned) == pytest.approx(norm, rel=1e-6)
    for array, old in zip(arrays, before, strict=True):
        torch.testing.assert_close(array.double(), old * (0.5 / (norm + 1e-8)), rtol=ULP[dtype], atol=1e-7)


@pytest.mark.parametrize("check", [True, False])
def test_short_ones_are_not_written(check: bool) -> None:
    arrays = arrays_of(torch.float32)
    before = [array.clone() for array in arrays]
    clip_global_norm(arrays, 2 * norm_of(arrays), check)
    assert all(torch.equal(array, old) for array, old in zip(arrays, before, strict=True))


def test_the_default_checks() -> None:
    assert clip_global_norm([torch.tensor([3.0, 4.0])], 10) == 5.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_a_warning_if_it_is_looked_at(value: float) -> None:
    arrays = [torch.tensor([1.0, value])]
    with pytest.warns(UserWarning, match=r"nan or inf is detected: the norm is (inf|nan)\. Clipping results"):
        returned = clip_global_norm(arrays, 1.0)
    assert not math.isfinite(float(returned))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        returned = clip_global_norm([torch.tensor([1.0, value])], 1.0, check_isfinite=False)
    assert not math.isfinite(float(returned))


def test_one_launch_reads_and_one_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    if unavailable(torch.zeros(1)) is not None:
        pytest.skip("needs a kernel")
    launches = record_launches(monkeypatch)
    clip_global_norm(arrays_of(torch.float32), 0.5, check_isfinite=False)
    assert [n_groups for n_groups, _ in launches] == [1, 1]


def test_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritopt.engine.clip.unavailable", lambda tensor: "no kernel here")
    arrays = arrays_of(torch.float32)
    before, norm = [array.to(torch.float64, copy=True) for array in arrays], norm_of(arrays)
    assert clip_global_norm(arrays, 0.5) == pytest.approx(norm, rel=1e-6)
    for array, old in zip(arrays, before, strict=True):
        torch.testing.assert_close(array.double(), old * (0.5 / (norm + 1e-8)), rtol=1e-6, atol=1e-7)


def test_mixed_dtypes_and_what_is_listed_twice() -> None:
    one, other = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float16)
    assert clip_global_norm([one, other, one], 2.5) == 5.0
    assert one.item() == pytest.approx(1.5)
    assert other.item() == pytest.approx(2.0)


def test_sparse_gradients() -> None:
    """Their duplicates add up in the norm, and all stored values are scaled."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.tensor([[1.0], [4.0], [2.0]]), (3, 1))
    assert clip_global_norm([sparse], 2.5) == 5.0
    torch.testing.assert_close(sparse.to_dense(), torch.tensor([[1.5], [0.0], [2.0]]))


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ([], 1.0, ValueError, "arrays is empty"),
    ([torch.ones(2), None], 1.0, TypeError, r"arrays\[1\] is None: leave out parameters without a gradient"),
    ([torch.ones(2), 3.0], 1.0, TypeError, r"arrays\[1\] is 3.0: pass tensors"),
    ([torch.ones(2), torch.ones(2, dtype=torch.int32)], 1.0, TypeError, r"arrays\[1\] is torch.int32"),
    (torch.ones(2, 2), 1.0, TypeError, "arrays is a tensor: pass a list"),
    ([torch.ones(2)], -1.0, ValueError, "max_norm=-1.0"),
    ([torch.ones(2)], math.nan, ValueError, "max_norm=nan"),
    ([torch.ones(2)], "1", TypeError, "max_norm='1'"),
    ([torch.ones(2), torch.ones(1).expand(3)], 0.1, ValueError, r"arrays\[1\].*share memory"),
]


@pytest.mark.parametrize(("arrays", "max_norm", "error", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_scales_nothing(arrays: Any, max_norm: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip_global_norm(arrays, max_norm)
    assert all((array == 1).all() for array in arrays if isinstance(array, torch.Tensor))
