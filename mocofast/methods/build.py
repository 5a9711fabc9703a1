"""Builds the method of a configuration."""

from __future__ import annotations

from mocofast.config import Config, check_options, method_module
from mocofast.methods.base import Method
from mocofast.models.sync_batch_norm import sync_batch_norm


def build_method(config: Config, images: int = 0, classes: int = 0) -> Method:
    """Returns the untrained method of a configuration, on the CPU.

    images, classes: numbers of images and of classes in the training set. Some methods keep
        something for every image or every class.
    The weights come from torch's default generator. Raises ConfigError for an unknown method.
    """
    check_options(config.model)
    method: Method = method_module(config.model.method).build(config, images, classes)
    if config.model.sync_bn:
        sync_batch_norm(method)
    return method
