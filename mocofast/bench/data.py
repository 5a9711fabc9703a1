"""Pairs of views per second on a folder of images: the DALI loader, the torchvision loader, the MoCo reference's own
way (a PyTorch DataLoader of torchvision's transforms on PIL images), and the same with torchvision's v2 transforms on
tensors.

With --tune, no comparison: threads, prefetch depth and the GPU decoder's settings are tried one after the other
(`mocofast.bench.tune`), and the recipe is written with the best of them.

Each loader is started anew in every round and closed after it, so that none works ahead while another is timed;
the batches that it has ready by then are not counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import closing
from typing import Any

from mocofast.bench import timing, tune
from mocofast.bench.reference_loop import ReferenceLoader
from mocofast.bench.tensor_pairs import TensorPairs
from mocofast.bench.tune import WARM_UP, seconds_per_batch
from mocofast.config import DataConfig
from mocofast.data.interface import Loader, Shard, view_augments
from mocofast.data.loaders import build_loader, count_workers, dali_missing
from mocofast.data.sources import FolderSource, find_images
from mocofast.settings import ConfigError, load_recipe


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The folder, and how it is read."""
    parser.add_argument("path", help="a folder of images")
    parser.add_argument("--recipe", default="moco_v2_r50_200ep", help="whose augmentation (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="pairs in a batch (default: %(default)s)")
    parser.add_argument("--batches", type=positive, default=8, help="timed in a round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=-1, help="threads or processes; -1: the cores there are")
    parser.add_argument("--tune", action="store_true", help="find this machine's best loader settings instead")
    parser.add_argument("--out", default="tuned.yaml", help="with --tune: the recipe to write (default: %(default)s)")
    parser.set_defaults(repeats=5)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device = timing.resolved(arguments.device)
    if arguments.tune:
        return tune.run(arguments, device)
    workers = count_workers(arguments.workers)
    augment = load_recipe(arguments.recipe).augment
    source = FolderSource(arguments.path, find_images(arguments.path))
    shard = Shard(arguments.batch_size)
    if shard.steps(len(source)) < WARM_UP + arguments.batches:
        raise ConfigError(
            f"{len(source)} images make {shard.steps(len(source))} batches of {arguments.batch_size}; "
            f"{WARM_UP} + {arguments.batches} are needed"
        )

    def loader(name: str) -> Callable[[], Loader]:
        data = DataConfig(loader=name, workers=workers)
        return lambda: build_loader(source, data, view_augments(augment, 2), shard, 0, device)

    names = ["torchvision"] if dali_missing() else ["dali", "torchvision"]
    candidates: dict[str, Callable[[], Any]] = {name: loader(name) for name in names}
    candidates["reference"] = lambda: ReferenceLoader(source, augment, arguments.batch_size, workers)
    candidates["v2 tensors"] = lambda: ReferenceLoader(source, augment, arguments.batch_size, workers, TensorPairs)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(arguments.repeats):
        for name, make in candidates.items():
            with closing(make()) as made:
                samples[name].append(seconds_per_batch(made.epoch(0), arguments.batches, device))
    rates = {name: [arguments.batch_size / value for value in values] for name, values in samples.items()}
    rate = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{len(source)} images, {arguments.recipe}, {augment.size} px, batches of {arguments.batch_size}")
    print(f"{timing.device_name(device)}; {workers} workers; {arguments.repeats} rounds")
    print(f"{'':14}{'pairs/s':>10}{'lowest, highest':>18}{'x reference':>13}{'x v2 tensors':>14}")
    for name, values in rates.items():
        spread = f"{min(values):.0f}, {max(values):.0f}"
        ratios = f"{rate[name] / rate['reference']:13.2f}{rate[name] / rate['v2 tensors']:14.2f}"
        print(f"{name:14}{rate[name]:10.1f}{spread:>18}{ratios}")
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
    }
