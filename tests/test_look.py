"""The look at a few images before the first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast.data import look as module
from mocofast.data.look import look
from mocofast.data.sources import ArraySource, FolderSource, find_images
from tests.pictures import save_photos

GRADIENT = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))  # 64 levels, 1 of 64 values is 0


def save(root: Path, **images: np.ndarray) -> FolderSource:
    root.mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(root / f"{name}.png")
    return FolderSource(root, find_images(root))


def test_photos_and_images_in_memory_give_no_line(tmp_path: Path) -> None:
    root = save_photos(tmp_path / "photos")
    source = FolderSource(root, find_images(root))
    assert look(source, source, 19) == []
    digits = ArraySource(np.zeros((9, 32, 32, 3), np.uint8), None, ())
    assert look(digits, None, 32) == []


def test_images_of_few_values_are_named_with_the_way_out(tmp_path: Path) -> None:
    clipped = GRADIENT.copy()
    clipped[:33] = 255
    source = save(
        tmp_path / "x",
        blank=np.full_like(GRADIENT, 7),
        clipped=clipped,
        good=GRADIENT,
        mask=GRADIENT // 64 * 64,  # 4 levels
        tiny=np.full((5, 3), 7, np.uint8),
    )
    blank, mask, white = look(source, None, 1)
    assert blank.startswith("1 of 5 images looked at have one value in all pixels: blank.png; ")
    assert mask.startswith("1 of 5 images looked at have fewer than 20 levels of 256: mask.png; ")
    assert white.startswith("1 of 5 images looked at have 0 or 255 in more than 50% of the values")
    assert all("--data.exclude" in line for line in (blank, mask, white))


def test_a_few_blank_images_of_many_are_normal(tmp_path: Path) -> None:
    images = {f"{i:02}": GRADIENT + np.uint8(i) for i in range(17)}
    assert look(save(tmp_path / "x", **images, blank=np.full_like(GRADIENT, 7)), None, 1) == []


def test_sizes_of_sets_are_compared_with_the_view_and_each_other(tmp_path: Path) -> None:
    train = save(tmp_path / "a", x=GRADIENT, y=GRADIENT[::-1].copy())
    val = save(tmp_path / "b", x=GRADIENT[:32], y=GRADIENT[32:])
    assert look(train, None, 64) == []
    assert look(train, train, 96) == [
        "all images looked at have 64 x 64 pixels, and are enlarged to views of 96: "
        "--augment.size 64 makes views as large as the images"
    ]
    assert look(train, train, 257)[0].endswith(
        "as the images, --knn.size 256 makes evaluations of ResNets faster"
    )
    (line,) = look(train, val, 64)
    assert line.startswith("training images have 64 x 64 pixels, evaluation images 32 x 64: ")


def test_bad_files_are_named_and_a_slow_look_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "x", a=GRADIENT, c=GRADIENT)
    (tmp_path / "x" / "b.png").write_bytes(b"no image")
    source = FolderSource(tmp_path / "x", ["a.png", "b.png", "c.png"])
    (line,) = look(source, None, 1)
    assert line.startswith("1 of 3 images looked at cannot be decoded: b.png (UnidentifiedImage")
    monkeypatch.setattr(module, "SECONDS", -1.0)
    assert look(source, None, 1) == []  # after the first image
