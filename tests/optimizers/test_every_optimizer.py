"""Properties of every registered optimizer and variant; registering one is all it takes to be tested here.

Numbers are the business of test_check.py (fused against reference against truth) and of the golden trajectories.
"""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch

import tritopt
from tritopt.engine.driver import Apply
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config
from tritopt.kernels.drivers.multi_tensor_apply import multi_tensor_apply
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.registry import registered

CASES = [
    pytest.param(name, variant, id=f"{name}-{i}")
    for name in tritopt.names()
    if registered()[name].__module__.startswith("tritopt.")
    for i, variant in enumerate(registered()[name].variants)
]
OPTIONS = {"wd": 0.1, "clip_gradient": 0.5, "rescale_grad": 0.25, "learning_rate": 0.05}
SHAPES = ((), (0,), (7,), (5, 6), (2, 5, 2, 3))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=16, chunk_size=48, num_warps=1))


class Model:
    """Parameters, gradients and states for one optimizer, the same for the same seed."""

    def __init__(self, name: str, variant: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.opt = tritopt.create(name, **{**accepted_options(name), **variant, **options})
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        shapes = [s for s in SHAPES if accepts(self.opt, s)]
        self.weights = [self.random(shape).to(dtype) for shape in shapes]
        self.indices = list(range(len(shapes)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about fp16 states, wanted here
            self.states = [self.opt.create_state_multi_precision(i, w) for i, w in enumerate(self.weights)]

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def grads(self) -> list[torch.Tensor]:
        return [self.random(tuple(w.shape)).to(w.dtype) for w in self.weights]

    def step(self, grads: list[Any] | None = None) -> None:
        grads = self.grads() if grads is None else grads
        self.opt.update_multi_precision(self.indices, self.weights, grads, self.states)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.weights, *flatten(self.states)]

    def snapshot(self) -> list[torch.Tensor]:
        return [t.clone() for t in self.tensors()]


def accepted_options(name: str) -> dict[str, float]:
    return {key: value for key, value in OPTIONS.items() if key != "wd" or registered()[name].decays}


def accepts(opt: Optimizer, shape: tuple[int, ...]) -> bool:
    try:
        opt.create_state(0, torch.zeros(shape))
    except ValueError:
        return False
    return True


def flatten(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for item in state for t in flatten(item)] if isinstance(state, list | tuple) else []


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"name", "variant"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("name", "variant"), CASES)


def test_empty_list(name: str, variant: dict[str, Any]) -> None:
    opt = tritopt.create(name, **variant)
    opt.update_multi_precision([], [], [], [])
    assert opt.num_update == opt.begin_num_update


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_moves_every_weight_and_no_gradient(name: str, variant: dict[str, Any], use_fused_step: bool) -> None:
    model = Model(name, variant, use_fused_step=use_fused_step)
    before, grads = model.snapshot(), model.grads()
    kept = [g.clone() for g in grads]
    model.step(grads)
    assert_same(grads, kept)
    for old, new in zip(before, model.weights, strict=False):
        assert not old.numel() or torch.any(old != new)


def test_parameter_without_gradient_is_left_alone(name: str, variant: dict[str, Any]) -> None:
    model = Model(name, variant)
    before = [model.weights[-1].clone(), *(t.clone() for t in flatten(model.states[-1]))]
    model.step([*model.grads()[:-1], None])
    assert_same([model.weights[-1], *flatten(model.states[-1])], before)
    assert model.indices[-1] not in model.opt._index_update_count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_master_follows_an_fp32_run(
    name: str, variant: dict[str, Any], dtype: torch.dtype, use_fused_step: bool
) -> None:
    low = Model(name, variant, dtype, multi_precision=True, use_fused_step=use_fused_step)
    full = Model(name, variant, use_fused_step=use_fused_step)
    for weight, state in zip(full.weights, low.states, strict=True):
        weight.copy_(state[0])
    for state, other in zip(full.states, low.states, strict=True):
        for t, u in zip(flatten(state), flatten(other[1]), strict=True):
            t.copy_(u)
    for _ in range(2):
        grads = low.grads()
        low.step(grads)
        full.step([g.float() for g in grads])
    assert_same([state[0] for state in low.states], full.weights)
    assert_same(low.weights, [w.to(dtype) for w in full.weights])


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_any_gradient_dtype(name: str, variant: dict[str, Any], use_fused_step: bool) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model, other = (Model(name, variant, use_fused_step=use_fused_step) for _ in range(2))
        grads = [g.to(dtype) for g in model.grads()]
        model.step(grads)
        other.step([g.float() for g in grads])
        assert_same(model.tensors(), other.tensors())


@pytest.mark.parametrize("rescale", [math.nan, math.inf])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_skipped_step(name: str, variant: dict[str, Any], rescale: float, use_fused_step: bool) -> None:
    model = Model(name, variant, use_fused_step=use_fused_step)
    before = model.snapshot()
    model.opt.rescale_grad = rescale
    model.step()
    assert_same(model.tensors(), before)
    assert model.opt.num_update == model.opt.begin_num_update + 1


def test_layout_of_memory_does_not_matter(name: str, variant: dict[str, Any]) -> None:
    """Transposed, channels_last, strided and unaligned weights, and gradients of another layout than the weight's."""
    contiguous, other = Model(name, variant), Model(name, variant)
    other.weights = [relaid(w, i) for i, w in enumerate(other.weights)]
    with warnings.catch_warnings():
        other.states = [other.opt.create_state_multi_precision(i, w) for i, w in enumerate(other.weights)]
    for step in range(3):
        grads = contiguous.grads()
        contiguous.step(grads)
        other.step([relaid(g, i + step) for i, g in enumerate(grads)])
    if any(phase.sums_elements for phase in contiguous.opt.phases):
        for x, y in zip(contiguous.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(x, y)  # elements are summed in another order
    else:
        assert_same(contiguous.tensors(), other.tensors())


def relaid(tensor: torch.Tensor, how: int) -> torch.Tensor:
    """The same values, elsewhere laid out in memory."""
    if how % 3 == 0:
        buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        return buffer[1:].view(tensor.shape).copy_(tensor)
    if how % 3 == 1:
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    spread = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
    return spread[..., 0].copy_(tensor)


def test_same_dtypes_share_a_launch(name: str, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, more = (Model(name, variant, use_fused_step=True) for _ in range(2))
    launches = record_launches(monkeypatch)
    model.step()
    alone = len(launches)
    assert alone == len(model.opt.phases) or not all(isinstance(phase, Apply) for phase in model.opt.phases)
    model.weights += more.weights
    model.states += more.states
    model.indices = list(range(len(model.weights)))
    model.step()
    assert len(launches) == 2 * alone


def test_second_call_compiles_nothing(name: str, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rate, count, gradients and weights are data: what is compiled in stays what it was."""
    model = Model(name, variant, use_fused_step=True)
    model.step()
    launches = record_launches(monkeypatch)
    model.step()
    first = list(launches)
    model.opt.set_learning_rate(0.003)
    model.opt.wd, model.opt.rescale_grad = 0.3 * model.opt.decays, 0.1
    model.step()
    assert launches == first + first


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(kernel, compile-time arguments, types of the others) of each launch but those of `sum_partials` from now on."""
    launches: list[tuple[Any, ...]] = []
    kernels: Any = type(multi_tensor_apply)  # compiled or interpreted ones
    run = kernels.run

    def recording(kernel: Any, *args: Any, **constants: Any) -> Any:
        name = kernel.__name__
        if name != "sum_partials":
            known = {key: value for key, value in constants.items() if key != "grid"}
            launches.append((name, known, [getattr(a, "dtype", type(a)) for a in args]))
        return run(kernel, *args, **constants)

    monkeypatch.setattr(kernels, "run", recording)
    return launches


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_states_survive_a_save(name: str, variant: dict[str, Any], use_fused_step: bool) -> None:
    model = Model(name, variant, torch.bfloat16, multi_precision=True, use_fused_step=use_fused_step)
    model.step()
    buffer = io.BytesIO()
    torch.save((model.weights, model.states), buffer)
    resumed = copy.deepcopy(model)
    buffer.seek(0)
    resumed.weights, resumed.states = torch.load(buffer, weights_only=True)
    grads = model.grads()
    model.step(grads)
    resumed.step(grads)
    assert_same(model.tensors(), resumed.tensors())


def test_order_of_tensors_does_not_matter(name: str, variant: dict[str, Any]) -> None:
    forward, backward = Model(name, variant), Model(name, variant)
    for items in (backward.indices, backward.weights, backward.states):
        items.reverse()
    for _ in range(2):
        grads = forward.grads()
        forward.step(grads)
        backward.step(grads[::-1])
    assert_same(forward.weights, backward.weights[::-1])


def test_swapped_data_is_noticed(name: str, variant: dict[str, Any]) -> None:
    model, other = Model(name, variant), Model(name, variant)
    model.step()
    other.step()
    for weight in model.weights:
        weight.data = weight.data.clone()
    model.states = copy.deepcopy(model.states)
    grads = model.grads()
    model.step(grads)
    other.step(grads)
    assert_same(model.tensors(), other.tensors())


def test_in_fp64_the_kernel_is_the_reference_bit_for_bit(name: str, variant: dict[str, Any]) -> None:
    if any(phase.sums_elements for phase in tritopt.create(name, **variant).phases):
        return  # whose kernels add in another order
    kernel, reference = (Model(name, variant, torch.float64, use_fused_step=fused) for fused in (True, False))
    for _ in range(2):
        kernel.step()
        reference.step()
    assert_same(kernel.tensors(), reference.tensors())
