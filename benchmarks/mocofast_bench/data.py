"""Measures pairs of views per second of loaders, from a folder of images.

dali, torchvision: the loaders of mocofast.
reference: facebookresearch/moco's loader, a PyTorch DataLoader with PIL images.
v2 tensors: the reference's loader with torchvision's v2 transforms on tensors.
albumentations: a PyTorch DataLoader with Albumentations on OpenCV images, if installed.

With --channels other than 3 the loaders are compared with torchgeo's and LightlyTrain's
(`band_peers`), on random crops and flips alone. --make-geotiff N first writes N images of 13
channels of 16 bits.

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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.interface import BatchSlice, Loader, Source, view_augments
from mocofast.data.loaders import build_loader, count_workers, dali_missing
from mocofast.data.sources import load_datasets
from mocofast.device import choose_device
from mocofast.settings import ConfigError, load_recipe
from mocofast_bench import albumentations_pairs, timing, tune
from mocofast_bench.band_peers import BANDS, band_loaders, write_geotiffs
from mocofast_bench.loops import WARM_UP_BATCHES, TimedLoop, measure_in_turns, measure_loop, medians
from mocofast_bench.reference_loop import ReferenceLoader
from mocofast_bench.tensor_pairs import TensorPairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the folder and the options of loaders."""
    parser.add_argument("path", help="folder of images, or another place that --source reads")
    parser.add_argument("--source", default="folder", help="as data.source (default: %(default)s)")
    parser.add_argument(
        "--channels", type=positive, default=3, help="as data.channels (default: %(default)s)"
    )
    parser.add_argument(
        "--make-geotiff",
        type=positive,
        metavar="N",
        help="first write N GeoTIFF of 264 x 264 x 13 uint16 to the folder",
    )
    parser.add_argument(
        "--recipe",
        default="moco_v2_r50_200ep",
        help="recipe that gives the augmentation (default: %(default)s)",
    )
    parser.add_argument(
        "--decode",
        choices=("full", "scaled"),
        default="full",
        help="as data.decode, of mocofast's loaders (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="pairs in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--batches",
        type=positive,
        default=8,
        help="least number of timed batches in a round (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=int,
        default=2,
        help="least time of the timed batches in a round (default: %(default)s)",
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
    channels = arguments.channels
    if arguments.make_geotiff:
        write_geotiffs(Path(arguments.path), arguments.make_geotiff)
        channels = BANDS
    if channels != 3:
        augment = AugmentConfig(
            size=augment.size,
            crop_scale=augment.crop_scale,
            jitter=(0.0, 0.0, 0.0, 0.0),
            gray=0.0,
            vertical_flip=0.5,
        )
    data = DataConfig(
        source=arguments.source,
        path=arguments.path,
        channels=channels,
        workers=workers,
        decode=arguments.decode,
        holdout=0.0,
        labels="none",
    )
    source = load_datasets(data).train
    batch = arguments.batch_size
    available = BatchSlice(batch).steps(len(source))
    if available < WARM_UP_BATCHES + arguments.batches:
        raise ConfigError(
            f"{len(source)} images make {available} batches of {batch}; "
            f"{WARM_UP_BATCHES} + {arguments.batches} are needed"
        )

    # Measure: memory of every loader first, then times in turns.
    loops, absent = loader_loops(source, augment, batch, data, device)
    bases = [name for name in loops if name not in ("dali", "torchvision")]
    memory = {name: memory_of(loop, batch, device) for name, loop in loops.items()}
    rounds = measure_in_turns(
        loops, arguments.repeats, arguments.batches, batch, device, arguments.seconds
    )
    middle = medians(rounds)
    rate = {name: median.images_per_second for name, median in middle.items()}
    # Print the table.
    print(f"{len(source)} images, {arguments.recipe}, {augment.size} px, batches of {batch}")
    print(f"{timing.device_name(device)}; {workers} workers; {arguments.repeats} rounds")
    for name, reason in absent.items():
        print(f"{name} left out: {reason}")
    against = "".join(f"{f'x {base}':>16}" for base in bases)
    print(
        f"{'':14}{'pairs/s':>10}{'lowest, highest':>18}{against}"
        f"{'first batch s':>15}{'cores':>7}{'extra MB':>10}"
    )
    for name, (_, first, _, cores) in middle.items():
        rates = [result.images_per_second for result in rounds[name]]
        ratios = "".join(f"{rate[name] / rate[base]:16.2f}" for base in bases)
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
        "source": arguments.source,
        "channels": channels,
        "decode": arguments.decode,
        "size": augment.size,
        "batch_size": batch,
        "batches": arguments.batches,
        "seconds": arguments.seconds,
        "workers": workers,
        "repeats": arguments.repeats,
        "pairs_per_second": {name: round(value, 1) for name, value in rate.items()},
        # against the first peer: facebookresearch/moco's loader, or torchgeo's
        "speedup": {
            name: round(value / rate[bases[0]], 3) for name, value in rate.items() if bases
        },
        "absent": absent,
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
    source: Source, augment: AugmentConfig, batch_size: int, data: DataConfig, device: torch.device
) -> tuple[dict[str, TimedLoop], dict[str, str]]:
    """Returns the compared loops, {name: loop}, and why peers are left out.

    The loops do nothing with the batches.
    """
    workers = data.workers

    def loader(name: str) -> Callable[[], Loader]:
        own = replace(data, loader=name)
        return lambda: build_loader(
            source, own, view_augments(augment, 2), BatchSlice(batch_size), 0, device
        )

    starts: dict[str, Callable[[], Any]] = {
        **({} if dali_missing() else {"dali": loader("dali")}),
        "torchvision": loader("torchvision"),
    }
    if data.channels != 3:
        files = [source.load(i) for i in range(len(source))] if len(source) else []
        if not all(isinstance(file, str) for file in files):
            absent = "peers read files of a folder or a list alone"
            peers, why = dict[str, Any](), {"torchgeo": absent, "lightly-train": absent}
        else:
            paths = [str(file) for file in files]
            peers, why = band_loaders(paths, augment, batch_size, workers)
        starts |= peers
        return {name: TimedLoop(start, lambda batch: None) for name, start in starts.items()}, why
    starts |= {
        "reference": lambda: ReferenceLoader(source, augment, batch_size, workers),
        "v2 tensors": lambda: ReferenceLoader(source, augment, batch_size, workers, TensorPairs),
    }
    why = {}
    if reason := albumentations_pairs.why_not():
        why["albumentations"] = reason
    elif isinstance(source.load(0), str):
        starts["albumentations"] = lambda: ReferenceLoader(
            source, augment, batch_size, workers, albumentations_pairs.AlbumentationsPairs
        )
    else:
        why["albumentations"] = "reads files of a folder or a list alone"
    return {name: TimedLoop(start, lambda batch: None) for name, start in starts.items()}, why


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
