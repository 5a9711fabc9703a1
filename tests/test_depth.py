"""Files of more than 8 bits with three channels: levels up to the view, and ranges of a set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast import cli
from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.evaluation import EvalBatches
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader, dali_missing, pixels_of
from mocofast.data.remarks import remarks
from mocofast.data.sources import load_datasets
from mocofast.data.statistics import StatsConfig, measure
from tests import runs

tifffile = pytest.importorskip("tifffile")

CPU = torch.device("cpu")
SIDE = 16
# The crop is the image: no pixel is resized.
WHOLE = AugmentConfig(
    size=SIDE, crop_scale=(1.0, 1.0), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), gray=0.0
)
LOADERS = [
    "torchvision",
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
]


def numbers(seed: int) -> np.ndarray:
    """Returns numbers of 12 bits, (SIDE, SIDE, 3), uint16. Files 0, 2, ... are gray."""
    values = np.random.default_rng(seed).integers(0, 4096, (SIDE, SIDE, 3)).astype(np.uint16)
    return values if seed % 2 else values[..., :1].repeat(3, axis=2)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    folder = tmp_path / "deep"
    folder.mkdir()
    for i in range(6):
        if i % 2:
            tifffile.imwrite(folder / f"{i}.tif", numbers(i), photometric="rgb")
        else:
            Image.fromarray(numbers(i)[..., 0]).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("depth", [8, 16])
def test_views_have_the_levels_of_the_depth(deep: Path, name: str, depth: int) -> None:
    """The expected levels are computed in float64 from the numbers of the files."""
    data = DataConfig(path=str(deep), range="0,4095", depth=depth, loader=name, workers=1)
    source = load_datasets(data).train
    top = 2**depth - 1
    batch = next(build_loader(source, data, (WHOLE,), BatchSlice(6), 0, CPU).epoch(0))
    assert batch.views[0].dtype == (torch.uint8 if depth == 8 else torch.uint16)
    assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
    for view, index in zip(batch.views[0], batch.index.tolist()):
        expected = np.floor(numbers(index) / 4095 * top + 0.5)
        assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)
    pixels = pixels_of(source, 3)
    images, _, order = next(iter(EvalBatches(source, SIDE, 6, 1, CPU, pixels)))
    expected = np.floor(numbers(int(order[1])) / 4095 * top + 0.5)
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), expected)


def test_loaders_agree_on_deep_views_with_all_operators(deep: Path) -> None:
    if dali_missing():
        pytest.skip("no DALI")
    augment = AugmentConfig(size=11, jitter_p=0.8, blur=0.5, gray=0.3)
    found = []
    for name in ("torchvision", "dali"):
        data = DataConfig(path=str(deep), range="0,4095", depth=16, loader=name, workers=1)
        source = load_datasets(data).train
        views = build_loader(source, data, (augment, augment), BatchSlice(3), 0, CPU).epoch(1)
        found.append([view for batch in views for view in batch.views])
    for left, right in zip(*found):
        assert torch.equal(left, right)


def test_photos_at_a_depth_of_16_keep_their_values(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    data = DataConfig(path=str(tmp_path), depth=16, loader="torchvision", workers=0)
    source = load_datasets(data).train
    view = next(build_loader(source, data, (WHOLE,), BatchSlice(1), 0, CPU).epoch(0)).views[0]
    assert np.array_equal(view[0].permute(1, 2, 0).numpy(), pixels.astype(np.uint16) * 257)


def test_remarks_name_the_depth_where_levels_are_lost(deep: Path) -> None:
    lines = remarks(load_datasets(DataConfig(path=str(deep))).train)
    assert any("--data.range 0,4095" in line and "--data.depth 16" in line for line in lines)
    kept = remarks(load_datasets(DataConfig(path=str(deep), depth=16)).train)
    assert not any("--data.depth" in line for line in kept)


def test_stats_measures_percentiles_of_a_set_by_channel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = []
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 500 << i, (20, 20, 3)).astype(np.uint16)
        values[..., 1] //= 2
        every.append(values.reshape(-1, 3))
        tifffile.imwrite(tmp_path / f"{i}.tif", values, photometric="rgb")
    found = measure(str(tmp_path), StatsConfig(percentiles=(5, 95)))
    bounds = np.percentile(np.concatenate(every), (5, 95), axis=0).T.ravel()
    assert found.range == ",".join(f"{bound:.6g}" for bound in bounds)
    assert f"--data.range {found.range}" in found.options()
    assert cli.main(["stats", str(tmp_path), "--percentiles", "5,95"]) == 0
    assert f"--data.range {found.range}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["stats", str(tmp_path), "--percentiles", "5"])
    assert "--percentiles: expected 2 values like (0.0, 0.0), got '5'" in capsys.readouterr().err


def test_stats_says_why_images_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 4), dtype=np.uint8)
    for i, values in enumerate(noise):
        Image.fromarray(values, "RGBA").save(tmp_path / f"{i}.png")
    for name in ("a.png", "b.png"):
        Image.fromarray(noise[0, :, :, 0]).save(tmp_path / name)  # gray
    assert cli.main(["stats", str(tmp_path), "--channels", "4", "--percentiles", "1,99"]) == 0
    out = capsys.readouterr().out
    reason = "ValueError: has 1 channels, not data.channels=4"
    assert f"3 images measured, 2 left out\nleft out: 2 images: {reason}" in out
    for name in ("1.png", "2.png", "b.png"):
        (tmp_path / name).unlink()
    assert cli.main(["stats", str(tmp_path), "--channels", "4"]) == 0
    out = capsys.readouterr().out
    assert f"1 image measured, 1 left out\nleft out: 1 image: {reason}" in out


def test_stats_gives_a_gray_file_among_colours_ranges_by_channel(tmp_path: Path) -> None:
    """The means are those of the gray as three equal colours, each scaled by its own range."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    noise = (noise * (1.0, 0.75, 0.5)).astype(np.uint8)
    for i, values in enumerate(noise[:2]):
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    Image.fromarray(noise[2, :, :, 0]).save(tmp_path / "gray.png")
    found = measure(str(tmp_path), StatsConfig(percentiles=(5, 95)))
    assert found.images == 3 and found.skipped == {}
    every = np.stack([*noise[:2], noise[2, :, :, [0, 0, 0]].transpose(1, 2, 0)])
    bounds = np.percentile(every, (5, 95), axis=(0, 1, 2))
    assert found.range == ",".join(f"{bound:.6g}" for bound in bounds.T.ravel())
    scaled = ((every - bounds[0]) / (bounds[1] - bounds[0])).clip(0, 1)
    np.testing.assert_allclose(found.mean, scaled.mean((0, 1, 2)), atol=0.5 / 255)


def test_a_deep_run_resumes_exactly(deep: Path, tmp_path: Path) -> None:
    common = (
        *("pretrain", "digits", "--model.arch", "resnet_tiny", "--augment.size", "16"),
        *("--data.batch_size", "3", "--data.workers", "0", "--data.loader", "torchvision"),
        *("--data.source", "folder", "--data.path", str(deep), "--data.depth", "16"),
        *("--data.range", "0,4095", "--train.log_every", "1", "--model.queue_size", "6"),
    )
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert cli.main([*common, "--train.dir", whole, "--train.max_steps", "3"]) == 0
    for steps in ("1", "3"):
        arguments = (*common, "--train.dir", parts, "--train.max_steps", steps)
        assert cli.main([*arguments, "--resume", "auto"]) == 0
    assert runs.metrics(Path(parts)) == runs.metrics(Path(whole))
