"""The stand-in of a GPU by itself: it must notice what the tests that use it are to notice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from tests.support.fake_cuda.runtime import FakeCuda
from tests.support.fake_cuda.streams import GpuError
from tritopt.engine import plan
from tritopt.engine.device import on_device
from tritopt.engine.driver import Apply
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Planner, Task
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.language import INTERPRETED, triton

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the stand-in interprets kernels")
GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda().running() as fake:
        yield fake


def test_operations_run_when_they_are_waited_for(cuda: FakeCuda) -> None:
    x = torch.ones(3).to(GPU) + 1
    x[1:] *= torch.tensor(3.0).to(GPU)
    x[torch.tensor([0]).to(GPU)] = 7.0
    assert cuda.log == []
    assert (x.device, x.shape, x.dtype) == (GPU, (3,), torch.float32)
    assert x.tolist() == [7.0, 6.0, 6.0]
    assert x[0].item() == 7.0
    assert torch.stack([x, ~(x > 6)]).sum().item() == 21.0
    assert "aten.add.Tensor" in cuda.log


def test_pinned_memory_is_read_late_and_other_memory_at_once(cuda: FakeCuda) -> None:
    pinned, pageable = torch.ones(2).pin_memory(), torch.ones(2)
    copies = [host.to(GPU, non_blocking=True) for host in (pinned, pageable)]
    waiting = pinned.to(GPU)
    pinned.fill_(5.0)
    pageable.fill_(5.0)
    assert [copy.tolist() for copy in (*copies, waiting)] == [[5.0, 5.0], [1.0, 1.0], [1.0, 1.0]]


def test_pinned_memory_lives_until_its_copy_is_done(cuda: FakeCuda) -> None:
    copies = [torch.full((2,), float(i)).pin_memory().to(GPU, non_blocking=True) for i in range(5)]
    gc.collect()
    assert [copy.tolist() for copy in copies] == [[float(i)] * 2 for i in range(5)]


def test_what_nobody_has_written_is_poison(cuda: FakeCuda) -> None:
    assert torch.empty(2, device=GPU).isnan().all()
    assert torch.empty(2, dtype=torch.int64, device=GPU).tolist() == [-1, -1]


@pytest.mark.parametrize("is_recorded", [False, True])
def test_freed_memory_is_reused_by_the_stream_that_it_is_of(is_recorded: bool, cuda: FakeCuda) -> None:
    default, side = cuda.current_stream(0), cuda.new_stream()
    x = torch.ones(4, device=GPU)
    side.wait_stream(default)
    with cuda.on(side):
        y = x + 1
    if is_recorded:
        side.keep(x)
    del x
    default.synchronize()
    if is_recorded:
        side.synchronize()
        assert y.tolist() == [2.0] * 4
    else:
        with pytest.raises(GpuError, match="16 bytes that were freed"):
            side.synchronize()


@pytest.mark.parametrize("host", [False, True])
def test_a_graph_keeps_nothing_alive(host: bool, cuda: FakeCuda) -> None:
    x = torch.ones(4).pin_memory() if host else torch.ones(4, device=GPU)
    y = torch.zeros(4, device=GPU)
    with cuda.capture() as graph:
        y.copy_(x, non_blocking=True)
        z = y + 1  # the graph's own
    assert y.tolist() == [0.0] * 4
    cuda.replay(graph)
    assert z.tolist() == [2.0] * 4
    del z
    cuda.replay(graph)
    x.fill_(3.0)
    assert y.tolist() == [3.0] * 4 if host else [1.0] * 4
    del x
    gc.collect()
    cuda.synchronize()
    cuda.replay(graph)
    with pytest.raises(GpuError, match="freed before it ran"):
        cuda.synchronize()


def test_nothing_waits_in_a_capture(cuda: FakeCuda) -> None:
    x = torch.ones(1, device=GPU)
    with cuda.capture():
        with pytest.raises(GpuError, match="not permitted"):
            x.item()
        with pytest.raises(GpuError, match="not pinned"):
            torch.ones(2).to(GPU)


def test_devices_do_not_mix(cuda: FakeCuda) -> None:
    x, y = torch.ones(2, device=GPU), torch.ones(2, device="cuda:1")
    with pytest.raises(GpuError, match="one device"):
        x + y
    with pytest.raises(GpuError, match="one device"):
        x + torch.ones(2)
    assert (x + y.to(GPU) + torch.tensor(1.0)).tolist() == [3.0, 3.0]


def test_memory_ends() -> None:
    with FakeCuda(capacity=100).running():
        held = torch.empty(92, dtype=torch.uint8, device=GPU)
        assert torch.cuda.mem_get_info(GPU) == (8, 100)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(9, dtype=torch.uint8, device=GPU)
        torch.empty(9, dtype=torch.uint8, device="cuda:1")
        del held
        torch.empty(9, dtype=torch.uint8, device=GPU)


class Scale(NamedTuple):
    factor: float


@triton.jit
def add_scaled(w, g, state, s):  # type: ignore[no-untyped-def]
    return w + s.factor * g, state


@needs_interpreter
def test_kernels_run_late_and_on_the_current_device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grad = torch.zeros(5, device="cuda:1"), torch.ones(5, device="cuda:1")
    launch, scalars = LaunchSpec((Apply(add_scaled),), Scale, "decoupled"), [(1.0, float("inf"), 0.0, 2.0)]
    tasks = [Task((weight,), PLAIN, grad, ())]
    Planner().apply("key", tasks, scalars, launch)
    assert "add_scaled" not in cuda.log
    assert weight.tolist() == [2.0] * 5
    monkeypatch.setattr("tritopt.engine.group.on_device", lambda device: on_device(GPU))
    with pytest.raises(GpuError, match="add_scaled on cuda:0 gets a tensor on cuda:1"):
        Planner().apply("key", tasks, scalars, launch)


@needs_interpreter
def test_a_table_with_an_address_of_nobody(cuda: FakeCuda) -> None:
    weight, grad = torch.zeros(5, device=GPU), torch.ones(5)
    assert plan.unavailable(weight) is None
    launch = LaunchSpec((Apply(add_scaled),), Scale, "decoupled")
    task = Task((weight,), PLAIN, weight, ())
    planner = Planner()
    groups = planner.apply("key", [task], [(1.0, float("inf"), 0.0, 2.0)], launch)
    assert groups is not None
    cuda.synchronize()
    assert groups[0].device_table is not None
    groups[0].device_table[1] = grad.data_ptr()
    launch.phases[0].launch(groups[0], launch, None)
    with pytest.raises(GpuError, match="reads a table with address"):
        cuda.synchronize()
