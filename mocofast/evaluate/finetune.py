"""Fine-tuning: the whole query encoder with a new linear head, on labelled images.

SGD or AdamW with a cosine schedule on random crops and flips, centre crops for validation. One process, one device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mocofast.config import Config, ConfigError, OptimConfig, option
from mocofast.data.interface import BatchSlice, Source
from mocofast.data.loaders import build_loader, eval_batches
from mocofast.data.sources import Datasets
from mocofast.evaluate.features import evaluating
from mocofast.evaluate.knn import label_rank
from mocofast.evaluate.linear import plain_view
from mocofast.models.batch_norm import SplitBatchNorm2d
from mocofast.models.encoders import features, head_name
from mocofast.models.pixels import pixel_statistics, prepare_images
from mocofast.optim.build import build_optimizer
from mocofast.optim.schedule import learning_rate, set_learning_rate

log = logging.getLogger("mocofast")


@dataclass
class FinetuneConfig:
    """Fine-tuning of the whole encoder."""

    epochs: int = option(50, "passes over the training images")
    optimizer: str = option(
        "sgd", "sgd, with momentum 0.9, or adamw, which suits ViTs", ("sgd", "adamw")
    )
    lr: float = option(0.01, "learning rate, falling along a cosine")
    weight_decay: float = option(1e-4, "weight decay: L2 with sgd, decoupled with adamw")
    batch_size: int = option(256, "images per step, at most the number of training images")


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
    """Replaces the encoder's head by a linear classifier and trains both, in place; accuracy on `datasets.val`.

    encoder: on `device`. BatchNorm sees whole batches, whatever parts it was pretrained with.
    splits: labelled, with a validation part (ConfigError otherwise). config: the run's configuration, of which view
    size, pixel statistics, flips, loader, workers and seed are used. on_epoch: is given the accuracy after every
    epoch, which then is measured after every epoch.
    """
    if datasets.val is None or datasets.train.labels is None:
        raise ConfigError(
            f"data.path: fine-tuning needs labelled images, some of them held out; got {datasets.note}"
        )
    seed, classes = config.train.seed, len(datasets.train.classes)
    batch_size = min(options.batch_size, len(datasets.train))
    loader = build_loader(
        datasets.train,
        config.data,
        (plain_view(config.augment),),
        BatchSlice(batch_size),
        seed,
        device,
    )
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))
    torch.manual_seed(seed)
    with evaluating(encoder), torch.no_grad():
        width = features(
            encoder, torch.zeros(1, 3, config.augment.size, config.augment.size, device=device)
        ).shape[1]
    setattr(encoder, head_name(encoder), nn.Linear(width, classes).to(device))
    encoder.requires_grad_(True)  # also what pretraining froze, as a ViT's patches and positions
    for module in encoder.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.num_splits = 1
    schedule = OptimConfig(
        name=options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        schedule="cosine",
        per="step",
    )
    optimizer = build_optimizer(encoder.parameters(), schedule)
    step, result = 0, None
    try:
        for epoch in range(options.epochs):
            loss_sum = torch.zeros((), device=device)
            encoder.train()
            for batch in loader.epoch(epoch):
                assert batch.labels is not None
                set_learning_rate(
                    optimizer, learning_rate(schedule, step, loader.steps_per_epoch, options.epochs)
                )
                with autocast:
                    logits = encoder(prepare_images(batch.views[0].to(device), mean, std))
                loss = F.cross_entropy(logits.float(), batch.labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
                step += 1
            log.info(
                "finetune: epoch %d/%d  loss %.4f",
                epoch + 1,
                options.epochs,
                loss_sum / loader.steps_per_epoch,
            )
            if on_epoch is not None:
                result = _validate(encoder, datasets.val, config, device, autocast)
                on_epoch(result)
    finally:
        loader.close()
    return _validate(encoder, datasets.val, config, device, autocast) if result is None else result


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
        for images, labels, _ in eval_batches(
            source, config.augment.size, 256, config.data.workers, device
        ):
            assert labels is not None
            rank = label_rank(encoder(prepare_images(images, mean, std)).float(), labels.to(device))
            hits += torch.stack([(rank < top).sum() for top in (1, 5)])
            seen += len(labels)
    return FinetuneResult(*(hits.double() / seen).tolist())
