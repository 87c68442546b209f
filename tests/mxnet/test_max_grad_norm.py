"""max_grad_norm in MXNet's face: the norm of all rescaled gradients of an update, clipped on the device."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import record_launches
from tritopt.kernels.language import HAS_TRITON

BOTH_PATHS = pytest.mark.parametrize(
    "fused", [pytest.param(True, marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")), False]
)
EPSILON = 1e-6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.5},
    "adam": {},
    "adamw": {},
    "lamb": {},
    "lars": {"momentum": 0.5},
    "signum": {},
    "adafactor": {},
}


class Run:
    """Three parameters and their gradients, which together are a multiple of (3, 4): their norm is exact."""

    def __init__(self, name: str, fused: bool | None, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
        self.opt: Any = tritopt.create(
            name, **{"learning_rate": 0.1, "wd": 0.1, "use_fused_step": fused, **OPTIMIZERS.get(name, {}), **arguments}
        )
        self.updater = tritopt.get_updater(self.opt)
        self.weights = [torch.tensor([[1.0, 2.0], [-1.0, 4.0]]), torch.tensor([0.5, -0.25]), torch.tensor([8.0])]
        self.weights = [weight.to(dtype) for weight in self.weights]

    def grads(self, scale: float) -> list[torch.Tensor]:
        values = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, -4.0]), torch.tensor([0.0])]
        return [(scale * grad).to(weight.dtype) for grad, weight in zip(values, self.weights, strict=True)]

    def step(self, scale: float = 1.0) -> None:
        self.updater([0, 1, 2], self.grads(scale), self.weights)

    def tensors(self) -> list[torch.Tensor]:
        flat: list[torch.Tensor] = []

        def add(value: Any) -> None:
            if isinstance(value, tuple):
                for item in value:
                    add(item)
            elif value is not None:
                flat.append(value.clone())

        for state in self.updater.states.values():
            add(state)
        return [*(weight.clone() for weight in self.weights), *flat]


def assert_same(a: Run, b: Run) -> None:
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@BOTH_PATHS
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_rescale_by_the_factor(name: str, fused: bool, dtype: torch.dtype) -> None:
    """Bit for bit, whichever of several steps is too long."""
    arguments = {"multi_precision": True, "clip_gradient": 1.75}
    clipped = Run(name, fused, dtype, max_grad_norm=2.0, **arguments)
    rescaled = Run(name, fused, dtype, **arguments)
    for scale in (1.0, 0.25, 2.0):
        clipped.step(scale)
        rescaled.opt.rescale_grad = min(1.0, 2.0 / (5.0 * scale + EPSILON))
        rescaled.step(scale)
        assert_same(clipped, rescaled)
        assert clipped.opt.grad_norm.item() == 5.0 * scale
        assert (clipped.opt.grad_norm.dtype, clipped.opt.grad_norm.shape) == (torch.float32, ())


@BOTH_PATHS
@pytest.mark.parametrize("rescale", [0.5, -0.5, 0.0, 4, torch.tensor(0.5), torch.tensor([-0.5]), torch.tensor(0.0)])
def test_the_norm_is_that_of_rescaled_gradients(fused: bool, rescale: Any) -> None:
    clipped, plain = Run("sgd", fused, max_grad_norm=1.0), Run("sgd", fused)
    for run in (clipped, plain):
        run.opt.rescale_grad = rescale
    for scale in (1.0, 0.125):
        norm = 5.0 * scale * abs(float(rescale))
        plain.opt.rescale_grad = float(rescale) * min(1.0, 1.0 / (norm + EPSILON))
        clipped.step(scale)
        plain.step(scale)
        assert_same(clipped, plain)
        assert clipped.opt.grad_norm.item() == norm


@BOTH_PATHS
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips(fused: bool, value: float) -> None:
    """Weights and states stay and counts advance, as with such a rescale_grad."""
    run = Run("adam", fused, max_grad_norm=1.0)
    run.step()
    before = run.tensors()
    grads = run.grads(1.0)
    grads[1][0] = value
    run.updater([0, 1, 2], grads, run.weights)
    for old, new in zip(before, run.tensors(), strict=True):
        assert torch.equal(old, new)
    assert run.opt._index_update_count == {0: 2, 1: 2, 2: 2}
    assert not run.opt.grad_norm.isfinite()
    run.step()
    assert not torch.equal(before[0], run.weights[0])


@BOTH_PATHS
def test_infinity_measures_only(fused: bool) -> None:
    measured, plain = Run("adam", fused, max_grad_norm=math.inf), Run("adam", fused)
    for run in (measured, plain):
        run.step()
        run.step(2.0)
    assert_same(measured, plain)
    assert measured.opt.grad_norm.item() == 10.0
    assert plain.opt.grad_norm is None
    assert Run("adam", fused, max_grad_norm=1.0).opt.grad_norm is None


def test_gradients_are_not_written() -> None:
    run = Run("sgd", None, max_grad_norm=1.0)
    grads = run.grads(1.0)
    before = [(grad.clone(), grad._version) for grad in grads]
    run.updater([0, 1, 2], grads, run.weights)
    assert all(torch.equal(g, old) and g._version == version for g, (old, version) in zip(grads, before, strict=True))


def test_over_several_dtypes() -> None:
    """One norm for all of a call."""
    opt = tritopt.create("sgd", learning_rate=1.0, max_grad_norm=2.5, use_fused_step=None)
    weights = [torch.zeros(1), torch.zeros(1, dtype=torch.float64)]
    tritopt.get_updater(opt)([0, 1], [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)], weights)
    assert [weight.item() for weight in weights] == pytest.approx([-1.5, -2.0])
    assert opt.grad_norm is not None
    assert opt.grad_norm.item() == 5.0


@BOTH_PATHS
def test_of_direct_updates(fused: bool) -> None:
    opt = tritopt.create("sgd", learning_rate=1.0, max_grad_norm=2.5, use_fused_step=fused)
    for update in (opt.update, opt.update_multi_precision, opt.fused_step if fused else opt.step):
        weights = [torch.zeros(1), torch.zeros(1)]
        update([0, 1], weights, [torch.tensor([3.0]), torch.tensor([4.0])], [None, None])
        assert [weight.item() for weight in weights] == pytest.approx([-1.5, -2.0])
    weight = torch.zeros(1)
    opt.update(0, weight, torch.tensor([5.0]), None)
    assert weight.item() == pytest.approx(-2.5)
    opt.update([], [], [], [])


@BOTH_PATHS
@pytest.mark.parametrize("lazy", [True, False])
def test_sparse_gradients(fused: bool, lazy: bool) -> None:
    if lazy and not fused:
        pytest.skip("lazy_update is fused only")
    opt = tritopt.create("sgd", learning_rate=1.0, max_grad_norm=2.5, use_fused_step=fused, lazy_update=lazy)
    weights = [torch.zeros(3, 1), torch.zeros(1)]
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.tensor([[1.0], [0.0], [2.0]]), (3, 1))
    tritopt.get_updater(opt)([0, 1], [sparse, torch.tensor([4.0])], weights)
    assert weights[0].flatten().tolist() == pytest.approx([-1.5, 0.0, 0.0])
    assert weights[1].tolist() == pytest.approx([-2.0])


def test_replayed_updates_clip_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays are as good as built updates, also where the bound comes and goes between them."""
    pytest.importorskip("triton")
    made: list[int] = []
    original = tritopt.Optimizer._run_again

    def run_again(self: Any, repeated: Any) -> None:
        made.append(1)
        original(self, repeated)

    monkeypatch.setattr(tritopt.Optimizer, "_run_again", run_again)
    replayed, built = Run("adam", True, max_grad_norm=2.0), Run("adam", True, max_grad_norm=2.0)
    bounds = [2.0, 2.0, 1.0, None, None, math.inf, 3.0]
    for i, bound in enumerate(bounds):
        for run in (replayed, built):
            run.opt.max_grad_norm = bound
        built.opt._planner.forget()
        for run in (replayed, built):
            run.step(1.0 + i)
        assert_same(replayed, built)
    assert len(made) == 4  # all but the first, and the first after the bound has come or gone


