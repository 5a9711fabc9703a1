"""AP equals pycocotools on its own files, and VOC's AP equals the definition, written as loops."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from mocofast.detection.average_precision import (
    THRESHOLDS,
    Detections,
    box_iou,
    coco_ap,
    encode,
    voc07_ap,
)
from mocofast.detection.layouts import load_sets
from mocofast.detection.options import DetectData
from mocofast.detection.sets import Target
from mocofast.detection.tasks import confusion, iou_figures
from tests import shapes

pytest.importorskip("pycocotools")


def guesses(target: Target, rng: np.random.Generator, side: float = 64) -> Detections:
    """Returns detections near the objects, and some far away. Scores have ties."""
    near = target.boxes + rng.normal(0, 2, target.boxes.shape)
    far = rng.uniform(0, side / 2, (3, 4))
    far[:, 2:] += side / 3
    boxes = np.concatenate([near, near + 1, far]).clip(0, side).astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = np.concatenate([target.labels, target.labels, rng.integers(1, 3, 3)])
    flipped = np.where(rng.random(len(labels)) < 0.2, 3 - labels, labels)
    scores = (rng.integers(1, 10, len(labels)) / 10).astype(np.float32)
    return Detections(boxes, scores, flipped)


def stats(file: Path, results: list[dict[str, Any]], kind: str, category: int = 0) -> np.ndarray:
    """Returns pycocotools' twelve figures of its own files. category: of all classes if 0."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        if category:
            evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("masks", [False, True])
def test_ap_equals_pycocotools_on_files(tmp_path: Path, masks: bool) -> None:
    path = shapes.write_coco(tmp_path, count=40)
    val = load_sets(DetectData(path=str(path)), "masks").val
    rng = np.random.default_rng(0)
    targets = [item.masks() for item in val.items]
    found = [guesses(target, rng) for target in targets]
    results = []
    for i, (item, detections) in enumerate(zip(val.items, found)):
        coded = []
        for box, score, label in zip(detections.boxes, detections.scores, detections.labels):
            x0, y0, x1, y1 = box.round().astype(int)
            mask = np.zeros((64, 64), bool)
            mask[y0:y1, x0:x1] = True
            coded.append(encode(mask))
            entry = {
                "image_id": 10 + int(item.image.stem),
                "category_id": {"disc": 7, "square": 3}[val.classes[label - 1]],
                "score": float(score),
            }
            size = np.array(box, np.float64)
            entry["bbox"] = [*size[:2], *(size[2:] - size[:2])]
            results.append(entry | ({"segmentation": coded[-1]} if masks else {}))
        found[i] = detections._replace(masks=coded)
    kind, prefix = ("segm", "mask_") if masks else ("bbox", "")
    file = path / "annotations" / "instances_val2017.json"
    expected = stats(file, results, kind)
    values = coco_ap(val.classes, targets, found, masks)
    got = [values[f"{prefix}{name}"] for name in ("ap", "ap50", "ap75")]
    assert 0.05 < expected[0] < 0.95
    np.testing.assert_allclose(got, expected[:3], atol=1e-6)
    for number, name in ((7, "disc"), (3, "square")):
        of_class = stats(file, results, kind, number)
        got = [values[f"{prefix}{key}_{name}"] for key in ("ap", "ap50")]
        np.testing.assert_allclose(got, of_class[:2], atol=1e-6)


def random_set(count: int) -> tuple[list[Target], list[Detections]]:
    """Returns images with objects of two classes, a fifth of them ignored, and detections."""
    rng = np.random.default_rng(3)
    targets = []
    for _ in range(count):
        n = int(rng.integers(0, 5))
        corners = rng.uniform(0, 40, (n, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 24, (n, 2))], 1)
        labels, ignored = rng.integers(1, 3, n), rng.random(n) < 0.2
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        targets.append(Target(boxes.astype(np.float32), labels, areas, ignored, ~ignored))
    return targets, [guesses(target, rng) for target in targets]


