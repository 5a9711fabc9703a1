"""The options of the linear probe and of fine-tuning. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mocofast.errors import ConfigError
from mocofast.option import SHARE, Valid, above, at_least, between, option

_RESAMPLES = "resamples of the bootstrap behind the 95 % confidence intervals; 0 measures none"


@dataclass
class LinearConfig:
    """The linear probe. Options from `epochs` to `schedule` are for the SGD protocols."""

    protocol: str = option(
        "fast",
        "fast: logistic regression on features extracted once; "
        "reference: facebookresearch/moco's 100 epochs of SGD; "
        "moco_v3: 90 epochs of SGD, batches of 1024, cosine, rate 0.1 (ViTs: 3) per 256 images",
        ("fast", "reference", "moco_v3"),
    )
    epochs: int = option(100, "passes over the training images", valid=at_least(1))
    lr: float = option(30.0, "learning rate of SGD with momentum 0.9 and no weight decay")
    batch_size: int = option(256, "images per step, over all ranks", valid=at_least(1))
    milestones: tuple[int, ...] = option(
        (60, 80), "epochs at which the learning rate falls to a tenth, for schedule=step"
    )
    schedule: str = option(
        "step", "learning rate schedule; cosine: MoCo v3's, by epoch", ("step", "cosine")
    )
    bootstrap: int = option(1000, _RESAMPLES, valid=at_least(0))


def of_protocol(options: LinearConfig, given: Mapping[str, Any], arch: str) -> LinearConfig:
    """Returns the options with the values of `options.protocol`, where `given` names no others.

    given: the options of the command line, {"linear.NAME": text}. arch: the encoder's name.
    MoCo v3's values are those of its main_lincls.py and README (Chen et al. 2021,
    arXiv:2104.02057).
    Raises ConfigError for a given option without effect.
    """
    if options.protocol == "fast":
        for name in ("epochs", "lr", "batch_size", "milestones", "schedule"):
            if f"linear.{name}" in given:
                raise ConfigError(
                    f"linear.{name}: no effect with linear.protocol=fast; "
                    "--linear.protocol reference and moco_v3 use it"
                )
    if options.protocol != "moco_v3":
        return options
    own: dict[str, Any] = {"epochs": 90, "batch_size": 1024, "schedule": "cosine"}
    own = {name: value for name, value in own.items() if f"linear.{name}" not in given}
    options = replace(options, **own)
    if "linear.lr" not in given:
        per_256 = 3.0 if "vit" in arch else 0.1
        options.lr = per_256 * options.batch_size / 256
    return options


@dataclass
class FinetuneConfig:
    """Fine-tuning of the whole encoder."""

    head: str = option(
        "random",
        "how the new head starts: random weights, or probe: the linear probe on the features, "
        "fitted first, for few labels of classes or tags (arXiv:2202.10054)",
        ("random", "probe"),
    )
    epochs: int = option(50, "passes over the training images", valid=at_least(1))
    optimizer: str = option(
        "sgd", "sgd (momentum 0.9) or adamw (better for ViTs)", ("sgd", "adamw")
    )
    lr: float = option(0.01, "learning rate at the start, cosine schedule", valid=above(0))
    weight_decay: float = option(
        1e-4, "weight decay (sgd: L2, adamw: decoupled)", valid=at_least(0)
    )
    batch_size: int = option(
        256,
        "images per step, over all ranks, at most the number of training images",
        valid=at_least(1),
    )
    warmup_epochs: float = option(
        0.0, "epochs in which the learning rate rises linearly from 0", valid=at_least(0)
    )
    layer_decay: float = option(
        1.0,
        "factor of the learning rate from a layer to the layer below, 0.65 to 0.75 for ViTs (BEiT, "
        "arXiv:2106.08254); biases, norms and position embeddings then have no weight decay; 1: "
        "the same rate everywhere; needs timm",
        valid=Valid(lambda value: 0 < value <= 1, "above 0, at most 1"),
    )
    drop_path: float = option(
        0.0,
        "stochastic depth: probability that an image skips the last block of a ViT, less for "
        "earlier blocks (arXiv:1603.09382)",
        valid=SHARE,
    )
    mixup: float = option(
        0.0,
        "alpha of Beta(alpha, alpha) for mixtures of two images (arXiv:1710.09412); 0: none",
        valid=at_least(0),
    )
    cutmix: float = option(
        0.0,
        "alpha of Beta(alpha, alpha) for patches of another image (arXiv:1905.04899); with mixup, "
        "every batch takes one of the two; 0: none",
        valid=at_least(0),
    )
    label_smoothing: float = option(
        0.0, "share of a label that goes to all classes alike", valid=between(0, 1)
    )
    crop_scale: tuple[float, ...] = option(
        (),
        "area of the random crop, as a share of the image; empty takes 0.08,1, or 0.3,1 for views "
        "of at most 64 pixels, of which a small crop shows too little",
        valid=Valid(
            lambda value: not value or (len(value) == 2 and 0 < value[0] <= value[1] <= 1),
            "two shares, the smaller first",
        ),
    )
    bootstrap: int = option(1000, _RESAMPLES, valid=at_least(0))
