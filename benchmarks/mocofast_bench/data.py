"""Measures pairs of views per second of loaders, from a folder of images.

dali, torchvision: the loaders of mocofast.
reference: facebookresearch/moco's loader, a PyTorch DataLoader with PIL images.
v2 tensors: the reference's loader with torchvision's v2 transforms on tensors.

Every round starts every loader anew and closes the loader at the end: no loader works ahead
while another loader is timed. Batches that a loader prepared before the clock starts are
not counted.

With --tune, nothing is compared. Threads, prefetch depth and settings of the GPU decoder
are tried in turn, and a recipe with the best settings is written.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.interface import BatchSlice, Loader, Source, view_augments
from mocofast.data.loaders import build_loader, count_workers, dali_missing
from mocofast.data.sources import FolderSource, find_images
from mocofast.device import choose_device
from mocofast.settings import ConfigError, load_recipe
from mocofast_bench import timing, tune
from mocofast_bench.loops import WARM_UP_BATCHES, TimedLoop, measure_in_turns, measure_loop, medians
from mocofast_bench.reference_loop import ReferenceLoader
from mocofast_bench.tensor_pairs import TensorPairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the folder and the options of loaders."""
    parser.add_argument("path", help="folder of images")
    parser.add_argument(
        "--recipe",
        default="moco_v2_r50_200ep",
        help="recipe that gives the augmentation (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="pairs in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--batches",
        type=positive,
        default=8,
        help="timed batches in a round (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=-1,
        help="threads or processes, -1: one for every core (default: %(default)s)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find the best loader settings for this machine instead",
    )
    parser.add_argument(
        "--out",
        default="tuned.yaml",
        help="with --tune: recipe file to write (default: %(default)s)",
    )
    parser.set_defaults(repeats=5)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row.

    Raises ConfigError where the folder has too few images, or for --plot with --tune.
    """
    device = choose_device(arguments.device)
    if arguments.tune:
        if arguments.plot is not None:
            raise ConfigError("--plot shows the comparison, which --tune leaves out: got both")
        return tune.run(arguments, device)
    workers = count_workers(arguments.workers)
    augment = load_recipe(arguments.recipe).augment
    source = FolderSource(arguments.path, find_images(arguments.path))
    batch = arguments.batch_size
    available = BatchSlice(batch).steps(len(source))
    if available < WARM_UP_BATCHES + arguments.batches:
        raise ConfigError(
            f"{len(source)} images make {available} batches of {batch}; "
            f"{WARM_UP_BATCHES} + {arguments.batches} are needed"
        )

    # Measure: memory of every loader first, then times in turns.
    loops = loader_loops(source, augment, batch, workers, device)
    memory = {name: memory_of(loop, batch, device) for name, loop in loops.items()}
    rounds = measure_in_turns(loops, arguments.repeats, arguments.batches, batch, device)
    middle = medians(rounds)
    rate = {name: median.images_per_second for name, median in middle.items()}
    # Print the table.
    print(f"{len(source)} images, {arguments.recipe}, {augment.size} px, batches of {batch}")
    print(f"{timing.device_name(device)}; {workers} workers; {arguments.repeats} rounds")
    print(
        f"{'':14}{'pairs/s':>10}{'lowest, highest':>18}{'x reference':>13}{'x v2 tensors':>14}"
        f"{'first batch s':>15}{'cores':>7}{'extra MB':>10}"
    )
    for name, (_, first, _, cores) in middle.items():
        rates = [result.images_per_second for result in rounds[name]]
        ratios = f"{rate[name] / rate['reference']:13.2f}{rate[name] / rate['v2 tensors']:14.2f}"
        extra = "" if (taken := memory[name]) is None else f"{taken / 1e6:.0f}"
        print(
            f"{name:14}{rate[name]:10.1f}{f'{min(rates):.0f}, {max(rates):.0f}':>18}{ratios}"
            f"{first:15.2f}{cores:7.2f}{extra:>10}"
        )
    return {
        "benchmark": "data",
        **timing.environment(device),
        "images": len(source),
        "recipe": arguments.recipe,
        "size": augment.size,
        "batch_size": batch,
        "batches": arguments.batches,
        "workers": workers,
        "repeats": arguments.repeats,
        "pairs_per_second": {name: round(value, 1) for name, value in rate.items()},
        "speedup": {name: round(value / rate["reference"], 3) for name, value in rate.items()},
        "time_to_first_batch": {
            name: round(median.time_to_first_step, 4) for name, median in middle.items()
        },
        "cores": {name: round(median.cores, 3) for name, median in middle.items()},
        "extra_bytes": memory,
    }


def plot(row: dict[str, Any]) -> Figure:
    """Returns the figure of a row."""
    # Imported here: processes that measure start without matplotlib.
    from mocofast.plots import plot_sides

    quantities = {
        "pairs of views/s": row["pairs_per_second"],
        "time to first batch, s": row["time_to_first_batch"],
        "CPU cores in use": row["cores"],
        "memory, workers included, MB": timing.megabytes(row["extra_bytes"]),
    }
    sizes = f"{row['images']} images, {row['recipe']}, {row['size']} px, batch {row['batch_size']}"
    return plot_sides(f"{sizes}, {row['device']}", quantities)


def loader_loops(
    source: Source, augment: AugmentConfig, batch_size: int, workers: int, device: torch.device
) -> dict[str, TimedLoop]:
    """Returns the compared loops, {name: loop}. The loops do nothing with the batches."""

    def loader(name: str) -> Callable[[], Loader]:
        data = DataConfig(loader=name, workers=workers)
        return lambda: build_loader(
            source, data, view_augments(augment, 2), BatchSlice(batch_size), 0, device
        )

    starts: dict[str, Callable[[], Any]] = {
        **({} if dali_missing() else {"dali": loader("dali")}),
        "torchvision": loader("torchvision"),
        "reference": lambda: ReferenceLoader(source, augment, batch_size, workers),
        "v2 tensors": lambda: ReferenceLoader(source, augment, batch_size, workers, TensorPairs),
    }
    return {name: TimedLoop(start, lambda batch: None) for name, start in starts.items()}


def memory_of(loop: TimedLoop, batch_size: int, device: torch.device) -> int | None:
    """Returns the most bytes of host memory in a loader and the loader's processes, with a batch.

    Returns None where memory cannot be measured.
    """
    gc.collect()  # garbage in `before` would be subtracted from the loader's memory
    before = timing.resident_memory()
    found: list[int | None] = []
    gauge = TimedLoop(loop.start, lambda batch: found.append(timing.resident_memory()))
    measure_loop(gauge, 1, batch_size, device)
    values = [value - before for value in found if value is not None and before is not None]
    return max(values, default=None)
