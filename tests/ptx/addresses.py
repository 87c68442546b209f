"""Tensors of more than 2^32 elements, of which eight programs run, and memory holds no more. See test_steps.py."""

from __future__ import annotations

import mmap
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import tritopt
from tests.ptx.steps import assert_bits, assert_near
from tritopt.engine.group import LaunchGroup
from tritopt.engine.plan import Task
from tritopt.engine.tuning.config import GENERIC
from tritopt.kernels.formats.scales import BLOCK
from tritopt.tools.ptx.driver import Record

BF16 = torch.bfloat16
CHUNK = GENERIC.chunk_size
N = 2**32 + CHUNK + 4099
"""Elements: the last program has a tail."""
PROGRAMS = (0, 2**31 // CHUNK - 1, 2**31 // CHUNK, 2**31 // CHUNK + 1, 2**32 // CHUNK - 1, 2**32 // CHUNK,
            2**32 // CHUNK + 1, 3 * 2**30 // CHUNK + 5)  # fmt: skip
"""First, those beside 2^31 and 2^32, the last, and one between."""
NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python names from 3.13 on."""


def huge(dtype: torch.dtype, n: int = N) -> torch.Tensor:
    """Zeros that take memory where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize, flags=flags), dtype=dtype)


def windows(tensor: torch.Tensor, per: int = 1) -> list[torch.Tensor]:
    """Split a tensor into what each of the programs has; it may have one element for so many."""
    return [tensor[i * CHUNK // per : (i + 1) * CHUNK // per] for i in PROGRAMS]


def fill(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Random numbers in the windows."""
    random = torch.Generator().manual_seed(seed)
    for window in windows(tensor):
        window.copy_(torch.randn(window.shape, generator=random))
    return tensor


def run(opt: Any, weight: torch.Tensor, grad: torch.Tensor, state: Any) -> None:
    opt.update_multi_precision([0], [weight], [grad], [state])


@pytest.fixture
def eight(record: Record, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Machine that runs these programs, and all of smaller grids; partial sums of the others are 0."""
    record.order = lambda numbers: np.array(PROGRAMS) if len(numbers) > max(PROGRAMS) else numbers
    monkeypatch.setattr(LaunchGroup, "empty", lambda group, *shape: torch.zeros(shape, dtype=torch.float64))
    return record


def test_plain(eight: Record) -> None:
    weight, grad = fill(huge(BF16), 0), fill(huge(BF16), 1)
    state = huge(BF16), huge(BF16)
    before = [window.clone() for window in windows(weight)]
    run(tritopt.create("adamw", learning_rate=0.01, wd=0.1, master=None), weight, grad, state)
    for i, (actual, expected, of_grad) in enumerate(zip(windows(weight), before, windows(grad), strict=True)):
        reference = tritopt.create("adamw", learning_rate=0.01, wd=0.1, master=None, use_fused_step=False)
        own = torch.zeros_like(expected), torch.zeros_like(expected)
        run(reference, expected, of_grad.clone(), own)
        assert_bits(actual, expected, f"weight of program {PROGRAMS[i]}")
        for place, tensor in enumerate(own):
            assert_bits(windows(state[place])[i], tensor, f"state {place} of program {PROGRAMS[i]}")
    assert eight.launches == {"multi_tensor_adamw_update": 1}


class Window(tritopt.AdamW):
    """AdamW on a part of a parameter, whose random bits are those of the part's places."""

    first: ClassVar[int] = 0

    def _task(self, *arguments: Any) -> Task:
        task = super()._task(*arguments)
        return task._replace(noise=(task.noise[0], self.first, 0, 0))


def test_random_bits_and_shared_scales(eight: Record) -> None:
    arguments: dict[str, Any] = {"multi_precision": True, "master": "split8", "state_dtype": "int8"}
    opt = tritopt.AdamW(learning_rate=0.01, **arguments)
    weight, grad, remainder = fill(huge(BF16), 0), fill(huge(BF16), 1), huge(torch.int8)
    dtypes = [fmt.dtypes for fmt in opt.state_formats()]
    moments = [(huge(of_codes), huge(of_scales, -(-N // BLOCK))) for of_codes, of_scales in dtypes]
    before = [window.clone() for window in windows(weight)]
    run(opt, weight, grad, (remainder, tuple(moments)))
    for i, (actual, expected, of_grad) in enumerate(zip(windows(weight), before, windows(grad), strict=True)):
        reference = Window(learning_rate=0.01, **arguments, use_fused_step=False)
        Window.first = PROGRAMS[i] * CHUNK
        own = reference.create_state_multi_precision(0, expected)
        run(reference, expected, of_grad.clone(), own)
        assert_bits(actual, expected, f"weight of program {PROGRAMS[i]}")
        assert_bits(windows(remainder)[i], own[0], f"remainder of program {PROGRAMS[i]}")
        for ours, theirs in zip(moments, own[1], strict=True):
            assert_bits(windows(ours[0])[i], theirs[0], f"codes of program {PROGRAMS[i]}")
            assert_bits(windows(ours[1], BLOCK)[i][: len(theirs[1])], theirs[1], f"scales of program {PROGRAMS[i]}")
    assert eight.launches == {"multi_tensor_adamw_update": 1}


def test_sums(eight: Record) -> None:
    weight, grad = fill(huge(BF16), 0), fill(huge(BF16), 1)
    state = huge(BF16), huge(BF16)
    arguments = {"learning_rate": 0.01, "wd": 0.1, "master": None}
    joined, of_grad = torch.cat(windows(weight)), torch.cat(windows(grad))
    before = joined.clone()
    run(tritopt.create("lamb", **arguments), weight, grad, state)
    own = torch.zeros_like(joined), torch.zeros_like(joined)
    run(tritopt.create("lamb", use_fused_step=False, **arguments), joined, of_grad, own)
    assert_near(torch.cat(windows(weight)), joined, before, "weight")
    for place, tensor in enumerate(own):
        assert_near(torch.cat(windows(state[place])), tensor, torch.zeros_like(tensor), f"state {place}")
    once = ("multi_tensor_lamb_moments", "sum_blocks", "sum_partials", "multi_tensor_lamb_update")
    assert eight.launches == dict.fromkeys(once, 1)
