"""Writes docs/formats.md: what an encoder sees of every kind of file, in every loader.

usage: python -m tests.formats
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.decoding import decode, read_header
from mocofast.data.interface import BatchSlice, sample_view
from mocofast.data.loaders import build_loader
from mocofast.data.probing import accepts
from mocofast.data.sources import FolderSource
from mocofast.data.torchvision_loader import apply_view
from tests.kinds import H, Kind, W
from tests.odd_kinds import EVERY_KIND, write_all

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
LOADERS = ("torchvision", "dali", "device")
LIBRARIES = (
    "pillow",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu13",
    "tifffile",
    "rasterio",
    "imagecodecs",
    "pydicom",
    "pylibjpeg-openjpeg",
    "python-gdcm",
    "nibabel",
    "pillow-heif",
)
OPTIONAL = ("tifffile", "imagecodecs", "pydicom", "nibabel", "pillow_heif")
PLAIN = AugmentConfig(size=32, jitter_p=0.0, gray=0.0, flip=0.0)
SEED = 3

# What an encoder sees, by the group of a kind.
SEES = {
    "JPEG": "the pixels, EXIF orientation not applied",
    "PNG, 8 bits and less": "the pixels, the colour under transparency",
    "PNG, animated": "the first frame",
    "PNG, 16 bits": "0 to 65535 scaled to 8 bits",
    "BMP": "the pixels, the colour under transparency",
    "WebP": "the pixels, the colour under transparency",
    "WebP, animated": "the first frame",
    "a GIF with the name of a PNG": "the first frame: the content counts, not the name",
    "PGM and PPM, maxval 255": "the pixels",
    "PGM and PPM, other maxval": "0 to maxval scaled to 8 bits",
    "PGM and PPM, ASCII": "as the binary files",
    "PBM": "black and white",
    "JPEG 2000, 8 bits": "the pixels",
    "JPEG 2000, more bits": "the whole range of the bits scaled to 8 bits",
    "JPEG 2000 of GDAL": "as above. Signed numbers: the lowest to the highest value of the image",
    "TIFF, 8 bits": "the pixels. Of a pyramid the largest level",
    "TIFF, rare compressions": "the pixels",
    "TIFF, 1 bit": "black and white. Of several pages the first",
    "TIFF, white is zero": "black and white as meant",
    "TIFF, alpha": "the colour under transparency, not multiplied by alpha",
    "TIFF, CIELAB": "sRGB",
    "TIFF, CMYK of 16 bits": "RGB of 8 bits",
    "TIFF, CMYK, alpha": "the colour under transparency",
    "TIFF, YCbCr": "RGB",
    "BigTIFF, Motorola order": "as the other order of bytes",
    "OME-TIFF, time series": "the point in time in the middle and the first channel, and a remark",
    "TIFF, 2 to 12 bits": "all bits from black to white",
    "TIFF, nodata": "the numbers as without it. Missing values are the mean of their channel",
    "TIFF, tiles left out": "0 in these tiles, or missing values where the file states nodata",
    "TIFF, smaller copy first": "the first page that is no smaller copy",
    "TIFF, orientation": "the picture set upright",
    "TIFF, 16 bits": "0 to 65535 scaled to 8 bits",
    "TIFF, float in [0, 1]": "0 to 1 scaled to 8 bits",
    "TIFF, float in [0, 255]": "the numbers, rounded",
    "TIFF, heights": "the lowest to the highest value of the image. NaN and nodata are the mean",
    "TIFF, signed or 32 bits": "int8: -128 to 127. Others: the lowest to the highest value of "
    "the image",
    "TIFF, two channels": "the first channel, and a remark in the log",
    "TIFF, more channels": "the first three channels, and a remark in the log",
    "OME-TIFF": "the first three channels, and a remark in the log. Of a pyramid the largest level",
    "ImageJ stack": "the first three channels, and a remark in the log",
    "DICOM, gray": "all stored bits from black to white. MONOCHROME1 is inverted",
    "DICOM, without a preamble": "as the other kinds",
    "DICOM, window": "the VOI window from black to white, of slope and intercept. Padding is black",
    "DICOM, table or sigmoid": "what the table or the sigmoid gives",
    "DICOM, 16 bits without a window": "unsigned: 0 to 65535. Others: the lowest to the highest "
    "value of the image",
    "DICOM, several frames": "the frame in the middle, and a remark in the log "
    "(`--data.slices all`: every frame)",
    "DICOM, colours": "the pixels",
    "DICOM, compressed": "as the other kinds. Other transfer syntaxes where a plug-in decodes them",
    "NIfTI": "every axial slice, upright (`--data.slices`, `--data.plane`), from the lowest to the "
    "highest value",
    "HEIC": "the pixels",
    "AVIF": "the pixels",
    "numpy": "the array. Floats as in TIFF",
    "TIFF, stack of pages": "the page in the middle, and a remark in the log",
}
HEAD = """# Kinds of image files

