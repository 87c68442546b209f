"""Updater: argument order, states on demand, chunks, and states as bytes that cannot run code."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import tritopt
from tritopt import Optimizer, Updater
from tritopt.lr_scheduler import CosineScheduler, FactorScheduler, LRScheduler, MultiFactorScheduler, PolyScheduler

# One configuration of each that has all the states it can have.
CONFIGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "nag": {},
    "adam": {},
    "adamw": {},
    "lamb": {},
    "test": {},
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
F, H = torch.float32, torch.float16


def values(seed: int, *shape: int, dtype: torch.dtype = F) -> torch.Tensor:
    """Drawn on the CPU, so that they are the same numbers wherever the tests run."""
    numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def updater_of(name: str, **kwargs: Any) -> Updater:
    return tritopt.get_updater(tritopt.create(name, **{**CONFIGS[name], **kwargs}))


def flatten(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        yield from flatten(list(state.values()))
    elif state is not None:
        for part in state:
            yield from flatten(part)


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(flatten(a), flatten(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def train(updater: Updater, weights: Sequence[torch.Tensor], seeds: Sequence[int]) -> None:
    for seed in seeds:
        grads = [values(seed + 100 * i, *weight.shape, dtype=weight.dtype) for i, weight in enumerate(weights)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # fp16 weights without a master
            updater(list(range(len(weights))), grads, weights)


def saved(content: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


# Calling.


def test_get_updater() -> None:
    opt = tritopt.SGD()
    updater = tritopt.get_updater(opt)
    assert isinstance(updater, Updater)
    assert updater.optimizer is opt
    assert (updater.states, updater.states_synced) == ({}, {})


@pytest.mark.parametrize(
    ("aggregate_num", "expected"), [(0, False), (1, False), (2, True), (math.inf, True), (None, True)]
)
def test_aggregate_updates(aggregate_num: float | None, expected: bool) -> None:
    assert updater_of("sgd", aggregate_num=aggregate_num).aggregate_updates is expected


@pytest.mark.parametrize("as_list", [False, True], ids=["scalars", "lists"])
def test_order_is_index_gradient_weight(as_list: bool) -> None:
    weight, grad = torch.full((2,), 4.0), torch.ones(2)
    updater = updater_of("sgd", learning_rate=1.0, momentum=0.0)
    if as_list:
        updater(["w"], [grad], [weight])
    else:
        updater("w", grad, weight)
    assert weight.tolist() == [3.0, 3.0]
    assert grad.tolist() == [1.0, 1.0]
    assert updater.optimizer._index_update_count == {"w": 1}


@EVERY
def test_updater_does_what_update_multi_precision_does(name: str) -> None:
    weights = [values(0, 4), values(1, 3, dtype=H)]
    expected = copy.deepcopy(weights)
    updater = updater_of(name, multi_precision=True)
    opt = tritopt.create(name, **CONFIGS[name], multi_precision=True)
    states = [opt.create_state_multi_precision(i, w) for i, w in enumerate(expected)]
    train(updater, weights, range(3))
    for seed in range(3):
        grads = [values(seed, 4), values(seed + 100, 3, dtype=H)]
        opt.update_multi_precision([0, 1], expected, grads, states)
    assert_same(weights, expected)
    assert_same(updater.states, states)


def test_states_are_created_when_an_index_is_first_seen() -> None:
    updater = updater_of("adam", multi_precision=True)
    weights = [values(0, 4), values(1, 3, dtype=H)]
    created: list[Any] = []
    create = updater.optimizer.create_state_multi_precision

    def recording(index: Any, weight: torch.Tensor) -> Any:
        created.append(index)
        return create(index, weight)

    updater.optimizer.create_state_multi_precision = recording  # type: ignore[method-assign]
    train(updater, weights[:1], [0])
    assert created == [0]
    first = updater.states[0]
    train(updater, weights, [1])
    assert created == [0, 1]
    assert updater.states[0] is first
    assert updater.states_synced == {0: True, 1: True}
    master, (mean, var) = updater.states[1]
    assert [t.dtype for t in (master, mean, var)] == [F] * 3


def test_byte_strings_are_decoded_in_the_callers_list() -> None:
    updater = updater_of("sgd", learning_rate=1.0)
    indices: list[Any] = [b"a", 1, b"\xc3\xa4"]
    updater(indices, [torch.ones(1)] * 3, [torch.zeros(1) for _ in range(3)])
    assert indices == ["a", 1, "ä"]
    assert updater.states.keys() == {"a", 1, "ä"}
    # The same parameter, however it is named.
    updater(b"a", torch.ones(1), torch.zeros(1))
    updater((b"a",), (torch.ones(1),), (torch.zeros(1),))
    assert updater.optimizer._index_update_count == {"a": 3, 1: 1, "ä": 1}


@EVERY
def test_empty_lists(name: str) -> None:
    updater = updater_of(name)
    updater([], [], [])
    assert (updater.states, updater.optimizer.num_update) == ({}, 0)


@EVERY
def test_gradients_that_are_none(name: str) -> None:
    updater, alone = updater_of(name), updater_of(name)
    weights, expected = [values(0, 3), values(1, 3)], values(1, 3)
    updater([0, 1], [None, values(2, 3)], weights)
    alone(1, values(2, 3), expected)
    assert_same(weights, [values(0, 3), expected])
    assert updater.optimizer._index_update_count == {1: 1}
    updater(0, None, weights[0])
    assert updater.optimizer._index_update_count == {1: 1}


def test_empty_parameter() -> None:
    updater = updater_of("adam")
    updater([0, 1], [torch.ones(0, 0), torch.ones(2)], [torch.ones(0, 0), torch.ones(2)])
    assert updater.optimizer._index_update_count == {0: 1, 1: 1}


def test_the_device_of_the_first_weight_is_selected() -> None:
    updater = updater_of("sgd")
    updater.optimizer._set_current_device(5)
    updater(0, torch.ones(1), torch.ones(1))
    assert updater.optimizer._all_index_update_counts == {0: {0: 1}, 5: {}}


# Chunks.


def calls_of(updater: Updater, dtypes: Sequence[torch.dtype]) -> list[tuple[int, ...]]:
    """Positions in each call of update_multi_precision, whose other arguments are checked to go with them."""
    weights = [torch.zeros(2, dtype=dtype) for dtype in dtypes]
    grads = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    names = [f"w{i}" for i in range(len(dtypes))]
    calls: list[tuple[int, ...]] = []

    def record(indices: Any, some_weights: Any, some_grads: Any, states: Any) -> None:
        positions = tuple(names.index(name) for name in indices)
        assert [id(w) for w in some_weights] == [id(weights[p]) for p in positions]
        assert [id(g) for g in some_grads] == [id(grads[p]) for p in positions]
        assert [id(s) for s in states] == [id(updater.states[names[p]]) for p in positions]
        calls.append(positions)

    updater.optimizer.update_multi_precision = record  # type: ignore[method-assign, assignment]
    updater(list(names), grads, weights)
    return calls


@pytest.mark.parametrize(
    ("aggregate_num", "dtypes", "expected"),
    [
        (0, (F, H, F), [(0,), (1,), (2,)]),
        (1, (F, H, F), [(0,), (1,), (2,)]),
        (2, (F, H, F, F, H), [(0, 2), (3,), (1, 4)]),
        (2, (H, F, H, F, H), [(0, 2), (4,), (1, 3)]),
        (3, (F, H, F, F, H), [(0, 2, 3), (1, 4)]),
        (4, (F,) * 9, [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]),
        (50, (F, H, F, F, H), [(0, 2, 3), (1, 4)]),
    ],
)
def test_chunks(aggregate_num: float, dtypes: Sequence[torch.dtype], expected: list[tuple[int, ...]]) -> None:
    assert calls_of(updater_of("adam", aggregate_num=aggregate_num, multi_precision=True), dtypes) == expected


@pytest.mark.parametrize(
    "infinity",
    [math.inf, float("inf"), np.inf, pickle.loads(pickle.dumps(np.inf)), np.float64("inf"), np.float32("inf"), None],
    ids=["math", "float", "numpy", "unpickled", "float64", "float32", "None"],
)
def test_infinity_by_value_takes_the_whole_list(infinity: float | None) -> None:
    updater = updater_of("adam", aggregate_num=infinity, multi_precision=True)
    assert calls_of(updater, (F, H, F, torch.float64, torch.bfloat16)) == [(0, 1, 2, 3, 4)]


@EVERY
def test_chunks_do_not_change_the_result(name: str) -> None:
    results = []
    for aggregate_num in (0, 2, 3, None):
        updater = updater_of(name, aggregate_num=aggregate_num, multi_precision=True)
        weights = [values(i, 3, dtype=dtype) for i, dtype in enumerate((F, H, F, F, H))]
        train(updater, weights, range(3))
        assert updater.optimizer._index_update_count == dict.fromkeys(range(5), 3)
        results.append(weights)
    for result in results[1:]:
        assert_same(result, results[0])


# States as bytes.


@EVERY
@pytest.mark.parametrize("dump_optimizer", [False, True])
@pytest.mark.parametrize("multi_precision", [False, True])
def test_training_continues_from_bytes(name: str, dump_optimizer: bool, multi_precision: bool) -> None:
    kwargs: dict[str, Any] = {"wd": 0.01, "clip_gradient": 0.7, "multi_precision": multi_precision}
    updater = updater_of(name, **kwargs)
    weights = [values(0, 4), values(1, 2, 3, dtype=H), values(2, 5, dtype=torch.bfloat16)]
    train(updater, weights, range(3))
    data, copies = updater.get_states(dump_optimizer), copy.deepcopy(weights)

    # Without the optimizer its counts have to come from elsewhere.
    resumed = updater_of(name) if dump_optimizer else updater_of(name, **kwargs, begin_num_update=3)
    resumed.set_states(data)
    assert resumed.states_synced == dict.fromkeys(range(3), False)
    assert_same(resumed.states, updater.states)
    train(updater, weights, range(3, 6))
    train(resumed, copies, range(3, 6))
    assert_same(copies, weights)
    assert_same(resumed.states, updater.states)
    assert resumed.states_synced == dict.fromkeys(range(3), True)
    assert resumed.optimizer._index_update_count == updater.optimizer._index_update_count
    assert resumed.optimizer.num_update == 6


VARIANTS = [(name, variant) for name in tritopt.names() for variant in tritopt.create(name).variants]


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_every_registered_optimizer_is_dumped(name: str, variant: dict[str, Any]) -> None:
    """Training continues with the dumped optimizer's options, in place of the defaults of who takes it."""
    updater = tritopt.get_updater(tritopt.create(name, **variant, learning_rate=0.01, multi_precision=True))
    resumed = tritopt.get_updater(tritopt.create(name))
    weights = [values(0, 4, 6, dtype=torch.bfloat16), values(1, 6, 3)]
    train(updater, weights, range(2))
    resumed.set_states(updater.get_states(dump_optimizer=True))
    copies = copy.deepcopy(weights)
    train(updater, weights, range(2, 4))
    train(resumed, copies, range(2, 4))
    assert_same(copies, weights)
    assert_same(resumed.states, updater.states)


