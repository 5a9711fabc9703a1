"""The methods, by the name that `model.method` gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from mocofast.config import METHODS, Config, ConfigError
from mocofast.methods.base import Method
from mocofast.models.sync_batch_norm import sync_batch_norm

SIZED = {"memory_bank": ("images",), "supervised": ("classes",)}  # what else their builders take


def build_method(config: Config, images: int = 0, classes: int = 0) -> Method:
    """The untrained method of a configuration, on the CPU, its weights drawn from torch's default generator.

    images, classes: how many the training set has; for the methods that keep something for each (SIZED).
    """
    name = config.model.method
    if name not in METHODS:
        raise ConfigError(f"model.method must be one of {', '.join(METHODS)}: got {name!r}")
    build = cast("Callable[..., Method]", importlib.import_module(f"mocofast.methods.{name}").build)
    sizes = {"images": images, "classes": classes}
    method = build(config, **{size: sizes[size] for size in SIZED.get(name, ())})
    if config.model.sync_bn:
        sync_batch_norm(method)
    return method
