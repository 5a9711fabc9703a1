"""The options of the methods, without PyTorch: `--help` and the check of a command line read them.

First the options that several methods share, then a class for every method.
"""

from __future__ import annotations

from dataclasses import dataclass

from mocofast.config import ConfigError, ModelConfig
from mocofast.option import above, at_least, between, option


@dataclass
class MomentumOptions(ModelConfig):
    """Options of a method with a momentum encoder."""

    momentum: float = option(
        0.999,
        "EMA momentum m of the key encoder, k = m k + (1-m) q, or of the memory bank's slots",
        valid=between(0, 1),
    )
    momentum_schedule: str = option(
        "constant",
        "cosine: m rises to 1 over the run, step by step (MoCo v3, BYOL)",
        ("constant", "cosine"),
    )


@dataclass
class TemperatureOptions(ModelConfig):
    """Options of a method whose loss is a softmax over scores."""

    temperature: float = option(0.07, "softmax temperature of the loss", valid=above(0))


@dataclass
class StoredKeysOptions(ModelConfig):
    """Options of a method whose negatives are stored keys."""

    queue_size: int = option(
        65536,
        "number of keys in the queue, or of negatives that a memory bank samples per batch",
        valid=at_least(1),
    )
    queue_dtype: str = option(
        "float32", "type of the stored keys", ("float32", "bfloat16", "float16")
    )


@dataclass
class HeadOptions(ModelConfig):
    """Options of a method with MoCo's projection head."""

    mlp: bool = option(False, "two-layer projection head (MoCo v2) instead of a linear head")


@dataclass
class ProjectorOptions(ModelConfig):
    """Options of a method with a projector."""

    hidden_dim: int = option(
        4096, "width of the hidden layers of projector and predictor", valid=at_least(1)
    )


@dataclass
class MoCoOptions(HeadOptions, TemperatureOptions, MomentumOptions, StoredKeysOptions):
    """Options of MoCo."""

    shuffle_bn: bool = option(
        True, "shuffle the keys' images over ranks or BatchNorm splits, so that BN cannot leak"
    )
    bn_splits: int = option(
        1,
        "BatchNorm statistics over this many splits of the batch, which stand for GPUs; several "
        "ranks share the splits. 1: over the images of every rank",
        valid=at_least(1),
    )
    symmetric: bool = option(
        False, "both views are queries and keys; the loss is the sum (MoCo v2+)"
    )
    queue_warmup: int = option(
        0,
        "first steps of a run that only fill the queue with keys, and train nothing; MoCo's "
        "authors start from random keys (0)",
        valid=at_least(0),
    )

    def validate(self) -> None:
        """Raises ConfigError if BatchNorm is both synchronised and split."""
        super().validate()
        if self.sync_bn and self.bn_splits > 1:
            raise ConfigError(
                "model.sync_bn: expected false where model.bn_splits is above 1, got True"
            )


@dataclass
class MoCoV3Options(MomentumOptions, ProjectorOptions, TemperatureOptions):
    """Options of MoCo v3."""


@dataclass
class BYOLOptions(MomentumOptions, ProjectorOptions):
    """Options of BYOL."""


@dataclass
class SimCLROptions(ProjectorOptions, TemperatureOptions):
    """Options of SimCLR."""

    hidden_dim: int = option(2048, "width of the projector's hidden layer", valid=at_least(1))
    temperature: float = option(0.1, "softmax temperature of the loss", valid=above(0))


@dataclass
class MemoryBankOptions(HeadOptions, TemperatureOptions, StoredKeysOptions):
    """Options of the memory bank."""

    momentum: float = option(
        0.5, "m of the moving average of a slot in the memory bank", valid=between(0, 1)
    )


@dataclass
class SwAVOptions(ProjectorOptions, TemperatureOptions):
    """Options of SwAV."""

    hidden_dim: int = option(2048, "width of the projector's hidden layer", valid=at_least(1))
    temperature: float = option(0.1, "softmax temperature of the loss", valid=above(0))
    prototypes: int = option(3000, "number of prototypes", valid=at_least(2))
    epsilon: float = option(0.05, "smoothness of the assignments to prototypes", valid=above(0))
    freeze_prototypes: int = option(
        313, "optimiser steps at the start that leave the prototypes unchanged", valid=at_least(0)
    )
    feature_queue: int = option(
        0,
        "number of earlier images with which a small batch is assigned to prototypes; 0: none; "
        "SwAV has 3840 for a batch of 256",
        valid=at_least(0),
    )
    feature_queue_epoch: int = option(
        15,
        "epoch from which the queue fills; assignments use it when it is full",
        valid=at_least(0),
    )


@dataclass
class ClipOptions(TemperatureOptions, MomentumOptions, StoredKeysOptions):
    """Options of CLIP."""

    takes_captions = True

    temperature: float = option(
        0.07, "temperature at the start; it is learned, and at least 0.01", valid=above(0)
    )
    loss: str = option(
        "softmax",
        "softmax over the batch (CLIP), or sigmoid of every pair (SigLIP, temperature 0.1)",
        ("softmax", "sigmoid"),
    )
    logit_bias: float = option(
        -10.0,
        "bias of the sigmoid loss at the start; it is learned; SigLIP's -10 is for batches of tens "
        "of thousands, minus the logarithm of the batch suits small batches",
    )
    queue_size: int = option(
        0,
        "number of images, and of texts, in queues that momentum encoders fill; 0: negatives are "
        "the batch of all ranks",
        valid=at_least(0),
    )
    text: str = option(
        "",
        "folder of a text model with its tokenizer, in the form of Hugging Face transformers; "
        "empty: a transformer with random weights that reads bytes",
    )
    text_width: int = option(
        512, "width of the transformer that reads bytes", valid=between(1, 8192)
    )
    text_layers: int = option(
        12, "blocks of the transformer that reads bytes", valid=between(1, 1024)
    )
    text_length: int = option(
        128, "tokens of a text, one of them its end; longer texts are cut", valid=between(2, 65536)
    )

    def validate(self) -> None:
        """Raises ConfigError for the sigmoid loss with queues."""
        super().validate()
        if self.loss == "sigmoid" and self.queue_size:
            raise ConfigError(
                f"model.queue_size: expected 0 with model.loss sigmoid, got {self.queue_size}"
            )


@dataclass
class SupervisedOptions(ModelConfig):
    """Options of supervised training: only the options of every method."""


OPTIONS: dict[str, type[ModelConfig]] = {
    "moco": MoCoOptions,
    "moco_v3": MoCoV3Options,
    "byol": BYOLOptions,
    "simclr": SimCLROptions,
    "memory_bank": MemoryBankOptions,
    "swav": SwAVOptions,
    "clip": ClipOptions,
    "supervised": SupervisedOptions,
}