class Halving(LRScheduler):
    """A user's own schedule with a position of its own."""

    def __init__(self, base_lr: float) -> None:
        super().__init__(base_lr)
        self.history: list[float] = []

    def __call__(self, num_update: int) -> float:
        self.history.append(self.base_lr)
        self.base_lr /= 2
        return self.base_lr


@pytest.mark.parametrize(
    "scheduler",
    [
        FactorScheduler(step=2, factor=0.5, base_lr=1.0),
        MultiFactorScheduler(step=[2, 4, 5], factor=0.5, base_lr=1.0, warmup_steps=1),
        PolyScheduler(max_update=6, base_lr=1.0, final_lr=0.1),
        CosineScheduler(max_update=6, base_lr=1.0, warmup_steps=2, warmup_begin_lr=0.5),
        Halving(1.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_position_in_a_schedule_survives(scheduler: LRScheduler) -> None:
    updater = updater_of("sgd", learning_rate=None, lr_scheduler=copy.deepcopy(scheduler))
    weights = [values(0, 4)]
    train(updater, weights, range(4))
    data, copies = updater.get_states(dump_optimizer=True), copy.deepcopy(weights)
    resumed = updater_of("adam")
    resumed.set_states(data)
    assert type(resumed.optimizer.lr_scheduler) is type(scheduler)
    assert vars(resumed.optimizer.lr_scheduler) == vars(updater.optimizer.lr_scheduler)
    assert resumed.optimizer.lr_scheduler is not updater.optimizer.lr_scheduler
    train(updater, weights, range(4, 9))
    train(resumed, copies, range(4, 9))
    assert_same(copies, weights)


def test_all_of_a_dumped_optimizer_comes_back_but_param_dict() -> None:
    updater = updater_of(
        "lamb",
        learning_rate=0.5,
        wd=0.1,
        rescale_grad=0.25,
        clip_gradient=2.0,
        beta1=0.5,
        upper_bound=3.0,
        begin_num_update=2,
        multi_precision=True,
        aggregate_num=3,
        use_fused_step=False,
        param_idx2name={0: "a", (1, "b"): "c"},
        param_dict={0: nn.Parameter(torch.zeros(1))},
    )
    updater.optimizer.set_lr_mult({"a": 2.0, 1: 3.0})
    updater.optimizer.set_wd_mult({"a": 0.0})
    updater.optimizer._set_current_device(2)
    updater.optimizer._update_count([0, 0, (1, "b")])
    resumed = updater_of("sgd", param_dict={0: nn.Parameter(torch.zeros(1))})
    resumed.set_states(updater.get_states(dump_optimizer=True))
    opt = resumed.optimizer
    assert type(opt) is tritopt.LAMB
    assert opt.param_dict == {}
    ours, theirs = (
        {
            k: v
            for k, v in vars(o).items()
            if k not in ("param_dict", "_planner", "_tracker", "_factors", "_clip", "_partition")
        }
        for o in (opt, updater.optimizer)
    )
    assert ours == theirs
    assert opt._index_update_count is opt._all_index_update_counts[2]


def test_bytes_without_optimizer_leave_the_optimizer() -> None:
    updater, other = updater_of("adam"), updater_of("adam", learning_rate=0.5)
    train(updater, [values(0, 3)], [0])
    opt = other.optimizer
    other.set_states(updater.get_states())
    assert other.optimizer is opt
    assert opt.lr == 0.5


def test_loading_replaces_all_states() -> None:
    updater, other = updater_of("adam"), updater_of("adam")
    train(updater, [values(0, 3)], [0])
    train(other, [values(0, 3), values(1, 4)], [0])
    other.set_states(updater.get_states())
    assert other.states.keys() == other.states_synced.keys() == {0}


def test_loaded_states_are_independent_of_the_saved_ones() -> None:
    updater, other = updater_of("adam"), updater_of("adam")
    train(updater, [values(0, 3)], [0])
    other.set_states(updater.get_states())
    before = [t.clone() for t in flatten(updater.states)]
    train(other, [values(1, 3)], [1])
    assert_same(updater.states, before)


def test_bytes_are_what_torch_loads_without_running_code() -> None:
    updater = updater_of("adam", learning_rate=None, lr_scheduler=FactorScheduler(step=1), multi_precision=True)
    train(updater, [values(0, 3, dtype=H)], [0])
    for dump_optimizer in (False, True):
        data = updater.get_states(dump_optimizer)
        assert isinstance(data, bytes)
        torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25)], ids=repr)
