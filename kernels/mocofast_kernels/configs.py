"""Tile sizes of the InfoNCE kernels and how many parts the negatives are split into: a table and a rule."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """One configuration: rows of the stationary block, rows of the streamed one, columns of a chunk."""

    block_n: int
    block_k: int
    block_c: int  # columns of a score product; the whole row where C fits it
    out_c: int  # columns of the accumulator; several programs share a row where C exceeds it
    warps: int
    stages: int


def forward_tile(C: int, dot: str, stored_bytes: int, normalize_negatives: bool) -> Tile:
    """Tile of the forward sweep. dot: "16bit", "tf32" or "ieee"; stored_bytes: of one element of the negatives."""
    block_c = max(16, triton.next_power_of_2(C))
    if dot == "ieee":
        return Tile(32, 32, min(block_c, 64), min(block_c, 64), 4, 1)
    if block_c > 256:
        return Tile(64, 64, 64, 256, 4, 2)
    if dot == "tf32":
        return Tile(64, 32, block_c, block_c, 4, 2)
    return Tile(64, 64 if block_c == 256 or normalize_negatives else 128, block_c, block_c, 4, 2)


def dot_kind(dot_dtype: torch.dtype, precision: str) -> str:
    return precision if dot_dtype == torch.float32 else "16bit"


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def kernel_slots(device: torch.device) -> int:
    """How many sweep programs a device runs at a time: two a multiprocessor, so that one's exponentials run under
    the other's matrix products. Without a GPU (Triton's interpreter) a few, so that splits are exercised."""
    return 2 * _processors(device) if device.type == "cuda" else 6


@functools.cache
def split_count(blocks: int, tiles: int, slots: int) -> int:
    """Into how many parts to split `tiles` tiles of negatives, for `blocks` blocks of queries and `slots` programs
    at a time: the one of least cost, in the time of a tile.

    Programs run in waves; each costs its tiles and about 2 more to start and finish. Each part adds its fp32
    partial sums, about 1/40 tile of memory traffic for every block of queries, spread over the device.
    """

    def cost(splits: int) -> float:
        waves = -(-blocks * splits // slots)
        return waves * (-(-tiles // splits) + 2) + blocks * splits / 40

    return min(range(1, min(tiles, 256) + 1), key=cost)
