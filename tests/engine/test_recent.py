"""Caches that are bounded by the size of what they keep."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

import tritopt
from tritopt import optim
from tritopt.engine.group import LaunchGroup
from tritopt.engine.recent import MAX_SIZE, MIN_ENTRIES, Recent


def test_the_least_recently_used_goes() -> None:
    cache: Recent[str] = Recent(max_size=100)
    for i in range(MIN_ENTRIES + 1):
        assert cache.put(i, str(i), 1) == str(i)
    assert cache.get(0) == "0"
    cache.put("large", "value", 99)
    assert cache.get(1) is None
    assert [cache.get(0), cache.get("large")] == ["0", "value"]
    assert cache.get("missing") is None


def test_replaced_entries_do_not_count() -> None:
    cache: Recent[int] = Recent(max_size=100)
    for i in range(50):
        cache.put("same", i, 60)
    cache.put("other", 0, 40)
    assert cache.values() == [49, 0]


def test_a_few_entries_stay_whatever_their_size() -> None:
    cache: Recent[int] = Recent(max_size=1)
    for i in range(3 * MIN_ENTRIES):
        cache.put(i, i, 1000)
    assert len(cache) == MIN_ENTRIES
    assert cache.values() == list(range(2 * MIN_ENTRIES, 3 * MIN_ENTRIES))


@pytest.mark.parametrize("face", ["torch's", "MXNet's"])
def test_sets_of_gradients_that_differ_in_each_step_do_not_fill_the_memory(
    face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without tokens, stochastic depth: each set has a plan of its own."""
    monkeypatch.setattr("tritopt.engine.plan.run_phases", lambda *arguments: None)
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(1000)]
    grad, choice = torch.ones(2), random.Random(0)
    opt: Any = optim.AdamW(weights) if face == "torch's" else tritopt.create("adamw")
    updater = None if face == "torch's" else tritopt.get_updater(opt)

    def members() -> int:
        gc.collect()
        return sum(len(x.members) for x in gc.get_objects() if type(x) is LaunchGroup)

    before = members()
    for _ in range(80):  # 40,000 members, more than may stay
        grads = [grad if choice.random() < 0.5 else None for _ in weights]
        if updater is not None:
            updater(list(range(len(weights))), grads, [weight.detach() for weight in weights])
            continue
        for weight, given in zip(weights, grads, strict=True):
            weight.grad = given
        opt.step()
    assert 0 < members() - before <= MAX_SIZE