def test_hyperparameters_from_numpy_are_dumped(number: Any) -> None:
    # np.linspace and the like: they are accepted by the constructor.
    updater = updater_of("adamw", learning_rate=number, wd=number, beta1=number, clip_gradient=number)
    weights = [values(0, 3)]
    train(updater, weights, [0])
    resumed, copies = updater_of("sgd"), copy.deepcopy(weights)
    resumed.set_states(updater.get_states(dump_optimizer=True))
    train(updater, weights, [1])
    train(resumed, copies, [1])
    assert_same(copies, weights)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class PairOptimizer(Optimizer):
    """A user's optimizer whose states are of a class of its own."""

    def create_state(self, index: Any, weight: torch.Tensor) -> Pair:
        return Pair(torch.zeros_like(weight), torch.ones_like(weight))

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        self._update_count(list(indices))


@pytest.mark.parametrize(
    ("opt", "index"),
    [(tritopt.Adam(), np.int64(3)), (tritopt.Adam(), frozenset({3})), (PairOptimizer(), 3)],
    ids=["numpy index", "frozenset index", "namedtuple state"],
)
def test_what_could_not_be_loaded_is_not_saved(opt: Optimizer, index: Any) -> None:
    """A checkpoint that fails when it is read back is noticed too late."""
    updater = tritopt.get_updater(opt)
    updater(index, torch.ones(2), torch.ones(2))
    try:
        data = updater.get_states()
    except TypeError as error:
        assert "Pair" in str(error) or repr(index) in str(error)  # noqa: PT017
    else:
        tritopt.get_updater(tritopt.Adam()).set_states(data)


