"""Steps that CUDA graphs capture, on a stand-in of a GPU: what replays read was written before, and is never freed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import tritopt
from tests.support.fake_cuda.runtime import FakeCuda
from tests.support.fake_cuda.streams import Graph
from tests.support.fake_cuda.training import Training, assert_same, numbers, on_cpu
from tritopt import optim
from tritopt.engine import recent
from tritopt.engine.plan import Planner
from tritopt.engine.recent import Recent
from tritopt.kernels.language import INTERPRETED
from tritopt.optim import clip

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the stand-in interprets kernels")


class Graphed(Training):
    """A training with graphs, each of which has gradients of its own; on the CPU they are steps.

    Args:
        cuda: the GPUs, None: on the CPU.
    """

    def __init__(self, cuda: FakeCuda | None, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, capturable=True)
        self._cuda = cuda
        self._graphs: list[tuple[Graph | None, list[torch.Tensor], tuple[float, float | None]]] = []

    def capture(self, here: bool = False) -> None:
        """One more graph, of a step; on the stream that steps are made on, or on another."""
        grads = [torch.zeros_like(param) for param in self.params]
        graph = None
        if self._cuda is not None:
            self._take(grads)
            with self._cuda.capture(self._cuda.current_stream() if here else None) as graph:
                self.opt.step()
        self._graphs.append((graph, grads, self._settings))

    def replay(self, place: int, number: int) -> None:
        """Replay a graph, with the gradients of a step of this number."""
        graph, grads, settings = self._graphs[place]
        for i, grad in enumerate(grads):
            grad.copy_(numbers(grad.shape, 100 * number + i).to(grad.dtype))
        if graph is not None and self._cuda is not None:
            self._cuda.replay(graph)
            return
        self._take(grads)
        before, self._settings = self._settings, settings
        self.opt.step()
        self._settings = before

    @property
    def _settings(self) -> tuple[float, float | None]:
        return self.opt.param_groups[0]["lr"], self.opt.max_grad_norm

    @_settings.setter
    def _settings(self, values: tuple[float, float | None]) -> None:
        self.opt.param_groups[0]["lr"], self.opt.max_grad_norm = values

    def _take(self, grads: list[torch.Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad


CASES: list[tuple[type[optim.Optimizer], torch.dtype, dict[str, Any]]] = [
    (optim.AdamW, torch.float32, {"lr": 0.1}),
    (optim.AdamW, torch.bfloat16, {"lr": 0.1, "max_grad_norm": 0.5}),
    (optim.LAMB, torch.float32, {"lr": 0.1}),
]
IDS = [f"{cls.__name__}-{i}" for i, (cls, *_) in enumerate(CASES)]
EAGER, CAPTURE, CAPTURE_HERE, OTHER_BOUND = "eager", "capture", "capture here", "other bound"
PLANS: dict[str, list[Any]] = {
    "between steps": [EAGER, EAGER, CAPTURE, 0, EAGER, 0, 0, CAPTURE, 1, EAGER, 0],
    "one after the other": [EAGER, EAGER, *[CAPTURE] * 4, 3, EAGER, 0],
    "on one stream": [EAGER, EAGER, CAPTURE_HERE, EAGER, OTHER_BOUND, EAGER, 0, EAGER, CAPTURE_HERE, 1, 0],
    "the last one first": [EAGER, CAPTURE, CAPTURE, 1, EAGER, 0],
}


def run(training: Graphed, plan: list[Any]) -> list[torch.Tensor]:
    for number, what in enumerate(plan):
        if what == EAGER:
            training.step(number)
        elif what in (CAPTURE, CAPTURE_HERE):
            training.capture(what == CAPTURE_HERE)
        elif what == OTHER_BOUND:
            training.opt.max_grad_norm = training.opt.max_grad_norm and training.opt.max_grad_norm / 2
        else:
            training.replay(what, number)
    return training.results()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("cls", "dtype", "options"), CASES, ids=IDS)
def test_replays_between_steps(plan: str, cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    expected = run(Graphed(None, cls, ["cpu"], dtype, **options), PLANS[plan])
    with FakeCuda().running() as cuda:
        training = Graphed(cuda, cls, ["cuda:0"], dtype, **options)
        assert_same(run(training, PLANS[plan]), expected)


def other_gradients(training: Graphed) -> None:
    """Plans that are thrown away for the sake of others."""
    for i in range(len(training.params)):
        training.step(50, (i,))


def other_rate(training: Graphed) -> None:
    """Scalars that are uploaded again."""
    training.opt.param_groups[0]["lr"] = 0.01
    training.step(50)


def test_a_norm_whose_plan_was_evicted_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of other launches evict it in the very step that made it."""
    expected = on_cpu(optim.AdamW, [None] * 4, torch.float32, max_grad_norm=0.5)
    monkeypatch.setattr(recent, "MIN_ENTRIES", 1)
    monkeypatch.setattr(Recent.__init__, "__defaults__", (1,))
    assert_same(on_cpu(optim.AdamW, [None] * 4, torch.float32, max_grad_norm=0.5), expected)


