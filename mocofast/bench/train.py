"""Training end to end on the same images: our loop and loader, the reference's loop with its PIL DataLoader, and our
loop on images that are there already (synthetic), which says what our loader costs.

Each side starts its loader anew in every round and closes it after, so that none works ahead while another is timed;
steps on the batches that a loader has ready by then are not counted. The wait for data is the host's. On a GPU, whose
work is queued, it need not delay anything: there, compare with synthetic.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mocofast.bench import timing
from mocofast.bench.reference_loop import ReferenceLoader, ReferenceMoCo, plain_sgd, reference_step
from mocofast.bench.sides import channels_first, fresh_model, our_optimizer, pixel_views
from mocofast.bench.step import add_model_arguments, configured
from mocofast.config import Config
from mocofast.data.interface import Batch, Shard, Source, view_augments
from mocofast.data.loaders import build_loader, choose_loader, count_workers
from mocofast.data.sources import load_splits
from mocofast.settings import DEFAULT_RECIPE, validate
from mocofast.step import choose_autocast, train_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM_UP = 6  # steps: what two workers, or DALI's queues, have made before the first batch is taken
SMALL = {"model.arch": "resnet18", "augment.size": 64, "data.batch_size": 32, "model.queue_size": 4096}


class Side(NamedTuple):
    """A loop: how to start its loader (with `epoch(number)` and `close()`), and one step on a batch of it."""

    start: Callable[[], Any]
    step: Callable[[Any], Any]


class Measured(NamedTuple):
    """One round of one side."""

    images_per_second: float
    time_to_first_step: float  # seconds from the start of the loader to the end of a first step
    data_wait: float  # share of the time in which the host waited for a batch
    cores: float  # CPU time of this process and its workers over the time that passed, start included


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The images, the model, and how long."""
    parser.add_argument("path", nargs="?", help=f"a folder of images; without it, those of {DEFAULT_RECIPE}")
    add_model_arguments(parser, positive, SMALL)
    parser.add_argument("--steps", type=positive, default=8, help="timed in a round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=-1, help="threads or processes; -1: the cores there are")
    parser.set_defaults(repeats=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device = timing.resolved(arguments.device)
    if arguments.path is None and arguments.recipe is None:
        arguments.recipe = DEFAULT_RECIPE
    config = configured(arguments, device, SMALL)
    config.data.workers, config.data.holdout = count_workers(arguments.workers), 0.0
    if arguments.path is not None:
        config.data.source, config.data.path = "folder", arguments.path
    validate(config)
    source = load_splits(config.data, config.train.seed).train
    batch = config.data.batch_size
    Shard(batch).steps(len(source))  # too few images are an error here, not in a worker
    torch.backends.cudnn.benchmark = True  # as the reference sets it; for all sides

    rounds: dict[str, list[Measured]] = {}
    memory = {name: timing.in_fresh_process(memory_of, name, config, str(device)) for name in SIDES}
    sides = {name: build(source, config, device) for name, build in SIDES.items()}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            rounds.setdefault(name, []).append(measure(side, arguments.steps, batch, device))
    medians = {name: Measured(*map(statistics.median, zip(*values))) for name, values in rounds.items()}
    rate = {name: median.images_per_second for name, median in medians.items()}
    loader = choose_loader(source, config.data.loader, device, view_augments(config.augment, 2))[0]
    print(
        f"{len(source)} images, {config.recipe}, {config.model.arch}, {config.augment.size} px, batches of {batch}, "
        f"loader {loader}"
    )
    print(f"{timing.device_name(device)}; {config.data.workers} workers; {arguments.repeats} rounds")
    heads = f"{'images/s':>10}{'lowest, highest':>18}{'x reference':>12}"
    print(f"{'':12}{heads}{'first step s':>14}{'wait':>6}{'cores':>7}{'extra MB':>10}")
    for name, median in medians.items():
        rates = [each.images_per_second for each in rounds[name]]
        print(
            f"{name:12}{rate[name]:10.1f}{f'{min(rates):.1f}, {max(rates):.1f}':>18}"
            f"{rate[name] / rate['reference']:12.2f}{median.time_to_first_step:14.2f}{median.data_wait:6.0%}"
            f"{median.cores:7.2f}" + (f"{extra / 1e6:10.0f}" if (extra := memory[name]) is not None else "")
        )
    return {
        "benchmark": "train",
        **timing.environment(device),
        "images": len(source),
        "recipe": config.recipe,
        "arch": config.model.arch,
        "size": config.augment.size,
        "batch_size": batch,
        "queue_size": config.model.queue_size,
        "loader": loader,
        "workers": config.data.workers,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        **{
            field: {name: round(getattr(median, field), 4) for name, median in medians.items()}
            for field in Measured._fields
        },
        "extra_bytes": memory,
        "speedup": round(rate["mocofast"] / rate["reference"], 3),
        "over_synthetic": round(rate["mocofast"] / rate["synthetic"], 3),
    }


def draw(row: dict[str, Any]) -> Figure:
    """The picture of a row."""
    from mocofast.plots import draw_sides  # here, so that processes that measure start without matplotlib

    quantities = {
        "images/s": row["images_per_second"],
        "time to first step, s": row["time_to_first_step"],
        "wait for data, % of the time": {name: 100 * share for name, share in row["data_wait"].items()},
        "CPU cores in use": row["cores"],
        "peak memory, workers included, MB": {
            n: value / 1e6 for n, value in row["extra_bytes"].items() if value is not None
        },
    }
    title = f"{row['images']} images, {row['arch']}, {row['size']} px, batch {row['batch_size']}, {row['device']}"
    return draw_sides(title, quantities)


def memory_of(name: str, config: Config, device: str) -> int | None:
    """Peak bytes of a side's training, weights included, beyond those of a process that has loaded the libraries. On
    a CPU with those of its loader's processes. To be called in a fresh process."""
    where = torch.device(device)
    source = load_splits(config.data, config.train.seed).train
    workers: list[int | None] = [0]

    def trained() -> None:
        side = SIDES[name](source, config, where)

        def step(batch: Any) -> None:
            side.step(batch)
            workers.append(timing.resident_memory(own=False) if where.type == "cpu" else 0)

        measure(Side(side.start, step), 1, config.data.batch_size, where)

    extra = timing.peak_extra_memory(trained, where)
    return None if extra is None else extra + max(value or 0 for value in workers)


def measure(side: Side, steps: int, batch_size: int, device: torch.device) -> Measured:
    """Start, warm up, and time `steps` steps."""
    first = waited = counted_from = 0.0
    cpu, began = _cpu_seconds(), time.perf_counter()
    with closing(side.start()) as loader, closing(_endless(loader)) as batches:
        for i in range(WARM_UP + steps):
            if i == WARM_UP:
                timing.synchronize(device)
                waited, counted_from = 0.0, time.perf_counter()
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            side.step(batch)
            if i == 0:
                timing.synchronize(device)
                first = time.perf_counter() - began
        timing.synchronize(device)
        seconds = time.perf_counter() - counted_from
    whole = time.perf_counter() - began
    return Measured(steps * batch_size / seconds, first, waited / seconds, (_cpu_seconds() - cpu) / whole)


def _endless(loader: Any) -> Generator[Any, None, None]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def ours(source: Source, config: Config, device: torch.device) -> Side:
    """What train.py does in a step, with the loader it would take."""
    model = fresh_model(config, device)
    optimizer = our_optimizer(model, config)
    autocast = choose_autocast(config.train.precision, device)

    def start() -> Any:
        augments = view_augments(config.augment, 2)
        return build_loader(source, config.data, augments, Shard(config.data.batch_size), config.train.seed, device)

    def step(batch: Batch) -> None:
        views = tuple(view.to(device, non_blocking=True) for view in batch.views)
        train_step(model, views, optimizer, config.train.accumulate, autocast)

    return Side(start, step)


def reference(source: Source, config: Config, device: torch.device) -> Side:
    """The reference's loop and its loader."""
    plain = ReferenceMoCo(channels_first(fresh_model(config, device)))
    optimizer = plain_sgd(plain.parameters(), config.optim)

    def step(views: list[torch.Tensor]) -> None:
        im_q, im_k = (view.to(device, non_blocking=True) for view in views)
        reference_step(plain, (im_q, im_k), optimizer)

    return Side(lambda: ReferenceLoader(source, config.augment, config.data.batch_size, config.data.workers), step)


def synthetic(source: Source, config: Config, device: torch.device) -> Side:
    """Our step on one batch that is on the device already; `source` is not looked at."""
    model = fresh_model(config, device)
    optimizer = our_optimizer(model, config)
    autocast = choose_autocast(config.train.precision, device)
    views = pixel_views(config, device)
    return Side(_Nothing, lambda _: train_step(model, views, optimizer, config.train.accumulate, autocast))


class _Nothing:
    def epoch(self, epoch: int) -> Iterator[None]:
        return iter([None])

    def close(self) -> None:
        """There is nothing to end."""


SIDES: dict[str, Callable[[Source, Config, torch.device], Side]] = {
    "mocofast": ours,
    "reference": reference,
    "synthetic": synthetic,
}
