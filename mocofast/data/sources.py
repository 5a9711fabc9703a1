"""Sources of images (a folder, tar shards, the embedded digits, CIFAR), and their train
and val sets.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import SOURCES, ConfigError, DataConfig, is_plugin, load_plugin
from mocofast.data.interface import Source
from mocofast.data.names import (
    EXTENSIONS,
    checked_labels,
    classes_of,
    digest,
    find_files,
    stratified_holdout,
    train_and_val_folders,
)
from mocofast.data.shards import ShardSource, find_shards, is_url, open_shards
from mocofast.errors import list_choices

DIGITS_HOLDOUT = 0.2


class FolderSource:
    """Image files below one folder. `load` returns a path."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """Takes the names of the files. Opens no file.

        root: the folder.
        names: N paths relative to `root`.
        labels: (N,) integers that index `classes`, or None.
        """
        self.root = str(root)
        # One array of bytes instead of N Python strings. Reading a string writes its
        # reference count, so every forked worker would end up with a copy of a list of
        # millions.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = checked_labels(labels, len(names), classes)
        self.classes = classes

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Returns the path of an image relative to the root."""
        return os.fsdecode(self._names[index])

    def load(self, index: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.root, self.name(index))

    def subset(self, index: np.ndarray) -> FolderSource:
        """Returns a source of some images. index: (n,) int64."""
        part = copy.copy(self)
        part._names = self._names[index]
        part.labels = None if self.labels is None else self.labels[index]
        return part

    def fingerprint(self) -> str:
        """Returns a hash of relative names and labels. The folder may move, its content
        may not change.
        """
        return digest(b"\0".join(self._names.tolist()), self.labels, self.classes)


class ArraySource:
    """Images in memory. `load` returns pixels (H, W, 3) uint8."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        classes: tuple[str, ...],
        prefix: str = "image",
    ) -> None:
        """Raises ValueError for images or labels of a wrong shape or type.

        images: (N, H, W, 3) uint8.
        labels: (N,) integers that index `classes`, or None.
        prefix: the start of every image's name.
        """
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}"
            )
        self.images = images
        self.labels = checked_labels(labels, len(images), classes)
        self.classes = classes
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Returns the prefix and the index."""
        return f"{self.prefix} {index}"

    def load(self, index: int) -> np.ndarray:
        """Returns the pixels of an image."""
        return self.images[index]

    def fingerprint(self) -> str:
        """Returns a hash of pixels and labels."""
        shape = repr(self.images.shape).encode()
        return digest(
            shape + np.ascontiguousarray(self.images).tobytes(), self.labels, self.classes
        )


class Subset:
    """Some samples of any source.

    `FolderSource.subset` also hashes its names faster. `ShardSource.subset` also keeps the
    windows of shards.
    """

    def __init__(self, source: Source, index: np.ndarray) -> None:
        """index: (n,) int64, the samples of `source`."""
        self._source, self._index = source, index
        self.labels = None if source.labels is None else source.labels[index]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        """Returns the name of the sample in the whole source."""
        return self._source.name(int(self._index[index]))

    def load(self, index: int) -> str | bytes | np.ndarray:
        """Returns what the whole source returns for the sample."""
        return self._source.load(int(self._index[index]))

    def fingerprint(self) -> str:
        """Returns a hash of names and labels, equal to the hash of a FolderSource of
        these images.
        """
        names = (os.fsencode(self.name(index)) for index in range(len(self)))
        return digest(b"\0".join(names), self.labels, self.classes)


class Datasets(NamedTuple):
    """The images of a run."""

    train: Source  # for training
    # for kNN and linear evaluation. None without labels, or if no images are held out
    val: Source | None
    note: str  # a line for the log: the numbers of images, and the origin of the val set


def load_datasets(data: DataConfig, seed: int = 0) -> Datasets:
    """Finds the images of `data` and makes a train and a val set.

    data: `source`, `path`, `holdout` and `shuffle_window` are used.
    seed: seed of the held-out share.

    data.source=folder: image files below `path`. The train set is `path`/train and the
        val set is `path`/val (or `path`/test) if both folders exist. If train/ is the
        only folder, it is the train set. Otherwise the train set is all of `path`.
        Images are labelled if all images lie in two or more subfolders. The class is
        the first folder below the root (or below train/ and val/). An image directly in
        the root, or a single subfolder, means no labels.
    data.source=shards: tar files (`mocofast.data.shards`): a folder of shards, which
        may have train/ and val/ too, a pattern, or URLs. The labels are the labels in
        the shards.
    data.source=digits: 1,797 grey images of 8 x 8 pixels from scikit-learn. The same
        20% of every class are held out for any seed.
    data.source=cifar10, cifar100: torchvision's data sets, kept in `path`, downloaded
        only if absent. The val set is the test set. With several processes, one process
        must call this function first, so that only one process downloads.

    data.source=package.module: the module's own `load_datasets(data, seed)`, which returns
        Datasets.

    If labelled images of a folder or of shards have no val/ or test/ folder, the share
    `data.holdout` of every class is held out for the val set. The images are chosen by
    `seed`.

    Raises ConfigError, FileNotFoundError or NotADirectoryError with the name of the
    option. Decodes no image: loaders find and skip bad files.
    """
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout must be in [0, 1), got {data.holdout}")
    if is_plugin(data.source):
        module = load_plugin("data.source", data.source, "load_datasets")
        own: Datasets = module.load_datasets(data, seed)
        return own
    if data.source not in _LOAD:
        raise ConfigError(f"data.source must be {list_choices(SOURCES)}, got {data.source!r}")
    return _LOAD[data.source](data, seed)


