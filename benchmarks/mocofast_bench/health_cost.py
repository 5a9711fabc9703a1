"""What the health signals cost beside a training step, in one run.

    python -m mocofast_bench.health_cost [--arch resnet18] [--size 64] [--batch 32] [--rounds 15]

Steps and signals take turns. Prints CPU milliseconds (medians) of a step, and of the signals of a
log line, and the share of the step's time at `--train.log_every` 50 (the default) and 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from mocofast import settings
from mocofast.device import choose_autocast
from mocofast.health.signals import Snapshot, weights_of
from mocofast.methods.build import build_method
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns 0 if the default interval costs at most 2 %."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(argv)
    config = settings.load_recipe("moco_v2_r50_200ep")
    values = {"model.arch": given.arch, "augment.size": given.size, "model.queue_size": 4096}
    settings.apply(config, {**values, "data.batch_size": given.batch})
    method = build_method(config, 10_000)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    device = torch.device("cpu")
    autocast = choose_autocast("fp32", device)
    engine = Engine("eager", method, optimizer_of(method, config.optim), autocast, 1, given.batch)
    shape = (2, given.batch, 3, given.size, given.size)
    views = tuple(torch.randint(0, 256, shape, dtype=torch.uint8))
    steps, lines = [], []
    earlier = weights_of(method)
    for turn in range(given.rounds + 2):
        began = time.process_time()
        metrics = engine.step(views)
        between = time.process_time()
        snapshot = Snapshot(method, views, metrics.pair)
        snapshot.signals(earlier, 1)
        ended = time.process_time()
        earlier = snapshot.weights
        if turn >= 2:
            steps.append(between - began)
            lines.append(ended - between)
    step, line = statistics.median(steps), statistics.median(lines)
    print(
        f"{given.arch}, {given.batch} images of {given.size} pixels: step {1000 * step:.1f} ms, "
        f"signals of a line {1000 * line:.2f} ms (CPU time, medians of {given.rounds})\n"
        f"share of the step's time: {line / step / 50:.3%} with log_every 50, "
        f"{line / step:.2%} with log_every 1"
    )
    return 0 if line / step / 50 <= 0.02 else 1


if __name__ == "__main__":
    raise SystemExit(main())