def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    launches = record_launches(monkeypatch)
    run = Run("sgd", True, max_grad_norm=2.0)
    for _ in range(3):
        run.step()
    kernels = [[phase.kernels for phase in launch.phases] for _, launch in launches]
    assert kernels == [[("square_update",)], [("sgd_momentum_update",)]] * 3


@BOTH_PATHS
def test_learning_rate_zero_beside_a_clip(fused: bool) -> None:
    """FTML is left alone then, in a step that is built and in one that is replayed."""
    opt = tritopt.create("ftml", learning_rate=0.1, max_grad_norm=1.0, use_fused_step=fused)
    updater, weight = tritopt.get_updater(opt), torch.ones(2)
    for lr in (0.1, 0.1, 0.0, 0.1):
        opt.set_learning_rate(lr)
        before = weight.clone()
        updater(0, torch.tensor([3.0, 4.0]), weight)
        assert torch.equal(weight, before) == (lr == 0)


@pytest.mark.parametrize("how", ["states", "pickle", "deepcopy"])
def test_is_saved_with_the_optimizer(how: str) -> None:
    run = Run("adam", None, max_grad_norm=2.0)
    run.step()
    other = Run("adam", None)
    copies: dict[str, Callable[[], Any]] = {
        "pickle": lambda: pickle.loads(pickle.dumps(run.opt)),
        "deepcopy": lambda: copy.deepcopy(run.opt),
    }
    if how == "states":
        other.updater.set_states(run.updater.get_states(dump_optimizer=True))
    else:
        other.updater = tritopt.get_updater(copies[how]())
        other.updater.states = copy.deepcopy(run.updater.states)
        other.updater.states_synced = dict(run.updater.states_synced)
    other.opt = other.updater.optimizer
    assert other.opt.max_grad_norm == 2.0
    assert other.opt.grad_norm is None
    other.weights = copy.deepcopy(run.weights)
    for one in (run, other):
        one.step()
    assert_same(run, other)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)],
)
def test_bad_bounds(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_grad_norm="):
        tritopt.create("sgd", max_grad_norm=value)
    run = Run("sgd", None, max_grad_norm=1.0)
    run.step()
    before = run.tensors()
    run.opt.max_grad_norm = value
    with pytest.raises(error, match="max_grad_norm="):
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.tensors(), strict=True))
    assert run.opt._index_update_count == {0: 1, 1: 1, 2: 1}


def test_parts_of_a_list_have_no_norm_together() -> None:
    for number in (0, 1, 4):
        with pytest.raises(ValueError, match=rf"max_grad_norm=1.0 is of all .*aggregate_num={number} splits.*at None"):
            tritopt.create("sgd", max_grad_norm=1.0, aggregate_num=number)


def test_optimizers_with_a_step_of_their_own_are_refused() -> None:
    class Own(tritopt.Optimizer):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            pass

    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 is not for Own, which overrides step"):
        Own(max_grad_norm=1.0)
