"""Global norm and clip: tritopt.clip_grad_norm_, and max_grad_norm of the optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import (
    EVERY_CLASS,
    Params,
    assert_follows,
    assert_same,
    clone,
    everything,
    named,
    options_of,
    parameters,
    record_launches,
    set_grads,
    train,
)
from tritopt.optim import AdamW

SHAPES = ((5, 7), (), (0, 3), (33,), (2, 3, 2, 2))
SAME = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}  # rounding of norm and product; truncation


def with_grads(dtype: torch.dtype, scale: float = 1.0) -> Params:
    params = parameters(dtype, SHAPES)
    set_grads(params, 0, scale)
    return params


def copies(params: Sequence[torch.Tensor]) -> Params:
    made = clone(params)
    for p, q in zip(params, made, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return made


def grads_of(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def exact_norm(params: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.double().square().sum() for g in grads_of(params)]).sum().sqrt()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return record_launches(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e-12])
def test_as_torch(dtype: torch.dtype, scale: float) -> None:
    params = with_grads(dtype, scale)
    theirs, before = copies(params), grads_of(params)
    norm = exact_norm(params)
    total = tritopt.clip_grad_norm_(params, 0.75)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.75)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.shape == expected.shape == ()
    torch.testing.assert_close(total.double(), norm, rtol=SAME[total.dtype], atol=0)
    factor = min(1.0, 0.75 / (float(norm) + 1e-6))
    for p, q, g in zip(params, theirs, before, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        truth = g.double() * factor
        torch.testing.assert_close(p.grad.double(), truth, rtol=SAME[dtype], atol=0)
        if dtype != torch.bfloat16:  # torch's own norm has 8 bits there
            torch.testing.assert_close(p.grad, q.grad, rtol=10 * SAME[dtype], atol=0)
        if factor == 1:
            assert torch.equal(p.grad, g)


def test_mixed_dtypes_take_a_launch_each(launches: list[Any]) -> None:
    params = [*with_grads(torch.bfloat16), *with_grads(torch.float32), *with_grads(torch.float64)]
    norm = exact_norm(params)
    total = tritopt.clip_grad_norm_(params, 1.0)
    assert [n for n, _ in launches] == [3, 3]  # the norm's, then the clip's
    torch.testing.assert_close(total, norm, rtol=SAME[torch.float32], atol=0)
    torch.testing.assert_close(exact_norm(params), torch.ones((), dtype=torch.float64), rtol=2**-7, atol=0)


@pytest.mark.parametrize(("max_norm", "is_skipped"), [(1e6, True), (math.inf, True), (0.5, False), (0.0, False)])
def test_nothing_is_written_where_nothing_is_clipped(max_norm: float, is_skipped: bool, launches: list[Any]) -> None:
    params = with_grads(torch.float32)
    before = grads_of(params)
    tritopt.clip_grad_norm_(params, max_norm)
    assert [bool(launch.noop) for _, launch in launches[1:]] == [is_skipped]
    for g, old in zip(grads_of(params), before, strict=True):
        if g.numel():
            assert torch.equal(g, old) == is_skipped
    assert max_norm or not any(g.any() for g in grads_of(params))


def test_bit_identical_from_run_to_run() -> None:
    params = with_grads(torch.float32)
    again = copies(params)
    totals = [tritopt.clip_grad_norm_(parameters, 0.5) for parameters in (params, again)]
    assert torch.equal(*totals)
    assert_same(grads_of(params), grads_of(again))


def test_several_models_in_turn() -> None:
    models = [with_grads(torch.float32), with_grads(torch.float32, 7.0), with_grads(torch.bfloat16)]
    for _ in range(2):
        for params in models:
            norm = exact_norm(params)
            torch.testing.assert_close(tritopt.clip_grad_norm_(params, 1e9).double(), norm, rtol=1e-6, atol=0)
            set_grads(params, 1)  # new tensors, elsewhere


def test_arguments_as_torch_takes_them() -> None:
    params = with_grads(torch.float32)
    norm = exact_norm(params).float()
    for argument in (params, iter(params), tuple(params), (p for p in params), dict(enumerate(params)).values()):
        torch.testing.assert_close(tritopt.clip_grad_norm_(argument, 1e9), norm)
    assert params[0].grad is not None
    torch.testing.assert_close(tritopt.clip_grad_norm_(params[0], 1e9), params[0].grad.norm())
    bound: Any = torch.tensor(1e9)
    torch.testing.assert_close(tritopt.clip_grad_norm_(params, bound, 2, False, True), norm)
    params[0].grad = None
    torch.testing.assert_close(tritopt.clip_grad_norm_(params, 1e9), exact_norm(params).float())


def test_nothing_to_clip() -> None:
    assert torch.equal(tritopt.clip_grad_norm_([], 1.0), torch.tensor(0.0))
    assert torch.equal(tritopt.clip_grad_norm_(parameters(), 1.0), torch.tensor(0.0))
    with pytest.warns(
        UserWarning, match="`parameters` is an empty generator, no gradient clipping will occur."
    ) as seen:
        tritopt.clip_grad_norm_((p for p in parameters(shapes=())), 1.0)
    assert seen[0].filename == __file__
    empty = parameters(shapes=((0, 3),))
    set_grads(empty, 0)
    assert torch.equal(tritopt.clip_grad_norm_(empty, 1.0), torch.tensor(0.0))


@pytest.mark.parametrize("norm_type", [1, 3.0, math.inf, "inf", 0.5])
def test_other_norms_are_torchs(norm_type: Any) -> None:
    params = with_grads(torch.float32)
    params = [p for p in params if p.numel()]  # torch has no infinity norm of nothing
    theirs = copies(params)
    total = tritopt.clip_grad_norm_(params, 0.5, norm_type)
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type))
    assert_same(grads_of(params), grads_of(theirs))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_norms_that_are_not_finite(value: float) -> None:
    params = with_grads(torch.float32)
    assert params[3].grad is not None
    params[3].grad[2] = value
    theirs, before = copies(params), grads_of(params)
    with pytest.raises(RuntimeError) as ours:
        tritopt.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as torchs:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, error_if_nonfinite=True)
    assert str(ours.value) == str(torchs.value)
    assert_same(grads_of(params), before)
    total = tritopt.clip_grad_norm_(params, 1.0)
    assert_same([total], [torch.nn.utils.clip_grad_norm_(theirs, 1.0)])
    assert_same(grads_of(params), grads_of(theirs))


def test_listed_twice_counts_once() -> None:
    params = with_grads(torch.float32)
    expected = copies(params)
    totals = [tritopt.clip_grad_norm_([*params, params[0]], 0.5), tritopt.clip_grad_norm_(expected, 0.5)]
    assert torch.equal(*totals)
    assert_same(grads_of(params), grads_of(expected))


def test_gradients_that_share_memory_are_refused() -> None:
    params = parameters(shapes=((4,), (4,)))
    flat = torch.ones(6)
    params[0].grad, params[1].grad = flat[:4], flat[2:]
    with pytest.raises(ValueError, match="'gradient 0' and 'gradient 1' share memory"):
        tritopt.clip_grad_norm_(params, 0.5)
    params[1].grad = torch.ones(1).expand(4)
    with pytest.raises(ValueError, match="elements share memory"):
        tritopt.clip_grad_norm_(params, 0.5)
    assert torch.equal(flat, torch.ones(6))


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, -math.inf])
def test_a_max_norm_that_makes_no_sense(max_norm: float) -> None:
    params = with_grads(torch.float32)
    before = grads_of(params)
    with pytest.raises(ValueError, match="max_norm="):
        tritopt.clip_grad_norm_(params, max_norm)
    assert_same(grads_of(params), before)


def test_strided_and_unaligned_gradients() -> None:
    params = parameters(shapes=((6, 4), (2, 4, 3, 3), (5,)))
    set_grads(params, 0)
    assert params[0].grad is not None
    assert params[1].grad is not None
    params[0].grad = params[0].grad.t().contiguous().t()
    params[1].grad = torch.randn(2, 4, 3, 6)[..., ::2]
    params[2].grad = torch.randn(6)[1:]
    before, norm = grads_of(params), exact_norm(params)
    total = tritopt.clip_grad_norm_(params, 0.5)
    torch.testing.assert_close(total.double(), norm, rtol=1e-6, atol=0)
    for g, old in zip(grads_of(params), before, strict=True):
        torch.testing.assert_close(g.double(), old.double() * 0.5 / (norm + 1e-6), rtol=1e-6, atol=0)


def test_sparse_gradients() -> None:
    """torch has none of it."""
    (p,) = parameters(shapes=((4, 3),))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.randn(3, 3), (4, 3))
    dense = p.grad.to_dense()
    total = tritopt.clip_grad_norm_(p, 0.1)
    torch.testing.assert_close(total, dense.norm())
    torch.testing.assert_close(p.grad.to_dense(), dense * (0.1 / (dense.norm() + 1e-6)))


def test_complex_gradients_are_left_to_torch() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.tensor([3 + 4j, 0, 0])
    torch.testing.assert_close(tritopt.clip_grad_norm_(p, 1.0), torch.tensor(5.0))
    torch.testing.assert_close(p.grad.abs().sum(), torch.tensor(1.0))


def test_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations give the same but for the order of the sum."""
    monkeypatch.setattr("tritopt.engine.clip.unavailable", lambda tensor: "no kernel here")
    params = [*with_grads(torch.float32), *with_grads(torch.bfloat16)]
    before, norm = grads_of(params), exact_norm(params)
    total = tritopt.clip_grad_norm_(params, 0.5)
    torch.testing.assert_close(total.double(), norm, rtol=1e-6, atol=0)
    for g, old in zip(grads_of(params), before, strict=True):
        torch.testing.assert_close(g.double(), old.double() * 0.5 / (norm + 1e-6), rtol=SAME[g.dtype], atol=0)


