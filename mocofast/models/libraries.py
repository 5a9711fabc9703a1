"""Encoders that other code builds: models of timm, and functions of the user."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mocofast.errors import ConfigError, describe_error
from mocofast.models.heads import WithHead, pooled
from mocofast.view_sizes import Size, height_width, pixels_text

log = logging.getLogger("mocofast")

TIMM = "timm/"
PRETRAINED = ":pretrained"  # suffix of a model of timm with timm's weights


def timm_encoder(
    name: str, image_size: Size, channels: int, drop_path: float = 0.0, layer_scale: float = 0.0
) -> Callable[..., nn.Module]:
    """Returns the constructor of a model of timm, untrained.

    name: for example "convnext_tiny". With "NAME:pretrained", timm's weights of the model, from the
        disk or downloaded by timm. They are read when an encoder is built.
    image_size: of the images, passed to models that need it (ViTs).
    drop_path: largest rate of stochastic depth. layer_scale: first value of LayerScale. 0: none.
    Raises ConfigError if timm is missing, or has no model of the name. Building raises ConfigError
        if the weights are missing.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.arch: {TIMM}{name} needs timm, which is not installed: pip install timm"
        ) from error
    name, _, weights = name.partition(":")
    if weights not in ("", "pretrained"):
        raise ConfigError(
            f"model.arch: expected {TIMM}NAME or {TIMM}NAME:pretrained, got {TIMM}{name}:{weights}"
        )
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)
        raise ConfigError(
            f"model.arch: timm has no model {name!r}; the nearest one is {TIMM}{close[0]}"
        )
    pretrained = bool(weights)

    def build(num_classes: int) -> nn.Module:
        arguments = timm_arguments(name, image_size, channels)
        if drop_path:
            arguments = {**arguments, "drop_path_rate": drop_path}
        if layer_scale:
            arguments = {**arguments, "init_values": layer_scale}
        try:
            return timm.create_model(
                name, num_classes=num_classes, pretrained=pretrained, **arguments
            )
        except TypeError as error:
            for key, option in (("drop_path_rate", "drop_path"), ("init_values", "layer_scale")):
                if key in str(error):
                    raise ConfigError(
                        f"model.{option}: {TIMM}{name} has no such option; expected 0"
                    ) from error
            raise
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            said = describe_error(error).splitlines()[0][:300]
            raise ConfigError(
                f"model.arch: found no weights of timm for {TIMM}{name}, on this disk or by a "
                f"download ({said}); {TIMM}{name} starts untrained, and --init takes a file"
            ) from error
        except (ValueError, AssertionError, ZeroDivisionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"model.arch: {TIMM}{name} cannot take images of {pixels_text(image_size)} pixels "
                f"(augment.size): {describe_error(error)}"
            ) from error

    return build


@functools.cache
def timm_arguments(name: str, image_size: Size, channels: int) -> dict[str, Any]:
    """Returns the arguments of timm.create_model beside num_classes and pretrained.

    Models that need the size of the images (ViTs) take img_size. Others refuse the argument.
    """
    import timm

    arguments: dict[str, Any] = {"in_chans": channels}
    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=image_size, **arguments)
    except TypeError as error:
        if "img_size" in str(error):
            return arguments
    except Exception as error:  # the construction with numbers tells it, if it fails, too
        log.debug("%s on meta tensors: %s", name, error)
    return {**arguments, "img_size": image_size}


def function_encoder(name: str, image_size: Size, channels: int) -> Callable[..., nn.Module]:
    """Returns the constructor that a function of the user is.

    name: "package.module:function". The function takes num_classes, and, where it names these
        arguments, image_size and channels. It returns a module with a head. A function that does
        not take num_classes returns a module without a head, which gets a linear head.
    Raises ConfigError if there is no such function, or if it cannot take the images' channels.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"model.arch: there is no module {module_name!r} ({error})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"model.arch: {module_name!r} has no function {function_name!r}")
    parameters = inspect.signature(function).parameters
    given = {
        key: value
        for key, value in (("image_size", image_size), ("channels", channels))
        if key in parameters
    }
    if channels != 3 and "channels" not in parameters:
        raise ConfigError(
            f"data.channels: {channels} channels need an argument `channels` of model.arch {name!r}"
        )

    has_head = "num_classes" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )

    def build(num_classes: int) -> nn.Module:
        encoder = function(**given, **({"num_classes": num_classes} if has_head else {}))
        if not isinstance(encoder, nn.Module):
            raise ConfigError(
                f"model.arch: {name!r} must return a torch.nn.Module, got {type(encoder).__name__}"
            )
        if has_head:
            return encoder
        out = _output(name, encoder, image_size, channels)
        if not isinstance(out, torch.Tensor):
            raise ConfigError(
                f"model.arch: {name} must return a tensor of features, tokens or maps, and returns "
                f"{type(out).__name__}; wrap it in a function of yours"
            )
        return WithHead(encoder, pooled(out, channels_last=False).shape[1], num_classes)

    return build


def _output(arch: str, encoder: nn.Module, image_size: Size, channels: int) -> Any:
    """Returns the output of an encoder for two images, whatever it is.

    Modes and random state stay. Raises ConfigError for an encoder that cannot take the images.
    """
    height, width = height_width(image_size)
    state = torch.get_rng_state()
    modes = [(part, part.training) for part in encoder.modules()]
    try:
        with torch.no_grad():
            return encoder.eval()(torch.zeros(2, channels, height, width))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"model.arch: {arch} cannot take images of {height} x {width} pixels "
            f"and {channels} channels (augment.size, data.channels): {error}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
        torch.set_rng_state(state)


def checked_outputs(
    arch: str, build: Callable[..., nn.Module], image_size: Size, channels: int
) -> Callable[..., nn.Module]:
    """Returns `build`, whose encoders are tried on an image before they are returned.

    Raises ConfigError for an encoder that cannot take the images, or whose output is no tensor
    (N, num_classes), a tuple for example.
    """

    def checked(num_classes: int) -> nn.Module:
        encoder = build(num_classes=num_classes)
        out = _output(arch, encoder, image_size, channels)
        if not isinstance(out, torch.Tensor) or out.shape != (2, num_classes):
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ConfigError(
                f"model.arch: {arch} must return a tensor (images, {num_classes}), and returns "
                f"{got}; wrap it in a function of yours, --model.arch package.module:function"
            )
        return encoder

    return checked
