"""Updates that are made again: they see everything that a built one sees, and are as good as it to the last bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import tritopt
from tritopt.kernels.language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
SHAPES = [(5,), (3, 4), (2, 64), (130,), (1,)]


class Scene:
    """One optimizer with its updater, weights and gradients; `forgets`: builds every update anew."""

    def __init__(self, name: str, forgets: bool, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        self.indices: list[Any] = list(range(len(SHAPES)))
        self.grads: list[Any] = []
        self.opt = tritopt.create(name, **arguments)
        self.updater = tritopt.get_updater(self.opt)
        self.generator, self.forgets = generator, forgets

    def new_gradients(self, dtype: torch.dtype | None = None) -> None:
        self.grads = [torch.randn(w.shape, generator=self.generator).to(dtype or w.dtype) for w in self.weights]

    def step(self) -> None:
        if self.forgets:
            self.opt._planner.forget()
        self.updater(list(self.indices), self.grads, self.weights)

    def tensors(self) -> list[Any]:
        flat: list[Any] = []

        def add(value: Any) -> None:
            if isinstance(value, tuple):
                for item in value:
                    add(item)
            elif value is not None:
                flat.append(value.clone())

        for index in self.indices:
            add(self.updater.states[index])
        return [*(w.clone() for w in self.weights), *flat, dict(self.opt._index_update_count), self.opt.num_update]


def n_replays(scene: Scene) -> int:
    return len(scene.opt._planner.replays)


def counts_replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    original = tritopt.Optimizer._run_again

    def run_again(self: Any, repeated: Any) -> None:
        made.append(1)
        original(self, repeated)

    monkeypatch.setattr(tritopt.Optimizer, "_run_again", run_again)
    return made


def set_master_elsewhere(scene: Scene) -> None:
    """States at other addresses, with the values they have."""
    for index, state in scene.updater.states.items():
        scene.updater.states[index] = copy.deepcopy(state)


def zero_states(scene: Scene) -> None:
    def zeroed(value: Any) -> Any:
        return tuple(map(zeroed, value)) if isinstance(value, tuple) else None if value is None else value.zero_()

    for state in scene.updater.states.values():
        zeroed(state)


def move_weights(scene: Scene) -> None:
    for weight in scene.weights:
        weight.data = weight.data.clone()


def other_weights(scene: Scene) -> None:
    scene.weights = [weight * 0.5 for weight in scene.weights]


def transpose(scene: Scene) -> None:
    scene.weights[1] = scene.weights[1].t().contiguous().t()
    scene.updater.states.pop(1, None)
    scene.updater.states_synced.pop(1, None)


def setter(name: str, value: Any) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        setattr(scene.opt, name, value)

    change.__name__ = f"{name}={value}"
    return change


def leave_out(scene: Scene) -> None:
    scene.grads[2] = None


def strided_gradient(scene: Scene) -> None:
    scene.grads[2] = torch.cat([scene.grads[2], scene.grads[2]], dim=1)[:, ::2]


def negative_gradient(scene: Scene) -> None:
    scene.grads[0] = torch._neg_view(scene.grads[0])


def reorder(scene: Scene) -> None:
    for items in (scene.indices, scene.weights, scene.grads):
        items.reverse()


def multiply(scene: Scene) -> None:
    scene.opt.set_lr_mult({1: 2.0})
    scene.opt.set_wd_mult({2: 0.0})


def count_otherwise(scene: Scene) -> None:
    scene.opt._index_update_count[1] += 7


def fail(scene: Scene) -> None:
    """A refused update, which changes nothing."""
    grads = scene.grads
    scene.grads = [*grads[:-1], torch.zeros(99)]
    with pytest.raises(ValueError, match="99"):
        scene.step()
    scene.grads = grads


CHANGES: list[Callable[[Scene], None]] = [
    set_master_elsewhere, zero_states, move_weights, other_weights, transpose, leave_out, strided_gradient,
    negative_gradient, reorder, multiply, count_otherwise, fail,
    setter("lr", 0.25), setter("lr", 0.0), setter("wd", 0.5), setter("clip_gradient", 0.125),
    setter("rescale_grad", 0.5), setter("rescale_grad", torch.tensor(0.25)), setter("rescale_grad", float("nan")),
    setter("begin_num_update", 3), setter("use_fused_step", True),
]  # fmt: skip
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"momentum": 0.9, "wd": 0.1}),
    ("adamw", {"wd": 0.1}),
    ("adamw", {"wd": 0.1, "dtype": torch.bfloat16, "multi_precision": True}),
    ("adamw", {"dtype": torch.bfloat16, "multi_precision": True, "master": "split8", "state_dtype": "int8"}),
    ("lamb", {"wd": 0.1}),
    ("sgld", {"wd": 0.1}),
    ("ftml", {}),
    ("lars", {"momentum": 0.9, "param_idx2name": {0: "fc_bias"}}),
]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _id(value: Any) -> str:
    return value.__name__ if callable(value) else "-".join(map(str, (value[0], *value[1].values())))


PAIRS = [
    (optimizer, change)
    for i, optimizer in enumerate(OPTIMIZERS)
    for change in CHANGES
    if i < 5 or change.__name__ in ("lr=0.0", "rescale_grad=0.5", "reorder", "leave_out")
]


@pytest.mark.parametrize(("optimizer", "change"), PAIRS, ids=_id)
def test_a_change_between_two_updates_is_seen(optimizer: Any, change: Callable[[Scene], None]) -> None:
    name, arguments = optimizer
    scenes = [Scene(name, forgets, **arguments) for forgets in (False, True)]
    for scene in scenes:
        scene.new_gradients()
        scene.step()
        scene.step()
        scene.new_gradients()
        change(scene)
        scene.step()
        scene.step()
    ours, theirs = (scene.tensors() for scene in scenes)
    for a, b in zip(ours, theirs, strict=True):
        assert same(a, b)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("optimizer", OPTIMIZERS[:5], ids=_id)
def test_a_random_history(optimizer: Any, seed: int) -> None:
    name, arguments = optimizer
    choices = random.Random(seed)
    history = [choices.choice(CHANGES) for _ in range(12)]
    kept = [change for change in history if change.__name__ not in ("rescale_grad=nan", "lr=0.0")]
    results = []
    for forgets in (False, True):
        scene = Scene(name, forgets, **arguments)
        for change in kept:
            scene.new_gradients()
            change(scene)
            scene.step()
            scene.new_gradients()
            scene.step()
        results.append(scene.tensors())
    for a, b in zip(*results, strict=True):
        assert same(a, b)


def test_which_updates_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counts_replays(monkeypatch)
    scene = Scene("adamw", False)
    scene.new_gradients()
    scene.step()
    assert not made
    for expected in (1, 2, 3):
        scene.new_gradients()
        scene.step()
        assert len(made) == expected
    leave_out(scene)
    scene.step()
    assert len(made) == 3
    scene.step()
    assert len(made) == 4  # of its own set of gradients
    scene.new_gradients()
    scene.step()
    assert len(made) == 5  # the first set's is still there
    move_weights(scene)
    scene.step()
    assert len(made) == 5
    scene.step()
    assert len(made) == 6


def test_direct_calls_are_replayed_each_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counts_replays(monkeypatch)
    opt = tritopt.create("sgd", momentum=0.9, multi_precision=True)
    weight, grad = torch.ones(8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    plain = opt.create_state(0, weight)
    opt.update([0], [weight], [grad], [plain])
    opt.update([0], [weight], [grad], [plain])
    assert len(made) == 1
    with pytest.raises(ValueError, match="needs a state"):
        opt.update_multi_precision([0], [weight], [grad], [plain])


def test_two_updaters_of_one_optimizer_do_not_mix_their_weights() -> None:
    opt = tritopt.create("sgd", learning_rate=1.0)
    updaters = [tritopt.get_updater(opt) for _ in range(2)]
    weights = [torch.zeros(4), torch.zeros(4)]
    for _ in range(3):
        for i, updater in enumerate(updaters):
            updater([0], [torch.full((4,), float(i + 1))], [weights[i]])
    assert weights[0].tolist() == [-3.0] * 4
    assert weights[1].tolist() == [-6.0] * 4


def test_autograd_learns_of_a_replayed_write() -> None:
    scene = Scene("adamw", False)
    scene.new_gradients()
    scene.step()
    before = [weight._version for weight in scene.weights]
    scene.step()
    assert all(weight._version > version for weight, version in zip(scene.weights, before, strict=True))


def test_an_interrupted_replay_counts_what_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("adamw", False)
    scene.new_gradients()
    scene.step()
    scene.step()
    before = scene.tensors()

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tritopt.mxnet.replay.run_phases", stop)
        with pytest.raises(KeyboardInterrupt):
            scene.step()
    after = scene.tensors()
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after, strict=True))
    scene.step()
    assert scene.opt.num_update == 3


def test_a_replay_holds_no_tensor_alive() -> None:
    import weakref

    scene = Scene("adamw", False)
    scene.new_gradients()
    for _ in range(3):
        scene.step()
    states = [weakref.ref(plane) for state in scene.updater.states.values() for plane in state]
    gone = [weakref.ref(tensor) for tensor in (*scene.weights, *scene.grads)]
    scene.weights, scene.grads = [], []
    scene.updater.states.clear()
    assert not [ref for ref in (*states, *gone) if ref() is not None]


class Moments(NamedTuple):
    """States as a user may keep them."""

    mean: torch.Tensor
    var: torch.Tensor


class Marked(torch.Tensor):
    """A tensor that is more than its memory."""


@pytest.mark.parametrize("kind", [Moments, tuple])
def test_states_in_a_tuple_of_any_class_are_followed(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counts_replays(monkeypatch)
    opt = tritopt.create("adamw")
    weight, state = torch.ones(4), [torch.zeros(4), torch.zeros(4)]
    for _ in range(3):
        opt.update([0], [weight], [torch.ones(4)], [kind(*state) if kind is Moments else tuple(state)])
    assert len(made) == 2
    assert opt.num_update == 3


def test_a_tensor_of_another_class_is_updated_and_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counts_replays(monkeypatch)
    opt = tritopt.create("sgd", learning_rate=1.0)
    weight = torch.zeros(4).as_subclass(Marked)
    for _ in range(2):
        opt.update([0], [weight], [torch.ones(4)], [None])
    assert weight.tolist() == [-2.0] * 4
    assert not made
