"""Pretraining and its results from Python: `mocofast.pretrain` and `mocofast.load`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mocofast import settings
from mocofast.config import Config, ConfigError, DataConfig
from mocofast.data.arrays import ArraySource
from mocofast.data.folders import FolderSource
from mocofast.data.interface import Source, no_image_decodes
from mocofast.data.ranges import set_range
from mocofast.data.reading import read_as_asked
from mocofast.data.sources import find_images
from mocofast.device import choose_device
from mocofast.errors import printable
from mocofast.evaluate.features import extract_batches, extraction, image_batches
from mocofast.interop.reference_checkpoints import load_any
from mocofast.train import configure
from mocofast.train.run import train
from mocofast.view_sizes import Size, pixels_text

if TYPE_CHECKING:
    from PIL.Image import Image

Images: TypeAlias = "str | Path | np.ndarray | Tensor | Sequence[str | Path | Image]"

log = logging.getLogger("mocofast")


class Readable(NamedTuple):
    """Features of the images that can be decoded. N: their number."""

    features: Tensor  # (N, D) float32, on the CPU
    names: list[str]  # of a folder's files: the path below the folder
    places: Tensor  # (N,) int64: the places among the given images, or in a folder's order of names


class Trained:
    """A trained encoder, and how to use it.

    encoder: the query encoder, on the CPU until `to` moves it. Its head gives the embedding.
    config: options of the run. For a file of another project: those that the file shows.
    path: the run folder or file.
    before, after: kNN figures of the random and of the trained encoder, {name: value}. Empty
        without labels, and for a loaded encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        config: Config,
        path: Path,
        before: Mapping[str, float] | None = None,
        after: Mapping[str, float] | None = None,
    ) -> None:
        self.encoder, self.config, self.path = encoder, config, path
        self.before, self.after = dict(before or {}), dict(after or {})

    def __repr__(self) -> str:
        """Returns the place and the kind of the encoder."""
        size = pixels_text(self.config.augment.size)
        return f"Trained({self.config.model.arch}, {size} px, {self.path})"

    def to(self, device: torch.device | str) -> Trained:
        """Moves the encoder to a device. Returns this object."""
        self.encoder.to(choose_device(str(device)))
        return self

    def embed(self, images: Images, *, output: str = "backbone") -> Tensor:
        """Returns features of images, (N, D) float32 on the CPU, not normalised.

        images: a file, or a folder, whose images are taken in order of their names; a list of
            files or of PIL images; an array (N, H, W, C) or a tensor (N, C, H, W), uint8, uint16 or
            floats from 0 to 1. Every image is resized and cut as the evaluation of the run does.
        output: "backbone", the pooled features before the head, or "output", the embedding that
            the loss compares.
        Raises FileNotFoundError for a missing file, and ValueError for an image that cannot be
            decoded, which `embed_readable` leaves out, or for no image.
        """
        source = self._source(images)
        rows, _, skipped = self._extracted(source, output)
        for index, reason in skipped.items():
            raise ValueError(
                f"images: {source.name(index)} cannot be decoded ({reason}); "
                "Trained.embed_readable leaves such images out"
            )
        return torch.cat(rows)

    def embed_readable(self, images: Images, *, output: str = "backbone") -> Readable:
        """Returns features as `embed`, with the names of the images, and their places.

        Images that cannot be decoded are left out, as in training. A warning names each of them.

        images, output: as for `embed`.
        Raises as `embed`, and ConfigError if no image can be decoded.
        """
        source = self._source(images)
        rows, places, skipped = self._extracted(source, output)
        if not rows:
            raise no_image_decodes(source, skipped)
        for number, (bad, reason) in enumerate(skipped.items(), 1):
            name = printable(source.name(bad))
            log.warning("left out unreadable file %d: %s: %s", number, name, printable(reason))
        every = torch.cat(places)
        return Readable(torch.cat(rows), [source.name(i) for i in every.tolist()], every)

    def _source(self, images: Images) -> Source:
        source = _source(images, self.config.data)
        if not len(source):
            raise ValueError(f"images: there is no image in {images!r}")
        return source

    def _extracted(
        self, source: Source, output: str
    ) -> tuple[list[Tensor], list[Tensor], dict[int, str]]:
        """Returns features and places of the good images, by batch, and the bad images as
        {index: reason}.
        """
        config, device = self.config, next(self.encoder.parameters()).device
        batches = image_batches(source, config, device)
        how = extraction(config, device, None)
        found = extract_batches(self.encoder, batches, device, output, **how)
        rows, places = [], []
        for features, _, index in found:
            rows.append(features)
            places.append(index)
        return rows, places, batches.skipped


