"""Steps of tritopt.optim in the machine, against the reference. test_steps.py runs this file where they are compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.optim.training import CLASSES, options_of
from tests.ptx.layouts import EVERY, MATRICES, VECTORS, Layout, is_guarded, parameters, set_gradients
from tritopt import check, optim, phases
from tritopt.tools.ptx.driver import Record

BF16, FP32 = torch.bfloat16, torch.float32
BeforeStep = Callable[[Any, int], None]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def layouts_for(cls: Any) -> tuple[Layout, ...]:
    """All that it takes; of Adafactor, which has kernels for every shape of blocks, some."""
    if cls is optim.GroupAdaGrad:
        return tuple(layout for layout in MATRICES if len(layout.shape) == 2)
    return (*VECTORS, *MATRICES[2:7]) if cls is optim.Adafactor else EVERY


def sums(cls: Any) -> bool:
    """Whether results depend on the order of a sum."""
    return any(phase.sums_elements for phase in cls.rule().phases)


def tensors(opt: Any, params: Sequence[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Weights and states, by name."""
    found = {}
    for i, param in enumerate(params):
        found[f"weight {i}"] = param.detach()
        state = opt.state.get(param, {})
        found |= {f"{name} {i}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def assert_bits(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Any NaN is like any other."""
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype), name
    a, b = (x.contiguous().view(_INTEGERS[x.element_size()]) for x in (ours, expected))
    differs = a != b
    if ours.is_floating_point():
        differs &= ~(ours.isnan() & expected.isnan())
    assert not bool(differs.any()), f"{name}: {int(differs.sum())} of {differs.numel()} elements have other bits"


def assert_near(ours: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, name: str) -> None:
    """Within what sums in another order are allowed."""
    gap = torch.zeros_like(expected, dtype=torch.float64)
    error, is_within = check._error(ours, expected, before.double(), gap, check.TOLERANCES["reordered"], FP32)
    assert is_within, f"{name}: {error:.3g} ulp apart"


def shuffle(record: Record, step: int) -> None:
    """Programs in another order, warps one after the other, approximations an ulp off: none of which may change bits."""
    random = np.random.default_rng(step)
    record.order = random.permutation if step else None
    record.warp_seed = step if step == 1 else None
    record.inexact = True


def assert_follows_reference(
    record: Record, cls: Any, dtype: torch.dtype = FP32, grad_dtype: torch.dtype | None = None,
    layouts: Sequence[Layout] | None = None, before_step: BeforeStep | None = None, steps: int = 3,
    is_exact: bool | None = None, **options: Any,
) -> list[Any]:  # fmt: skip
    """Run steps on two param_groups, from the same tensors each time: the first, and replayed ones. Both optimizers.

    Bit for bit unless sums have another order; that of programs and warps changes from step to step.
    """
    layouts = layouts_for(cls) if layouts is None else layouts
    is_exact = not sums(cls) if is_exact is None else is_exact
    chosen = options_of(cls, weight_decay=0.05) | options
    runs = []
    for fused in (None, False):
        params = parameters(layouts, dtype)
        groups = [{"params": params[i::2], "lr": chosen["lr"] * (1 + i)} for i in range(2)]
        runs.append((cls(groups, fused=fused, **chosen), params))
    (ours, params), (reference, others) = runs
    for step in range(steps):
        before = {name: tensor.clone() for name, tensor in tensors(reference, others).items()}
        shuffle(record, step)
        launches = record.launches.total()
        for opt, some in runs:
            if before_step is not None:
                before_step(opt, step)
            set_gradients(some, layouts, dtype if grad_dtype is None else grad_dtype, step)
            opt.step()
        assert record.launches.total() > launches
        found, expected = tensors(ours, params), tensors(reference, others)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            if is_exact:
                assert_bits(tensor, expected[name], f"step {step}, {name}")
            else:
                start = before.get(name, torch.zeros_like(expected[name]))
                assert_near(tensor, expected[name], start, f"step {step}, {name}")
                expected[name].copy_(tensor)
    guarded = [param for param, layout in zip(params, layouts, strict=True) if layout.kind in ("unaligned", "strided")]
    assert all(is_guarded(param.detach()) for param in guarded)
    return [ours, reference]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_optimizer(record: Record, cls: Any, dtype: torch.dtype) -> None:
    assert_follows_reference(record, cls, dtype, **({} if dtype == FP32 else {"master": "fp32"}))