def by_definition(
    label: int, targets: list[Target], found: list[Detections], limit: float
) -> float:
    """VOC 2007's AP of a class, object by object (Everingham et al. 2010, sec. 4.2)."""
    rows = [
        (-float(score), image, number)
        for image, d in enumerate(found)
        for number, score in enumerate(d.scores)
        if d.labels[number] == label
    ]
    taken, right, wrong, points = set(), 0, 0, []
    objects = sum(
        bool(t.labels[i] == label and not t.ignored[i])
        for t in targets
        for i in range(len(t.labels))
    )
    for _, image, number in sorted(rows):
        x0, y0, x1, y1 = found[image].boxes[number].astype(float)
        best, owner = -1.0, -1
        for i, (a0, b0, a1, b1) in enumerate(targets[image].boxes.astype(float)):
            if targets[image].labels[i] != label:
                continue
            shared = max(0.0, min(x1, a1) - max(x0, a0)) * max(0.0, min(y1, b1) - max(y0, b0))
            union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared
            if shared / union > best:
                best, owner = shared / union, i
        if best >= limit and targets[image].ignored[owner]:
            continue
        if best >= limit and (image, owner) not in taken:
            taken.add((image, owner))
            right += 1
        else:
            wrong += 1
        points.append((right / objects, right / (right + wrong)))
    return (
        sum(max((p for r, p in points if r >= level / 10), default=0.0) for level in range(11)) / 11
    )


def test_voc07_ap_equals_the_definition() -> None:
    targets, found = random_set(25)
    values = voc07_ap(("disc", "square"), targets, found)
    table = np.array(
        [[by_definition(label, targets, found, t) for t in THRESHOLDS] for label in (1, 2)]
    )
    assert 0.1 < table[:, 0].mean() < 0.95
    np.testing.assert_allclose(values["voc07_ap50"], table[:, 0].mean(), atol=1e-12)
    np.testing.assert_allclose(values["voc07_ap75"], table[:, 5].mean(), atol=1e-12)
    np.testing.assert_allclose(values["voc07_ap"], table.mean(), atol=1e-12)


def test_perfect_and_empty_detections() -> None:
    targets, _ = random_set(10)
    targets = [t._replace(ignored=np.zeros(len(t.labels), bool)) for t in targets]
    perfect = [Detections(t.boxes, np.ones(len(t.labels), np.float32), t.labels) for t in targets]
    names = ("disc", "square", "never shown")
    values = coco_ap(names, targets, perfect) | voc07_ap(names, targets, perfect)
    assert {name: round(value, 9) for name, value in values.items()} == dict.fromkeys(values, 1.0)
    assert "ap_disc" in values and "ap_never shown" not in values
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    values = coco_ap(names, targets, [none] * 10) | voc07_ap(names, targets, [none] * 10)
    assert set(values.values()) == {0.0}


def test_iou_of_boxes() -> None:
    a, b = np.array([[0, 0, 4, 4], [1, 1, 1, 1]]), np.array([[2, 2, 6, 6], [0, 0, 4, 4]])
    np.testing.assert_allclose(box_iou(a, b), [[4 / 28, 1], [0, 0]])


def test_mean_iou_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (50, 40)).astype(np.uint8)
    found = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 4, truth.shape))
    truth[:5] = 255  # a border does not count
    values = iou_figures(confusion(truth, found.astype(np.uint8), 5), ("background", *"abcd"))
    counts = truth != 255
    expected = jaccard_score(truth[counts], found[counts], average=None)
    got = [values[f"iou_{name}"] for name in ("background", *"abc")]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(values["miou"], expected.mean(), atol=1e-12)
    np.testing.assert_allclose(values["pixel_accuracy"], (truth == found)[counts].mean())
    assert "iou_d" not in values  # neither shown nor found


def test_figures_are_plain_json() -> None:
    targets, found = random_set(5)
    values = coco_ap(("disc", "square"), targets, found) | voc07_ap(("a", "b"), targets, found)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
