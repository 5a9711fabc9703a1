"""Names of images: which files are images, the classes and splits that folders tell, and what identifies a set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Set
from pathlib import Path

import numpy as np

# Formats that PIL and DALI both decode (each was tried). GIF and AVIF are left out: DALI reads neither.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"}
)


def find_files(folder: str | Path, extensions: Set[str]) -> list[str]:
    """Names, relative to `folder` and sorted, of every file below it with one of these extensions, in any case.

    Hidden files and folders are skipped, symbolic links followed (a link back to a folder above it only once).
    """
    names: list[str] = []
    _scan(str(folder), "", frozenset(), extensions, names)
    return sorted(names)


def _scan(
    folder: str, prefix: str, above: frozenset[str], extensions: Set[str], names: list[str]
) -> None:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                _scan(entry.path, f"{prefix}{entry.name}/", above | {real}, extensions, names)
            elif os.path.splitext(entry.name)[1].lower() in extensions:
                names.append(prefix + entry.name)


def split_folders(root: Path) -> tuple[str, str]:
    """Prefixes of the training and the evaluation images, such as ("train/", "val/"); "" for the root or for none."""
    if not root.is_dir():
        return "", ""
    folders = {
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    }
    val = next((f"{name}/" for name in ("val", "test") if name in folders), "")
    # A folder called train beside others may as well be a class (of vehicles).
    return ("train/", val) if "train" in folders and (val or len(folders) == 1) else ("", "")


def classes_of(names: list[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names, sorted, and labels (N,) from the first folder of each name; ((), None) without a class level."""
    first = [name.split("/", 1)[0] for name in names if "/" in name]
    classes = tuple(sorted(set(first)))
    if len(first) < len(names) or len(classes) < 2:
        return (), None
    label = {name: i for i, name in enumerate(classes)}
    return classes, np.array([label[name] for name in first], dtype=np.int64)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, held out): the same share of every class, rounded, drawn from `seed`.

    A class is never held out whole; one of two or more images gives at least one to a positive share.
    """
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(share * len(members)), int(share > 0)), len(members) - 1)
        held.append(members[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def checked_labels(
    labels: np.ndarray | None, count: int, classes: tuple[str, ...]
) -> np.ndarray | None:
    """labels as (count,) int64, or None; ValueError where they do not fit the images or the classes."""
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
    """A fingerprint: 32 hexadecimal digits."""
    digest = hashlib.blake2b(content, digest_size=16)
    digest.update(b"" if labels is None else labels.tobytes())
    digest.update("\0".join(classes).encode(errors="surrogateescape"))
    return digest.hexdigest()
