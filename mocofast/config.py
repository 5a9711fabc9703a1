"""Every hyper-parameter, its default and its meaning: once.

The defaults are MoCo v1 on ImageNet as its paper trains it (He et al. 2020, arXiv:1911.05722); the files in
``recipes/`` hold only what differs. ``mocofast pretrain --help`` is generated from this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A recipe, option or value that cannot be used; the message names it and what would do."""


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """One option: its default, what it means (with units), and, where it is a closed set, its values."""
    return field(default=default, metadata={"help": help, "choices": choices})


METHODS = (
    "moco",
    "moco_v3",
    "byol",
    "simclr",
    "memory_bank",
    "swav",
    "supervised",
)  # modules of mocofast.methods


@dataclass
class ModelConfig:
    """The method: encoders, queue, momentum and temperature."""

    method: str = option(
        "moco",
        "how the encoder is trained",
        METHODS,
    )
    arch: str = option(
        "resnet50",
        "torchvision model name; a ResNet's with _cifar for a 3x3 stem, no max-pool; MoCo v3's vit_small, vit_base; "
        "vit_tiny_cifar, for 32 pixels; or resnet_tiny",
    )
    dim: int = option(128, "dimension of the embedding that the loss compares")
    queue_size: int = option(
        65536, "number of negative keys kept, in keys; of a memory bank: drawn per batch"
    )
    momentum: float = option(
        0.999, "EMA momentum m of the key encoder, k = m k + (1-m) q, or of a memory bank's slots"
    )
    momentum_schedule: str = option(
        "constant",
        "cosine: m rises to 1 over the run, step by step (MoCo v3, BYOL)",
        ("constant", "cosine"),
    )
    temperature: float = option(0.07, "softmax temperature of InfoNCE")
    mlp: bool = option(False, "two-layer projection head (MoCo v2) instead of a linear one")
    shuffle_bn: bool = option(
        True, "shuffle the keys' images over ranks (or BatchNorm splits), so that BN cannot leak"
    )
    bn_splits: int = option(
        1, "BatchNorm statistics over this many parts of the batch, to stand in for GPUs on one"
    )
    sync_bn: bool = option(False, "BatchNorm statistics over the batches of all ranks together")
    hidden_dim: int = option(
        4096, "width of the projector's and predictor's hidden layers (all methods but MoCo)"
    )
    prototypes: int = option(3000, "SwAV: number of prototypes")
    epsilon: float = option(0.05, "SwAV: smoothness of the assignments to prototypes")
    freeze_prototypes: int = option(
        313, "SwAV: optimiser steps at the start in which prototypes stay"
    )
    symmetric: bool = option(
        False, "MoCo: both views are queries and keys; the loss is the sum (MoCo v2+)"
    )
    queue_dtype: str = option(
        "float32", "type the queue is stored in", ("float32", "bfloat16", "float16")
    )


OWN_IMAGES = ("folder", "shards")  # sources for which data.path names the user's images
SOURCES = (*OWN_IMAGES, "digits", "cifar10", "cifar100")  # mocofast.data.sources loads them
LOADERS = ("auto", "device", "dali", "torchvision")  # mocofast.data.loaders builds them


@dataclass
class DataConfig:
    """Where images come from and who decodes them."""

    source: str = option(
        "folder",
        "folder (of images, recursive), tar shards, embedded digits, or torchvision's CIFAR",
        SOURCES,
    )
    path: str = option(
        "",
        "folder of images or *.tar; shards also by pattern or URL: x-{000..099}.tar; where CIFAR lies",
    )
    shuffle_window: int = option(
        0,
        "of source=shards: shuffle samples within this many shards at a time, not over all; 0 means all",
    )
    loader: str = option(
        "auto",
        "who decodes and augments; auto says which and why",
        LOADERS,
    )
    batch_size: int = option(
        256, "images per optimiser step, over all ranks and accumulation steps"
    )
    workers: int = option(
        -1, "loader threads or processes per rank; -1 takes the cores there are, 0 loads in-process"
    )
    prefetch: int = option(
        2, "batches decoded ahead, and as many finished ones that wait (torchvision: a worker's)"
    )
    hw_decoder_load: float = option(
        0.65, "DALI on a GPU with a JPEG decoder: its share of the images, 0 to 1"
    )
    preallocate: tuple[int, int] = option(
        (0, 0), "DALI on a GPU: width and height to make room for at the start"
    )
    drop_last: bool = option(True, "leave out an epoch's last batch where it is smaller")
    holdout: float = option(
        0.1, "share of a labelled set without its own val/ or test/ folder kept for kNN, 0 to 1"
    )


