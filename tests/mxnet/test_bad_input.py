"""Mistakes of users: an error that names the value and the way out, before anything is written.

Every bad call is made in the middle of a training run, which must then go on as if the call had never been made.
"""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tritopt import Optimizer
from tritopt.lr_scheduler import LRScheduler

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = math.nan, math.inf

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
BOTH_PATHS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "step"])
# With one state, with two, and with two phases; checks come before the path is chosen.
THREE = pytest.mark.parametrize(
    ("name", "fused"), [("sgd", True), ("adam", False), ("lamb", True)], ids=["sgd-fused", "adam-step", "lamb-fused"]
)

WAY_OUT = re.compile("must|pass|call|create|move|needs?|supported|known|set |one of each|instead|drop|give|unset")


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Drawn on the CPU, so that they are the same numbers wherever the tests run."""
    numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def flatten(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from flatten(part)


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(flatten(a), flatten(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def assert_helpful(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    """The message contains all the parts, which are what was wrong, and a way out."""
    for part in parts:
        assert part in str(error.value)
    assert WAY_OUT.search(str(error.value))


class Run:
    """A training run over an fp32, an fp16 with master and another fp32 weight."""

    def __init__(self, opt: Optimizer) -> None:
        self.opt = opt
        self.indices: list[Any] = [0, "one", 2]
        self.weights = [values(0, 2, 3), values(1, 2, 3, dtype=torch.float16), values(2, 6)]
        self.states = [opt.create_state_multi_precision(i, w) for i, w in zip(self.indices, self.weights, strict=True)]
        self.steps = 0

    def call(self) -> SimpleNamespace:
        """Arguments of a good call."""
        seeds = range(10 + 3 * self.steps, 13 + 3 * self.steps)
        grads = [values(seed, *w.shape, dtype=w.dtype) for seed, w in zip(seeds, self.weights, strict=True)]
        return SimpleNamespace(
            indices=list(self.indices), weights=list(self.weights), grads=grads, states=list(self.states)
        )

    def good_step(self) -> None:
        call = self.call()
        self.opt.update_multi_precision(call.indices, call.weights, call.grads, call.states)
        self.steps += 1

    def snapshot(self) -> Any:
        caches = {name: dict(value) for name, value in vars(self.opt._planner).items() if isinstance(value, dict)}
        return (
            [t.clone() for t in flatten([self.weights, self.states])],
            (self.opt.num_update, copy.deepcopy(self.opt._all_index_update_counts)),
            {name: {key: id(value) for key, value in cache.items()} for name, cache in caches.items()},
        )

    def assert_unchanged_since(self, snapshot: Any) -> None:
        tensors, counts, caches = self.snapshot()
        assert_same(tensors, snapshot[0])
        assert (counts, caches) == snapshot[1:]
        assert self.opt._index_update_count is self.opt._all_index_update_counts[0]


def run_of(name: str, fused: bool, **kwargs: Any) -> Run:
    settings = {**CONFIGS[name], "wd": 0.1, "multi_precision": True, "use_fused_step": fused, **kwargs}
    return Run(tritopt.create(name, **settings))


def assert_continues(run: Run, undisturbed: Run) -> None:
    """`run`, which had the bad call after its first step, goes on like one that had not."""
    run.good_step()
    undisturbed.good_step()
    undisturbed.good_step()
    assert_same([run.weights, run.states], [undisturbed.weights, undisturbed.states])
    assert run.opt.num_update == undisturbed.opt.num_update == 2
    assert run.opt._index_update_count == undisturbed.opt._index_update_count


# Calls. Each function spoils the arguments of a good one.

BadCall = Callable[[SimpleNamespace], None]
BAD_CALLS: list[Any] = []


def bad_call(error: type[Exception] | tuple[type[Exception], ...], *parts: str) -> Callable[[BadCall], BadCall]:
    def collect(spoil: BadCall) -> BadCall:
        BAD_CALLS.append(pytest.param(spoil, error, parts, id=spoil.__name__))
        return spoil

    return collect


@bad_call(ValueError, "3 indices", "2 weights")
def fewer_weights(call: SimpleNamespace) -> None:
    del call.weights[0]


@bad_call(ValueError, "3 indices", "2 gradients")
def fewer_gradients(call: SimpleNamespace) -> None:
    del call.grads[2]


@bad_call(ValueError, "3 indices", "2 states")
def fewer_states(call: SimpleNamespace) -> None:
    del call.states[1]


@bad_call(ValueError, "4 indices", "3 weights")
def more_indices(call: SimpleNamespace) -> None:
    call.indices.append(3)


@bad_call((TypeError, ValueError), "gradients", "None")
def no_list_of_gradients(call: SimpleNamespace) -> None:
    call.grads = None


@bad_call((TypeError, ValueError), "weights", "generator")
def weights_in_a_generator(call: SimpleNamespace) -> None:
    # model.parameters() is one.
    call.weights = (weight for weight in call.weights)


@bad_call(TypeError, "2", "weight", "ndarray", "torch.Tensor")
def weight_from_numpy(call: SimpleNamespace) -> None:
    call.weights[2] = np.zeros(6, dtype=np.float32)


@bad_call(TypeError, "2", "weight", "None", "torch.Tensor")
def weight_is_none(call: SimpleNamespace) -> None:
    call.weights[2] = None


@bad_call(TypeError, "2", "gradient", "ndarray", "torch.Tensor")
def gradient_from_numpy(call: SimpleNamespace) -> None:
    call.grads[2] = np.zeros(6, dtype=np.float32)


@bad_call(ValueError, "2", "(2, 3)", "(6,)")
def gradient_of_another_shape(call: SimpleNamespace) -> None:
    call.grads[2] = values(0, 2, 3)


@bad_call(ValueError, "0", "(3,)", "(2, 3)")
def gradient_that_would_broadcast(call: SimpleNamespace) -> None:
    call.grads[0] = values(0, 3)


@bad_call(ValueError, "2", "()", "(6,)")
def gradient_without_dimensions(call: SimpleNamespace) -> None:
    call.grads[2] = torch.tensor(1.0)


@bad_call(ValueError, "2", "meta")
def gradient_on_another_device(call: SimpleNamespace) -> None:
    call.grads[2] = torch.empty(6, device="meta")


@bad_call(TypeError, "2", "int64")
def gradient_of_integers(call: SimpleNamespace) -> None:
    call.grads[2] = torch.ones(6, dtype=torch.int64)


@bad_call(TypeError, "2", "complex64")
def gradient_of_complex_numbers(call: SimpleNamespace) -> None:
    call.grads[2] = torch.ones(6, dtype=torch.complex64)


@bad_call(TypeError, "2", "float64", "float32")
def gradient_wider_than_the_weight(call: SimpleNamespace) -> None:
    call.grads[2] = call.grads[2].double()


def weight_of(dtype: torch.dtype) -> BadCall:
    def spoil(call: SimpleNamespace) -> None:
        call.weights[2] = torch.ones(6).to(dtype)

    return spoil


for _dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn):
    _parts = ("2", str(_dtype).removeprefix("torch."))
    BAD_CALLS.append(pytest.param(weight_of(_dtype), TypeError, _parts, id=f"weight_of_{_parts[1]}"))


@bad_call(TypeError, "2", "view_as_real")
def weight_and_gradient_of_complex_numbers(call: SimpleNamespace) -> None:
    call.weights[2] = call.grads[2] = torch.ones(6, dtype=torch.complex64)


@bad_call(TypeError, "2", "sparse", "to_dense")
def sparse_weight(call: SimpleNamespace) -> None:
    call.weights[2] = call.weights[2].to_sparse()


@bad_call(ValueError, "2", "share memory")
def the_same_weight_twice(call: SimpleNamespace) -> None:
    call.indices.append(3)
    call.weights.append(call.weights[2])
    call.grads.append(call.grads[2])
    call.states.append(copy.deepcopy(call.states[2]))


@bad_call(ValueError, "0", "2", "share memory")
def a_weight_and_a_view_of_it(call: SimpleNamespace) -> None:
    call.weights[2] = call.weights[0].view(6)


@bad_call(ValueError, "0", "2", "share memory")
def a_weight_and_a_strided_view_of_it(call: SimpleNamespace) -> None:
    call.weights[0] = call.weights[0].t()
    call.grads[0] = call.grads[0].t()
    call.states[0] = copy.deepcopy(call.states[0])
    for state in flatten(call.states[0]):
        state.transpose_(0, 1)
    call.weights[2] = call.weights[0].t()[1]
    call.grads[2] = call.grads[2][:3]
    call.states[2] = copy.deepcopy(call.states[2])
    for state in flatten(call.states[2]):
        state.resize_(3)


@bad_call(ValueError, "2", "share memory")
def overlapping_views(call: SimpleNamespace) -> None:
    buffer = torch.zeros(9)
    call.weights[2] = buffer[:6]
    call.indices.append(3)
    call.weights.append(buffer[3:])
    call.grads.append(values(0, 6))
    call.states.append(copy.deepcopy(call.states[2]))


@bad_call(ValueError, "2", "share memory")
def expanded_weight(call: SimpleNamespace) -> None:
    call.weights[2] = torch.zeros(1).expand(6)


@bad_call(ValueError, "0", "share memory")
def expanded_weight_with_gaps(call: SimpleNamespace) -> None:
    # Its extent, 31 elements, is larger than the 6 elements that it seems to have.
    call.weights[0] = torch.zeros(2, 30)[:, :1].expand(2, 3)


@bad_call(ValueError, "0", "share memory")
def weight_that_overlaps_itself(call: SimpleNamespace) -> None:
    # Elements 0 5 10 and 5 10 15.
    call.weights[0] = torch.zeros(16).as_strided((2, 3), (5, 5))


@bad_call(ValueError, "0", "share memory")
def expanded_state(call: SimpleNamespace) -> None:
    tensors = [torch.zeros(1).expand(2, 3) for _ in flatten(call.states[0])]
    call.states[0] = tuple(tensors) if len(tensors) > 1 else tensors[0]


@bad_call(ValueError, "0", "3", "share memory")
def state_shared_by_two_parameters(call: SimpleNamespace) -> None:
    call.indices.append(3)
    call.weights.append(values(3, 2, 3))
    call.grads.append(values(4, 2, 3))
    call.states.append(call.states[0])


@bad_call(ValueError, "one", "3", "share memory")
def master_shared_by_two_parameters(call: SimpleNamespace) -> None:
    call.indices.append(3)
    call.weights.append(call.weights[1].clone())
    call.grads.append(call.grads[1])
    call.states.append((call.states[1][0], copy.deepcopy(call.states[1][1])))


@bad_call(ValueError, "0", "share memory")
def weight_as_its_own_state(call: SimpleNamespace) -> None:
    tensors = list(flatten(call.states[0]))
    call.states[0] = (call.weights[0], tensors[1]) if len(tensors) > 1 else call.weights[0]


@bad_call(ValueError, "2", "None", "create_state_multi_precision")
def no_state(call: SimpleNamespace) -> None:
    call.states[2] = None


@bad_call(ValueError, "2", "create_state_multi_precision")
def too_many_states(call: SimpleNamespace) -> None:
    call.states[2] = (torch.zeros(6), torch.zeros(6), torch.zeros(6))


@bad_call(ValueError, "2", "create_state_multi_precision")
def nested_state(call: SimpleNamespace) -> None:
    call.states[2] = ((call.states[2],),)


@bad_call(ValueError, "2", "'zeros'")
def state_of_a_string(call: SimpleNamespace) -> None:
    call.states[2] = "zeros"


@bad_call((TypeError, ValueError), "2", "create_state_multi_precision")
def state_from_numpy(call: SimpleNamespace) -> None:
    arrays = [np.zeros(6, dtype=np.float32) for _ in flatten(call.states[2])]
    call.states[2] = tuple(arrays) if len(arrays) > 1 else arrays[0]


@bad_call(ValueError, "2", "(2, 3)", "(6,)", "create_state_multi_precision")
def state_of_another_parameter(call: SimpleNamespace) -> None:
    call.states[0], call.states[2] = call.states[2], call.states[0]
    call.states[0] = copy.deepcopy(call.states[2])


@bad_call(ValueError, "0", "(3, 2)", "(2, 3)", "create_state_multi_precision")
def transposed_state(call: SimpleNamespace) -> None:
    tensors = [torch.zeros(3, 2) for _ in flatten(call.states[0])]
    call.states[0] = tuple(tensors) if len(tensors) > 1 else tensors[0]


@bad_call(ValueError, "2", "meta")
def state_on_another_device(call: SimpleNamespace) -> None:
    tensors = [torch.zeros(6, device="meta") for _ in flatten(call.states[2])]
    call.states[2] = tuple(tensors) if len(tensors) > 1 else tensors[0]


@bad_call((TypeError, ValueError), "2", "int64")
def state_of_integers(call: SimpleNamespace) -> None:
    tensors = [torch.zeros(6, dtype=torch.int64) for _ in flatten(call.states[2])]
    call.states[2] = tuple(tensors) if len(tensors) > 1 else tensors[0]


@bad_call((TypeError, ValueError), "one", "master")
def state_without_master(call: SimpleNamespace) -> None:
    # What create_state gives, or a checkpoint of a run without multi_precision.
    call.states[1] = call.states[1][1]


@bad_call((TypeError, ValueError), "one", "float16")
def master_of_low_precision(call: SimpleNamespace) -> None:
    call.states[1] = (call.states[1][0].half(), call.states[1][1])


@bad_call((TypeError, ValueError), "one")
def master_behind_the_state(call: SimpleNamespace) -> None:
    master, inner = call.states[1]
    # Nothing would show that two bare tensors are exchanged.
    call.states[1] = (inner if isinstance(inner, tuple) else None, master)


@bad_call(ValueError, "2", "create_state_multi_precision")
def master_where_none_is_kept(call: SimpleNamespace) -> None:
    call.states[2] = (torch.zeros(6), call.states[2])


@bad_call(TypeError, "{}")
def index_that_is_not_hashable(call: SimpleNamespace) -> None:
    call.indices[2] = {}


@THREE
@pytest.mark.parametrize(("spoil", "error", "parts"), BAD_CALLS)
def test_bad_call(name: str, fused: bool, spoil: BadCall, error: Any, parts: tuple[str, ...]) -> None:
    run = run_of(name, fused)
    run.good_step()
    before, call = run.snapshot(), run.call()
    spoil(call)
    with pytest.raises(error) as info:
        run.opt.update_multi_precision(call.indices, call.weights, call.grads, call.states)
    run.assert_unchanged_since(before)
    assert_helpful(info, *parts)
    assert_continues(run, run_of(name, fused))


@BOTH_PATHS
def test_update_refuses_what_update_multi_precision_refuses(fused: bool) -> None:
    run = run_of("adam", fused)
    run.good_step()
    before = run.snapshot()
    weight, grad, state = run.weights[0], values(0, 2, 3), run.states[0]
    for error, arguments in (
        (ValueError, ([0, 1], [weight], [grad], [state])),
        (ValueError, (0, weight, values(0, 6), state)),
        (TypeError, (0, np.zeros((2, 3)), grad, state)),
        (TypeError, (0, weight.long(), grad, state)),
        (ValueError, (0, weight, grad, state[0])),
    ):
        with pytest.raises(error):
            run.opt.update(*arguments)
        run.assert_unchanged_since(before)
    assert_continues(run, run_of("adam", fused))


@BOTH_PATHS
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "super"])
@pytest.mark.parametrize(
    ("error", "weight", "grad"),
    [
        (ValueError, torch.zeros(3), torch.ones(40)),
        (ValueError, torch.zeros(3), torch.ones(1)),
        (ValueError, torch.zeros(2, 3), torch.ones(3)),
        (TypeError, torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        (TypeError, torch.zeros(3), torch.ones(3, dtype=torch.int64)),
        (TypeError, torch.zeros(3), np.ones(3, dtype=np.float32)),
    ],
    ids=["longer", "shorter", "broadcast", "integer weight", "integer gradient", "numpy"],
)
def test_steps_called_past_update(fused: bool, direct: bool, error: Any, weight: Any, grad: Any) -> None:
    """`step` and `fused_step` are public, and what an override hands to super() is its own making."""

    class Preprocessed(tritopt.SGD):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            super().step(indices, weights, [grad], states)

        def fused_step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            super().fused_step(indices, weights, [grad], states)

    opt = tritopt.SGD() if direct else Preprocessed(use_fused_step=fused)
    # A weight in the middle of other memory, which a gradient of more elements than it has must not reach.
    buffer = torch.zeros(100, dtype=weight.dtype)
    weight = buffer[30 : 30 + weight.numel()].view(weight.shape)
    given = grad if direct else torch.ones(weight.shape)
    update = opt.update if not direct else opt.fused_step if fused else opt.step
    with pytest.raises(error, match="parameter 0"):
        update([0], [weight], [given], [None])
    assert not buffer.any()
    assert (opt.num_update, opt._index_update_count) == (0, {})


@BOTH_PATHS
def test_views_that_overlap_where_earlier_ones_did_not(fused: bool) -> None:
    """The same indices and the same addresses as in a good call, but longer views."""
    buffer, opt = torch.zeros(12), tritopt.SGD(learning_rate=1.0, use_fused_step=fused)
    opt.update([0, 1], [buffer[:4], buffer[4:8]], [torch.ones(4)] * 2, [None, None])
    before = buffer.clone()
    with pytest.raises(ValueError, match="share memory"):
        opt.update([0, 1], [buffer[:8], buffer[4:12]], [torch.ones(8)] * 2, [None, None])
    with pytest.raises(ValueError, match="share memory"):
        opt.update([0, 1], [buffer[:8:2], buffer[4:]], [torch.ones(4), torch.ones(8)], [None, None])
    assert torch.equal(buffer, before)
    assert opt.num_update == 1


@EVERY
@BOTH_PATHS
def test_interleaved_views_are_no_aliases(name: str, fused: bool) -> None:
    buffer, matrix = values(0, 10), values(1, 4, 6)
    views = [buffer[::2], buffer[1::2], matrix[:, :2], matrix[:, 2:], matrix[:0]]
    copies = [view.clone() for view in views]
    run, other = (tritopt.create(name, **CONFIGS[name], use_fused_step=fused) for _ in range(2))
    states, other_states = ([opt.create_state(i, w) for i, w in enumerate(views)] for opt in (run, other))
    for seed in range(2):
        grads = [values(seed + 2, *view.shape) for view in views]
        run.update(list(range(5)), views, grads, states)
        other.update(list(range(5)), copies, grads, other_states)
    # Elements of a norm may be added in another order.
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if name == "lamb" else {"rtol": 0, "atol": 0}
    for view, expected in zip(views, copies, strict=True):
        torch.testing.assert_close(view, expected, **tolerance)


@pytest.mark.parametrize("gradients", ["nan", "inf"])
@EVERY
def test_gradients_that_are_not_finite_are_no_error(name: str, gradients: str) -> None:
    results = []
    for fused in (True, False):
        opt = tritopt.create(name, **CONFIGS[name], use_fused_step=fused)
        weight, grad = values(0, 5), values(1, 5)
        grad[1] = float(gradients)
        grad[3] = -float(gradients)
        opt.update(0, weight, grad, opt.create_state(0, weight))
        results.append(weight)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    assert not results[0][1].isfinite()
    if name != "lamb":
        assert results[0][[0, 2, 4]].isfinite().all()


@BOTH_PATHS
@pytest.mark.parametrize("name", ["sgd", "nag", "adam", "adamw", "lamb"])
def test_clip_bounds_infinity_and_keeps_nan(name: str, fused: bool) -> None:
    opt, other = (tritopt.create(name, **CONFIGS[name], clip_gradient=0.5, use_fused_step=fused) for _ in range(2))
    weight, expected = values(0, 4), values(0, 4)
    opt.update(0, weight, torch.tensor([INF, -INF, 0.25, -3.0]), opt.create_state(0, weight))
    other.update(0, expected, torch.tensor([0.5, -0.5, 0.25, -0.5]), other.create_state(0, expected))
    assert torch.equal(weight, expected)
    opt.update(0, weight, torch.full((4,), NAN), opt.create_state(0, weight))
    assert weight.isnan().all()


# What the rate and the gradient's factor turn out to be at the update.


class Broken(LRScheduler):
    """0.1, and from the second update on something else."""

    def __init__(self, later: Any) -> None:
        super().__init__(0.1)
        self.later = later

    def __call__(self, num_update: int) -> Any:
        return 0.1 if num_update < 2 else self.later


@THREE
@pytest.mark.parametrize("later", [NAN, INF, -0.5, None, "0.1"], ids=str)
def test_scheduler_that_returns_no_rate(name: str, fused: bool, later: Any) -> None:
    run = run_of(name, fused, learning_rate=None, lr_scheduler=Broken(later))
    run.good_step()
    before, call = run.snapshot(), run.call()
    with pytest.raises(ValueError if isinstance(later, float) else TypeError) as info:
        run.opt.update_multi_precision(call.indices, call.weights, call.grads, call.states)
    run.assert_unchanged_since(before)
    for part in ("learning rate", repr(later), "Broken"):
        assert part in str(info.value)
    run.opt.lr_scheduler.later = 0.1  # type: ignore[union-attr]
    assert_continues(run, run_of(name, fused, learning_rate=0.1))


@BOTH_PATHS
@pytest.mark.parametrize("kind", ["lr_mult", "wd_mult"])
@pytest.mark.parametrize("via", ["index", "name", "param_dict"])
def test_multiplier_that_is_nan(fused: bool, kind: str, via: str) -> None:
    run = run_of("adam", fused, param_idx2name={2: "bias"})
    run.good_step()
    before, call = run.snapshot(), run.call()

    def update_with_nan() -> None:
        if via == "param_dict":
            run.opt.param_dict = {2: SimpleNamespace(**{"lr_mult": 1.0, "wd_mult": 1.0, kind: NAN})}
        else:
            getattr(run.opt, f"set_{kind}")({2 if via == "index" else "bias": NAN})
        run.opt.update_multi_precision(call.indices, call.weights, call.grads, call.states)

    with pytest.raises(ValueError, match="nan"):
        update_with_nan()
    run.assert_unchanged_since(before)
    run.opt.param_dict = {}
    run.opt.set_lr_mult({})
    run.opt.set_wd_mult({})
    assert_continues(run, run_of("adam", fused))


RESCALES = pytest.mark.parametrize(
    ("rescale", "error", "part"),
    [
        (torch.tensor([1.0, 2.0], device="cpu"), ValueError, "(2,)"),
        (torch.zeros(0, device="cpu"), ValueError, "(0,)"),
        ("2.0", TypeError, "'2.0'"),
        (None, TypeError, "None"),
        ([1.0], TypeError, "[1.0]"),
        (1j, TypeError, "1j"),
    ],
    ids=str,
)


@BOTH_PATHS
@RESCALES
def test_rescale_that_is_no_number_assigned(fused: bool, rescale: Any, error: Any, part: str) -> None:
    run = run_of("adam", fused)
    run.good_step()
    before, call = run.snapshot(), run.call()

    def update_with_rescale() -> None:
        run.opt.rescale_grad = rescale
        run.opt.update_multi_precision(call.indices, call.weights, call.grads, call.states)

    with pytest.raises(error) as info:
        update_with_rescale()
    run.assert_unchanged_since(before)
    assert_helpful(info, "rescale_grad", part)
    run.opt.rescale_grad = 1.0
    assert_continues(run, run_of("adam", fused))


@RESCALES
def test_rescale_that_is_no_number_constructed(rescale: Any, error: Any, part: str) -> None:
    with pytest.raises(error) as info:
        tritopt.Adam(rescale_grad=rescale)
    assert_helpful(info, "rescale_grad", part)


@BOTH_PATHS
@pytest.mark.parametrize("attribute", ["lr", "wd"])
def test_nan_assigned_past_the_check(attribute: str, fused: bool) -> None:
    run = run_of("adam", fused)
    run.good_step()
    before, call = run.snapshot(), run.call()
    setattr(run.opt, attribute, NAN)
    with pytest.raises(ValueError, match="nan"):
        run.opt.update_multi_precision(call.indices, call.weights, call.grads, call.states)
    run.assert_unchanged_since(before)


@pytest.mark.parametrize(
    ("value", "error"), [(-0.5, ValueError), (NAN, ValueError), (INF, ValueError), ("0.5", TypeError)]
)
def test_set_learning_rate(value: Any, error: Any) -> None:
    opt = tritopt.SGD(learning_rate=0.25)
    with pytest.raises(error) as info:
        opt.set_learning_rate(value)
    assert_helpful(info, "learning_rate", repr(value))
    assert opt.learning_rate == 0.25


# Constructors.

BadValues = list[tuple[Any, Any]]
BETAS: BadValues = [(value, ValueError) for value in (-0.1, 1, 1.0, 1.5, NAN, INF)] + [
    (value, TypeError) for value in ("0.9", None)
]
NONNEGATIVE: BadValues = [(value, ValueError) for value in (-0.1, NAN, INF)] + [
    (value, TypeError) for value in ("0.9", [0.9])
]
BOUNDS: BadValues = [(NAN, ValueError), ("0.9", TypeError), ([1.0], TypeError)]
EITHER = (TypeError, ValueError)
# Of the base class, checked there.
BASE_ARGUMENTS: dict[str, BadValues] = {
    "begin_num_update": [(-1, ValueError), (1.5, EITHER), ("1", TypeError), (NAN, EITHER), (None, TypeError)],
    "aggregate_num": [(-1, ValueError), (NAN, ValueError), ("4", TypeError)],
    "param_idx2name": [(["weight"], TypeError), ("weight", TypeError)],
    "param_dict": [([1], TypeError)],
    "lr_scheduler": [(0.1, TypeError), ("factor", TypeError)],
    # A configuration file's "False" is true.
    "multi_precision": [("False", TypeError)],
    "use_fused_step": [("False", TypeError)],
}
COMMON: dict[str, BadValues] = {
    "learning_rate": NONNEGATIVE,
    "wd": [(NAN, ValueError), (INF, ValueError), ("0.1", TypeError), (None, TypeError)],
    "clip_gradient": BOUNDS,
}
MOMENTS: dict[str, BadValues] = {"beta1": BETAS, "beta2": BETAS, "epsilon": NONNEGATIVE}
BAD_ARGUMENTS: dict[str, dict[str, BadValues]] = {
    "sgd": {**BASE_ARGUMENTS, **COMMON, "momentum": NONNEGATIVE},
    "nag": {**COMMON, "momentum": NONNEGATIVE},
    "adam": {**COMMON, **MOMENTS},
    "adamw": {**COMMON, **MOMENTS},
    "lamb": {**COMMON, **MOMENTS, "lower_bound": BOUNDS, "upper_bound": BOUNDS},
    "test": COMMON,
}


@pytest.mark.parametrize(
    ("name", "argument", "value", "error"),
    [
        pytest.param(name, argument, value, error, id=f"{name}-{argument}={value!r}")
        for name in CONFIGS
        for argument, bad in BAD_ARGUMENTS[name].items()
        for value, error in bad
    ],
)
def test_bad_hyperparameter(name: str, argument: str, value: Any, error: Any) -> None:
    with pytest.raises(error) as info:
        tritopt.create(name, **{argument: value})
    assert_helpful(info, argument, repr(value))


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb"])
def test_betas_as_torch_has_them(name: str) -> None:
    with pytest.raises(TypeError, match=r"'betas'.*did you mean.*beta"):
        tritopt.create(name, betas=(0.9, 0.999))
    with pytest.raises(TypeError, match=r"beta1=\(0\.9, 0\.999\)"):
        tritopt.create(name, beta1=(0.9, 0.999))


@pytest.mark.parametrize("value", [0, 0.0, np.float32(0.5), np.int64(0)], ids=repr)
def test_what_looks_odd_and_is_a_number(value: Any) -> None:
    opt = tritopt.LAMB(learning_rate=value, wd=value, beta1=value, beta2=value, epsilon=value, clip_gradient=value)
    assert (opt.lr, opt.wd, opt.beta1) == (value, value, value)
    assert tritopt.SGD(momentum=value).momentum == value


# The Updater: one call is one call, however many chunks it takes.


def w() -> torch.Tensor:
    return values(0, 4)


def g() -> torch.Tensor:
    return values(1, 4)


# Made anew for each test, because a call that should not have written might have.
BAD_UPDATER_CALLS: dict[str, tuple[Any, Callable[[], tuple[Any, Any, Any]]]] = {
    "gradient of another shape": (ValueError, lambda: ([0, 1], [g(), values(1, 5)], [w(), w()])),
    "gradient on another device": (ValueError, lambda: ([0, 1], [g(), g().to("meta")], [w(), w()])),
    "integer weight": (TypeError, lambda: ([0, 1], [g(), g()], [w(), torch.ones(4, dtype=torch.int64)])),
    "numpy weight": (TypeError, lambda: ([0, 1], [g(), g()], [w(), np.zeros(4)])),
    "numpy weight first": (TypeError, lambda: ([0, 1], [g(), g()], [np.zeros(4), w()])),
    "numpy weight alone": (TypeError, lambda: (0, g(), np.zeros(4))),
    "weight and gradient exchanged": (ValueError, lambda: ([0, 1], [w(), values(0, 5)], [g(), g()])),
    "one weight twice": (ValueError, lambda: ([0, 1], [g(), g()], [values(0, 4)] * 2)),
    "expanded weight": (ValueError, lambda: ([0, 1], [g(), g()], [w(), torch.zeros(1).expand(4)])),
    "fewer gradients": (ValueError, lambda: ([0, 1], [g()], [w(), w()])),
    "fewer weights": (ValueError, lambda: ([0, 1], [g(), g()], [w()])),
    "no gradients": ((TypeError, ValueError), lambda: ([0, 1], None, [w(), w()])),
    "index that is not hashable": (TypeError, lambda: ([0, {}], [g(), g()], [w(), w()])),
}


@pytest.mark.parametrize("aggregate_num", [None, 1, 2])
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("case", BAD_UPDATER_CALLS)
def test_bad_updater_call(case: str, known: bool, aggregate_num: float | None) -> None:
    error, make_arguments = BAD_UPDATER_CALLS[case]
    arguments = make_arguments()
    updater, undisturbed = (
        tritopt.get_updater(tritopt.Adam(aggregate_num=aggregate_num, use_fused_step=False)) for _ in range(2)
    )
    # Another parameter, and if `known` those of the bad call, have been seen.
    seen = [7, 0, 1] if known else [7]
    updater(list(seen), [values(9, 4) for _ in seen], [values(8, 4) for _ in seen])
    undisturbed(list(seen), [values(9, 4) for _ in seen], [values(8, 4) for _ in seen])
    opt = updater.optimizer
    given = arguments[2] if isinstance(arguments[2], list) else []
    tensors = [
        *(weight for weight in given if isinstance(weight, torch.Tensor)),
        *flatten(list(updater.states.values())),
    ]
    before = [t.clone() for t in tensors]
    with pytest.raises(error):
        updater(*arguments)
    assert_same(tensors, before)
    assert set(updater.states) == set(updater.states_synced) == set(seen)
    assert opt._index_update_count == dict.fromkeys(seen, 1)
    assert opt.num_update == 1

    weights, expected = ([values(0, 4), values(1, 4)] for _ in range(2))
    updater([0, 1], [values(2, 4), values(3, 4)], weights)
    undisturbed([0, 1], [values(2, 4), values(3, 4)], expected)
    assert_same(weights, expected)
    assert opt._index_update_count == undisturbed.optimizer._index_update_count


def spoil_multiplier(updater: tritopt.Updater) -> None:
    updater.optimizer.set_lr_mult({1: NAN})


def spoil_state(updater: tritopt.Updater) -> None:
    # As in a checkpoint of a run without multi_precision.
    updater.states[1] = updater.states[1][1]


@pytest.mark.parametrize("aggregate_num", [None, 1])
@pytest.mark.parametrize("spoil", [spoil_multiplier, spoil_state])
def test_what_is_wrong_with_a_later_chunk(
    spoil: Callable[[tritopt.Updater], None], aggregate_num: float | None
) -> None:
    updater = tritopt.get_updater(tritopt.Adam(aggregate_num=aggregate_num, multi_precision=True, use_fused_step=False))
    weights, grads = [w(), w().half()], [g(), g().half()]
    updater([0, 1], grads, weights)
    spoil(updater)
    tensors = [*weights, *flatten(list(updater.states.values()))]
    before, counts = [t.clone() for t in tensors], dict(updater.optimizer._index_update_count)
    with pytest.raises(ValueError, match=r"nan|create_state_multi_precision"):
        updater([0, 1], grads, weights)
    assert_same(tensors, before)
    assert updater.optimizer._index_update_count == counts


def test_create_state_that_fails_leaves_no_state_behind() -> None:
    class Picky(tritopt.Adam):
        def create_state(self, index: Any, weight: torch.Tensor) -> Any:
            if index == 1:
                raise ValueError("parameter 1 must be a matrix")
            return super().create_state(index, weight)

    updater = tritopt.get_updater(Picky())
    with pytest.raises(ValueError, match="parameter 1"):
        updater([0, 1], [g(), g()], [w(), w()])
    assert (updater.states, updater.states_synced) == ({}, {})


# Optimizers that bring their own step are protected from the same mistakes.


class Ported(Optimizer):
    """Gradient descent in MXNet's style."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad in zip(indices, weights, grads, strict=False):
            self._update_count(index)
            weight -= self._get_lr(index) * grad


