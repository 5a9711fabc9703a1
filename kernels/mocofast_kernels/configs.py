"""Tile sizes of the InfoNCE kernels, and the number of splits of the negatives.

The tiles were chosen from the machine code that `mocofast_bench.inspect_code` reports, not by
timing on the user's machine. So nothing changes from run to run, and the tests compile every
tile for sm_80, sm_90 and sm_100. A table made by `mocofast bench autotune`, which times the
candidates, takes precedence over this rule (`mocofast_kernels.tiles`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

# Launch options of every kernel: a product and a sum become one instruction. Triton's default
# changes to no fusion in 3.10.
FUSED: dict[str, int] = {"enable_fp_fusion": True}
# Launch options that let a thread have all 255 registers. Without this limit, ptxas fits more
# programs on a multiprocessor in a few of these kernels and spills 2 to 24 words. The compiler for
# AMD's GPUs has no such option.
ALL_REGISTERS = FUSED if torch.version.hip else {**FUSED, "maxnreg": 255}
LONGEST = 8192  # columns of a row: a row in float32 fills 32 KB, which a program holds in registers


class Architecture(NamedTuple):
    """Properties of a GPU that decide a tile."""

    shared: int = 164 * 1024  # bytes of shared memory of a multiprocessor
    hopper: bool = False  # compute capability 9.0
    amd: bool = False
    blackwell: bool = False  # compute capability 10.0 or 10.3


class Tile(NamedTuple):
    """Block sizes of a program."""

    stay: int  # rows of the block that stays
    stream: int  # rows of the blocks that stream past
    block_c: int  # columns of a row that a score product takes at a time
    # Columns of the accumulator. Several programs share a longer row, and every program
    # repeats the scores.
    out_c: int
    warps: int  # warps that compute
    stages: int  # depth of the software pipeline, or places of the ring
    specialised: bool = False  # the sweep of `mocofast_kernels.infonce_hopper`, or of _blackwell


# {columns of a row: tiles of the warp-specialised sweep that compile without spills}
SPECIALISED = {
    64: (Tile(128, 128, 64, 64, 8, 4, True),),
    128: (Tile(128, 128, 128, 128, 8, 4, True),),
    256: (Tile(128, 32, 256, 256, 8, 8, True),),
}

TENSOR_MEMORY = (64, 128)  # columns of a row that the specialised sweep of Blackwell takes


def block_of(C: int) -> int:
    """Returns the smallest power of two that holds C columns, at least 16.

    16 is the smallest side of a matrix product.
    """
    return max(16, triton.next_power_of_2(C))


def forward_tile(
    C: int,
    dot: str,
    aligned: bool,
    plain: bool,
    online: bool,
    gpu: Architecture = Architecture(),  # noqa: B008 (immutable)
) -> Tile:
    """Returns the tile of the forward sweep: queries stay, negatives stream.

    dot: "16bit", "tf32" or "ieee".
    aligned: rows of negatives are contiguous, in whole pieces of 16 bytes.
    plain: negatives are operands as stored (aligned, of dot's type, not to be normalised).
        Plain negatives go to shared memory past the registers.
    online: the sweep keeps a running maximum.
    gpu: the GPU. The default has the shared memory of an A100.

    The binding limit is 255 registers a thread. They hold stay x out_c sums, stay x stream
    scores and, unless plain, stream x block_c negatives. Unaligned rows also take many
    registers for addresses.
    """
    c = block_of(C)
    # An RTX 3090 or 4090 has 100 KB, where one program with long rows fits. With Triton 3.9 it
    # spills, unless it has more warps or a shorter tile.
    large = gpu.shared >= 160 * 1024
    # On AMD's GPUs, 8 warps of 64 threads have 256 registers a thread: half as many negatives.
    stream = 32 if gpu.amd else 64
    if dot == "ieee":
        # No matrix unit multiplies float32. Fused multiply-adds have all operands in registers.
        return Tile(32, 32, c, c, 4, 1) if c <= 32 else Tile(64, 32, 32, min(c, 128), 8, 1)
    if dot == "tf32":
        if c <= 128 and plain:
            return Tile(64, 32, c, c, 4, 2)
        return Tile(64, 32, min(c, 64), min(c, 128), 8, 2)
    if not aligned:
        return Tile(64, 32, min(c, 64), min(c, 256), 8, 2)
    if c > 256 and plain:
        # Every program of a row repeats the row's scores. 512 columns of sums (128 registers a
        # thread) halve the number of programs. On an A100, a running maximum spills two words.
        few = not large or (online and gpu.shared <= 164 * 1024)
        return Tile(64, 32 if few else 64, 64, 512, 8, 2)
    if c > 256 or (c > 64 and c != C and not plain) or (c == 256 and not (plain and c == C)):
        return Tile(64, stream, 64, min(c, 256), 8, 2)
    if c == 256:
        # On an A100, 4 warps spill four words.
        return Tile(64, stream, c, c, 4 if gpu.shared > 164 * 1024 and not online else 8, 2)
    if plain and c == C and not online:
        # MoCo's queue: two programs share a multiprocessor, so exponentials of the first overlap
        # with products of the second. Two tiles of 128 rows do not fit into the 100 KB of an
        # RTX 3090 or 4090. On Hopper, 2 stages make a round wait for the copy that the round before
        # issued last (DEPBAR.LE SB0, 0x0), 3 stages for the copy before (0x1), and 112 KB still
        # fit twice.
        return Tile(64, 128 if large else 64, c, c, 4, 3 if gpu.hopper else 2)
    return Tile(128, stream, c, c, 8, 3 if plain else 2)


def backward_tile(C: int, dot: str) -> Tile:
    """Returns the tile of the gradient by the negatives: negatives stay, queries stream."""
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
    """Returns the number of multiprocessors of a GPU.

    Returns 3 without a GPU (Triton's interpreter), for several splits in tests.
    """
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 3
    )


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """Returns the properties of a GPU, or the defaults for other devices."""
    if device.type != "cuda":
        return Architecture()
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    hopper = not amd and (properties.major, properties.minor) == (9, 0)
    blackwell = not amd and properties.major == 10
    return Architecture(properties.shared_memory_per_multiprocessor, hopper, amd, blackwell)


@functools.cache
def has_matrix_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether Triton multiplies matrices of this type by matrix units.

    For float16 and bfloat16 on NVIDIA GPUs before Ampere (T4, V100), Triton compiles products to
    single multiply-adds: 9,479 spills and two minutes of compiling for MoCo's queue.
    """
    if device.type != "cuda" or torch.version.hip or dtype == torch.float32:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def row_warps(C: int) -> int:
    """Returns the warps of a program that holds a whole row: 4 up to 1,024 columns, 16 at most."""
    return min(16, max(4, block_of(C) // 256))


def kernel_slots(device: torch.device, warps: int = 4) -> int:
    """Returns how many programs of a sweep a device runs at a time.

    Assumes that a program's threads take nearly all registers allowed.
    """
    return processors(device) * (8 // warps)


@functools.cache
def split_count(blocks: int, tiles: int, slots: int) -> int:
    """Returns the cheapest number of splits of the negatives.

    blocks: programs in a split.
    tiles: tiles of negatives.
    slots: programs running at a time.

    The cost is counted in the time of a tile. Programs run in waves. A program takes the time
    of its tiles plus about 2 tiles to start and finish. Every program also writes a block of
    float32 sums, which is read again: about 1/40 tile when the whole device takes part.
    """

    def cost(splits: int) -> float:
        waves = -(-blocks * splits // slots)
        return waves * (-(-tiles // splits) + 2) + blocks * splits / 40

    return min(range(1, min(tiles, 256) + 1), key=cost)
