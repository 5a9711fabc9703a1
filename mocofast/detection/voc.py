"""Pascal VOC's layout: JPEGImages, Annotations, ImageSets, SegmentationClass, SegmentationObject.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from mocofast.config import ConfigError
from mocofast.detection.options import SetOptions
from mocofast.detection.sets import (
    IGNORED,
    AnnotatedSet,
    Item,
    Target,
    boxes_of,
    kept_boxes,
    unused_classes,
)
from mocofast.errors import describe_error

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Lists of VOC that tell which images show a class, such as dog_trainval.
_OF_A_CLASS = re.compile(rf"({'|'.join(CLASSES)})_(train|val|trainval|test)")


class _Box(NamedTuple):
    """An object of an XML file, as the file says."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


class _File(NamedTuple):
    """An XML file. size: (height, width) of the image, (0, 0) where the file does not say it."""

    boxes: list[_Box]
    size: tuple[int, int]


def find(path: Path, kind: str) -> dict[str, Path]:
    """Returns the lists of images of a folder, {name: file}, also of sub-folders (VOC2007/test)."""
    wanted = ("Main",) if kind == "boxes" else ("Segmentation", "Main")
    known = {}
    for root in (path, *sorted(entry for entry in path.iterdir() if entry.is_dir())):
        needed = "Annotations" if kind == "boxes" else "SegmentationClass"
        if not (root / needed).is_dir():
            continue
        lists = next((f for n in wanted if any((f := root / "ImageSets" / n).glob("*.txt"))), None)
        for file in sorted(lists.glob("*.txt")) if lists else ():
            if not _OF_A_CLASS.fullmatch(file.stem):
                known[file.stem if root == path else f"{root.name}/{file.stem}"] = file
    return known


def load(parts: list[list[Path]], data: SetOptions, kind: str) -> tuple[AnnotatedSet, AnnotatedSet]:
    """Reads the annotations of two sets (training, evaluation).

    parts: the lists of images of both sets. kind: boxes, masks or pixels.
    """
    listed = [[pair for file in files for pair in _ids(file)] for files in parts]
    if kind == "boxes":
        read = [[_read_xml(root, name) for root, name in part] for part in listed]
        names = sorted({box.name for part in read for found in part for box in found.boxes})
        classes = data.classes or tuple(names)
        sets = [_with_boxes(part, found, classes) for part, found in zip(listed, read)]
        sets[0].remarks += unused_classes(classes, names)
    else:
        classes = data.classes or _mask_classes([pair for part in listed for pair in part])
        sets = [
            AnnotatedSet([_with_masks(root, name, classes) for root, name in part], classes)
            for part in listed
        ]
    return sets[0], sets[1]


def _ids(file: Path) -> list[tuple[Path, str]]:
    """Returns (folder, name) of the images in a list, without repetitions."""
    root = file.parent.parent.parent
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if any(" " in name or "\t" in name for name in names):
        # Names with spaces, or lists of a class with a second column: -1 for an image that does
        # not show the class.
        there = {image.stem for image in (root / "JPEGImages").glob("*")}
        names = [name if name in there else name.split()[0] for name in names]
    if not names:
        raise ConfigError(f"{file}: a list without names of images")
    return [(root, name) for name in dict.fromkeys(names)]