What an encoder sees of a file with `--data.range auto`. Every loader, the evaluation and
`mocofast prepare` see the same. `python -m tests.formats` writes this page from the files that
the tests make with PIL, tifffile, rasterio, imagecodecs, pydicom, nibabel and pillow-heif.

- *DALI loader*: who decodes the files in the DALI loader. Files of the Python reader, and
  damaged files, never reach DALI's decoder.
- *needs*: the library without which the files are skipped, and named with a command: `pip install
  'mocofast[images]'` for tifffile and imagecodecs, and the extras `dicom` (pydicom), `nifti`
  (nibabel) and `heic` (pillow-heif).
- *differs*: largest difference of a view from a view of the picture that the file was made
  from, of 255: torchvision loader / DALI loader / device loader. JPEG loses by design.

`--data.range` states other numbers for black and white: `dtype` (all that the type of number
holds), `min,max` (`0,4095`), `divide:N` (`divide:10000`) or `percentile:a,b` of every image. NaN,
infinity, the nodata value of GeoTIFF, and -9999 and -32768 in signed or floating numbers are
missing values: they become the mean of their channel. `mocofast stats PATH` measures a set and
prints the options. Other ranges than `auto` and `dtype` are read by the Python reader. RGB of
16 bits in PNG, and JPEG 2000, need imagecodecs then.

`--data.channels N` reads the first N channels, and 1 makes gray of colours. Transparency is a
channel where N is the number of all channels, and not 3. `--data.bands` chooses others.

Windows of large GeoTIFF scenes (`--data.window`, extra `geo`) and of whole slides (extra
`slides`) are read by rasterio and tiffslide, in every loader by the Python reader. All remaining
kinds are read by a function of yours (`--data.reader`), see [sets.md](sets.md).

| kind | files tried | the encoder sees | DALI loader | needs | differs |
|---|---|---|---|---|---|
"""


def loader_differences(
    name: str, folder: Path, kinds: Sequence[Kind] = EVERY_KIND
) -> dict[str, int]:
    """Returns the largest difference of a loader's views from the views of the pictures.

    name: of the loader.
    folder: holds a file of every kind.

    Returns {name of the file: largest difference of 255}. Raises AssertionError if a file
    was skipped.
    """
    source = FolderSource(folder, [kind.name for kind in kinds])
    data = DataConfig(loader=name, workers=1)
    batch_slice = BatchSlice(len(kinds))
    loader = build_loader(source, data, (PLAIN,), batch_slice, SEED, torch.device("cpu"))
    (batch,) = loader.epoch(0)
    loader.close()
    assert loader.skipped == {}
    assert sorted(batch.index.tolist()) == list(range(len(kinds)))
    found = {}
    for view, index in zip(batch.views[0].permute(0, 2, 3, 1).numpy(), batch.index.tolist()):
        params = sample_view(PLAIN, (H, W), SEED, 0, index, 0)
        picture = Image.fromarray(np.rint(kinds[index].expected).astype(np.uint8))
        expected = np.asarray(apply_view(picture, params, PLAIN)).astype(int)
        found[kinds[index].name] = int(np.abs(view - expected).max())
    return found


def page(folder: Path) -> str:
    """Returns the content of docs/formats.md. folder: where the files are written."""
    write_all(folder)
    measured = [loader_differences(name, folder) for name in LOADERS]
    groups: dict[str, list[Kind]] = {}
    for kind in EVERY_KIND:
        groups.setdefault(kind.group, []).append(kind)
    lines = []
    for group, kinds in groups.items():
        names = [kind.name for kind in kinds]
        dali = {accepts(str(folder / name), read_header(str(folder / name))) for name in names}
        reader = {(True,): "DALI", (False,): "Python reader"}.get(tuple(dali), "DALI or Python")
        needs = ", ".join(sorted({_needs(kind, folder) for kind in kinds} - {""}))
        worst = " / ".join(str(max(found[name] for name in names)) for found in measured)
        lines.append(
            f"| {group} | {', '.join(names)} | {SEES[group]} | {reader} | {needs} | {worst} |"
        )
    return f"{HEAD}" + "\n".join(lines) + f"\n\n{versions()}\n"


def _needs(kind: Kind, folder: Path) -> str:
    """Returns the library without which a kind is skipped, "" if none."""
    try:
        with mock.patch.dict(sys.modules, dict.fromkeys(OPTIONAL)):
            decode(str(folder / kind.name))
    except ImportError as error:
        return next(name for name in OPTIONAL if name.replace("_", "-") in str(error))
    return ""


def versions() -> str:
    """Returns a list of the versions of the libraries."""
    found = [f"- {name} {metadata.version(name)}" for name in LIBRARIES]
    return "\n".join(["Measured with", "", *found])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        PAGE.write_text(page(Path(where)), encoding="utf-8")
