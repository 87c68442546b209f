"""Nadam against its formula and torch's NAdam; whose the schedule's product is, and how it survives."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import STEPS, Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD, DECAY = 0.1, 0.8, 0.95, 1e-2, 0.05, 0.3
ARGUMENTS = {"learning_rate": LR, "beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON, "schedule_decay": DECAY}

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("nadam.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("nadam.py", "s.beta2 * var +", {"beta1 for beta2": "s.beta1 * var +"}),
    ("nadam.py", "s.one_minus_beta2 * (g * g)", {"gradient not squared": "s.one_minus_beta2 * tl.abs(g)"}),
    ("nadam.py", "s.mean_share * mean", {"mean not weighted": "mean", "beta1 for mu": "s.beta1 * mean"}),
    ("nadam.py", " + s.grad_share * g", {"no Nesterov": "", "gradient not weighted": " + g"}),
    ("nadam.py", "var * s.var_correction", {"variance not corrected": "var"}),
    (
        "nadam.py",
        "var * s.var_correction, s.epsilon)",
        {"epsilon inside the root": "var * s.var_correction + s.epsilon, 0.0)", "no root": "var * var, s.epsilon)"},
    ),
    ("nadam.py", "return w - s.lr", {"ascends": "return w + s.lr"}),
    ("nadam.py", ", (mean, var)\n", {"mean that looks ahead is kept": ", (ahead, var)\n"}),
]


@pytest.mark.parametrize("begin", [0, 5])
def test_formula(begin: int) -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        state["m"] = BETA1 * zeros_at_first(state, "m", w) + (1 - BETA1) * g
        state["v"] = BETA2 * zeros_at_first(state, "v", w) + (1 - BETA2) * g**2
        counts = np.arange(begin + 1, begin + t + 2)  # the last is the next step's
        mu: Array = BETA1 * (1 - 0.96 ** (DECAY * counts) / 2)
        m_hat: Array = mu[-1] * state["m"] / (1 - mu.prod())
        g_hat: Array = (1 - mu[-2]) * g / (1 - mu[:-1].prod())
        return w - LR * (m_hat + g_hat) / (np.sqrt(state["v"] / (1 - BETA2 ** (begin + t))) + EPSILON)

    assert_follows(formula, "nadam", wd=WD, begin_num_update=begin, **ARGUMENTS)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_is_torch_nadam(use_fused_step: bool) -> None:
    start, *grads = torch.randn(
        (STEPS + 1, 5, 7), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    ).double()
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.NAdam([theirs], LR, (BETA1, BETA2), EPSILON, WD, momentum_decay=DECAY)
    ours = start.to(torch.get_default_device(), copy=True)
    opt = tritopt.create("nadam", wd=WD, use_fused_step=use_fused_step, **ARGUMENTS)
    state = opt.create_state(0, ours)
    for grad in grads:
        theirs.grad = grad
        reference.step()
        opt.update([0], [ours], [grad.to(ours.device)], [state])
    torch.testing.assert_close(ours.cpu(), theirs.detach())


def test_by_hand() -> None:
    # mu = 1/4 for ever: m = g / 2 and v = g^2 / 4 by 1/4; (1/8 / (15/16) + 3/4 / (3/4)) g = 17/15 g over |g|
    arguments = {"beta1": 0.5, "beta2": 0.75, "epsilon": 0.0, "schedule_decay": 0.0}
    assert one_step("nadam", 0.0, 8.0, learning_rate=15 / 17, **arguments) == pytest.approx(-1, rel=1e-6)


def test_each_parameter_has_a_schedule_product_of_its_own() -> None:
    """MXNet multiplies one product, once per tensor: alone or beside others, a weight takes another path there."""
    alone = run(tritopt.create("nadam", **ARGUMENTS), [[0]] * STEPS)
    assert torch.equal(run(tritopt.create("nadam", **ARGUMENTS), [[1, 0]] * STEPS)[0], alone[0])
    staggered = run(tritopt.create("nadam", **ARGUMENTS), [[1]] * 3 + [[1, 0]] * STEPS)
    assert torch.equal(staggered[0], alone[0])


def run(opt: tritopt.Optimizer, active: list[list[int]]) -> dict[int, torch.Tensor]:
    """Weights by index after a step for each list of indices; a weight's n-th gradient is always the same."""
    weights = {i: torch.full((3,), 1.0 + i) for i in (0, 1)}
    states = {i: opt.create_state(i, w) for i, w in weights.items()}
    counts = dict.fromkeys(weights, 0)
    for indices in active:
        for i in indices:
            counts[i] += 1
        grads = [torch.arange(3.0) - counts[i] for i in indices]
        opt.update(indices, [weights[i] for i in indices], grads, [states[i] for i in indices])
    return weights


@pytest.mark.parametrize("how", ["pickled", "dumped"])
@pytest.mark.parametrize("begin", [0, 5])
def test_schedule_survives(how: str, begin: int) -> None:
    updater = tritopt.get_updater(tritopt.create("nadam", begin_num_update=begin, **ARGUMENTS))
    w = torch.ones(3)
    for step in range(4):
        updater(0, torch.arange(3.0) - step, w)
    if how == "pickled":
        resumed = tritopt.get_updater(pickle.loads(pickle.dumps(updater.optimizer)))
        resumed.set_states(updater.get_states())
    else:
        resumed = tritopt.get_updater(tritopt.create("sgd"))
        resumed.set_states(updater.get_states(dump_optimizer=True))
    other = w.clone()
    for step in range(3):
        updater(0, torch.arange(3.0) + step, w)
        resumed(0, torch.arange(3.0) + step, other)
    assert torch.equal(w, other)


def test_schedule_product_fades_and_costs_nothing_then() -> None:
    opt = tritopt.create("nadam", schedule_decay=0.0)
    late = opt.scalars(0.1, 0.0, 10**9)
    assert (late.mean_share, late.grad_share) == (0.45, 0.55)  # type: ignore[attr-defined]
    assert len(pickle.dumps(opt)) < 2000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_zero_gradient_in_half_precision_is_not_nan(dtype: torch.dtype, use_fused_step: bool) -> None:
    """epsilon = 1e-8 is 0 in fp16; the arithmetic is fp32, so it is not lost."""
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("nadam", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.zeros(3, dtype=dtype)], [state])
    assert w.eq(1).all()


def test_schedule_decay_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match=r"schedule_decay=-0\.1 must be >= 0"):
        tritopt.create("nadam", schedule_decay=-0.1)
