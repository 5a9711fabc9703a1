"""Options that several methods share. `Options` of a method extends some of these classes."""

from __future__ import annotations

from dataclasses import dataclass

from mocofast.config import ModelConfig
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
