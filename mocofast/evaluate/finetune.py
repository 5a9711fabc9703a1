"""Fine-tuning: trains the query encoder with a new linear head on labelled images.

Training: SGD or AdamW, cosine schedule, random crops and flips. Validation: centre crops.
Runs in one process on one device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mocofast.config import Config, ConfigError, OptimConfig
from mocofast.data.interface import BatchSlice, Source
from mocofast.data.loaders import build_loader
from mocofast.data.sources import Datasets, labelled
from mocofast.evaluate.features import evaluating, image_batches
from mocofast.evaluate.knn import label_position
from mocofast.evaluate.linear import plain_view
from mocofast.evaluate.options import FinetuneConfig as FinetuneConfig
from mocofast.models.batch_norm import SplitBatchNorm2d
from mocofast.models.encoders import head_inputs
from mocofast.models.heads import head_names, put
from mocofast.models.pixels import pixel_statistics, prepare_images
from mocofast.optim.build import build_optimizer
from mocofast.optim.schedule import learning_rate, set_learning_rate

log = logging.getLogger("mocofast")


class FinetuneResult(NamedTuple):
    """Shares of the validation images, 0 to 1."""

    top1: float
    top5: float


def finetune(
    encoder: nn.Module,
    datasets: Datasets,
    config: Config,
    options: FinetuneConfig,
    device: torch.device,
    autocast: torch.autocast,
    on_epoch: Callable[[FinetuneResult], None] | None = None,
) -> FinetuneResult:
    """Replaces the encoder's head by a linear classifier and trains all weights, in place.

    encoder: on `device`. BatchNorm then uses the whole batch, for any num_splits.
    datasets: labelled train and validation images (ConfigError otherwise).
    config: the run's configuration. View size, pixel statistics, flips, loader, workers and seed
        are used.
    on_epoch: called after every epoch with the validation accuracy, which is measured only then.
        None: the accuracy is measured once, at the end.
    Returns the accuracy on `datasets.val` at the end.
    """
    datasets = datasets._replace(train=labelled(datasets.train))
    if datasets.val is None or datasets.train.labels is None:
        raise ConfigError(
            "data.path: fine-tuning needs labelled images, some of them held out; "
            f"got {datasets.note}"
        )
    # Labelled images: one plain view of every image.
    seed = config.train.seed
    batch_slice = BatchSlice(min(options.batch_size, len(datasets.train)))
    views = (plain_view(config.augment),)
    loader = build_loader(datasets.train, config.data, views, batch_slice, seed, device)
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))

    # A new head. All weights are trained, also a ViT's patch projection, which pretraining froze.
    torch.manual_seed(seed)
    _replace_head(encoder, len(datasets.train.classes), config, device)
    encoder.requires_grad_(True)
    for module in encoder.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.num_splits = 1

    # Optimiser and schedule.
    schedule = OptimConfig(
        name=options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        schedule="cosine",
        per="step",
    )
    optimizer = build_optimizer(encoder.parameters(), schedule)
    step, result, steps = 0, None, loader.steps_per_epoch
    try:
        for epoch in range(options.epochs):
            # Training.
            loss_sum = torch.zeros((), device=device)
            encoder.train()
            for batch in loader.epoch(epoch):
                # One optimiser step.
                assert batch.labels is not None
                rate = learning_rate(schedule, step, steps, options.epochs)
                set_learning_rate(optimizer, rate)
                with autocast:
                    images = prepare_images(batch.views[0].to(device), mean, std)
                    logits = encoder(images)  # (B, classes)
                loss = F.cross_entropy(logits.float(), batch.labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
                step += 1
            mean_loss = loss_sum / steps
            log.info("finetune: epoch %d/%d  loss %.4f", epoch + 1, options.epochs, mean_loss)
            # Validation.
            if on_epoch is not None:
                result = _validate(encoder, datasets.val, config, device, autocast)
                on_epoch(result)
    finally:
        loader.close()
    return _validate(encoder, datasets.val, config, device, autocast) if result is None else result


def _replace_head(encoder: nn.Module, classes: int, config: Config, device: torch.device) -> None:
    """Replaces every head of `encoder` by a linear layer. config: gives the shape of the images."""
    channels, size = config.data.channels, config.augment.size
    with evaluating(encoder), torch.no_grad():
        inputs = head_inputs(encoder, torch.zeros(1, channels, size, size, device=device))
    for name, x in zip(head_names(encoder), inputs):
        put(encoder, name, nn.Linear(x.shape[1], classes).to(device))


@torch.no_grad()
def _validate(
    encoder: nn.Module,
    source: Source,
    config: Config,
    device: torch.device,
    autocast: torch.autocast,
) -> FinetuneResult:
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))
    hits, seen = torch.zeros(2, dtype=torch.int64, device=device), 0
    with evaluating(encoder), autocast:
        for images, labels, _ in image_batches(source, config, device):
            assert labels is not None
            logits = encoder(prepare_images(images, mean, std)).float()  # (B, classes)
            position = label_position(logits, labels.to(device))
            hits += torch.stack([(position < top).sum() for top in (1, 5)])
            seen += len(labels)
    return FinetuneResult(*(hits.double() / seen).tolist())
