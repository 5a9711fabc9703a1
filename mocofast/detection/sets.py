"""Annotated images: boxes, masks of objects, and classes of pixels.

Boxes are x0, y0, x1, y1 in pixels of the file, x1 and y1 exclusive. Classes are numbered from 1 in
the order of `AnnotatedSet.classes`. 0 is the background, and 255 marks pixels that do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast.data.decoding import decode
from mocofast.settings import nearest

IGNORED = 255


class Target(NamedTuple):
    """The objects of an image.

    boxes: (n, 4) float32. labels: (n,) int64, from 1. areas: (n,) float64, square pixels.
    ignored: (n,) bool: crowds and difficult objects, which evaluation leaves out.
    trained: (n,) bool: objects of training.
    masks: (n, H, W) bool, or n run-length encodings of pycocotools. None: not asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    trained: np.ndarray
    masks: Any = None


class Item(NamedTuple):
    """An image with annotations.

    target: the boxes. masks: returns the objects with masks, read from files.
    pixels: returns the class of every pixel, (H, W) uint8.
    size: height and width of the image that the annotations are of. None: not said.
    """

    image: Path
    target: Target
    masks: Callable[[], Target]
    pixels: Callable[[], np.ndarray]
    size: tuple[int, int] | None = None


@dataclass
class AnnotatedSet:
    """Images with annotations, in a fixed order.

    remarks: lines about left-out entries.
    """

    items: list[Item]
    classes: tuple[str, ...]
    remarks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """Returns the path of an image, for messages."""
        return str(self.items[index].image)

    def fingerprint(self) -> str:
        """Returns a hash of names, boxes and classes: a continued run needs the same images."""
        found = hashlib.sha256(repr(self.classes).encode())
        for item in self.items:
            found.update(item.image.name.encode())
            found.update(item.target.boxes.tobytes() + item.target.labels.tobytes())
        return found.hexdigest()[:16]


def unused_classes(classes: Sequence[str], known: Iterable[str]) -> list[str]:
    """Returns a remark for every class that no object has. known: the names in the files."""
    known = list(known)
    return [
        f"data.classes: no object has the class {name!r}{nearest(name, known)}"
        for name in classes
        if name not in known
    ]


def read_image(path: Path, channels: int) -> np.ndarray:
    """Returns pixels (H, W, channels) uint8, as pretraining decodes the file.

    Raises nearly any exception for a bad file, as PIL does.
    """
    image = decode(str(path))
    return np.array(image if channels == 3 else image.convert("L")).reshape(
        image.height, image.width, channels
    )


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Returns the boxes (n, 4) float32 of masks (n, H, W) bool. No mask is empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def kept_boxes(boxes: np.ndarray, width: float, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Cuts boxes (n, 4) at the edges of the image. Returns the boxes, and which have an area."""
    cut = boxes.clip(0, [width, height, width, height])
    with np.errstate(invalid="ignore"):
        good = np.isfinite(boxes).all(1) & (cut[:, 2:] - cut[:, :2] > 0.01).all(1)
    return cut, good
