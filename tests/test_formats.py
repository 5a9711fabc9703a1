"""Every kind of file against the picture that the file was made from, in every loader."""

from __future__ import annotations

import io
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from mocofast.cli import main
from mocofast.config import ConfigError, DataConfig
from mocofast.data.arrays import PixelFormat, read_numbers
from mocofast.data.decoding import decode, read_header, read_pixels
from mocofast.data.evaluation import center_view
from mocofast.data.interface import BatchSlice, Loader, sample_view
from mocofast.data.loaders import build_loader, dali_missing, eval_batches
from mocofast.data.prepare import PrepareConfig, prepare
from mocofast.data.probing import FORMATS
from mocofast.data.ranges import Pixels, parse_range, range_of, set_range, to_uint8
from mocofast.data.sources import FolderSource, find_images, load_datasets
from mocofast.data.statistics import StatsConfig, measure
from mocofast.data.torchvision_loader import apply_view
from tests import kinds, runs
from tests.formats import PAGE, PLAIN, SEED, loader_differences, page
from tests.kinds import H, Kind, W
from tests.odd_kinds import EVERY_KIND as KINDS
from tests.odd_kinds import write_all
from tests.pictures import shard_datasets

tifffile = pytest.importorskip(
    "tifffile", reason="tifffile is not installed: pip install 'mocofast[images]'"
)
for library in ("imagecodecs", "rasterio", "pydicom", "nibabel", "pillow_heif"):
    pytest.importorskip(library, reason=f"{library} is not installed: see the extras in setup.py")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a file of every kind."""
    out = tmp_path_factory.mktemp("kinds")
    write_all(out)
    return out


def error(pixels: np.ndarray, kind: Kind) -> float:
    assert pixels.shape == kind.expected.shape, kind.name
    return float(np.abs(pixels - kind.expected).max())


# The pixels


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_shows_the_picture_that_it_was_made_from(kind: Kind, folder: Path) -> None:
    file = folder / kind.name
    for item in (str(file), file.read_bytes()):
        header = read_header(item)
        image = decode(item)
        assert image.mode == "RGB"
        assert (header.height, header.width) == (image.height, image.width) == (H, W)
        assert error(np.asarray(image).astype(float), kind) <= kind.tolerance
        assert kind.remark in header.remark
        assert bool(kind.remark) == bool(header.remark)


NUMBERS: dict[str, np.ndarray] = {
    "gray.png": kinds.G8,
    "gray16.png": kinds.G16,
    "rgb16.png": kinds.C16,
    "m100.pgm": kinds.levels(kinds.GRAY, 100),
    "m4095.pgm": kinds.levels(kinds.GRAY, 4095),
    "m4095.ppm": kinds.levels(kinds.RGB, 4095),
    "gray12.jp2": kinds.levels(kinds.GRAY, 4095),
    "rgb12.jp2": kinds.levels(kinds.RGB, 4095),
    "white16.tif": 65535 - kinds.G16.astype(int),
    "rgb16.tif": kinds.C16,
    "int16.tif": kinds.HOUNSFIELD,
    "int8.tif": kinds.G8.astype(int) - 128,
    "uint32.tif": kinds.levels(kinds.GRAY, 10**6),
    "double01.tif": kinds.GRAY,
    "turned6.tif": kinds.C8,
    "bits12.tif": kinds.levels(kinds.GRAY, 4095),
    "bits12-rgb.tif": kinds.levels(kinds.RGB, 4095),
    "gdal16.jp2": kinds.C16,
    "signed.jp2": kinds.HOUNSFIELD,
    "preview16.tif": kinds.C16,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_read_as_they_were_written(name: str, folder: Path) -> None:
    expected = NUMBERS[name].reshape(H, W, -1)
    np.testing.assert_array_equal(read_pixels(str(folder / name)).values, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bands13.tif", kinds.BANDS16),
        ("channels.ome.tif", np.moveaxis(kinds.FLUOR, 0, 2)),
        ("imagej.tif", np.moveaxis(kinds.FLUOR, 0, 2)),
        ("stack.tif", np.moveaxis(kinds.STACK, 0, 2)),
        ("two8.tif", np.dstack([kinds.G8, kinds.ALPHA])),
        ("near-infrared.tif", np.dstack([kinds.C8, kinds.G8])),
        ("gdal5.jp2", np.dstack([kinds.C8, kinds.C8[..., :2]])),
    ],
)
def test_all_channels_are_read_where_the_encoder_takes_as_many(
    name: str, expected: np.ndarray, folder: Path
) -> None:
    count = expected.shape[2]
    pixels = read_pixels(str(folder / name), wanted=count)
    np.testing.assert_array_equal(pixels.values, expected)
    assert read_header(str(folder / name), wanted=count).remark == ""


LUMA = (0.299, 0.587, 0.114)


@pytest.mark.parametrize(
    ("name", "expected", "remark"),
    [
        ("rgb.png", kinds.C8 @ LUMA, ""),
        ("rgb.tif", kinds.C8 @ LUMA, ""),
        ("rgb16.png", kinds.C16 @ LUMA, ""),
        ("rgb16.tif", kinds.C16 @ LUMA, ""),
        ("float01-rgb.tif", kinds.RGB @ LUMA, ""),
        ("near-infrared.tif", kinds.C8 @ LUMA, "channels 1 to 3 of 4"),
        ("bands13.tif", kinds.BANDS16[..., 0], "channel 1 of 13"),
        ("channels.ome.tif", kinds.FLUOR[0], "channel 1 of 5"),
        ("two8.tif", kinds.G8, "channel 1 of 2"),
        ("nodata16-rgb.tif", np.where(kinds.HOLE, 0, kinds.C16 @ LUMA), ""),
    ],
)
def test_one_channel_is_the_gray_of_colours_or_the_first_channel(
    name: str, expected: np.ndarray, remark: str, folder: Path
) -> None:
    values = read_numbers(str(folder / name), 1).values[..., 0]
    tolerance = 1e-6 if values.dtype.kind == "f" else 0.51
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
    found = read_header(str(folder / name), 1).remark
    assert found.startswith(remark) and bool(found) == bool(remark)


# Ranges


def in_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.floor(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255 + 0.5)


@pytest.mark.parametrize(
    ("text", "name", "low", "high"),
    [
        ("dtype", "int16.tif", -32768, 32767),
        ("-700,700", "int16.tif", -700, 700),
        ("0,40000", "gray16.tif", 0, 40000),
        ("divide:10000", "bands13.tif", 0, 10000),
        ("0,3000", "m4095.pgm", 0, 3000),
        ("0,3000", "gray12.jp2", 0, 3000),
        ("20,200", "gray.png", 20, 200),
        ("0.25,0.75", "float01.tif", 0.25, 0.75),
    ],
)
def test_a_range_scales_the_numbers(
    text: str, name: str, low: float, high: float, folder: Path
) -> None:
    values = read_pixels(str(folder / name)).values
    shown = np.asarray(decode(str(folder / name), parse_range(text)))
    np.testing.assert_array_equal(shown, np.broadcast_to(in_range(values, low, high), shown.shape))


def test_a_range_of_8_bits_changes_no_photo(folder: Path) -> None:
    for name in ("rgb.jpg", "gray.png", "alpha.png", "palette.png", "cmyk.tif"):
        plain = np.asarray(decode(str(folder / name)))
        for text in ("dtype", "0,255", "divide:255"):
            again = decode(str(folder / name), parse_range(text))
            np.testing.assert_array_equal(np.asarray(again), plain)


def test_ranges_and_percentiles_apply_to_every_channel(folder: Path) -> None:
    path = str(folder / "rgb16.tif")
    values = read_pixels(path).values
    shown = np.asarray(decode(path, parse_range("0,50000,1000,60000,0,65535")))
    for channel, (low, high) in enumerate(((0, 50000), (1000, 60000), (0, 65535))):
        expected = in_range(values[..., channel], low, high)
        np.testing.assert_array_equal(shown[..., channel], expected)
    shown = np.asarray(decode(path, parse_range("percentile:2,98")))
    for channel in range(3):
        low, high = np.quantile(values[..., channel].astype(float), (0.02, 0.98))
        np.testing.assert_array_equal(
            shown[..., channel], in_range(values[..., channel], low, high)
        )
    with pytest.raises(ConfigError, match=r"data\.range: got ranges for 2 channels.* has 3"):
        decode(path, parse_range("0,1,0,2"))


BY_CHANNEL = "10,200,0,150,20,250"


def by_channel(gray: np.ndarray) -> np.ndarray:
    """Returns gray (H, W) in the ranges of BY_CHANNEL, (H, W, 3) uint8."""
    planes = [in_range(gray, low, high) for low, high in ((10, 200), (0, 150), (20, 250))]
    return np.stack(planes, axis=2).astype(np.uint8)


def test_gray_takes_the_ranges_of_three_channels(folder: Path, tmp_path: Path) -> None:
    gray = kinds.G8
    tifffile.imwrite(tmp_path / "nodata.tif", gray, extratags=[(42113, 2, 4, "300", True)])
    Image.fromarray(gray).convert("LA").save(tmp_path / "alpha.png")
    np.save(tmp_path / "gray.npy", gray)
    files = [folder / "gray.png", *tmp_path.iterdir()]
    for file in files:
        levels = np.asarray(decode(str(file), parse_range(BY_CHANNEL)))
        np.testing.assert_array_equal(levels, by_channel(gray), err_msg=file.name)
        other = PixelFormat(3, np.dtype(np.uint8), parse_range(BY_CHANNEL)).load(str(file))
        np.testing.assert_array_equal(other, levels, err_msg=file.name)
    with pytest.raises(ConfigError, match="got ranges for 2 channels, but the image has 1"):
        decode(str(files[0]), parse_range("0,1,0,2"))


@pytest.mark.parametrize(
    "text", ["", "min,max", "5,1", "0", "divide:0", "percentile:1", "percentile:1,101", "x:1,2"]
)
def test_a_range_without_a_meaning_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.range: expected auto, dtype, min,max"):
        parse_range(text)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_missing_values_become_the_mean_of_their_channel(dtype: str) -> None:
    """Images above and below the size from which a table is used give the same pixels."""
    rng = np.random.default_rng(0)
    values = rng.integers(1, 100, (300, 300, 2)).astype(dtype)
    missing = rng.random(values.shape) < 0.3
    values[missing] = 101
    pixels = Pixels(values, 0.0, 127.0, nodata=101.0)
    shown = to_uint8(pixels, parse_range("0,120"))
    for channel in range(2):
        plane, hidden = values[..., channel].astype(float), missing[..., channel]
        np.testing.assert_array_equal(
            shown[..., channel][~hidden], in_range(plane, 0, 120)[~hidden]
        )
        filled = (plane[~hidden] / 120 * 255).mean()
        assert np.abs(shown[..., channel][hidden] - filled).max() <= 0.5
    small = to_uint8(pixels._replace(values=values[:9]), parse_range("0,120"))
    same = ~missing[:9]
    np.testing.assert_array_equal(small[same], shown[:9][same])


def test_the_range_belongs_to_a_set_and_its_parts(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            shutil.copy(folder / "int16.tif", tmp_path / name / f"{i}.tif")
    train, val, *_ = load_datasets(DataConfig(path=str(tmp_path), holdout=0.25, range="-700,700"))
    assert val is not None
    for part in (train, val):
        assert range_of(part) == parse_range("-700,700")
        [(images, _, _)] = eval_batches(part, size=40, batch_size=9, workers=0)
        picture = Image.fromarray(in_range(kinds.HOUNSFIELD, -700, 700).astype(np.uint8))
        np.testing.assert_array_equal(images[0, 0].numpy(), np.asarray(center_view(picture, 40)))


# The loaders and the evaluation


def loader_of(source: FolderSource, name: str, batch_size: int) -> Loader:
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    data = DataConfig(loader=name, workers=1)
    return build_loader(source, data, (PLAIN,), BatchSlice(batch_size), SEED, CPU)


@pytest.mark.parametrize("name", ["torchvision", "dali", "device"])
def test_every_loader_shows_every_kind(name: str, folder: Path) -> None:
    if name == "dali" and dali_missing():
        pytest.skip("DALI is not installed")
    found = loader_differences(name, folder)
    # 1 for the rounding of the resize
    wrong = {k.name: found[k.name] for k in KINDS if found[k.name] > k.tolerance + 1}
    assert wrong == {}


def test_the_evaluation_shows_every_kind(folder: Path) -> None:
    source = FolderSource(folder, [kind.name for kind in KINDS])
    [(images, _, index)] = eval_batches(source, size=40, batch_size=999, workers=1)
    for image, i in zip(images.permute(0, 2, 3, 1).numpy(), index.tolist()):
        kind = KINDS[i]
        picture = Image.fromarray(np.rint(kind.expected).astype(np.uint8))
        expected = np.asarray(center_view(picture, 40)).astype(int)
        assert np.abs(image - expected).max() <= kind.tolerance + 1, kind.name
    assert len(images) == len(KINDS)


@pytest.mark.parametrize("name", ["torchvision", "dali", "device"])
def test_every_loader_takes_the_range_of_the_set(name: str, folder: Path) -> None:
    source = FolderSource(folder, ["int16.tif", "gray12.jp2", "m4095.pgm", "gray.png"])
    set_range(source, "0,2000")
    loader = loader_of(source, name, 4)
    (batch,) = loader.epoch(0)
    loader.close()
    for view, index in zip(batch.views[0].permute(0, 2, 3, 1).numpy(), batch.index.tolist()):
        scaled = in_range(NUMBERS[source.name(index)], 0, 2000).astype(np.uint8)
        params = sample_view(PLAIN, (H, W), SEED, 0, index, 0)
        picture = Image.fromarray(scaled).convert("RGB")
        expected = np.asarray(apply_view(picture, params, PLAIN)).astype(int)
        assert np.abs(view - expected).max() <= 1, source.name(index)


@pytest.mark.parametrize("name", ["torchvision", "dali", "device"])
def test_every_loader_scales_gray_by_the_ranges_of_the_channels(name: str, folder: Path) -> None:
    source = FolderSource(folder, ["gray.png", "gray.jpg"])
    set_range(source, BY_CHANNEL)
    loader = loader_of(source, name, 2)
    (batch,) = loader.epoch(0)
    loader.close()
    assert sorted(batch.index.tolist()) == [0, 1]
    for view, index in zip(batch.views[0].permute(0, 2, 3, 1).numpy(), batch.index.tolist()):
        with Image.open(folder / source.name(index)) as image:
            picture = Image.fromarray(by_channel(np.asarray(image)))
        params = sample_view(PLAIN, (H, W), SEED, 0, index, 0)
        expected = np.asarray(apply_view(picture, params, PLAIN)).astype(int)
        assert np.abs(view - expected).max() <= 1, source.name(index)


# Bad files


def spoil(folder: Path, out: Path) -> dict[str, str]:
    """Writes bad files of many kinds. Returns {name: a word of the expected reason}."""
    complex_numbers = out / "complex.tif"
    tifffile.imwrite(complex_numbers, kinds.GRAY.astype(np.complex64))
    (out / "mp4.tif").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    (out / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    hollow = bytearray((folder / "float01.tif").read_bytes())
    place = hollow.index(struct.pack("<HHII", 256, 4, 1, W))  # the tag of the width
    hollow[place : place + 12] = struct.pack("<HHII", 256, 4, 1, 2_000_000)
    (out / "hollow.tif").write_bytes(hollow)
    found = {
        "hollow.tif": "truncated",
        "complex.tif": "no order",
        "mp4.tif": "cannot identify",
        "svg.png": "cannot identify",
    }
    for name in ("float01.tif", "m4095.pgm", "stack.tif", "bands13.tif", "rgb.webp", "gray12.jp2"):
        content = (folder / name).read_bytes()
        (out / f"half-{name}").write_bytes(content[: len(content) // 2])
        found[f"half-{name}"] = ""
    return found


@pytest.mark.parametrize("name", ["torchvision", "dali", "device"])
def test_bad_files_of_every_kind_are_skipped_and_named(
    name: str, folder: Path, tmp_path: Path
) -> None:
    bad = spoil(folder, tmp_path)
    for i in range(12):
        shutil.copy(folder / "gray.png", tmp_path / f"good{i:02}.png")
    source = FolderSource(tmp_path, find_images(tmp_path))
    loader = loader_of(source, name, len(source))
    (batch,) = loader.epoch(0)
    loader.close()
    assert {source.name(i) for i in loader.skipped} == set(bad)
    for index, reason in loader.skipped.items():
        assert bad[source.name(index)] in reason
        assert reason
    assert {source.name(i)[:4] for i in batch.index.tolist()} == {"good"}
    evaluated = eval_batches(source, size=32, batch_size=99, workers=0)
    assert sum(len(index) for _, _, index in evaluated) == 12
    assert evaluated.skipped.keys() == loader.skipped.keys()


def test_only_files_whose_header_both_parsers_accept_reach_dalis_decoder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from mocofast.data import dali_loader

    spoil(folder, tmp_path)
    for kind in KINDS:
        shutil.copy(folder / kind.name, tmp_path)
    fed: list[bytes] = []
    item = dali_loader._Batches._item

    def spy(self: dali_loader._Batches, index: int, *rest: Any) -> np.ndarray | str:
        found = item(self, index, *rest)
        if isinstance(found, np.ndarray):
            fed.append(found.tobytes())
        return found

    monkeypatch.setattr(dali_loader._Batches, "_item", spy)
    source = FolderSource(tmp_path, find_images(tmp_path))
    loader = loader_of(source, "dali", len(source))
    next(iter(loader.epoch(0)))
    loader.close()
    nvimgcodec = pytest.importorskip("nvidia.nvimgcodec")
    assert len(fed) >= len(source)
    for content in set(fed):
        with Image.open(io.BytesIO(content)) as image:
            stream = nvimgcodec.CodeStream(content)
            assert (stream.width, stream.height) == image.size
            assert stream.codec_name == FORMATS[str(image.format)]
            assert stream.dtype in (np.uint8, np.uint16)
            assert content.startswith(b"P6") or read_header(content).plain


def test_a_file_that_dali_alone_refuses_is_decoded_in_python(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from mocofast.data import planning

    for i in range(4):
        shutil.copy(folder / "gray.png", tmp_path / f"{i}.png")
    shutil.copy(folder / "gif.png", tmp_path / "gif.png")
    (tmp_path / "half.png").write_bytes((folder / "rgb.png").read_bytes()[:900])
    source = FolderSource(tmp_path, find_images(tmp_path))
    monkeypatch.setattr(planning, "accepts", lambda file, header: True)
    loader = loader_of(source, "dali", 6)
    (batch,) = loader.epoch(0)
    loader.close()
    assert {source.name(i) for i in loader.skipped} == {"half.png"}
    shown = dict(zip((source.name(i) for i in batch.index.tolist()), batch.views[0]))
    index = next(i for i in range(6) if source.name(i) == "gif.png")
    params = sample_view(PLAIN, (H, W), SEED, 0, index, 0)
    picture = Image.fromarray(kinds.G8).convert("RGB")
    expected = np.asarray(apply_view(picture, params, PLAIN)).astype(int)
    assert np.abs(shown["gif.png"].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_a_run_goes_on_where_dali_refuses_a_file_that_nvimagecodec_decodes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI fails without saying which file is bad, and the search finds none."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from mocofast.data import planning

    for name in ("gray.png", "rgb.jpg", "bits4.tif"):
        shutil.copy(folder / name, tmp_path)
    source = FolderSource(tmp_path, find_images(tmp_path))
    batches = {}
    for name in ("torchvision", "dali"):
        loader = loader_of(source, name, 3)
        monkeypatch.setattr(planning, "accepts", lambda file, header: True)
        (batches[name],) = loader.epoch(0)
        loader.close()
        assert loader.skipped == {}
    expected, got = batches["torchvision"], batches["dali"]
    assert torch.equal(expected.index, got.index)
    assert (expected.views[0].int() - got.views[0].int()).abs().max() <= 1


def test_a_missing_library_is_named_with_its_pip_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for name in ("double01.tif", "bands13.tif", "stack.tif"):
        with pytest.raises(ImportError, match=r"tifffile: pip install 'mocofast\[images\]'"):
            decode(str(folder / name))
    with pytest.raises(ImportError, match=r"imagecodecs: pip install 'mocofast\[images\]'"):
        decode(str(folder / "rgb16.png"), parse_range("0,4095"))
    # Kinds that PIL reads need no library.
    for name in ("int16.tif", "float01.tif", "uint32.tif", "int8.tif", "white16.tif", "nodata.tif"):
        kind = next(kind for kind in KINDS if kind.name == name)
        pixels = np.asarray(decode(str(folder / name))).astype(float)
        assert error(pixels, kind) <= kind.tolerance


# Small inputs that failed


CASES = [
    ("01_float_tiff/gray_f32_01_tif", "auto", 150),
    ("01_float_tiff/dem_f32_nodata_tif", "auto", 150),
    ("02_pgm_maxval/pgm_max4095", "auto", 150),
    ("02_pgm_maxval/ppm_max4095", "auto", 150),
    ("03_jp2_12bit/g8_j2k", "auto", 100),
    ("03_jp2_12bit/jpeg2000_12bit_jp2", "auto", 150),
    ("05_tiff_orientation/orient6_tif", "auto", 100),
    ("06_int16_tiff_kills_run/photos", "auto", 100),
    ("07_12bit_in_16bit/gray12in16_tif", "0,4095", 150),
    ("08_sentinel2/s2_rgb_u16_tif", "0,3000", 100),
    ("08_sentinel2/s2_13band_u16_tif", "0,4500", 100),
    ("09_pages_channels/ome_5ch_u16_tif", "auto", 150),
    ("09_pages_channels/zstack_u8_tif", "auto", 100),
    ("10_miniswhite16/miniswhite_u16_tif", "auto", 150),
    ("19_alpha/rgba_assoc_tif", "auto", 50),
]


@pytest.mark.parametrize(("case", "text", "levels"), CASES)
def test_cases_show_the_same_in_all_loaders_and_in_evaluation(
    case: str, text: str, levels: int, cases: Path
) -> None:
    source = FolderSource(cases / case, find_images(cases / case))
    set_range(source, text)
    shown: dict[str, dict[int, np.ndarray]] = {}
    names = ["torchvision", "dali", "device"]
    if dali_missing():
        names.remove("dali")
    if "06" in case:  # images of two sizes
        names.remove("device")
    for name in names:
        loader = loader_of(source, name, len(source))
        (batch,) = loader.epoch(0)
        loader.close()
        assert loader.skipped == {}
        shown[name] = dict(zip(batch.index.tolist(), batch.views[0].int().numpy()))
    assert shown["torchvision"].keys() == set(range(len(source)))
    for name in names[1:]:
        for index, view in shown["torchvision"].items():
            assert np.abs(view - shown[name][index]).max() <= 1
    pixels = [np.asarray(decode(source.load(i), range_of(source))) for i in range(len(source))]
    assert all(len(np.unique(image)) >= levels for image in pixels)
    for images, _, index in eval_batches(source, 48, 99, 0):
        expected = [np.asarray(center_view(Image.fromarray(pixels[i]), 48)) for i in index.tolist()]
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_a_run_goes_on_beside_a_file_of_another_kind(cases: Path, tmp_path: Path) -> None:
    done = runs.mocofast(
        *("pretrain", "digits", "--data.path", str(cases / "06_int16_tiff_kills_run/photos")),
        *("--data.source", "folder", "--train.epochs", "1", "--data.batch_size", "8"),
        *("--augment.size", "32", "--train.dir", str(tmp_path / "run"), "--knn.every", "0"),
    )
    assert "int16 numbers from -700 to 700 (ct.tif)" in done.stdout
    assert "--data.range -700,700" in done.stdout


# Long images, statistics, prepare, runs


def test_a_set_of_12_bits_trains_resumes_exactly_and_is_evaluated(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for i in range(24):
        path = images / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = kinds.levels(kinds.GRAY[:24, 2 * (i % 2) : 2 * (i % 2) + 24], 2000 + 60 * i)
        tifffile.imwrite(path, shade.astype(np.uint16))
    base = [
        *("pretrain", "digits", "--data.source", "folder", "--data.path", str(images)),
        *("--data.range", "0,4095", "--data.batch_size", "6", "--data.holdout", "0.25"),
        *("--augment.size", "16", "--train.epochs", "2", "--model.queue_size", "24"),
    ]
    assert main([*base, "--train.dir", str(tmp_path / "whole")]) == 0
    assert main([*base, "--train.dir", str(tmp_path / "part"), "--train.max_steps", "2"]) == 0
    assert main(["pretrain", "--resume", str(tmp_path / "part"), "--train.max_steps", "0"]) == 0
    runs.assert_same_run(tmp_path / "part", tmp_path / "whole")
    config = (tmp_path / "whole" / "config.yaml").read_text("utf-8")
    assert "range: 0,4095" in config
    log = (tmp_path / "whole" / "train.log").read_text("utf-8")
    assert "--data.range" not in log
    assert main(["knn", str(tmp_path / "whole"), "--knn.k", "5"]) == 0


def test_only_the_crop_of_a_long_image_is_resized() -> None:
    rng = np.random.default_rng(0)
    for width, height in ((8, 600), (600, 9), (3, 100)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        short = transforms.Resize(round(64 * 256 / 224))
        expected = np.asarray(transforms.CenterCrop(64)(short(image))).astype(int)
        assert np.abs(np.asarray(center_view(image, 64)) - expected).max() <= 2
    begin = time.perf_counter()
    for size in ((8, 2000), (1, 8000), (8000, 1)):
        assert center_view(Image.new("RGB", size), 224).size == (224, 224)
    assert time.perf_counter() - begin < 1


def test_statistics_are_the_means_and_deviations_of_the_pixels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(300, 4000, (5, 20, 30, 3)).astype(np.uint16)
    for i, picture in enumerate(pictures):
        tifffile.imwrite(tmp_path / f"{i}.tif", picture, photometric="rgb")
    (tmp_path / "bad.tif").write_bytes(b"no image")
    assert main(["stats", str(tmp_path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert f"uint16 numbers from {pictures.min()} to {pictures.max()}" in out
    assert "5 images measured, 1 left out" in out
    options = dict(zip(out.split()[-6::2], out.split()[-5::2]))
    assert options["--data.range"] == "0,4095"
    scaled = pictures / 4095
    for name, expected in (
        ("mean", scaled.mean((0, 1, 2))),
        ("std", scaled.std((0, 1, 2))),
    ):
        found = [float(part) for part in options[f"--augment.{name}"].split(",")]
        np.testing.assert_allclose(found, expected, atol=1e-3)  # rounded to 8 bits


def test_prepare_stores_the_numbers_of_a_range_as_8_bits(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("int16.tif", "gray.png"):
        shutil.copy(folder / name, tmp_path / "in")
    for size, bound in ((100, 0), (20, 12)):
        out = tmp_path / f"out{size}"
        prepare(str(tmp_path / "in"), str(out), PrepareConfig(size=size, workers=1, range="0,255"))
        source, _, _ = shard_datasets(out)
        assert len(source) == 2
        for i in range(2):
            stored = decode(source.load(i))
            name = "int16.tif" if "int16" in source.name(i) else "gray.png"
            original = decode(str(folder / name), parse_range("0,255"))
            expected = original.resize(stored.size, Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(stored).astype(int) - np.asarray(expected)).max() <= bound


def test_stats_and_prepare_say_which_channels_they_leave_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(folder / "bands13.tif", tmp_path / "in")
    words = "1 of 1 images looked at show channels 1 to 3 of 13"
    assert words in measure(str(tmp_path / "in"), StatsConfig(workers=1)).report()
    every = measure(str(tmp_path / "in"), StatsConfig(workers=1, channels=13))
    assert every.remarks == []
    meta = prepare(str(tmp_path / "in"), str(tmp_path / "out"), PrepareConfig(workers=1))
    (line,) = meta["remarks"]
    assert line.startswith(words) and line.endswith("stores RGB of 8 bits")


# The page


def test_the_page_on_formats_is_what_the_generator_writes(tmp_path: Path) -> None:
    """The differences vary by 1 with the processor and the versions of the libraries."""
    if dali_missing():
        pytest.skip("DALI is not installed")
    written, now = (
        [line.rsplit("|", 2) for line in text.partition("\nMeasured")[0].splitlines()]
        for text in (PAGE.read_text(encoding="utf-8"), page(tmp_path))
    )
    assert [line[0] for line in written] == [line[0] for line in now]
    for before, after in zip(written, now):
        if before[1:] and "/" in before[1]:
            pairs = zip(before[1].split("/"), after[1].split("/"))
            assert all(abs(int(a) - int(b)) <= 1 for a, b in pairs), before[0]
