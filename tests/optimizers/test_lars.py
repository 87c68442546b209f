"""LARS against its formula and by hand, and the corners of its layer-wise rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, ETA, EPSILON, WD, CLIP, RESCALE = 0.5, 0.3, 0.2, 0.05, 0.4, -0.7


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "lars.py",
        "(w * w, g * g)",
        {
            "norms change places": "(g * g, w * w)",
            "norm of the decayed gradient": "(w * w, (g + s.wd * w) * (g + s.wd * w))",
        },
    ),
    ("lars.py", "sqrt(sums[0] + s.other_rows)", {"norm not rooted": "(sums[0] + s.other_rows)"}),
    ("lars.py", "sqrt(sums[1])", {"norm not rooted": "sums[1]"}),
    ("lars.py", "(s.is_layer_wise == 0) | ", {"a bias has a rate of its own": ""}),
    ("lars.py", " | (weight_norm == 0)", {"zero weights stay zero": ""}),
    ("lars.py", " | (grad_norm == 0)", {"no gradient, eta for 1": ""}),
    (
        "lars.py",
        "s.eta * weight_norm / tl.where(is_plain, 1.0, grad_norm + s.wd * weight_norm + s.epsilon)",
        {
            "no eta": "weight_norm / tl.where(is_plain, 1.0, grad_norm + s.wd * weight_norm + s.epsilon)",
            "no decay in the rate": "s.eta * weight_norm / tl.where(is_plain, 1.0, grad_norm + s.epsilon)",
            "no epsilon": "s.eta * weight_norm / tl.where(is_plain, 1.0, grad_norm + s.wd * weight_norm)",
            "upside down": "s.eta * (grad_norm + s.wd * weight_norm) / tl.where(is_plain, 1.0, weight_norm)",
        },
    ),
    (
        "lars.py",
        "tl.where(is_plain, 1.0, trust_ratio)",
        {"eta for 1": "tl.where(is_plain, s.eta, trust_ratio)", "plain SGD": "1.0 + 0 * trust_ratio"},
    ),
    (
        "lars.py",
        "add_decay(clip(g, s.bound), w, s.wd)",
        {
            "never clips": "add_decay(g, w, s.wd)",
            "no decay": "clip(g, s.bound)",
            "decay is clipped": "clip(add_decay(g, w, s.wd), s.bound)",
        },
    ),
    ("lars.py", "return w - _scaled", {"ascends": "return w + _scaled"}),
    (
        "lars.py",
        "s.momentum * momentum - _scaled_gradient(w, g, s, sums)",
        {
            "momentum never fades": "momentum - _scaled_gradient(w, g, s, sums)",
            "sign of the gradient": "s.momentum * momentum + _scaled_gradient(w, g, s, sums)",
        },
    ),
    ("lars.py", "w + momentum, (momentum,)", {"momentum is not kept": "w + momentum, state"}),
]


def layer_rate(w: Array, g: Array, eta: float = ETA, epsilon: float = EPSILON, wd: float = WD) -> float:
    """The learning rate of a layer, from its weight and rescaled gradient."""
    return LR * eta * float(np.linalg.norm(w)) / (float(np.linalg.norm(g)) + wd * float(np.linalg.norm(w)) + epsilon)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", [None, "conv.weight", "bn.gamma", "bn_beta", "fc.bias"])
def test_formula(momentum: float, name: str | None) -> None:
    """Clipped after its norm is taken; names that end in gamma, beta or bias have the plain rate."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        rate = LR if name and name.endswith(("gamma", "beta", "bias")) else layer_rate(w, RESCALE * g)
        displacement = momentum * zeros_at_first(state, "v", w)
        displacement = displacement - rate * (np.clip(RESCALE * g, -CLIP, CLIP) + WD * w)
        state["v"] = displacement
        return w + displacement

    options: dict[str, Any] = {"wd": WD, "clip_gradient": CLIP, "rescale_grad": RESCALE, "momentum": momentum}
    names = {} if name is None else {"param_idx2name": {0: name}}
    assert_follows(formula, "lars", learning_rate=LR, eta=ETA, epsilon=EPSILON, **options, **names)


def test_by_hand() -> None:
    # |w| = 2, |g| = 0.5: the rate is 0.5 * 0.25 * 2 / (0.5 + 0.25 * 2 + 1) = 0.125, the gradient 0.5 + 0.25 * 2 = 1
    options = {"learning_rate": 0.5, "eta": 0.25, "epsilon": 1.0, "wd": 0.25}
    assert one_step("lars", 2.0, 0.5, **options) == 1.875
    assert one_step("lars", 2.0, 0.5, param_idx2name={0: "bias"}, **options) == 1.5
    # without decay and epsilon the second step's rate is 0.125 / |g| of a weight of 1.75; the buffer holds -0.25
    options = {"learning_rate": 0.5, "eta": 0.25, "epsilon": 0.0, "momentum": 0.5}
    assert one_step("lars", 2.0, 0.5, -0.5, **options) == 1.75 - 0.125 + 0.125 * 1.75


