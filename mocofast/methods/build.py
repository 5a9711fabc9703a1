"""Builds the method of a configuration."""

from __future__ import annotations

from mocofast.config import Config, ConfigError, ModelConfig, check_options, method_module
from mocofast.device import memory_bytes
from mocofast.methods.base import Method
from mocofast.models.sync_batch_norm import sync_batch_norm


def build_method(config: Config, images: int = 0, classes: int = 0) -> Method:
    """Returns the untrained method of a configuration, on the CPU.

    images, classes: numbers of images and of classes in the training set. Some methods keep
        something for every image or every class.
    The weights come from torch's default generator. Raises ConfigError for an unknown method.
    """
    check_options(config.model)
    _check_memory(config.model, images, classes)
    method: Method = method_module(config.model.method).build(config, images, classes)
    if config.augment.local_crops and not method.takes_local_views:
        raise ConfigError(
            f"augment.local_crops: expected 0, because model.method {config.model.method} takes no "
            f"small views, got {config.augment.local_crops}"
        )
    if config.model.sync_bn:
        sync_batch_norm(method)
    return method


def _check_memory(model: ModelConfig, images: int, classes: int) -> None:
    """Raises ConfigError if one tensor of a method cannot fit into the memory of this machine.

    Options may come from a file of anybody. A system may grant memory that it does not have, and
    end the process later.
    """
    memory = memory_bytes()
    if memory is None:
        return
    rows = {
        "model.queue_size": getattr(model, "queue_size", 0),
        "model.prototypes": getattr(model, "prototypes", 0),
        "model.feature_queue": getattr(model, "feature_queue", 0),
        "number of images": images if model.method == "memory_bank" else 0,
        "number of classes": classes if model.method == "supervised" else 0,
        "model.dim": 2048,  # rows of a ResNet-50's head
    }
    for name, count in rows.items():
        needed = 2 * count * model.dim  # 16 bits are the smallest numbers
        if needed > memory:
            value = model.dim if name == "model.dim" else count
            raise ConfigError(
                f"{name}: {value:,} with model.dim {model.dim:,} takes at least "
                f"{needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB"
            )
