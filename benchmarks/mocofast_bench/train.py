"""Times training end to end: our loop and loader beside the reference's loop and loader.

mocofast: our loop and loader.
reference: the loop of facebookresearch/moco with a DataLoader of PIL images.
lightly: a loop of lightly's blocks with a DataLoader of lightly's transforms, if installed.
synthetic: our loop on images in memory. The difference to mocofast is the cost of our loader.

On a CPU our loop takes the precision of `mocofast pretrain`, and the other loops fp32, as their
examples do. Where ours is bf16, "mocofast fp32" and "lightly bf16" compare equal precisions.

Every round starts every loader anew and closes the loader at the end: no loader works ahead
while another loader is timed. Steps on batches that a loader prepared in advance are not
counted. "wait" is the time in which the host waits for data. On a GPU work is queued, and
such a wait need not delay training: compare with synthetic there. On a GPU our engine
compiles in the first round. With three rounds or more, the median time to the first step
does not contain compilation.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mocofast.config import Config
from mocofast.data.interface import Batch, BatchSlice, Source, view_augments
from mocofast.data.loaders import build_loader, choose_loader, count_workers
from mocofast.data.sources import load_datasets
from mocofast.device import choose_device, run_autocast, short_name
from mocofast.settings import DEFAULT_RECIPE, validate
from mocofast.train.threads import set_threads
from mocofast_bench import lightly_pairs, timing
from mocofast_bench.loops import LoopRates, TimedLoop, measure_in_turns, measure_loop, medians
from mocofast_bench.reference_loop import ReferenceLoader, ReferenceMoCo, plain_sgd, reference_step
from mocofast_bench.step import add_model_arguments, build_config
from mocofast_bench.training_steps import (
    channels_first,
    fresh_model,
    lightly_step,
    our_engine,
    pixel_views,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = {
    "model.arch": "resnet18",
    "augment.size": 64,
    "data.batch_size": 32,
    "model.queue_size": 4096,
}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the images, the model and the number of steps."""
    parser.add_argument(
        "path", nargs="?", help=f"folder of images (default: the images of {DEFAULT_RECIPE})"
    )
    add_model_arguments(parser, positive, SMALL)
    parser.add_argument(
        "--steps", type=positive, default=8, help="timed steps in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=-1,
        help="threads or processes, -1: one for every core (default: %(default)s)",
    )
    parser.add_argument("--short", action="store_true", help="leave lightly's loop out")
    parser.set_defaults(repeats=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row."""
    # Configuration and images.
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
    BatchSlice(batch).steps(len(source))  # raises here, not in a worker, if images are too few
    torch.backends.cudnn.benchmark = True  # for all sides, as the reference sets it
    encoder = fresh_model(config, device).encoder_q
    set_threads(encoder, config, device)
    autocast = run_autocast(config, encoder, device)

    # Measure: memory of every side first, then times in turns.
    absent = {}
    if why := lightly_pairs.why_not(config.augment) or arguments.short * "left out by --short":
        absent["lightly"] = why
    names = [name for name in LOOPS if name not in absent]
    if arguments.short or device.type != "cpu" or short_name(autocast) != "bf16":
        names = [name for name in names if name not in EQUAL_PRECISION]
    elif absent:
        names.remove("lightly bf16")
    builds = {name: LOOPS[name] for name in names}
    memory = {
        name: timing.in_fresh_process(memory_of, name, source, config, str(device))
        for name in builds
    }
    loops = {name: build(source, config, device) for name, build in builds.items()}
    rounds = measure_in_turns(loops, arguments.repeats, arguments.steps, batch, device)
    middle = medians(rounds)
    loader = choose_loader(source, config.data.loader, device, view_augments(config.augment, 2))[0]
    # Collect the row and print the table.
    row = {
        "benchmark": "train",
        **timing.environment(device),
        "images": len(source),
        "recipe": config.recipe,
        "arch": config.model.arch,
        "precision": short_name(autocast),
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
        "speedup": ratios_of(rounds),
        "absent": absent,
    }
    print_table(row, rounds)
    return row


def print_table(row: dict[str, Any], rounds: dict[str, list[LoopRates]]) -> None:
    """Prints the row as a table. rounds: {name: results of all rounds}."""
    print(
        f"{row['images']} images, {row['recipe']}, {row['arch']}, {row['size']} px, "
        f"batches of {row['batch_size']}, {row['precision']}, loader {row['loader']}"
    )
    print(f"{row['device']}; {row['workers']} workers; {row['repeats']} rounds")
    for name, reason in row["absent"].items():
        print(f"{name} left out: {reason}")
    heads = f"{'images/s':>10}{'lowest, highest':>18}{'ours over it':>14}"
    print(f"{'':14}{heads}{'first step s':>14}{'wait':>6}{'cores':>7}{'extra MB':>10}")
    for name, rate in row["images_per_second"].items():
        rates = [result.images_per_second for result in rounds[name]]
        spread = f"{min(rates):.1f}, {max(rates):.1f}"
        taken = row["extra_bytes"][name]
        extra = "" if taken is None else f"{taken / 1e6:10.0f}"
        print(
            f"{name:14}{rate:10.1f}{spread:>18}{row['speedup'][name]:14.2f}"
            f"{row['time_to_first_step'][name]:14.2f}{row['data_wait'][name]:6.0%}"
            f"{row['cores'][name]:7.2f}{extra}"
        )


def ratios_of(rounds: dict[str, list[LoopRates]]) -> dict[str, float]:
    """Returns images/s of mocofast over images/s of every side: the median over the rounds.

    A machine whose speed drifts changes both sides of a round.
    """
    own = rounds["mocofast"]
    return {
        name: round(
            statistics.median(a.images_per_second / b.images_per_second for a, b in zip(own, side)),
            3,
        )
        for name, side in rounds.items()
    }


def plot(row: dict[str, Any]) -> Figure:
    """Returns the figure of a row."""
    # Imported here: processes that measure start without matplotlib.
    from mocofast.plots import plot_sides

    quantities = {
        "images/s": row["images_per_second"],
        "time to first step, s": row["time_to_first_step"],
        "wait for data, % of the time": {
            name: 100 * share for name, share in row["data_wait"].items()
        },
        "CPU cores in use": row["cores"],
        "peak memory, workers included, MB": timing.megabytes(row["extra_bytes"]),
    }
    sizes = f"{row['images']} images, {row['arch']}, {row['size']} px, batch {row['batch_size']}"
    return plot_sides(f"{sizes}, {row['device']}", quantities)


def in_precision(precision: str, config: Config) -> Config:
    """Returns the configuration with another `train.precision`."""
    return replace(config, train=replace(config.train, precision=precision))


def memory_of(name: str, source: Source, config: Config, device: str) -> int | None:
    """Returns the peak bytes of one side's training, weights included. Needs a fresh process.

    Memory of loaded libraries is subtracted. On a CPU the memory
    of the loader's processes is added. Returns None where memory cannot be measured.
    """
    where, workers = torch.device(device), 0

    def train() -> None:
        loop = LOOPS[name](source, config, where)

        def step(batch: Any) -> None:
            nonlocal workers
            loop.step(batch)
            if where.type == "cpu":
                workers = max(workers, timing.resident_memory(own=False) or 0)

        measure_loop(TimedLoop(loop.start, step), 1, config.data.batch_size, where)

    extra = timing.peak_extra_memory(train, where)
    return None if extra is None else extra + workers


def ours(source: Source, config: Config, device: torch.device) -> TimedLoop:
    """Returns our loop: the engine's step, with the loader of training."""
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
    """Returns the reference's loop and loader."""
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


def lightly(source: Source, config: Config, device: torch.device) -> TimedLoop:
    """Returns a loop of lightly's blocks on a DataLoader of lightly's transforms."""
    if device.type == "cpu" and config.train.precision == "auto":
        config = in_precision("fp32", config)
    make_step = lightly_step(config, device)

    def step(views: list[torch.Tensor]) -> None:
        im_q, im_k = (
            view.to(device, memory_format=torch.channels_last, non_blocking=True) for view in views
        )
        make_step(im_q, im_k)

    data = config.data
    return TimedLoop(
        lambda: ReferenceLoader(
            source, config.augment, data.batch_size, data.workers, lightly_pairs.LightlyPairs
        ),
        step,
    )


def synthetic(source: Source, config: Config, device: torch.device) -> TimedLoop:
    """Returns our step on one batch that is on the device already. `source` is not used."""
    engine, views = our_engine(config, device), pixel_views(config, device)
    return TimedLoop(_EmptyLoader, lambda _: engine.step(views))


class _EmptyLoader:
    def epoch(self, epoch: int) -> Iterator[None]:
        return iter([None])

    def close(self) -> None:
        """Does nothing: no process to end."""


LOOPS: dict[str, Callable[[Source, Config, torch.device], TimedLoop]] = {
    "mocofast": ours,
    "reference": reference,
    "lightly": lightly,
    "synthetic": synthetic,
    "mocofast fp32": lambda source, config, device: ours(
        source, in_precision("fp32", config), device
    ),
    "lightly bf16": lambda source, config, device: lightly(
        source, in_precision("bf16", config), device
    ),
}
EQUAL_PRECISION = ("mocofast fp32", "lightly bf16")
