"""Folders of images, and what to do with a file or a folder that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import TypeVar

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data.finding import Disk, Found, Patterns, Seen, Tree
from mocofast.data.names import EXTENSIONS, NamedImages, extensions_to_try

TreeT = TypeVar("TreeT", bound=Tree)

# What to do with a file that is named as data.path, by the end of its name.
CONTAINERS = {
    ".tar.gz": "; gunzip unpacks it to .tar, for --data.source shards",
    ".tgz": "; gunzip unpacks it to .tar, for --data.source shards",
    ".tar": "; --data.source shards reads .tar",
    ".zip": "; --data.source zip reads .zip",
    ".csv": "; --data.source list reads .csv",
    ".tsv": "; --data.source list reads .tsv",
    ".parquet": "; --data.source list reads .parquet with paths, and parquet with images",
    ".h5": "; write the images of HDF5 files as PNG or TIFF, for example with h5py and PIL",
    ".hdf5": "; write the images of HDF5 files as PNG or TIFF, for example with h5py and PIL",
    ".npz": "; write the images of .npz files as PNG or TIFF, for example with numpy and PIL",
    ".npy": "; write the images of .npy files as PNG or TIFF, for example with numpy and PIL",
    ".7z": "; unpack it to a folder",
    ".rar": "; unpack it to a folder",
}


class FolderSource(NamedImages):
    """Image files below one folder. `load` returns a path."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str] | np.ndarray,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        """Takes the names of the files. Opens no file.

        root: the folder.
        names: N paths relative to `root`, or an array of bytes (N,).
        labels: (N,) integers that index `classes`, or None.
        """
        super().__init__(names, labels, classes)
        self.root = str(root)

    def load(self, index: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.root, self.name(index))

    def paths(self) -> Iterator[str]:
        """Yields the paths of all files on a disk."""
        return map(self.load, range(len(self)))


def open_folder(
    folder: str | Path, extensions: Set[str] = EXTENSIONS, seen: Seen | None = None
) -> Disk:
    """Returns a folder of images. extensions: of images, in lower case. seen: as for `Disk`.

    Raises FileNotFoundError, NotADirectoryError, or ConfigError for a folder that cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"data.path: there is no folder {str(folder)!r}")
    if not folder.is_dir():
        suffixes = "".join(folder.suffixes[-2:]).lower()
        way = next((way for end, way in CONTAINERS.items() if suffixes.endswith(end)), "")
        raise NotADirectoryError(
            f"data.path must be a folder of images: {str(folder)!r} is a file{way}"
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(f"data.path: {str(folder)!r} cannot be read (permission denied)")
    return Disk(folder, extensions, seen)


def choose_tree(make: Callable[[frozenset[str]], TreeT], data: DataConfig) -> TreeT:
    """Returns the tree of images of the first extensions that occur.

    make: returns the tree of images with some extensions.
    data: `reader`, `channels`, `include` and `exclude` are used.
    """
    first, *more = extensions_to_try(data.reader, data.channels, data.include)
    tree = make(first)
    if not more:
        return tree
    patterns = Patterns(data.include, data.exclude)
    if tree.holds_image(patterns):
        return tree
    for extensions in more:
        other = make(extensions)
        if other.holds_image(patterns):
            return other
    return tree


def no_image(folder: str, found: Found) -> ConfigError:
    """Returns the error for a folder without an image. found: the files of the folder."""
    kinds = " ".join(sorted(EXTENSIONS))
    tars = "; its *.tar are for data.source=shards" if found.kinds[".tar"] else ""
    tables = "; its tables are for data.source=parquet"
    tars += tables if found.kinds[".parquet"] or found.kinds[".arrow"] else ""
    lines = "".join(f"; {line}" for line in (found.left_out(), *found.warnings()) if line)
    return ConfigError(
        f"data.path: no image below {folder!r} (extensions looked for: {kinds}){tars}{lines}"
    )