def test_an_attribute_that_cannot_be_plain_is_named() -> None:
    updater = updater_of("sgd")
    updater.optimizer.hook = print  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"hook.*dump_optimizer=False"):
        updater.get_states(dump_optimizer=True)
    assert updater.get_states()


def test_an_optimizer_that_is_not_registered_is_named() -> None:
    class Unknown(tritopt.SGD):
        """Optimizer that is never registered."""

    with pytest.raises(TypeError, match=r"Unknown.* register it"):
        tritopt.get_updater(Unknown()).get_states(dump_optimizer=True)


def test_a_namesake_of_a_registered_optimizer_is_not_confused_with_it() -> None:
    namesake = type("SGD", (tritopt.SGD,), {"step": tritopt.SGD.step})
    updater, other = tritopt.get_updater(namesake()), updater_of("adam")
    try:
        other.set_states(updater.get_states(dump_optimizer=True))
    except (TypeError, ValueError) as error:
        assert "SGD" in str(error)  # noqa: PT017
    else:
        assert type(other.optimizer) is namesake


def test_a_namesake_of_a_schedule_is_not_confused_with_it(request: pytest.FixtureRequest) -> None:
    # A class outlives its last reference until the collector comes, and would be found by later tests.
    request.addfinalizer(gc.collect)
    namesake = type("PolyScheduler", (PolyScheduler,), {})
    for cls in (PolyScheduler, namesake):
        updater = updater_of("sgd", learning_rate=None, lr_scheduler=cls(max_update=3))
        other = updater_of("adam")
        try:
            other.set_states(updater.get_states(dump_optimizer=True))
        except (TypeError, ValueError) as error:
            assert "PolyScheduler" in str(error)  # noqa: PT017
        else:
            assert type(other.optimizer.lr_scheduler) is cls


