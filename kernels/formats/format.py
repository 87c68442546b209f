"""Storage formats: ways to store a value that the arithmetic sees in the compute dtype.

A format is a pair of @triton.jit functions, passed to the driver as constexpr, and their twins in PyTorch, which stand
below them:

    load(planes, offsets, mask, COMPUTE_DTYPE) -> value          decode(planes, dtype) -> tensor
    store(planes, offsets, mask, value) -> plane 0               encode(planes, tensor), in place
    store(planes, offsets, mask, value, start, noise) -> same    encode(planes, tensor, noise), if it draws: a Noise
    shown(planes, value) -> plane 0, of a value that was loaded

`load_x` and `store_x` are kernels, `decode_x` and `encode_x` their twins. What these are made of has a twin as well,
`f_twin` of the kernel `f`, but for operations of kernels/ops.py, whose twins are in kernels/twins/ops.py.

`planes` are the tensors that together hold the value: pointers in the kernel, tensors in PyTorch. All have the value's
shape, but for the scales of formats whose elements share them. `start` is the first of the offsets. Any format goes
with any update function; neither knows of the other. weights.py lists those of weights, states.py those of states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import cast, widen
from tritopt.kernels.twins.random import Noise


class Format(NamedTuple):
    """A storage format: its name, number of planes and the two pairs of functions (module docstring)."""

    name: str
    n_planes: int
    load: Any
    store: Any
    decode: Callable[[Sequence[torch.Tensor], torch.dtype], torch.Tensor]
    encode: Callable[..., None]
    plane_reads: tuple[bool, ...]
    """Flags that say which planes `load` reads; `store` writes all of them."""
    weight_dtypes: tuple[torch.dtype, ...]
    """Dtypes that plane 0 may have, which is the weight; none for a format of states."""
    companion: str = ""
    """Name of plane 1 in a checkpoint; empty if there is no plane 1."""
    companion_dtype: torch.dtype | None = None
    """Dtype of plane 1; None: the weight's."""
    companion_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Makes plane 1 from the weight and the fp32 value that the two are to hold; None if there is no plane 1."""
    draws: bool = False
    """Whether storing takes random bits."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes of the planes of a format of states; none for a format of weights."""
    shown: Any = None
    """Function that rounds a loaded value as plane 0 shows it; None for a format of states."""
    block: int = 0
    """Number of elements, next to each other in memory, that share one of the last plane's; 0: none do."""

    def dtype_of_companion(self, weight: torch.dtype) -> torch.dtype:
        """Dtype of plane 1 beside a weight of this dtype."""
        return self.companion_dtype or weight


def state_format(
    name: str, load: Any, store: Any, decode: Any, encode: Any, dtypes: tuple[torch.dtype, ...], block: int = 0
) -> Format:
    """Make a format of states: it rounds by chance, and reads all of its planes."""
    n_planes = len(dtypes)
    return Format(
        name, n_planes, load, store, decode, encode, (True,) * n_planes, (), draws=True, dtypes=dtypes, block=block
    )


@triton.jit
def shown_nearest(planes, value):
    """Round to nearest even."""
    return cast(value, planes[0].dtype.element_ty)


@triton.jit
def load_plain(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load the one plane, widened."""
    return widen(tl.load(planes[0] + offsets, mask=mask), COMPUTE_DTYPE)


def decode_plain(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_plain`."""
    return planes[0].to(dtype)


@triton.jit
def store_plain(planes, offsets, mask, value):
    """Store the one plane, rounded to nearest even."""
    rounded = shown_nearest(planes, value)
    tl.store(planes[0] + offsets, rounded, mask=mask)
    return rounded


def encode_plain(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise | None = None) -> None:
    """PyTorch twin of `store_plain`."""
    # Converted first: where fp32 becomes fp16, torch's copy_ does not ask whether what it writes is negated by a bit.
    planes[0].copy_(value.to(planes[0].dtype))


LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Dtypes of weights that keep a master."""
_ALL = (*LOW_PRECISION, torch.float32, torch.float64)
PLAIN = Format("plain", 1, load_plain, store_plain, decode_plain, encode_plain, (True,), _ALL, shown=shown_nearest)
"""One plane, of any dtype."""
