"""Opens folders of images, and says what to do with a file or a folder that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

from mocofast.config import ConfigError
from mocofast.data.finding import Disk, Found
from mocofast.data.names import EXTENSIONS

# What to do with a file that is named as data.path, by the end of its name.
CONTAINERS = {
    ".tar.gz": "; gunzip unpacks it to .tar, for --data.source shards",
    ".tgz": "; gunzip unpacks it to .tar, for --data.source shards",
    ".tar": "; --data.source shards reads .tar",
    ".zip": "; --data.source zip reads .zip",
    ".csv": "; --data.source list reads .csv",
    ".tsv": "; --data.source list reads .tsv",
    ".parquet": "; --data.source list reads .parquet with a column of paths",
    ".h5": "; write the images of HDF5 files as PNG or TIFF, for example with h5py and PIL",
    ".hdf5": "; write the images of HDF5 files as PNG or TIFF, for example with h5py and PIL",
    ".npz": "; write the images of .npz files as PNG or TIFF, for example with numpy and PIL",
    ".npy": "; write the images of .npy files as PNG or TIFF, for example with numpy and PIL",
    ".7z": "; unpack it to a folder",
    ".rar": "; unpack it to a folder",
}


def open_folder(folder: str | Path, extensions: Set[str] = EXTENSIONS) -> Disk:
    """Returns a folder of images. extensions: of images, in lower case.

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
    return Disk(folder, extensions)


def no_image(folder: str, found: Found) -> ConfigError:
    """Returns the error for a folder without an image. found: the files of the folder."""
    kinds = " ".join(sorted(EXTENSIONS))
    tars = "; its *.tar are for data.source=shards" if found.kinds[".tar"] else ""
    lines = "".join(f"; {line}" for line in (found.left_out(), *found.warnings()) if line)
    return ConfigError(
        f"data.path: no image below {folder!r} (extensions looked for: {kinds}){tars}{lines}"
    )
