"""The options of a run: default, meaning and valid values, in one place.

The options of the methods stand in mocofast/methods/options.py, which needs no PyTorch.
The defaults are those of MoCo v1 on ImageNet (He et al. 2020, arXiv:1911.05722).
The files in `recipes/` hold differences only. `mocofast pretrain --help-all` is made from the
options.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from mocofast.data_config import LOADERS as LOADERS
from mocofast.data_config import OWN_IMAGES as OWN_IMAGES
from mocofast.data_config import SOURCES as SOURCES
from mocofast.data_config import TABLES as TABLES
from mocofast.data_config import AugmentConfig, DataConfig
from mocofast.errors import ConfigError
from mocofast.option import SHARE, Valid, above, at_least, between, option
from mocofast.plugins import is_plugin, load_plugin

METHODS = ("moco", "moco_v3", "byol", "simclr", "memory_bank", "swav", "clip", "supervised")


@dataclass
class ModelConfig:
    """The encoder and its method. A method's module adds options of its own."""

    takes_captions: ClassVar[bool] = False  # the method learns from images and their captions

    method: str = option(
        "moco",
        f"how the encoder is trained: {', '.join(METHODS)}, or the dotted name of a module with "
        "Options and build",
    )
    arch: str = option(
        "resnet50",
        "torchvision model name; a ResNet's name with _cifar for a 3x3 stem and no max-pool; "
        "MoCo v3's vit_small, vit_base, vit_large and vit_huge; vit_tiny_cifar, for 32 pixels; "
        "resnet_tiny; timm/NAME, with timm's weights timm/NAME:pretrained; "
        "package.module:function, which takes num_classes, or takes none and returns an encoder "
        "without a head; or the dotted name of a module with build_encoder",
    )
    dim: int = option(128, "dimension of the embedding that the loss compares", valid=at_least(1))
    sync_bn: bool = option(False, "BatchNorm statistics over the batches of all ranks together")
    token_dropout: float = option(
        0.0,
        "share of a ViT's patches that training leaves out, other patches for every image and step",
        valid=SHARE,
    )

    drop_path: float = option(
        0.0,
        "largest rate of stochastic depth in residual branches, of ViTs and of models of timm; "
        "momentum encoders use all branches",
        valid=SHARE,
    )
    layer_scale: float = option(
        0.0,
        "first value of LayerScale, a learned factor of every channel of a residual branch, of "
        "ViTs and of models of timm; 0: none",
        valid=at_least(0),
    )

    if TYPE_CHECKING:
        # The options of the method.
        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def validate(self) -> None:
        """Raises ConfigError if options contradict one another. `Options` may extend it."""


def method_module(name: str) -> Any:
    """Imports the module of a method.

    name: one of METHODS, or the dotted name of a module of the user.
    The module defines `Options`, a dataclass that extends ModelConfig, and
    `build(config, images, classes)`, which returns the untrained method.
    Raises ConfigError for an unknown name.
    """
    if name in METHODS:
        return importlib.import_module(f"mocofast.methods.{name}")
    if is_plugin(name):
        return load_plugin("model.method", name, "Options", "build")
    close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"model.method: expected one of {', '.join(METHODS)}, or a module's dotted name, "
        f"got {name!r}{hint}"
    )


def check_options(model: ModelConfig) -> None:
    """Raises ConfigError if `model` does not hold the options of its method."""
    if type(model) is not method_options(model.method):
        raise ConfigError(
            f"model.method: the options are not those of {model.method!r}; change the method by "
            'mocofast.settings.apply(config, {"model.method": ...})'
        )


def method_options(name: str) -> type[ModelConfig]:
    """Returns the options of a method: its module's `Options`."""
    if name in METHODS:  # without the module, whose import of PyTorch takes seconds
        known = importlib.import_module("mocofast.methods.options").OPTIONS
        return cast(type[ModelConfig], known[name])
    options: type[ModelConfig] = method_module(name).Options
    return options


