"""Apply an update whose state is one number per row: a program takes a row of a matrix, in two passes.

The tables are the driver's (kernels/drivers/multi_tensor_apply.py), but for two:

    matrix_ptr   int64 [n_tensors, 2]   number of columns, index of the tensor's first row
    row_ptr      int32 [n_rows]         the tensor a row belongs to; one program per row

Pass 1 reads the gradient and forms a mean over the row, in the compute dtype, each lane adding up its own columns and
then the lanes in a tree: in the same order in every run. Pass 2 reads the gradient again, from the cache where the row
fits there, and updates. The functions are pure arithmetic:

    MEAN_FN(g, s)              blocks: what is averaged over the row
    STATE_FN(state, mean, s)   scalars of the row: its new states
    UPDATE_FN(w, g, state, s)  a block of the weight, and the row's new states: the new weight
"""

from __future__ import annotations

from tritopt.kernels.drivers.tables import load_grad, load_pointers, load_scalars
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import cast, div


@triton.jit(
    repr=lambda spec: f"row_{spec.constants['UPDATE_FN'].__name__}",
    do_not_specialize=["n_tensors"],  # a list of another length runs the same code
)
def row_apply(
    table_ptr,
    matrix_ptr,
    row_ptr,
    rescale_ptr,
    noop_ptr,
    n_tensors,
    MEAN_FN: tl.constexpr,
    STATE_FN: tl.constexpr,
    UPDATE_FN: tl.constexpr,
    PREAMBLE_FN: tl.constexpr,
    SCALARS: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_PLANES: tl.constexpr,
    LOAD_FN: tl.constexpr,
    STORE_FN: tl.constexpr,
    DTYPES: tl.constexpr,
    VECTOR: tl.constexpr,
    SKIP_ZERO_RESCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SOURCE_HASH: tl.constexpr,
):
    """Update row `program_id(0)`. VECTOR: elements that fill 16 bytes in the narrowest of the planes and gradient."""
    tensor = tl.load(row_ptr + tl.program_id(0)).to(tl.int64)
    n_columns = tl.load(matrix_ptr + 2 * tensor)
    row = tl.program_id(0) - tl.load(matrix_ptr + 2 * tensor + 1)

    ptrs, aligned_ptrs, is_aligned = load_pointers(table_ptr, tensor, N_PLANES + 1, DTYPES, ())
    common, s, is_live = load_scalars(
        table_ptr, tensor, n_tensors, rescale_ptr, noop_ptr,
        SCALARS, N_SCALARS, N_SCALARS - 3, len(DTYPES), SKIP_ZERO_RESCALE, COMPUTE_DTYPE,
    )  # fmt: skip
    state = ()
    for i in tl.static_range(N_PLANES + 1, len(DTYPES)):
        state = state + (tl.load(ptrs[i] + row).to(COMPUTE_DTYPE),)

    # Where every row starts at 16 bytes and its length is a multiple of that, all accesses are 128 bits wide, those
    # under the mask of the last block too: the hints say that a vector is either in the row or past it. A hint is an
    # attribute of the operation that makes the value, hence the two products.
    n_here = tl.where(is_live, n_columns, 0)
    n_aligned = tl.multiple_of(tl.where(is_aligned & (n_columns % VECTOR == 0), n_here, 0), VECTOR)
    aligned_start = tl.multiple_of(row * n_columns, VECTOR)
    start = row * n_columns
    total = tl.zeros([BLOCK_SIZE], dtype=COMPUTE_DTYPE)
    for first in tl.range(0, n_aligned, BLOCK_SIZE, num_stages=1):
        columns = first + tl.arange(0, BLOCK_SIZE)
        mask = columns < n_aligned
        g = load_grad(aligned_ptrs[N_PLANES], aligned_start + columns, mask, common, PREAMBLE_FN, COMPUTE_DTYPE)
        total += tl.where(mask, MEAN_FN(g, s), 0.0)
    for first in tl.range(n_aligned, n_here, BLOCK_SIZE, num_stages=1):
        columns = first + tl.arange(0, BLOCK_SIZE)
        mask = columns < n_here
        g = load_grad(ptrs[N_PLANES], start + columns, mask, common, PREAMBLE_FN, COMPUTE_DTYPE)
        total += tl.where(mask, MEAN_FN(g, s), 0.0)

    state = STATE_FN(state, div(tl.sum(total), n_columns.to(COMPUTE_DTYPE)), s)
    for i in tl.static_range(len(state)):
        state_ptr = ptrs[N_PLANES + 1 + i]
        tl.store(state_ptr + row, cast(state[i], state_ptr.dtype.element_ty), mask=is_live)

    for first in tl.range(0, n_aligned, BLOCK_SIZE, num_stages=1):
        columns = first + tl.arange(0, BLOCK_SIZE)
        mask = columns < n_aligned
        w = LOAD_FN(aligned_ptrs[:N_PLANES], aligned_start + columns, mask, COMPUTE_DTYPE)
        g = load_grad(aligned_ptrs[N_PLANES], aligned_start + columns, mask, common, PREAMBLE_FN, COMPUTE_DTYPE)
        STORE_FN(aligned_ptrs[:N_PLANES], aligned_start + columns, mask, UPDATE_FN(w, g, state, s))
    for first in tl.range(n_aligned, n_here, BLOCK_SIZE, num_stages=1):
        columns = first + tl.arange(0, BLOCK_SIZE)
        mask = columns < n_here
        w = LOAD_FN(ptrs[:N_PLANES], start + columns, mask, COMPUTE_DTYPE)
        g = load_grad(ptrs[N_PLANES], start + columns, mask, common, PREAMBLE_FN, COMPUTE_DTYPE)
        STORE_FN(ptrs[:N_PLANES], start + columns, mask, UPDATE_FN(w, g, state, s))
