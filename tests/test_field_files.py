"""DICOM, NIfTI, HEIC, GeoTIFF scenes and slides, against the values they were made from."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data.arrays import read_numbers
from mocofast.data.decoding import decode, read_header
from mocofast.data.interface import BatchSlice
from mocofast.data.items import Item
from mocofast.data.loaders import build_loader, dali_missing, eval_batches, pixels_of
from mocofast.data.prepare import PrepareConfig, prepare
from mocofast.data.ranges import parse_range, to_levels
from mocofast.data.remarks import remarks
from mocofast.data.scenes import covered, grid
from mocofast.data.sources import load_datasets
from mocofast.data.statistics import StatsConfig, measure
from tests import field_files
from tests.field_files import CT, DICOM, STACK, VOLUME, X12
from tests.kinds import C8

for library in ("pydicom", "nibabel", "pillow_heif", "rasterio", "tiffslide", "tifffile"):
    pytest.importorskip(library, reason=f"{library} is not installed: see the extras in setup.py")

CPU = torch.device("cpu")
LOADERS = ("torchvision", "device") if dali_missing() else ("torchvision", "dali", "device")


def shown(data: DataConfig, name: str, size: int) -> dict[str, np.ndarray]:
    """Returns the whole square images that a loader shows, {name: (size, size, C)}."""
    plain = AugmentConfig(size=size, crop_scale=(1.0, 1.0), jitter=(0.0,) * 4, gray=0.0, flip=0.0)
    source = load_datasets(data).train
    data.loader, data.workers = name, 1
    loader = build_loader(source, data, (plain,), BatchSlice(len(source)), 0, CPU)
    (batch,) = loader.epoch(0)
    loader.close()
    assert loader.skipped == {}
    views = batch.views[0].permute(0, 2, 3, 1).numpy()
    return {source.name(i): view for i, view in zip(batch.index.tolist(), views)}


# DICOM


@pytest.mark.parametrize("name", [name for name in DICOM if "rgb" not in name])
def test_dicom_keeps_16_bits_where_the_encoder_takes_one_channel(name: str, tmp_path: Path) -> None:
    write, expected = DICOM[name]
    write(tmp_path / name)
    pixels = read_numbers(str(tmp_path / name), 1)
    deep = to_levels(pixels, parse_range("auto"), np.dtype(np.uint16))
    tolerance = 257 if name == "frames.dcm" else 33  # DICOM's tables round
    assert np.abs(deep / 1.0 - expected[..., :1] * 257).max() <= tolerance


def test_a_range_of_hounsfield_units_replaces_the_window(tmp_path: Path) -> None:
    DICOM["ct.dcm"][0](tmp_path / "ct.dcm")
    found = np.asarray(decode(str(tmp_path / "ct.dcm"), parse_range("-1000,400")))
    expected = np.floor(np.clip((CT + 1000.0) / 1400, 0, 1) * 255 + 0.5)
    np.testing.assert_array_equal(found[..., 0], expected)


def test_dicom_in_every_loader_the_evaluation_stats_and_prepare(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    square = X12[:40, :40]
    for i in range(4):
        field_files.dicom(folder / f"{i}.dcm", square >> i, 12)
    (folder / "bad.dcm").write_bytes((folder / "0.dcm").read_bytes()[:400])
    for channels in (1, 3):
        source = load_datasets(DataConfig(path=str(folder), channels=channels)).train
        [(images, _, index)] = eval_batches(source, 40, 9, 1, CPU, channels)
        data = DataConfig(path=str(folder), channels=channels, exclude=("bad*",))
        for name in LOADERS:
            found = shown(data, name, 40)
            assert len(found) == 4
            for i in range(4):
                top = 255 if channels == 3 else 65535
                expected = np.floor((square >> i) / 4095.0 * top + 0.5)[..., None]
                assert np.abs(found[f"{i}.dcm"] - expected).max() <= 1
                image = images[index.tolist().index(i)].permute(1, 2, 0).numpy()
                assert np.abs(image - expected).max() <= 1
    stats = measure(str(folder), StatsConfig(workers=1))
    expected = np.mean([(square >> i).mean() / 4095 for i in range(4)])
    assert stats.mean[0] == pytest.approx(expected, abs=2e-3)
    assert stats.range == "auto"
    meta = prepare(str(folder), str(tmp_path / "out"), PrepareConfig(workers=1))
    assert meta["images"] == {"all": 4}
    assert list(meta["skipped"]) == ["bad.dcm"]


def test_dicom_without_pydicom_or_a_decoder_names_the_command(tmp_path: Path) -> None:
    DICOM["x12.dcm"][0](tmp_path / "x12.dcm")
    without = mock.patch.dict(sys.modules, pydicom=None)
    with without, pytest.raises(ImportError, match=r"pip install 'mocofast\[dicom\]'"):
        decode(str(tmp_path / "x12.dcm"))
    file = tmp_path / "a.dcm"
    DICOM["jpeg2000.dcm"][0](file)
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"\xff\x51", b"\xff\x00", 1))  # of the header of JPEG 2000
    with pytest.raises(ValueError, match=r"DICOM of JPEG 2000 .* is not decoded"):
        decode(str(file))
    # JPEG-LS without a decoder
    file.write_bytes(whole.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.80", 1))
    from pydicom.pixels.decoders import JPEGLSLosslessDecoder

    none = mock.patch.object(JPEGLSLosslessDecoder, "_available", {})
    with (
        none,
        pytest.raises(ImportError, match=r"JPEG-LS .*pyjpegls.*pip install 'mocofast\[dicom\]'"),
    ):
        decode(str(file))


def test_all_frames_and_pages_are_images_where_asked(tmp_path: Path) -> None:
    import tifffile

    field_files.dicom(tmp_path / "a.dcm", STACK[:, :40, :40])
    tifffile.imwrite(tmp_path / "b.tif", STACK[:, :40, :40], photometric="minisblack")
    expected = {f"{name}[{i}]": STACK[i, :40, :40] for name in ("a.dcm", "b.tif") for i in range(7)}
    data = DataConfig(path=str(tmp_path), slices="all", include=("*.dcm", "*.tif"))
    for name in LOADERS:
        found = shown(data, name, 40)
        assert found.keys() == expected.keys()
        for key, view in found.items():
            assert np.abs(view.astype(int) - expected[key][..., None]).max() <= 1
    some = load_datasets(DataConfig(path=str(tmp_path), slices="1:6:2", include=("*.dcm",))).train
    assert [some.name(i) for i in range(len(some))] == ["a.dcm[1]", "a.dcm[3]", "a.dcm[5]"]
    whole = load_datasets(DataConfig(path=str(tmp_path), include=("*.dcm",))).train
    assert remarks(whole) == ["1 of 1 images looked at show frame 4 of 7, for example a.dcm"]


def test_files_without_an_extension_are_read_where_asked(tmp_path: Path) -> None:
    field_files.dicom(tmp_path / "IM0001", X12[:40, :40], 12)
    Image.fromarray(C8[:40, :40]).save(tmp_path / "photo.png")
    assert len(load_datasets(DataConfig(path=str(tmp_path))).train) == 1
    for name in LOADERS:
        found = shown(DataConfig(path=str(tmp_path), reader="any"), name, 40)
        expected = np.floor(X12[:40, :40] / 4095.0 * 255 + 0.5)[..., None]
        assert np.abs(found["IM0001"] - expected).max() <= 1
        assert np.abs(found["photo.png"].astype(int) - C8[:40, :40]).max() <= 1


# NIfTI


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_are_upright_for_every_order_of_axes(codes: str, plane: str, tmp_path: Path) -> None:
    end = "nii.gz" if codes == "LPS" else "nii"
    field_files.nifti(tmp_path / f"a.{end}", VOLUME, codes)
    source = load_datasets(DataConfig(path=str(tmp_path), plane=plane)).train
    assert len(source) == {"axial": 9, "coronal": 14, "sagittal": 12}[plane]
    for i in range(len(source)):
        item = source.load(i)
        assert isinstance(item, Item)
        expected = field_files.slice_of(VOLUME, plane, i)
        np.testing.assert_array_equal(item.pixels(1).values[..., 0], expected)
        assert item.extent(1)[:2] == expected.shape
    content = (tmp_path / f"a.{end}").read_bytes()
    expected = field_files.slice_of(VOLUME, "axial", 4)
    np.testing.assert_array_equal(read_numbers(content, 1).values[..., 0], expected)
    assert read_header(content, 1).remark == "axial slice 5 of 9"


def test_volumes_of_four_dimensions_and_scaled_numbers(tmp_path: Path) -> None:
    four = np.stack([VOLUME + 1000 * i for i in range(4)], axis=3)
    field_files.nifti(tmp_path / "a.nii", four)
    source = load_datasets(DataConfig(path=str(tmp_path), channels=4)).train
    assert (source.name(2), len(source)) == ("a.nii[2]", 9)
    item = source.load(2)
    for channel in range(4):
        expected = field_files.slice_of(four[..., channel], "axial", 2)
        got = item.pixels(4).values[..., channel]  # type: ignore[union-attr]
        np.testing.assert_array_equal(got, expected)
    assert "volume 3 of 4" in read_header(str(tmp_path / "a.nii"), 1).remark
    expected = field_files.slice_of(four[..., 2], "axial", 4)
    np.testing.assert_array_equal(read_numbers(str(tmp_path / "a.nii"), 1).values[..., 0], expected)


def test_slices_of_a_volume_lie_in_one_set_and_keep_its_label(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        field_files.nifti(tmp_path / "ab"[i % 2] / f"{i}.nii", VOLUME + i)
    found = load_datasets(DataConfig(path=str(tmp_path), holdout=0.25), seed=1)
    assert found.val is not None
    train, val = (
        {part.name(i).partition("[")[0] for i in range(len(part))}
        for part in (found.train, found.val)
    )
    assert not train & val
    assert (len(found.train), len(found.val)) == (6 * 9, 2 * 9)
    assert "6 files give 54 images: slices or frames" in found.lines()
    assert found.train.labels is not None
    for i, label in enumerate(found.train.labels.tolist()):
        assert found.train.name(i).startswith(f"{found.train.classes[label]}/")


# HEIC and AVIF


@pytest.mark.parametrize("kind", ["heic", "avif"])
def test_heic_and_avif_show_their_pixels(kind: str, tmp_path: Path) -> None:
    if kind == "heic":
        import pillow_heif

        pillow_heif.from_pillow(Image.fromarray(C8)).save(tmp_path / "a.heic", quality=-1)
    else:
        Image.fromarray(C8).save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    source = load_datasets(DataConfig(path=str(tmp_path))).train
    assert (
        np.abs(np.asarray(decode(source.load(0))).astype(int) - C8).max() <= 8
    )  # HEIC halves the colours' size
    assert not read_header(source.load(0)).plain  # type: ignore[arg-type]


# Windows


def test_the_grid_covers_the_image_and_ends_at_the_border() -> None:
    for size, window, stride in (((50, 70), 16, 16), ((64, 64), 16, 16), ((10, 70), 16, 12)):
        windows = grid(size, window, stride)
        seen = np.zeros(size, int)
        for top, left, height, width in windows.tolist():
            assert (height, width) == (min(size[0], window), min(size[1], window))
            seen[top : top + height, left : left + width] += 1
        assert seen.min() >= 1
    mask = np.zeros((25, 35), bool)
    mask[:8, :16] = True
    share = covered(mask, (50, 70), grid((50, 70), 16, 16))
    assert share[0] == 1.0
    assert share[-1] == 0.0


def test_windows_of_a_scene_in_every_loader(tmp_path: Path) -> None:
    y, x = np.mgrid[0:50, 0:70]
    bands = np.stack([500 * c + 10 * y + 3 * x + 1 for c in range(13)], axis=2).astype(np.uint16)
    field_files.geotiff(tmp_path / "scene.tif", bands)
    data = DataConfig(path=str(tmp_path), channels=13, window=16, range="divide:10000")
    chosen = DataConfig(path=str(tmp_path), bands=(4, 3, 2), window=16, range="0,8000")
    places = grid((50, 70), 16, 16).tolist()
    for name in LOADERS:
        found, rgb = shown(data, name, 16), shown(chosen, name, 16)
        assert len(found) == len(rgb) == len(places) == 20
        for top, left, _, _ in places:
            part = bands[top : top + 16, left : left + 16].astype(float)
            expected = np.floor(part.clip(0, 10000) / 10000 * 65535 + 0.5)
            np.testing.assert_array_equal(found[f"scene.tif[{top},{left}]"], expected)
            expected = np.floor(part[..., [3, 2, 1]].clip(0, 8000) / 8000 * 255 + 0.5)
            got = rgb[f"scene.tif[{top},{left}]"].astype(int)
            assert np.abs(got - expected).max() <= 1
    first = load_datasets(data).train.fingerprint()
    assert load_datasets(data).train.fingerprint() == first
    data.stride = 8
    assert load_datasets(data).train.fingerprint() != first


@pytest.mark.parametrize("window", [0, 40])
def test_bands_of_radar_and_an_infrared_that_gdal_calls_alpha(window: int, tmp_path: Path) -> None:
    y, x = np.mgrid[0:40, 0:40]
    radar = np.dstack([1000 * y + 7 * x, 65535 - 900 * x - 11 * y]).astype(np.uint16)
    infrared = np.dstack([C8[:40, :40], 6 * y]).astype(np.uint8)
    for folder, bands, options in (("two", radar, {}), ("four", infrared, {"photometric": "RGB"})):
        (tmp_path / folder).mkdir()
        field_files.geotiff(tmp_path / folder / "a.tif", bands, **options)
        data = DataConfig(path=str(tmp_path / folder), channels=bands.shape[2], window=window)
        assert remarks(load_datasets(data).train, data.channels) == []
        for name in LOADERS:
            (view,) = shown(data, name, 40).values()
            np.testing.assert_array_equal(view, bands * np.uint16(1 if folder == "two" else 257))


def test_windows_without_values_are_left_out(tmp_path: Path) -> None:
    scene = np.full((64, 64, 1), 7, np.int16)
    scene[:, 32:] = -999
    field_files.geotiff(tmp_path / "scene.tif", scene, nodata=-999)
    found = load_datasets(DataConfig(path=str(tmp_path), channels=1, window=16))
    names = [found.train.name(i) for i in range(len(found.train))]
    assert names == [f"scene.tif[{top},{left}]" for top in (0, 16, 32, 48) for left in (0, 16)]
    assert "1 file give 8 images: windows of 16 pixels" in found.lines()
    every = load_datasets(DataConfig(path=str(tmp_path), channels=1, window=16, cover=0.0)).train
    assert len(every) == 16
    assert pixels_of(every, 1) is not None


def test_tiles_of_a_slide_show_tissue(tmp_path: Path) -> None:
    glass = np.full((256, 256, 3), 240, np.uint8)
    y, x = np.mgrid[0:128, 0:128]
    tissue = np.stack([150 + x // 4, 60 + y // 4, 140 + (x + y) // 8], axis=2)
    glass[64:192, 64:192] = tissue
    field_files.slide(tmp_path / "a.svs", [glass, glass[::2, ::2]])
    found = shown(DataConfig(path=str(tmp_path), window=32, cover=0.5), LOADERS[0], 32)
    assert found.keys() == {
        f"a.svs[{64 + 32 * i},{64 + 32 * j}]" for i in range(4) for j in range(4)
    }
    for name in LOADERS:
        coarse = shown(DataConfig(path=str(tmp_path), window=32, level=1, cover=0.5), name, 32)
        assert coarse.keys() == {
            f"a.svs[{32 + 32 * i},{32 + 32 * j}]" for i in (0, 1) for j in (0, 1)
        }
        got = coarse["a.svs[32,64]"].astype(int)
        assert np.abs(got - glass[::2, ::2][32:64, 64:96]).mean() <= 3
    assert len(load_datasets(DataConfig(path=str(tmp_path), window=32, cover=0.0)).train) == 64
    wrong = load_datasets(DataConfig(path=str(tmp_path), window=32, level=5)).train
    with pytest.raises(ValueError, match=r"has 2 levels, data\.level=5"):
        decode(wrong.load(0))
    field_files.slide(tmp_path / "a.svs", [np.full_like(glass, 240)])
    with pytest.raises(ConfigError, match=r"data\.window: no window of 1 file shows data\.cover"):
        load_datasets(DataConfig(path=str(tmp_path), window=32))
