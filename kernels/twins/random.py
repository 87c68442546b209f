"""Random numbers by counter: Philox4x32-7 (Salmon et al. 2011), as kernels/random.py draws them, to the bit.

A number is a function of (seed, parameter, element, step, stream) and of nothing else: not of chunks, launches, the
order of parameters, memory layout, device or process. Seed and parameter are hashed into the key, on the host. The
counter is (low word of the element's offset in its tensor, high word, step, stream): so a step that is counted on the
device needs no new key. Streams keep apart what draws for the same element in the same step: 0 is an optimizer's own.
Seven rounds are the fewest with which Philox4x32 passes BigCrush (table 2 there); cuRAND's ten are a margin of safety.
Normal numbers come from additions, multiplications and a root, each rounded to nearest, because no two libraries agree
on the last bits of a logarithm.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from tritopt.kernels.memory import is_dense
from tritopt.kernels.twins.ops import sqrt

Key: TypeAlias = tuple[float, float, float, float]
"""Four 16-bit numbers, lowest first, which every compute dtype holds exactly: it can stand among scalars."""
Words: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Words of 32 bits: int64 in [0, 2^32)."""
STEPS = 2**24
"""Number of steps that fp32 scalars tell apart; after them steps begin anew, and the numbers with them."""
_WORD = 2**32 - 1
_ROUNDING = 1  # the stream of rounding
_ROUNDS = 7


class Noise(NamedTuple):
    """Everything that the random bits of one parameter at one step depend on."""

    key: int
    """64 bits, signed: a hash of the seed and the parameter."""
    first: int
    """Position of the first element here in the whole parameter."""
    width: int
    """Elements here of a row, or of what is split instead; 0: what is here is one run of the whole parameter."""
    gap: int
    """Number of positions of the whole parameter between the end of one row here and the start of the next."""
    step: float
    """Number of the step, in [0, STEPS)."""
    row_major: bool = False
    """Whether elements are numbered in the usual order of dimensions, and not as they lie in memory."""
    shift: int = 0
    """Number of places, among eight neighbours, from an element to the one whose bits it takes; see `random_bits16`."""

    def bits16(self, plane: torch.Tensor) -> torch.Tensor:
        """Draw 16 bits for each element of a plane, int64: the twin of `random_bits16`."""
        n = plane.numel()
        if self.gap:
            places = torch.arange(n, dtype=torch.int64, device=plane.device)
            position = self.first + places + places // self.width * self.gap
            groups, which = torch.unique_consecutive(position >> 3, return_inverse=True)
            bits = self._of_groups(groups).view(-1)[which * 8 + (position & 7)]
        else:
            ends = self.first >> 3, (self.first + n + 7) >> 3
            groups = torch.arange(*ends, dtype=torch.int64, device=plane.device)
            bits = self._of_groups(groups).view(-1)[self.first & 7 :][:n]
        in_memory = is_dense(plane) and not self.row_major
        return bits.clone().as_strided(plane.shape, plane.stride()) if in_memory else bits.reshape(plane.shape)

    def _of_groups(self, groups: torch.Tensor) -> torch.Tensor:
        """Draw 16 bits for the eight elements of each group, int64 [groups, 8]."""
        zero = torch.zeros_like(groups)
        counter = (groups & _WORD, (groups >> 32) & _WORD, zero + int(self.step), zero + _ROUNDING)
        words = torch.stack(philox4x32((self.key & _WORD, self.key >> 32 & _WORD), counter), dim=1)
        return torch.stack((words & 0xFFFF, words >> 16), dim=2).view(-1, 8).roll(-self.shift, 1)


def philox(key: Key, offsets: torch.Tensor, step: float, stream: int) -> Words:
    """Four words for each offset. step: an integer in [0, STEPS). stream: a word."""
    first, second, third, fourth = map(int, key)
    zero = torch.zeros_like(offsets)
    counter = (offsets & _WORD, (offsets >> 32) & _WORD, zero + int(step), zero + stream)
    return philox4x32((first | second << 16, third | fourth << 16), counter)


def philox4x32(words: tuple[int, int], counter: Words) -> Words:
    """Four words out of a counter, under a key of two words.

    >>> [hex(int(word)) for word in philox4x32((0, 0), (torch.zeros((), dtype=torch.int64),) * 4)]
    ['0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']
    """
    key0, key1 = words
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, whose bits are those of the product
        c0, c1, c2, c3 = _high(second) ^ c1 ^ key0, second & _WORD, _high(first) ^ c3 ^ key1, first & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _high(product: torch.Tensor) -> torch.Tensor:
    return (product >> 32) & _WORD


def normal(key: Key, offsets: torch.Tensor, step: float, stream: int) -> torch.Tensor:
    """A standard normal fp32 number for each offset: Box and Muller, two from two words, so four from a Philox call.

    The radius has 32 random bits, so that no number is beyond 6.7; the angle is one of a quarter turn, and two signs.
    """
    words = philox(key, offsets >> 2, step, stream)
    is_early = (offsets & 2) == 0
    for_size, for_angle = torch.where(is_early, words[0], words[2]), torch.where(is_early, words[1], words[3])
    x = (for_angle >> 2).float() * 2.0**-30
    is_first = (offsets & 1) == 0
    size = sqrt(_minus_two_log(for_size)) * _sine(torch.where(is_first, x, 1.0 - x))
    return torch.where((for_angle & torch.where(is_first, 1, 2)) == 0, size, -size)


def _minus_two_log(word: torch.Tensor) -> torch.Tensor:
    """-2 ln((word | 1) / 2^32), fp32, never negative, to within 2 epsilons of its size."""
    bits = (word | 1).float().view(torch.int32)
    # As fp32, word | 1 = 2^exponent (1 + y) with 1 + y in [sqrt(1/2), sqrt(2)); 0x3F3504F3 is sqrt(1/2).
    exponent = (bits - 0x3F3504F3) >> 23
    y = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = ((-0.174447119 * y + 0.287336886) * y - 0.299045354) * y + 0.331247866
    p = ((p * y - 0.399136662) * y + 0.500041485) * y - 0.666683733
    p = (p * y + 0.999999762) * y - 2.0
    return (32 - exponent).float() * 1.38629436 + p * y


def _sine(x: torch.Tensor) -> torch.Tensor:
    """sin(x pi / 2) for fp32 x in [0, 1], to within 2 epsilons of its size."""
    y = x * x
    p = ((0.000151485132 * y - 0.00467376644) * y + 0.0796896815) * y - 0.645963728
    return (p * y + 1.57079637) * x
