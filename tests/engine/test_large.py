"""A tensor of more than 2^31 elements: offsets of 32 bits would miss its end, or write over its beginning."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tritopt import optim
from tritopt.kernels.formats.weights import MASTERS
from tritopt.kernels.language import INTERPRETED

PERIOD = 7
"""Period of the gradients. 2^32 is no multiple, so what is written in the wrong place has the wrong value."""
RATE, DECAY = 2.0**-4, 0.125
WINDOW = 1024
NEEDED = 48 * 2**30
"""Bytes: 13 an element, and what is compared."""


def gradients(n: int, device: torch.device) -> torch.Tensor:
    """Repeating; none is 0."""
    pattern = pattern_of(device)
    filled = torch.empty(n, dtype=torch.bfloat16, device=device)
    whole = n // PERIOD * PERIOD
    filled[:whole].view(-1, PERIOD).copy_(pattern)
    filled[whole:].copy_(pattern[: n - whole])
    return filled


def pattern_of(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, -2, 3, -4, 5, -6, 7], dtype=torch.bfloat16, device=device) / 8


def at(places: torch.Tensor) -> torch.Tensor:
    """The gradients there, fp64."""
    return pattern_of(places.device).double()[places % PERIOD]


def windows(n: int, boundary: int) -> list[slice]:
    """The beginning, both sides of the boundary, the end."""
    return [slice(0, WINDOW), slice(boundary - WINDOW, min(boundary + WINDOW, n)), slice(n - WINDOW, n)]


def sgd(n: int, boundary: int, device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
    param.grad = gradients(n, device)
    optim.SGD([param], lr=RATE, master=None).step()
    expected = (1 - RATE * pattern_of(device).double()).bfloat16()
    whole = n // PERIOD * PERIOD
    assert bool((param.detach()[:whole].view(-1, PERIOD) == expected).all())
    assert torch.equal(param.detach()[whole:], expected[: n - whole])


def adamw_split8(n: int, boundary: int, device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
    param.grad = gradients(n, device)
    opt = optim.AdamW([param], lr=RATE, weight_decay=DECAY, master="split8")
    opt.step()
    state = opt.state[param]
    # Adam's first step goes by the sign of the gradient.
    signs, weight = pattern_of(device).sign(), param.detach()
    whole = n // PERIOD * PERIOD
    assert bool(((1 - weight[:whole].view(-1, PERIOD)).sign() == signs).all())
    for window in windows(n, boundary):
        grad = at(torch.arange(window.start, window.stop, device=device))
        truth = (1 - RATE * DECAY) - RATE * grad / (grad.abs() + 1e-8)
        master = MASTERS["split8"].decode((weight[window], state["master_remainder8"][window]), torch.float32)
        torch.testing.assert_close(master.double(), truth, rtol=2.0**-15, atol=0)  # rounded up or down by chance
        torch.testing.assert_close(state["exp_avg"][window].double(), 0.1 * grad, rtol=1e-6, atol=0)
        torch.testing.assert_close(state["exp_avg_sq"][window].double(), 0.001 * grad**2, rtol=1e-6, atol=0)


@pytest.fixture
def device() -> Any:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.mark.parametrize("step", [sgd, adamw_split8])
@pytest.mark.parametrize("n", [2**13 + 5, 2**31 + 4099], ids=["small", "large"])
def test_every_element_is_updated_once(step: Any, n: int, device: torch.device) -> None:
    """The small one shows that the test itself is right."""
    if n > 2**31 and (device.type != "cuda" or torch.cuda.mem_get_info()[0] < NEEDED):
        pytest.skip(f"needs a GPU with {NEEDED // 2**30} GiB free")
    step(n, 2**31 if n > 2**31 else 2**12, device)
