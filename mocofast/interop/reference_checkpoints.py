"""Loads checkpoint files of mocofast and of other projects as models.

docs/checkpoints.md lists the layouts that are known.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.interop.layouts import Found, find_encoder, method_part
from mocofast.interop.reading import described_names, is_ours, read_any, tensors_of
from mocofast.interop.weights import load_reference_state_dict
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.methods.moco import MoCo
from mocofast.models.heads import head_names
from mocofast.models.libraries import TIMM
from mocofast.models.vit import SIZES
from mocofast.train.checkpoint import FORMAT, checked, model_from_checkpoint
from mocofast.train.file_kinds import entries_of
from mocofast.train.finite import check_finite
from mocofast.view_sizes import Size, height_width

# Entries of encoders that no feature depends on.
_UNUSED = ("mask_token",)
_HEADS = (
    *("fc.", "head.", "heads.", "classifier.", "dino_head.", "projection_head."),
    *("projector.", "predictor.", "prototypes."),  # SwAV, and encoders saved with their heads
    "decoder_",  # MAE
)


class Loaded(NamedTuple):
    """The model of a file.

    method: on the CPU. Of files with an encoder alone, everything else in it is untrained.
    config: the configuration of the run, or defaults that fit the encoder.
    layout: the project: "mocofast", "facebookresearch/moco" for example.
    is_complete: the file holds all parts of the method.
    content: the content of the file.
    """

    method: Method
    config: Config
    layout: str
    is_complete: bool
    content: Any


def load_pretrained(path: str, arch: str | None) -> tuple[Method, Config, bool]:
    """Returns the model of a checkpoint (on the CPU), its configuration, and whether it is ours.

    path, arch, errors: as for `load_any`.
    """
    try:
        loaded = load_any(path, arch)
    except WrongArch as error:
        raise ConfigError(f"-a {arch}: {error}") from error
    return loaded.method, loaded.config, loaded.layout == "mocofast"


class WrongArch(ConfigError):
    """The file names another encoder than the caller expects."""


def load_any(path: str, arch: str | None = None, size: Size = 0) -> Loaded:
    """Loads a checkpoint of any known layout.

    path: a run folder or checkpoint of mocofast, or a file of another project (torch.save or
        safetensors): complete checkpoints of facebookresearch/moco, and encoders of all others.
    arch: the expected encoder. None: the encoder that the file names, or that its weights show.
    size: of images that are no squares, for the position embeddings of another project. The
        encoder of a checkpoint of mocofast keeps its own size.
    Raises FileNotFoundError, and ConfigError for an unknown file, an unexpected encoder, and for
    weights that are NaN or infinite.
    """
    content, file = read_any(path)
    if is_ours(content) or (isinstance(content, Mapping) and "format" in content):
        model, config = model_from_checkpoint(checked(content, file))
        _check(arch, config.model.arch, path)
        return Loaded(model, config, "mocofast", True, content)
    told = content.get("arch") if isinstance(content, Mapping) else None
    named = _known(told)
    _check(arch, named, path)
    try:
        weights = method_part(tensors_of(content))
        check_finite(weights, path)
        parts = {name.split(".")[0] for name in weights}
        if (
            parts >= {"encoder_q", "encoder_k", "queue", "queue_ptr"}
            and weights["queue"].dim() == 2
        ):
            of_user = told if isinstance(told, str) and ":" in told else None  # module:function
            model, config = _moco(weights, arch or named or of_user)
            return Loaded(model, config, "facebookresearch/moco", True, content)
        found = find_encoder(weights, arch or named)
        method, config = _encoder(found, size)
        check_heads(method.encoder_q, found, file)
        return Loaded(method, config, found.layout, False, content)
    except ConfigError as error:
        if str(error).startswith(path):
            raise
        raise ConfigError(f"{path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _known(named: Any) -> str | None:
    """Returns `model.arch` of the name in a file, None for names that other projects made up."""
    from torchvision.models import list_models

    if not isinstance(named, str):
        return None
    if named.startswith(TIMM) or named in SIZES or named == "resnet_tiny":
        return named
    plain = named.removesuffix("_cifar").removesuffix("_solo")
    if plain in list_models():
        return named
    if importlib.util.find_spec("timm") is None:
        return None
    import timm

    model = named.partition(".")[0]  # the rest tells weights
    if model in list_models():
        return model
    return f"{TIMM}{model}" if timm.is_model(model) else None


def _check(expected: str | None, found: str | None, path: str) -> None:
    if expected and found and found.removeprefix(TIMM) != expected.removeprefix(TIMM):
        raise WrongArch(f"the encoder of {path} is {found}")


def _moco(weights: dict[str, Tensor], arch: str | None) -> tuple[Method, Config]:
    """Returns MoCo with both encoders and the queue of facebookresearch/moco.

    The queue may also be (K, dim), as `mocofast.MoCo` has it in the checkpoint of another loop.
    """
    found = find_encoder(weights, arch)
    config = _config(found, 0)
    config.model.mlp = "encoder_q.fc.2.weight" in weights
    head = weights.get("encoder_q.fc.2.weight", weights.get("encoder_q.fc.weight"))
    if head is not None and weights["queue"].shape[0] != len(head) == weights["queue"].shape[1]:
        weights = {**weights, "queue": weights["queue"].T.contiguous()}
    config.model.dim, config.model.queue_size = weights["queue"].shape
    model = build_method(config)
    assert isinstance(model, MoCo)
    load_reference_state_dict(model, weights)
    return model, config


def _config(found: Found, size: Size) -> Config:
    """Returns MoCo v1's configuration for an encoder. size: of images that are no squares."""
    config = settings.load_recipe("moco_v3_r50" if "moco-v3" in found.layout else "moco_v1_r50")
    config.model.arch = found.arch
    small = found.arch.endswith(("_cifar", "_tiny"))
    config.augment.size = _image_size(found, size) or (32 if small else 224)
    if found.channels != 3:
        config.data.channels = found.channels
        plain = {"mean": (0.0,), "std": (1.0,), "color_ops": "auto"}
        config.augment = replace(config.augment, **plain)  # type: ignore[arg-type]
    return config


