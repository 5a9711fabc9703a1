"""Linear probe: a linear classifier on frozen features.

Protocol ``fast``: extracts the features of centre crops once and fits a multinomial logistic
regression (tags: a logistic regression for every tag; numbers: a ridge regression). The strength of
its L2 penalty is chosen on a tenth of the training features, never on the validation images. Takes
minutes.
Protocol ``reference``: facebookresearch/moco's. Trains 100 epochs of SGD with learning rate 30 on
random crops and flips. For comparison with published numbers. ``moco_v3`` is the same loop with
MoCo v3's values (`mocofast.evaluate.options.of_protocol`).

Many ranks compute features and batches of images together, with the result of one rank to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from mocofast.config import AugmentConfig, Config, ConfigError, OptimConfig
from mocofast.data.interface import BatchSlice, Source
from mocofast.data.loaders import build_loader
from mocofast.data.sources import Datasets, labelled
from mocofast.device import choose_autocast, run_autocast, where_float64_is, wide
from mocofast.distributed import rank_and_world_size
from mocofast.evaluate.features import (
    check_finite,
    embed,
    evaluating,
    extract,
    extraction,
    image_batches,
    name_left_out,
)
from mocofast.evaluate.knn import label_position
from mocofast.evaluate.logistic import Features, fit_logistic
from mocofast.evaluate.metrics import top_accuracies
from mocofast.evaluate.options import LinearConfig as LinearConfig
from mocofast.evaluate.ranks import over_ranks
from mocofast.evaluate.targets import Targets, loss_of, targets_of
from mocofast.models.convolutions import compiled_convolutions
from mocofast.models.pixels import pixel_statistics
from mocofast.optim.schedule import learning_rate, set_learning_rate

log = logging.getLogger("mocofast")

_ROWS = 65536  # rows of scores in memory at a time
# L2 strengths for standardised features, strongest first. A fit starts from the previous solution.
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Tolerances of `fit_logistic`: to choose the strength, and in the end.
LOOSE, TIGHT = 1e-3, 1e-4


class LinearResult(NamedTuple):
    """Accuracies as shares, 0 to 1."""

    top1: float  # of the validation images
    top5: float
    train_top1: float | None  # of the training images (SGD: random crops of the last epoch)
    l2: float | None  # L2 strength chosen by `fast`, None for SGD


class Probe(NamedTuple):
    """A linear classifier of features, and its scores of the validation images, on one device."""

    weight: Tensor  # (T, D) float32
    bias: Tensor  # (T,) float32
    scores: Tensor  # (M, T) float32, of the validation images
    labels: Tensor  # (M,) int64
    # see LinearResult. Of tags and numbers: their figure, see `_figure`, and None after SGD
    train_top1: float | None
    l2: float | None


def linear_probe(
    encoder: nn.Module,
    datasets: Datasets,
    config: Config,
    options: LinearConfig,
    device: torch.device,
) -> LinearResult:
    """Returns the accuracies of `fit_probe`, for labels that are classes."""
    probe = fit_probe(encoder, datasets, config, options, device)
    return LinearResult(*top_accuracies(probe.scores, probe.labels), probe.train_top1, probe.l2)


def fit_probe(
    encoder: nn.Module,
    datasets: Datasets,
    config: Config,
    options: LinearConfig,
    device: torch.device,
) -> Probe:
    """Trains a linear classifier on the pooled features before the encoder's head.

    encoder: on `device`. Weights, statistics and modes are the same afterwards, which is checked
        (RuntimeError otherwise).
    datasets: labelled train and validation images (ConfigError otherwise).
    config: the run's configuration. View size, pixel statistics, flips, loader, workers, precision,
        `data.target` and seed are used.
    Call on every rank. All ranks get the result.
    """
    datasets = datasets._replace(train=labelled(datasets.train))
    if datasets.val is None or datasets.train.labels is None or datasets.val.labels is None:
        raise ConfigError(
            "data.path: a linear probe needs labelled images, some of them held out (class "
            "folders, and val/ beside train/ or data.holdout above 0); "
            f"got {datasets.note}"
        )
    if options.protocol not in ("fast", "reference", "moco_v3"):
        raise ConfigError(
            f"linear.protocol: expected fast, reference or moco_v3, got {options.protocol!r}"
        )
    targets = targets_of(datasets.train.classes, config.data.target)
    # The SGD protocols stay in float32: their figures stand beside published figures.
    is_fast = options.protocol == "fast"
    autocast = choose_autocast("fp32", device)
    if is_fast:
        autocast = run_autocast(config, encoder, device)
    with _unchanged(encoder), compiled_convolutions(encoder):
        val = frozen_features(encoder, datasets.val, config, device, autocast)
        if is_fast:
            train = frozen_features(encoder, datasets.train, config, device, autocast)
            return _fast(*train, *val, targets, config.train.seed)
        return _sgd(encoder, datasets, *val, targets, config, options, device)


def plain_view(
    augment: AugmentConfig, crop_scale: tuple[float, float] = (0.08, 1.0)
) -> AugmentConfig:
    """Returns the augmentation of supervised training: RandomResizedCrop and flips.

    crop_scale: area of the crop, as a share of the image. The default is that of ImageNet.
    The probability of a flip is the run's (0.5, or 0 for digits, whose meaning a flip changes).
    Probabilities of vertical flips and of quarter turns are the run's, too.
    """
    off = dict.fromkeys(("rotate", "gray", "blur", "solarize", "hed", "noise"), 0.0)
    still = {"jitter": (0.0,) * 4, "channel_jitter": (0.0, 0.0), "sizes": (), "crop_scales": ()}
    return replace(augment, crop_scale=crop_scale, **off, **still)  # type: ignore[arg-type]


def _fast(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    targets: Targets,
    seed: int,
) -> Probe:
    # The fit sums in float64.
    given = features, labels, val_features, val_labels
    features, labels, val_features, val_labels = (where_float64_is(x) for x in given)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    order = order.to(features.device)
    features, labels = features[order], labels[order]
    # Standardised features: the same range of L2 strengths suits every encoder. The lower bound
    # keeps a dimension that hardly varies (a dead unit) from growing to unit variance.
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std.clamp_min(1e-3 * std.mean().clamp_min(1e-12))
    features.sub_(mean).div_(std)

    # The strength that is best on the held-out tenth.
    held = max(1, len(features) // 10)
    prepared = Features.of(features)
    best, chosen = -float("inf"), STRENGTHS[0]
    solution = None
    for l2 in STRENGTHS:
        solution = _fit(prepared.after(held), labels[held:], targets, l2, solution, LOOSE)
        figure = _figure(features[:held], labels[:held], targets, *solution)
        log.info(
            "linear: l2 %.0e gives %s on the held-out tenth of the training images",
            *(l2, _words(figure, targets)),
        )
        if figure > best:
            best, chosen, start = figure, l2, solution
    # The final fit on all training features.
    weight, bias = _fit(prepared, labels, targets, chosen, start)
    train_figure = _figure(features, labels, targets, weight, bias)
    # For features that are not standardised.
    weight = weight / std
    bias = bias - weight @ mean
    scores = _scores(val_features, weight, bias)
    return Probe(weight, bias, scores, val_labels, train_figure, chosen)


def _fit(
    features: Features,
    labels: Tensor,
    targets: Targets,
    l2: float,
    start: tuple[Tensor, Tensor] | None,
    tolerance: float = TIGHT,
) -> tuple[Tensor, Tensor]:
    """Returns weight (T, D) and bias (T,) of the regression that suits the targets."""
    if targets.kind == "number":
        rows, values = (x.cpu().numpy() for x in (features.rows, targets.of(labels)))
        ridge = Ridge(alpha=l2 * len(rows)).fit(rows, values)
        found = (torch.from_numpy(np.atleast_1d(x)) for x in (ridge.coef_, ridge.intercept_))
        weight, bias = (x.to(features.rows) for x in found)
        return weight.view(1, -1), bias
    wanted = labels if targets.kind == "class" else targets.of(labels)
    return fit_logistic(features, wanted, len(targets.names), l2, start, tolerance=tolerance)


def _sgd(
    encoder: nn.Module,
    datasets: Datasets,
    val_features: Tensor,
    val_labels: Tensor,
    targets: Targets,
    config: Config,
    options: LinearConfig,
    device: torch.device,
) -> Probe:
    # Labelled images: one plain view of every image, with the batch size of the probe.
    data = replace(config.data, batch_size=options.batch_size)
    rank, world_size = rank_and_world_size()
    batch_slice = BatchSlice(options.batch_size, rank, world_size, drop_last=False, pad=True)
    views, seed = (plain_view(config.augment),), config.train.seed
    loader = build_loader(datasets.train, data, views, batch_slice, seed, device)
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))

    # The classifier starts as in facebookresearch/moco: weights normal(0, 0.01), bias 0.
    head = nn.Linear(val_features.shape[1], len(targets.names), device=device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.empty(head.weight.shape).normal_(0.0, 0.01, generator=generator))
        head.bias.zero_()

    # Optimiser and schedule.
    optimizer = torch.optim.SGD(head.parameters(), lr=options.lr, momentum=0.9, weight_decay=0.0)
    schedule = OptimConfig(
        lr=options.lr,
        schedule=options.schedule,
        milestones=options.milestones,
        gamma=0.1,
        per="epoch",
    )
    steps = loader.steps_per_epoch
    train_top1: float | None = None
    try:
        with evaluating(encoder):
            for epoch in range(options.epochs):
                rate = learning_rate(schedule, epoch * steps, steps, options.epochs)
                set_learning_rate(optimizer, rate)
                sums = torch.zeros(3, device=device)  # images, hits, loss
                for step, batch in enumerate(loader.epoch(epoch)):
                    assert batch.labels is not None
                    # Images of the batch over all ranks, and of this rank without repetitions.
                    count = min(options.batch_size, len(datasets.train) - step * options.batch_size)
                    own = max(0, min(len(batch.labels), count - rank * len(batch.labels)))
                    labels = batch.labels[:own].to(device)
                    # Frozen features (B, D), then one SGD step of the classifier.
                    with torch.no_grad():
                        images = batch.views[0][:own].to(device)
                        features = embed(encoder, images, mean, std, "backbone") if own else None
                    optimizer.zero_grad(set_to_none=True)
                    with torch.autocast(device.type, enabled=False):
                        if features is None:
                            loss = 0 * (head.weight.sum() + head.bias.sum())
                        else:
                            scores = head(features)
                            loss = loss_of(targets.kind, scores, targets.of(labels)) * own / count
                            hits = (scores.argmax(1) == labels).sum()
                            sums += torch.stack([hits.new_tensor(own), hits, loss.detach() * count])
                    loss.backward()
                    if world_size > 1:
                        for parameter in head.parameters():
                            dist.all_reduce(parameter.grad)
                    optimizer.step()
                # Validation, on features that were computed once.
                if world_size > 1:
                    dist.all_reduce(sums)
                seen, hit, loss_sum = sums.tolist()
                own_figure = ""
                if targets.kind == "class":
                    train_top1 = hit / seen
                    own_figure = f"train acc@1 {100 * train_top1:.2f} %  "
                figure = _figure(val_features, val_labels, targets, head.weight, head.bias)
                log.info(
                    "linear: epoch %d/%d  loss %.4f  %svalidation %s",
                    *(epoch + 1, options.epochs, loss_sum / seen),
                    *(own_figure, _words(figure, targets)),
                )
    finally:
        loader.close()
    name_left_out(datasets.train, loader.skipped)
    weight, bias = head.weight.detach(), head.bias.detach()
    return Probe(weight, bias, _scores(val_features, weight, bias), val_labels, train_top1, None)


def frozen_features(
    encoder: nn.Module,
    source: Source,
    config: Config,
    device: torch.device,
    autocast: torch.autocast,
) -> tuple[Tensor, Tensor]:
    """Returns features (N, D) and labels (N,) of all images, on `device`. Call on every rank."""
    how = extraction(config, device, autocast)

    def compute(part: Source) -> tuple[Tensor, ...]:
        batches = image_batches(part, config, device)
        found = extract(encoder, batches, device, "backbone", **how)
        name_left_out(part, batches.skipped)
        return found

    features, labels = over_ranks(compute, source)
    check_finite(features)
    return features.to(device), labels.to(device)


@torch.no_grad()
def _scores(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([x @ weight.T + bias for x in features.split(_ROWS)])


@torch.no_grad()
def _figure(
    features: Tensor, labels: Tensor, targets: Targets, weight: Tensor, bias: Tensor
) -> float:
    """Returns what a probe is chosen by: top-1, mean average precision, or R^2."""
    scores = _scores(features, weight, bias)
    if targets.kind == "class":
        return wide(label_position(scores, labels) == 0).mean().item()
    wanted = targets.of(labels)
    if targets.kind == "number":
        rest, spread = (scores - wanted).square().sum(), (wanted - wanted.mean()).square().sum()
        return float(1 - rest / spread.clamp_min(1e-12))
    there = wanted.any(0)
    if not there.any() or not scores.isfinite().all():
        return 0.0
    columns = (values[:, there].cpu().numpy() for values in (wanted, scores))
    return float(average_precision_score(*columns, average="macro"))


def _words(figure: float, targets: Targets) -> str:
    """Returns a figure of `_figure` in words."""
    if targets.kind == "class":
        return f"{100 * figure:.2f} %"
    return f"{'mAP' if targets.kind == 'tags' else 'R²'} {figure:.4f}"


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Raises RuntimeError if a weight or a statistic of `module` changes inside the block.

    (facebookresearch/moco makes the same check of its frozen weights.)
    """
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    yield
    for name, tensor in module.state_dict().items():
        if not torch.equal(tensor, before[name]):
            raise RuntimeError(f"{name} of the frozen encoder changed during the linear probe")
