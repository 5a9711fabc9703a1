"""Sets of images (a folder, tar shards, the embedded digits, CIFAR), and how each is split for evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data.interface import Source
from mocofast.data.names import (
    EXTENSIONS,
    checked_labels,
    classes_of,
    digest,
    find_files,
    split_folders,
    stratified_split,
)
from mocofast.data.shards import ShardSource, find_shards, is_url, open_shards

DIGITS_HOLDOUT = 0.2


class FolderSource:
    """Image files below one folder; `load` gives a path."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """names: (N,) paths relative to `root`; labels: (N,) integers that index `classes`, or None."""
        self.root = str(root)
        # One array of bytes instead of N Python strings: reading a string writes its reference count, and so
        # forked workers would each end up with their own copy of a list of millions.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.labels = checked_labels(labels, len(names), classes)
        self.classes = classes

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def load(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def subset(self, index: np.ndarray) -> FolderSource:
        """These of its images; index: (n,) int64."""
        labels = None if self.labels is None else self.labels[index]
        return FolderSource(self.root, [self.name(int(i)) for i in index], labels, self.classes)

    def fingerprint(self) -> str:
        """Hash of relative names and labels: the folder may move, its contents may not change."""
        return digest(b"\0".join(self._names.tolist()), self.labels, self.classes)


class ArraySource:
    """Images in memory; `load` gives pixels (H, W, 3) uint8."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        classes: tuple[str, ...],
        prefix: str = "image",
    ) -> None:
        """images: (N, H, W, 3) uint8; labels: (N,) integers that index `classes`, or None."""
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
        return f"{self.prefix} {index}"

    def load(self, index: int) -> np.ndarray:
        return self.images[index]

    def fingerprint(self) -> str:
        """Hash of pixels and labels."""
        shape = repr(self.images.shape).encode()
        return digest(
            shape + np.ascontiguousarray(self.images).tobytes(), self.labels, self.classes
        )


