"""Loads from the tables of a group, which kernels/drivers/multi_tensor_apply.py describes."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import is_finite

N_COMMON_SCALARS = tl.constexpr(3)


@triton.jit
def load_tuple(ptr, N: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """Load N numbers that follow one another, as a tuple."""
    values = ()
    for i in tl.static_range(N):
        values = values + (tl.load(ptr + i).to(COMPUTE_DTYPE),)
    return values


@triton.jit
def load_pointers(table_ptr, tensor, N_MOVED: tl.constexpr, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Load the pointers to a tensor's planes, gradient and states.

    Args:
        table_ptr: the group's table of pointers.
        tensor: number of the tensor in the group.
        N_MOVED: number of pointers, from the first on, that 128-bit accesses go through,
        DTYPES: what each points to.
        ALIGNED: except those that are False here; empty: no exceptions.

    Returns (pointers, the same with a hint of 16-byte alignment, whether the first N_MOVED really are aligned, but for
    the exceptions). Use the second only where the third is true.
    """
    ptrs = ()
    aligned_ptrs = ()
    address_bits = tl.zeros([], dtype=tl.int64)
    for i in tl.static_range(len(DTYPES)):
        address = tl.load(table_ptr + tensor * (len(DTYPES) + 1) + i)
        # A pointer out of a table has unknown alignment, which keeps its accesses scalar; the hint widens them.
        ptrs = ptrs + (address.to(tl.pointer_type(DTYPES[i])),)
        if i < len(ALIGNED) and not ALIGNED[i]:
            aligned_ptrs = aligned_ptrs + (address.to(tl.pointer_type(DTYPES[i])),)
        else:
            if i < N_MOVED:
                address_bits = address_bits | address
            aligned_ptrs = aligned_ptrs + (tl.multiple_of(address.to(tl.pointer_type(DTYPES[i])), 16),)
    return ptrs, aligned_ptrs, address_bits % 16 == 0


@triton.jit
def load_last_scalar(table_ptr, tensor, n_tensors, N_SCALARS: tl.constexpr, N_POINTERS: tl.constexpr):
    """Load the last of a tensor's scalars: the step, where random bits are drawn."""
    row = tl.load(table_ptr + tensor * (N_POINTERS + 1) + N_POINTERS)
    ptr = (table_ptr + n_tensors * (N_POINTERS + 1) + row * N_SCALARS).to(tl.pointer_type(tl.float64))
    return tl.load(ptr + N_SCALARS - 1)


@triton.jit
def load_scalars(
    table_ptr,
    tensor,
    n_tensors,
    rescale_ptr,
    noop_ptr,
    SCALARS: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_OWN: tl.constexpr,
    N_POINTERS: tl.constexpr,
    SKIP_ZERO_RESCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Load what a tensor's update takes beside its elements.

    Args:
        table_ptr: the group's table: pointers, and behind those of all tensors the scalars, fp64.
        tensor, n_tensors: number of the tensor in the group, and of all that are.
        rescale_ptr: None, or a device scalar that multiplies the table's rescale; the update is skipped if it is NaN or
            infinite, and if it is 0 where SKIP_ZERO_RESCALE.
        noop_ptr: None, or a device flag; if it is not 0 the update is skipped.
        SCALARS: NamedTuple that holds the optimizer's own scalars.
        N_SCALARS, N_OWN: scalars of a tensor in the table, and the optimizer's own among them.
        N_POINTERS: pointers of a tensor in the table.

    Returns ((rescale, clip bound, wd), SCALARS, whether anything may be written).
    """
    row = tl.load(table_ptr + tensor * (N_POINTERS + 1) + N_POINTERS)
    ptr = (table_ptr + n_tensors * (N_POINTERS + 1) + row * N_SCALARS).to(tl.pointer_type(tl.float64))
    common = load_tuple(ptr, N_COMMON_SCALARS, COMPUTE_DTYPE)
    s = SCALARS(*load_tuple(ptr + N_COMMON_SCALARS, N_OWN, COMPUTE_DTYPE))
    is_live = common[0] == common[0]  # NaN skips this tensor alone
    if rescale_ptr is not None:
        scale = tl.load(rescale_ptr).to(COMPUTE_DTYPE)
        common = (common[0] * scale, common[1], common[2])
        is_live = is_live & is_finite(scale)
        if SKIP_ZERO_RESCALE:
            is_live = is_live & (scale != 0)
    if noop_ptr is not None:
        is_live = is_live & (tl.load(noop_ptr) == 0)
    return common, s, is_live


@triton.jit
def load_grad(grad_ptr, offsets, mask, common, PREAMBLE_FN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
    """Load the gradient through a preamble that does not read the weight."""
    g = tl.load(grad_ptr + offsets, mask=mask).to(COMPUTE_DTYPE)
    return PREAMBLE_FN(None, g, common[0], common[1], common[2])
