"""Images of any number of channels, of 8 or 16 bits, from the file to the view."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data import view_ops
from mocofast.data.arrays import PixelFormat, central_view, read_numbers
from mocofast.data.interface import Batch, BatchSlice, Loader
from mocofast.data.loaders import (
    build_loader,
    choose_loader,
    dali_missing,
    eval_batches,
    pixels_of,
)
from mocofast.data.ranges import parse_range
from mocofast.data.sources import ArraySource, FolderSource, Subset, find_images, load_datasets
from mocofast.data.statistics import StatsConfig, measure
from tests.pictures import assert_same_batches, differences, neutral

CPU = torch.device("cpu")
BANDS = 13
DEEP = np.dtype(np.uint16)
OTHER_LOADERS = ("device",) if dali_missing() else ("device", "dali")
# Every operator for images that do not have three channels. 11: odd and prime.
AUGMENT = AugmentConfig(
    size=11,
    rotate=10.0,
    jitter=(0.4, 0.4, 0.0, 0.0),
    gray=0.0,
    blur=0.5,
    vertical_flip=0.5,
    quarter_turns=0.5,
    channel_jitter=(0.2, 0.2),
    noise=0.02,
)


def bands(seed: int, height: int = 24, width: int = 20, channels: int = BANDS) -> np.ndarray:
    """Returns reflectances times 10,000 of smooth noise, (H, W, C) uint16."""
    coarse = np.random.default_rng(seed).integers(0, 10_000, (4, 4, channels))
    blocks = np.kron(coarse, np.ones((-(-height // 4), -(-width // 4), 1)))
    return blocks[:height, :width].astype(np.uint16)


def content(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, planes: str = "contig") -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig=planes)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# Files


def test_arrays_keep_every_level_in_either_layout(tmp_path: Path) -> None:
    pixels, deep = bands(0), PixelFormat(BANDS, DEEP)
    path = tmp_path / "a.npy"
    np.save(path, pixels)
    first = content(pixels.transpose(2, 0, 1))  # channels first, as rasters are stored
    for item in (str(path), content(pixels), first, pixels):
        assert np.array_equal(deep.load(item), pixels)
        assert deep.size(item) == (24, 20)
    gray = pixels[..., 0]
    assert np.array_equal(PixelFormat(1, DEEP).load(content(gray))[..., 0], gray)


def test_values_of_8_bits_and_floats_are_on_the_scale_of_16_bits() -> None:
    deep = PixelFormat(2, DEEP)
    small = np.arange(256, dtype=np.uint8).reshape(8, 16, 2)
    assert np.array_equal(deep.load(content(small)) / 65535, small / 255)
    floats = np.random.default_rng(0).random((5, 7, 2))
    floats[0, 0, 0], floats[1, 1, 1] = 0, 1
    for kind in (np.float16, np.float32, np.float64):
        exact = floats.astype(kind).astype(np.float64)
        got = deep.load(content(floats.astype(kind)))
        assert np.abs(got / 65535 - exact).max() <= 0.5001 / 65535


def test_a_missing_value_becomes_the_mean_of_the_channel() -> None:
    floats = np.stack((np.linspace(0.1, 0.5, 12), np.linspace(0.5, 0.9, 12)), axis=1)
    floats = floats.reshape(3, 4, 2)
    floats[0, 1, 0] = floats[2, 3, 1] = np.nan
    got = PixelFormat(2, DEEP).load(content(floats)) / 65535
    means = np.nanmean(floats, axis=(0, 1))
    assert got[0, 1, 0] == pytest.approx(means[0], abs=1e-5)
    assert got[2, 3, 1] == pytest.approx(means[1], abs=1e-5)
    known = ~np.isnan(floats)
    assert np.abs(got - floats)[known].max() < 1e-5


def test_gray_files_keep_16_bits_and_alpha_is_a_channel_where_it_is_asked_for() -> None:
    gray = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
    assert np.array_equal(PixelFormat(1, DEEP).load(png(gray))[..., 0], gray)
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    assert np.array_equal(read_numbers(png(rgba), 4).values, rgba)
    assert np.array_equal(read_numbers(png(rgba), 3).values, rgba[..., :3])
    luma = Image.fromarray(rgba[..., :3]).convert("L")
    assert np.array_equal(read_numbers(png(rgba[..., :3]), 1).values[..., 0], np.asarray(luma))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("divide:10000", 0, 10_000), ("0,4095", 0, 4095), ("-1000,3000", -1000, 3000)],
)
def test_a_range_gives_every_level_of_16_bits_in_all_kinds_of_files(
    text: str, low: float, high: float
) -> None:
    pixels = np.random.default_rng(0).integers(int(low), int(high) + 1, (9, 7, 4))
    deep = PixelFormat(4, DEEP, parse_range(text))
    exact = (pixels - low) / (high - low)
    for kind in (np.int16, np.int32, np.float32, np.float64):
        got = deep.load(content(pixels.astype(kind))) / 65535
        assert np.abs(got - exact).max() <= 0.5001 / 65535
    planes = PixelFormat(4, DEEP, parse_range(text)).load(tiff(pixels.astype(np.int16)))
    assert np.abs(planes / 65535 - exact).max() <= 0.5001 / 65535


def test_all_bands_of_a_tiff_are_read() -> None:
    pixels = bands(0)
    deep = PixelFormat(BANDS, DEEP)
    assert np.array_equal(deep.load(tiff(pixels)), pixels)
    apart = pixels.transpose(2, 0, 1)
    assert np.array_equal(deep.load(tiff(apart, "separate")), pixels)
    assert deep.size(tiff(apart, "separate")) == (24, 20)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (content(bands(0)[..., :12]), r"\(H, W, 13\) or \(13, H, W\).*found \(24, 20, 12\)"),
        (content(bands(0).astype(np.complex64)), "complex64 have no order"),
        (content(bands(0)[:0]), "empty"),
        (content(np.array([{"code": 1}] * BANDS, object)), "allow_pickle|Object arrays"),
        (content(bands(0))[:-99], "reshape|read"),
        (png(np.zeros((4, 4, 3), np.uint8)), "has 3 channels, not data.channels=13"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(item: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelFormat(BANDS, DEEP).load(item)


def test_the_byte_order_of_a_file_does_not_matter() -> None:
    pixels = bands(0)
    got = PixelFormat(BANDS, DEEP).load(content(pixels.astype(">u2")))
    assert np.array_equal(got, pixels)


# Sources


def test_arrays_in_memory_may_have_16_bits_or_be_floats() -> None:
    pixels = np.stack([bands(i) for i in range(3)])
    source = ArraySource(pixels, None, ())
    assert pixels_of(source, BANDS) == PixelFormat(BANDS, DEEP)
    assert pixels_of(Subset(source, np.array([1])), BANDS) == PixelFormat(BANDS, DEEP)
    assert np.array_equal(source.load(1), pixels[1])
    same_bytes = pixels.view(np.uint8).reshape(3, 24, 20, 2 * BANDS)
    assert source.fingerprint() != ArraySource(same_bytes, None, ()).fingerprint()
    floats = ArraySource(pixels / 65535, None, ())
    assert np.array_equal(floats.images, pixels)
    with pytest.raises(ConfigError, match=r"data\.channels: expected 13, .* got 4"):
        pixels_of(source, 4)


def test_8_bit_rgb_is_read_as_before() -> None:
    rgb = ArraySource(np.zeros((2, 4, 4, 3), np.uint8), None, ())
    assert pixels_of(rgb, 3) is None
    assert pixels_of(FolderSource("x", ["a.jpg"]), 3) is None
    assert pixels_of(FolderSource("x", ["a.jpg"]), 1) == PixelFormat(1, DEEP)


def test_arrays_are_images_beside_images_only_where_there_are_not_three_channels(
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "mask.npy", bands(0, channels=3))
    (tmp_path / "a.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    assert find_images(tmp_path) == ["a.png"]
    assert find_images(tmp_path, 1) == ["a.png", "mask.npy"]
    (tmp_path / "a.png").unlink()
    assert find_images(tmp_path) == ["mask.npy"]
    source = load_datasets(DataConfig(path=str(tmp_path))).train
    assert pixels_of(source, 3) == PixelFormat(3, DEEP)


def test_the_digits_have_the_channels_that_are_asked_for() -> None:
    gray = load_datasets(DataConfig(source="digits", channels=1)).train
    rgb = load_datasets(DataConfig(source="digits")).train
    assert isinstance(gray, ArraySource) and isinstance(rgb, ArraySource)
    assert np.array_equal(gray.images, rgb.images[..., :1])


# Loaders


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    """Writes 10 arrays of 13 bands. One is damaged, one has floats, one has no 13 channels."""
    for i in range(10):
        pixels = bands(i)
        pixels = pixels / 65535 if i == 4 else pixels[..., :12] if i == 6 else pixels
        (tmp_path / f"{i}.npy").write_bytes(content(pixels)[: -99 if i == 2 else None])
    return FolderSource(tmp_path, find_images(tmp_path, BANDS), np.arange(10) % 2, ("a", "b"))


def loader_of(source: FolderSource, name: str, workers: int = 0) -> Loader:
    data = DataConfig(loader=name, channels=BANDS, workers=workers)
    views = (AUGMENT, replace(AUGMENT, blur=0.0))
    return build_loader(source, data, views, BatchSlice(5), 3, CPU)


def batches(loader: Loader, epochs: int = 2) -> list[Batch]:
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def test_all_loaders_give_the_same_views_and_name_the_same_bad_files(folder: FolderSource) -> None:
    first = loader_of(folder, "torchvision")
    expected = batches(first)
    assert set(first.skipped) == {2, 6}
    assert "found (24, 20, 12)" in first.skipped[6]
    views = [view for batch in expected for view in batch.views]
    assert all(view.shape == (5, BANDS, 11, 11) and view.dtype == torch.uint16 for view in views)
    assert max(view.int().max() for view in views) > 255
    for name in OTHER_LOADERS:
        loader = loader_of(folder, name, workers=1)
        got = batches(loader)
        assert set(loader.skipped) == {2, 6}
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.index, b.index)
            for x, y in zip(a.views, b.views, strict=True):
                error = differences(x, y)
                # Levels of 65535: rounding in the resize, magnified by the jitter.
                assert error.max() <= 4
                assert error.mean() < 0.6
        # A later step of a new loader is the step of the old loader.
        loader.close()
        again = loader_of(folder, name, workers=1)
        assert_same_batches(list(again.epoch(1, 1)), got[-1:])
        again.close()


def test_workers_give_the_views_of_the_calling_process(folder: FolderSource) -> None:
    loader = loader_of(folder, "torchvision", workers=1)
    assert_same_batches(batches(loader, 1), batches(loader_of(folder, "torchvision"), 1))
    loader.close()


@pytest.mark.parametrize(
    ("case", "channels"),
    [("08_sentinel2/s2_13band_u16_tif", 13), ("09_pages_channels/ome_5ch_u16_tif", 5)],
)
def test_cases_show_all_channels_with_all_levels_in_all_loaders(
    case: str, channels: int, cases: Path
) -> None:
    tifffile = pytest.importorskip("tifffile")
    folder = cases / case
    source = load_datasets(DataConfig(path=str(folder), channels=channels)).train
    expected = []
    for name in find_images(folder):
        values = tifffile.imread(folder / name)
        axis = values.shape.index(channels)
        expected.append(np.moveaxis(values, axis, -1))
    side = expected[0].shape[0]
    whole = AugmentConfig(size=side, crop_scale=(1.0, 1.0), jitter=(0.0,) * 4, gray=0.0, flip=0.0)
    for name in ("torchvision", *OTHER_LOADERS):
        data = DataConfig(loader=name, channels=channels, workers=1)
        loader = build_loader(source, data, (whole,), BatchSlice(len(source)), 0, CPU)
        (batch,) = loader.epoch(0)
        loader.close()
        assert loader.skipped == {}
        for index, view in zip(batch.index.tolist(), batch.views[0]):
            assert np.array_equal(view.permute(1, 2, 0).numpy(), expected[index])


def test_stats_of_bands_are_those_of_float64(tmp_path: Path) -> None:
    pixels = np.stack([bands(i) for i in range(6)])
    for i, image in enumerate(pixels):
        (tmp_path / f"{i}.npy").write_bytes(content(image))
    found = measure(str(tmp_path), StatsConfig(channels=BANDS, range="divide:10000", workers=1))
    values = pixels.reshape(-1, BANDS) / 10_000
    np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.std, values.std(0), atol=1e-5)
    assert found.options().startswith(f"--data.channels {BANDS} --data.range divide:10000 ")


@pytest.mark.parametrize(("channels", "words"), [(BANDS, "13 channels"), (1, "1 channel")])
def test_auto_says_why_dali_does_not_decode(
    folder: FolderSource, channels: int, words: str
) -> None:
    pixels = pixels_of(folder, channels)
    name, reason = choose_loader(folder, "auto", CPU, (AUGMENT,), pixels)
    assert (name, reason) == ("torchvision", f"{words} of 16 bits, which DALI does not decode")


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_arrays_of_8_bits_stay_8_bits(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 24, 20, channels), dtype=np.uint8)
    source, results = ArraySource(images, None, ()), []
    for name in ("torchvision", "device"):
        data = DataConfig(loader=name, channels=channels, workers=0)
        loader = build_loader(source, data, (AUGMENT,), BatchSlice(6), 3, CPU)
        (batch,) = loader.epoch(0)
        results.append(batch.views[0])
    assert results[0].dtype == torch.uint8
    error = differences(*results)
    assert error.max() <= 4
    assert error.mean() < 0.6


def test_evaluation_cuts_the_centre_of_every_good_image(folder: FolderSource) -> None:
    evaluation = eval_batches(folder, 8, 4, 1, CPU, BANDS)
    found = list(evaluation)
    assert set(evaluation.skipped) == {2, 6}
    images = torch.cat([images for images, _, _ in found])
    index = torch.cat([index for _, _, index in found])
    assert images.shape == (8, BANDS, 8, 8) and images.dtype == torch.uint16
    assert index.tolist() == [0, 1, 3, 4, 5, 7, 8, 9]


def test_the_central_view_is_the_mean_of_blocks_where_it_shrinks_evenly() -> None:
    wide = bands(0, 8, 40)  # no larger than 40: the whole shorter side, columns 16 to 24
    assert np.array_equal(central_view(wide, 40)[2::5, 2::5], wide[:, 16:24])
    # 256 pixels of a longer image: 224 at the centre, 16 pixels a block of the 14 pixels.
    tall = np.repeat(np.arange(0, 2000, dtype=np.uint16)[:, None, None], 256, axis=1)
    got = central_view(tall, 14)
    assert got.shape == (14, 14, 1)
    assert np.abs(np.diff(got[1:-1, :, 0].astype(int), axis=0) - 16).max() <= 1
    assert got[:, 0, 0].mean() == pytest.approx(999.5, abs=1)


def test_gray_images_in_shards_keep_16_bits_in_all_loaders(tmp_path: Path) -> None:
    grays = [bands(i, 20, 20, 1)[..., 0] * 6 for i in range(6)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, gray in enumerate(grays):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(png(gray))
            tar.addfile(member, io.BytesIO(png(gray)))
    source = load_datasets(DataConfig(source="shards", path=str(tmp_path), channels=1)).train
    whole = AugmentConfig(size=20, crop_scale=(1.0, 1.0), jitter=(0.0,) * 4, gray=0.0, flip=0.0)
    for name in ("torchvision", *OTHER_LOADERS):
        data = DataConfig(loader=name, channels=1, workers=1)
        loader = build_loader(source, data, (whole,), BatchSlice(6), 0, CPU)
        (batch,) = loader.epoch(0)
        for i, view in zip(batch.index.tolist(), batch.views[0]):
            # A crop of the whole area is the image itself.
            assert np.array_equal(view[0].numpy(), grays[i])
        loader.close()


# Operators


@pytest.fixture
def x() -> torch.Tensor:
    return torch.from_numpy(np.stack([bands(i, 20) for i in range(3)])).permute(0, 3, 1, 2).float()


def test_contrast_is_relative_to_the_mean_of_the_channel(x: torch.Tensor) -> None:
    factor = torch.tensor([0.5, 1.0, 1.7]).view(3, 1, 1, 1)
    exact = x.double()
    mean = exact.mean((2, 3), keepdim=True)
    exact = ((exact - mean) * factor + mean).clamp(0, 65535)
    got = x.clone()
    view_ops.adjust_contrast_(got, factor, 65535)
    assert (got - exact).abs().max() <= 1.5  # the mean rounds, the result truncates
    assert torch.equal(got[1], x[1])


def test_flips_and_turns_are_numpys(x: torch.Tensor) -> None:
    images = x.permute(0, 2, 3, 1).numpy().astype(np.uint16)
    still = neutral(20)
    cases: list[tuple[dict[str, int], Callable[[np.ndarray], np.ndarray]]] = [
        ({"vertical_flip": True}, np.flipud),
        *(({"turns": n}, lambda image, n=n: np.rot90(image, n)) for n in range(4)),
    ]
    for change, expected in cases:
        out = torch.zeros(3, 20, 20, BANDS, dtype=torch.uint16)
        params = [still._replace(**change)] * 3  # type: ignore[arg-type]
        view_ops.apply_view_ops(torch.from_numpy(images), params, AUGMENT, out)
        for image, got in zip(images, out.numpy()):
            assert np.array_equal(got, expected(image))


def test_channels_have_factors_of_their_own(x: torch.Tensor) -> None:
    augment = AugmentConfig(channel_jitter=(0.3, 0.0))
    params = [neutral(20)._replace(key=key) for key in (5, 9, 5)]
    got = x.clone()
    view_ops.apply_late_ops(got, params, augment, 65535)
    factor = (got / x.clamp(min=1))[x > 1000].view(-1)
    assert factor.min() >= 0.7 - 1e-3 and factor.max() <= 1.3
    ratio = got.sum((2, 3)) / x.sum((2, 3))  # (3, C)
    assert ratio.std(1).min() > 0.05  # channels differ
    assert (ratio[0] - ratio[1]).abs().max() > 0.05  # images differ
    torch.testing.assert_close(ratio[0], ratio[2], rtol=1e-3, atol=0)  # a key gives the factors


def test_new_operators_on_rgb_are_the_same_in_both_paths() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 24, 20, 3), dtype=np.uint8)
    augment = replace(AUGMENT, jitter=(0.0, 0.0, 0.0, 0.0), rotate=0.0, blur=0.0, hed=0.05)
    results = []
    for name in ("torchvision", "device"):
        data = DataConfig(loader=name, workers=0)
        loader = build_loader(
            ArraySource(images, None, ()), data, (augment,), BatchSlice(6), 3, CPU
        )
        (batch,) = loader.epoch(0)
        results.append(batch.views[0])
    error = differences(*results)
    assert error.max() <= 2
    assert error.mean() < 0.05


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"gray": 0.2}, "gray"),
        ({"solarize": 0.2}, "solarize"),
        ({"hed": 0.05}, "hed"),
        ({"jitter": (0.0, 0.0, 0.1, 0.0)}, "jitter"),
        ({"jitter": (0.0, 0.0, 0.0, 0.1)}, "jitter"),
    ],
)
def test_operators_on_colours_need_three_channels(
    changes: dict[str, float], name: str, folder: FolderSource
) -> None:
    augment = replace(AUGMENT, **changes)  # type: ignore[arg-type]
    data = DataConfig(channels=BANDS, workers=0)

    def first(augment: AugmentConfig) -> Batch:
        loader = build_loader(folder, data, (augment,), BatchSlice(5), 3, CPU)
        return next(iter(loader.epoch(0)))

    with pytest.raises(
        ConfigError, match=rf"augment\.{name}.*13 channels.*--augment.color_ops auto"
    ):
        first(augment)
    assert first(replace(augment, color_ops="auto")).views[0].shape == (5, BANDS, 11, 11)