def find_images(folder: str | Path) -> list[str]:
    """Names, relative to `folder` and sorted, of every image below it.

    An image is a file whose extension, in any case, is one of EXTENSIONS. Hidden files and folders are
    skipped, symbolic links followed (a link back to a folder above it only once). Nothing is decoded here.
    Raises FileNotFoundError, NotADirectoryError, or ValueError where there is no image.
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


class Datasets(NamedTuple):
    """What is trained on, what kNN and linear evaluation look at, and a line for the log that says how."""

    train: Source
    val: Source | None  # None where there are no labels, or none were held out
    note: str


def load_datasets(data: DataConfig, seed: int = 0) -> Datasets:
    """The images that `data` names, split for training and evaluation.

    folder: `path`/train, with `path`/val (or test) for evaluation, where train/ is the only folder or one of those
    two lies beside it; otherwise all of `path`. Without such a val/, a seeded, stratified share `data.holdout` is
    held out. Images are labelled when all of them lie in subfolders, two or more: the first folder below the
    root (of the split) is the class. An image directly in the root, or a single subfolder, means no labels.
    shards: tar files (`mocofast.data.shards`): a folder of them, which may have such a train/ and val/, a pattern,
    or URLs; labels are those in the shards.
    digits: 1,797 grey images of 8 x 8 pixels from scikit-learn; the same stratified 20% held out at any seed.
    cifar10, cifar100: torchvision's, kept in `path` and downloaded only if absent; the test set is held out.
    Under several processes let one call this first, so that only it downloads.

    Errors name the option; nothing is decoded, so bad files are found (and skipped) only by loaders.
    """
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout must be in [0, 1), got {data.holdout}")
    if data.source == "digits":
        return _digits()
    if data.source in ("folder", "shards", "cifar10", "cifar100") and not data.path:
        raise ConfigError(
            f"data.path must name a folder for data.source={data.source}, got an empty one"
        )
    if data.source == "shards":
        return _shards(data.path, data.holdout, seed, data.shuffle_window)
    if data.source == "folder":
        return _folder(Path(data.path).expanduser(), data.holdout, seed)
    if data.source in ("cifar10", "cifar100"):
        return _cifar(data.source, Path(data.path).expanduser())
    raise ConfigError(
        f"data.source must be folder, shards, digits, cifar10 or cifar100, got {data.source!r}"
    )


def _folder(root: Path, holdout: float, seed: int) -> Datasets:
    train_part, val_part = split_folders(root)
    names = find_images(root / train_part)
    classes, labels = classes_of(names)
    train = FolderSource(root, [train_part + name for name in names], labels, classes)
    if labels is None or not val_part:
        return _held_out(train, holdout, seed)
    val_names = find_images(root / val_part)
    val_classes, val_labels = classes_of(val_names)
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        raise ConfigError(
            f"data.path: {val_part} has classes that {train_part} lacks: {', '.join(unknown[:5])}"
        )
    if val_labels is None:
        return _held_out(train, holdout, seed, f" ({val_part} has no class folders)")
    labels = np.searchsorted(classes, val_classes)[val_labels]  # as train/ numbers them
    val = FolderSource(root, [val_part + name for name in val_names], labels, classes)
    return Datasets(train, val, f"{_summary(train)}; kNN on {val_part}, {len(val)}")


def _shards(path: str, holdout: float, seed: int, window: int) -> Datasets:
    root = Path(path).expanduser()
    train_part, val_part = ("", "") if is_url(path) else split_folders(root)
    train = open_shards(find_shards(path, train_part), window)
    if train.labels is None or not val_part:
        return _held_out(train, holdout, seed)
    val = open_shards(find_shards(path, val_part), classes=train.classes)
    if val.labels is None:
        return _held_out(train, holdout, seed, f" ({val_part} has no labels)")
    return Datasets(train, val, f"{_summary(train)}; kNN on {val_part}, {len(val)}")


def _summary(source: Source) -> str:
    return f"{len(source)} images of {len(source.classes)} classes"


def _held_out(
    source: FolderSource | ShardSource, holdout: float, seed: int, remark: str = ""
) -> Datasets:
    if source.labels is None:
        return Datasets(source, None, f"{len(source)} images without labels: no kNN")
    kept, held = stratified_split(source.labels, holdout, seed)
    summary = _summary(source) + remark
    if not len(held):
        return Datasets(source, None, f"{summary}, none held out: no kNN")
    note = f"{summary}; kNN on {len(held)} of them, held out"
    return Datasets(source.subset(kept), source.subset(held), note)


def _digits() -> Datasets:
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0..16 -> 0..255
    images = np.repeat(gray[..., None], 3, axis=3)
    classes = tuple(str(name) for name in digits.target_names)
    kept, held = stratified_split(digits.target, DIGITS_HOLDOUT, seed=0)
    train = ArraySource(images[kept], digits.target[kept], classes, "digits train")
    val = ArraySource(images[held], digits.target[held], classes, "digits val")
    return Datasets(train, val, f"{len(train)} digits of 8 x 8 pixels; kNN on {len(val)} held out")


def _cifar(kind: str, root: Path) -> Datasets:
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    parts: list[Any] = []
    try:
        for is_train in (True, False):
            try:
                parts.append(dataset(root, train=is_train))
            except RuntimeError:  # torchvision's way to say that it is not there
                parts.append(dataset(root, train=is_train, download=True))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data.path: {kind} is not in {str(root)!r} and could not be downloaded ({error}); "
            f"put {dataset.url} there, unpacked to {dataset.base_folder}/"
        ) from error
    train, val = (
        ArraySource(part.data, np.array(part.targets), tuple(part.classes), f"{kind} {name}")
        for part, name in zip(parts, ("train", "test"))
    )
    return Datasets(train, val, f"{kind}: {len(train)} images; kNN on its test set, {len(val)}")


class Subset:
    """Some samples of a source, as a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def load(self, index: int) -> str | bytes | np.ndarray:
        return self.source.load(int(self.indices[index]))

    def fingerprint(self) -> str:
        return self.source.fingerprint()
