"""Times a training step beside the reference's loop, an eager baseline and lightly.

All sides have the same encoder, weights and images. The floor, "encoders only", is the
forward and backward pass of the query encoder and the forward pass of the key encoder, in
our step's precision, on prepared images. The parts of our step are shown as in `mocofast
pretrain --profile`.

`--precision bf16` on a CPU also times our step in fp32. The reference's step stays in fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mocofast.config import Config, ConfigError
from mocofast.device import choose_device, run_autocast
from mocofast.settings import apply, load_recipe, validate
from mocofast.train.engine import choose_mode
from mocofast.train.profile import WAITING, Profile, StepProfiler
from mocofast.train.threads import set_threads
from mocofast_bench import timing
from mocofast_bench.timing import Call
from mocofast_bench.training_steps import (
    IN_FLOAT32,
    MODES,
    STEPS,
    encoders_only,
    fresh_model,
    our_engine,
    pixel_views,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = "moco_v2_r50_200ep"
SMALL = {
    "model.arch": "resnet18_cifar",
    "augment.size": 32,
    "data.batch_size": 32,
    "model.queue_size": 4096,
}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the model, sizes and the engine modes."""
    add_model_arguments(parser, positive, SMALL)
    parser.add_argument(
        "--modes",
        nargs="*",
        choices=MODES,
        default=MODES,
        help="engine modes to time beside the mode of training (default: all, takes minutes)",
    )
    parser.add_argument(
        "--precision",
        dest="train.precision",
        choices=("auto", "fp32", "bf16"),
        help="precision of our step, of the strong step and of lightly's (default: the recipe's)",
    )
    parser.add_argument(
        "--times-only",
        action="store_true",
        help="leave out the first step, memory and cores, which take a new process for every side",
    )
    parser.add_argument(
        "--no-profile",
        action="store_true",
        help="leave out the parts of our step and the waits, which take 36 steps",
    )
    parser.set_defaults(repeats=5)


def add_model_arguments(
    parser: argparse.ArgumentParser, positive: Callable[[str], int], small: dict[str, Any]
) -> None:
    """Adds the recipe and options to override the recipe.

    small: {setting: value} on a CPU, if no recipe is given.
    """
    sizes = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in small.items())
    parser.add_argument(
        "--recipe", help=f"recipe of model and batch (default: {RECIPE}; on a CPU with {sizes})"
    )
    parser.add_argument("--arch", dest="model.arch", help="encoder (default: the recipe's)")
    parser.add_argument(
        "--size", dest="augment.size", type=positive, help="width and height of a view, in pixels"
    )
    parser.add_argument("--batch", dest="data.batch_size", type=positive, help="images in a step")
    parser.add_argument(
        "--queue",
        dest="model.queue_size",
        type=positive,
        help="number of negative keys, a multiple of --batch",
    )


def build_config(
    arguments: argparse.Namespace, device: torch.device, small: dict[str, Any]
) -> Config:
    """Returns the configuration for the arguments of `add_model_arguments`.

    Raises ConfigError if the queue is not a multiple of the batch.
    """
    config = load_recipe(arguments.recipe or RECIPE)
    if arguments.recipe is None and device.type != "cuda":
        apply(config, small)
    apply(
        config,
        {
            name: value
            for name, value in vars(arguments).items()
            if "." in name and value is not None
        },
    )
    if config.model.queue_size % config.data.batch_size:
        raise ConfigError(
            "--queue must be a multiple of --batch, which the reference demands: "
            f"got {config.model.queue_size} keys and {config.data.batch_size} images"
        )
    return config


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row."""
    device = choose_device(arguments.device)
    config = build_config(arguments, device, SMALL)
    config.data.path = config.data.path or "."  # validate() asks for a path, nothing is read
    validate(config)
    torch.backends.cudnn.benchmark = True  # for all sides, as the reference sets it
    encoder = fresh_model(config, device).encoder_q
    set_threads(encoder, config, device)

    # Build the sides.
    mode, why = choose_mode(config.engine.mode, device, world_size=1)
    left_out = {f"engine {m}" for m in MODES if m == mode or m not in arguments.modes}
    autocast = run_autocast(config, encoder, device)
    if device.type != "cpu" or not autocast._enabled:
        left_out.add(IN_FLOAT32)
    steps, skipped = build_sides(config, device, left_out)
    # Measure: every side alone, then all sides in turns, then waits and the parts of our step.
    threads = torch.get_num_threads()
    sides = list(steps)
    alone: dict[str, Alone] = {
        name: timing.in_fresh_process(measure_alone, name, config, str(device), threads)
        for name in ([] if arguments.times_only else sides)
    }
    steps["encoders only"] = encoders_only(config, device)
    with FlopCounterMode(display=False) as counter:
        steps["encoders only"]()
    times = timing.interleaved(steps, arguments.repeats, device)

    # Collect the row and print the table.
    batch, ours = config.data.batch_size, times["mocofast"].median
    floor = times["encoders only"].median
    flops = counter.get_total_flops()
    row = {
        "benchmark": "step",
        **timing.environment(device),
        "recipe": config.recipe,
        "engine": mode,
        "precision": "bf16" if autocast._enabled else "fp32",
        "arch": config.model.arch,
        "size": config.augment.size,
        "batch_size": batch,
        "queue_size": config.model.queue_size,
        "repeats": arguments.repeats,
        "images_per_second": {name: round(batch / t.median, 2) for name, t in times.items()},
        **timing.entries(times),
        "speedup": {name: round(times[name].median / ours, 3) for name in sides},
        "over_encoders_only": round(ours / floor, 3),
        "first_step_seconds": {
            name: round(values.first_step_seconds, 3) for name, values in alone.items()
        },
        "extra_bytes": {name: values.extra_bytes for name, values in alone.items()},
        "cores": {name: round(values.cores, 3) for name, values in alone.items()},
        "encoder_flops": flops,
        "gflops": round(flops / ours / 1e9, 1),
        "skipped": skipped,
    }
    arguments.keep(row)
    head = "two-layer" if config.model.mlp else "linear"
    if arguments.no_profile:
        print_table(row, head, why)
        return row
    profile = profile_step(config, device)
    row |= {
        "host_synchronisations": {name: host_synchronisations(steps[name]) for name in sides},
        "breakdown_milliseconds": {name: round(value, 4) for name, value, _ in profile.bars()},
        "floor_milliseconds": {
            name: round(floor, 4) for name, _, floor in profile.bars() if floor is not None
        },
        "matrix_gflops": round(profile.rate / 1e9, 1),
    }
    print_table(row, head, why)
    print(f"our step: {profile.table()}")
    return row


def build_sides(
    config: Config, device: torch.device, left_out: set[str]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Builds the step of every side.

    left_out: names of sides that are not timed.

    Returns {name: step}, and {name: why the side cannot run here}.
    """
    steps: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    for name, build in STEPS.items():
        if name in left_out:
            continue
        try:
            steps[name] = build(config, device)
        except (ImportError, ConfigError) as error:
            skipped[name] = str(error)
    return steps, skipped


