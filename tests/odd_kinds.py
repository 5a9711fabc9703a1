"""Rarer kinds of files of the fields, and the list of all kinds.

`EVERY_KIND` is what the tests and docs/formats.md show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests import kinds
from tests.field_files import FIELD_KINDS, X12, dicom, geotiff
from tests.kinds import (
    ALPHA,
    C8,
    C16,
    G8,
    G16,
    GRAY,
    HOLE,
    HOUNSFIELD,
    RGB,
    STACK,
    H,
    Kind,
    W,
    gray,
    levels,
    stretched,
)

SHARE = ALPHA[..., None] / 255
MUTED = 0.5 + 0.4 * (RGB - 0.5)  # no colour outside of sRGB
HOLES = HOLE[..., None]


def _scene(pixels: np.ndarray, **options: Any) -> Callable[[Path], object]:
    return lambda path: geotiff(path, pixels.reshape(H, W, -1), **options)


def _tiff(pixels: np.ndarray, **options: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        import tifffile

        tifffile.imwrite(path, pixels, **options)

    return write


def _pages(pages: Sequence[np.ndarray], **options: Any) -> Callable[[Path], object]:
    """Writes pages one after the other. Smaller pages are copies."""

    def write(path: Path) -> None:
        import tifffile

        with tifffile.TiffWriter(path) as out:
            for page in pages:
                out.write(page, subfiletype=int(page.shape[:2] != (H, W)), **options)

    return write


def _sparse(pixels: np.ndarray) -> Callable[[Path], object]:
    """Writes the tiles of the first 32 rows and columns alone."""

    def write(path: Path) -> None:
        import rasterio

        side: dict[str, Any] = {"width": W, "height": H, "blockxsize": 16, "blockysize": 16}
        side |= {"count": 1, "dtype": pixels.dtype, "tiled": True, "sparse_ok": True}
        with rasterio.open(path, "w", driver="GTiff", **side) as out:
            out.write(pixels[:32, :32], 1, window=((0, 32), (0, 32)))

    return write


def _jpeg2000(pixels: np.ndarray, **options: Any) -> Callable[[Path], object]:
    """Writes JPEG 2000 without loss, as GDAL does."""

    def write(path: Path) -> None:
        import rasterio

        planes = np.moveaxis(pixels.reshape(H, W, -1), 2, 0)
        side: dict[str, Any] = {"width": W, "height": H, "count": len(planes)}
        with rasterio.open(
            path, "w", "JP2OpenJPEG", dtype=pixels.dtype, reversible="yes", quality="100", **side
        ) as out:
            out.write(planes)

    return write


def _old_dicom(path: Path) -> None:
    """Writes DICOM without preamble and meta data, as before 1993."""
    import pydicom

    dicom(path, X12, 12, Modality="CR", SOPClassUID="1.2.840.10008.5.1.4.1.1.1")
    whole = pydicom.dcmread(path)
    bare = pydicom.Dataset({tag: whole[tag] for tag in whole.keys()})  # noqa: SIM118
    bare.save_as(path, implicit_vr=True, little_endian=True)


def _lab() -> np.ndarray:
    """Returns CIELAB of MUTED by the formulas of CIE 15 and IEC 61966-2-1, for white D50."""
    linear = np.where(MUTED <= 0.04045, MUTED / 12.92, ((MUTED + 0.055) / 1.055) ** 2.4)
    # sRGB to XYZ of D50, as in ICC profiles
    matrix = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061]])
    matrix = np.vstack([matrix, [0.01392, 0.09708, 0.71410]])
    f = np.cbrt(linear @ matrix.T / (0.9642, 1, 0.8249))
    lightness = 116 * f[..., 1] - 16
    return np.dstack([lightness, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])])


def _without_holes(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels (H, W, C) with the mean of their channel in the holes, float64."""
    return np.where(HOLES, pixels[~HOLE].mean(axis=0), pixels)