def test_index_stands_in_for_a_name() -> None:
    plain, layer_wise = torch.ones(2), torch.ones(2)
    opt = tritopt.create("lars", learning_rate=0.5, param_idx2name={("layer", 1): "weight"})
    opt.update(["my_bias", ("layer", 1)], [plain, layer_wise], [torch.ones(2), torch.ones(2)], [None, None])
    assert plain.tolist() == [0.5, 0.5]
    torch.testing.assert_close(layer_wise, torch.full((2,), 1 - 0.5 * 0.001))


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_rate_is_plain_where_a_norm_is_zero(use_fused_step: bool) -> None:
    """The learning rate itself, not eta times it; so a zero gradient leaves the plain decay."""
    opt = tritopt.create("lars", learning_rate=0.25, wd=0.5, use_fused_step=use_fused_step)
    zero_weight, zero_grad = torch.zeros(3), torch.ones(3)
    opt.update([0, 1], [zero_weight, zero_grad], [torch.ones(3), torch.zeros(3)], [None, None])
    assert zero_weight.tolist() == [-0.25] * 3
    assert zero_grad.tolist() == [0.875] * 3


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_tensor_only(use_fused_step: bool) -> None:
    opt = tritopt.create("lars", use_fused_step=use_fused_step)
    weights = [torch.ones(3), torch.ones(3)]
    opt.update([0, 1], weights, [torch.tensor([1.0, float("nan"), 1.0]), torch.ones(3)], [None, None])
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("bound", [1e300, float("inf"), 0.0, -1.0])
def test_bounds_that_clip_nothing(bound: float, use_fused_step: bool) -> None:
    weights = [torch.ones(3), torch.ones(3)]
    for weight, clip in zip(weights, (bound, None), strict=True):
        opt = tritopt.create("lars", clip_gradient=clip, use_fused_step=use_fused_step)
        opt.update([0], [weight], [torch.full((3,), 5.0)], [None])
    assert torch.equal(*weights)


def test_norms_are_of_the_master() -> None:
    """Rounded to bf16 the weight's norm would be 0.2% larger, and so would the step."""
    weight = torch.full((100,), 1.0, dtype=torch.bfloat16)
    opt = tritopt.create("lars", learning_rate=1.0, eta=0.5, epsilon=0.0, multi_precision=True)
    state = opt.create_state_multi_precision(0, weight)
    master, _ = state
    master.fill_(1 - 2**-9)
    opt.update_multi_precision([0], [weight], [torch.ones(100)], [state])
    torch.testing.assert_close(master, torch.full((100,), (1 - 2**-9) * 0.5))


ROWS = torch.tensor([[3, 1, 3]])


def row_sparse(values: torch.Tensor, n_rows: int = 5) -> torch.Tensor:
    return torch.sparse_coo_tensor(ROWS, values, (n_rows, *values.shape[1:]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_lazy_update_takes_the_norm_of_all_rows_and_moves_those_present(
    momentum: float, transposed: bool, fused: bool
) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    weight = torch.randn(5, 3, generator=generator)
    weight = weight.t().contiguous().t() if transposed else weight
    options = {"learning_rate": LR, "eta": ETA, "epsilon": EPSILON, "wd": WD, "momentum": momentum}
    opt = tritopt.create("lars", lazy_update=True, **options)
    state = opt.create_state(0, weight)
    expected, displacement = weight.cpu().double().numpy(), np.zeros((5, 3))
    for _ in range(3):
        grad = row_sparse(torch.randn(3, 3, generator=generator))
        dense = grad.to_dense().cpu().double().numpy()
        rate = layer_rate(expected, dense)
        present = [1, 3]
        displacement[present] = momentum * displacement[present] - rate * (dense + WD * expected)[present]
        expected[present] += displacement[present]
        (opt.fused_step if fused else opt.step)([0], [weight], [grad], [state])
        torch.testing.assert_close(weight.cpu().double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)


def test_lazy_update_where_only_absent_rows_are_not_zero() -> None:
    """The norm of the rows present is 0, that of the weight is 2."""
    weight = torch.zeros(5, 1)
    weight[0] = 2.0
    opt = tritopt.create("lars", learning_rate=1.0, eta=0.5, epsilon=0.0, lazy_update=True)
    opt.update([0], [weight], [row_sparse(torch.tensor([[1.5], [0.0], [0.5]]))], [None])
    torch.testing.assert_close(weight, torch.tensor([[2.0], [0.0], [0.0], [-1.0], [0.0]]))


def test_sparse_gradient_without_lazy_update_is_dense_with_zero_rows() -> None:
    sparse, dense = torch.ones(5, 3), torch.ones(5, 3)
    tritopt.create("lars", wd=0.5).update([0], [sparse], [row_sparse(torch.ones(3, 3))], [None])
    tritopt.create("lars", wd=0.5).update([0], [dense], [row_sparse(torch.ones(3, 3)).to_dense()], [None])
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("wrong", [{"use_fused_step": False}, {"multi_precision": True}])
def test_lazy_update_refuses(wrong: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"lazy_update=True .* drop"):
        tritopt.create("lars", lazy_update=True, **wrong)


@pytest.mark.parametrize("argument", ["momentum", "eta", "epsilon"])
def test_negative_argument(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=-0.1"):
        tritopt.create("lars", **{argument: -0.1})
