"""Extensions and labels of images, a held-out share, and the hash of a set of images."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Self

# Formats that both PIL and DALI decode (all were tried). DALI decodes neither GIF nor AVIF.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"}
)

AT_A_TIME = 100_000  # names that are Python's objects at the same time
ARRAYS = frozenset({".npy"})
# Files of fields beside photography. They are images where a set has no image of EXTENSIONS.
FIELDS = frozenset(
    {".npy", ".npz", ".dcm", ".dicom", ".nii", ".nii.gz", ".heic", ".heif", ".avif"}
    | {".svs", ".ndpi", ".scn", ".bif"}
)

# Extensions with two dots. mocofast's indices of shards are no images.
DOUBLE = {".gz": ".nii", ".npz": ".index"}


class _Every(frozenset[str]):
    """Contains every extension."""

    def __contains__(self, extension: object) -> bool:
        return True


EVERY = _Every()  # for functions of the user, which may read any file


def extension_of(name: str) -> str:
    """Returns the extension of a name, in lower case, with a dot. "" for none."""
    dot = name.rfind(".", name.rfind("/") + 1)
    if dot < 0:
        return ""
    extension = name[dot:].lower()
    if extension in DOUBLE and name[:dot].lower().endswith(first := DOUBLE[extension]):
        return first + extension
    return extension


def extensions_to_try(
    reader: str, channels: int, include: Sequence[str] = ()
) -> tuple[frozenset[str], ...]:
    """Returns sets of extensions. A set of images has the first extensions that occur.

    reader, channels, include: values of data.reader, data.channels and data.include.

    A function of the user may read any file. Extensions of FIELDS that `include` names are those
    of images.
    """
    if reader != "auto":
        return (EVERY,)
    named = {end for end in FIELDS if any(text.lower().endswith(end) for text in include)}
    if named:
        return (EXTENSIONS | named,)
    if channels != 3:
        return (EXTENSIONS | ARRAYS, FIELDS)
    return (EXTENSIONS, ARRAYS, FIELDS)


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
    by_class = np.argsort(_shortest(labels), kind="stable")
    bounds = np.flatnonzero(np.diff(labels[by_class])) + 1
    for begin, end in zip([0, *bounds], [*bounds, len(labels)]):
        members = rng.permutation(by_class[begin:end])
        count = min(max(round(share * len(members)), int(share > 0)), len(members) - 1)
        is_held_out[members[:count]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _shortest(labels: np.ndarray) -> np.ndarray:
    """Returns integers in the same order, of 16 bits where possible: NumPy sorts these by digits,
    a million in .01 s instead of .07.
    """
    if not len(labels) or labels.max() - labels.min() >= 2**16:
        return labels
    return (labels - labels.min()).astype(np.uint16)


def checked_labels(
    labels: np.ndarray | None, count: int, classes: tuple[str, ...]
) -> np.ndarray | None:
    """Returns labels as (count,) int64, or None if `labels` is None. -1 is for unlabelled images.

    Raises ValueError if the labels do not fit the images or the classes.
    """
    if labels is None:
        return None
    labels = np.asarray(labels, dtype=np.int64)
    if labels.shape != (count,):
        raise ValueError(f"labels must be ({count},), one per image, got {labels.shape}")
    if count and not -1 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"labels must index the {len(classes)} classes, got {labels.min()} to {labels.max()}"
        )
    return labels


def joined(names: np.ndarray) -> Iterator[bytes]:
    """Yields the parts of b"\\0".join(names), a few at a time. names: (N,) bytes."""
    for start in range(0, len(names), AT_A_TIME):
        yield (b"\0" if start else b"") + b"\0".join(names[start : start + AT_A_TIME].tolist())


def digest(
    content: bytes | Iterable[bytes | memoryview],
    labels: np.ndarray | None,
    classes: tuple[str, ...],
) -> str:
    """Returns a fingerprint of content, labels and class names: 32 hexadecimal digits.

    content: whole, or its parts.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for part in (content,) if isinstance(content, bytes) else content:
        hashed.update(part)
    hashed.update(b"" if labels is None else np.ascontiguousarray(labels).data)
    hashed.update("\0".join(classes).encode(errors="surrogateescape"))
    return hashed.hexdigest()


def encoded(names: Sequence[str] | np.ndarray) -> np.ndarray:
    """Returns paths as an array of bytes, (N,). names: N paths, or such an array."""
    if isinstance(names, np.ndarray):
        return names
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


class NamedImages:
    """Names, labels and classes of image files: what sources of files share."""

    def __init__(
        self,
        names: Sequence[str] | np.ndarray,
        labels: np.ndarray | None,
        classes: tuple[str, ...],
    ) -> None:
        """names: N paths, or an array of bytes (N,). labels: (N,) integers that index `classes`, or
        None.
        """
        # One array of bytes instead of N Python strings. Reading a string writes its
        # reference count, so every forked worker would end up with a copy of a list of
        # millions.
        self._names = encoded(names)
        self.labels = checked_labels(labels, len(names), classes)
        self.classes = classes
        self.captions: np.ndarray | None = None  # (N,) str, objects

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Returns the path of an image, relative to the folder or archive."""
        return os.fsdecode(self._names[index])

    def caption(self, index: int) -> str:
        """Returns the caption of an image, of a source with captions."""
        assert self.captions is not None
        text: str = self.captions[index]
        return text

    @property
    def has_caption(self) -> np.ndarray | None:
        """Tells which images have a caption, (N,) bool. None: a source without captions."""
        return None if self.captions is None else self.captions != ""

    def fingerprint(self) -> str:
        """Returns a hash of names, labels and captions, not of the place of the folder."""
        content = b"\0".join(self._names.tolist())
        if self.captions is not None:
            content += "\0".join(["", *self.captions]).encode(errors="surrogateescape")
        return digest(content, self.labels, self.classes)

    def subset(self, index: np.ndarray) -> Self:
        """Returns a source of some images. index: (n,) int64."""
        part = copy.copy(self)
        part._names = self._names[index]
        part.labels = None if self.labels is None else self.labels[index]
        part.captions = None if self.captions is None else self.captions[index]
        return part
