"""Steps of tritopt.optim in the machine, against the reference. test_steps.py runs this file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.ptx.layouts import EVERY, MATRICES, VECTORS, Layout, is_guarded, parameters, set_gradients
from tests.support import training
from tests.support.training import one_of_each_kind, options_of
from tritopt import optim
from tritopt.engine import plan
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config
from tritopt.tools.check.compare import largest_error
from tritopt.tools.check.tolerance import TOLERANCES
from tritopt.tools.ptx.driver import Record, switch_on

BF16, FP32 = torch.bfloat16, torch.float32
BeforeStep = Callable[[Any, int], None]
# Muon's products are torch's, beside the machine: `tritopt check muon --compiled` has its launches.
CLASSES = [cls for cls in training.CLASSES if cls is not optim.Muon]
KINDS = one_of_each_kind(CLASSES)
CHOSEN = KINDS if os.environ.get("TRITOPT_TEST_OPTIMIZERS", "all") == "kinds" else CLASSES
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def layouts_for(cls: Any) -> tuple[Layout, ...]:
    """All that it takes; of Adafactor, which has kernels for every shape of blocks, some."""
    if cls is optim.GroupAdaGrad:
        return tuple(layout for layout in MATRICES if len(layout.shape) == 2)
    return (*VECTORS[:7], *MATRICES[4:6]) if cls is optim.Adafactor else EVERY


def sums(cls: Any) -> bool:
    """Whether results depend on the order of a sum."""
    return any(phase.sums_elements for phase in cls.rule().phases)


def tensors(opt: Any, params: Sequence[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Weights and states, by name."""
    by_name = {}
    for i, param in enumerate(params):
        by_name[f"weight {i}"] = param.detach()
        state = opt.state.get(param, {})
        by_name |= {f"{name} {i}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return by_name


def assert_bits(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Any NaN is like any other."""
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype), name
    a, b = (x.contiguous().view(_INTEGERS[x.element_size()]) for x in (ours, expected))
    differs = a != b
    if ours.is_floating_point():
        differs &= ~(ours.isnan() & expected.isnan())
    assert not bool(differs.any()), f"{name}: {int(differs.sum())} of {differs.numel()} elements have other bits"


def assert_near(ours: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, name: str) -> None:
    """Assert that tensors lie within what sums in another order are allowed."""
    gap = torch.zeros_like(expected, dtype=torch.float64)
    error, is_within = largest_error(ours, expected, before.double(), gap, TOLERANCES["reordered"], FP32)
    assert is_within, f"{name}: {error:.3g} ulp apart"


def shuffle(record: Record, step: int, warps: bool = True) -> None:
    """Put programs and warps in another order and approximations an ulp off, none of which may change bits."""
    random = np.random.default_rng(step)
    record.order = random.permutation if step else None
    record.warp_seed = step if step == 1 and warps else None
    record.inexact = True


def assert_follows_reference(
    record: Record, cls: Any, dtype: torch.dtype = FP32, grad_dtype: torch.dtype | None = None,
    layouts: Sequence[Layout] | None = None, before_step: BeforeStep | None = None, steps: int = 2,
    is_exact: bool | None = None, **options: Any,
) -> list[Any]:  # fmt: skip
    """Run steps on two param_groups, from the same tensors each time: the first, and a replayed one. Both optimizers.

    Bit for bit unless sums have another order; that of programs and warps changes from step to step.
    """
    layouts = layouts_for(cls) if layouts is None else layouts
    is_exact = not sums(cls) if is_exact is None else is_exact
    chosen = options_of(cls, weight_decay=0.05) | options
    runs = []
    for path in (None, False):
        params = parameters(layouts, dtype)
        groups = [{"params": params[i::2], "lr": chosen["lr"] * (1 + i)} for i in range(2)]
        runs.append((cls(groups, fused=path, **chosen), params))
    (ours, params), (reference, others) = runs
    for step in range(steps):
        before = {name: tensor.clone() for name, tensor in tensors(reference, others).items()}
        # Elementwise kernels of fp32 share no memory.
        shuffle(record, step, warps=sums(cls) or dtype != FP32)
        launches = record.launches.total()
        for opt, owned in runs:
            if before_step is not None:
                before_step(opt, step)
            set_gradients(owned, layouts, dtype if grad_dtype is None else grad_dtype, step)
            opt.step()
        assert record.launches.total() > launches
        actual, expected = tensors(ours, params), tensors(reference, others)
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            if is_exact:
                assert_bits(tensor, expected[name], f"step {step}, {name}")
            else:
                start = before.get(name, torch.zeros_like(expected[name]))
                assert_near(tensor, expected[name], start, f"step {step}, {name}")
                expected[name].copy_(tensor)
    guarded = [param for param, layout in zip(params, layouts, strict=True) if layout.kind in ("unaligned", "strided")]
    assert all(is_guarded(param.detach()) for param in guarded)
    return [ours, reference]


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [
        pytest.param(cls, dtype, id=f"{cls.__name__}-{name}")
        for classes, dtype, name in ((CHOSEN, FP32, "fp32"), (KINDS, BF16, "bf16"))
        for cls in classes
    ],
)
def test_every_optimizer(record: Record, cls: Any, dtype: torch.dtype) -> None:
    layouts = layouts_for(cls)
    if dtype == BF16 and not sums(cls):
        # Other tests have long ones in bf16.
        layouts = tuple(layout for layout in layouts if math.prod(layout.shape) < 4000)
    # Each pattern of unaligned planes is a kernel of its own, and the driver's affair. Kinds that sum up meet all four
    # in fp32. Elementwise ones, of which AdamW has all in other tests, and bf16 meet two, other optimizers one.
    if dtype == BF16 or not sums(cls):
        layouts = tuple(x for x in layouts if not (x.of_gradient and "unaligned" in (x.kind, x.of_gradient)))
    if cls not in KINDS:
        layouts = tuple(x for x in layouts if "unaligned" not in (x.kind, x.of_gradient))
    assert_follows_reference(record, cls, dtype, layouts=layouts, master="fp32")


@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB, optim.GroupAdaGrad], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("record", [80, 100], indirect=True)
def test_other_gpus(record: Record, cls: Any) -> None:
    layouts = [layout for layout in MATRICES if len(layout.shape) == 2]
    assert_follows_reference(record, cls, BF16, layouts=layouts, master="fp32")


def test_sums_differ_between_gpus_in_the_last_bits_at_most() -> None:
    """Triton 3.9 adds pairs first for sm_100: runs on other GPUs have other last bits (engine/tuning/config.py)."""
    sizes, random, norms = (100, 1025, 8195, 30000), torch.Generator().manual_seed(0), []
    tensors = [torch.randn(size, generator=random) for size in sizes]
    for capability in (80, 90, 100):
        with switch_on(capability):
            norms.append(plan.norms(tensors))
    assert torch.equal(norms[0], norms[1])
    torch.testing.assert_close(norms[1], norms[2], rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(FP32, BF16), (BF16, FP32), (torch.float16, torch.float16), (torch.float64,) * 2]
)
def test_dtypes_of_weights_and_gradients(record: Record, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    assert_follows_reference(record, optim.SGD, dtype, grad_dtype, momentum=0.9)


def test_no_launch_contracts(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fma of a kernel whose sums have another order cannot show in its results either."""
    names = Counter[str]()

    def note(kernel: Any, *args: Any, enable_fp_fusion: bool, **constants: Any) -> None:
        assert enable_fp_fusion is False, kernel
        names[kernel.__name__] += 1

    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", note)
    for cls in CLASSES:
        params = parameters(layouts_for(cls), FP32)
        set_gradients(params, layouts_for(cls), FP32, 0)
        opt = cls(params, max_grad_norm=1.0)
        opt.step()
    assert names.keys() >= {"multi_tensor_apply", "sum_partials", "clip_factor", "row_apply", "factored_apply"}


def test_three_hundred_small_tensors(record: Record) -> None:
    layouts = [Layout((i % 5 + 1,), ("plain", "unaligned")[i % 3 == 0]) for i in range(300)]
    assert_follows_reference(record, optim.AdamW, layouts=layouts)
    # One launch for the aligned ones and one for the others, in each step.
    assert record.launches == {"multi_tensor_adamw_update": 4}


def change_rate(opt: Any, step: int) -> None:
    for group in opt.param_groups:
        group["lr"] *= 0.5**step


def scale_gradients(opt: Any, step: int) -> None:
    """Scale gradients as a GradScaler does; the second step is skipped."""
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(step == 1))


def nothing(opt: Any, step: int) -> None:
    pass


@pytest.mark.parametrize("before_step", [change_rate, scale_gradients, nothing], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["", "capturable"])
def test_circumstances_of_a_step(record: Record, before_step: BeforeStep, options: dict[str, Any]) -> None:
    assert_follows_reference(record, optim.AdamW, before_step=before_step, steps=3, clip_value=0.5, **options)


@pytest.mark.parametrize("before_step", [scale_gradients, nothing], ids=lambda f: f.__name__)
def test_clipped_norm(record: Record, before_step: BeforeStep) -> None:
    opts = assert_follows_reference(
        record, optim.AdamW, BF16, before_step=before_step, steps=3, is_exact=False, max_grad_norm=0.5, master="fp32"
    )
    norms = [float(opt.grad_norm) for opt in opts]
    assert math.isclose(*norms, rel_tol=1e-6)
    assert norms[0] > 5


def test_clip_grad_norm(record: Record) -> None:
    norms, grads = [], []
    for is_ours in (True, False):
        params = parameters(EVERY, FP32)
        set_gradients(params, EVERY, FP32, 0)
        clip = tritopt.clip_grad_norm_ if is_ours else torch.nn.utils.clip_grad_norm_
        norms.append(clip(params, 0.5))
        grads.append([param.grad for param in params])
    assert record.launches.total() > 0
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB], ids=lambda cls: cls.__name__)
def test_telemetry(record: Record, cls: Any) -> None:
    layouts = (*VECTORS[:6], *MATRICES[4:6])
    opts = assert_follows_reference(record, cls, BF16, layouts=layouts, master="fp32", track=True)
    for ours, expected in zip(*(opt.telemetry() for opt in opts), strict=True):
        assert (ours.name, ours.elements, ours.nonfinite) == (expected.name, expected.elements, expected.nonfinite)
        for name in ("grad_norm", "weight_norm", "update_norm", "unchanged"):
            assert math.isclose(getattr(ours, name), getattr(expected, name), rel_tol=1e-5, abs_tol=1e-2), name


