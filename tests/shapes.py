"""Small sets of coloured shapes with boxes and masks, in the layouts of Pascal VOC and COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("disc", "square")


def draw(
    rng: np.random.Generator, side: int = 64
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """Returns an image (S, S, 3), numbers of objects (S, S) from 1, and the objects.

    An object is (class, (x0, y0, x1, y1)), x1 and y1 exclusive. Objects do not overlap. Classes
    differ in shape and colour. The background is noise.
    """
    pixels = rng.integers(0, 60, (side, side, 3)).astype(np.uint8)
    numbers = np.zeros((side, side), np.uint8)
    objects = []
    rows, columns = np.mgrid[:side, :side]
    for _ in range(int(rng.integers(1, 4))):
        name, size = CLASSES[rng.integers(2)], int(rng.integers(14, 25))
        x, y = rng.integers(0, side - size, 2).tolist()
        mask = (columns >= x) & (columns < x + size) & (rows >= y) & (rows < y + size)
        if name == "disc":
            centre = (size - 1) / 2
            mask &= (columns - x - centre) ** 2 + (rows - y - centre) ** 2 <= (size / 2) ** 2
        if numbers[mask].any():
            continue
        numbers[mask] = len(objects) + 1
        colour = (210, 90, 60) if name == "disc" else (60, 120, 220)
        pixels[mask] = np.clip(np.array(colour) + rng.integers(-20, 20, (mask.sum(), 3)), 0, 255)
        ys, xs = np.nonzero(mask)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append((name, box))
    return pixels, numbers, objects


def write_voc(root: Path, train: int = 12, val: int = 6, side: int = 64, seed: int = 0) -> Path:
    """Writes a set in VOC's layout, with boxes and masks. Returns its folder."""
    rng = np.random.default_rng(seed)
    for name in (
        *("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"),
        *("ImageSets/Main", "ImageSets/Segmentation"),
    ):
        (root / name).mkdir(parents=True)
    for name, count in (("train", train), ("val", val)):
        ids = [f"{name}_{i:03d}" for i in range(count)]
        for key in ids:
            pixels, numbers, objects = draw(rng, side)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{key}.jpg", quality=95)
            (root / "Annotations" / f"{key}.xml").write_text(xml(objects))
            Image.fromarray(numbers).save(root / "SegmentationObject" / f"{key}.png")
            classes = np.array([0, *(CLASSES.index(n) + 1 for n, _ in objects)], np.uint8)
            Image.fromarray(classes[numbers]).save(root / "SegmentationClass" / f"{key}.png")
        for kind in ("Main", "Segmentation"):
            (root / "ImageSets" / kind / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root


def xml(objects: list[tuple[str, tuple[int, int, int, int]]], difficult: bool = False) -> str:
    """Returns VOC's XML: pixels are counted from 1, and the last pixel is in the box."""
    entries = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>"
        f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for name, (x0, y0, x1, y1) in objects
    )
    return f"<annotation>{entries}</annotation>"


def write_coco(root: Path, count: int = 4, side: int = 64) -> Path:
    """Writes two sets in COCO's layout, train2017 and val2017. Returns their folder.

    The first object of every image is a crowd with a run-length encoding, the others are boxes as
    polygons. Categories have the ids 7 and 3.
    """
    rng = np.random.default_rng(1)
    (root / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        (root / name).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            pixels, _, objects = draw(rng, side)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
            images.append({"id": 10 + i, "file_name": f"{i}.jpg", "height": side, "width": side})
            for number, (label, (x0, y0, x1, y1)) in enumerate(objects):
                shape: Any = [[x0, y0, x1, y0, x1, y1, x0, y1]]
                if number == 0:
                    mask = np.zeros((side, side), np.uint8)
                    mask[y0:y1, x0:x1] = 1
                    shape = {"size": [side, side], "counts": run_lengths(mask)}
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 10 + i,
                        "category_id": {"disc": 7, "square": 3}[label],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": float((x1 - x0) * (y1 - y0)),
                        "iscrowd": int(number == 0),
                        "segmentation": shape,
                    }
                )
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}],
        }
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        (root / "annotations" / f"captions_{name}.json").write_text("{}")
    return root


def run_lengths(mask: np.ndarray) -> list[int]:
    """Returns COCO's run lengths of a mask (H, W): column by column, zeros first."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
    return lengths if flat[0] == 0 else [0, *lengths]
