"""The mutators of the fuzzers, which damage a good content by a seed, and their command line."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence

Mutator = Callable[[bytes, random.Random], bytes]
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _place(content: bytes, rng: random.Random) -> int:
    """Returns a position. Half of all positions lie in the first 200 bytes, among the headers."""
    return rng.randrange(min(len(content), rng.choice((200, len(content)))) or 1)


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    """Flips 1 to 8 bits."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        out[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Cuts the end off."""
    return content[: rng.randrange(len(content))]


def fill(content: bytes, rng: random.Random) -> bytes:
    """Overwrites a run of bytes with one value."""
    begin, length = _place(content, rng), rng.choice((1, 4, 16, 512, 4096))
    length = min(length, len(content) - begin)
    return content[:begin] + bytes([rng.choice((0, 255, 32))]) * length + content[begin + length :]


def number(content: bytes, rng: random.Random) -> bytes:
    """Overwrites 1, 2 or 4 bytes with an extreme number, in either byte order."""
    begin, width = _place(content, rng), rng.choice((1, 2, 4))
    value = rng.choice(EXTREMES) % (1 << 8 * width)
    written = value.to_bytes(width, rng.choice(("little", "big")))
    return content[:begin] + written + content[begin + width :]


def remove(content: bytes, rng: random.Random) -> bytes:
    """Removes a run of bytes."""
    begin = _place(content, rng)
    return content[:begin] + content[begin + rng.choice((1, 2, 7, 64, 512)) :]


def repeat(content: bytes, rng: random.Random) -> bytes:
    """Writes a run of bytes twice or more often."""
    begin, length = _place(content, rng), rng.choice((1, 16, 512))
    return content[:begin] + content[begin : begin + length] * rng.randint(2, 9) + content[begin:]


def append(content: bytes, rng: random.Random) -> bytes:
    """Appends random bytes, or the content once more."""
    return content + rng.choice((content, rng.randbytes(rng.randint(1, 2000))))


MUTATORS: tuple[Mutator, ...] = (flip_bits, cut, fill, number, remove, repeat, append)


def mutated(content: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Returns a content with one to three mutations. others: contents to splice in."""
    if others and rng.random() < 0.1:  # the head of one file, the tail of another
        other = rng.choice(others)
        content = content[: _place(content, rng)] + other[_place(other, rng) :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice(MUTATORS)(content or b"\0", rng)
    return content


def run_fuzzer(main: Callable[[float, int], Counter[str]], what: str | None, minutes: float) -> int:
    """Runs a fuzzer with the options of the command line. Returns 1 if it has counted a defect.

    main: takes minutes and a seed. what: the words of --help. minutes: without --minutes.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return int(any("DEFECT" in name for name in main(given.minutes, given.seed)))