def test_a_schedule_that_could_not_be_loaded_is_not_saved() -> None:
    updater = updater_of("sgd", learning_rate=None, lr_scheduler=lambda num_update: 0.5)
    with pytest.raises(TypeError, match="lr_scheduler"):
        updater.get_states(dump_optimizer=True)
    assert updater.get_states()


def test_sync_keeps_containers() -> None:
    updater = updater_of("sgd")
    state = ([values(0, 2), None], (values(1, 2), [values(2, 2)]), 3.0)
    synced = updater.sync_state_context(state, torch.device("meta"))
    assert [type(part) for part in synced] == [list, tuple, float]
    assert synced[0][1] is None
    assert isinstance(synced[1][1], list)
    assert {t.device.type for t in (synced[0][0], synced[1][0], synced[1][1][0])} == {"meta"}


@pytest.mark.parametrize(("before", "after", "expected"), [(1, 4, [(0, 1, 2)]), (4, 1, [(0,), (1,), (2,)])])
def test_a_loaded_optimizer_decides_on_aggregation(before: float, after: float, expected: Any) -> None:
    updater = updater_of("sgd", aggregate_num=before)
    updater.set_states(updater_of("sgd", aggregate_num=after).get_states(dump_optimizer=True))
    assert updater.aggregate_updates is (after > 1)
    assert calls_of(updater, (F, F, F)) == expected


