"""Tables of a group while CUDA graphs are captured, on a stand-in of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.fake_cuda.runtime import FakeCuda
from tests.support.fake_cuda.streams import Graph
from tritopt.engine.group import MAX_CAPTURED, LaunchGroup, upload_table
from tritopt.kernels.formats.format import PLAIN

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
EAGER, CAPTURE = 0, 1


class Gpu:
    """A group, whose steps have a gradient at some address, and two streams."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.streams = [cuda.current_stream(0), cuda.new_stream()]
        self.group = LaunchGroup([0], torch.device("cuda", 0), (PLAIN,), (torch.float32,) * 2, [torch.Size([4])])

    def step(self, grad: int) -> Any:
        """Return what the launches of a step read."""
        upload_table(self.group, np.array([[8, grad, 0]], np.int64), np.array([[1.0, 2.0]]))
        assert self.group.device_table is not None
        return self.group.device_table

    def capture(self, *grads: int, stream: int = CAPTURE) -> tuple[Graph, list[Any]]:
        """A graph of steps, and what they read."""
        with self.cuda.capture(self.streams[stream]) as graph:
            return graph, [self.step(grad) for grad in grads]


def grad_in(table: Any) -> int:
    return int(table.cpu()[1])


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with FakeCuda().running() as cuda:
        yield Gpu(cuda)


@pytest.mark.parametrize("stream", [EAGER, CAPTURE])
def test_a_graph_has_a_table_of_its_own(stream: int, gpu: Gpu) -> None:
    for _ in range(2):
        eager = gpu.step(100)
    graph, (captured,) = gpu.capture(100, stream=stream)
    assert grad_in(captured) == -1  # nobody has written it
    for grad in (100, 200, 200, 100):
        later = gpu.step(grad)
        assert later is not captured
        gpu.cuda.replay(graph)
        assert (grad_in(captured), grad_in(later)) == (100, grad)
    assert captured is not eager


@pytest.mark.parametrize("stream", [EAGER, CAPTURE])
def test_graphs_share_no_table(stream: int, gpu: Gpu) -> None:
    gpu.step(100)
    graphs = [gpu.capture(100, stream=stream) for _ in range(2 * MAX_CAPTURED)]
    gpu.step(200)
    graphs.append(gpu.capture(200, stream=stream))
    tables = [table for _, (table,) in graphs]
    assert len({table.data_ptr() for table in tables}) == len(graphs)
    for (graph, _), table in zip(graphs[::-1], tables[::-1], strict=True):
        assert grad_in(table) == -1
        gpu.cuda.replay(graph)
        assert grad_in(table) == (200 if table is tables[-1] else 100)


def test_graphs_of_other_gradients_need_steps_between_them(gpu: Gpu) -> None:
    gpu.step(1)
    for grad in range(MAX_CAPTURED):
        gpu.capture(grad)
    with pytest.raises(RuntimeError, match="run a step between captures"):
        gpu.capture(MAX_CAPTURED)
    gpu.step(1)
    graph, (table,) = gpu.capture(MAX_CAPTURED)
    gpu.cuda.replay(graph)
    assert grad_in(table) == MAX_CAPTURED


def test_many_steps_of_one_graph(gpu: Gpu) -> None:
    gpu.step(100)
    graph, tables = gpu.capture(*[100] * 3 * MAX_CAPTURED)
    gpu.cuda.replay(graph)
    assert set(map(grad_in, tables)) == {100}


def test_a_first_step_cannot_be_captured(gpu: Gpu) -> None:
    with pytest.raises(RuntimeError, match="first step"):
        gpu.capture(100)
