"""The lines of a run before its first step: what trains on what, how, and for how long."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from mocofast import settings
from mocofast.data.finding import counted
from mocofast.data.loaders import pixels_of
from mocofast.data.look import look
from mocofast.data.remarks import remarks
from mocofast.data.sources import Datasets
from mocofast.device import precision_note
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.train import estimate
from mocofast.train.auto import Choice
from mocofast.train.build import queue_remarks
from mocofast.train.checkpoint import RunState

log = logging.getLogger("mocofast")


def announce(
    state: RunState,
    encoder: nn.Module,
    datasets: Datasets,
    choices: Sequence[Choice],
    autocast: torch.autocast,
    world_size: int,
    lines: Sequence[str],
    resumed_step: int | None,
) -> float:
    """Logs recipe, data, device, loader, and how long the run will take.

    encoder: the query encoder, whole. choices: of the recipe `auto`. lines: further lines.
    resumed_step: None for a new run.

    Returns the seconds of a forward pass of an image, as measured on a CPU by one process. 0: not
    known.
    """
    announce_images(state, datasets, choices, resumed_step is None)
    log.info(describe_device(state, autocast, world_size))
    for line in lines:
        log.info(line)
    if resumed_step is not None:
        announce_continuation(state, world_size)
        return 0.0
    seconds = announce_time(state, encoder, autocast)
    # A forward and a backward pass take three times as long, the momentum encoder once.
    return seconds / 4 if state.device.type == "cpu" and world_size == 1 else 0.0


def announce_images(
    state: RunState, datasets: Datasets, choices: Sequence[Choice], is_new: bool
) -> None:
    """Logs recipe, data, choices, and what does not fit.

    choices: of the recipe `auto`. is_new: the run does not continue from a checkpoint.
    """
    c, steps = state.config, state.loader.steps_per_epoch
    log.info(
        "recipe %s: %s, %s in %s an epoch, %s, %s",
        c.recipe,
        c.model.arch,
        counted(len(state.source), "image"),
        counted(steps, "step"),
        counted(c.train.epochs, "epoch"),
        state.model.describe(),
    )
    if c.data.batch_sizes:
        total = counted(state.pace.before(c.train.epochs), "step")
        log.info("images of a step by epoch: %s; %s", ", ".join(c.data.batch_sizes), total)
    log.info("data: %s", datasets.note)
    if missing := KNNMonitor.missing(datasets, c):
        log.info("no kNN monitor: %s", missing)
    for option, value, why in choices:
        log.info("chose --%s %s: %s", option, settings.shown(value), why)
    lines = [*datasets.remarks, *remarks(datasets.train, c.data.channels)]
    lines += queue_remarks(state.model, len(state.source), c.data.batch_size)
    if is_new:
        pixels = pixels_of(datasets.train, c.data.channels)
        lines += look(datasets.train, datasets.val, c.augment.size, pixels)
    for line in lines:
        log.warning("data: %s", line)
    for line in estimate.warnings(c, len(state.source), steps):
        log.warning("%s", line)


def announce_time(state: RunState, encoder: nn.Module, autocast: torch.autocast) -> float:
    """Measures and logs how long a new run will take.

    Returns the seconds of training on an image, 0 for a run without an epoch.
    """
    c = state.config
    if not c.train.epochs:
        return 0.0
    each = estimate.seconds_per_sample(encoder, c.augment, c.data.channels, state.device, autocast)
    own = max(state.shares_of_a_batch().counts)  # the others wait for the rank of most images
    log.info(estimate.time_of_run(each, c, own, state.loader.steps_per_epoch))
    return each


def announce_continuation(state: RunState, world_size: int) -> None:
    """Logs where a continued run begins, and that its ranks have changed."""
    log.info(
        "continuing at step %d, epoch %d + %d steps", state.step, state.epoch, state.step_in_epoch
    )
    if state.changed == "sizes":
        log.warning(
            "image files have other sizes than at the checkpoint, so the run goes on with other "
            "images of the same names"
        )
    elif state.changed == "times":
        log.warning(
            "image files have other times than at the checkpoint: a copy, or files of other "
            "content and equal sizes (--data.checksum true tells)"
        )
    if state.precision_before not in ("", state.precision):
        log.warning(
            "the checkpoint is of a run in %s, and the run goes on in %s (train.precision)",
            state.precision_before,
            state.precision,
        )
    if state.ranks_before != world_size:
        log.warning(
            "the checkpoint is of %d ranks, and the run goes on with %d: a rank has another share "
            "of a batch, so BatchNorm and the order of sums differ from a run that keeps its ranks",
            state.ranks_before,
            world_size,
        )


def describe_device(state: RunState, autocast: torch.autocast, world_size: int) -> str:
    """Returns the line on devices, precision and loader."""
    precision = precision_note(autocast, state.config)
    loader = f"loader {state.loader.name}: {state.loader.reason}"
    return f"device {state.device} x {world_size}, {precision}; {loader}"
