"""Random numbers by counter; kernels/twins/random.py has the twins, and says what the numbers depend on.

A key is four 16-bit numbers and a step is below 2^24, which every compute dtype holds exactly: so they can stand among
an optimizer's scalars.
"""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import sqrt

_ROUNDS = tl.constexpr(7)


@triton.jit
def philox(key, offsets, step, STREAM: tl.constexpr):
    """Call Philox4x32-7 on the counters (low word of the offset, high word, step, stream): four uint32 blocks."""
    seed = tl.zeros([], dtype=tl.int64)
    for i in tl.static_range(4):
        seed = seed | (key[i].to(tl.int64) << (16 * i))
    low = offsets.to(tl.uint32)
    zero = low * 0
    third, fourth = zero + step.to(tl.int32).to(tl.uint32), zero + STREAM
    return tl.philox(seed, low, (offsets >> 32).to(tl.uint32), third, fourth, _ROUNDS)


@triton.jit
def _minus_two_log(word):
    """-2 ln((word | 1) / 2^32), fp32; never negative."""
    x = (word | 1).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    # x = 2^exponent (1 + y) with 1 + y in [sqrt(1/2), sqrt(2)); 0x3F3504F3 is sqrt(1/2).
    exponent = (bits - 0x3F3504F3) >> 23
    y = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((-0.174447119 * y + 0.287336886) * y - 0.299045354) * y + 0.331247866
    p = ((p * y - 0.399136662) * y + 0.500041485) * y - 0.666683733
    p = (p * y + 0.999999762) * y - 2.0
    return (32 - exponent).to(tl.float32) * 1.38629436 + p * y


@triton.jit
def _sine(x):
    """sin(x pi / 2) for fp32 x in [0, 1]."""
    y = x * x
    p = ((0.000151485132 * y - 0.00467376644) * y + 0.0796896815) * y - 0.645963728
    return (p * y + 1.57079637) * x


@triton.jit
def _normals(for_size, for_angle):
    """Two standard normal fp32 numbers: Box and Muller."""
    size, x = sqrt(_minus_two_log(for_size)), (for_angle >> 2).to(tl.float32) * 2.0**-30
    first, second = size * _sine(x), size * _sine(1.0 - x)
    return tl.where((for_angle & 1) == 0, first, -first), tl.where((for_angle & 2) == 0, second, -second)


@triton.jit
def normal(key, place, step, STREAM: tl.constexpr):
    """A standard normal fp32 number per offset. Four neighbours share a Philox call.

    place: offsets; and (the first,) if they are a run that begins with a multiple of four, otherwise ().
    """
    offsets, first = place
    if len(first) > 0:
        words = philox(key, (first[0] >> 2) + tl.arange(0, offsets.shape[0] // 4), step, STREAM)
        one, two = _normals(words[0], words[1])
        three, four = _normals(words[2], words[3])
        return tl.reshape(tl.join(tl.join(one, three), tl.join(two, four)), [offsets.shape[0]])
    else:
        words = philox(key, offsets >> 2, step, STREAM)
        is_early = (offsets & 2) == 0
        one, two = _normals(tl.where(is_early, words[0], words[2]), tl.where(is_early, words[1], words[3]))
        return tl.where((offsets & 1) == 0, one, two)


_ROUNDING = tl.constexpr(1)  # the stream of rounding; 0 is an optimizer's own


@triton.jit
def random_bits16(noise, start, offsets, mask):
    """Draw 16 random bits for each element, uint32.

    Args:
        noise: tuple of what the bits depend on:
            key: int64, a hash of the seed and the parameter.
            first: position in the whole parameter of the element whose offset here is 0.
            width, gap: length of a row here, and how much longer it is in the whole parameter; gap is 0 where what is
                here is one run of it.
            step: number of the update, uint32.
            shift: how many places on among eight neighbours an element takes its bits from; 0 for the weight, i + 1
                for state i, so that all of them may share a call.
        start: the first of the offsets.
        offsets: of the elements here.
        mask: None for a full block, where start, first, width and gap are multiples of eight.

    A Philox call makes four words of 32 bits, which are enough for eight neighbours:

        position % 8    0      1      2      3      4      5      6      7
        word            0      0      1      1      2      2      3      3
        its half        low    high   low    high   low    high   low    high     (shift 0)

    In a full block each call is one element of a shorter block, and the halves are joined so that a call's eight lie
    with one thread, as those of 128-bit accesses do: of eight equal calls the compiler would make eight, in a layout of
    its own.
    """
    key, first, width, gap, step, shift = noise
    if mask is None:
        group = (start >> 3) + tl.arange(0, offsets.shape[0] // 8)
        if gap != 0:
            group += (group.to(tl.uint32) // (width >> 3).to(tl.uint32)).to(tl.int64) * (gap >> 3)
        words = _rounding_words(key, group + (first >> 3), step)
        halves = ()
        for i in tl.static_range(8):
            halves = halves + (_half(words, (i + shift) & 7),)
        # The join made last is of places next to each other, the one made first of those four apart.
        even = tl.join(tl.join(halves[0], halves[4]), tl.join(halves[2], halves[6]))
        odd = tl.join(tl.join(halves[1], halves[5]), tl.join(halves[3], halves[7]))
        return tl.reshape(tl.join(even, odd), [offsets.shape[0]])
    else:
        position = first + offsets
        if gap != 0:
            position += (offsets // width) * gap
        lane = ((position + shift) & 7).to(tl.int32)
        words = _rounding_words(key, position >> 3, step)
        return _half(words, lane)


@triton.jit
def _half(words, i):
    """Take the i-th of the eight halves of four words."""
    word = tl.where(i < 2, words[0], tl.where(i < 4, words[1], tl.where(i < 6, words[2], words[3])))
    return tl.where((i & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _rounding_words(key, group, step):
    """Call Philox for each group of eight elements: four uint32 blocks."""
    low = group.to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, (group >> 32).to(tl.uint32), zero + step, zero + _ROUNDING, _ROUNDS)