def _image_size(found: Found, size: Size) -> Size:
    """Returns the size of the images that position embeddings are for, 0 without embeddings.

    size: of images that are no squares, or 0. Raises ConfigError if it is needed, and does not fit.
    """
    without_token = found.weights.keys().isdisjoint(("class_token", "cls_token"))
    # Loading names a class token that is missing although the token has a position.
    for count in (found.positions, found.positions - without_token):
        side = math.isqrt(max(0, count))
        if side**2 == count:
            return side * found.patch
    rows, columns = (length // found.patch for length in height_width(size))
    if rows * columns == found.positions:
        return size
    raise ConfigError(
        f"position embeddings of {found.positions} patches, which are no square; expected "
        f"--augment.size HEIGHT,WIDTH with HEIGHT / {found.patch} x WIDTH / {found.patch} = "
        f"{found.positions}"
    )


def _encoder(found: Found, size: Size) -> tuple[Method, Config]:
    """Returns a method whose query encoder has the weights, without a trained head."""
    config = _config(found, size)
    if config.model.method == "moco":
        config.model.queue_size = 256  # random, never read
    model = build_method(config)
    load_backbone(model.encoder_q, found.weights, found.arch)
    return model, config


def load_backbone(encoder: torch.nn.Module, weights: Mapping[str, Tensor], arch: str) -> None:
    """Loads the weights of an encoder without head.

    weights: under the encoder's own names. A head among them is left out.
    Raises ConfigError naming at most five entries that are missing, unknown or of another shape,
    and their number. After an error nothing is loaded.
    """
    prefixes = tuple(f"{name}." for name in head_names(encoder))
    wanted = {n: t for n, t in encoder.state_dict().items() if not n.startswith(prefixes)}
    given = {
        name: value
        for name, value in weights.items()
        if name in wanted or not (name.startswith((*prefixes, *_HEADS)) or name in _UNUSED)
    }
    for name in wanted.keys() - given.keys():
        if name.endswith("num_batches_tracked"):
            given[name] = wanted[name]
    wrong = sorted(
        name for name in given.keys() | wanted.keys() if _shape(given, name) != _shape(wanted, name)
    )
    if wrong:
        raise ConfigError(
            f"not the weights of {arch}: {len(wrong)} entries are missing, unknown or of another "
            f"shape: {described_names(wrong)}"
        )
    encoder.load_state_dict(given, strict=False)


def check_heads(encoder: torch.nn.Module, found: Found, file: Path) -> None:
    """Raises ConfigError if a ViT has other heads than the configuration beside the file tells.

    No weight shows the number of heads. transformers writes it into config.json.
    """
    if found.layout != "transformers":
        return
    told = entries_of(file.with_name("config.json")).get("num_attention_heads")
    own = {part.num_heads for part in encoder.modules() if hasattr(part, "num_heads")}
    if own and told is not None and own != {told}:
        raise ConfigError(
            f"{found.arch} has {own.pop()} heads, and config.json tells num_attention_heads {told}"
        )


def as_checkpoint(loaded: Loaded) -> dict[str, Any]:
    """Returns a model as the content of a checkpoint of mocofast, for `export`."""
    if loaded.layout == "mocofast":
        content: dict[str, Any] = loaded.content
        return content
    epoch = loaded.content.get("epoch", 0) if isinstance(loaded.content, Mapping) else 0
    return {
        "format": FORMAT,
        "config": settings.to_dict(loaded.config),
        "model": loaded.method.state_dict(),
        "epoch": epoch,
        "is_complete": loaded.is_complete,
    }


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
