"""Linear probe: accuracy of a linear classifier on frozen features.

Protocol ``fast``: extracts the features of centre crops once and fits a multinomial logistic
regression. The strength of its L2 penalty is chosen on a tenth of the training features, never on
the validation images. Takes minutes.
Protocol ``reference``: facebookresearch/moco's. Trains 100 epochs of SGD with learning rate 30 on
random crops and flips. For comparison with published numbers.

Runs in one process on one device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocofast.config import AugmentConfig, Config, ConfigError, OptimConfig
from mocofast.data.interface import BatchSlice, Source
from mocofast.data.loaders import build_loader
from mocofast.data.sources import Datasets, labelled
from mocofast.device import choose_autocast
from mocofast.evaluate.features import (
    batches_at_once,
    check_finite,
    embed,
    evaluating,
    extract,
    image_batches,
)
from mocofast.evaluate.knn import label_position
from mocofast.evaluate.options import LinearConfig as LinearConfig
from mocofast.models.pixels import pixel_statistics
from mocofast.optim.schedule import learning_rate, set_learning_rate

log = logging.getLogger("mocofast")

_ROWS = 65536  # rows of logits in memory at a time
# L2 strengths for standardised features, strongest first. A fit starts from the previous solution.
_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class LinearResult(NamedTuple):
    """Accuracies as shares, 0 to 1."""

    top1: float  # of the validation images
    top5: float
    train_top1: float  # of the training images (`reference`: random crops of the last epoch)
    l2: float | None  # L2 strength chosen by `fast`, None for `reference`


def linear_probe(
    encoder: nn.Module,
    datasets: Datasets,
    config: Config,
    options: LinearConfig,
    device: torch.device,
) -> LinearResult:
    """Trains a linear classifier on the pooled features before the encoder's head.

    encoder: on `device`. Weights, statistics and modes are the same afterwards, which is checked
        (RuntimeError otherwise).
    datasets: labelled train and validation images (ConfigError otherwise).
    config: the run's configuration. View size, pixel statistics, flips, loader, workers, precision
        and seed are used.
    """
    datasets = datasets._replace(train=labelled(datasets.train))
    if datasets.val is None or datasets.train.labels is None or datasets.val.labels is None:
        raise ConfigError(
            "data.path: a linear probe needs labelled images, some of them held out (class "
            "folders, and val/ beside train/ or data.holdout above 0); "
            f"got {datasets.note}"
        )
    if options.protocol not in ("fast", "reference"):
        raise ConfigError(f"linear.protocol: expected fast or reference, got {options.protocol!r}")
    # The reference protocol stays in float32: its figures stand beside published figures.
    is_fast = options.protocol == "fast"
    precision = config.train.precision if is_fast else "fp32"
    autocast = choose_autocast(precision, device)
    with _unchanged(encoder):
        val = _features(encoder, datasets.val, config, device, autocast)
        if is_fast:
            train = _features(encoder, datasets.train, config, device, autocast)
            return _fast(*train, *val, len(datasets.train.classes), config.train.seed)
        return _reference(encoder, datasets, *val, config, options, device)


def plain_view(augment: AugmentConfig) -> AugmentConfig:
    """Returns the augmentation of supervised training: RandomResizedCrop (8 % to 100 %) and flips.

    The probability of a flip is the run's (0.5, or 0 for digits, whose meaning a flip changes).
    Probabilities of vertical flips and of quarter turns are the run's, too.
    """
    off = dict.fromkeys(("rotate", "gray", "blur", "solarize", "hed", "noise"), 0.0)
    still = {"jitter": (0.0,) * 4, "channel_jitter": (0.0, 0.0), "sizes": (), "crop_scales": ()}
    return replace(augment, crop_scale=(0.08, 1.0), **off, **still)  # type: ignore[arg-type]


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 200,
) -> tuple[Tensor, Tensor]:
    """Fits a multinomial logistic regression by L-BFGS.

    Minimises mean cross-entropy + l2/2 |weight|^2. The bias has no penalty. The solution equals
    scikit-learn's for C = 1 / (N l2). Unlike scikit-learn, computes logits in blocks of rows and on
    any device.

    features: (N, D) float32.
    labels: (N,) int64, below num_classes.
    start: (weight, bias) to start from. None: zeros.
    Returns weight (num_classes, D) and bias (num_classes,).
    """
    if start is None:
        start = features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes)
    weight, bias = (tensor.clone() for tensor in start)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def objective() -> float:
        assert weight.grad is not None
        assert bias.grad is not None
        weight.grad.copy_(l2 * weight)
        bias.grad.zero_()
        loss = 0.5 * l2 * weight.double().square().sum()
        for x, y in zip(features.split(_ROWS), labels.split(_ROWS)):
            log_share = F.log_softmax(x @ weight.T + bias, dim=1)
            loss += F.nll_loss(log_share, y, reduction="sum") / len(features)
            error = log_share.exp_()  # d loss / d logits = (softmax - one-hot) / N
            error[torch.arange(len(y), device=y.device), y] -= 1
            error /= len(features)
            weight.grad.addmm_(error.T, x)
            bias.grad += error.sum(0)
        return loss.item()

    solver.step(objective)
    return weight, bias


def _fast(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    classes: int,
    seed: int,
) -> LinearResult:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    order = order.to(features.device)
    features, labels = features[order], labels[order]
    # Standardised features: the same range of L2 strengths suits every encoder. The lower bound
    # keeps a dimension that hardly varies (a dead unit) from growing to unit variance.
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std.clamp_min(1e-3 * std.mean().clamp_min(1e-12))
    features.sub_(mean).div_(std)
    val_features = (val_features - mean) / std

    # The strength that is best on the held-out tenth.
    held = max(1, len(features) // 10)
    best, chosen = -1.0, _STRENGTHS[0]
    solution = None
    for l2 in _STRENGTHS:
        solution = fit_logistic(features[held:], labels[held:], classes, l2, solution)
        accuracy = _accuracy(features[:held], labels[:held], *solution)[0]
        log.info(
            "linear: l2 %.0e gives %.2f %% on the held-out tenth of the training images",
            l2,
            100 * accuracy,
        )
        if accuracy > best:
            best, chosen = accuracy, l2
    # The final fit on all training features.
    solution = fit_logistic(features, labels, classes, chosen)
    top1, top5 = _accuracy(val_features, val_labels, *solution)
    return LinearResult(top1, top5, _accuracy(features, labels, *solution)[0], chosen)


def _reference(
    encoder: nn.Module,
    datasets: Datasets,
    val_features: Tensor,
    val_labels: Tensor,
    config: Config,
    options: LinearConfig,
    device: torch.device,
) -> LinearResult:
    # Labelled images: one plain view of every image, with the batch size of the probe.
    data = replace(config.data, batch_size=options.batch_size)
    batch_slice = BatchSlice(options.batch_size, drop_last=False)
    views, seed = (plain_view(config.augment),), config.train.seed
    loader = build_loader(datasets.train, data, views, batch_slice, seed, device)
    mean, std = (statistic.to(device) for statistic in pixel_statistics(config.augment))

    # The classifier starts as in facebookresearch/moco: weights normal(0, 0.01), bias 0.
    head = nn.Linear(val_features.shape[1], len(datasets.train.classes), device=device)
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
    train_top1 = 0.0
    try:
        with evaluating(encoder):
            for epoch in range(options.epochs):
                rate = learning_rate(schedule, epoch * steps, steps, options.epochs)
                set_learning_rate(optimizer, rate)
                seen, hits = 0, torch.zeros((), device=device)
                loss_sum = torch.zeros((), device=device)
                for batch in loader.epoch(epoch):
                    assert batch.labels is not None
                    labels = batch.labels.to(device)
                    # Frozen features (B, D), then one SGD step of the classifier.
                    with torch.no_grad():
                        features = embed(encoder, batch.views[0].to(device), mean, std, "backbone")
                    with torch.autocast(device.type, enabled=False):
                        logits = head(features)
                        loss = F.cross_entropy(logits, labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    # Sums for the log line.
                    seen += len(labels)
                    hits += (logits.argmax(1) == labels).sum()
                    loss_sum += loss.detach() * len(labels)
                # Validation, on features that were computed once.
                train_top1 = hits.item() / seen
                top1, _ = _accuracy(val_features, val_labels, head.weight, head.bias)
                log.info(
                    "linear: epoch %d/%d  loss %.4f  train acc@1 %.2f %%  validation acc@1 %.2f %%",
                    epoch + 1,
                    options.epochs,
                    loss_sum.item() / seen,
                    100 * train_top1,
                    100 * top1,
                )
    finally:
        loader.close()
    top1, top5 = _accuracy(val_features, val_labels, head.weight, head.bias)
    return LinearResult(top1, top5, train_top1, None)


def _features(
    encoder: nn.Module,
    source: Source,
    config: Config,
    device: torch.device,
    autocast: torch.autocast,
) -> tuple[Tensor, Tensor]:
    """Returns features (N, D) and labels (N,) of all images, on `device`."""
    batches = image_batches(source, config, device)
    statistics = pixel_statistics(config.augment)
    at_once = batches_at_once(config.data.workers, device)
    features, labels = extract(
        encoder, batches, device, "backbone", *statistics, autocast=autocast, at_once=at_once
    )
    check_finite(features)
    return features.to(device), labels.to(device)


@torch.no_grad()
def _accuracy(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor
) -> tuple[float, float]:
    """Returns the shares of rows whose label scores highest, and among the five highest."""
    hits = torch.zeros(2, dtype=torch.int64, device=features.device)
    for x, y in zip(features.split(_ROWS), labels.split(_ROWS)):
        position = label_position(x @ weight.T + bias, y)
        hits += torch.stack([(position < top).sum() for top in (1, 5)])
    top1, top5 = (hits.double() / len(features)).tolist()
    return top1, top5


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
