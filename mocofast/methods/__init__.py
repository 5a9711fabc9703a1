"""The methods, by the name that `model.method` gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from mocofast.config import Config, ConfigError
from mocofast.methods.base import Method
from mocofast.sync_batch_norm import sync_batch_norm

BUILDERS = {
    "moco": "mocofast.methods.moco",
    "moco_v3": "mocofast.methods.moco_v3",
    "byol": "mocofast.methods.byol",
}


def build_method(config: Config) -> Method:
    """The untrained method of a configuration, on the CPU, its weights drawn from torch's default generator."""
    name = config.model.method
    if name not in BUILDERS:
        raise ConfigError(f"model.method must be one of {', '.join(BUILDERS)}: got {name!r}")
    build = cast("Callable[[Config], Method]", importlib.import_module(BUILDERS[name]).build)
    method = build(config)
    if config.model.sync_bn:
        sync_batch_norm(method)
    return method
