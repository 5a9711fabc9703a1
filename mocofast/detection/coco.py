"""COCO's layout: a JSON file of images, annotations and categories for every set.

https://cocodataset.org/#format-data. Folders of Roboflow (train/_annotations.coco.json) work, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mocofast.config import ConfigError
from mocofast.detection.options import SetOptions
from mocofast.detection.sets import (
    IGNORED,
    AnnotatedSet,
    Item,
    Target,
    kept_boxes,
    unused_classes,
)
from mocofast.errors import describe_error


def find(path: Path, kind: str) -> dict[str, Path]:
    """Returns the JSON files of a folder, {name: file}. instances_val2017.json is val2017."""
    known = {file.parent.name: file for file in sorted(path.glob("*/_annotations.coco.json"))}
    for folder in (path, path / "annotations"):
        files = sorted(folder.glob("*.json"))
        # Beside instances_*.json, COCO has captions_*.json and person_keypoints_*.json.
        instances = [file for file in files if file.stem.startswith("instances_")]
        for file in instances or files:
            known[file.stem.removeprefix("instances_")] = file
    return known


def load(parts: list[list[Path]], data: SetOptions, kind: str) -> tuple[AnnotatedSet, AnnotatedSet]:
    """Reads the annotations of two sets (training, evaluation).

    parts: the JSON files of both sets. kind: boxes, masks or pixels.
    """
    contents = {file: _read_json(file) for files in parts for file in files}
    named: dict[Any, str] = {}
    for file, content in contents.items():
        for category in content["categories"]:
            name = named.setdefault(category["id"], str(category["name"]))
            if name != str(category["name"]):
                raise ConfigError(f"{file}: category {category['id']} has another name elsewhere")
    used = {a["category_id"] for content in contents.values() for a in content["annotations"]}
    if unknown := used - named.keys():
        raise ConfigError(f"data.path: annotations of unknown categories: {sorted(unknown)[:5]}")
    classes = data.classes or tuple(named[number] for number in sorted(named) if number in used)
    labels = {number: classes.index(n) + 1 for number, n in named.items() if n in classes}
    if not labels:
        raise ConfigError(f"data.classes: no category of {', '.join(named.values())} is named")
    sets = []
    for files in parts:
        found = AnnotatedSet([], classes)
        for file in files:
            _add(found, file, contents[file], labels, Path(data.path))
        sets.append(found)
    sets[0].remarks += unused_classes(classes, [named[number] for number in used])
    return sets[0], sets[1]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for image in content["images"]:
            hash(image["id"]), str(image["file_name"]), int(image["height"]), int(image["width"])
        for category in content["categories"]:
            category["name"]
            if not isinstance(category["id"], int):
                raise ValueError(f"a category of the id {category['id']!r}")
        for annotation in content["annotations"]:
            hash(annotation["image_id"]), hash(annotation["category_id"])
            float(annotation.get("area") or 0)
            if np.array(annotation["bbox"], np.float64).shape != (4,):
                raise ValueError(f"a bbox of {annotation['bbox']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file}: not COCO's JSON ({describe_error(error)})") from None
    if not content["images"]:
        raise ConfigError(f"{file}: there are no images")
    found: dict[str, Any] = content
    return found


def _add(
    into: AnnotatedSet, file: Path, content: dict[str, Any], labels: dict[Any, int], path: Path
) -> None:
    """Adds the images of a JSON file, with the annotations whose category is among `labels`."""
    images = content["images"]
    folder = _folder(file, path, images[0]["file_name"])
    of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    bad = strays = 0
    for annotation in content["annotations"]:
        if annotation["category_id"] not in labels:
            continue
        if annotation["image_id"] in of_image:
            of_image[annotation["image_id"]].append(annotation)
        else:
            strays += 1
    for image in images:
        name, size = folder / image["file_name"], (int(image["height"]), int(image["width"]))
        if not name.is_file():
            raise ConfigError(f"{name}: there is no such image, which {file.name} names")
        found = of_image[image["id"]]
        target, good = _target(found, labels, size)
        kept = [annotation for annotation, is_good in zip(found, good) if is_good]
        bad += len(found) - len(kept)
        masks = partial(_with_masks, target, kept, size, name)
        pixels = partial(_pixels, target, kept, size, name)
        into.items.append(Item(name, target, masks, pixels, size))
    if bad:
        into.remarks.append(f"{file.name}: left out {bad} boxes without an area in their image")
    if strays:
        into.remarks.append(f"{file.name}: left out {strays} boxes of unknown images")


def _folder(file: Path, path: Path, first: str) -> Path:
    """Returns the folder of the images of a JSON file. first: name of an image."""
    name = file.stem.removeprefix("instances_")
    places = [file.parent, path / name, path / "images" / name, path / "images", path]
    for place in places:
        if (place / first).is_file():
            return place
    listed = ", ".join(map(str, dict.fromkeys(places)))
    raise ConfigError(f"{file}: the image {first} is in none of {listed}")


def _target(
    annotations: Sequence[dict[str, Any]], labels: dict[Any, int], size: tuple[int, int]
) -> tuple[Target, np.ndarray]:
    """Returns the objects of an image, and which annotations they are."""
    boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # width and height become the far corner
    boxes, good = kept_boxes(boxes, size[1], size[0])
    kept = [a for a, is_good in zip(annotations, good) if is_good]
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in kept], bool)
    sides = boxes[good][:, 2:].astype(np.float64) - boxes[good][:, :2]
    areas = [float(a.get("area") or w * h) for a, (w, h) in zip(kept, sides)]
    numbers = np.array([labels[a["category_id"]] for a in kept], np.int64)
    found = Target(boxes[good], numbers, np.array(areas, np.float64), crowd, ~crowd)
    return found, good


def _with_masks(
    target: Target, annotations: Sequence[dict[str, Any]], size: tuple[int, int], name: Path
) -> Target:
    masks = [_mask(annotation, size, name) for annotation in annotations]
    return target._replace(masks=np.array(masks, bool).reshape(-1, *size))


def _pixels(
    target: Target, annotations: Sequence[dict[str, Any]], size: tuple[int, int], name: Path
) -> np.ndarray:
    """Returns the class of every pixel. Small objects lie on large objects, crowds do not count."""
    found = np.zeros(size, np.uint8)
    for index in np.argsort(-target.areas, kind="stable"):
        mask = _mask(annotations[index], size, name)
        found[mask] = IGNORED if target.ignored[index] else target.labels[index]
    return found


def _mask(annotation: dict[str, Any], size: tuple[int, int], name: Path) -> np.ndarray:
    """Returns the mask (H, W) bool of an annotation: polygons, or a run-length encoding."""
    from pycocotools import mask as coding

    shape: Any = annotation.get("segmentation")
    try:
        if isinstance(shape, list):
            polygons = [p for p in shape if len(p) >= 6]
            if not polygons:
                return np.zeros(size, bool)
            coded = coding.merge(coding.frPyObjects(polygons, *size))
        elif isinstance(shape["counts"], list):
            coded = coding.frPyObjects(shape, *size)
        else:
            coded = shape
        mask = coding.decode(coded).astype(bool)
    except Exception as error:  # pycocotools checks nothing
        raise ConfigError(
            f"{name}: a segmentation that cannot be read ({describe_error(error)})"
        ) from None
    if mask.shape != size:
        raise ConfigError(f"{name}: a mask of {mask.shape} pixels, and an image of {size}")
    return mask
