"""Measures weak scaling over gloo processes on one machine, beside the reference's loop.

    PYTHONPATH=.:kernels:benchmarks python -m mocofast_bench.weak_scaling --ranks 1 2 4

Every rank trains on a batch of the same size, on one thread. All ranks together are timed, and
the sides take turns. Reports images per second and CPU time per image. Jobs on the same
machine disturb CPU time less. docs/scaling.md has the measured figures and says what the
figures can and cannot show. An installed mocofast needs no PYTHONPATH.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mocofast.config import Config
from mocofast.settings import apply, load_recipe
from mocofast_bench import timing
from mocofast_bench.processes import on_ranks
from mocofast_bench.reference_loop import ReferenceMoCo, plain_sgd, reference_step
from mocofast_bench.training_steps import (
    channels_first,
    float_views,
    fresh_model,
    our_engine,
    pixel_views,
)

CPU = torch.device("cpu")
WARM_UP_STEPS = 3  # DistributedDataParallel rebuilds the buckets in the second step


def build_steps(config: Config) -> dict[str, Callable[[], Any]]:
    """Returns {side: training step on this rank}.

    config: data.batch_size is the batch of a rank.
    """
    engine, views = our_engine(config, CPU), pixel_views(config, CPU)
    model = channels_first(fresh_model(config, CPU))
    floats = float_views(model, views, torch.contiguous_format)
    plain = ReferenceMoCo(model)
    sgd = plain_sgd(plain.parameters(), config.optim)
    wrapped = DistributedDataParallel(plain)  # the reference needs DDP even for one process
    return {
        "mocofast": lambda: engine.step(views),
        "reference": lambda: reference_step(wrapped, floats, sgd),
    }


def rounds(
    config: Config, repeats: int, steps: int, rank: int
) -> dict[str, list[tuple[float, float]]]:
    """Times the sides in turns on this rank.

    repeats: timed rounds.
    steps: training steps in a round.
    rank: not used (every rank does the same).

    Returns {side: [(elapsed seconds, CPU seconds of all ranks) for every round]}.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    both = build_steps(config)
    for _ in range(WARM_UP_STEPS):
        for step in both.values():
            step()
    for _ in range(repeats):
        for name, step in both.items():
            dist.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            dist.barrier()
            used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
            seconds = time.perf_counter() - began
            dist.all_reduce(used)
            found.setdefault(name, []).append((seconds, used.item()))
    return found


def measure(world: int, config: Config, repeats: int, steps: int) -> dict[str, dict[str, float]]:
    """Measures `world` ranks and returns medians over the rounds, for every side.

    images_per_second: of all ranks together.
    cpu_milliseconds_per_image: CPU time of all ranks / images of all ranks.
    """
    found = on_ranks(functools.partial(rounds, config, repeats, steps), world)[0]
    images = world * config.data.batch_size * steps
    return {
        name: {
            "images_per_second": round(
                statistics.median(images / seconds for seconds, _ in values), 2
            ),
            "cpu_milliseconds_per_image": round(
                statistics.median(1e3 * cpu / images for _, cpu in values), 4
            ),
        }
        for name, values in found.items()
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="numbers of processes (default: 1 2 4)",
    )
    parser.add_argument("--arch", default="resnet18", help="encoder (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        help="width and height of a view, in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=16, help="images per rank (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=4096, help="negative keys (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps in a round (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="append the JSON line to this file"
    )
    return parser.parse_args()


def main() -> None:
    """Measures every number of ranks, prints a table and a JSON line."""
    arguments = parse_arguments()
    config = load_recipe("moco_v2_r50_200ep")
    sizes = {
        "model.arch": arguments.arch,
        "augment.size": arguments.size,
        "data.batch_size": arguments.batch,
    }
    apply(config, {**sizes, "model.queue_size": arguments.queue})

    # Measure every number of ranks and print the table.
    results = {}
    print(f"{'ranks':>6}{'side':>12}{'images/s':>10}{'CPU ms per image':>18}{'of one rank':>13}")
    for world in arguments.ranks:
        results[str(world)] = found = measure(world, config, arguments.repeats, arguments.steps)
        for name, values in found.items():
            one = results[str(arguments.ranks[0])][name]["cpu_milliseconds_per_image"]
            cpu = values["cpu_milliseconds_per_image"]
            rate = f"{values['images_per_second']:10.1f}"
            print(f"{world:6}{name:>12}{rate}{cpu:18.2f}{cpu / one:13.2f}", flush=True)
    # The JSON line.
    load = round(os.getloadavg()[0], 1)
    row = {
        "benchmark": "weak_scaling",
        **timing.environment(CPU),
        "threads": 1,
        "cores": os.cpu_count(),
        "load": load,
    }
    line = json.dumps({**row, **sizes, "queue_size": arguments.queue, "results": results})
    print(line)
    if arguments.save is not None:
        with arguments.save.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
