"""Tuning inside a step, on a stand-in of a GPU: it runs on scratch only, gives it back, and fails without harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_cuda.runtime import FakeCuda
from tests.support.fake_cuda.training import Training, assert_same, on_cpu
from tritopt import optim
from tritopt.engine.tuning import autotune, cache
from tritopt.engine.tuning.config import Config
from tritopt.kernels.language import INTERPRETED
from tritopt.tools.bench.device import Device

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the stand-in interprets kernels")
CANDIDATES = [Config(64, 128, 64, 1), Config(128, 128, 64, 1)]


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITOPT_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    monkeypatch.setattr(autotune, "MEASURE_SECONDS", 0.001)
    monkeypatch.setattr(autotune, "candidates", lambda variant, best: iter([best[0], *CANDIDATES]))
    monkeypatch.setattr(autotune, "size_of", lambda n_elements: 100)


@pytest.mark.parametrize(
    ("device", "dtype", "options"),
    [("cuda:0", torch.bfloat16, {"master": "stochastic"}), ("cuda:1", torch.float32, {})],
)
def test_the_users_tensors_are_not_touched(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    expected = on_cpu(optim.AdamW, [None] * 3, dtype, **options)
    with FakeCuda().running() as cuda:
        training = Training(optim.AdamW, [device], dtype, **options)
        training.step(0)
        measured = cuda.log.count("adamw_update")
        training.step(1)
        training.step(2)
        assert cuda.log.count("adamw_update") - measured <= 2  # later steps measure nothing
        assert_same(training.results(), expected)
    assert measured > 3 * len(CANDIDATES)
    (entry,) = cache.read("Fake").values()
    assert entry.config in (entry.default, *CANDIDATES)


def test_the_scratch_is_given_back() -> None:
    with FakeCuda().running() as cuda:
        training = Training(optim.AdamW, ["cuda:0"])
        training.set_grads(0)
        before = cuda.memory.taken[0]
        params, states = training.params, training.opt.state
        training.opt.step()
        kept = [tensor for param in params for tensor in states[param].values() if tensor.device.type == "cuda"]
        n_tables = cuda.memory.taken[0] - before - sum(tensor.nbytes for tensor in kept)
        assert 0 < n_tables < 1000
        assert cuda.memory.peak[0] > before + 2000


@pytest.mark.parametrize("capacity", [3000, 2**16])
def test_without_memory_it_is_the_default(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None for the scratch, or none for what is written between launches to clear the cache."""
    expected = on_cpu(optim.AdamW, [None] * 3, torch.float32)
    default = Config(64, 256, 64, 1)
    monkeypatch.setattr(autotune, "default_of", lambda *_: default)
    with FakeCuda(capacity=capacity).running():
        training = Training(optim.AdamW, ["cuda:0"])
        with pytest.warns(UserWarning, match="adamw_update: launched with the default, .* OutOfMemoryError"):
            training.step(0)
        training.step(1)
        training.step(2)
        assert_same(training.results(), expected)
    assert list(autotune._CHOSEN.values()) == [default]
    assert cache.files() == []


def test_the_bench_times_what_the_stream_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events tell the time, of which the stand-in puts a millisecond between one work and the next."""
    monkeypatch.delenv("TRITOPT_AUTOTUNE")
    with FakeCuda().running() as cuda:
        training = Training(optim.SGD, ["cuda:0"], lr=0.1)
        training.step(0)
        training.opt.step()
        device = Device(where="cuda:0")
        assert device.device_times([training.opt.step], 5, lead=1e-3) == [2e-3] * 5
        cuda.log.clear()
        assert device.step_times([training.opt.step], 5) == [2e-3] * 5
        assert [name for name in cuda.log if name != "event"] == ["sgd_update"] * 5


def test_a_capture_measures_nothing() -> None:
    """The plan is new, and is launched with the default."""
    with FakeCuda().running() as cuda:
        training = Training(optim.AdamW, ["cuda:0"], capturable=True)
        training.step(0)
        cuda.synchronize()
        cuda.log.clear()
        autotune._CHOSEN.clear()
        for file in cache.files():
            file.unlink()
        for group in training.opt._stepper._planner._plans.values()[0][1]:
            group.configs.clear()
        training.set_grads(1)
        with cuda.capture() as graph:
            training.opt.step()
        assert [work.name for work in graph.works].count("adamw_update") == 1
        assert "adamw_update" not in cuda.log
