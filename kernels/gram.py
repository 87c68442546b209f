"""One triangle of symmetric products of matrices, for Newton-Schulz iterations (tritopt/engine/gram.py)."""

from __future__ import annotations

from tritopt.kernels.language import INTERPRETED, tl, triton
from tritopt.kernels.ops import cast, widen

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def gram(
    x_ptr,
    added_ptr,  # [M, M] each, symmetric and contiguous; None: nothing is added
    out_ptr,  # [M, M] each, contiguous
    alpha,
    beta,
    M,
    K,
    stride_b,
    stride,  # of the rows of X, or of X^T if that is what lies in memory; the other stride is 1
    IS_TRANSPOSED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # 8 divides sizes and strides
    IS_WHOLE: tl.constexpr,  # tiles divide sizes too, so that nothing is masked
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = X X^T, or alpha X X^T + beta added, for each X [M, K] of a batch, symmetric to the bit; sums in fp32.

    A program has one tile on or below the diagonal, and stores its transpose above. The triangle is folded into a
    rectangle without gaps: row i of tiles beside row n - 1 - i, or n - i where n is odd.
    """
    if IS_ALIGNED:
        # The compiler sees how wide accesses may be, ahead of time too: `tl.multiple_of` says nothing of arguments.
        M, K, stride_b, stride = M // 8 * 8, K // 8 * 8, stride_b // 8 * 8, stride // 8 * 8
    stride_m, stride_k = (1, stride) if IS_TRANSPOSED else (stride, 1)
    n = tl.cdiv(M, BLOCK_SIZE)
    height, width = (n + 1) // 2, n | 1
    pid = tl.program_id(0)
    batch, pid = (pid // (height * width)).to(tl.int64), pid % (height * width)
    # Programs that run together share tiles of X in the cache.
    i, j = tl.swizzle2d(pid // width, pid % width, height, width, GROUP)
    is_long = j < n - i
    row = tl.where(is_long, n - 1 - i, i - n % 2) * BLOCK_SIZE
    column = tl.where(is_long, j, j - (n - i)) * BLOCK_SIZE

    x_ptr += batch * stride_b
    tile, ks = tl.arange(0, BLOCK_SIZE), tl.arange(0, BLOCK_K)
    left_ptrs = x_ptr + row.to(tl.int64) * stride_m + (tile[:, None] * stride_m + ks[None, :] * stride_k)
    right_ptrs = x_ptr + column.to(tl.int64) * stride_m + (ks[:, None] * stride_k + tile[None, :] * stride_m)
    total = tl.zeros((BLOCK_SIZE, BLOCK_SIZE), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if IS_WHOLE:
            left, right = tl.load(left_ptrs), tl.load(right_ptrs)
        else:
            left = tl.load(left_ptrs, mask=(tile[:, None] < M - row) & (ks[None, :] < K - k), other=0.0)
            right = tl.load(right_ptrs, mask=(ks[:, None] < K - k) & (tile[None, :] < M - column), other=0.0)
        if _INTERPRETED:
            # It multiplies the bits of bf16 as integers.
            left, right = widen(left, tl.float32), widen(right, tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_ptrs += BLOCK_K * stride_k
        right_ptrs += BLOCK_K * stride_k

    at = batch * M * M + row.to(tl.int64) * M + column + (tile[:, None] * M + tile[None, :])
    mask = None if IS_WHOLE else (tile[:, None] < M - row) & (tile[None, :] < M - column)
    if added_ptr is not None:
        total = alpha * total + beta * widen(tl.load(added_ptr + at, mask=mask), tl.float32)
    below = cast(total, out_ptr.dtype.element_ty)
    above = tl.trans(below)
    if row == column:
        # An element and its mirror image may have been added up in another order.
        below = tl.where(tile[:, None] >= tile[None, :], below, above)
    else:
        above_at = batch * M * M + column.to(tl.int64) * M + row + (tile[:, None] * M + tile[None, :])
        # Rows of a tile above the diagonal are columns of one below it, none of which stands out.
        tl.store(out_ptr + above_at, above, mask=None if IS_WHOLE else tile[None, :] < M - row)
    tl.store(out_ptr + at, below, mask=mask)
