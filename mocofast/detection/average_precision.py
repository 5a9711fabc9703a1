"""Average precision of detections: COCO's through pycocotools, and Pascal VOC 2007's.

COCO's AP is the mean over IoU thresholds .50, .55, ..., .95 and over classes. VOC 2007's takes the
precision at 11 recalls. Papers on VOC07+12 quote AP, AP50 and AP75. detectron2,
and with it MoCo's table, computes all three with the 11 recalls.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import ConfigError
from mocofast.detection.sets import Target

THRESHOLDS = np.linspace(0.5, 0.95, 10)


class Detections(NamedTuple):
    """What a detector finds in an image.

    boxes: (n, 4) float32, pixels. scores: (n,) float32. labels: (n,) int64, from 1.
    masks: run-length encodings of pycocotools, or None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None


def require_pycocotools() -> None:
    """Raises ConfigError if pycocotools is not installed."""
    try:
        import pycocotools.cocoeval
    except ImportError:
        raise ConfigError(
            "detect: pycocotools is not installed; pip install 'mocofast[detect]'"
        ) from None
    del pycocotools


def encode(mask: np.ndarray | dict[str, Any]) -> dict[str, Any]:
    """Returns the run-length encoding of a mask (H, W) bool. Leaves an encoding alone."""
    if isinstance(mask, dict):
        return mask
    from pycocotools import mask as coding

    found: dict[str, Any] = coding.encode(np.asfortranarray(mask, np.uint8))
    return found


def coco_ap(
    classes: Sequence[str],
    targets: Sequence[Target],
    found: Sequence[Detections],
    masks: bool = False,
) -> dict[str, float]:
    """Returns ap, ap50 and ap75 of all classes, and ap_CLASS and ap50_CLASS, 0 to 1.

    targets, found: of every image. Ignored objects are crowds of pycocotools: detections of these
        count neither as right nor as wrong.
    masks: compare masks instead of boxes. The names then begin with mask_.
    A class without objects has no AP, and does not count in the means. Without any object all
    means are 0.
    """
    from pycocotools.cocoeval import COCOeval

    truth, results = _index(classes, targets), _index(classes, found)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, results, "segm" if masks else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes), of objects of all areas and the 100 best detections an image
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    prefix = "mask_" if masks else ""
    values = {
        f"{prefix}ap": _mean(precision),
        f"{prefix}ap50": _mean(precision[0]),
        f"{prefix}ap75": _mean(precision[5]),
    }
    for number, name in enumerate(classes):
        if (precision[:, :, number] > -1).any():
            values[f"{prefix}ap_{name}"] = _mean(precision[:, :, number])
            values[f"{prefix}ap50_{name}"] = _mean(precision[0, :, number])
    return values


def _mean(precision: np.ndarray) -> float:
    """Returns the mean of the precisions. pycocotools writes -1 for a missing precision."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else 0.0


def _index(classes: Sequence[str], images: Sequence[Target | Detections]) -> Any:
    """Returns objects or detections as an index of pycocotools."""
    from pycocotools import mask as coding
    from pycocotools.coco import COCO

    entries: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        corners = image.boxes.astype(np.float64)
        sides = corners[:, 2:] - corners[:, :2]
        for i, label in enumerate(image.labels.tolist()):
            entry: dict[str, Any] = {
                "id": len(entries) + 1,  # pycocotools takes 0 for "no match"
                "image_id": number,
                "category_id": label,
                "bbox": [*corners[i, :2].tolist(), *sides[i].tolist()],
                "iscrowd": 0,
            }
            if isinstance(image, Target):
                entry |= {"iscrowd": int(image.ignored[i]), "area": float(image.areas[i])}
                if image.masks is not None:
                    entry["segmentation"] = encode(image.masks[i])
            else:
                entry |= {"score": float(image.scores[i]), "area": float(np.prod(sides[i]))}
                if image.masks is not None:
                    entry["segmentation"] = image.masks[i]
                    entry["area"] = float(coding.area(image.masks[i]))
            entries.append(entry)
    index = COCO()
    index.dataset = {
        # pycocotools asks for the size, and does not use it for run-length encodings.
        "images": [{"id": i, "height": 0, "width": 0} for i in range(len(images))],
        "annotations": entries,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def voc07_ap(
    classes: Sequence[str], targets: Sequence[Target], found: Sequence[Detections]
) -> dict[str, float]:
    """Returns voc07_ap (mean over the thresholds), voc07_ap50 and voc07_ap75 of boxes, 0 to 1.

    A detection belongs to the object of the same class with the largest IoU, and is right if the
    IoU reaches the threshold, and no detection of a higher score took the object (VOC's devkit,
    VOCevaldet.m). Ignored objects count neither way. Means are over the classes with objects.
    """
    values = []
    for label in range(1, len(classes) + 1):
        count = sum(int(((t.labels == label) & ~t.ignored).sum()) for t in targets)
        if count:
            matches = _matches(label, targets, found)
            values.append([_ap_11(*matches, count, limit) for limit in THRESHOLDS])
    ap = np.array(values).reshape(-1, len(THRESHOLDS)).mean(0) if values else np.zeros(10)
    return {
        "voc07_ap": float(ap.mean()),
        "voc07_ap50": float(ap[0]),
        "voc07_ap75": float(ap[5]),
    }


def _matches(
    label: int, targets: Sequence[Target], found: Sequence[Detections]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the largest IoU, the number of the object (over all images), and whether ignored.

    (n,) each, of all detections of a class, the highest score first.
    """
    rows: list[tuple[float, float, int, bool]] = []
    first = 0
    for target, detections in zip(targets, found):
        mine, other = target.labels == label, detections.labels == label
        iou = box_iou(detections.boxes[other], target.boxes[mine])  # (detections, objects)
        ignored = target.ignored[mine]
        for score, overlaps in zip(detections.scores[other].tolist(), iou):
            at = int(overlaps.argmax()) if len(overlaps) else 0
            best = float(overlaps[at]) if len(overlaps) else 0.0
            rows.append((score, best, first + at, bool(len(overlaps) and ignored[at])))
        first += len(ignored)
    found_of_class = np.array(rows, np.float64).reshape(-1, 4)
    order = np.argsort(-found_of_class[:, 0], kind="stable")
    _, best, owner, ignored_too = found_of_class[order].T
    return best, owner.astype(np.int64), ignored_too.astype(bool)


def _ap_11(
    best: np.ndarray,
    owner: np.ndarray,
    ignored: np.ndarray,
    count: int,
    limit: float,
) -> float:
    """Returns the mean of the largest precision at recalls of at least 0, .1, ..., 1.

    count: number of objects of the class. limit: threshold of the IoU. The rest: of `_matches`.
    """
    hit = best >= limit
    counts = ~(hit & ignored)
    owners = np.where(hit & ~ignored, owner, -1 - np.arange(len(owner)))
    is_first = np.zeros(len(owner), bool)
    is_first[np.unique(owners, return_index=True)[1]] = True
    right = (hit & ~ignored & is_first)[counts]
    recall = right.cumsum() / count
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    levels = np.linspace(0, 1, 11)
    return float(np.mean([precision[recall >= r].max(initial=0) for r in levels]))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the IoU (n, m) float64 of boxes (n, 4) and (m, 4)."""
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    shared = sides[..., 0] * sides[..., 1]
    areas = [np.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (a, b)]
    union = areas[0] + areas[1] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
