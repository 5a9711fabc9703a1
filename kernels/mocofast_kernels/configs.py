"""Tile sizes of the InfoNCE kernels and how many parts the negatives are split into: a table and a rule.

Chosen from the machine code that `mocofast_bench.inspect_code` reports, not by timing on the user's machine: nothing
changes from run to run, and every row of the table is compiled by the tests for sm_80, sm_90 and sm_100. Where
`mocofast bench autotune` was asked to time the candidates, its table comes before this rule (`tiles`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

# Registers a thread may have: all there are. Without a number ptxas goes, in a few of these kernels, for more
# programs at a time and spills 2 to 24 words for it.
REGISTERS = 255


class Tile(NamedTuple):
    """How a kernel is cut: rows of the block that stays, rows of the blocks that stream past, and columns."""

    stay: int
    stream: int
    block_c: int  # columns of a row that a score product takes at a time
    out_c: int  # columns of the accumulator; programs share a row that is longer, and each repeats the scores
    warps: int
    stages: int  # depth of the software pipeline


def block_of(C: int) -> int:
    """The power of two, at least 16 (the smallest side of a matrix product), that holds C columns."""
    return max(16, triton.next_power_of_2(C))


def forward_tile(C: int, dot: str, aligned: bool, plain: bool, online: bool) -> Tile:
    """Tile of the forward sweep: queries stay, negatives stream.

    dot: "16bit", "tf32" or "ieee". aligned: rows of negatives lie contiguous, in whole pieces of 16 bytes. plain:
    they are operands as they lie there (aligned, of dot's type, not to be normalised) and go to shared memory past
    the registers. online: the running maximum is kept.

    The binding limit is 255 registers a thread: they hold stay x out_c of sums, stay x stream of scores and, where
    the negatives pass through them, stream x block_c of those; rows that are not aligned also take many addresses.
    """
    c = block_of(C)
    if dot == "ieee":
        # No matrix unit multiplies float32: fused multiply-adds, whose operands all sit in registers.
        return Tile(32, 32, c, c, 4, 1) if c <= 32 else Tile(64, 32, 32, min(c, 128), 8, 1)
    if dot == "tf32":
        if c <= 128 and plain:
            return Tile(64, 32, c, c, 4, 2)
        return Tile(64, 32, min(c, 64), min(c, 128), 8, 2)
    if not aligned:
        return Tile(64, 32, min(c, 64), min(c, 256), 8, 2)
    if c > 256 and plain:
        # Every program of a row repeats its scores: 512 columns of sums, at 128 registers a thread, halve that.
        return Tile(64, 64, 64, 512, 8, 2)
    if c > 256 or (c > 64 and c != C and not plain) or (c == 256 and not (plain and c == C)):
        return Tile(64, 64, 64, min(c, 256), 8, 2)
    if c == 256:
        return Tile(64, 64, c, c, 8 if online else 4, 2)
    if plain and c == C and not online:
        # The queue of MoCo: two programs share a multiprocessor, one's exponentials under the other's products.
        return Tile(64, 128, c, c, 4, 2)
    return Tile(128, 64, c, c, 8, 3 if plain else 2)


def backward_tile(C: int, dot: str) -> Tile:
    """Tile of the negatives' gradient: negatives stay, prepared queries stream."""
    c = block_of(C)
    if dot == "ieee":
        return Tile(64, 32, min(c, 32), min(c, 128), 8, 1)
    if dot == "tf32":
        return Tile(64, 32, min(c, 64), min(c, 128), 8, 2)
    if c <= 128:
        # The negatives wait in registers or shared memory, and two programs share a multiprocessor.
        return Tile(64, 64, c, c, 4, 2)
    return Tile(64, 64, min(c, 64), min(c, 256), 8, 2)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Without one (Triton's interpreter): a few, so that splits are exercised."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 3
    )


def kernel_slots(device: torch.device, warps: int = 4) -> int:
    """Programs of a sweep that a device runs at a time, if each takes nearly every register that it may."""
    return processors(device) * (8 // warps)


@functools.cache
def split_count(blocks: int, tiles: int, slots: int) -> int:
    """Into how many parts to split `tiles` tiles of negatives, for `blocks` programs a part and `slots` at a time:
    the number of least cost, in the time of a tile.

    Programs run in waves, and each takes its tiles plus about 2 more to start and finish. Each part also writes and
    reads again one block of float32 sums for every program, about 1/40 tile when the whole device does it.
    """

    def cost(splits: int) -> float:
        waves = -(-blocks * splits // slots)
        return waves * (-(-tiles // splits) + 2) + blocks * splits / 40

    return min(range(1, min(tiles, 256) + 1), key=cost)
