"""Single runs of `mocofast bench speedrun`: ours and the reference's, with their CPU clock."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mocofast import settings
from mocofast.config import Config, ConfigError, ModelConfig
from mocofast.data.sources import load_datasets
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.methods.moco import build
from mocofast.ops import info_nce, nt_xent
from mocofast.optim.schedule import learning_rate, scaled_by_batch
from mocofast.train import loop
from mocofast.train import run as training
from mocofast.train.build import new_state
from mocofast.train.engine import Engine
from mocofast.view_sizes import Size, height_width
from mocofast_bench.reference_loop import ReferenceLoader, ReferenceMoCo, plain_sgd, reference_step
from mocofast_bench.training_steps import channels_first

CPU = torch.device("cpu")


class Curve(NamedTuple):
    """The evaluations of a run. cpu: seconds of training until then. knn: knn_top1."""

    epoch: list[float]
    cpu: list[float]
    knn: list[float]


def cpu_seconds() -> float:
    """Returns the CPU time of this process, all threads, and of its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(config: Config, loop: Callable[[Config], Curve]) -> dict[str, Any]:
    settings.validate(config)
    curve = loop(config)
    return {**curve._asdict(), "flops": flops(config), "epochs": config.train.epochs}


@contextmanager
def clocked() -> Iterator[Curve]:
    """Fills a curve from the evaluations of the runs inside the block.

    The time of an evaluation does not count.
    """
    curve, began, left_out = Curve([], [], []), cpu_seconds(), 0.0

    class Clocked(KNNMonitor):
        """The monitor of a run, which also reads the clock."""

        def evaluate(
            self,
            encoder: nn.Module,
            stopped: Callable[[], bool] = lambda: False,
            limit: float = math.inf,
            forward: float = 0.0,
        ) -> dict[str, float]:
            nonlocal left_out
            entered = cpu_seconds()
            values = super().evaluate(encoder, stopped, limit, forward)
            curve.cpu.append(entered - began - left_out)
            curve.knn.append(values["knn_top1"])
            left_out += cpu_seconds() - entered
            return values

    original, loop.KNNMonitor = loop.KNNMonitor, Clocked  # type: ignore[misc]
    try:
        yield curve
    finally:
        loop.KNNMonitor = original  # type: ignore[misc]


def ours(config: Config) -> Curve:
    """Trains by `mocofast pretrain`, in a temporary folder."""
    import torch.utils.tensorboard  # noqa: F401  before the clock starts

    with tempfile.TemporaryDirectory() as folder, clocked() as curve:
        config.train.dir = f"{folder}/run"
        if training.train(config).interrupted:
            raise KeyboardInterrupt  # the log holds whole runs
    every = config.knn.every
    done: list[float] = [min(i * every, config.train.epochs) for i in range(1, len(curve.knn) + 1)]
    return curve._replace(epoch=done)


def reference(config: Config) -> Curve:
    """Trains by the reference's loop and loader, with the recipe's rates.

    Raises ConfigError for another method than MoCo.
    """
    if config.model.method != "moco":
        raise ConfigError(f"--sides: the reference is MoCo, the task {config.model.method}")
    curve, began, left_out = Curve([], [], []), cpu_seconds(), 0.0
    datasets = load_datasets(config.data, config.train.seed)
    torch.manual_seed(config.train.seed)
    model = ReferenceMoCo(channels_first(build(config)))
    optimizer = plain_sgd(model.parameters(), config.optim)
    source, batch = datasets.train, config.data.batch_size
    loader = ReferenceLoader(source, config.augment, batch, workers=0)
    monitor = KNNMonitor.of(datasets, config, CPU)
    assert monitor is not None
    rates, steps = scaled_by_batch(config.optim, batch), len(source) // batch
    for epoch in range(config.train.epochs):
        for step, (im_q, im_k) in enumerate(loader.epoch(epoch)):
            rate = learning_rate(rates, epoch * steps + step, steps, config.train.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            reference_step(model, (im_q, im_k), optimizer)
        done = epoch + 1
        if done % config.knn.every == 0 or done == config.train.epochs:
            entered = cpu_seconds()
            curve.epoch.append(done)
            curve.cpu.append(entered - began - left_out)
            curve.knn.append(monitor.evaluate(model.encoder_q)["knn_top1"])
            left_out += cpu_seconds() - entered
    return curve


def flops(config: Config) -> float:
    """Returns the counted floating-point operations of a training.

    Counts matrix products and convolutions of a step for every size of the views. The products of
    a loss of MoCo or SimCLR count by formula (`_unseen`).
    """
    datasets = load_datasets(config.data, config.train.seed)
    state = new_state(config, datasets, CPU, 0, 1)
    off = torch.autocast("cpu", enabled=False)
    batch = config.data.batch_size
    engine = Engine("eager", state.model, state.optimizer, off, 1, batch)
    per_step: dict[Size, float] = {}
    for size in {*config.augment.training_sizes()}:
        shape = (batch, config.data.channels, *height_width(size))
        views = tuple(torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
        engine.set_scheduled(0, 1, 0.0)
        with FlopCounterMode(display=False) as counter:
            engine.step(views)
        per_step[size] = float(counter.get_total_flops())
        per_step[size] += _unseen(config.model, batch)
    steps = state.loader.steps_per_epoch
    state.loader.close()
    epochs = range(config.train.epochs)
    return sum(steps * per_step[config.augment.at(epoch).size] for epoch in epochs)


def _unseen(m: ModelConfig, batch: int) -> float:
    """Returns the products of a loss by formula, less what the counter sees of the loss.

    The counter does not see inside custom operators, and sees products that are computed twice.
    MoCo: scores and the gradient of the queries, 2 operations x 2 x N x K x C a view. SimCLR:
    scores of 2N views and the gradients of both sides, 2 x 3 x (2N)^2 x C. Other methods: 0.
    """
    q, k = (torch.randn(batch, m.dim, requires_grad=True) for _ in range(2))
    if m.method == "moco":
        queue = torch.nn.functional.normalize(torch.randn(m.queue_size, m.dim))
        sides, products = 1 + m.symmetric, 4 * batch * m.queue_size * m.dim
        loss = partial(info_nce, q, k.detach(), queue, negatives_normalized=True, return_rank=True)
    elif m.method == "simclr":
        sides, products = 1, 6 * (2 * batch) ** 2 * m.dim
        loss = partial(nt_xent, q, k, return_rank=True)
    else:
        return 0.0
    with FlopCounterMode(display=False) as counter:
        loss()[0].backward()
    return float(sides * (products - counter.get_total_flops()))
