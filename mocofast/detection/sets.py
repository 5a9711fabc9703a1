"""Annotated images: boxes, masks of objects, and classes of pixels. Finds the layout of a folder.

Boxes are x0, y0, x1, y1 in pixels of the file, x1 and y1 exclusive. Classes are numbered from 1 in
the order of `AnnotatedSet.classes`. 0 is the background, and 255 marks pixels that do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import ConfigError
from mocofast.data.decoding import decode
from mocofast.detection.options import SetOptions
from mocofast.settings import nearest

IGNORED = 255


class Target(NamedTuple):
    """The objects of an image.

    boxes: (n, 4) float32. labels: (n,) int64, from 1. areas: (n,) float64, square pixels.
    ignored: (n,) bool: crowds and difficult objects, which evaluation leaves out.
    trained: (n,) bool: objects that training shows.
    masks: (n, H, W) bool, or n run-length encodings of pycocotools. None: not asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    trained: np.ndarray
    masks: Any = None


class Item(NamedTuple):
    """An image with its annotations.

    target: its boxes. masks: returns the objects with masks, read from files.
    pixels: returns the class of every pixel, (H, W) uint8.
    """

    image: Path
    target: Target
    masks: Callable[[], Target]
    pixels: Callable[[], np.ndarray]


@dataclass
class AnnotatedSet:
    """Images with annotations, in a fixed order.

    remarks: lines about entries that were left out.
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


class Sets(NamedTuple):
    """The images to train on, and to evaluate on."""

    train: AnnotatedSet
    val: AnnotatedSet


def load_sets(data: SetOptions, kind: str) -> Sets:
    """Reads the annotations of a folder.

    kind: boxes, masks (of objects) or pixels (a class for every pixel).
    Raises ConfigError for a folder without such annotations, and for files that cannot be read.
    """
    from mocofast.detection import coco, voc

    if not data.path:
        raise ConfigError("data.path: expected the folder of a set, got nothing (--data.path DIR)")
    path = Path(data.path)
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is no folder")
    layouts: dict[str, Any] = {"voc": voc, "coco": coco}
    for name, layout in layouts.items():
        if data.layout in ("auto", name) and (known := layout.find(path, kind)):
            names = [
                _chosen("data.train", data.train, known, ("trainval", "train")),
                _chosen("data.val", data.val, known, ("test", "val", "valid")),
            ]
            if not data.val and names[0][0].endswith("train"):
                names[1] = _chosen("data.val", (), known, ("val", "valid", "test"))
            train, val = layout.load([[known[n] for n in part] for part in names], data, kind)
            return Sets(train, val)
    expected = "ImageSets/Main/*.txt and Annotations/*.xml (Pascal VOC)"
    if kind != "boxes":
        expected = "ImageSets/Segmentation/*.txt and SegmentationClass/*.png (Pascal VOC)"
    raise ConfigError(f"data.path: {path} has neither {expected} nor annotations/*.json (COCO)")


def _chosen(
    option: str, given: Sequence[str], known: dict[str, Any], usual: Sequence[str]
) -> list[str]:
    """Returns the names of sets. given: by the user. usual: names to look for, the first wins."""
    listed = ", ".join(sorted(known)[:12])
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{option}: no set {name!r}{nearest(name, known)} (there are: {listed})"
            )
    if given:
        return list(given)
    if option == "data.train" and not any(_is(name, "test") for name in known):
        usual = usual[1:]  # trainval beside no test would hold the images of val
    for word in usual:
        found = [name for name in known if _is(name, word)]
        if len(found) == 1:
            return found
        if found:
            raise ConfigError(f"{option}: expected names of sets; there are several: {listed}")
    raise ConfigError(f"{option}: expected names of sets (there are: {listed})")


def _is(name: str, word: str) -> bool:
    """Returns whether a set is called by `word`, such as val2017, VOC2007/val or val for "val"."""
    return name.rpartition("/")[2].rstrip("0123456789").rstrip("_-") == word


def read_image(path: Path, channels: int) -> np.ndarray:
    """Returns pixels (H, W, channels) uint8, as pretraining decodes the file.

    Raises nearly any exception for a bad file, as PIL does.
    """
    image = decode(str(path))
    return np.array(image if channels == 3 else image.convert("L")).reshape(
        image.height, image.width, channels
    )


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Returns the boxes (n, 4) float32 of masks (n, H, W) bool, none of them empty."""
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
