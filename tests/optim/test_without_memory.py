"""Parameters without memory, under FakeTensorMode and on meta: a step makes the states that a real one makes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import tritopt
from tests.support.training import CLASSES, SHAPES, with_each
from tritopt import gluon, optim
from tritopt.engine import walk

DRAWING: list[dict[str, Any]] = [{"master": "split8", "state_dtype": "int8"}, {"master": "stochastic"}]
DRAW_NOTHING = (optim.Adafactor, optim.GroupAdaGrad)
CASES = [
    *((cls, {}) for cls in CLASSES),
    *with_each([cls for cls in CLASSES if cls not in DRAW_NOTHING], DRAWING),
]
BLOCKS = ((3, 64), *SHAPES)
Shown = list[dict[str, tuple[torch.dtype, torch.Size, tuple[int, ...]]]]


def shown(opt: optim.Optimizer) -> Shown:
    """Dtypes, shapes and strides of all states."""
    params = opt.param_groups[0]["params"]
    return [{key: (t.dtype, t.shape, t.stride()) for key, t in opt.state[p].items()} for p in params]


def stepped(cls: Any, device: str, options: dict[str, Any]) -> optim.Optimizer:
    """An optimizer after two steps; its last parameter has a gradient in the second only."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for shape in BLOCKS]
    opt: optim.Optimizer = cls(params, **options)
    for with_gradient in (params[:-1], params):
        for p in with_gradient:
            p.grad = torch.ones_like(p)
        opt.step()
        opt.zero_grad()
    return opt


@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_states_are_those_of_a_real_step(cls: Any, options: dict[str, Any]) -> None:
    real = stepped(cls, "cpu", options)
    with FakeTensorMode():
        fake = stepped(cls, "cpu", options)
        assert all(isinstance(t, FakeTensor) for state in fake.state.values() for t in state.values())
    meta = stepped(cls, "meta", options)
    assert shown(fake) == shown(meta) == shown(real)
    for a, b in zip(meta.state.values(), real.state.values(), strict=True):
        assert a.get("step") == b.get("step")


@pytest.mark.parametrize("options", [{"fused": False}, {"max_grad_norm": 1.0, "track": True}, {"capturable": True}])
def test_options_that_read_gradients_read_none(options: dict[str, Any]) -> None:
    expected = shown(stepped(optim.AdamW, "cpu", options))
    with FakeTensorMode():
        assert shown(stepped(optim.AdamW, "cpu", options)) == expected
    assert shown(stepped(optim.AdamW, "meta", options)) == expected


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_other_ways_to_step(where: str) -> None:
    """Gradients that are sparse or released, optimizers of several rules, and a GradScaler's numbers."""

    def steps() -> list[Any]:
        embedding = torch.nn.Embedding(10, 8, sparse=True)
        matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 64), (5,)))
        sgd, adam = optim.SGD(embedding.parameters(), momentum=0.9), optim.AdamW([vector])
        released = optim.AdamW([matrix])
        mixed = optim.Mixed([{"params": [matrix], "algorithm": "Muon"}, {"params": [vector], "algorithm": "AdamW"}])
        embedding(torch.zeros(3, dtype=torch.int64)).sum().backward()
        matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
        vars(adam).update(found_inf=torch.zeros(()), grad_scale=torch.ones(()))
        for opt in (sgd, adam, mixed):
            opt.step()
        matrix.grad = None
        with optim.release_gradients([matrix], released):
            matrix.sum().backward()
        released.step()
        return [*map(shown, (sgd, adam, released)), *map(sorted, mixed.state.values())]

    expected = steps()
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        assert steps() == expected


def test_the_memory_tracker_counts_what_is_kept() -> None:
    """torch's tracker sees a real optimizer's states, and beside them the exact counts, 8 bytes a parameter."""
    options: dict[str, Any] = {"master": "split8", "state_dtype": "int8"}
    real = stepped(optim.AdamW, "cpu", options)
    kept = sum(t.nbytes for state in real.state.values() for t in state.values())
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in BLOCKS]
        opt = optim.AdamW(params, **options)
        tracker = MemTracker()
        tracker.track_external(*params, opt)
        with tracker:
            for _ in range(2):
                for p in params:
                    p.grad = torch.ones_like(p)
                opt.step()
                opt.zero_grad()
        of_states = {str(kind): n for kind, n in tracker.get_tracker_snapshot()[torch.device("cpu")].items()}
    assert of_states["_MemRefType.OPT"] == kept + 8 * len(params)


def test_what_does_not_fit_is_refused() -> None:
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.zeros(3, 2))
        opt = optim.AdamW([p])
        p.grad = torch.zeros_like(p)
        opt.state[p]["exp_avg"] = torch.zeros(2, 3)
        with pytest.raises(ValueError, match=r"state.*\(2, 3\)"):
            opt.step()


@pytest.mark.parametrize("name", tritopt.names())
def test_updaters_make_states(name: str) -> None:
    """An updater of the MXNet face makes its states, and counts its updates too."""

    def states(mode: AbstractContextManager[Any]) -> list[Any]:
        with mode:
            opt = tritopt.create(name, multi_precision=True)
            updater = tritopt.get_updater(opt)
            for _ in range(2):
                updater([0], [torch.ones(4, 6, dtype=torch.bfloat16)], [torch.ones(4, 6, dtype=torch.bfloat16)])
            assert opt.num_update == 2
            leaves, structure = torch.utils._pytree.tree_flatten(updater.states)
            return [structure, *((t.dtype, t.shape) for t in leaves if isinstance(t, torch.Tensor))]

    assert states(FakeTensorMode()) == states(nullcontext())


def test_trainers_step() -> None:
    with FakeTensorMode():
        model = torch.nn.Linear(4, 4)
        trainer = gluon.Trainer(model, "adam", {"learning_rate": 0.1})
        for _ in range(2):
            model(torch.zeros(2, 4)).sum().backward()
            trainer.step(2)


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
def test_a_mode_does_not_choose_the_slow_walk(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice holds for the process, though only its first optimizer was made in the mode."""
    expected = walk.description()
    monkeypatch.setattr(walk, "_chosen", [])
    with mode():
        assert walk.description() == expected