def find_images(folder: str | Path) -> list[str]:
    """Returns the names of all images below `folder`, relative to `folder` and sorted.

    An image is a file with an extension of EXTENSIONS, in any case. Hidden files and
    folders are skipped. Symbolic links are followed (a link back to a folder above it
    only once). No file is decoded. Raises FileNotFoundError, NotADirectoryError, or
    ConfigError (a ValueError) if there is no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"data.path: there is no folder {str(folder)!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"data.path must be a folder of images: {str(folder)!r} is a file")
    names = find_files(folder, EXTENSIONS)
    if not names:
        kinds = " ".join(sorted(EXTENSIONS))
        tars = "; its *.tar are for data.source=shards" if find_files(folder, {".tar"}) else ""
        raise ConfigError(
            f"data.path: no image below {str(folder)!r} (extensions looked for: {kinds}){tars}"
        )
    return names


def _load_folder(data: DataConfig, seed: int) -> Datasets:
    root = Path(_path(data)).expanduser()
    train_folder, val_folder = train_and_val_folders(root)
    names = find_images(root / train_folder)
    classes, labels = classes_of(names)
    train = FolderSource(root, [train_folder + name for name in names], labels, classes)
    if labels is None or not val_folder:
        return _hold_out(train, data.holdout, seed)
    val_names = find_images(root / val_folder)
    val_classes, val_labels = classes_of(val_names)
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        raise ConfigError(
            f"data.path: {val_folder} has classes that {train_folder} lacks: "
            f"{', '.join(unknown[:5])}"
        )
    if val_labels is None:
        return _hold_out(train, data.holdout, seed, f" ({val_folder} has no class folders)")
    labels = np.searchsorted(classes, val_classes)[val_labels]  # numbers of the train set's classes
    val = FolderSource(root, [val_folder + name for name in val_names], labels, classes)
    return Datasets(train, val, f"{_summary(train)}; kNN on {val_folder}, {len(val)}")


def _load_shards(data: DataConfig, seed: int) -> Datasets:
    path = _path(data)
    root = Path(path).expanduser()
    train_folder, val_folder = ("", "") if is_url(path) else train_and_val_folders(root)
    train = open_shards(find_shards(path, train_folder), data.shuffle_window)
    if train.labels is None or not val_folder:
        return _hold_out(train, data.holdout, seed)
    val = open_shards(find_shards(path, val_folder), classes=train.classes)
    if val.labels is None:
        return _hold_out(train, data.holdout, seed, f" ({val_folder} has no labels)")
    return Datasets(train, val, f"{_summary(train)}; kNN on {val_folder}, {len(val)}")


def _load_digits(data: DataConfig, seed: int) -> Datasets:
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..16 -> 0..255
    images = np.repeat(gray[..., None], 3, axis=3)
    classes = tuple(str(name) for name in digits.target_names)
    kept, held_out = stratified_holdout(digits.target, DIGITS_HOLDOUT, seed=0)
    train = ArraySource(images[kept], digits.target[kept], classes, "digits train")
    val = ArraySource(images[held_out], digits.target[held_out], classes, "digits val")
    return Datasets(train, val, f"{len(train)} digits of 8 x 8 pixels; kNN on {len(val)} held out")


def _load_cifar(data: DataConfig, seed: int) -> Datasets:
    from torchvision import datasets

    root = Path(_path(data)).expanduser()
    dataset = getattr(datasets, data.source.upper())
    parts: list[Any] = []
    try:
        for is_train in (True, False):
            try:
                parts.append(dataset(root, train=is_train))
            except RuntimeError:  # torchvision raises RuntimeError if the files are absent
                parts.append(dataset(root, train=is_train, download=True))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.path: {data.source} is not in {str(root)!r} and could not be downloaded "
            f"({error}); put {dataset.url} there, unpacked to {dataset.base_folder}/"
        ) from error
    train, val = (
        ArraySource(part.data, np.array(part.targets), tuple(part.classes), f"{data.source} {name}")
        for part, name in zip(parts, ("train", "test"))
    )
    note = f"{data.source}: {len(train)} images; kNN on its test set, {len(val)}"
    return Datasets(train, val, note)


# The function that loads a source, for every name of SOURCES.
_LOAD: dict[str, Callable[[DataConfig, int], Datasets]] = {
    "folder": _load_folder,
    "shards": _load_shards,
    "digits": _load_digits,
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
}


def _path(data: DataConfig) -> str:
    if not data.path:
        raise ConfigError(
            f"data.path must name a folder for data.source={data.source}, got an empty path"
        )
    return data.path


def _hold_out(
    source: FolderSource | ShardSource, holdout: float, seed: int, remark: str = ""
) -> Datasets:
    """Holds a share of labelled images out for the val set. remark: for the note, after
    the summary.
    """
    if source.labels is None:
        return Datasets(source, None, f"{len(source)} images without labels: no kNN")
    kept, held_out = stratified_holdout(source.labels, holdout, seed)
    summary = _summary(source) + remark
    if not len(held_out):
        return Datasets(source, None, f"{summary}, none held out: no kNN")
    note = f"{summary}; kNN on {len(held_out)} of them, held out"
    return Datasets(source.subset(kept), source.subset(held_out), note)


def _summary(source: Source) -> str:
    return f"{len(source)} images of {len(source.classes)} classes"
