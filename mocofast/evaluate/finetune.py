"""Fine-tuning: trains the query encoder with a new linear head on labelled images.

Training: SGD or AdamW, cosine schedule, random crops and flips. Validation: centre crops.
Many ranks divide every batch, with BatchNorm over all ranks, and give the result of one rank to
rounding (mixup, cutmix and drop_path choose on every rank by itself).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mocofast.config import Config, ConfigError, OptimConfig
from mocofast.data.finding import counted
from mocofast.data.interface import BatchSlice, Source
from mocofast.data.loaders import build_loader
from mocofast.data.sources import Datasets, labelled
from mocofast.device import choose_autocast, short_name, wrong_in_bf16
from mocofast.distributed import rank_and_world_size
from mocofast.errors import NothingDecodedError
from mocofast.evaluate.features import evaluating, image_batches, name_left_out
from mocofast.evaluate.layers import add_drop_path, optimizer_of
from mocofast.evaluate.linear import Probe, fit_probe, plain_view
from mocofast.evaluate.metrics import top_accuracies
from mocofast.evaluate.options import FinetuneConfig as FinetuneConfig
from mocofast.evaluate.options import LinearConfig
from mocofast.evaluate.ranks import over_ranks
from mocofast.evaluate.targets import Targets, loss_of, targets_of
from mocofast.models.batch_norm import SplitBatchNorm
from mocofast.models.convolutions import compiled_convolutions
from mocofast.models.encoders import head_inputs
from mocofast.models.heads import head_names, put
from mocofast.models.pixels import pixel_statistics, prepare_images
from mocofast.models.sync_batch_norm import sync_batch_norm
from mocofast.models.vit import without_drop_path
from mocofast.optim.schedule import learning_rate, set_learning_rate

log = logging.getLogger("mocofast")

SMALL_VIEW = 64  # pixels
FEW_STEPS = 200  # of a run, in which a new head hardly learns at the default rate


class FinetuneResult(NamedTuple):
    """Shares of the validation images, 0 to 1."""

    top1: float
    top5: float


class Predictions(NamedTuple):
    """Outputs of a classifier for labelled images.

    scores: (N, T) float32: logits, or of numbers, values. labels: (N,) int64. Both on the CPU.
    """

    scores: Tensor
    labels: Tensor


def finetune(
    encoder: nn.Module,
    datasets: Datasets,
    config: Config,
    options: FinetuneConfig,
    device: torch.device,
    autocast: torch.autocast,
    on_epoch: Callable[[FinetuneResult], None] | None = None,
) -> FinetuneResult:
    """Returns the accuracies of `train_classifier`, for labels that are classes.

    on_epoch: called after every epoch with the validation accuracy, which is measured only then.
        None: the accuracy is measured once, at the end.
    """

    def after_epoch(found: Predictions) -> None:
        assert on_epoch is not None
        on_epoch(_accuracy(found))

    return _accuracy(
        train_classifier(
            encoder, datasets, config, options, device, autocast, on_epoch and after_epoch
        )
    )


def train_classifier(
    encoder: nn.Module,
    datasets: Datasets,
    config: Config,
    options: FinetuneConfig,
    device: torch.device,
    autocast: torch.autocast,
    on_epoch: Callable[[Predictions], None] | None = None,
) -> Predictions:
    """Replaces the encoder's head by a linear classifier and trains all weights, in place.

    encoder: on `device`. BatchNorm then uses the whole batch, for any num_splits. On many ranks
        without SplitBatchNorm.
    datasets: labelled train and validation images (ConfigError otherwise).
    config: the run's configuration. View size, pixel statistics, flips, loader, workers,
        `data.target` and seed are used.
    autocast: fp32 takes the place of bf16 on a CPU where `wrong_in_bf16` names a convolution.
    on_epoch: called after every epoch with the predictions for the validation images.
    Call on every rank.
    Returns the predictions for `datasets.val` at the end.
    """
    datasets = datasets._replace(train=labelled(datasets.train))
    if datasets.val is None or datasets.train.labels is None:
        raise ConfigError(
            "data.path: fine-tuning needs labelled images, some of them held out; "
            f"got {datasets.note}"
        )
    bf16_on_cpu = device.type == "cpu" and short_name(autocast) == "bf16"
    if bf16_on_cpu and wrong_in_bf16(encoder, config.augment.size):
        autocast = choose_autocast("fp32", device)
    targets = targets_of(datasets.train.classes, config.data.target)
    # Labelled images: one plain view of every image.
    rank, world_size = rank_and_world_size()
    seed = config.train.seed
    batch_size = min(options.batch_size, len(datasets.train))
    if world_size > 1 and batch_size % world_size and batch_size < options.batch_size:
        batch_size -= batch_size % world_size
    batch_slice = BatchSlice(batch_size, rank, world_size)
    views = (plain_view(config.augment, _crop_scale(options, config)),)
    loader = build_loader(datasets.train, config.data, views, batch_slice, seed, device)
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))

    # A new head. All weights are trained, also a ViT's patch projection, which pretraining froze.
    probe = _probe(encoder, datasets, config, targets, device) if options.head == "probe" else None
    torch.manual_seed(seed)
    _replace_head(encoder, len(targets.names), config, device)
    if probe is not None:
        _start(encoder, probe)
    encoder.requires_grad_(True)
    for module in encoder.modules():
        if isinstance(module, SplitBatchNorm):
            module.num_splits = 1
    scale = _Scale(targets, datasets.train.labels, device)
    mix = _mixture(options, targets)
    without_drop_path(encoder)  # of the pretraining
    handles = add_drop_path(encoder, options.drop_path) if options.drop_path else []
    with compiled_convolutions(encoder):
        trained: nn.Module = encoder
        if world_size > 1:
            sync_batch_norm(encoder)
            trained = DistributedDataParallel(encoder, broadcast_buffers=False)
            torch.manual_seed(seed + rank)  # of mixtures and skipped blocks

        # Optimiser and schedule.
        schedule = OptimConfig(
            name=options.optimizer,
            lr=options.lr,
            weight_decay=options.weight_decay,
            schedule="cosine",
            warmup_epochs=options.warmup_epochs,
            per="step",
        )
        optimizer = optimizer_of(encoder, schedule, options.layer_decay)
        step, result, steps = 0, None, loader.steps_per_epoch
        if options.epochs * steps < FEW_STEPS:
            log.info(
                "finetune: %s in all %s few. A smaller --finetune.batch_size (now %d) makes more",
                counted(options.epochs * steps, "step"),
                "is" if options.epochs * steps == 1 else "are",
                batch_size,
            )
        try:
            for epoch in range(options.epochs):
                # Training.
                loss_sum = torch.zeros((), device=device)
                trained.train()
                for batch in loader.epoch(epoch):
                    # One optimiser step.
                    assert batch.labels is not None
                    rate = learning_rate(schedule, step, steps, options.epochs)
                    set_learning_rate(optimizer, rate)
                    wanted = scale.down(targets.of(batch.labels).to(device))
                    with autocast:
                        images = prepare_images(batch.views[0].to(device), mean, std)
                        images, wanted = mix(images, wanted)
                        outputs = trained(images)  # (B, T)
                    loss = loss_of(targets.kind, outputs.float(), wanted, options.label_smoothing)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    loss_sum += loss.detach()
                    step += 1
                mean_loss = loss_sum / steps
                if world_size > 1:
                    dist.all_reduce(mean_loss)
                    mean_loss /= world_size
                log.info("finetune: epoch %d/%d  loss %.4f", epoch + 1, options.epochs, mean_loss)
                # Validation.
                if on_epoch is not None:
                    result = predict(encoder, datasets.val, config, device, autocast)
                    on_epoch(result)
            scale.into(encoder)
            name_left_out(datasets.train, loader.skipped)
        finally:
            loader.close()
            for handle in handles:
                handle.remove()
            del trained  # DistributedDataParallel must not outlive the process group
        if result is None or targets.kind == "number":
            result = predict(encoder, datasets.val, config, device, autocast)
        return result


def predict(
    encoder: nn.Module,
    source: Source,
    config: Config,
    device: torch.device,
    autocast: torch.autocast,
) -> Predictions:
    """Returns the outputs of a trained classifier for labelled images. Call on every rank."""
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))

    def compute(part: Source) -> tuple[Tensor, ...]:
        scores, every = [], []
        with torch.no_grad(), evaluating(encoder), autocast:
            batches = image_batches(part, config, device)
            for images, labels, _ in batches:
                assert labels is not None
                scores.append(encoder(prepare_images(images, mean, std)).float().cpu())
                every.append(labels)
        if not scores:
            raise NothingDecodedError("data.path: none of the images to evaluate can be decoded")
        name_left_out(part, batches.skipped)
        return torch.cat(scores), torch.cat(every)

    return Predictions(*over_ranks(compute, source))


def _accuracy(found: Predictions) -> FinetuneResult:
    return FinetuneResult(*top_accuracies(found.scores, found.labels))


def _replace_head(encoder: nn.Module, outputs: int, config: Config, device: torch.device) -> None:
    """Replaces every head of `encoder` by a linear layer. config: gives the shape of the images."""
    with evaluating(encoder), torch.no_grad():
        shape = (1, config.data.channels, *config.augment.shape)
        inputs = head_inputs(encoder, torch.zeros(shape, device=device))
    for name, x in zip(head_names(encoder), inputs):
        put(encoder, name, nn.Linear(x.shape[1], outputs).to(device))


def _crop_scale(options: FinetuneConfig, config: Config) -> tuple[float, float]:
    """Returns the area of the random crop. 8 % of 32 pixels would be 9 pixels a side."""
    if options.crop_scale:
        low, high = options.crop_scale
        return low, high
    return (0.3 if max(config.augment.shape) <= SMALL_VIEW else 0.08), 1.0


def _probe(
    encoder: nn.Module, datasets: Datasets, config: Config, targets: Targets, device: torch.device
) -> Probe:
    """Fits the linear probe whose weights the new head takes."""
    if targets.kind == "number" or len(head_names(encoder)) > 1:
        raise ConfigError(
            "finetune.head: expected random for labels that are numbers, and for encoders of two "
            "heads"
        )
    return fit_probe(encoder, datasets, config, LinearConfig(), device)


@torch.no_grad()
def _start(encoder: nn.Module, probe: Probe) -> None:
    """Gives the head of `encoder` the weights of a linear probe."""
    head = encoder.get_submodule(head_names(encoder)[0])
    assert isinstance(head, nn.Linear)
    head.weight.copy_(probe.weight)
    head.bias.copy_(probe.bias)


def _mixture(
    options: FinetuneConfig, targets: Targets
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the function that mixes images (B, C, S, S) and targets (B, T)."""
    from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice

    kinds = [(MixUp, options.mixup), (CutMix, options.cutmix)]
    mixers = [kind(alpha=alpha, num_classes=len(targets.names)) for kind, alpha in kinds if alpha]
    if not mixers:
        return lambda images, wanted: (images, wanted)
    if targets.kind != "class":
        raise ConfigError(
            f"finetune.mixup, finetune.cutmix: expected 0 with data.target={targets.kind}: "
            "mixtures are of classes"
        )
    choose = RandomChoice(mixers)

    def mix(images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = choose(images, wanted.argmax(1))
        return mixed

    return mix


class _Scale:
    """Numbers are trained with mean 0 and deviation 1. Classes and tags stay as they are."""

    def __init__(self, targets: Targets, labels: object, device: torch.device) -> None:
        self._is_number = targets.kind == "number"
        if self._is_number:
            values = targets.of(torch.as_tensor(labels))[:, 0]
            self._mean = values.mean().to(device)
            self._std = values.std(correction=0).clamp_min(1e-12).to(device)

    def down(self, wanted: Tensor) -> Tensor:
        return (wanted - self._mean) / self._std if self._is_number else wanted

    @torch.no_grad()
    def into(self, encoder: nn.Module) -> None:
        """Changes the heads of a trained encoder to give values in their own units."""
        if self._is_number:
            for name in head_names(encoder):
                head = encoder.get_submodule(name)
                assert isinstance(head, nn.Linear)
                head.weight.mul_(self._std)
                head.bias.mul_(self._std).add_(self._mean)