@pytest.mark.parametrize("multi_precision", [False, True])
@pytest.mark.parametrize(
    ("error", "weight", "grad"),
    [
        (TypeError, np.zeros(3, dtype=np.float32), torch.ones(3)),
        (TypeError, torch.zeros(3), np.ones(3, dtype=np.float32)),
        (TypeError, [0.0, 0.0, 0.0], torch.ones(3)),
        (TypeError, torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        (ValueError, torch.zeros(3), torch.ones(1)),
        (ValueError, torch.zeros(3), torch.ones(3, device="meta")),
    ],
    ids=["numpy weight", "numpy gradient", "list", "integers", "shape", "device"],
)
def test_ported_optimizer(error: Any, weight: Any, grad: Any, multi_precision: bool) -> None:
    opt, first = Ported(multi_precision=multi_precision), torch.zeros(3)
    for update in (opt.update, opt.update_multi_precision):
        with pytest.raises(error, match="parameter 1"):
            update([0, 1], [first, weight], [torch.ones(3), grad], [None, None])
        with pytest.raises(ValueError, match="2 indices"):
            update([0, 1], [first], [torch.ones(3)], [None])
        assert first.tolist() == [0.0] * 3
        assert (opt.num_update, opt._index_update_count) == (0, {})


# In a process of its own, because the interpreter is switched on or off at import, or because it would crash.


def run_script(script: str, interpreter: bool) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    if interpreter:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fused_on_a_cpu_tensor_without_the_interpreter() -> None:
    pytest.importorskip("triton")
    output = run_script(
        """
        import torch, tritopt
        for name in ("sgd", "nag", "adam", "adamw", "lamb", "test"):
            opt = tritopt.create(name, learning_rate=0.5, use_fused_step=True)
            weight, grad = torch.ones(3), torch.ones(3)
            state = opt.create_state_multi_precision("w", weight)
            try:
                opt.update_multi_precision("w", weight, grad, state)
            except ValueError as error:
                print(error)
            assert weight.tolist() == [1, 1, 1]
            assert (opt.num_update, opt._index_update_count, opt._all_index_update_counts) == (0, {}, {0: {}})

            # The ways out that need no GPU, and the default.
            results = []
            for fused in (False, None):
                other = tritopt.create(name, learning_rate=0.5, use_fused_step=fused)
                results.append(torch.ones(3))
                other.update("w", results[-1], grad, other.create_state("w", weight))
            opt.use_fused_step = False
            opt.update_multi_precision("w", weight, grad, state)
            assert torch.equal(weight, results[0]) and torch.equal(weight, results[1])
            assert weight[0] < 1
        """,
        interpreter=False,
    )
    lines = output.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert all(part in line for part in ("'w'", "cpu", "TRITON_INTERPRET", "use_fused_step=False"))


def test_tensors_without_memory_do_not_crash_the_interpreter() -> None:
    pytest.importorskip("triton")
    output = run_script(
        """
        import torch, tritopt
        for fused in (True, None, False):
            opt = tritopt.SGD(use_fused_step=fused)
            weights = [torch.ones(3, device="meta") for _ in range(2)]
            try:
                opt.update(["a", "b"], weights, weights, [None, None])
                print("done")
            except (TypeError, ValueError) as error:
                print(error)
        """,
        interpreter=True,
    )
    wanted, default, step = output.splitlines()
    assert "meta" in wanted
    # There is nothing to compute and nothing that could share memory, but it may be refused.
    assert default == "done" or "meta" in default
    assert step == "done" or "meta" in step


def test_weights_that_share_memory_are_found_again_in_another_dtype() -> None:
    """Two that lie side by side in fp32 overlap in fp64, at the same addresses and with the same shapes."""
    memory = torch.zeros(32, dtype=torch.uint8)

    def weights(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [memory[start : start + size].view(dtype) for start in (0, 8)]

    updater = tritopt.get_updater(tritopt.create("sgd", learning_rate=1.0))
    updater([0, 1], [torch.ones(2)] * 2, weights(8, torch.float32))
    memory.zero_()
    with pytest.raises(ValueError, match="memory"):
        updater([0, 1], [torch.ones(2, dtype=torch.float64)] * 2, weights(16, torch.float64))
    assert not memory.any()
