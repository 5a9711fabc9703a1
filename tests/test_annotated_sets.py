"""Sets in the layouts of Pascal VOC and COCO: what is read, left out, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import ConfigError
from mocofast.detection.batches import Reader, TrainingBatches, detection_sample
from mocofast.detection.layouts import load_sets
from mocofast.detection.options import DetectData, SegmentData
from tests import shapes


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pycocotools")
    return shapes.write_coco(tmp_path_factory.mktemp("coco"))


def test_voc_boxes_masks_and_pixels_agree(voc: Path) -> None:
    boxes = load_sets(DetectData(path=str(voc)), "boxes")
    masks = load_sets(DetectData(path=str(voc), classes=shapes.CLASSES), "masks")
    pixels = load_sets(SegmentData(path=str(voc), classes=shapes.CLASSES), "pixels")
    assert boxes.train.classes == shapes.CLASSES
    assert (len(boxes.train), len(boxes.val)) == (12, 6)
    for item, with_masks, with_pixels in zip(
        boxes.train.items, masks.train.items, pixels.train.items
    ):
        target = with_masks.masks()
        np.testing.assert_array_equal(target.boxes, item.target.boxes)
        np.testing.assert_array_equal(target.labels, item.target.labels)
        classes = (target.masks * target.labels[:, None, None]).max(0)
        np.testing.assert_array_equal(with_pixels.pixels(), classes)
        np.testing.assert_array_equal(target.areas, target.masks.sum((1, 2)))


def test_coco_boxes_masks_and_pixels_agree(coco: Path) -> None:
    val = load_sets(DetectData(path=str(coco)), "masks").val
    assert val.classes == ("square", "disc")  # ids 3 and 7
    for item in val.items:
        target = item.masks()
        assert target.ignored.tolist() == [True] + [False] * (len(target.labels) - 1)
        assert (target.trained == ~target.ignored).all()
        expected = np.zeros((64, 64), np.uint8)
        for mask, (x0, y0, x1, y1), label in zip(
            target.masks, target.boxes.astype(int), target.labels
        ):
            own = np.zeros((64, 64), bool)
            own[y0:y1, x0:x1] = True
            np.testing.assert_array_equal(mask, own)
            expected[own] = label
        expected[target.masks[0]] = 255  # a crowd
        np.testing.assert_array_equal(item.pixels() == 255, expected == 255)


def test_sets_of_several_years_are_joined(tmp_path: Path) -> None:
    for number, year in enumerate(("VOC2007", "VOC2012")):
        shapes.write_voc(tmp_path / year, train=2 + number, val=1, seed=number)
    sets = DetectData(
        path=str(tmp_path), train=("VOC2007/train", "VOC2012/train"), val=("VOC2007/val",)
    )
    train, val = load_sets(sets, "boxes")
    assert (len(train), len(val)) == (5, 1)
    with pytest.raises(ConfigError, match="there are several: VOC2007/train, VOC2007/val"):
        load_sets(DetectData(path=str(tmp_path)), "boxes")


def test_trainval_and_test_are_taken_where_both_exist(voc: Path, tmp_path: Path) -> None:
    path = shutil.copytree(voc, tmp_path / "set")
    lists = path / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text())
    assert len(load_sets(DetectData(path=str(path)), "boxes").val) == 6  # val: there is no test
    (lists / "test.txt").write_text("val_001\nval_002\nval_001\n")
    assert [i.image.stem for i in load_sets(DetectData(path=str(path)), "boxes").val.items] == [
        "val_001",
        "val_002",
    ]


def test_difficult_objects_and_bad_boxes(voc: Path, tmp_path: Path) -> None:
    path = shutil.copytree(voc, tmp_path / "set")
    objects = [("disc", (-5, 2, 20, 30)), ("disc", (90, 90, 95, 95)), ("square", (9, 9, 9, 20))]
    text = shapes.xml(objects, difficult=True)
    (path / "Annotations" / "val_000.xml").write_text(text)
    val = load_sets(DetectData(path=str(path)), "boxes").val
    target = val.items[0].target
    np.testing.assert_array_equal(target.boxes, [[0, 2, 20, 30]])  # cut at the edge
    assert target.ignored.tolist() == [True] and target.trained.tolist() == [True]
    assert val.remarks == ["left out 2 boxes without an area inside their image"]
    val = load_sets(DetectData(path=str(path), classes=("square",)), "boxes").val
    assert "classes that data.classes does not name" in val.remarks[-1]


def test_names_of_images_may_have_spaces(voc: Path, tmp_path: Path) -> None:
    path = shutil.copytree(voc, tmp_path / "set")
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"):
        (file,) = (path / folder).glob("val_000.*")
        file.rename(file.with_name(f"my cell 1{file.suffix}"))
    for kind in ("Main", "Segmentation"):
        # As in lists of a class: the second column says whether the image shows it.
        (path / "ImageSets" / kind / "val.txt").write_text("my cell 1\nval_001 -1\nval_002  1\n")
    for kind, options in (("boxes", DetectData), ("pixels", SegmentData)):
        found = load_sets(options(path=str(path)), kind).val
        names = [item.image.name for item in found.items]
        assert names == ["my cell 1.jpg", "val_001.jpg", "val_002.jpg"]


def test_a_misspelt_class_is_named(voc: Path, coco: Path) -> None:
    for path in (voc, coco):
        sets = load_sets(DetectData(path=str(path), classes=("disc", "sqare")), "boxes")
        said = "data.classes: no object has the class 'sqare'; did you mean 'square'?"
        assert sets.train.remarks.count(said) == 1 and said not in sets.val.remarks


def test_images_of_another_size_than_their_boxes_are_named(
    voc: Path, coco: Path, tmp_path: Path
) -> None:
    for number, made in enumerate((voc, coco)):
        path = shutil.copytree(made, tmp_path / f"set{number}")
        for file in path.rglob("*.jpg"):
            with Image.open(file) as image:
                image.resize((32, 48)).save(file)
        for file in path.rglob("*.xml"):
            size = "<size><width>64</width><height>64</height></size><object>"
            file.write_text(file.read_text().replace("<object>", size, 1))
        sets = load_sets(DetectData(path=str(path)), "boxes")
        if made is voc:  # whose files may be wrong, beside boxes that are right
            (said,) = [text for text in sets.train.remarks if "not of the size" in text]
            assert said.startswith("12 of 12 images are not of the size that their annotations say")
            assert "train_000.jpg has (48, 32) pixels, and its XML file (64, 64)" in said
        else:
            said = r"\(48, 32\) pixels, and its annotations are of \(64, 64\)"
            with pytest.raises(ConfigError, match=said):
                Reader(sets.train, 3, "boxes").read(0)


def _break_xml(path: Path) -> None:
    (path / "Annotations" / "train_003.xml").write_text("<annotation><object>")


def _no_box(path: Path) -> None:
    (path / "Annotations" / "train_003.xml").write_text(
        "<annotation><object><name>disc</name></object></annotation>"
    )


def _words(path: Path) -> None:
    text = shapes.xml([("disc", (1, 2, 3, 4))]).replace("<xmin>2", "<xmin>two")
    (path / "Annotations" / "train_003.xml").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_break_xml, "train_003.xml: not VOC's XML"),
        (_no_box, "an object without bndbox"),
        (_words, "train_003.xml: not VOC's XML"),
        (lambda p: (p / "Annotations" / "train_003.xml").unlink(), "there is no such file"),
        (lambda p: (p / "JPEGImages" / "train_003.jpg").unlink(), "there is no image"),
        (lambda p: (p / "JPEGImages" / "train_003.jpg").write_text("x"), "not an image"),
        (lambda p: (p / "ImageSets" / "Main" / "val.txt").write_text("\n"), "without names"),
        (lambda p: shutil.rmtree(p / "ImageSets"), "neither ImageSets/Main"),
    ],
)
def test_a_damaged_voc_set_is_refused(
    voc: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    path = shutil.copytree(voc, tmp_path / "set")
    damage(path)
    with pytest.raises(ConfigError, match=said):
        load_sets(DetectData(path=str(path)), "boxes")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not COCO's JSON"),
        ("[]", "not COCO's JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "there are no images"),
        (
            '{"images": [{"id": 1, "file_name": "0.jpg", "height": 64, "width": 64}],'
            '"categories": [], "annotations": [{"image_id": 1, "category_id": 9,'
            '"bbox": [0, 0, 1, 1]}]}',
            "unknown categories",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.jpg", "height": 64, "width": 64}],'
            '"categories": [{"id": 7, "name": "disc"}], "annotations": [{"image_id": 1,'
            '"category_id": 7, "bbox": [0, 0, 1]}]}',
            "a bbox of",
        ),
        (
            '{"images": [{"id": [1], "file_name": "0.jpg", "height": 64, "width": 64}],'
            '"categories": [], "annotations": []}',
            "unhashable",
        ),
        (
            '{"images": [{"id": 1, "file_name": "0.jpg", "height": 64, "width": 64}],'
            '"categories": [{"id": "7", "name": "disc"}], "annotations": []}',
            "a category of the id '7'",
        ),
        (
            '{"images": [{"id": 1, "file_name": "lost.jpg", "height": 64, "width": 64}],'
            '"categories": [{"id": 7, "name": "disc"}], "annotations": []}',
            "lost.jpg is in none of",
        ),
    ],
)
def test_a_damaged_coco_set_is_refused(coco: Path, tmp_path: Path, content: str, said: str) -> None:
    path = shutil.copytree(coco, tmp_path / "set")
    (path / "annotations" / "instances_train2017.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_sets(DetectData(path=str(path)), "boxes")


@pytest.mark.parametrize(
    "shape",
    [
        None,
        "x",
        {"size": [64, 64], "counts": [10**9]},
        {"size": [9, 9], "counts": [81]},
        [["a"] * 6],
    ],
)
def test_a_bad_mask_of_coco_is_refused(coco: Path, tmp_path: Path, shape: object) -> None:
    path = shutil.copytree(coco, tmp_path / "set")
    file = path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = shape
    file.write_text(json.dumps(content))
    (item, *_) = load_sets(DetectData(path=str(path)), "masks").val.items
    with pytest.raises(ConfigError, match=r"0\.jpg"):
        item.masks()


def test_masks_of_other_kinds_are_refused(voc: Path, tmp_path: Path) -> None:
    path = shutil.copytree(voc, tmp_path / "set")
    mask = path / "SegmentationClass" / "val_000.png"
    data = SegmentData(path=str(path), classes=shapes.CLASSES)
    Image.new("RGB", (64, 64)).save(mask)
    with pytest.raises(ConfigError, match="one channel of 8 bits"):
        load_sets(data, "pixels").val.items[0].pixels()
    Image.new("L", (64, 64), 9).save(mask)
    with pytest.raises(ConfigError, match=r"class 9, and data\.classes has 2"):
        load_sets(data, "pixels").val.items[0].pixels()
    Image.new("L", (60, 64)).save(mask)
    with pytest.raises(ConfigError, match="in its masks"):
        Reader(load_sets(data, "pixels").val, 3, "pixels").read(0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "expected the folder of a set"),
        ({"path": "nowhere"}, "is no folder"),
        ({"train": ("trian",)}, "no set 'trian'; did you mean 'train'"),
        ({"layout": "coco"}, "nor annotations"),
    ],
)
def test_options_that_find_nothing_are_refused(
    voc: Path, options: dict[str, object], said: str
) -> None:
    path = {} if not options or "path" in options else {"path": str(voc)}
    with pytest.raises(ConfigError, match=said):
        load_sets(DetectData(**path, **options), "boxes")  # type: ignore[arg-type]


def test_an_unreadable_image_is_replaced_in_training_and_named(voc: Path, tmp_path: Path) -> None:
    path = shutil.copytree(voc, tmp_path / "set")
    image = path / "JPEGImages" / "train_003.jpg"
    image.write_bytes(image.read_bytes()[:700])  # the header is whole
    reader = Reader(load_sets(DetectData(path=str(path)), "boxes").train, 3, "boxes")
    _, target = reader.read_or_next(3)
    np.testing.assert_array_equal(target.boxes, reader.images.items[4].target.boxes)
    assert list(reader.skipped) == [3]


def test_flipped_boxes_and_masks_agree(voc: Path) -> None:
    train = load_sets(DetectData(path=str(voc), classes=shapes.CLASSES), "masks").train
    image, target = Reader(train, 3, "masks").read_or_next(0)
    flipped, found = detection_sample(image, target, torch.Generator(), flip=1.0)
    torch.testing.assert_close(flipped.flip(2), image)
    for mask, box in zip(found["masks"], found["boxes"].int().tolist()):
        rows, columns = mask.nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [int(x) for x in expected] == box


def test_batches_do_not_depend_on_ranks_threads_or_where_an_epoch_begins(voc: Path) -> None:
    train = load_sets(DetectData(path=str(voc)), "boxes").train

    def batches(rank: int, world: int, workers: int, first: int = 0) -> list[list[torch.Tensor]]:
        def sample(image: torch.Tensor, target: object, generator: torch.Generator) -> torch.Tensor:
            return image.mean() + torch.rand((), generator=generator)

        reader = Reader(train, 3, "boxes")
        return list(TrainingBatches(reader, sample, 4, workers, 0, rank, world).epoch(1, first))

    whole = batches(0, 1, 2)
    assert len(whole) == 3 and len({float(x) for batch in whole for x in batch}) == 12
    assert batches(0, 1, 1, first=1) == whole[1:]
    halves = [batches(rank, 2, 1) for rank in (0, 1)]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*halves)] == whole
