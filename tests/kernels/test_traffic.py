"""Bytes per parameter, counted: those that stay in the tensors, those that move in the kernels' loads and stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tritopt import optim
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import NVIDIA
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.language import INTERPRETED
from tritopt.mxnet.registry import optimizer_of
from tritopt.tools import cost
from tritopt.tools.interpreter import live

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in Triton's interpreter")

BF16, FP32 = torch.bfloat16, torch.float32
CONFIG = NVIDIA._replace(chunk_size=2048)
# Full blocks of two chunks, and a tail of more than a block.
N = CONFIG.chunk_size + CONFIG.block_size + CONFIG.tail_size + BLOCK
SHAPE = (N // BLOCK, BLOCK)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", CONFIG)


@dataclass
class Counted:
    """Bytes that one launch touches."""

    kernel: str
    loads: list[tuple[np.ndarray[Any, Any], int]] = field(default_factory=list)
    """Addresses, and bytes from each on."""
    stores: list[tuple[np.ndarray[Any, Any], int]] = field(default_factory=list)


@contextmanager
def counting() -> Iterator[list[Counted]]:
    """Records the launches of Triton's interpreter."""
    from triton.runtime import interpreter

    launches: list[Counted] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def addresses(ptrs: Any, mask: Any) -> tuple[np.ndarray[Any, Any], int]:
        at = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)].astype(np.uint64)
        return at, ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launches[-1].loads.append(addresses(ptrs, mask))
        return load(self, ptrs, mask, *rest, **options)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launches[-1].stores.append(addresses(ptrs, mask))
        return store(self, ptrs, value, mask, *rest, **options)

    def counted_call(self: Any, *args: Any, **options: Any) -> Any:
        launches.append(Counted(self.fn.__name__))
        return call(self, *args, **options)

    with live(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(executor, "__call__", counted_call)
        yield launches


def bytes_of(accesses: list[tuple[np.ndarray[Any, Any], int]], tensors: list[torch.Tensor]) -> int:
    """Distinct bytes of these tensors that are accessed, none twice but those of scales."""
    if not accesses:
        return 0
    touched = np.concatenate([(at[:, None] + np.arange(size, dtype=np.uint64)).ravel() for at, size in accesses])
    distinct, times = np.unique(touched, return_counts=True)
    inside = np.zeros(len(distinct), dtype=bool)
    for tensor in tensors:
        here = (distinct >= tensor.data_ptr()) & (distinct < tensor.data_ptr() + tensor.nbytes)
        inside |= here
        assert tensor.numel() < N or times[here].max(initial=1) == 1
    assert (~inside).sum() < 512  # tables, and sums of two programs
    return int(inside.sum())


@dataclass
class Step:
    """One step of a class of tritopt.optim over one parameter, counted."""

    cls: Any
    dtype: torch.dtype
    options: dict[str, Any]

    def __post_init__(self) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(SHAPE, generator=generator, device="cpu").to(self.dtype))
        grad = self.weight.grad = torch.randn(SHAPE, generator=generator, device="cpu").to(self.dtype)
        self.opt = self.cls([self.weight], lr=0.01, **self.options)
        with counting() as launches:
            self.opt.step()
        states = [value for name, value in self.opt.state[self.weight].items() if name != "step"]
        tensors = [self.weight.data, grad, *states]
        self.kernels = [launch.kernel for launch in launches]
        self.resident = sum(tensor.nbytes for tensor in tensors) / N
        self.read, self.written = (
            sum(bytes_of(accesses, tensors) for accesses in of_launches) / N
            for of_launches in zip(*[(launch.loads, launch.stores) for launch in launches], strict=True)
        )

    @property
    def counted(self) -> tuple[float, float, float]:
        """Bytes per parameter: resident with the gradient, read, written."""
        return self.resident, self.read, self.written

    @property
    def by_formula(self) -> tuple[float, float, float]:
        """Count the bytes that tritopt.tools.cost says of the same step."""
        (group,) = self.opt.param_groups
        rule, fmt = optimizer_of(self.opt.rule_of(group)), self.opt.layout_of(self.weight, group).format
        rule.state_dtype = group["state_dtype"]
        moved = cost.bytes_per_parameter(rule, self.dtype, self.dtype, fmt)
        return cost.resident_bytes(rule, self.dtype, fmt) + self.dtype.itemsize, moved.read, moved.written