CONFIGS = [
    Config(block_size=16, chunk_size=64, tail_size=16, num_warps=1),
    Config(block_size=512, chunk_size=1024, tail_size=32, num_warps=8),
    Config(block_size=2048, chunk_size=16384, tail_size=2048, num_warps=16),
]


@pytest.mark.parametrize(
    ("cls", "config"),
    [*((optim.AdamW, config) for config in CONFIGS), (optim.LAMB, CONFIGS[1])],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_launch_configurations(record: Record, cls: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", config)
    assert_follows_reference(record, cls, BF16, master="fp32")


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adagrad], ids=lambda cls: cls.__name__)
def test_sparse_gradients(record: Record, cls: Any) -> None:
    """Gradients are an embedding's: some rows, some of them twice."""
    rows, runs = torch.tensor([0, 3, 3, 8]), []
    for path in (None, False):
        random = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(9, 70, generator=random))
        opt = cls([param], lr=0.1, fused=path)
        for _ in range(3):
            grad = torch.randn(4, 70, generator=random)
            param.grad = torch.sparse_coo_tensor(rows[None], grad, param.shape, check_invariants=True)
            opt.step()
        runs.append(tensors(opt, [param]))
    assert record.launches.total() == 3
    for name, tensor in runs[0].items():
        assert_bits(tensor, runs[1][name], name)