def failure(training: Graphed) -> None:
    """Everything derived is derived again."""
    training.opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"(?i)learning rate"):
        training.step(50)
    training.opt.param_groups[0]["lr"] = 0.1
    training.step(51)


@pytest.mark.parametrize("event", [other_gradients, other_rate, failure])
@pytest.mark.parametrize(("cls", "dtype", "options"), CASES[1:], ids=IDS[1:])
def test_what_replays_read_is_never_freed(
    event: Any, cls: Any, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "MIN_ENTRIES", 2)  # what one step uses
    monkeypatch.setattr(Recent.__init__, "__defaults__", (1,))

    def train(training: Graphed) -> list[torch.Tensor]:
        training.step(0)
        training.step(1)
        training.capture()
        event(training)
        gc.collect()
        for number in (2, 3):
            training.replay(0, number)
            training.step(10 + number)
        return training.results()

    expected = train(Graphed(None, cls, ["cpu"], dtype, **options))
    with FakeCuda().running() as cuda:
        assert_same(train(Graphed(cuda, cls, ["cuda:0"], dtype, **options)), expected)


def test_a_graph_outlives_a_checkpoint() -> None:
    """The counts of what was loaded are not the graph's, but its memory is its own."""
    with FakeCuda().running() as cuda:
        training = Graphed(cuda, optim.AdamW, ["cuda:0"], lr=0.1)
        training.step(0)
        training.step(1)
        training.capture()
        training.opt.load_state_dict(training.opt.state_dict())
        training.step(2)
        gc.collect()
        before = training.results()
        training.replay(0, 3)
        after = training.results()
    assert not torch.equal(before[0], after[0])
    assert all(tensor.isfinite().all() for tensor in after)


def test_a_captured_clip_is_kept() -> None:
    """Plans of clip_grad_norm_ are nobody's, and go when others come."""

    def train(device: str, cuda: FakeCuda | None) -> list[torch.Tensor]:
        param = torch.zeros(9).to(device).requires_grad_()
        grad = torch.zeros(9).to(device)
        results = []
        for number in range(2):
            param.grad = numbers((9,), number).to(device)
            tritopt.clip_grad_norm_([param], 0.5)
        param.grad = grad
        if cuda is not None:
            with cuda.capture() as graph:
                norm = tritopt.clip_grad_norm_([param], 0.5)
        clip._plans.planner = Planner()
        gc.collect()
        for number in range(2, 5):
            grad.copy_(numbers((9,), number))
            if cuda is None:
                norm = tritopt.clip_grad_norm_([param], 0.5)
            else:
                cuda.replay(graph)
            results += [grad.cpu().clone(), norm.cpu().clone()]
        return results

    expected = train("cpu", None)
    with FakeCuda().running() as cuda:
        assert_same(train("cuda:0", cuda), expected)


@pytest.mark.parametrize(("steps", "capturable", "error"), [(0, True, "first step"), (2, False, "capturable is False")])
def test_captures_that_are_refused(steps: int, capturable: bool, error: str) -> None:
    with FakeCuda().running() as cuda:
        training = Training(optim.AdamW, ["cuda:0"], lr=0.1, capturable=capturable)
        for number in range(steps):
            training.step(number)
        training.set_grads(9)
        with cuda.capture(), pytest.raises(RuntimeError, match=error):
            training.opt.step()