def test_inside_a_compiled_function() -> None:
    params = with_grads(torch.float32)
    norm = exact_norm(params).float()
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def double_norm() -> torch.Tensor:
        total: torch.Tensor = tritopt.clip_grad_norm_(params, 1e9)
        return total * 2

    torch.testing.assert_close(double_norm(), 2 * norm)


def test_it_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    params = with_grads(torch.bfloat16)

    def refuse(*args: Any) -> Any:
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        tritopt.clip_grad_norm_(params, 0.5)
    assert abs(float(exact_norm(params)) - 0.5) < 0.01


# max_grad_norm.


@EVERY_CLASS
@pytest.mark.parametrize("fused", [None, False], ids=["fused", "reference"])
def test_a_clipped_step_is_a_clip_and_a_step(cls: Any, fused: bool | None) -> None:
    params, expected = parameters(), parameters()
    opt = cls(named(params), max_grad_norm=0.5, fused=fused, **options_of(cls))
    plain = cls(named(expected), fused=fused, **options_of(cls))
    for step in range(3):
        set_grads(params, step)
        set_grads(expected, step)
        before = grads_of(params)
        opt.step()
        norm = tritopt.clip_grad_norm_(expected, 0.5)
        plain.step()
        assert_same(grads_of(params), before)  # gradients are not rewritten
        assert opt.grad_norm.dtype == torch.float32
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-6, atol=0)
        assert norm > 1
    assert_follows(params, expected, parameters(), 3)