def pretrain(path: str | Path | None = None, recipe: str | None = None, **options: Any) -> Trained:
    """Trains an encoder without labels, as the command `mocofast pretrain` does.

    path: images: a folder, a list, an archive or shards. None: the embedded digits, or the images
        that the recipe names.
    recipe: the name of a recipe, or a YAML file. None: `auto` fits the settings to the images and
        the machine, and `digits` is for the digits.
    options: groups of options, as in a recipe: `optim={"lr": 0.06}, train={"epochs": 20}`.

    Writes a run folder. In the main thread Ctrl-C ends the run with a checkpoint, and the call
    returns what was trained until then.
    Raises ConfigError for a recipe or an option that cannot be used, and DivergedError if the loss
    is not finite.
    """
    flat: dict[str, Any] = {}
    for group, values in options.items():
        if not isinstance(values, Mapping):
            raise ConfigError(
                f'{group}: expected a group of options, such as optim={{"lr": 0.06}}, '
                f"got {values!r}"
            )
        if group not in settings.groups():
            hint = settings.nearest(group, settings.groups())
            raise ConfigError(f"{group}: unknown group of options{hint}")
        flat.update({f"{group}.{name}": value for name, value in values.items()})
    config = configure.configure(recipe, "", flat, "" if path is None else str(path))
    result = train(config, kept=configure.kept_options(config, recipe, flat))
    trained = load(result.folder)
    trained.before, trained.after = result.before, result.after
    return trained


def load(path: str | Path, arch: str | None = None, size: Size = 0) -> Trained:
    """Loads the query encoder of a run folder, or of a checkpoint of any known project.

    path: a run folder or a file, see docs/checkpoints.md.
    arch: the encoder of a file of another project, where its weights do not show it.
    size: (height, width) of the images of a ViT of another project, if these are no squares.
    Raises FileNotFoundError, and ConfigError for an unknown or damaged file.
    """
    model, config, *_ = load_any(str(path), arch, size)
    return Trained(model.encoder_q.eval(), config, Path(path))


class _Pictures:
    """PIL images as a source of pixels."""

    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def __init__(self, images: Sequence[Image], channels: int) -> None:
        self._images, self._channels = images, channels

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int) -> np.ndarray:
        image = self._images[index]
        pixels = np.asarray(image.convert("RGB") if self._channels == 3 else image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def fingerprint(self) -> str:
        raise NotImplementedError("pictures in memory belong to no run")


def _source(images: Any, data: DataConfig) -> Source:
    """Returns images as a source, read as the run reads images. See `Trained.embed`."""
    source = _plain_source(images, data.channels)
    set_range(source, data.range, data.depth)
    return read_as_asked(source, data)[0]


def _plain_source(images: Any, channels: int) -> Source:
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
        images = images.detach().cpu().permute(0, 2, 3, 1).numpy()
    if isinstance(images, np.ndarray):
        return ArraySource(images, None, ())
    if isinstance(images, (str, Path)):
        path = Path(images).expanduser()
        if path.is_dir():
            return FolderSource(path, find_images(path, channels))
        images = [path]
    if not isinstance(images, Sequence):
        raise TypeError(
            f"images: expected a path, a list, an array or a tensor, got {type(images).__name__} "
            "(one PIL image: [image])"
        )
    if all(isinstance(image, (str, Path)) for image in images):
        paths = [str(Path(image).expanduser()) for image in images]
        for file in paths:
            if not Path(file).is_file():
                raise FileNotFoundError(f"images: there is no file {file!r}")
        return FolderSource("", paths)
    if all(hasattr(image, "convert") for image in images):
        return _Pictures(images, channels)
    raise TypeError("images: expected paths alone, or PIL images alone")
