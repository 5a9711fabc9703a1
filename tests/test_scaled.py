"""Scaled decoding of JPEG: the pixels, equal views in all loaders, exact resume, clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data import scaled
from mocofast.data.arrays import ArraySource
from mocofast.data.folders import FolderSource
from mocofast.data.interface import Batch, BatchSlice, Loader, Source, sample_view, view_augments
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.sources import find_images

CPU = torch.device("cpu")
SIDE = 16
# No operator but the crop: the loaders' operators differ in rounding only.
CROPS = AugmentConfig(size=SIDE, jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0)
LOADERS = ["torchvision", *([] if dali_missing() else ["dali"])]


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Returns a smooth picture: means of noise, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder of images from 20 to 200 pixels: colour, gray, PNG, a damaged file."""
    for i in range(15):
        picture(200 - 9 * i, 20 + 11 * i, i).save(tmp_path / f"{i:02}.jpg", quality=90)
    picture(150, 150, 20).convert("L").save(tmp_path / "gray.jpg")
    picture(150, 150, 21).convert("CMYK").save(tmp_path / "inks.jpg")
    picture(150, 150, 22).save(tmp_path / "lossless.png")
    damaged = (tmp_path / "00.jpg").read_bytes()
    (tmp_path / "zz_damaged.jpg").write_bytes(damaged[: len(damaged) // 2])
    return tmp_path


def source_of(folder: Path) -> FolderSource:
    return FolderSource(folder, find_images(folder))


def loader_of(source: Source, name: str, decode: str, augment: AugmentConfig = CROPS) -> Loader:
    data = DataConfig(loader=name, workers=1, decode=decode)
    return build_loader(source, data, view_augments(augment, 2), BatchSlice(6), 5, CPU)


def batches(loader: Loader, start: int = 0) -> list[Batch]:
    found = list(loader.epoch(1, start))
    loader.close()
    return found


def error(ours: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (ours.int() - other.int()).abs().float()


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(160, 240), (61, 67), (9, 200)])
def test_a_scaled_image_is_the_mean_of_its_blocks(
    tmp_path: Path, factor: int, size: tuple[int, int]
) -> None:
    image = picture(*size, seed=factor)
    image.save(tmp_path / "x.jpg", quality=98, subsampling=0)
    decoded = scaled.decode_scaled(str(tmp_path / "x.jpg"), lambda full: factor)
    assert decoded is not None
    small, full, used = decoded
    assert (full, used) == (size, factor)
    height, width = scaled.scaled_size(size, factor)
    assert small.size == (width, height)
    # Whole blocks only: libjpeg invents pixels beyond the edge.
    rows, columns = size[0] // factor, size[1] // factor
    blocks = np.asarray(image, dtype=float)[: rows * factor, : columns * factor]
    means = blocks.reshape(rows, factor, columns, factor, 3).mean((1, 3))
    difference = np.abs(np.asarray(small, dtype=float)[:rows, :columns] - means)
    assert difference.mean() < 2


def test_the_factor_is_the_largest_that_leaves_every_crop_as_large_as_its_view() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(300):
        size = tuple(int(side) for side in rng.integers(10, 900, 2))
        views = [sample_view(CROPS, size, 0, 0, index, view) for view in (0, 1)]
        augments = view_augments(CROPS, 2)
        factor = scaled.scaled_factor(views, augments)
        seen.add(factor)
        smallest = min(min(p.height, p.width) for p in views)
        assert factor == 1 or smallest >= factor * SIDE
        assert factor == 8 or smallest < 2 * factor * SIDE
        full = scaled.scaled_size(size, factor)
        for p in views:
            q = scaled.scaled_params(p, size, factor)
            assert q.top >= 0 and q.left >= 0
            assert q.top + q.height <= full[0] and q.left + q.width <= full[1]
            moved = [q.top - p.top / factor, q.left - p.left / factor]
            resized = [q.height - p.height / factor, q.width - p.width / factor]
            assert max(map(abs, moved)) <= 1 and max(map(abs, resized)) <= 0.5
            assert q[4:] == p[4:]
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("name", LOADERS)
def test_scaled_views_are_close_to_full_views(folder: Path, name: str) -> None:
    source = source_of(folder)
    full, small = (batches(loader_of(source, name, decode)) for decode in ("full", "scaled"))
    changed = 0
    for a, b in zip(full, small, strict=True):
        assert torch.equal(a.index, b.index)
        for view, other in zip(a.views, b.views):
            difference = error(view, other).mean((1, 2, 3))
            changed += int((difference > 0).sum())
            # Of 255. A box moves by up to a pixel, on steep ramps. Other pictures differ by 50.
            assert difference.max() < 25
            assert difference.mean() < 10
    assert changed > 10


@pytest.mark.skipif(bool(dali_missing()), reason="DALI is not installed")
def test_all_loaders_give_the_same_scaled_views_and_skip_the_same_files(folder: Path) -> None:
    source = source_of(folder)
    made, skipped = {}, {}
    for name in LOADERS:
        loader = loader_of(source, name, "scaled")
        made[name] = batches(loader)
        skipped[name] = loader.skipped
    for ours, other in zip(made["dali"], made["torchvision"], strict=True):
        assert torch.equal(ours.index, other.index)
        for view, reference in zip(ours.views, other.views):
            assert error(view, reference).max() <= 1
    assert skipped["dali"].keys() == skipped["torchvision"].keys() == {len(source) - 1}


@pytest.mark.parametrize("name", LOADERS)
def test_a_scaled_stream_resumes_exactly(folder: Path, name: str) -> None:
    source = source_of(folder)
    augment = AugmentConfig(size=SIDE, blur=0.5)
    whole = batches(loader_of(source, name, "scaled", augment))
    rest = batches(loader_of(source, name, "scaled", augment), start=1)
    for a, b in zip(whole[1:], rest, strict=True):
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(view, again) for view, again in zip(a.views, b.views))


def test_loaders_that_cannot_decode_scaled_say_so(folder: Path) -> None:
    source = source_of(folder)
    with pytest.raises(ConfigError, match=r"data\.decode=scaled: the device loader .*torchvision"):
        loader_of(source, "device", "scaled")
    with pytest.raises(ConfigError, match=r"DALI decodes on the GPU.*--data\.decode full"):
        scaled.check_scaled("dali", on_gpu=True, is_rgb=True, of_type=True)
    images = np.zeros((8, 40, 40, 1), dtype=np.uint8)
    data = DataConfig(loader="torchvision", workers=0, decode="scaled", channels=1)
    with pytest.raises(ConfigError, match="only 8-bit RGB"):
        build_loader(
            ArraySource(images, None, ()), data, view_augments(CROPS, 2), BatchSlice(4), 0, CPU
        )
