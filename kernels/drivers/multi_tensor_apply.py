"""The driver: one launch applies an update function to every tensor of a list.

Tables, all in device memory, that the host half (tritopt/engine/plan.py) builds:

    tensor_ptr   int64 [n_tensors, 3]               number of elements, the tensor's first chunk, elements of a row
    chunk_ptr    int32 [n_chunks]                   the tensor a chunk belongs to; one program per chunk
    table_ptr    int64 [n_tensors, n_pointers + 1]  addresses (weight, gradient, states, rows), index of its scalars
                 fp64  [n_rows, n_scalars]          behind it, in the same buffer: rescale, clip, wd, the optimizer's
    partial_ptr  fp64  [n_chunks, N_TOTALS]         sums that this phase emits, per chunk; then what it tracks
    sum_ptr      fp64  [n_tensors, n_earlier]       sums that earlier phases emitted, per tensor
    noise_ptr    int64 [n_tensors, 4]               `Task.noise`, where a format draws
    scratch_ptr  or None: elements that one phase hands on to the next, for UPDATE_FN one more state
    scratch_at_ptr  int64 [n_tensors]               a tensor's first element there, at a multiple of 16 bytes

The update function is pure arithmetic on blocks of the compute dtype. It returns the new weight and states, and a phase
with N_SUMS > 0 also a tuple of blocks to be summed over each tensor:

    UPDATE_FN(w, g, state, s)           sums, where phases before emitted some: fp64 scalars of this tensor
    UPDATE_FN(w, g, state, s, sums)     place, where the phase asks for it: int64 offsets of the elements in their
    UPDATE_FN(w, g, state, s, place)    tensor, and (the first,) if they are a run that begins with a multiple of 8
"""

from __future__ import annotations

from tritopt.kernels.assembly import after
from tritopt.kernels.drivers.tables import load_last_scalar, load_pointers, load_scalars, load_tuple
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import widen
from tritopt.kernels.telemetry import add_terms, track_gradient, track_update, zeros


# Its branches are on compile-time arguments: the compiler folds them, and a function for each would be handed all of
# this one's 21 arguments.
@triton.jit
def _apply_block(  # noqa: C901
    ptrs,
    start,
    offsets,
    mask,
    row_width,
    common,
    s,
    sums,
    noise,
    totals,
    UPDATE_FN: tl.constexpr,
    PREAMBLE_FN: tl.constexpr,
    FORMATS: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    READS_OFFSETS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    N_SUMS: tl.constexpr,
    TRACKS: tl.constexpr,
    SHOWN_FN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
):
    """Update one block of one tensor.

    FORMATS: (first pointer, last + 1, load, store, draws) of the weight, then of each state. READS and WRITES:
    what this phase moves of the weight, the gradient and each state.
    """
    g = None
    terms = ()
    if READS[1]:
        g = tl.load(ptrs[FORMATS[0][1]] + offsets, mask=mask)
        # Where nothing else is read, the compiler loads the gradients of four blocks first, unless `widen` is there.
        if READS[0]:
            g = widen(g, COMPUTE_DTYPE)
        else:
            g = g.to(COMPUTE_DTYPE)
    if TRACKS[0]:
        terms = track_gradient(g)
    if HAS_ROWS:
        # The gradient holds some rows of the weight, and the last table which: from here on, the weight's own offsets.
        row = offsets // row_width
        offsets += (tl.load(ptrs[-1] + row, mask=mask) - row) * row_width
    w = ()  # not None, which Triton 3.6 cannot hand back
    if READS[0]:
        w = FORMATS[0][2](ptrs[: FORMATS[0][1]], offsets, mask, COMPUTE_DTYPE)
    state = ()
    for i in tl.static_range(1, len(FORMATS)):
        if READS[i + 1]:
            planes = ptrs[FORMATS[i][0] : FORMATS[i][1]]
            state = state + (FORMATS[i][2](planes, offsets, mask, COMPUTE_DTYPE),)

    if READS[1]:
        rescale = common[0]
        if READS[0] and mask is None:
            rescale = after(rescale, w, (row_width >> 63).to(tl.int32))
        g = PREAMBLE_FN(w, g, rescale, common[1], common[2])
    if READS_OFFSETS:
        first = ()
        if mask is None and not HAS_ROWS:
            first = (start,)
        new = UPDATE_FN(w, g, state, s, (offsets, first))
    elif len(sums) > 0:
        new = UPDATE_FN(w, g, state, s, sums)
    else:
        new = UPDATE_FN(w, g, state, s)

    rounded = None
    for i in tl.static_range(0, len(FORMATS)):
        if WRITES[0] if i == 0 else WRITES[i + 1]:
            tl.static_assert(i <= len(new[1]), "an update must return the weight and a tuple of all states")
            planes = ptrs[FORMATS[i][0] : FORMATS[i][1]]
            value = new[0] if i == 0 else new[1][i - 1]
            if FORMATS[i][4]:
                at = tl.full([], i, tl.int32)  # a bare number is none that Triton 3.6 puts into a tuple
                stored = FORMATS[i][3](planes, offsets, mask, value, start, noise + (at,))
            else:
                stored = FORMATS[i][3](planes, offsets, mask, value)
            if i == 0:
                rounded = stored
    if TRACKS[1]:
        terms = terms + track_update(w, new[0], SHOWN_FN(ptrs[: FORMATS[0][1]], w), rounded)
    if N_SUMS > 0:
        terms = new[2] + terms
    return add_terms(totals, terms, mask)