@dataclass
class OptimConfig:
    """The optimiser and its schedule."""

    name: str = option(
        "sgd",
        "optimiser; lars neither decays nor scales biases and norms",
        ("sgd", "lars", "adamw"),
    )
    lr: float = option(
        0.03, "peak learning rate; MoCo's is for a batch of 256 images", valid=at_least(0)
    )
    lr_per: int = option(
        0,
        "linear scaling: lr x batch_size / lr_per; 0 turns it off",
        valid=at_least(0),
    )
    momentum: float = option(0.9, "momentum of sgd and lars")
    betas: tuple[float, float] = option(
        (0.9, 0.999),
        "decay of adamw's averages of gradients and of squared gradients",
        valid=Valid(lambda value: 0 <= min(value) <= max(value) < 1, "two shares, 0 to below 1"),
    )
    weight_decay: float = option(1e-4, "weight decay: L2 with sgd and lars, decoupled with adamw")
    schedule: str = option(
        "step",
        "how the learning rate falls; wsd (warm-up, stable, decay) keeps the peak until the last "
        "cooldown_epochs",
        ("constant", "step", "cosine", "wsd"),
    )
    milestones: tuple[int, ...] = option(
        (120, 160), "epochs at which schedule=step multiplies the learning rate by gamma"
    )
    gamma: float = option(0.1, "factor of schedule=step")
    warmup_epochs: float = option(
        0.0, "epochs in which the learning rate rises linearly from 0", valid=at_least(0)
    )
    cooldown_epochs: float = option(
        0.0,
        "epochs at the end in which schedule=wsd lowers the learning rate to 0, step by step; 0 "
        "keeps the peak, for a run from which pretrain --resume RUN --cooldown N branches",
        valid=at_least(0),
    )
    per: str = option("epoch", "how often the learning rate is set", ("epoch", "step"))
    clip_norm: float = option(
        0.0,
        "largest L2 norm of all gradients together, to which longer ones are scaled; 0: no limit",
        valid=at_least(0),
    )


