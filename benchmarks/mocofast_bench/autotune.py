"""Chooses the tiles of InfoNCE's products for a GPU and writes a table.

Times all candidates as CUDA graphs, in turns. Later runs on this GPU load the table
(`mocofast_kernels.tiles` says from which file). The table holds the given kinds of call,
types and dimensions. All other calls keep the rule of `mocofast_kernels.configs`.

Without a GPU, `--static` ranks the candidates by machine code and by the model of `mocofast
bench static`.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mocofast import files
from mocofast_bench import timing
from mocofast_bench.machine_code import require_compiler
from mocofast_bench.optim import capture_graph
from mocofast_bench.roofline import GPUS, RESERVED, predict, resident_programs
from mocofast_bench.sizes import SHARED

if TYPE_CHECKING:
    from mocofast_kernels.configs import Tile
    from mocofast_kernels.tiles import Products

    from mocofast_bench.inspect_code import Report
    from mocofast_bench.inspected_calls import Problem, Types

KINDS = ("queue", "queue, temperature tensor", "in-batch", "gradient of negatives")
TYPES = ("bf16", "fp16", "fp32 as bf16", "fp32 as fp16", "fp32 as tf32", "fp32")
Score = Callable[["Problem", "list[Tile]"], "dict[Tile, float]"]


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds what to tune, and the file of the table."""
    parser.add_argument("--n", type=positive, default=256, help="queries (default: %(default)s)")
    parser.add_argument(
        "--k", type=positive, default=65536, help="negatives (default: %(default)s)"
    )
    parser.add_argument(
        "--c", type=positive, nargs="+", default=[128], help="dimensions (default: 128)"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"kinds of call: {_quoted(KINDS)} (default: all)",
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=TYPES,
        default=["bf16", "fp32 as bf16"],
        metavar="TYPE",
        help=f"types of inputs and products: {_quoted(TYPES)} (default: bf16, and fp32 as bf16)",
    )
    parser.add_argument(
        "--repeats", type=positive, default=20, help="timed rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--candidates",
        type=positive,
        metavar="N",
        help="tiles to time for a call, nearest to the rule's tile first (default: all, about 25)",
    )
    parser.add_argument(
        "--specialised",
        action="store_true",
        help="try the warp-specialised sweep, too: for H100 and H200, never run on a GPU so far",
    )
    parser.add_argument(
        "--static", action="store_true", help="rank by machine code and a model (needs no GPU)"
    )
    parser.add_argument(
        "--capability",
        type=int,
        choices=GPUS,
        default=90,
        help="with --static: compute capability x 10 (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="table to write (default: the file for this GPU)"
    )


