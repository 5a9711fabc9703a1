"""Before a run starts: how long it will take, and settings that do not fit the set."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from mocofast.config import AugmentConfig, Config
from mocofast.data.finding import counted
from mocofast.models.batch_norm import SplitBatchNorm
from mocofast.models.fastest import to_fastest_format
from mocofast.models.sync_batch_norm import SyncBatchNorm
from mocofast.train.metrics import duration
from mocofast.train.pace import Pace
from mocofast.view_sizes import Size, height_width

# Images of the measurement. 8 images take so little time in a small network that starting
# operations would count more than computing: then 128 images are measured.
IMAGES = (8, 128)
SHORT = 0.05  # seconds
LEFT_OUT = 0.05  # share of the images that may be left out of an epoch without a word


def seconds_per_image(
    encoder: nn.Module,
    size: Size,
    channels: int,
    device: torch.device,
    autocast: torch.autocast | None = None,
) -> float:
    """Measures the seconds of training on an image: query encoder and momentum encoder.

    encoder: copied, and moved to `device`. Neither the encoder nor the random state changes.
    size, channels: of a view.
    """
    encoder = copy.deepcopy(encoder).train()
    for module in encoder.modules():
        if isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
            module.eval()  # in train mode the layer would wait for ranks that do not measure
    norms = [module for module in encoder.modules() if isinstance(module, SplitBatchNorm)]
    splits = max((module.num_splits for module in norms), default=1)  # which divide a batch
    order = to_fastest_format(encoder, device, splits)

    def seconds_of(count: int) -> float:
        images = torch.rand(count, channels, *height_width(size), device=device)
        images = images.contiguous(memory_format=order)
        begin = time.perf_counter()
        with copy.copy(autocast) or torch.autocast(device.type, enabled=False):
            encoder(images).float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    fewest = 2 * splits  # a split needs two images
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seconds_of(fewest)  # loads code, for seconds on a busy machine
        for least in IMAGES:
            count = -(-max(least, fewest) // splits) * splits
            best = seconds_of(count)
            if best <= 1:  # another measurement would delay the start
                best = min(best, seconds_of(count))
            if best > SHORT:
                break
    return best * 4 / 3 / count  # the momentum encoder's forward pass is a third of the above


def seconds_per_sample(
    encoder: nn.Module,
    augment: AugmentConfig,
    channels: int,
    device: torch.device,
    autocast: torch.autocast | None = None,
) -> float:
    """Measures the seconds of training on an image with all its views, as `seconds_per_image`."""
    each = seconds_per_image(encoder, augment.size, channels, device, autocast)
    if augment.local_crops:  # which the momentum encoder does not see
        small = seconds_per_image(encoder, augment.local_size, channels, device, autocast)
        each += augment.local_crops * small * 3 / 4
    return each


def time_of_run(each: float, config: Config, images: int, batches: int) -> str:
    """Returns a line on the time of a run of one epoch or more.

    each: seconds an image, of one rank. images: of one rank in a batch. batches: in an epoch.
    """
    steps, taken = Pace(config.data, batches).of_run(config.train.epochs, config.train.max_steps)
    batch = each * images
    return (
        f"time: about {duration(batch * taken)} of computation on this machine: "
        f"{counted(steps, 'step')} of {batch * taken / steps:.3g} s, an epoch in "
        f"{duration(batch * batches)}. Loading and evaluation come on top"
    )


def fitting_queue(count: int, batch: int) -> int:
    """Returns a number of keys for a set of `count` images: few keys are of a query's own image."""
    return max(batch, count // 2)


def warnings(config: Config, count: int, steps: int) -> list[str]:
    """Returns a line for every setting that does not fit the set.

    count: number of training images. steps: in an epoch of steps of a batch each.
    """
    lines = []
    batch, epochs = config.data.batch_size, config.train.epochs
    smaller = max(2, count // 8)
    if steps == 1 and epochs > 1 and smaller < batch:
        lines.append(
            f"an epoch is 1 step: data.batch_size {batch} and {counted(count, 'image')}. "
            f"--data.batch_size {smaller} makes about 8 steps"
        )
    left_out = count - steps * batch
    if left_out > LEFT_OUT * count and config.data.drop_last:
        lines.append(
            f"{counted(left_out, 'image')} of {count:,} are left out of every epoch, other images "
            f"in every epoch: data.batch_size {batch} does not divide {count:,}. A smaller batch, "
            "or --data.drop_last false, uses more"
        )
    keys = getattr(config.model, "queue_size", 0) if config.model.method == "moco" else 0
    trained = Pace(config.data, steps).of_run(epochs, config.train.max_steps)[1] * batch
    trained *= 2 if getattr(config.model, "symmetric", False) else 1
    fitting = f"--model.queue_size {min(fitting_queue(count, batch), trained)} fits"
    if keys > trained:
        lines.append(
            f"the queue never fills: model.queue_size {keys:,}, and the run makes {trained:,} "
            f"keys, so random vectors stay among the negatives. {fitting}"
        )
    start = getattr(config.model, "feature_queue_epoch", 0)
    if getattr(config.model, "feature_queue", 0) and start >= epochs > 0:
        lines.append(
            f"the queue of features is never used: model.feature_queue_epoch {start}, and the run "
            f"has {counted(epochs, 'epoch')}"
        )
    return lines