# Bytes that are not ours.


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def assert_refused(data: Any) -> None:
    updater = updater_of("adam")
    train(updater, [values(0, 3)], [0])
    opt, states = updater.optimizer, dict(updater.states)
    with pytest.raises(ValueError, match="get_states"):
        updater.set_states(data)
    assert updater.optimizer is opt
    assert updater.states.keys() == states.keys()
    assert updater.states[0] is states[0]
    assert updater.states_synced == {0: True}
    train(updater, [values(0, 3)], [1])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["all", "states", "state", "index", "optimizer", "attribute", "lr_scheduler"])
def test_malicious_bytes_run_nothing(where: str, legacy: bool, tmp_path: Path) -> None:
    bait = Payload(tmp_path / "owned")
    updater = updater_of("adam", learning_rate=None, lr_scheduler=FactorScheduler(step=1))
    content = torch.load(io.BytesIO(updater.get_states(dump_optimizer=True)), weights_only=True)
    if where == "all":
        content = bait
    elif where in ("states", "optimizer"):
        content[where] = bait
    elif where == "state":
        content["states"] = {0: bait}
    elif where == "index":
        content["states"] = {bait: None}
    elif where == "attribute":
        content["optimizer"]["attributes"]["lr"] = bait
    else:
        content["optimizer"]["lr_scheduler"] = bait
    assert_refused(saved(content, _use_new_zipfile_serialization=not legacy))
    assert not bait.path.exists()


def test_pickles_run_nothing(tmp_path: Path) -> None:
    bait = Payload(tmp_path / "owned")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_refused(pickle.dumps(({0: bait}, tritopt.SGD()), protocol))
        assert_refused(pickle.dumps(bait, protocol))
    assert not bait.path.exists()
    # The bait is real.
    pickle.loads(pickle.dumps(bait))
    assert bait.path.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        "a string",
        None,
        saved([1, 2]),
        saved({"states": 3}),
        saved({"weights": {}}),
        saved({"states": {}, "optimizer": 3}),
        saved({"states": {}, "optimizer": {"name": "sgd"}}),
        saved({"states": {}, "optimizer": {"name": "sgd", "attributes": [], "device": 0}}),
        saved({"states": {}, "optimizer": {"name": ["sgd"], "attributes": {}, "device": 0}}),
        saved({"states": {}, "optimizer": {"name": "sgd", "attributes": {}, "device": 0, "lr_scheduler": "Factor"}}),
    ],
    ids=lambda data: repr(data)[:20] if not isinstance(data, bytes) or len(data) < 9 else "saved",
)
def test_other_bytes_are_refused(data: Any) -> None:
    assert_refused(data)


def test_truncated_bytes_are_refused() -> None:
    updater = updater_of("adam")
    train(updater, [values(0, 30)], [0])
    data = updater.get_states(dump_optimizer=True)
    for length in range(0, len(data), 997):
        assert_refused(data[:length])


def test_indices_of_numpys_bytes_are_decoded() -> None:
    updater = tritopt.get_updater(tritopt.create("sgd"))
    indices: list[Any] = [np.bytes_(b"weight")]
    updater(indices, [torch.ones(2)], [torch.ones(2)])
    assert indices == ["weight"]
    assert list(updater.states) == ["weight"]