def print_table(row: dict[str, Any], head: str, why: str) -> None:
    """Prints the row as a table.

    head: kind of projection head.
    why: reason for the engine's mode.
    """
    print(
        f"{row['arch']}, {row['size']} px, batch {row['batch_size']}, "
        f"queue {row['queue_size']}, {head} head"
    )
    print(f"{row['device']}; {row['precision']}; encoders {row['encoder_flops'] / 1e9:.1f} GFLOP")
    print(f"mocofast: engine {row['engine']}, {why}")
    print(
        f"{'':16}{'images/s':>10}{'ms':>10}{'quartiles':>20}{'ours is x':>11}"
        f"{'first s':>9}{'extra MB':>10}{'cores':>7}{'waits':>7}"
    )
    ours = row["milliseconds"]["mocofast"]
    for name, milliseconds in row["milliseconds"].items():
        low, high = row["quartiles"][name]
        line = f"{name:16}{row['images_per_second'][name]:10.1f}{milliseconds:10.1f}"
        line += f"{f'{low:.1f} - {high:.1f}':>20}{milliseconds / ours:11.2f}"
        if name in row["cores"]:
            extra = row["extra_bytes"][name]
            megabytes = "" if extra is None else f"{extra / 1e6:.1f}"
            line += f"{row['first_step_seconds'][name]:9.2f}{megabytes:>10}"
            line += f"{row['cores'][name]:7.2f}"
            if "host_synchronisations" in row:
                line += f"{row['host_synchronisations'][name]:7}"
        print(line)
    for name, reason in row["skipped"].items():
        print(f"{name:16}skipped: {reason}")


def plot(row: dict[str, Any]) -> Figure:
    """Returns the figure of a row."""
    # Imported here: processes that measure start without matplotlib.
    from mocofast.plots import Bar, plot_sides

    quantities = {
        "images/s": {name: row["images_per_second"][name] for name in row["speedup"]},
        "time to first step, s": row["first_step_seconds"],
        "peak extra memory, MB": timing.megabytes(row["extra_bytes"]),
    }
    quantities = {name: values for name, values in quantities.items() if values}
    title = f"{row['arch']}, {row['size']} px, batch {row['batch_size']}, {row['device']}"
    floors = row.get("floor_milliseconds", {})  # absent with --no-profile
    breakdown = row.get("breakdown_milliseconds", {})
    parts = [Bar(name, value, floors.get(name)) for name, value in breakdown.items()]
    return plot_sides(title, quantities, parts)


def profile_step(config: Config, device: torch.device) -> Profile:
    """Profiles our step on images in memory, without a wait for data."""
    engine, views = our_engine(config, device), pixel_views(config, device)
    profiler = StepProfiler(engine.method, engine.optimizer, engine.autocast, config)
    while profiler.profile is None:
        profiler.begin()
        engine.step(views)
        profiler.end()
    return profiler.profile


# ---- first step, memory and waits ----


class Alone(NamedTuple):
    """Measurements of a side in a separate process."""

    first_step_seconds: float  # compiling and loading code included, building the model not
    # Bytes at the peak of a step, minus weights, optimiser state, queue and images. None: unknown.
    extra_bytes: int | None
    cores: float  # CPU time of a step / elapsed time


def measure_alone(name: str, config: Config, device: str, threads: int) -> Alone:
    """Measures the side `name`. To be called in a fresh process."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    step = STEPS[name](config, where)
    began = time.perf_counter()
    step()
    timing.synchronize(where)
    first = time.perf_counter() - began
    extra = timing.peak_extra_memory(step, where)
    cpu, began = time.process_time(), time.perf_counter()
    step()
    timing.synchronize(where)
    return Alone(first, extra, (time.process_time() - cpu) / (time.perf_counter() - began))


class HostSynchronisations(TorchDispatchMode):
    """Counts calls where the host waits for a device.

    On a CPU nothing waits: the mode counts calls with a wait on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        to_host = (
            name == "_to_copy" and result.device.type == "cpu" and args[0].device.type != "cpu"
        )
        self.count += name in WAITING or to_host
        return result


def host_synchronisations(step: Call) -> int:
    """Returns how often a step waits for the device, after one step of warm-up."""
    step()
    with HostSynchronisations() as waits:
        step()
    return waits.count