def test_a_clipped_step_is_torchs() -> None:
    start, trained, norms = parameters(), [], []
    kinds: list[tuple[Any, dict[str, float]]] = [(AdamW, {"max_grad_norm": 0.5}), (torch.optim.AdamW, {})]
    for kind, options in kinds:
        params = clone(start)
        opt = kind(params, lr=0.02, eps=0.1, **options)  # a large eps, so that the size of gradients matters
        for step in range(5):
            set_grads(params, step, 1 + step)
            norm = None if options else torch.nn.utils.clip_grad_norm_(params, 0.5)
            opt.step()
            norms.append(opt.grad_norm if options else norm)
        trained.append(params)
    torch.testing.assert_close(norms[:5], norms[5:], rtol=1e-6, atol=0)
    assert_follows(trained[0], trained[1], start, 5)


def test_a_small_norm_changes_nothing() -> None:
    params, expected = parameters(), parameters()
    opt, plain = AdamW(params, max_grad_norm=1e6), AdamW(expected)
    train(opt, params, range(3))
    train(plain, expected, range(3))
    assert_same(everything(opt), everything(plain))
    assert plain.grad_norm is None


def test_clip_value_comes_after_the_norm() -> None:
    params, expected = parameters(), parameters()
    opt, plain = AdamW(params, max_grad_norm=2.0, clip_value=0.3, eps=0.1), AdamW(expected, eps=0.1)
    for step in range(3):
        set_grads(params, step)
        set_grads(expected, step)
        tritopt.clip_grad_norm_(expected, 2.0)
        torch.nn.utils.clip_grad_value_(expected, 0.3)
        opt.step()
        plain.step()
    assert_follows(params, expected, parameters(), 3)


@pytest.mark.parametrize(("fused", "value"), [(None, math.inf), (None, math.nan), (False, math.nan)])
@EVERY_CLASS
def test_a_norm_that_is_not_finite_skips_the_update(cls: Any, fused: bool | None, value: float) -> None:
    params = parameters(torch.bfloat16)
    opt = cls(params, max_grad_norm=1.0, fused=fused, **options_of(cls))
    train(opt, params, range(1))
    before = [t for t in everything(opt) if t.dim()]  # weights and states, without counts
    set_grads(params, 1)
    assert params[1].grad is not None
    params[1].grad[0, 0] = value
    opt.step()
    assert_same([t for t in everything(opt) if t.dim()], before)
    assert not opt.grad_norm.isfinite()
    train(opt, params, range(2, 3))
    assert opt.grad_norm.isfinite()
    assert not torch.equal(params[0], before[0])


def test_max_grad_norm_may_be_changed() -> None:
    params = parameters()
    opt = AdamW(params, max_grad_norm=1.0)
    train(opt, params, range(1))
    assert opt.grad_norm is not None
    opt.max_grad_norm = None
    train(opt, params, range(1, 2))
    assert opt.grad_norm is None
