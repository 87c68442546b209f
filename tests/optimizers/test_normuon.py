"""NorMuon, which is Muon with beta2: its formula, its states, and what must not spoil them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.training import assert_same
from tests.support.trajectory import Array, assert_follows, zeros_at_first
from tritopt import optim
from tritopt.engine.launcher import launches
from tritopt.engine.newton_schulz import QUINTIC, steps_of
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config

FUSED = pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
MOMENTS = "second_momentum_buffer"


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=32, chunk_size=64, num_warps=1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(random(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def train(opt: torch.optim.Optimizer, params: Sequence[torch.nn.Parameter], steps: Sequence[int] = range(3)) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = random(*p.shape, seed=100 * step + i).to(p.dtype)
        opt.step()


def normalized(x: Array, state: dict[str, Array], beta2: float) -> Array:
    """Rows by the root of their second moments, of the norm that the matrix had."""
    v = state["v"] = beta2 * zeros_at_first(state, "v", x[:, :1]) + (1 - beta2) * (x * x).mean(1, keepdims=True)
    y: Array = x / (np.sqrt(v) + 1e-10)
    return y * float(np.linalg.norm(x) / np.linalg.norm(y))


def orthogonalized(d: Array) -> Array:
    """Five steps of the iteration, by singular values."""
    u, s, v = np.linalg.svd(d, full_matrices=False)
    s = s / np.linalg.norm(d)
    for a, b, c in steps_of(QUINTIC, 5):
        s = a * s + b * s**3 + c * s**5
    x: Array = (u * s) @ v
    return x


@pytest.mark.parametrize("ratio", [None, "match_rms_adamw", "spectral_unclamped"])
def test_formula(ratio: str | None) -> None:
    momentum, lr, wd, beta2 = 0.8, 0.3, 0.2, 0.7

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        m = state["m"] = momentum * zeros_at_first(state, "m", w) + (1 - momentum) * g
        x = normalized(orthogonalized(momentum * m + (1 - momentum) * g), state, beta2)
        rows, columns = w.shape
        if ratio == "match_rms_adamw":
            x *= 0.2 * math.sqrt(rows * columns) / np.linalg.norm(x)
        elif ratio == "spectral_unclamped":
            x *= math.sqrt(rows / columns)
        moved: Array = (1 - lr * wd) * w - lr * x
        return moved

    assert_follows(
        formula, "muon", learning_rate=lr, wd=wd, momentum=momentum, ns_dtype="fp32", adjust_lr_fn=ratio, beta2=beta2
    )


@FUSED
@pytest.mark.parametrize("ratio", ["original", "match_rms_adamw"])
def test_all_rows_move_alike_at_first(ratio: str, fused: bool | None) -> None:
    """Rows of Muon do not. An update has its size, or with "match_rms_adamw" an RMS of 0.2."""
    moved = {}
    for beta2 in (None, 0.95):
        (p,) = params = parameters([(6, 8)])
        before = p.detach().clone()
        train(optim.Muon(params, 1.0, 0.0, adjust_lr_fn=ratio, beta2=beta2, fused=fused), params, [1])
        moved[beta2] = before - p.detach()
    rows = moved[0.95].norm(dim=1)
    size = 0.2 * math.sqrt(6 * 8) if ratio == "match_rms_adamw" else float(moved[None].norm())
    torch.testing.assert_close(rows, torch.full_like(rows, size / math.sqrt(6)), rtol=2**-7, atol=0)
    muons = moved[None].norm(dim=1)
    assert muons.max() > 1.1 * muons.min()


KINDS: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    ((6, 4), {}, (6, 1)),
    ((3, 4, 6), {"flatten": False}, (3, 4, 1)),
    ((4, 3, 2, 2), {"flatten": True}, (4, 1, 1, 1)),
    ((12, 10), {"split": (6, 3, 3)}, (12, 1)),
    ((12, 10), {"split": 2, "split_dim": -1}, (12, 2)),
    ((12, 10), {"split": (2, 4, 4), "split_dim": -1}, (12, 3)),
]


def test_a_transposed_weight_draws_the_bits_of_its_own_order() -> None:
    """States of rows lie by themselves, and the others as the weight does. Rows are added up in another order."""
    trained = []
    for fused in (None, False):
        params = [torch.nn.Parameter(random(64, 12).T)]
        opt = optim.Muon(params, 0.1, beta2=0.9, state_dtype="int8", fused=fused)
        train(opt, params)
        trained.append({"weight": params[0].detach(), **opt.state[params[0]]})
    assert trained[0]["weight"].stride() == (1, 12)
    for name, value in trained[0].items():
        exact = name.startswith("momentum_buffer")
        torch.testing.assert_close(value, trained[1][name], rtol=0 if exact else 1e-5, atol=0)


@pytest.mark.parametrize(("shape", "options", "moments"), KINDS)
def test_kernel_and_reference_are_the_same_bits(
    shape: tuple[int, ...], options: dict[str, Any], moments: tuple[int, ...]
) -> None:
    """Products, means and norms are the same calls on the same stacks. A number for each row of each matrix."""
    trained = []
    for fused in (None, False):
        params = parameters([shape] * 2)
        opt = optim.Muon(params, 0.1, beta2=0.9, fused=fused, **options)
        train(opt, params)
        trained.append([*params, *[opt.state[p][key] for p in params for key in ("momentum_buffer", MOMENTS)]])
    assert_same(*trained)
    assert trained[0][3].shape == moments
    assert (trained[0][3] > 0).all()


@FUSED
@pytest.mark.parametrize(
    ("options", "dim", "sizes"),
    [({"split": (6, 3, 3)}, 0, (6, 3, 3)), ({"split": (2, 4, 4), "split_dim": -1}, 1, (2, 4, 4))],
)
def test_parts_are_normalised_by_themselves(
    options: dict[str, Any], dim: int, sizes: tuple[int, ...], fused: bool | None
) -> None:
    """A fused projection moves as its parts would alone, within the rounding of products of other stacks."""
    (whole,) = parameters([(12, 10)])
    parts = [torch.nn.Parameter(part.contiguous()) for part in whole.detach().split(sizes, dim)]
    before = whole.detach().clone()
    opts: list[Any] = [optim.Muon([whole], 0.1, 0.0, beta2=0.9, fused=fused, **options)]
    opts.append(optim.Muon(parts, 0.1, 0.0, beta2=0.9, fused=fused))
    for step in range(3):
        whole.grad = random(12, 10, seed=step)
        for part, grad in zip(parts, whole.grad.split(sizes, dim), strict=True):
            part.grad = grad.contiguous()
        for opt in opts:
            opt.step()
    largest = (whole.detach() - before).abs().max()
    together = torch.cat([part.detach() for part in parts], dim)
    torch.testing.assert_close(whole.detach(), together, rtol=0, atol=0.06 * float(largest))


@pytest.mark.filterwarnings("ignore:Muon accumulates in torch.bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"multi_precision": False}, {"state_dtype": "int8"}], ids=str)
def test_moments_are_at_least_fp32(dtype: torch.dtype, options: dict[str, Any]) -> None:
    if dtype == torch.float64 and "state_dtype" in options:
        pytest.skip("float64 parameters have no narrow states")
    params = parameters([(4, 64)], dtype)
    opt = optim.Muon(params, beta2=0.95, **options)
    train(opt, params)
    wide = torch.promote_types(dtype, torch.float32)
    assert opt.state[params[0]][MOMENTS].dtype == wide
    weight = random(4, 64).to(dtype)
    own = tritopt.create("muon", beta2=0.95, **options)
    state = own.create_state_multi_precision(0, weight)
    own.update_multi_precision([0], [weight], [random(4, 64, seed=1).to(dtype)], [state])
    while isinstance(state, tuple):
        state = state[-1]
    assert state.dtype == wide
    assert (state > 0).all()


def test_four_launches_for_the_whole_list() -> None:
    """One more that reads the moments and one that writes them, however many matrices there are."""
    counted: dict[Any, int] = {}
    for beta2 in (None, 0.95):
        for n in (1, 5):
            params = parameters([(4, 6)] * n + [(6, 4)] * n)
            opt = optim.Muon(params, beta2=beta2)
            train(opt, params, [0])
            before = launches.n_begun
            train(opt, params, [1])
            counted[beta2, n] = launches.n_begun - before
    assert counted == {(None, 1): 2, (None, 5): 2, (0.95, 1): 4, (0.95, 5): 4}


def test_a_small_scratch_changes_nothing() -> None:
    """Each matrix in a part of its own; the largest error is that of stacks of another size."""
    moved = []
    for scratch in (2**30, 1):
        params = parameters([(4, 6)] * 3 + [(3, 5)])
        train(optim.Muon(params, 0.1, 0.0, beta2=0.9, scratch_bytes=scratch), params)
        moved.append(params)
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)


@FUSED
def test_a_skipped_step_leaves_everything(fused: bool | None) -> None:
    params = parameters([(4, 6), (5, 3)])
    opt: Any = optim.Muon(params, beta2=0.95, fused=fused)
    train(opt, params, [1])
    before = copy.deepcopy([*params, *[opt.state[p][key] for p in params for key in ("momentum_buffer", MOMENTS)]])
    opt.found_inf = torch.tensor(1.0)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    opt.step()
    assert_same([*params, *[opt.state[p][key] for p in params for key in ("momentum_buffer", MOMENTS)]], before)
    opt.found_inf = torch.tensor(0.0)
    train(opt, params, [2])
    assert not torch.equal(opt.state[params[0]][MOMENTS], before[3])


@FUSED
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e18], ids=str)
@pytest.mark.parametrize("ratio", ["original", "match_rms_adamw"])
def test_a_zero_tiny_or_huge_gradient_moves_by_numbers(ratio: str, size: float, fused: bool | None) -> None:
    params = parameters([(4, 6), (4, 6)])
    before = [p.detach().clone() for p in params]
    opt = optim.Muon(params, 1.0, 0.0, adjust_lr_fn=ratio, beta2=0.95, fused=fused)
    grad = random(4, 6, seed=2)
    grad[2] = 0.0  # a row, such as of a dead neuron
    params[0].grad, params[1].grad = size * random(4, 6, seed=1), grad
    opt.step()
    moved = [p.detach() - old for p, old in zip(params, before, strict=True)]
    assert all(x.isfinite().all() for x in moved)
    assert opt.state[params[0]][MOMENTS].isfinite().all()
    assert moved[0].any() or size < 1e-20
    assert not moved[1][2].any()
    assert moved[1][[0, 1, 3]].any(1).all()


@FUSED
def test_what_is_not_finite_spoils_its_own_matrix(fused: bool | None) -> None:
    params = parameters([(3, 4, 6), (3, 4, 6)])
    opt = optim.Muon(params, flatten=False, beta2=0.95, fused=fused)
    for i, p in enumerate(params):
        grad = random(3, 4, 6, seed=i)
        if i == 0:
            grad[1, 2, 3] = math.nan
        p.grad = grad
    opt.step()
    assert params[0][1].isnan().all()
    for x in (params[0][[0, 2]], params[1], opt.state[params[0]][MOMENTS][[0, 2]], opt.state[params[1]][MOMENTS]):
        assert x.isfinite().all()


def test_checkpoints_go_on_to_the_bit() -> None:
    params = parameters([(4, 6), (6, 4)], torch.bfloat16)
    opt = optim.Muon(params, beta2=0.95)
    train(opt, params)
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(params)
    assert saved["param_groups"][0]["beta2"] == 0.95
    assert saved["state"][0][MOMENTS].shape == (4, 1)
    train(opt, params, range(3, 5))
    # Loaded values say what a group is, as in torch: the other was made without beta2.
    other = optim.Muon(weights)
    other.load_state_dict(saved)
    train(other, weights, range(3, 5))
    assert_same(weights, params)


def test_a_checkpoint_of_torchs_muon_starts_the_moments() -> None:
    (theirs,), (ours,) = parameters([(4, 6)]), parameters([(4, 6)])
    torchs, opt = torch.optim.Muon([theirs]), optim.Muon([ours], beta2=0.95)
    train(torchs, [theirs])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(torchs.state_dict())
    train(opt, [ours], [3])
    assert opt.state[ours]["momentum_buffer"].any()
    assert (opt.state[ours][MOMENTS] > 0).all()


def test_moments_of_another_shape_are_refused() -> None:
    params = parameters([(4, 6)])
    opt = optim.Muon(params, beta2=0.95)
    train(opt, params)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][MOMENTS] = torch.ones(1, 6)
    with pytest.raises(ValueError, match=r"second_momentum_buffer of parameter 0 has shape \(1, 6\), .* \(4, 1\)"):
        opt.load_state_dict(saved)


def test_capturable_and_telemetry() -> None:
    """Rates on the device; and a row of telemetry for each parameter, as without beta2."""
    params, others = parameters([(4, 6), (6, 4)]), parameters([(4, 6), (6, 4)])
    opt = optim.Muon(params, torch.tensor(0.01), beta2=0.95, capturable=True, track=True)
    train(opt, params)
    train(optim.Muon(others, 0.01, beta2=0.95), others)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert len(opt.telemetry()) == 2


def test_groups_of_mixed_and_of_one_optimizer() -> None:
    """Groups with and without beta2 side by side, each as alone."""
    params, others = parameters([(4, 6), (4, 6)]), parameters([(4, 6), (4, 6)])
    groups: list[dict[str, Any]] = [{"params": [params[0]], "beta2": 0.9}, {"params": [params[1]]}]
    train(optim.Muon(groups, 0.1), params)
    alone = [optim.Muon([others[0]], 0.1, beta2=0.9), optim.Muon([others[1]], 0.1)]
    for step in range(3):
        for i, p in enumerate(others):
            p.grad = random(*p.shape, seed=100 * step + i)
        for opt in alone:
            opt.step()
    assert_same(params, others)
    mixed = optim.Mixed([{"params": parameters([(4, 6)]), "algorithm": "Muon", "beta2": 0.9}])
    assert mixed.param_groups[0]["beta2"] == 0.9
