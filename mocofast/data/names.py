"""Names of images: finds image files, classes and train and val folders, and identifies
a set of images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Set
from pathlib import Path

import numpy as np

# Formats that both PIL and DALI decode (all were tried). DALI decodes neither GIF nor AVIF.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"}
)


def find_files(folder: str | Path, extensions: Set[str]) -> list[str]:
    """Returns the names of all files below `folder` with one of `extensions`, sorted.

    Names are relative to `folder`. Extensions match in any case. Hidden files and
    folders are skipped. Symbolic links are followed (a link back to a folder above it
    only once).
    """
    names: list[str] = []
    _scan(str(folder), "", frozenset(), extensions, names)
    names.sort()
    return names


def _scan(
    folder: str, prefix: str, above: frozenset[str], extensions: Set[str], names: list[str]
) -> None:
    real = os.path.realpath(folder)
    if real in above:
        return
    found, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_dir():
                folders.append(name)
            # A name without a dot gives its last letter, which is no extension.
            elif name[name.rfind(".") :].lower() in extensions:
                found.append(prefix + name)
    # Sorted runs: the sort of all names then only merges runs, a third of the time for a million.
    found.sort()
    names += found
    for name in sorted(folders):
        _scan(os.path.join(folder, name), f"{prefix}{name}/", above | {real}, extensions, names)


def train_and_val_folders(root: Path) -> tuple[str, str]:
    """Returns the prefixes of training and evaluation images, for example ("train/", "val/").

    The first is "" for images directly below `root`, the second "" if there is no val/
    or test/.
    """
    if not root.is_dir():
        return "", ""
    with os.scandir(root) as entries:
        folders = {
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        }
    val = next((f"{name}/" for name in ("val", "test") if name in folders), "")
    # Beside other folders, a folder named train may be a class (of vehicles).
    return ("train/", val) if "train" in folders and (val or len(folders) == 1) else ("", "")


def classes_of(names: list[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns the class names, sorted, and labels (N,) int64, from the first folder of
    every name.

    Returns ((), None) if a name has no folder, or if there are fewer than two folders.
    """
    first = [name.split("/", 1)[0] for name in names if "/" in name]
    classes = tuple(sorted(set(first)))
    if len(first) < len(names) or len(classes) < 2:
        return (), None
    label = {name: i for i, name in enumerate(classes)}
    return classes, np.array([label[name] for name in first], dtype=np.int64)


def stratified_holdout(
    labels: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices (kept, held out). Holds out the same share of every class,
    rounded.

    labels: (N,) integers.
    share: from 0 to 1.
    seed: seed of the random choice.

    At least one image of every class is kept. If the share is positive, at least one
    image of every class with two or more images is held out.
    """
    rng = np.random.default_rng(seed)
    is_held_out = np.zeros(len(labels), dtype=bool)
    # The images of a class are consecutive in `by_class`, and ascending.
    by_class = np.argsort(labels, kind="stable")
    bounds = np.flatnonzero(np.diff(labels[by_class])) + 1
    for begin, end in zip([0, *bounds], [*bounds, len(labels)]):
        members = rng.permutation(by_class[begin:end])
        count = min(max(round(share * len(members)), int(share > 0)), len(members) - 1)
        is_held_out[members[:count]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def checked_labels(
    labels: np.ndarray | None, count: int, classes: tuple[str, ...]
) -> np.ndarray | None:
    """Returns labels as (count,) int64, or None if `labels` is None.

    Raises ValueError if the labels do not fit the images or the classes.
    """
    if labels is None:
        return None
    labels = np.asarray(labels, dtype=np.int64)
    if labels.shape != (count,):
        raise ValueError(f"labels must be ({count},), one per image, got {labels.shape}")
    if count and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"labels must index the {len(classes)} classes, got {labels.min()} to {labels.max()}"
        )
    return labels


def digest(content: bytes, labels: np.ndarray | None, classes: tuple[str, ...]) -> str:
    """Returns a fingerprint of content, labels and class names: 32 hexadecimal digits."""
    hashed = hashlib.blake2b(content, digest_size=16)
    hashed.update(b"" if labels is None else labels.tobytes())
    hashed.update("\0".join(classes).encode(errors="surrogateescape"))
    return hashed.hexdigest()
