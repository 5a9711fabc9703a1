"""The options of the linear probe and of fine-tuning. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from mocofast.option import option


@dataclass
class LinearConfig:
    """The linear probe. Options except `protocol` are for the reference protocol."""

    protocol: str = option(
        "fast",
        "fast: logistic regression on features extracted once; "
        "reference: facebookresearch/moco's 100 epochs of SGD",
        ("fast", "reference"),
    )
    epochs: int = option(100, "passes over the training images")
    lr: float = option(30.0, "learning rate of SGD with momentum 0.9 and no weight decay")
    batch_size: int = option(256, "images per step")
    milestones: tuple[int, ...] = option(
        (60, 80), "epochs at which the learning rate falls to a tenth, for schedule=step"
    )
    schedule: str = option(
        "step", "learning rate schedule; cosine: MoCo v3's, by epoch", ("step", "cosine")
    )


@dataclass
class FinetuneConfig:
    """Fine-tuning of the whole encoder."""

    epochs: int = option(50, "passes over the training images")
    optimizer: str = option(
        "sgd", "sgd (momentum 0.9) or adamw (better for ViTs)", ("sgd", "adamw")
    )
    lr: float = option(0.01, "learning rate at the start, cosine schedule")
    weight_decay: float = option(1e-4, "weight decay (sgd: L2, adamw: decoupled)")
    batch_size: int = option(256, "images per step, at most the number of training images")
