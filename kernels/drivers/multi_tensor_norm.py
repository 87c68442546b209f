"""Per-tensor reductions in stages, bit-identical from run to run: no atomics, and an order that is always the same.

Stage 1 is a phase of the driver that emits sums per chunk. Stage 2, here, adds a tensor's chunks in fp64. Of a tensor
with more than BLOCK_SIZE chunks it adds each BLOCK_SIZE of them first, by `sum_blocks`, and then these sums, lane by
lane of a block and then in a tree. One program would read 64,128 partial sums of Llama-3's embedding in 63 turns.
"""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, is_finite, sqrt


@triton.jit
def square_update(w, g, state, s):
    """Emits sum(w^2), writes nothing: a norm over a list is the driver with this update function."""
    return w, state, (w * w,)


@triton.jit(do_not_specialize=["n_chunks", "n_tensors"])
def sum_partials(partial_ptr, tensor_ptr, sum_ptr, n_chunks, n_tensors, N_SUMS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """sum_ptr[tensor, i] = sum of partial_ptr[chunk, i] over the tensor's chunks; one program per tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    first = tl.load(tensor_ptr + 3 * tensor + 1)
    is_last = tensor + 1 == n_tensors
    end = tl.where(is_last, n_chunks, tl.load(tensor_ptr + 3 * tensor + 4, mask=~is_last, other=0))
    for i in tl.static_range(N_SUMS):
        total = tl.zeros([BLOCK_SIZE], dtype=tl.float64)
        for start in tl.range(first, end, BLOCK_SIZE, num_stages=1):
            chunks = start + tl.arange(0, BLOCK_SIZE)
            total += tl.load(partial_ptr + chunks * N_SUMS + i, mask=chunks < end, other=0.0)
        tl.store(sum_ptr + tensor * N_SUMS + i, tl.sum(total))


@triton.jit
def sum_blocks(partial_ptr, tensor_ptr, long_ptr, block_ptr, sum_ptr, N_SUMS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """sum_ptr[block, i] = sum of partial_ptr[chunk, i] over up to BLOCK_SIZE chunks of a tensor; one program per block.

    tensor_ptr: the driver's table. long_ptr, block_ptr: the same tables with chunks in place of elements, and blocks of
    them in place of chunks.
    """
    block = tl.program_id(0).to(tl.int64)
    tensor = tl.load(block_ptr + block).to(tl.int64)
    first = (block - tl.load(long_ptr + 3 * tensor + 1)) * BLOCK_SIZE
    chunks = first + tl.arange(0, BLOCK_SIZE)
    is_there = chunks < tl.load(long_ptr + 3 * tensor)
    ptrs = partial_ptr + (tl.load(tensor_ptr + 3 * tensor + 1) + chunks) * N_SUMS
    for i in tl.static_range(N_SUMS):
        tl.store(sum_ptr + block * N_SUMS + i, tl.sum(tl.load(ptrs + i, mask=is_there, other=0.0)))


@triton.jit(do_not_specialize=["n"])
def clip_factor(
    square_ptr, n, max_norm_ptr, inverse_ptr, norm_ptr, factor_ptr, EPSILON: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """norm = sqrt(sum of n squares) * inverse; factor = min(1, max_norm / (norm + EPSILON)) * inverse.

    All fp64 but for norm_ptr, fp32. inverse_ptr, that of a loss scale, may be None. The factor is NaN, which skips an
    update, where the norm is not finite.
    """
    total = tl.zeros([BLOCK_SIZE], dtype=tl.float64)
    for start in tl.range(0, n, BLOCK_SIZE, num_stages=1):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        total += tl.load(square_ptr + offsets, mask=offsets < n, other=0.0)
    norm = sqrt(tl.sum(total))
    if inverse_ptr is not None:
        norm = norm * tl.load(inverse_ptr)
    factor = div(tl.load(max_norm_ptr), norm + EPSILON)
    factor = tl.where(factor < 1, factor, 1.0)
    if inverse_ptr is not None:
        factor = factor * tl.load(inverse_ptr)
    tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(factor_ptr, tl.where(is_finite(norm), factor, float("nan")))