def _image(root: Path, name: str) -> Path:
    path = root / "JPEGImages" / f"{name}.jpg"
    if path.is_file():
        return path
    found = sorted((root / "JPEGImages").glob(f"{_escaped(name)}.*"))
    if not found:
        raise ConfigError(f"{path}: there is no image of this name, which a list names")
    return found[0]


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _read_xml(root: Path, name: str) -> _File:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path)
        boxes = [
            _Box(
                (entry.findtext("name") or "").strip(),
                _corners(entry),
                (entry.findtext("difficult") or "0").strip() == "1",
            )
            for entry in tree.iter("object")
        ]
        height, width = (int(float(tree.findtext(f"size/{k}") or 0)) for k in ("height", "width"))
        return _File(boxes, (height, width))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file, for an image of a list") from None
    except (OSError, ElementTree.ParseError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not VOC's XML ({describe_error(error)})") from None


def _corners(entry: ElementTree.Element) -> tuple[float, float, float, float]:
    """Returns the box of an object. VOC counts pixels from 1, and includes the last pixel."""
    box = entry.find("bndbox")
    if box is None:
        raise ValueError("an object without bndbox")
    x0, y0, x1, y1 = (float(box.findtext(k) or "nan") for k in ("xmin", "ymin", "xmax", "ymax"))
    return x0 - 1, y0 - 1, x1, y1


def _with_boxes(
    pairs: Sequence[tuple[Path, str]],
    files: Sequence[_File],
    classes: Sequence[str],
) -> AnnotatedSet:
    from mocofast.data.decoding import image_size

    items, bad, other, resized = [], 0, 0, []
    for (root, name), file in zip(pairs, files):
        image = _image(root, name)
        mine = [box for box in file.boxes if box.name in classes]
        other += len(file.boxes) - len(mine)
        try:
            height, width = image_size(str(image))
        except Exception as error:  # PIL raises nearly any exception
            raise ConfigError(f"{image}: not an image ({describe_error(error)})") from None
        if all(file.size) and file.size != (height, width):
            resized.append(f"{image} has {(height, width)} pixels, and its XML file {file.size}")
        corners = np.array([box.corners for box in mine], np.float32).reshape(-1, 4)
        corners, good = kept_boxes(corners, width, height)
        bad += int((~good).sum())
        difficult = np.array([box.difficult for box in mine], bool)[good]
        labels = np.array([classes.index(box.name) + 1 for box in mine], np.int64)[good]
        items.append(Item(image, _target(corners[good], labels, difficult), _no_masks, _no_masks))
    remarks = [f"left out {bad} boxes without an area inside their image"] if bad else []
    if resized:  # some tools write sizes that are wrong, beside boxes that are right
        remarks.append(
            f"{len(resized)} of {len(pairs)} images are not of the size that their annotations "
            f"say, and boxes may lie in other places: {resized[0]}"
        )
    if other:
        remarks.append(f"left out {other} objects of classes that data.classes does not name")
    return AnnotatedSet(items, tuple(classes), remarks)


def _no_masks() -> Any:
    raise ConfigError("data.path: VOC's boxes have no masks")


def _target(
    boxes: np.ndarray, labels: np.ndarray, difficult: np.ndarray, masks: np.ndarray | None = None
) -> Target:
    areas = np.prod(boxes[:, 2:].astype(np.float64) - boxes[:, :2], axis=1)
    if masks is not None:
        areas = masks.sum((1, 2)).astype(np.float64)
    # As in detectron2, training shows difficult objects, and evaluation leaves them out.
    return Target(boxes, labels, areas, difficult, np.ones(len(boxes), bool), masks)


def _mask_classes(pairs: Sequence[tuple[Path, str]]) -> tuple[str, ...]:
    """Returns VOC's classes if the set shows all, else the numbers in the masks as names."""
    largest = 0
    for root, name in pairs:
        numbers = _read_mask(root / "SegmentationClass" / f"{name}.png")
        largest = max(largest, int(numbers[numbers != IGNORED].max(initial=0)))
    if not largest:
        raise ConfigError("data.path: the masks of SegmentationClass show no class")
    return CLASSES if largest == len(CLASSES) else tuple(map(str, range(1, largest + 1)))


def _with_masks(root: Path, name: str, classes: Sequence[str]) -> Item:
    masks = partial(_read_objects, root, name, classes)
    pixels = partial(_read_classes, root, name, classes)
    empty = _target(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    return Item(_image(root, name), empty, masks, pixels)


def _read_mask(path: Path) -> np.ndarray:
    """Returns the numbers of a mask, (H, W) uint8."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("P", "L", "1"):
                raise ConfigError(
                    f"{path}: expected a mask of one channel of 8 bits (numbers of classes), got "
                    f"PIL's mode {image.mode}"
                )
            return np.array(image, np.uint8)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such mask, for an image of a list") from None
    except ConfigError:
        raise
    except Exception as error:  # PIL raises nearly any exception
        raise ConfigError(f"{path}: not a mask ({describe_error(error)})") from None


def _read_classes(root: Path, name: str, classes: Sequence[str]) -> np.ndarray:
    """Returns the class of every pixel, (H, W) uint8: 0 background, 255 border."""
    path = root / "SegmentationClass" / f"{name}.png"
    numbers = _read_mask(path)
    largest = int(numbers[numbers != IGNORED].max(initial=0))
    if largest > len(classes):
        raise ConfigError(
            f"{path}: class {largest}, and data.classes has {len(classes)}: {', '.join(classes)}"
        )
    return numbers


def _read_objects(root: Path, name: str, classes: Sequence[str]) -> Target:
    """Returns the objects of an image, numbered from 1 by SegmentationObject."""
    numbers = _read_classes(root, name, classes)
    path = root / "SegmentationObject" / f"{name}.png"
    objects = _read_mask(path)
    if objects.shape != numbers.shape:
        raise ConfigError(f"{path}: {objects.shape} pixels, and SegmentationClass {numbers.shape}")
    masks, labels = [], []
    for number in np.unique(objects[(objects != 0) & (objects != IGNORED)]):
        mask = objects == number
        found = np.bincount(numbers[mask], minlength=256)
        found[[0, IGNORED]] = 0
        if found.any():
            masks.append(mask)
            labels.append(int(found.argmax()))
    stacked = np.array(masks, bool).reshape(-1, *objects.shape)
    none_difficult = np.zeros(len(labels), bool)
    return _target(boxes_of(stacked), np.array(labels, np.int64), none_difficult, stacked)
