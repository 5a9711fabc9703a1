"""Training end to end on the same images: our loop and loader, the reference's loop with its PIL DataLoader, and our
loop on images that are there already (synthetic), which says what our loader costs.

Each side starts its loader anew in every round and closes it after, so that none works ahead while another is timed;
steps on the batches that a loader has ready by then are not counted. The wait for data is the host's. On a GPU, whose
work is queued, it need not delay anything: there, compare with synthetic. What our engine compiles there is compiled
in a side's first round; the median of three or more leaves that out of the time to a first step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from mocofast.config import Config
from mocofast.data.interface import Batch, BatchSlice, Source, view_augments
from mocofast.data.loaders import build_loader, choose_loader, count_workers
from mocofast.data.sources import load_datasets
from mocofast.device import choose_device
from mocofast.settings import DEFAULT_RECIPE, validate
from mocofast_bench import timing
from mocofast_bench.loops import LoopRates, TimedLoop, measure_in_turns, measure_loop, medians
from mocofast_bench.reference_loop import ReferenceLoader, ReferenceMoCo, plain_sgd, reference_step
from mocofast_bench.step import add_model_arguments, build_config
from mocofast_bench.training_steps import channels_first, fresh_model, our_engine, pixel_views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = {
    "model.arch": "resnet18",
    "augment.size": 64,
    "data.batch_size": 32,
    "model.queue_size": 4096,
}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The images, the model, and how long."""
    parser.add_argument(
        "path", nargs="?", help=f"a folder of images; without it, those of {DEFAULT_RECIPE}"
    )
    add_model_arguments(parser, positive, SMALL)
    parser.add_argument(
        "--steps", type=positive, default=8, help="timed in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=-1, help="threads or processes; -1: the cores there are"
    )
    parser.set_defaults(repeats=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device = choose_device(arguments.device)
    if arguments.path is None and arguments.recipe is None:
        arguments.recipe = DEFAULT_RECIPE
    config = build_config(arguments, device, SMALL)
    config.data.workers, config.data.holdout = count_workers(arguments.workers), 0.0
    if arguments.path is not None:
        config.data.source, config.data.path = "folder", arguments.path
    validate(config)
    source = load_datasets(config.data, config.train.seed).train
    batch = config.data.batch_size
    BatchSlice(batch).steps(len(source))  # too few images are an error here, not in a worker
    torch.backends.cudnn.benchmark = True  # as the reference sets it; for all sides

    memory = {
        name: timing.in_fresh_process(memory_of, name, source, config, str(device))
        for name in SIDES
    }
    sides = {name: build(source, config, device) for name, build in SIDES.items()}
    rounds = measure_in_turns(sides, arguments.repeats, arguments.steps, batch, device)
    middle = medians(rounds)
    rate = {name: median.images_per_second for name, median in middle.items()}
    loader = choose_loader(source, config.data.loader, device, view_augments(config.augment, 2))[0]
    print(
        f"{len(source)} images, {config.recipe}, {config.model.arch}, {config.augment.size} px, batches of {batch}, "
        f"loader {loader}"
    )
    print(
        f"{timing.device_name(device)}; {config.data.workers} workers; {arguments.repeats} rounds"
    )
    heads = f"{'images/s':>10}{'lowest, highest':>18}{'x reference':>12}"
    print(f"{'':12}{heads}{'first step s':>14}{'wait':>6}{'cores':>7}{'extra MB':>10}")
    for name, median in middle.items():
        rates = [each.images_per_second for each in rounds[name]]
        print(
            f"{name:12}{rate[name]:10.1f}{f'{min(rates):.1f}, {max(rates):.1f}':>18}"
            f"{rate[name] / rate['reference']:12.2f}{median.time_to_first_step:14.2f}{median.data_wait:6.0%}"
            f"{median.cores:7.2f}"
            + (f"{extra / 1e6:10.0f}" if (extra := memory[name]) is not None else "")
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
            field: {name: round(getattr(median, field), 4) for name, median in middle.items()}
            for field in LoopRates._fields
        },
        "extra_bytes": memory,
        "speedup": round(rate["mocofast"] / rate["reference"], 3),
        "over_synthetic": round(rate["mocofast"] / rate["synthetic"], 3),
    }


def plot(row: dict[str, Any]) -> Figure:
    """The picture of a row."""
    from mocofast.plots import (
        plot_sides,
    )  # here, so that processes that measure start without matplotlib

    quantities = {
        "images/s": row["images_per_second"],
        "time to first step, s": row["time_to_first_step"],
        "wait for data, % of the time": {
            name: 100 * share for name, share in row["data_wait"].items()
        },
        "CPU cores in use": row["cores"],
        "peak memory, workers included, MB": timing.megabytes(row["extra_bytes"]),
    }
    title = f"{row['images']} images, {row['arch']}, {row['size']} px, batch {row['batch_size']}, {row['device']}"
    return plot_sides(title, quantities)


def memory_of(name: str, source: Source, config: Config, device: str) -> int | None:
    """Peak bytes of a side's training, weights included, beyond those of a process that has loaded the libraries. On
    a CPU with those of its loader's processes. To be called in a fresh process."""
    where, held = torch.device(device), 0

    def trained() -> None:
        side = SIDES[name](source, config, where)

        def step(batch: Any) -> None:
            nonlocal held
            side.step(batch)
            if where.type == "cpu":
                held = max(held, timing.resident_memory(own=False) or 0)

        measure_loop(TimedLoop(side.start, step), 1, config.data.batch_size, where)

    extra = timing.peak_extra_memory(trained, where)
    return None if extra is None else extra + held


def ours(source: Source, config: Config, device: torch.device) -> TimedLoop:
    """What train.py does in a step, with the loader it would take."""
    engine = our_engine(config, device)

    def start() -> Any:
        augments = view_augments(config.augment, 2)
        return build_loader(
            source,
            config.data,
            augments,
            BatchSlice(config.data.batch_size),
            config.train.seed,
            device,
        )

    def step(batch: Batch) -> None:
        engine.step(tuple(view.to(device, non_blocking=True) for view in batch.views))

    return TimedLoop(start, step)


def reference(source: Source, config: Config, device: torch.device) -> TimedLoop:
    """The reference's loop and its loader."""
    plain = ReferenceMoCo(channels_first(fresh_model(config, device)))
    optimizer = plain_sgd(plain.parameters(), config.optim)

    def step(views: list[torch.Tensor]) -> None:
        im_q, im_k = (view.to(device, non_blocking=True) for view in views)
        reference_step(plain, (im_q, im_k), optimizer)

    return TimedLoop(
        lambda: ReferenceLoader(
            source, config.augment, config.data.batch_size, config.data.workers
        ),
        step,
    )


def synthetic(source: Source, config: Config, device: torch.device) -> TimedLoop:
    """Our step on one batch that is on the device already; `source` is not looked at."""
    engine, views = our_engine(config, device), pixel_views(config, device)
    return TimedLoop(_Nothing, lambda _: engine.step(views))


class _Nothing:
    def epoch(self, epoch: int) -> Iterator[None]:
        return iter([None])

    def close(self) -> None:
        """There is nothing to end."""


SIDES: dict[str, Callable[[Source, Config, torch.device], TimedLoop]] = {
    "mocofast": ours,
    "reference": reference,
    "synthetic": synthetic,
}