TRACKERS = ("tensorboard", "wandb", "mlflow", "comet", "trackio")  # packages that show metrics


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = option(200, "passes over the data", valid=at_least(0))
    accumulate: int = option(
        1,
        "micro-batches per optimiser step; each holds batch_size / accumulate images",
        valid=at_least(1),
    )
    precision: str = option(
        "auto",
        "auto: bf16 autocast on GPUs that have bf16, fp16 on other GPUs (V100, T4); on CPUs with "
        "AMX or AVX512-BF16 bf16 for ResNets and ViTs, else fp32. fp16 scales the loss, and skips "
        "steps that overflow",
        ("auto", "fp32", "bf16", "fp16"),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N, gpu or mps")
    seed: int = option(
        0,
        "seed of weights, data order, views and shuffles",
        valid=between(0, 2**63 - 1, "0 to 2^63 - 1"),
    )
    log_every: int = option(
        50, "steps between log lines; metrics are averaged over these steps", valid=at_least(1)
    )
    log_to: tuple[str, ...] = option(
        TRACKERS[:1],
        "where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, comet, trackio; "
        "none where empty",
        valid=Valid(lambda names: {*names} <= {*TRACKERS}, f"names among {', '.join(TRACKERS)}"),
    )
    max_steps: int = option(
        0, "stop after this many optimiser steps in all; 0 trains every epoch", valid=at_least(0)
    )
    dir: str = option("", "run folder; empty makes runs/RECIPE")
    deterministic: bool = option(
        False,
        "only operations that give the same bits in every run; on GPUs slower, and an error names "
        "an operation that has no such form",
    )
    skip_nonfinite: int = option(
        0,
        "how often a run whose loss is not finite goes back to its last checkpoint and leaves out "
        "the batch of this step and of the step before; 0: the run stops",
        valid=at_least(0),
    )
    hang_after: float = option(
        300.0,
        "seconds without progress after which ranks end, and name the rank that hangs; a single "
        "process only logs where it stands; 0 turns it off",
        valid=at_least(0),
    )


@dataclass
class EngineConfig:
    """How a step is launched. Every mode gives the same trajectory, to rounding."""

    mode: str = option(
        "auto",
        "eager: op by op; compile: compiled encoders; graph: also one CUDA graph per step; "
        "auto says which and why",
        ("auto", "eager", "compile", "graph"),
    )
    parallel: str = option(
        "ddp",
        "what a rank of several holds: ddp: the whole model; fsdp: a part of every weight, of the "
        "momentum encoder and of the optimiser's state, for models that do not fit",
        ("ddp", "fsdp"),
    )
    checkpoint_activations: bool = option(
        False,
        "the query encoder keeps the inputs of its blocks alone, and computes the blocks again in "
        "the backward pass: less memory, a quarter to a third more time, equal gradients",
    )


@dataclass
class CheckpointConfig:
    """Checkpoints, from which a run continues."""

    every_epochs: int = option(1, "epochs between checkpoints", valid=at_least(1))
    every_steps: int = option(
        0, "also a checkpoint every this many steps; 0 means none", valid=at_least(0)
    )
    keep: int = option(2, "number of step_*.pt files to keep, besides last.pt", valid=at_least(0))
    make_room: bool = option(
        False, "where the disk is full, remove all step_*.pt files but the newest, and try again"
    )


@dataclass
class KNNConfig:
    """The kNN monitor (Wu et al. 2018, arXiv:1805.01978): accuracy of kNN on the features."""

    every: int = option(
        10,
        "epochs between kNN evaluations; 0 means only at the start (see start) and the end",
        valid=at_least(0),
    )
    start: bool = option(True, "also evaluate the untrained encoder, before the first step")
    start_limit: float = option(
        5,
        "seconds; the untrained encoder is not evaluated if this would take longer, as its first "
        "images predict; 0 means no limit",
        valid=at_least(0),
    )
    k: int = option(200, "neighbours that vote", valid=at_least(1))
    temperature: float = option(0.1, "a vote weighs exp(similarity / temperature)", valid=above(0))
    features: str = option(
        "backbone", "pooled features before the head, or the embedding", ("backbone", "output")
    )
    bank: int = option(
        50000,
        "largest number of training images that vote; of a larger set, a fixed random subset votes",
        valid=at_least(1),
    )
    queries: int = option(
        0,
        "largest number of held-out images that are classified; of a larger set, a fixed random "
        "subset is classified; 0 classifies all",
        valid=at_least(0),
    )
    size: int = option(
        0,
        "pixels of the square views that are classified; 0 means those of augment.size. Small "
        "images that training enlarges are faster at a smaller size (ResNets only)",
        valid=at_least(0),
    )
    precision: str = option(
        "train",
        "precision of the features; train means train.precision. bf16 is twice as fast on CPUs "
        "that have AMX or AVX512-BF16",
        ("train", "fp32", "bf16", "fp16"),
    )
    shots: int = option(
        0,
        "also 1-nearest-neighbour accuracy with this many labelled images a class; 0 means none",
        valid=at_least(0),
    )
    patience: int = option(
        0,
        "end the training after this many evaluations in a row without a new best knn_top1; 0 "
        "trains every epoch",
        valid=at_least(0),
    )


def _default_model() -> ModelConfig:
    return method_options(ModelConfig.method)()


@dataclass
class Config:
    """Everything that defines a run. `config.yaml` in a run folder holds these values."""

    recipe: str = "custom"
    model: ModelConfig = field(default_factory=_default_model)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)

    def __post_init__(self) -> None:
        """Gives a plain ModelConfig the options of its method."""
        if type(self.model) is ModelConfig:
            self.model = method_options(self.model.method)(**vars(self.model))
