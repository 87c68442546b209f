"""`state_dtype=` of tritopt.Optimizer: lists, Updater, conversion and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import with_each
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.states import STATE_FORMATS

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((3, 64), (130,), (5, 7), (), (0,), (4, 1))
NAMES = [
    name
    for name in tritopt.names()
    if any(f is not PLAIN for f in tritopt.create(name, state_dtype="bf16").state_formats())
]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=64, chunk_size=128, num_warps=1))


def random(seed: int, dtype: torch.dtype = BF16, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def flatten(state: Any) -> list[torch.Tensor]:
    if state is None or isinstance(state, torch.Tensor):
        return [] if state is None else [state]
    return [tensor for part in state for tensor in flatten(part)]


class Run:
    """Weights and states of an optimizer that was trained."""

    def __init__(self, opt: tritopt.Optimizer, dtype: torch.dtype = BF16) -> None:
        self.shapes = [shape for shape in SHAPES if len(shape) == 2] if isinstance(opt, tritopt.Muon) else SHAPES
        self.opt, self.weights, self.dtype = opt, random(0, dtype, self.shapes), dtype
        self.states = [opt.create_state_multi_precision(i, weight) for i, weight in enumerate(self.weights)]

    def step(self, seed: int) -> None:
        grads = random(seed, self.dtype, self.shapes)
        self.opt.update_multi_precision(list(range(len(grads))), self.weights, grads, self.states)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.weights, *flatten(self.states)]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "state_dtype"), with_each(NAMES, [*STATE_FORMATS], tritopt.create))
def test_kernel_is_the_reference(name: str, state_dtype: str) -> None:
    """Blocks of vectors and odd rows have an end that is not whole."""
    options: dict[str, Any] = {"learning_rate": 0.01, "multi_precision": True, "master": "split8"}
    if name == "rmsprop":
        options["momentum"] = 0.9
    runs = [
        Run(tritopt.create(name, state_dtype=state_dtype, use_fused_step=fused, **options)) for fused in (True, False)
    ]
    for seed in (1, 2):
        for run in runs:
            run.step(seed)
    if any(phase.sums_elements for phase in runs[0].opt.phases):
        for a, b in zip(runs[0].weights, runs[1].weights, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=1e-4)
    else:
        assert_same(runs[0].tensors(), runs[1].tensors())


@pytest.mark.parametrize(
    ("state_dtype", "dtypes"),
    [
        (None, [torch.int16, F32, F32]),
        ("fp32", [torch.int16, F32, F32]),
        ("bf16", [torch.int16, BF16, BF16]),
        (torch.float16, [torch.int16, torch.float16, BF16, torch.float16, BF16]),
        ("int8", [torch.int16, torch.int8, BF16, torch.uint8, BF16]),
        ({"mean": "fp8"}, [torch.int16, torch.uint8, BF16, F32]),
    ],
)
def test_what_a_state_is(state_dtype: Any, dtypes: list[torch.dtype]) -> None:
    opt = tritopt.create("lamb", multi_precision=True, master="split16", state_dtype=state_dtype)
    state = opt.create_state_multi_precision(0, torch.ones(3, 64, dtype=BF16))
    assert [tensor.dtype for tensor in flatten(state)] == dtypes


@pytest.mark.parametrize("new", [*STATE_FORMATS, None])
@pytest.mark.parametrize("old", [*STATE_FORMATS, None])
@pytest.mark.parametrize("name", ["adam", "lion"])
def test_an_updater_takes_states_of_another_format(name: str, old: str | None, new: str | None) -> None:
    """Through bytes: what is as it should be stays to the bit, anything else is converted."""

    def updater(state_dtype: str | None, fused: bool | None) -> tritopt.Updater:
        opt = tritopt.create(
            name, learning_rate=0.01, multi_precision=True, state_dtype=state_dtype, use_fused_step=fused
        )
        return tritopt.get_updater(opt)

    weights, first = random(0), updater(old, fused=False)
    indices = list(range(len(SHAPES)))
    for seed in (1, 2):
        first(indices, random(seed), weights)
    second = updater(new, fused=None)
    second.set_states(first.get_states())
    second(indices, random(3), weights)
    dtypes = [[tensor.dtype for tensor in flatten(second.states[i])] for i in indices]
    fresh = second.optimizer.create_state_multi_precision(0, weights[0])
    assert dtypes == [[tensor.dtype for tensor in flatten(fresh)]] * len(SHAPES)


@pytest.mark.parametrize("state_dtype", ["int8", "bf16"])
def test_training_continues_from_bytes(state_dtype: str) -> None:
    def trained(resumed: bool) -> list[torch.Tensor]:
        def updater() -> tritopt.Updater:
            opt = tritopt.create("adam", learning_rate=0.01, multi_precision=True, state_dtype=state_dtype)
            return tritopt.get_updater(opt)

        weights, run = random(0), updater()
        indices = list(range(len(SHAPES)))
        for seed in (1, 2, 3, 4):
            if seed == 3 and resumed:
                saved, run = run.get_states(dump_optimizer=True), updater()
                run.set_states(saved)
            run(indices, random(seed), weights)
        return [*weights, *flatten([run.states[i] for i in indices])]

    assert_same(trained(True), trained(False))


def test_plain_states_are_taken_until_they_are_converted() -> None:
    opt = tritopt.create("adam", state_dtype="int8", use_fused_step=False)
    weight = torch.ones(3, 64)
    plain = opt.create_state(0, weight)
    opt.update(0, weight, torch.ones_like(weight), plain)
    assert [tensor.dtype for tensor in flatten(plain)] == [F32, F32]
    converted = opt.convert_state(0, weight, plain)
    assert [tensor.dtype for tensor in flatten(converted)] == [torch.int8, BF16, torch.uint8, BF16]
    assert opt.convert_state(0, weight, converted) is converted
    back = tritopt.create("adam").convert_state(0, weight, converted)
    for a, b in zip(flatten(back), flatten(plain), strict=True):
        assert ((a - b).abs() <= 2.0**-4 * b.abs()).all()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="state_dtype='int3' must be one of 'fp32', 'bf16', 'fp16', 'int8', 'fp8'"):
        tritopt.create("adam", state_dtype="int3")
    with pytest.raises(ValueError, match=r"state_dtype=torch\.int16 must be one of"):
        tritopt.create("adam", state_dtype=torch.int16)
    with pytest.raises(ValueError, match=r"no state 'men'; did you mean 'mean'\? known: 'mean', 'var'"):
        tritopt.create("adam", state_dtype={"men": "int8"}).create_state_multi_precision(0, torch.ones(3))
    with pytest.raises(ValueError, match="'z' must not be rounded to int8; take 'fp32'"):
        tritopt.create("ftrl", state_dtype={"z": "int8"}).create_state_multi_precision(0, torch.ones(3))
    with pytest.raises(ValueError, match="lazy_update=True draws no random bits"):
        tritopt.create("adam", state_dtype="bf16", lazy_update=True)

    class Own(tritopt.Optimizer):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            """Do nothing."""

    with pytest.raises(ValueError, match="state_dtype='int8' is not for Own, which overrides step"):
        Own(state_dtype="int8")
    opt = tritopt.create("adam", state_dtype="int8", use_fused_step=False)
    weight, grad = torch.ones(3, 64), torch.ones(3, 64)
    (codes, scales), var = opt.create_state_multi_precision(0, weight)
    for state, message in (
        (((codes, scales[:2]), var), "state of shape"),
        (((codes.float(), scales), var), r"not stored as state_dtype says"),
        (((codes[:, :5], scales), var), "state of shape"),
        (((codes.t().contiguous().t(), scales), var), "lay otherwise in memory"),
        ((codes, scales), "not stored as"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.update_multi_precision(0, weight, grad, state)
    assert torch.equal(weight, torch.ones(3, 64))
    with pytest.raises(ValueError, match="a float64 weight keeps float64 states"):
        opt.update_multi_precision(0, weight.double(), grad, ((codes, scales), var))