@pytest.mark.parametrize(
    ("dtype", "master", "state_dtype", "resident", "moved"),
    [
        # w, g, m and v 4 each; all but g written
        (FP32, None, None, 16, 16 + 12),
        # w and g 2; master, m and v 4. All read, all but g written.
        (BF16, "fp32", None, 16, 16 + 14),
        (BF16, "split16", None, 14, 14 + 12),
        # all five of 2
        (BF16, "split16", "bf16", 10, 10 + 8),
        (BF16, "split16", "fp16", 10 + 4 / 64, 10 + 8 + 8 / 64),
        # w and g 2; remainder, m and v 1; 2 in 64 for m and v each
        (BF16, "split8", "int8", 7 + 4 / 64, 7 + 5 + 8 / 64),
        (BF16, "split8", "fp8", 7 + 4 / 64, 7 + 5 + 8 / 64),
        (BF16, "stochastic", "int8", 6 + 4 / 64, 6 + 4 + 8 / 64),
        (BF16, "kahan", None, 14, 14 + 12),
        (BF16, None, None, 8, 8 + 6),
    ],
)
def test_adamw(dtype: torch.dtype, master: str | None, state_dtype: str | None, resident: float, moved: float) -> None:
    step = Step(optim.AdamW, dtype, {"master": master, "state_dtype": state_dtype})
    assert step.kernels == ["multi_tensor_apply"]
    assert (step.resident, step.read + step.written) == (resident, moved)
    assert step.counted == step.by_formula


@pytest.mark.parametrize(
    ("master", "state_dtype", "moved"),
    [("fp32", None, 32), ("split16", "bf16", 20), ("split8", "int8", 14.125), ("split8", "fp8", 14.125)],
)
def test_a_global_norm_reads_the_gradient_once_more(master: str, state_dtype: str | None, moved: float) -> None:
    step = Step(optim.AdamW, BF16, {"master": master, "state_dtype": state_dtype, "max_grad_norm": 1.0})
    assert step.kernels == ["multi_tensor_apply", "sum_partials", "clip_factor", "multi_tensor_apply"]
    assert step.read + step.written == moved
    resident, read, written = step.by_formula
    assert step.counted == (resident, read + 2, written)


@pytest.mark.parametrize(
    ("dtype", "master", "state_dtype"),
    [
        (FP32, None, None),
        (FP32, None, "int8"),
        (BF16, "fp32", None),
        (BF16, "fp32", "fp8"),
        (BF16, "split16", "bf16"),
        (BF16, "split16", "fp16"),
        (BF16, "split8", "int8"),
        (BF16, "stochastic", "fp8"),
        (BF16, "kahan", None),
        (BF16, None, "bf16"),
        (BF16, None, None),
    ],
)
@pytest.mark.parametrize(
    ("cls", "options"),
    [(optim.Lion, {}), (optim.LAMB, {}), (optim.SGD, {"momentum": 0.9}), (optim.RMSprop, {"centered": True})],
)
def test_others(
    cls: Any, options: dict[str, Any], dtype: torch.dtype, master: str | None, state_dtype: str | None
) -> None:
    step = Step(cls, dtype, {"master": master, "state_dtype": state_dtype, **options})
    assert step.counted == step.by_formula


@pytest.mark.parametrize(
    ("cls", "master", "state_dtype", "moved"),
    [
        (optim.LAMB, "fp32", None, 44),
        # Twice the gradient's 2, or w, then m and v; the first launch writes m and v, the second w.
        (optim.LAMB, "split16", "bf16", (4 + 2 + 4) + 4 + (4 + 4) + 4),
        (optim.Lion, "fp32", None, 22),
        (optim.Lion, "split8", "int8", (3 + 2 + 1) + (3 + 1) + 4 / 64),
    ],
)
def test_others_by_hand(cls: Any, master: str, state_dtype: str | None, moved: float) -> None:
    step = Step(cls, BF16, {"master": master, "state_dtype": state_dtype})
    assert step.read + step.written == moved