@triton.jit(
    repr=lambda spec: f"multi_tensor_{spec.constants['UPDATE_FN'].__name__}",
    do_not_specialize=["n_tensors"],  # a list of another length runs the same code
)
def multi_tensor_apply(
    table_ptr,
    tensor_ptr,
    chunk_ptr,
    rescale_ptr,
    noop_ptr,
    partial_ptr,
    sum_ptr,
    noise_ptr,
    n_tensors,
    scratch_ptr,
    scratch_at_ptr,
    UPDATE_FN: tl.constexpr,
    PREAMBLE_FN: tl.constexpr,
    SCALARS: tl.constexpr,
    N_SCALARS: tl.constexpr,
    N_OWN_SCALARS: tl.constexpr,
    FORMATS: tl.constexpr,
    DTYPES: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    READS_OFFSETS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    N_EARLIER_SUMS: tl.constexpr,
    N_SUMS: tl.constexpr,
    N_TOTALS: tl.constexpr,
    TRACKS: tl.constexpr,
    SHOWN_FN: tl.constexpr,
    SKIP_ZERO_RESCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TAIL_SIZE: tl.constexpr,
    UNROLL: tl.constexpr,
    SOURCE_HASH: tl.constexpr,
):
    """Apply UPDATE_FN to chunk `program_id(0)`.

    rescale_ptr, a device scalar, multiplies the table's rescale: NaN or Inf skips the update, so does 0 where
    SKIP_ZERO_RESCALE. noop_ptr: a device flag; not 0 skips. SOURCE_HASH is not read: Triton's disk cache sees neither
    the source of functions inside tuples nor the fields of SCALARS, so a change of those must change the key.
    ALIGNED: for each pointer whether full blocks go through it by 128-bit accesses, or element by element; empty: all
    do. A tensor whose addresses are less aligned is taken for a tail.
    TRACKS: whether to sum up the gradient, and the update (kernels/telemetry.py).
    """
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_ptr + chunk).to(tl.int64)
    n_elements = tl.load(tensor_ptr + 3 * tensor)
    start = (chunk - tl.load(tensor_ptr + 3 * tensor + 1)).to(tl.int64) * CHUNK_SIZE

    row_width = tl.load(tensor_ptr + 3 * tensor + 2)

    ptrs, block_ptrs, has_blocks = load_pointers(table_ptr, tensor, len(DTYPES), DTYPES, ALIGNED)
    common, s, is_live = load_scalars(
        table_ptr, tensor, n_tensors, rescale_ptr, noop_ptr,
        SCALARS, N_SCALARS, N_OWN_SCALARS, len(DTYPES), SKIP_ZERO_RESCALE, COMPUTE_DTYPE,
    )  # fmt: skip
    sums = ()
    if N_EARLIER_SUMS > 0:
        sums = load_tuple(sum_ptr + tensor * N_EARLIER_SUMS, N_EARLIER_SUMS, tl.float64)

    if scratch_ptr is not None:
        scratch = scratch_ptr + tl.load(scratch_at_ptr + tensor)
        ptrs = ptrs + (scratch,)
        block_ptrs = block_ptrs + (tl.multiple_of(scratch, 16),)

    noise = ()
    if noise_ptr is not None:
        step = load_last_scalar(table_ptr, tensor, n_tensors, N_SCALARS, len(DTYPES)).to(tl.int32).to(tl.uint32)
        noise = load_tuple(noise_ptr + 4 * tensor, 4, tl.int64)
        # Eight neighbours must share a Philox call in full blocks.
        has_blocks = has_blocks & ((noise[1] | noise[2] | noise[3]) % 8 == 0)
        noise = noise + (step,)

    n_here = tl.where(is_live, tl.minimum(n_elements - start, CHUNK_SIZE), 0).to(tl.int32)
    # 128-bit accesses need 16-byte aligned planes and no mask, so a tensor's full blocks take a branch of their own.
    # Its tail takes the masked one. Blocks are smaller there: each of a thread's elements has a pointer for each plane,
    # and registers are for both. Tensors of which a plane is not aligned (views into a flat buffer) are a group of
    # their own, so that nobody else is slowed.
    n_full = tl.where(has_blocks, n_here // BLOCK_SIZE, 0) * BLOCK_SIZE
    totals = zeros(N_TOTALS, BLOCK_SIZE, COMPUTE_DTYPE)
    for at in tl.range(0, n_full, BLOCK_SIZE, num_stages=1, loop_unroll_factor=UNROLL):
        first = start + at
        totals = _apply_block(
            block_ptrs, first, first + tl.arange(0, BLOCK_SIZE), None, row_width, common, s, sums, noise, totals,
            UPDATE_FN, PREAMBLE_FN, FORMATS, READS, WRITES, READS_OFFSETS, HAS_ROWS, N_SUMS, TRACKS, SHOWN_FN,
            COMPUTE_DTYPE,
        )  # fmt: skip
    tail_totals = zeros(N_TOTALS, TAIL_SIZE, COMPUTE_DTYPE)
    for at in tl.range(n_full, n_here, TAIL_SIZE, num_stages=1):
        first = start + at
        offsets = first + tl.arange(0, TAIL_SIZE)
        tail_totals = _apply_block(
            ptrs, first, offsets, offsets < n_elements, row_width, common, s, sums, noise, tail_totals,
            UPDATE_FN, PREAMBLE_FN, FORMATS, READS, WRITES, READS_OFFSETS, HAS_ROWS, N_SUMS, TRACKS, SHOWN_FN,
            COMPUTE_DTYPE,
        )  # fmt: skip
    if TRACKS[0]:
        # What of a tensor is not finite shows in the very steps that are skipped for it.
        n_skipped = tl.where(is_live, 0, tl.minimum(n_elements - start, CHUNK_SIZE)).to(tl.int32)
        for at in tl.range(0, n_skipped, TAIL_SIZE, num_stages=1):
            offsets = start + at + tl.arange(0, TAIL_SIZE)
            g = tl.load(ptrs[FORMATS[0][1]] + offsets, mask=offsets < n_elements).to(COMPUTE_DTYPE)
            tracked = add_terms(
                tail_totals[N_SUMS:], track_gradient(g) + tail_totals[N_SUMS + 2 :], offsets < n_elements
            )
            tail_totals = tail_totals[:N_SUMS] + tracked
    for i in tl.static_range(N_TOTALS):
        total = tl.sum(totals[i]) + tl.sum(tail_totals[i])
        tl.store(partial_ptr + chunk * N_TOTALS + i, total.to(tl.float64))
