"""Apply an update whose second moment is factored into that of rows and that of columns, in five launches.

A weight of two or more dimensions is a stack of matrices, its last two dimensions. One of fewer is a vector: it is laid
out in lines as wide as a block, and keeps its second moment whole, where the others keep that of the columns.

    factored_sums     sums of squared gradients over the rows and the columns of a tile
    factored_moments  adds up tiles and advances the moments of rows and columns
    factored_means    the mean of a matrix's row moments
    factored_norms    sums of squares of weight and direction over a tile; advances the moments of vectors
    factored_update   the weight

A program has a tile: TILE_ROWS rows by BC columns of BB matrices, in blocks [BB, BR, BC]. Sums are taken in the same
order in every run: in registers, then over the tiles by another launch. The tables are the driver's, but for these:

    shape_ptr  int64 [n_tensors, N_SHAPE]  see `_load_shape`
    tile_ptr   int32 [n_tiles, 2]          tensor, and which of its tiles; one program per tile
    part_ptr   sums over tiles: of rows [tiles across, matrices, rows], of columns [tiles down, matrices, columns]
    mean_ptr   mean of the row moments, of each matrix

The functions are pure arithmetic on blocks, but for the last two arguments, which are means over the tensor, fp64:

    SQUARE_FN(g, s), MOMENT_FN(var, mean of squares, s), VARIANCE_FN(row_var, col_var, mean of row_var, s)
    DIRECTION_FN(g, var, s), UPDATE_FN(w, direction, s, mean of w^2, mean of direction^2)
"""

from __future__ import annotations

from tritopt.kernels.drivers.tables import load_grad, load_pointers, load_scalars
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import cast, div

N_SHAPE = tl.constexpr(11)
_UNSPECIALIZED = ["n_tensors"]  # a list of another length runs the same code


@triton.jit
def _load_shape(shape_ptr, tensor):
    """Matrices, rows and columns of each; elements; whether factored; tiles down and across and the first of them.

    And where the tensor's part begins in the sums of rows, in those of columns, and in the means.
    """
    shape = ()
    for i in tl.static_range(N_SHAPE):
        shape = shape + (tl.load(shape_ptr + tensor * N_SHAPE + i),)
    return shape


