"""Tables on a GPU while CUDA graphs are captured, with copies that are made here in place of those to a device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from tritopt import group as groups
from tritopt.group import MAX_CAPTURED, Group, upload_table
from tritopt.kernels.formats import PLAIN

EAGER, CAPTURE = 1, 2


class Gpu:
    """Which stream is current, and whether it is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.is_capturing = EAGER, False
        self.group = Group([0], torch.device("cuda", 0), (PLAIN,), (torch.float32,) * 2, [torch.Size([4])])
        monkeypatch.setattr(groups, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(groups, "on_device_of", lambda group: nullcontext())
        monkeypatch.setattr(groups, "_pinned", lambda host: torch.clone(host))
        monkeypatch.setattr(groups, "_from_pinned", lambda host, device: torch.clone(host))

    def step(self, grad: int) -> Any:
        """What the launches of a step read, with a gradient at this address."""
        upload_table(self.group, np.array([[8, grad, 0]], np.int64), np.array([[1.0, 2.0]]))
        assert self.group.device_table is not None
        assert self.group.device_table[1] == grad or self.is_capturing
        return self.group.device_table

    def capture(self, grad: int, stream: int) -> Any:
        self.stream, self.is_capturing = stream, True
        table = self.step(grad)
        self.stream, self.is_capturing = EAGER, False
        return table


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.mark.parametrize("stream", [EAGER, CAPTURE])
def test_a_graph_has_a_table_of_its_own(gpu: Gpu, stream: int) -> None:
    for _ in range(2):
        eager = gpu.step(100)
    captured = gpu.capture(100, stream)
    assert captured is not eager
    for grad in (100, 200, 200, 100):
        later = gpu.step(grad)
        assert later is not captured
        assert captured[1] == 100


def test_a_step_after_the_capture_does_not_read_what_was_never_written(gpu: Gpu) -> None:
    gpu.step(100)
    captured = gpu.capture(100, EAGER)
    captured.fill_(-1)
    assert gpu.step(100)[1] == 100


@pytest.mark.parametrize("stream", [EAGER, CAPTURE])
def test_graphs_share_no_table(gpu: Gpu, stream: int) -> None:
    gpu.step(100)
    tables = [gpu.capture(100, stream) for _ in range(MAX_CAPTURED)]
    gpu.step(200)
    tables.append(gpu.capture(200, stream))
    assert len({table.data_ptr() for table in tables}) == MAX_CAPTURED + 1
    assert [int(table[1]) for table in tables] == [100] * MAX_CAPTURED + [200]


def test_many_steps_of_one_graph(gpu: Gpu) -> None:
    gpu.step(100)
    gpu.stream, gpu.is_capturing = CAPTURE, True
    for _ in range(3 * MAX_CAPTURED):
        assert gpu.step(100)[1] == 100


def test_what_graphs_read_is_kept(gpu: Gpu) -> None:
    gpu.step(100)
    captured = gpu.capture(100, CAPTURE)
    for _ in range(3):
        gpu.step(200)
    assert any(held is captured for held in gpu.group.captured)


def test_a_first_step_cannot_be_captured(gpu: Gpu) -> None:
    with pytest.raises(RuntimeError, match="first step"):
        gpu.capture(100, CAPTURE)