@pytest.mark.parametrize(
    ("name", "dtype"), [("adam", FP32), ("adam", BF16), ("ftrl", FP32), ("ftrl", BF16), ("sgd", FP32), ("lars", FP32)]
)
def test_lazy_updates_of_rows(record: Record, name: str, dtype: torch.dtype) -> None:
    """The rows of a gradient are updated as by a dense one, and no others."""
    arguments: dict[str, Any] = {"momentum": 0.9} if name in ("sgd", "lars") else {"multi_precision": dtype == BF16}
    arguments |= {"learning_rate": 0.1, "clip_gradient": 0.5, "rescale_grad": 2.0}
    lazy = tritopt.create(name, lazy_update=True, **arguments)
    dense = tritopt.create(name, use_fused_step=False, **arguments)
    random = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(9, 70, generator=random).to(dtype), torch.tensor([1, 4, 8])
    first, whole = weight.clone(), weight.clone()
    states = [opt.create_state_multi_precision(0, w) for opt, w in ((lazy, weight), (dense, whole))]
    for step in range(2):
        shuffle(record, step)
        grad = torch.randn(3, 70, generator=random).to(dtype)
        sparse = torch.sparse_coo_tensor(rows[None], grad, weight.shape, check_invariants=True)
        before = whole.clone()
        lazy.update_multi_precision([0], [weight], [sparse], states[:1])
        dense.update_multi_precision([0], [whole], [sparse.to_dense()], states[1:])
        if name == "lars":
            assert_near(weight[rows], whole[rows], before[rows], "weight")
            whole[rows] = weight[rows]
    assert record.launches.total() >= 2
    assert_bits(weight[rows], whole[rows], "weight")
    others = [0, 2, 3, 5, 6, 7]
    assert torch.equal(weight[others], first[others])