def _quoted(choices: Sequence[str]) -> str:
    """Returns choices as words of a shell: spaces and commas are part of them."""
    return ", ".join(f'"{choice}"' for choice in choices)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ranks the candidates of every kind, type and dimension.

    Prints the best candidates and writes the table. Exits with 2 if the arguments cannot be used.
    """
    # Check the arguments before modules with Triton are imported.
    require_compiler(parser)
    if not arguments.static and not torch.cuda.is_available():
        parser.error("there is no GPU to time on. --static ranks by machine code and a model")
    from mocofast_kernels import configs, tiles

    if max(arguments.c) > configs.LONGEST:
        parser.error(f"--c must be at most {configs.LONGEST}: got {max(arguments.c)}")
    from mocofast_bench import inspected_calls

    # The device, and the score: predicted times of a model, or times on the GPU.
    score: Score
    capability: int | None
    if arguments.static:
        device, capability = torch.device("meta"), arguments.capability
        name = GPUS[capability].name
        gpu = configs.Architecture(SHARED[capability], hopper=capability == 90)
        score, out = partial(_predict_times, capability), arguments.out
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        name, gpu = torch.cuda.get_device_name(), configs.architecture(device)
        capability = tiles.capability_of(device)
        assert capability is not None
        score, out = partial(_time_tiles, arguments.repeats), arguments.out or tiles.path_of(device)
    nearest = GPUS[max((c for c in GPUS if c <= capability), default=80)]
    known = {types.name: types for types in inspected_calls.TYPES}
    rows: dict[Products, dict[str, Any]] = {}
    # Every problem: score the candidates, print the best five and the rule.
    for C, types_name, kind in itertools.product(arguments.c, arguments.types, arguments.kinds):
        types = known[types_name]
        torch.set_float32_matmul_precision(types.matmul_precision)
        problem = _problem(kind, C, types, str(device), arguments.n, arguments.k)
        rule = tiles.rule(problem.products, gpu)
        others = list(candidates(problem.products, nearest.shared - RESERVED))
        # The model knows the specialised sweep of Hopper alone.
        if arguments.specialised and (capability == 90 or not arguments.static):
            others = [*tiles.specialised_tiles(problem.products, capability), *others]
        tried = nearest_first(rule, [rule, *(tile for tile in others if tile != rule)])
        tried = tried[: arguments.candidates]
        times = score(problem, tried)
        ranked = sorted(times, key=lambda tile: times[tile])
        print(
            f"\n{kind}, {types_name}, C = {C}: "
            f"{len(times)} of {len(tried)} candidates run; microseconds"
        )
        for tile in [*ranked[:5], *(tile for tile in ranked[5:] if tile == rule)]:
            note = " (the rule)" if tile == rule else ""
            print(f"{1e6 * times[tile]:9.1f} {tile}{note}", flush=True)
        rows[problem.products] = {
            "products": problem.products._asdict(),
            "tile": ranked[0]._asdict(),
            "microseconds": round(1e6 * times[ranked[0]], 2),
            "rule_microseconds": round(1e6 * times.get(rule, math.nan), 2),
        }
        if out is not None:  # after every problem: a later problem may be interrupted
            with files.atomic_write(out) as file:
                tiles.dump(file, name, capability, list(rows.values()))
    if out is not None:
        print(f"\nWritten: {out}")


def nearest_first(rule: Tile, tiles: list[Tile]) -> list[Tile]:
    """Returns the tiles by how many halvings and doublings lead from the rule's tile to them.

    Tiles of the warp-specialised sweep come first, beside the rule's tile.
    """

    def distance(tile: Tile) -> float:
        if tile.specialised:
            return 0.0
        sizes = sum(abs(math.log2(a / b)) for a, b in zip(tile[:5], rule[:5]))
        return sizes + abs(tile.stages - rule.stages)

    return sorted(tiles, key=distance)


def _problem(kind: str, C: int, types: Types, device: str, n: int, k: int) -> Problem:
    from mocofast_bench import inspected_calls

    if kind == "gradient of negatives":
        return inspected_calls.grad_negatives(C, types, device, n, k)
    variant = next(variant for variant in inspected_calls.VARIANTS if variant.name == kind)
    return inspected_calls.forward(C, types, variant, device, n, k)


def candidates(products: Products, shared: int) -> Iterator[Tile]:
    """Yields the tiles worth compiling.

    Sums and scores take 16 to 176 registers a thread. Blocks in flight fit in `shared` bytes.
    Columns stay in one piece where possible, and are split into pieces otherwise.

    products: kind of product.
    shared: bytes of shared memory a program may use.
    """
    from mocofast_kernels.configs import Tile, block_of

    c, size = block_of(products.C), 2 if products.dot == "16bit" else 4
    # Rows that stay, rows that stream, stages of the pipeline.
    choices: tuple[tuple[int, ...], ...] = ((64, 128), (32, 64, 128), (2, 3))
    if products.dot == "ieee":
        choices = ((32, 64), (32, 64), (1,))
    # (columns a block, columns of the sums)
    pieces = [(c, c)] if c <= 256 else []
    if c >= 256 or not products.plain or products.dot != "16bit":
        blocks = (32,) if products.dot == "ieee" else (64, 128)
        pieces += [
            (block, out) for block in blocks for out in {min(c, 256), min(c, 512)} if block < c
        ]
    for (block_c, out_c), warps in itertools.product(pieces, (4, 8)):
        for stay, stream, stages in itertools.product(*choices):
            registers = (stay * out_c + stay * stream) / (32 * warps)
            in_flight = stages * stream * max(block_c, out_c) * size
            if 16 <= registers <= 176 and in_flight <= shared:
                yield Tile(stay, stream, block_c, out_c, warps, stages)


def _time_tiles(repeats: int, problem: Problem, tried: list[Tile]) -> dict[Tile, float]:
    """Times the tiles on the GPU, {tile: seconds}. Leaves out tiles that do not compile or fit.

    A warp-specialised sweep must also agree with the first tile.
    """
    from triton.runtime.errors import OutOfResources

    runs: dict[Tile, Callable[[], Any]] = {}
    for tile in tried:
        try:
            if tile.specialised and not agree(problem.run(tile), problem.run(tried[0])):
                print(f"{tile} computes other values than {tried[0]}: left out")
                continue
            runs[tile] = capture_graph(partial(problem.run, tile))
        except (OutOfResources, RuntimeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
    if not runs:
        raise RuntimeError(f"no tile runs for {problem.products}")
    times = timing.interleaved(runs, repeats, torch.device("cuda"))
    return {tile: time.median for tile, time in times.items()}


def agree(one: Any, other: Any) -> bool:
    """Returns whether two results of `infonce_forward` agree as far as bfloat16 can tell."""
    for name in ("loss", "lse", "rank", "grad_query", "grad_positive"):
        a, b = (getattr(result, name).float() for result in (one, other))
        if not (a - b).abs().max() <= 1e-2 * b.abs().max():  # also where a number is NaN
            return False
    return True


def _predict_times(capability: int, problem: Problem, tried: list[Tile]) -> dict[Tile, float]:
    """Predicts the times of the tiles, {tile: seconds}.

    Leaves out tiles that spill registers, do not fit or do not compile.
    """
    from mocofast_bench import inspect_code

    known: dict[str, Report] = {}  # candidates share the launches around the product
    result = {}
    for tile in tried:
        total = 0.0
        for launch in inspect_code.record(
            partial(problem.run, tile), inspect_code.PROCESSORS[capability]
        ):
            if launch.identity not in known:
                try:
                    known[launch.identity] = inspect_code.inspect("", launch, capability)
                except RuntimeError:
                    break
            report = known[launch.identity]
            if report.spills or resident_programs(report, GPUS[capability]) == 0:
                break
            total += predict(launch, report, GPUS[capability]).time
        else:
            result[tile] = total
    if not result:
        raise RuntimeError(f"no tile compiles without spills for {problem.products}")
    return result
