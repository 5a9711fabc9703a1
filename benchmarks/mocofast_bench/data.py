"""Pairs of views per second on a folder of images: the DALI loader, the torchvision loader, the MoCo reference's own
way (a PyTorch DataLoader of torchvision's transforms on PIL images), and the same with torchvision's v2 transforms on
tensors.

With --tune, no comparison: threads, prefetch depth and the GPU decoder's settings are tried one after the other
(`mocofast_bench.tune`), and the recipe is written with the best of them.

Each loader is started anew in every round and closed after it, so that none works ahead while another is timed;
the batches that it has ready by then are not counted.
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
    """The folder, and how it is read."""
    parser.add_argument("path", help="a folder of images")
    parser.add_argument(
        "--recipe", default="moco_v2_r50_200ep", help="whose augmentation (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="pairs in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=positive, default=8, help="timed in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=-1, help="threads or processes; -1: the cores there are"
    )
    parser.add_argument(
        "--tune", action="store_true", help="find this machine's best loader settings instead"
    )
    parser.add_argument(
        "--out",
        default="tuned.yaml",
        help="with --tune: the recipe to write (default: %(default)s)",
    )
    parser.set_defaults(repeats=5)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device = choose_device(arguments.device)
    if arguments.tune:
        if arguments.plot is not None:
            raise ConfigError("--plot draws the comparison, which --tune leaves out: got both")
        return tune.run(arguments, device)
    workers = count_workers(arguments.workers)
    augment = load_recipe(arguments.recipe).augment
    source = FolderSource(arguments.path, find_images(arguments.path))
    shard = BatchSlice(arguments.batch_size)
    if shard.steps(len(source)) < WARM_UP_BATCHES + arguments.batches:
        raise ConfigError(
            f"{len(source)} images make {shard.steps(len(source))} batches of {arguments.batch_size}; "
            f"{WARM_UP_BATCHES} + {arguments.batches} are needed"
        )

    sides = loaders(source, augment, arguments.batch_size, workers, device)
    memory = {name: memory_of(side, arguments.batch_size, device) for name, side in sides.items()}
    rounds = measure_in_turns(
        sides, arguments.repeats, arguments.batches, arguments.batch_size, device
    )
    middle = medians(rounds)
    rate = {name: median.images_per_second for name, median in middle.items()}
    print(
        f"{len(source)} images, {arguments.recipe}, {augment.size} px, batches of {arguments.batch_size}"
    )
    print(f"{timing.device_name(device)}; {workers} workers; {arguments.repeats} rounds")
    print(
        f"{'':14}{'pairs/s':>10}{'lowest, highest':>18}{'x reference':>13}{'x v2 tensors':>14}"
        f"{'first batch s':>15}{'cores':>7}{'extra MB':>10}"
    )
    for name, (_, first, _, cores) in middle.items():
        rates = [each.images_per_second for each in rounds[name]]
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
        "batch_size": arguments.batch_size,
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
    """The picture of a row."""
    from mocofast.plots import (
        plot_sides,
    )  # here, so that processes that measure start without matplotlib

    quantities = {
        "pairs of views/s": row["pairs_per_second"],
        "time to first batch, s": row["time_to_first_batch"],
        "CPU cores in use": row["cores"],
        "memory, workers included, MB": timing.megabytes(row["extra_bytes"]),
    }
    title = f"{row['images']} images, {row['recipe']}, {row['size']} px, batch {row['batch_size']}, {row['device']}"
    return plot_sides(title, quantities)


def loaders(
    source: Source, augment: AugmentConfig, batch_size: int, workers: int, device: torch.device
) -> dict[str, TimedLoop]:
    """What is compared, by name: loops that do nothing with their batches."""

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


def memory_of(side: TimedLoop, batch_size: int, device: torch.device) -> int | None:
    """Most bytes of the host's memory that a loader and its processes have taken when a batch is there."""
    gc.collect()  # else what is garbage by now is gone from the later figure only
    before = timing.resident_memory()
    found = []
    measure_loop(
        TimedLoop(side.start, lambda batch: found.append(timing.resident_memory())),
        1,
        batch_size,
        device,
    )
    values = [value - before for value in found if value is not None and before is not None]
    return max(values, default=None)
