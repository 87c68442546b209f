"""Steps that CUDA graphs capture, on a stand-in of a GPU: what replays read was written before, and is never freed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fake_cuda.runtime import FakeCuda
from tests.fake_cuda.streams import Graph, Stream
from tests.fake_cuda.training import Training, assert_same, numbers
from tritopt import optim

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Graphed(Training):
    """A training with graphs, each of which has gradients of its own."""

    def __init__(self, cuda: FakeCuda | None, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cuda = cuda
        self._graphs: list[tuple[Graph | None, list[torch.Tensor]]] = []

    def capture(self, n_steps: int = 1, stream: Stream | None = None) -> None:
        """One more graph, of some steps."""
        grads = [torch.zeros_like(param) for param in self.params]
        graph = None
        if self._cuda is not None:
            for param, grad in zip(self.params, grads, strict=True):
                param.grad = grad
            with self._cuda.capture(stream) as graph:
                for _ in range(n_steps):
                    self.opt.step()
        self._graphs.append((graph, grads))
        self._n_steps = n_steps

    def results(self) -> list[torch.Tensor]:
        """Without the norm, which is that of the last step that Python made."""
        found = super().results()
        return found if self.opt.grad_norm is None else found[:-1]

    def replay(self, place: int, number: int) -> None:
        """Of a graph, with the gradients of a step of this number."""
        graph, grads = self._graphs[place]
        for i, grad in enumerate(grads):
            grad.copy_(numbers(grad.shape, 100 * number + i).to(grad.dtype))
        if self._cuda is not None:
            assert graph is not None
            self._cuda.replay(graph)
            return
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        for _ in range(self._n_steps):
            self.opt.step()


CASES: list[tuple[type[optim.Optimizer], torch.dtype, dict[str, Any]]] = [
    (optim.AdamW, torch.float32, {"lr": 0.1}),
    (optim.AdamW, torch.bfloat16, {"lr": 0.1, "max_grad_norm": 0.5}),
    (optim.AdamW, torch.bfloat16, {"lr": 0.1, "master": "split8", "state_dtype": "bf16"}),
    (optim.LAMB, torch.float32, {"lr": 0.1, "max_grad_norm": 0.5}),
    (optim.Adafactor, torch.float32, {}),
    (optim.NAdam, torch.float32, {}),
]
every_case = pytest.mark.parametrize(
    ("cls", "dtype", "options"), CASES, ids=[f"{cls.__name__}-{i}" for i, (cls, *_) in enumerate(CASES)]
)
EAGER, CAPTURE = "eager", "capture"
PLANS: dict[str, list[Any]] = {
    "between steps": [EAGER, EAGER, CAPTURE, 0, EAGER, 0, 0, EAGER, CAPTURE, 1, 0, EAGER, 1],
    "one after the other": [EAGER, EAGER, *[CAPTURE] * 4, 3, 1, EAGER, 0, 2],
    "the last one first": [EAGER, CAPTURE, CAPTURE, 1, EAGER, 0],
}


def run(training: Graphed, plan: list[Any], **options: Any) -> list[torch.Tensor]:
    for number, what in enumerate(plan):
        if what == EAGER:
            training.step(number)
        elif what == CAPTURE:
            training.capture(**options)
        else:
            training.replay(what, number)
    # Of the graphs, not of an attribute that the last eager step has set.
    return training.results()


@pytest.mark.parametrize("plan", PLANS)
@every_case
def test_replays_between_steps(plan: str, cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    expected = run(Graphed(None, cls, ["cpu"], dtype, **options, capturable=True), PLANS[plan])
    with FakeCuda().running() as cuda:
        training = Graphed(cuda, cls, ["cuda:0"], dtype, **options, capturable=True)
        assert_same(run(training, PLANS[plan]), expected)
