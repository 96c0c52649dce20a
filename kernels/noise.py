"""Counter-based noise for sampling: a pure function of (seed, position, token), so nothing depends on the batch.

The mixing function. Seed and position give one 64-bit key per row,

    key = mix64(mix64(seed + GOLDEN) + position * GOLDEN),

where mix64 is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014). Each token then gets 32 bits: (low half of the key) + token * 0x9E3779B9 goes through a round of MurmurHash3's
32-bit finaliser (x ^= x >> 16; x *= 0x85EBCA6B), the high half of the key is xor-ed in, and two more rounds follow.
Vocabulary-wide work is in 32-bit integers because CPUs multiply those several times as fast as 64-bit ones; the key
stays 64 bits wide, so streams of different seeds or positions are not shifts of each other.

Integer arithmetic wraps; every implementation must give the same bits.
"""

import torch
from torch import Tensor

_GOLDEN64 = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_GOLDEN32 = -1640531527  # 0x9E3779B9
DRAFT_STREAM = 1
"""What draft tokens are drawn by that the target then accepts or rejects."""
ACCEPT_STREAM = 2
"""What decides between the two."""
_LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The float32 below one: -log(1 - u) stays finite."""


def _shift64(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit numbers that changes half of the bits for any change."""
    x = (x ^ _shift64(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift64(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift64(x, 31)


def _xor_shift32(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits (logical), int32 in place."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def random_bits(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 uniform bits per (row, token).

    seeds [R] int64 (an unsigned seed's bits), positions [R] int64, tokens [C] (the same for all rows) or [R, C],
    integer. Returns [R, C] int32, all bits used. About 12 integer operations per element.
    """
    keys = _mix64(_mix64(seeds + _GOLDEN64) + positions * _GOLDEN64)
    low = (keys << 32 >> 32).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    bits = tokens.to(torch.int32) * _GOLDEN32 + low
    bits = _xor_shift32(bits, 16).mul_(-2048144789)  # 0x85EBCA6B
    bits = _xor_shift32(bits.bitwise_xor_(high), 13).mul_(-1028477387)  # 0xC2B2AE35
    bits = _xor_shift32(bits, 16).mul_(-2048144789)
    bits = _xor_shift32(bits, 13).mul_(-1028477387)
    return _xor_shift32(bits, 16)


def stream(positions: Tensor, number: int) -> Tensor:
    """Positions [R] int64 that key noise of its own for each number: 0 is what a token is drawn by, see the constants.

    Positions of sequences are below 2^40, so no two streams of a seed meet.
    """
    return positions + (number << 40)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """[R] float32 in (0, 1): one number per row; arguments as for `random_bits`."""
    bits = random_bits(seeds, positions, torch.zeros(1, dtype=torch.int64, device=seeds.device))
    return _between_0_and_1(bits).squeeze(1)


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise per (row, token): the argmax of logits + noise is an exact sample of their softmax.

    Arguments as for `random_bits`. Returns [R, C] float32, finite, within (-2.9, 22.2): -log(-log(1 - u)), u = (31 bits
    + 1/2) / 2^31. The largest noise, which decides, comes from the smallest u, where float32 holds every value of u.
    """
    uniform = _between_0_and_1(random_bits(seeds, positions, tokens))
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _between_0_and_1(bits: Tensor) -> Tensor:
    """(31 bits + 1/2) / 2^31 in float32, below one; takes the argument's memory."""
    return bits.bitwise_and_(2**31 - 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_UNIFORM)