@triton.jit
def _locate(tile_ptr, shape_ptr, TILE_ROWS: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr):
    """The tensor of this program, its shape, its tile's number, first matrix, row and column."""
    tensor = tl.load(tile_ptr + 2 * tl.program_id(0)).to(tl.int64)
    tile = tl.load(tile_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    shape = _load_shape(shape_ptr, tensor)
    n_down, n_across = shape[5], shape[6]
    down = tile // n_across % n_down
    return tensor, shape, tile, tile // n_across // n_down * BB, down * TILE_ROWS, tile % n_across * BC


@triton.jit
def _axes(matrix, row, column, BB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Numbers of a block's matrices, rows and columns, each along its axis."""
    b = matrix + tl.arange(0, BB)[:, None, None]
    r = row + tl.arange(0, BR)[None, :, None]
    c = column + tl.arange(0, BC)[None, None, :]
    return b, r, c


@triton.jit
def _elements(b, r, c, n_matrices, n_rows, n_columns, n_elements):
    """Offsets of a block's elements in the tensor, and which of them there are."""
    offsets = (b * n_rows + r) * n_columns + c
    return offsets, (b < n_matrices) & (r < n_rows) & (c < n_columns) & (offsets < n_elements)


@triton.jit
def _sum_block(
    grad_ptr, b, r, c, shape, n_columns, n_elements, common, s, row_part_ptr, totals,
    SQUARE_FN: tl.constexpr, PREAMBLE_FN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    offsets, mask = _elements(b, r, c, shape[0], shape[1], n_columns, n_elements)
    squares = SQUARE_FN(load_grad(grad_ptr, offsets, mask, common, PREAMBLE_FN, COMPUTE_DTYPE), s)
    squares = tl.where(mask, squares, 0.0)
    rows = tl.sum(squares, axis=2, keep_dims=True)
    tl.store(row_part_ptr + b * shape[1] + r, rows, mask=(b < shape[0]) & (r < shape[1]))
    return totals + squares


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def factored_sums(
    table_ptr,
    shape_ptr,
    tile_ptr,
    rescale_ptr,
    noop_ptr,
    part_ptr,
    n_tensors,
    SQUARE_FN: tl.constexpr,
    PREAMBLE_FN: tl.constexpr,
    SCALARS: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_PLANES: tl.constexpr,
    DTYPES: tl.constexpr,
    VECTOR: tl.constexpr,
    SKIP_ZERO_RESCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BB: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    SOURCE_HASH: tl.constexpr,
):
    """Sums of SQUARE_FN over the rows and over the columns of a factored tensor's tile."""
    tensor, shape, _, first_matrix, first_row, first_column = _locate(tile_ptr, shape_ptr, TILE_ROWS, BB, BC)
    n_matrices, n_rows, n_columns, n_elements = shape[0], shape[1], shape[2], shape[3]
    ptrs, aligned_ptrs, is_aligned = load_pointers(table_ptr, tensor, N_PLANES + 1, DTYPES, ())
    common, s, is_live = load_scalars(
        table_ptr, tensor, n_tensors, rescale_ptr, noop_ptr,
        SCALARS, N_SCALARS, N_SCALARS - 3, len(DTYPES), SKIP_ZERO_RESCALE, COMPUTE_DTYPE,
    )  # fmt: skip
    row_part_ptr = part_ptr + shape[8] + first_column // BC * (n_matrices * n_rows)

    end = tl.where(is_live, tl.minimum(first_row + TILE_ROWS, n_rows), first_row)
    is_aligned = is_aligned & (n_columns % VECTOR == 0)
    aligned_end = tl.where(is_aligned, end, first_row)
    aligned_columns = tl.multiple_of(tl.where(is_aligned, n_columns, 0), VECTOR)
    aligned_elements = tl.multiple_of(tl.where(is_aligned, n_elements, 0), VECTOR)
    totals = tl.zeros([BB, BR, BC], dtype=COMPUTE_DTYPE)
    for row in tl.range(first_row, aligned_end, BR, num_stages=1):
        b, r, c = _axes(first_matrix, row, first_column, BB, BR, BC)
        totals = _sum_block(
            aligned_ptrs[N_PLANES], b, r, c, shape, aligned_columns, aligned_elements, common, s, row_part_ptr, totals,
            SQUARE_FN, PREAMBLE_FN, COMPUTE_DTYPE,
        )  # fmt: skip
    for row in tl.range(aligned_end, end, BR, num_stages=1):
        b, r, c = _axes(first_matrix, row, first_column, BB, BR, BC)
        totals = _sum_block(
            ptrs[N_PLANES], b, r, c, shape, n_columns, n_elements, common, s, row_part_ptr, totals,
            SQUARE_FN, PREAMBLE_FN, COMPUTE_DTYPE,
        )  # fmt: skip
    b, _, c = _axes(first_matrix, first_row, first_column, BB, BR, BC)
    column_part_ptr = part_ptr + shape[9] + first_row // TILE_ROWS * (n_matrices * n_columns)
    columns = tl.sum(totals, axis=1, keep_dims=True)
    tl.store(column_part_ptr + b * n_columns + c, columns, mask=(b < n_matrices) & (c < n_columns))


@triton.jit
def _advance(
    state_ptr, part_ptr, block, n_lines, n_parts, length, s, is_live,
    MOMENT_FN: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_LINES: tl.constexpr,
):  # fmt: skip
    """A block of the moments of rows, or of columns, each of which has `length` elements."""
    lines = block * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    totals = tl.zeros([BLOCK_PARTS, BLOCK_LINES], dtype=COMPUTE_DTYPE)
    for first in tl.range(0, n_parts, BLOCK_PARTS, num_stages=1):
        parts = first + tl.arange(0, BLOCK_PARTS)[:, None]
        mask = (parts < n_parts) & (lines[None, :] < n_lines)
        totals += tl.load(part_ptr + parts * n_lines + lines[None, :], mask=mask, other=0.0)
    mean = div(tl.sum(totals, axis=0), length.to(COMPUTE_DTYPE))
    mask = lines < tl.where(is_live, n_lines, 0)
    var = MOMENT_FN(tl.load(state_ptr + lines, mask=mask).to(COMPUTE_DTYPE), mean, s)
    tl.store(state_ptr + lines, cast(var, state_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def factored_moments(
    table_ptr,
    shape_ptr,
    line_ptr,
    rescale_ptr,
    noop_ptr,
    part_ptr,
    n_tensors,
    MOMENT_FN: tl.constexpr,
    SCALARS: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_PLANES: tl.constexpr,
    DTYPES: tl.constexpr,
    SKIP_ZERO_RESCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    SOURCE_HASH: tl.constexpr,
):
    """Moments of a block of rows or columns. line_ptr: int32 [n_blocks, 3], tensor, 0 or 1 (columns), which block."""
    tensor = tl.load(line_ptr + 3 * tl.program_id(0)).to(tl.int64)
    is_column = tl.load(line_ptr + 3 * tl.program_id(0) + 1) == 1
    block = tl.load(line_ptr + 3 * tl.program_id(0) + 2).to(tl.int64)
    shape = _load_shape(shape_ptr, tensor)
    ptrs, _, _ = load_pointers(table_ptr, tensor, 0, DTYPES, ())
    _, s, is_live = load_scalars(
        table_ptr, tensor, n_tensors, rescale_ptr, noop_ptr,
        SCALARS, N_SCALARS, N_SCALARS - 3, len(DTYPES), SKIP_ZERO_RESCALE, COMPUTE_DTYPE,
    )  # fmt: skip
    if is_column:
        _advance(
            ptrs[N_PLANES + 2], part_ptr + shape[9], block, shape[0] * shape[2], shape[5], shape[1], s, is_live,
            MOMENT_FN, COMPUTE_DTYPE, BLOCK_PARTS, BLOCK_LINES,
        )  # fmt: skip
    else:
        _advance(
            ptrs[N_PLANES + 1], part_ptr + shape[8], block, shape[0] * shape[1], shape[6], shape[2], s, is_live,
            MOMENT_FN, COMPUTE_DTYPE, BLOCK_PARTS, BLOCK_LINES,
        )  # fmt: skip


@triton.jit
def factored_means(
    table_ptr,
    shape_ptr,
    matrix_ptr,
    mean_ptr,
    N_PLANES: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BB: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Mean over the row moments of each of BB matrices. matrix_ptr: int32 [n_blocks, 2], tensor and which block."""
    tensor = tl.load(matrix_ptr + 2 * tl.program_id(0)).to(tl.int64)
    block = tl.load(matrix_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    shape = _load_shape(shape_ptr, tensor)
    ptrs, _, _ = load_pointers(table_ptr, tensor, 0, DTYPES, ())
    b = block * BB + tl.arange(0, BB)[:, None]
    totals = tl.zeros([BB, BLOCK_ROWS], dtype=COMPUTE_DTYPE)
    for first in tl.range(0, shape[1], BLOCK_ROWS, num_stages=1):
        r = first + tl.arange(0, BLOCK_ROWS)[None, :]
        mask = (b < shape[0]) & (r < shape[1])
        totals += tl.load(ptrs[N_PLANES + 1] + b * shape[1] + r, mask=mask, other=0.0).to(COMPUTE_DTYPE)
    means = div(tl.sum(totals, axis=1, keep_dims=True), shape[1].to(COMPUTE_DTYPE))
    tl.store(mean_ptr + shape[10] + b, means, mask=b < shape[0])


@triton.jit
def _apply_block(
    ptrs, b, r, c, shape, n_columns, n_elements, common, s, col_var, row_mean, sums, totals,
    FUNCTIONS: tl.constexpr, PREAMBLE_FN: tl.constexpr, N_PLANES: tl.constexpr, LOAD_FN: tl.constexpr,
    STORE_FN: tl.constexpr, IS_UPDATE: tl.constexpr, COMPUTE_DTYPE: tl.constexpr,
):  # fmt: skip
    """Update a block of weights, or form its share of the sums of squares. FUNCTIONS: see the module, in that order."""
    is_factored = shape[4] == 1
    offsets, mask = _elements(b, r, c, shape[0], shape[1], n_columns, n_elements)
    w = LOAD_FN(ptrs[:N_PLANES], offsets, mask, COMPUTE_DTYPE)
    g = load_grad(ptrs[N_PLANES], offsets, mask, common, PREAMBLE_FN, COMPUTE_DTYPE)
    # What does not apply to this tensor is masked off and costs no memory access.
    row_mask = (b < tl.where(is_factored, shape[0], 0)) & (r < shape[1])
    row_var = tl.load(ptrs[N_PLANES + 1] + b * shape[1] + r, mask=row_mask, other=1.0).to(COMPUTE_DTYPE)
    whole_mask = mask & (offsets < tl.where(is_factored, 0, n_elements))
    whole = tl.load(ptrs[N_PLANES + 2] + offsets, mask=whole_mask, other=1.0).to(COMPUTE_DTYPE)
    if not IS_UPDATE:
        whole = FUNCTIONS[1](whole, FUNCTIONS[0](g, s), s)
        tl.store(ptrs[N_PLANES + 2] + offsets, cast(whole, ptrs[N_PLANES + 2].dtype.element_ty), mask=whole_mask)
    var = tl.where(is_factored, FUNCTIONS[2](row_var, col_var, row_mean, s), whole)
    direction = FUNCTIONS[3](g, var, s)
    if IS_UPDATE:
        STORE_FN(ptrs[:N_PLANES], offsets, mask, FUNCTIONS[4](w, direction, s, sums[0], sums[1]))
        return totals
    else:
        squares = (tl.where(mask, w * w, 0.0), tl.where(mask, direction * direction, 0.0))
        return totals[0] + squares[0], totals[1] + squares[1]


@triton.jit(
    repr=lambda spec: "factored_update" if spec.constants["IS_UPDATE"] else "factored_norms",
    do_not_specialize=_UNSPECIALIZED,
)
def factored_apply(
    table_ptr,
    shape_ptr,
    tile_ptr,
    rescale_ptr,
    noop_ptr,
    mean_ptr,
    partial_ptr,
    sum_ptr,
    n_tensors,
    FUNCTIONS: tl.constexpr,
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
    IS_UPDATE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BB: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    SOURCE_HASH: tl.constexpr,
):
    """A tile of weights (IS_UPDATE), or its sums of squares of weight and direction: partial_ptr, fp64 [n_tiles, 2].

    sum_ptr: fp64 [n_tensors, 2], these sums over whole tensors.
    """
    tensor, shape, tile, first_matrix, first_row, first_column = _locate(tile_ptr, shape_ptr, TILE_ROWS, BB, BC)
    n_matrices, n_rows, n_columns, n_elements = shape[0], shape[1], shape[2], shape[3]
    ptrs, aligned_ptrs, is_aligned = load_pointers(table_ptr, tensor, len(DTYPES), DTYPES, ())
    common, s, is_live = load_scalars(
        table_ptr, tensor, n_tensors, rescale_ptr, noop_ptr,
        SCALARS, N_SCALARS, N_SCALARS - 3, len(DTYPES), SKIP_ZERO_RESCALE, COMPUTE_DTYPE,
    )  # fmt: skip
    b, _, c = _axes(first_matrix, first_row, first_column, BB, BR, BC)
    is_factored = shape[4] == 1
    mask = b < tl.where(is_factored, n_matrices, 0)
    row_mean = tl.load(mean_ptr + shape[10] + b, mask=mask, other=1.0)
    col_ptr = ptrs[N_PLANES + 2] + b * n_columns + c
    col_var = tl.load(col_ptr, mask=mask & (c < n_columns), other=1.0).to(COMPUTE_DTYPE)
    sums = ()
    totals = ()
    if IS_UPDATE:
        n = n_elements.to(tl.float64)
        sums = (tl.load(sum_ptr + 2 * tensor) / n, tl.load(sum_ptr + 2 * tensor + 1) / n)
    else:
        totals = (tl.zeros([BB, BR, BC], dtype=COMPUTE_DTYPE), tl.zeros([BB, BR, BC], dtype=COMPUTE_DTYPE))

    end = tl.where(is_live, tl.minimum(first_row + TILE_ROWS, n_rows), first_row)
    is_aligned = is_aligned & (n_columns % VECTOR == 0) & (n_elements % VECTOR == 0)
    aligned_end = tl.where(is_aligned, end, first_row)
    aligned_columns = tl.multiple_of(tl.where(is_aligned, n_columns, 0), VECTOR)
    aligned_elements = tl.multiple_of(tl.where(is_aligned, n_elements, 0), VECTOR)
    for row in tl.range(first_row, aligned_end, BR, num_stages=1):
        b, r, c = _axes(first_matrix, row, first_column, BB, BR, BC)
        totals = _apply_block(
            aligned_ptrs, b, r, c, shape, aligned_columns, aligned_elements, common, s, col_var, row_mean, sums, totals,
            FUNCTIONS, PREAMBLE_FN, N_PLANES, LOAD_FN, STORE_FN, IS_UPDATE, COMPUTE_DTYPE,
        )  # fmt: skip
    for row in tl.range(aligned_end, end, BR, num_stages=1):
        b, r, c = _axes(first_matrix, row, first_column, BB, BR, BC)
        totals = _apply_block(
            ptrs, b, r, c, shape, n_columns, n_elements, common, s, col_var, row_mean, sums, totals,
            FUNCTIONS, PREAMBLE_FN, N_PLANES, LOAD_FN, STORE_FN, IS_UPDATE, COMPUTE_DTYPE,
        )  # fmt: skip
    for i in tl.static_range(len(totals)):
        total = tl.sum(tl.sum(tl.sum(totals[i], axis=2), axis=1), axis=0)
        tl.store(partial_ptr + 2 * (shape[7] + tile) + i, total.to(tl.float64))