@dataclass
class AugmentConfig:
    """Random views. The defaults are MoCo v1's; v2's differences are in its recipe."""

    size: int = option(224, "side of a view, in pixels")
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "area of the random crop, as a share of the image"
    )
    rotate: float = option(0.0, "largest random rotation either way, in degrees")
    flip: float = option(0.5, "probability of a horizontal flip")
    jitter: tuple[float, float, float, float] = option(
        (0.4, 0.4, 0.4, 0.4), "strength of brightness, contrast, saturation and hue jitter"
    )
    jitter_p: float = option(1.0, "probability of colour jitter")
    gray: float = option(0.2, "probability of grayscale")
    gray_first: bool = option(
        True, "grayscale before the colour jitter (MoCo v1) instead of after it (v2)"
    )
    blur: float = option(0.0, "probability of Gaussian blur")
    blur_sigma: tuple[float, float] = option(
        (0.1, 2.0), "standard deviation of the blur, in pixels"
    )
    solarize: float = option(0.0, "probability of inverting all values of 128 and more")
    blur_2: float = option(-1.0, "blur's probability in the second view; -1: as in the others")
    solarize_2: float = option(
        -1.0, "solarize's probability in the second view; -1: as in the others"
    )
    mean: tuple[float, float, float] = option(
        (0.485, 0.456, 0.406), "channel means that normalise [0, 1] pixels"
    )
    std: tuple[float, float, float] = option(
        (0.229, 0.224, 0.225), "channel standard deviations, likewise"
    )


@dataclass
class OptimConfig:
    """The optimiser and its schedule."""

    name: str = option(
        "sgd",
        "optimiser; lars neither decays nor scales biases and norms",
        ("sgd", "lars", "adamw"),
    )
    lr: float = option(0.03, "peak learning rate; MoCo's is for 256 images, whatever the batch")
    lr_per: int = option(
        0, "lr is for so many images: times data.batch_size / lr_per; 0 takes it as it is"
    )
    momentum: float = option(0.9, "momentum of sgd and lars")
    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay of adamw's averages of gradients and of their squares"
    )
    weight_decay: float = option(1e-4, "weight decay: L2 with sgd and lars, decoupled with adamw")
    schedule: str = option("step", "how the rate falls", ("constant", "step", "cosine"))
    milestones: tuple[int, ...] = option(
        (120, 160), "epochs at which schedule=step multiplies the rate by gamma"
    )
    gamma: float = option(0.1, "factor of schedule=step")
    warmup_epochs: float = option(0.0, "epochs over which the rate rises linearly from 0")
    per: str = option("epoch", "how often the rate is set", ("epoch", "step"))


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = option(200, "passes over the data")
    accumulate: int = option(
        1, "micro-batches per optimiser step; each holds batch_size / accumulate images"
    )
    precision: str = option(
        "auto", "auto: bf16 autocast on GPUs that have it, else fp32", ("auto", "fp32", "bf16")
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(0, "seed of weights, data order, views and shuffles")
    log_every: int = option(50, "steps between log lines; metrics are averaged over them")
    max_steps: int = option(0, "stop after this many optimiser steps in all; 0 trains every epoch")
    dir: str = option("", "run folder; empty makes runs/RECIPE")


@dataclass
class EngineConfig:
    """How a step is launched; every mode gives the same trajectory, to rounding."""

    mode: str = option(
        "auto",
        "op by op (eager), encoders compiled (compile), besides in one CUDA graph (graph); auto says which and why",
        ("auto", "eager", "compile", "graph"),
    )


@dataclass
class CheckpointConfig:
    """What is kept to resume from."""

    every_epochs: int = option(1, "epochs between checkpoints")
    every_steps: int = option(0, "also a checkpoint every so many steps; 0 means none")
    keep: int = option(2, "newest step_*.pt files kept beside last.pt")


@dataclass
class KNNConfig:
    """The kNN monitor (Wu et al. 2018, arXiv:1805.01978): accuracy without training anything."""

    every: int = option(10, "epochs between kNN evaluations; 0 means only at the start and the end")
    k: int = option(200, "neighbours that vote")
    temperature: float = option(0.1, "votes weigh exp(similarity / temperature)")
    features: str = option(
        "backbone", "pooled features before the head, or the embedding", ("backbone", "output")
    )
    bank: int = option(
        50000, "training images that vote at most; a fixed random subset of a larger set"
    )
    shots: int = option(
        0, "also 1-nearest-neighbour accuracy with this many labelled examples a class; 0 means not"
    )


@dataclass
class Config:
    """A run, whole. ``config.yaml`` in a run folder is exactly this."""

    recipe: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
