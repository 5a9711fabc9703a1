"""Rarer kinds of files of the fields, and the list of all kinds.

`EVERY_KIND` is what the tests and docs/formats.md show.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import kinds
from tests.field_files import CT, FIELD_KINDS, X12, dicom, geotiff
from tests.kinds import (
    ALPHA,
    C8,
    C16,
    G8,
    G16,
    GRAY,
    HOLE,
    HOUNSFIELD,
    PALETTE,
    RGB,
    SEEN_PALETTE,
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


def _palette_dicom(path: Path) -> None:
    import pydicom
    from pydicom.datadict import tag_for_keyword

    dicom(path, np.asarray(PALETTE), PhotometricInterpretation="PALETTE COLOR")
    dataset = pydicom.dcmread(path)
    colors = np.array(PALETTE.getpalette()).reshape(-1, 3)
    for channel, name in enumerate(("Red", "Green", "Blue")):
        table = f"{name}PaletteColorLookupTable"
        tag: Any = tag_for_keyword(f"{table}Descriptor")
        dataset.add_new(tag, "US", [len(colors), 0, 16])
        setattr(dataset, f"{table}Data", (colors[:, channel] * 257).astype(np.uint16).tobytes())
    dataset.save_as(path)


def _enhanced(path: Path) -> None:
    """Writes frames with one slope and a window of each frame."""
    from pydicom import Dataset

    def group(name: str, **tags: float) -> Dataset:
        item, found = Dataset(), Dataset()
        for keyword, value in tags.items():
            setattr(item, keyword, value)
        setattr(found, name, [item])
        return found

    shared = group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-100)
    windows = [
        group("FrameVOILUTSequence", WindowCenter=40 + 100 * i, WindowWidth=400 + 200 * i)
        for i in range(3)
    ]
    dicom(path, np.stack([CT // 3, CT, CT // 2]), SharedFunctionalGroupsSequence=[shared],
          PerFrameFunctionalGroupsSequence=windows)  # fmt: skip


def _scaled_volume(path: Path) -> None:
    """Writes 16 bits that mean values of 0.25 times the number, minus 1000."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint16)
    volume = np.stack([G16.T // 2, G16.T, G16.T // 3], axis=2)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1, -1, 1, 1]), header), path)
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<ff", 0.25, -1000)  # nibabel always writes 1 and 0
    path.write_bytes(content)


def _ome_pyramid(path: Path) -> None:
    """Writes three channels, and a smaller level as SubIFDs."""
    import tifffile

    planes = np.moveaxis(C16, 2, 0)
    options: dict[str, Any] = {"tile": (16, 16), "photometric": "minisblack"}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as out:
        out.write(planes, subifds=1, metadata={"axes": "CYX"}, **options)
        out.write(planes[:, ::2, ::2], subfiletype=1, **options)


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
    Kind("TIFF, alpha", "associated16.tif",
         _tiff(np.dstack([np.rint(C16 * SHARE).astype(np.uint16), ALPHA.astype(np.uint16) * 257]),
               photometric="rgb", extrasamples=["assocalpha"]), C16 / 257),
    Kind("TIFF, alpha", "associated-more.tif",
         _tiff(np.dstack([np.rint(C8 * SHARE).astype(np.uint8), ALPHA, G8]), photometric="rgb",
               extrasamples=["assocalpha", "unspecified"]), C8, 4, "channels 1 to 3 of 5"),
    Kind("TIFF, CMYK, alpha", "cmyk-alpha.tif",
         _tiff(np.dstack([255 - C8, np.zeros_like(G8), ALPHA]), photometric="separated",
               extrasamples=["unassalpha"]), C8, 1),
    Kind("BigTIFF, Motorola order", "motorola-float.tif",
         _tiff(GRAY.astype(np.float32), byteorder=">", bigtiff=True, compression="zlib",
               predictor=3), gray(GRAY * 255)),
    Kind("BigTIFF, Motorola order", "motorola16.tif",
         _tiff(C16, byteorder=">", bigtiff=True, photometric="rgb", tile=(16, 16)), C16 / 257),
    Kind("TIFF, YCbCr", "ycbcr.tif",
         _tiff(np.asarray(Image.fromarray(C8).convert("YCbCr")), photometric="ycbcr"), C8, 3),
    Kind("TIFF, orientation", "turned5.tif",
         _tiff(np.ascontiguousarray(G16.T), extratags=[(274, 3, 1, 5, True)]), gray(G16) / 257),
    Kind("OME-TIFF", "pyramid.ome.tif", _ome_pyramid, C16 / 257),
    Kind("OME-TIFF, time series", "time.ome.tif",
         _tiff(np.stack([np.stack([G16 // part, C16[..., 1]]) for part in (4, 1, 2)]),
               metadata={"axes": "TCYX"}), gray(G16) / 257, 1, "page 2 of 3 (axis T)"),
    Kind("JPEG 2000 of GDAL", "gdal.jp2", _jpeg2000(C8), C8, 0),
    Kind("JPEG 2000 of GDAL", "gdal16.jp2", _jpeg2000(C16), C16 / 257),
    Kind("JPEG 2000 of GDAL", "gdal5.jp2", _jpeg2000(np.dstack([C8, C8[..., :2]])), C8, 0,
         "channels 1 to 3 of 5"),
    Kind("JPEG 2000 of GDAL", "signed.jp2", _jpeg2000(HOUNSFIELD),
         stretched(HOUNSFIELD, HOUNSFIELD.min(), HOUNSFIELD.max())),
    Kind("DICOM, gray", "high-bit.dcm", lambda p: dicom(p, X12 << 4, 12, HighBit=15),
         stretched(X12, 0, 4095)),
    Kind("DICOM, without a preamble", "old.dcm", _old_dicom, stretched(X12, 0, 4095)),
    Kind("DICOM, colours", "palette.dcm", _palette_dicom, SEEN_PALETTE),
    Kind("DICOM, colours", "ycbcr.dcm",
         lambda p: dicom(p, np.asarray(Image.fromarray(C8).convert("YCbCr")),
                         PhotometricInterpretation="YBR_FULL"), C8, 3),
    Kind("DICOM, several frames", "frames-rle.dcm",
         lambda p: dicom(p, STACK, syntax="1.2.840.10008.1.2.5"), gray(G8), 0, "frame 4 of 7"),
    Kind("DICOM, several frames", "enhanced.dcm", _enhanced, stretched(2.0 * CT - 100, -160, 439),
         1, "frame 2 of 3"),
    Kind("NIfTI", "slope.nii", _scaled_volume, stretched(G16, G16.min(), G16.max()), 1,
         "axial slice 2 of 3"),
    Kind("numpy", "label-first.npz", lambda p: np.savez(p, label=np.int64(3), picture=C8), C8, 0,
         "array picture of 2 arrays"),
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
