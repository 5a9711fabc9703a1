"""Random numbers of a view: a hash of the key of the view, a stream and a position.

Hashes are integer arithmetic. Normal numbers come from single operators of PyTorch, each of which
rounds as IEEE 754 says, so late_body.h repeats them to the bit: no logarithm, sine or cosine of
PyTorch, which are approximations of PyTorch's own, but polynomials.
"""

from __future__ import annotations

import torch
from torch import Tensor

# -2 log(m) = -s (4 + ...), s = (m - 1) / (m + 1), for m from sqrt(1/2) to sqrt(2): coefficients of
# powers of s^2, of the least relative error (1.2e-7).
_LOG = (4.0000005, 1.3330445, 0.82592744)
# sin(2 pi x) = x (2 pi + ...), for x from -1/4 to 1/4: coefficients of powers of x^2 (5.3e-9).
_SINE = (6.283185, -41.341676, 81.60223, -76.574989, 39.710918)
_TWO_LOG_2 = 1.3862944
# Bits of sqrt(1/2) as float32
_ROOT = 0x3F3504F3


def normal_numbers(keys: Tensor, stream: int, count: int) -> Tensor:
    """Returns normal numbers, (n, count) float32, by the transform of Box and Muller.

    keys: (n,), as for `uniform_numbers`.
    stream: uses the streams `stream` and `stream` + 1.
    """
    half = (count + 1) // 2
    radius = _radius(hash_places(keys, stream, half))
    # From -1/2 to 1/2 of a turn
    turns = hash_places(keys, stream + 1, half).bitwise_right_shift_(8).float().mul_(2**-24)
    numbers = turns.new_empty((len(keys), 2, half))
    # Turns from -1/4 to 1/4, whose sines are the cosine and the sine
    cosine, sine = numbers.unbind(1)
    torch.abs(turns, out=cosine).neg_().add_(0.25)
    torch.abs(cosine, out=sine).neg_().add_(0.25).copysign_(turns)
    for x in (cosine, sine):
        x.mul_(polynomial(x * x, _SINE)).mul_(radius)
    return numbers.flatten(1)[:, :count]


def _radius(words: Tensor) -> Tensor:
    """Returns the square root of -2 log(v / 2^24), where v is a whole number in [1, 2^24].

    words: int32, whose upper 24 bits are 2^24 - v. Changed.
    """
    v = _upper_bits(words).neg_().add_(2**24).float()
    bits = v.view(torch.int32)
    exponent = torch.sub(bits, _ROOT, out=words).bitwise_right_shift_(23)
    bits.sub_(exponent << 23)  # v becomes m
    less = v.sub_(1)
    s = less.div_(less + 2)
    square = exponent.neg_().add_(24).float().mul_(_TWO_LOG_2)
    square.sub_(polynomial(s * s, _LOG).mul_(s)).clamp_(min=1e-30)
    # MKL's `sqrt` is an approximation. `rsqrt` is a root and a quotient.
    return torch.rsqrt(square, out=s).mul_(square)


def polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Returns the polynomial of x, in new memory. Rounds after every product and every sum.

    coefficients: of the powers 0, 1, ... of x.
    """
    last, *rest = reversed(coefficients)
    value = x * last
    for coefficient in rest[:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(rest[-1])


def uniform_numbers(keys: Tensor, stream: int, count: int) -> Tensor:
    """Returns numbers in [0, 1), (n, count) float32.

    keys: (n,) int32.
    stream: from 0.
    """
    return _upper_bits(hash_places(keys, stream, count)).float().div_(2**24)


def _upper_bits(words: Tensor) -> Tensor:
    """Shifts out 8 bits of unsigned words, in place. Returns the words."""
    return words.bitwise_right_shift_(8).bitwise_and_(2**24 - 1)


def hash_places(keys: Tensor, stream: int, count: int) -> Tensor:
    """Returns words, (n, count) int32, of the places 0, 1, ... in a stream of every key."""
    place = torch.arange(count, dtype=torch.int32, device=keys.device)
    return hash_words_(hash_words_(keys + stream).unsqueeze(1) ^ place)


def hash_words_(x: Tensor) -> Tensor:
    """Hashes int32 words in place, modulo 2^32. Returns x.

    The hash of 32 bits is "lowbias32" of Wellons 2018, "Prospecting for hash functions".
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        # The mask makes the shift of a negative word fill with zeros.
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1))
        if factor != 1:
            x.mul_(factor)
    return x
