"""Steps on a GPU that runs behind the host as far as it can: what is uploaded, launched and freed, in which order.

The GPU is a stand-in (tests/support/fake_cuda); what it computes must be what the interpreter computes step by step.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import tritopt
from tests.support.fake_cuda.runtime import FakeCuda
from tests.support.fake_cuda.training import Training, assert_same, numbers, on_cpu
from tritopt import optim
from tritopt.kernels.language import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the stand-in interprets kernels")

STEPS = [None, None, None, None, (0, 2), (1,), None]
"""Positions of the parameters that have a gradient, step by step; None: all."""
CASES: list[tuple[type[optim.Optimizer], torch.dtype, dict[str, Any]]] = [
    (optim.AdamW, torch.float32, {"lr": 0.1}),
    (optim.AdamW, torch.bfloat16, {"lr": 0.1, "max_grad_norm": 0.5}),
    (optim.AdamW, torch.float32, {"lr": 0.1, "capturable": True, "max_grad_norm": 0.5}),
    (optim.SGD, torch.bfloat16, {"lr": 0.1, "master": "stochastic", "capturable": True, "track": True}),
    (optim.LAMB, torch.float32, {"lr": 0.1}),
    (optim.Adafactor, torch.float32, {}),
]
IDS = [f"{cls.__name__}-{i}" for i, (cls, *_) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("cls", "dtype", "options"), CASES, ids=IDS)
most_cases = pytest.mark.parametrize(("cls", "dtype", "options"), CASES[:-1], ids=IDS[:-1])
"""Cases of all optimizers but Adafactor, whose dozens of launches a step take the interpreter long."""


@every_case
def test_many_steps_in_flight(cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """No step waits for the one before, and each has another set of gradients, at other addresses."""
    expected = on_cpu(cls, STEPS, dtype, **options)
    with FakeCuda().running() as cuda:
        training = Training(cls, ["cuda:0"], dtype, **options)
        for number, present in enumerate(STEPS):
            training.step(number, present)
        assert "update" not in " ".join(cuda.log)
        assert_same(training.results(), expected)


def test_a_launch_follows_the_upload_of_its_table() -> None:
    with FakeCuda().running() as cuda:
        training = Training(optim.SGD, ["cuda:0"], lr=0.1)
        training.step(0)
        for number in range(1, 4):
            training.set_grads(number)
            cuda.synchronize()
            cuda.log.clear()
            training.opt.step()
            training.opt.step()  # nothing is new
            training.opt.param_groups[0]["lr"] = 0.1 + number
            training.opt.step()
            cuda.synchronize()
            events = [name for name in cuda.log if name in ("upload", "sgd_update")]
            assert events == ["upload", "sgd_update", "sgd_update", "upload", "sgd_update"]


@pytest.mark.parametrize("first", [0, 1])
@most_cases
def test_two_streams_in_turn(first: int, cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Either of them runs first, as far as it can."""
    expected = on_cpu(cls, STEPS, dtype, **options)
    with FakeCuda().running() as cuda:
        streams = [cuda.current_stream(0), cuda.new_stream()]
        training = Training(cls, ["cuda:0"], dtype, **options)
        for number, present in enumerate(STEPS):
            streams.reverse()
            streams[0].wait_stream(streams[1])
            with cuda.on(streams[0]):
                training.step(number, present)
            # The user's own duty.
            for param in training.params:
                if param.grad is not None:
                    streams[1].keep(param.grad)
        cuda.synchronize(streams[first])
        assert_same(training.results(), expected)


@most_cases
def test_an_optimizer_may_go_before_its_launches_have_run(
    cls: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Tables are read on one stream, and were made on another, which uses their memory again meanwhile."""
    expected = on_cpu(cls, [None] * 3, dtype, **options)
    with FakeCuda().running() as cuda:
        default, side = cuda.current_stream(0), cuda.new_stream()
        training = Training(cls, ["cuda:0"], dtype, **options)
        training.step(0)
        side.wait_stream(default)
        kept: list[Any] = []
        with cuda.on(side):
            for number in range(1, 3):
                training.step(number)
                kept.append([param.grad for param in training.params])
        kept.append([list(state.values()) for state in training.opt.state.values()])
        params = training.params
        del training
        gc.collect()
        cuda.synchronize(default)
        assert_same([param.detach().cpu() for param in params], expected[: len(params)])


@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_a_table_goes_with_its_stream(lr: float) -> None:
    """A table is uploaded anew though nothing but the stream is new, or nothing but a number."""
    with FakeCuda().running() as cuda:
        default, side = cuda.current_stream(0), cuda.new_stream()
        training = Training(optim.SGD, ["cuda:0"], lr=0.1)
        params = training.params
        training.step(0)
        training.opt.step()
        side.wait_stream(default)
        training.opt.param_groups[0]["lr"] = lr
        with cuda.on(side):
            training.opt.step()
        grads = [param.grad for param in params]
        del training
        gc.collect()
        cuda.synchronize(default)
        weights = [param.detach().cpu() for param in params]
        assert all(tensor.isfinite().all() for tensor in (*weights, *(grad for grad in grads if grad is not None)))


@pytest.mark.parametrize("devices", [["cuda:1"], ["cuda:1", "cuda:0"]])
@most_cases
def test_other_devices_than_the_current_one(
    devices: list[str], cls: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    expected = on_cpu(cls, STEPS[3:6], dtype, **options)
    with FakeCuda().running() as cuda:
        training = Training(cls, devices, dtype, **options)
        for number, present in enumerate(STEPS[3:6]):
            training.step(number, present)
        assert cuda.device == 0
        assert_same(training.results(), expected)


def test_a_rescale_on_one_device_reaches_the_others() -> None:
    def updated(*devices: str) -> list[torch.Tensor]:
        weights = [torch.ones(5).to(device) for device in devices]
        grads = [torch.full((5,), 2.0).to(device) for device in devices]
        opt = tritopt.create("sgd", learning_rate=0.5, rescale_grad=torch.tensor(0.25).to(devices[0]))
        opt.update([0, 1], weights, grads, [opt.create_state(i, weight) for i, weight in enumerate(weights)])
        return [weight.cpu() for weight in weights]

    expected = updated("cpu", "cpu")
    with FakeCuda().running():
        assert_same(updated("cuda:0", "cuda:1"), expected)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_gradients_are_clipped_where_they_are(device: str) -> None:
    def clipped(device: str) -> list[torch.Tensor]:
        params = [torch.zeros(n).to(device).requires_grad_() for n in (70, 5)]
        results = []
        for number in range(2):
            for i, param in enumerate(params):
                param.grad = numbers(param.shape, 10 * number + i).to(device) * 1
            results.append(tritopt.clip_grad_norm_(params, 0.5))
            results += [param.grad for param in params if param.grad is not None]
        return [tensor.cpu() for tensor in results]

    expected = clipped("cpu")
    with FakeCuda().running():
        assert_same(clipped(device), expected)