LAB = _lab()
LAB8 = np.rint(LAB * (2.55, 1, 1)).astype(np.int16).astype(np.uint8)  # a and b are signed
LAB16 = np.rint(LAB * (655.35, 256, 256)).astype(np.int32).astype(np.uint16)
ICC_LAB8 = np.rint(LAB * (2.55, 1, 1) + (0, 128, 128)).astype(np.uint8)
CMYK16 = np.dstack([65535 - C16, np.zeros_like(G16)])
TILE = np.zeros((H, W))
TILE[:32, :32] = 1
PREVIEW = C8[::4, ::4]
INCREASING = [C8 // 9, C8, C8 // 3]

ODD_KINDS = (
    *(Kind("TIFF, 2 to 12 bits", f"bits{bits}.tif",
           _scene(levels(GRAY, 2**bits - 1).astype(kind), nbits=bits),
           stretched(levels(GRAY, 2**bits - 1), 0, 2**bits - 1))
      for bits, kind in ((2, "u1"), (4, "u1"), (10, "u2"), (12, "u2"))),
    Kind("TIFF, 2 to 12 bits", "bits12-rgb.tif",
         _scene(levels(RGB, 4095).astype(np.uint16), nbits=12), levels(RGB, 4095) / 4095 * 255),
    Kind("TIFF, nodata", "nodata8.tif", _scene(np.where(HOLE, 0, G8).astype(np.uint8), nodata=0),
         gray(_without_holes(G8[..., None])[..., 0])),
    Kind("TIFF, nodata", "nodata8-rgb.tif",
         _scene(np.where(HOLES, 0, C8).astype(np.uint8), nodata=0, photometric="RGB"),
         _without_holes(C8)),
    Kind("TIFF, nodata", "nodata16-rgb.tif",
         _scene(np.where(HOLES, 0, C16).astype(np.uint16), nodata=0, photometric="RGB"),
         _without_holes(C16) / 257),
    Kind("TIFF, nodata", "white-nodata.tif",
         _scene(np.where(HOLE, 7, G16).astype(np.uint16), nodata=7, photometric="MINISWHITE"),
         255 - gray(_without_holes(G16[..., None])[..., 0]) / 257),
    Kind("TIFF, tiles left out", "sparse8.tif", _sparse(G8), gray(G8 * TILE), 0),
    Kind("TIFF, tiles left out", "sparse16.tif", _sparse(G16), gray(G16 * TILE / 257)),
    Kind("TIFF, white is zero", "white-float.tif",
         _tiff(GRAY.astype(np.float32), photometric="miniswhite"), gray(255 - GRAY * 255)),
    Kind("TIFF, white is zero", "white-int16.tif", _tiff(HOUNSFIELD, photometric="miniswhite"),
         255 - stretched(HOUNSFIELD, HOUNSFIELD.min(), HOUNSFIELD.max())),
    # Dividing by a small alpha gives the colour to 255 / alpha.
    Kind("TIFF, alpha", "associated-gray.tif",
         _tiff(np.dstack([np.rint(G8 * SHARE[..., 0]).astype(np.uint8), ALPHA]),
               photometric="minisblack", extrasamples=["assocalpha"]), gray(G8), 4),
    Kind("TIFF, alpha", "associated16-gray.tif",
         _tiff(np.dstack([np.rint(G16 * SHARE[..., 0]).astype(np.uint16),
                          ALPHA.astype(np.uint16) * 257]),
               photometric="minisblack", extrasamples=["assocalpha"]), gray(G16) / 257),
    Kind("TIFF, alpha", "associated-planar.tif",
         _tiff(np.concatenate([np.moveaxis(np.rint(C8 * SHARE).astype(np.uint8), 2, 0),
                               ALPHA[None]]),
               photometric="rgb", planarconfig="separate", extrasamples=["assocalpha"]), C8, 4),
    Kind("TIFF, alpha", "associated-float.tif",
         _tiff(np.dstack([RGB * SHARE, SHARE]).astype(np.float32), photometric="rgb",
               extrasamples=["assocalpha"]), RGB * 255),
    Kind("TIFF, CMYK of 16 bits", "cmyk16.tif", _tiff(CMYK16, photometric="separated"), C16 / 257,
         2),
    Kind("TIFF, CIELAB", "lab16.tif", _tiff(LAB16, photometric="cielab"), MUTED * 255, 4),
    Kind("TIFF, CIELAB", "lab-planar.tif",
         _tiff(np.moveaxis(LAB8, 2, 0), photometric="cielab", planarconfig="separate"),
         MUTED * 255, 4),
    Kind("TIFF, CIELAB", "icc-lab.tif", _tiff(ICC_LAB8, photometric="icclab"), MUTED * 255, 4),
    Kind("TIFF, smaller copy first", "preview.tif", _pages([PREVIEW, C8], photometric="rgb"), C8,
         0),
    Kind("TIFF, smaller copy first", "preview16.tif", _pages([PREVIEW, C16], photometric="rgb"),
         C16 / 257),
    Kind("TIFF, stack of pages", "pages.tif", _pages(STACK, photometric="minisblack"), gray(G8), 0,
         "page 4 of 7"),
    Kind("TIFF, stack of pages", "pages-rgb.tif", _pages(INCREASING, photometric="rgb"), C8, 0,
         "page 2 of 3"),
    Kind("JPEG 2000 of GDAL", "gdal.jp2", _jpeg2000(C8), C8, 0),
    Kind("JPEG 2000 of GDAL", "gdal16.jp2", _jpeg2000(C16), C16 / 257),
    Kind("JPEG 2000 of GDAL", "gdal5.jp2", _jpeg2000(np.dstack([C8, C8[..., :2]])), C8, 0,
         "channels 1 to 3 of 5"),
    Kind("JPEG 2000 of GDAL", "signed.jp2", _jpeg2000(HOUNSFIELD),
         stretched(HOUNSFIELD, HOUNSFIELD.min(), HOUNSFIELD.max())),
    Kind("DICOM, gray", "high-bit.dcm", lambda p: dicom(p, X12 << 4, 12, HighBit=15),
         stretched(X12, 0, 4095)),
    Kind("DICOM, without a preamble", "old.dcm", _old_dicom, stretched(X12, 0, 4095)),
    Kind("numpy", "one-channel.npy", lambda p: np.save(p, G8[..., None]), gray(G8), 0),
)  # fmt: skip
EVERY_KIND = tuple(
    kind._replace(expected=kind.expected.astype(np.float64))
    for kind in (*kinds.KINDS, *FIELD_KINDS, *ODD_KINDS)
)


def write_all(folder: Path) -> None:
    """Writes a file of every kind of EVERY_KIND."""
    for kind in EVERY_KIND:
        kind.write(folder / kind.name)
