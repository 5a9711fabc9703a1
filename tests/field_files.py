"""Files of fields beside photography, written with the libraries of the fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.kinds import C8, G8, GRAY, STACK, Kind, gray, levels, stretched

X12 = levels(GRAY, 4095).astype(np.uint16)  # an X-ray of 12 bits
CT = levels(-900 + 1800 * GRAY, 1).astype(np.int16)  # Hounsfield units


def dicom(path: Path, pixels: np.ndarray, bits: int = 0, **tags: Any) -> None:
    """Writes pixels (H, W), (H, W, 3) or frames (F, H, W) as DICOM.

    bits: BitsStored, 0: of the type. tags: more elements, by their keywords. `syntax` names a
    transfer syntax.
    """
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    color = pixels.ndim == 3 and pixels.shape[2] == 3
    dataset.Rows, dataset.Columns = pixels.shape[:2] if color else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if color else 1
    if color:
        dataset.PlanarConfiguration = 0
    if pixels.ndim == 3 and not color:
        dataset.NumberOfFrames = len(pixels)
    room = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored = room, bits or room
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    syntax = tags.pop("syntax", None)
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax is not None:
        dataset.compress(syntax)
    dataset.save_as(path, enforce_file_format=True)


def _table(values: np.ndarray, first: int, bits: int) -> Any:
    import pydicom

    item = pydicom.Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.LUTData = values.astype(np.uint16).tobytes()
    return pydicom.Sequence([item])


# What an encoder sees of every file: {name: (how to write, (H, W, 3) float64 from 0 to 255)}
CURVE = np.round(65535 * (np.arange(4096) / 4095) ** 2)
DICOM: dict[str, tuple[Any, np.ndarray]] = {
    "x12.dcm": (lambda p: dicom(p, X12, 12), stretched(X12, 0, 4095)),
    "inverted.dcm": (
        lambda p: dicom(p, X12, 12, PhotometricInterpretation="MONOCHROME1"),
        stretched(4095.0 - X12, 0, 4095),
    ),
    # A linear window shows [c - 0.5 - (w - 1) / 2, c - 0.5 + (w - 1) / 2].
    "window.dcm": (
        lambda p: dicom(p, X12, 12, WindowCenter=2000, WindowWidth=1001),
        stretched(X12, 1499.5, 2499.5),
    ),
    "inverted-window.dcm": (
        lambda p: dicom(
            p, X12, 12, PhotometricInterpretation="MONOCHROME1", WindowCenter=2000, WindowWidth=1001
        ),
        255.0 - stretched(X12, 1499.5, 2499.5),
    ),
    "ct.dcm": (
        lambda p: dicom(
            p,
            (CT + 1024).astype(np.uint16),
            12,
            RescaleSlope=1,
            RescaleIntercept=-1024,
            WindowCenter=[40, 600],
            WindowWidth=[400, 1500],
        ),
        stretched(CT, 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2),
    ),
    "ct-signed.dcm": (lambda p: dicom(p, CT, 12), stretched(CT, -2048, 2047)),
    "ct16.dcm": (
        lambda p: dicom(p, CT, RescaleSlope=1, RescaleIntercept=0),
        stretched(CT, CT.min(), CT.max()),
    ),
    "gray16.dcm": (lambda p: dicom(p, X12 * np.uint16(9)), stretched(X12 * 9.0, 0, 65535)),
    # Bits above BitsStored hold an overlay.
    "overlay.dcm": (lambda p: dicom(p, X12 | np.uint16(0x9000), 12), stretched(X12, 0, 4095)),
    "padding.dcm": (
        lambda p: dicom(
            p,
            np.where(GRAY > 0.6, -2000, CT).astype(np.int16),
            RescaleSlope=1,
            RescaleIntercept=0,
            PixelPaddingValue=-2000,
            WindowCenter=0,
            WindowWidth=2001,
        ),
        np.where(gray(GRAY) > 0.6, 0, stretched(CT, -1000.5, 999.5)),
    ),
    "table.dcm": (
        lambda p: dicom(p, X12, 12, VOILUTSequence=_table(CURVE, 0, 16)),
        gray(CURVE[X12] / 65535 * 255),
    ),
    "sigmoid.dcm": (
        lambda p: dicom(p, X12, 12, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID"),
        gray(255 / (1 + np.exp(-4 * (X12 - 2000.0) / 1000))),
    ),
    "frames.dcm": (lambda p: dicom(p, STACK), gray(STACK[3].astype(float))),
    "rgb.dcm": (lambda p: dicom(p, C8), C8.astype(float)),
    "rle.dcm": (lambda p: dicom(p, X12, 12, syntax="1.2.840.10008.1.2.5"), stretched(X12, 0, 4095)),
    "jpeg2000.dcm": (
        lambda p: dicom(p, X12, 12, syntax="1.2.840.10008.1.2.4.90"),
        stretched(X12, 0, 4095),
    ),
}


def nifti(path: Path, volume: np.ndarray, codes: str = "RAS", **header: Any) -> None:
    """Writes a volume of canonical axes (right, anterior, superior[, time]) as NIfTI.

    codes: the directions of the axes of the file, for example "LPS".
    """
    import nibabel
    from nibabel import orientations

    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(volume, affine)
    there = orientations.axcodes2ornt(codes)
    here = orientations.io_orientation(affine)
    turned = image.as_reoriented(orientations.ornt_transform(here, there))
    for name, value in header.items():
        turned.header[name] = value
    nibabel.save(turned, path)


VOLUME = np.random.default_rng(3).integers(-1000, 2000, (12, 14, 9)).astype(np.int16)


def slice_of(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Returns a slice as radiologists see it, by a loop over voxels."""
    right, anterior, superior = volume.shape
    rows, columns = {
        "axial": (anterior, right),
        "coronal": (superior, right),
        "sagittal": (superior, anterior),
    }[plane]
    out = np.empty((rows, columns), volume.dtype)
    for row in range(rows):
        for column in range(columns):
            up, across = rows - 1 - row, columns - 1 - column
            place = {
                "axial": (across, up, index),
                "coronal": (across, index, up),
                "sagittal": (index, across, up),
            }[plane]
            out[row, column] = volume[place]
    return out


def geotiff(path: Path, pixels: np.ndarray, **options: Any) -> None:
    """Writes pixels (H, W, C) as GeoTIFF with tiles, as rasterio writes scenes."""
    import rasterio
    from rasterio.transform import from_origin

    height, width, count = pixels.shape
    with rasterio.open(
        path,
        "w",
        "GTiff",
        width,
        height,
        count,
        crs="EPSG:32632",
        dtype=pixels.dtype,
        transform=from_origin(500000, 5300000, 10, 10),
        tiled=True,
        blockxsize=16,
        blockysize=16,
        compress="deflate",
        **options,
    ) as out:
        out.write(np.moveaxis(pixels, 2, 0))


def slide(path: Path, levels: list[np.ndarray]) -> None:
    """Writes levels (H, W, 3) uint8 as a slide in Aperio's format."""
    import tifffile

    text = "Aperio Image Library v10.0.50\r\n|AppMag = 20|MPP = 0.5"
    options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    options |= {"compressionargs": {"level": 98}, "description": text}
    with tifffile.TiffWriter(path) as out:
        out.write(levels[0], tile=(32, 32), **options)
        out.write(levels[0][::4, ::4], rowsperstrip=16, **options)  # the thumbnail
        for level in levels[1:]:
            out.write(level, tile=(32, 32), **options)


def _numpy(save: Any, pixels: np.ndarray) -> Any:
    return lambda path: save(path, pixels)


def _volume(path: Path) -> None:
    """Writes a volume whose axial slice in the middle is G8."""
    middle = G8[::-1, ::-1].T
    nifti(path, np.stack([middle // 2, middle, middle // 3], axis=2), "LPS")


def _heic(path: Path) -> None:
    import pillow_heif
    from PIL import Image

    pillow_heif.from_pillow(Image.fromarray(C8)).save(path, quality=-1)


def _avif(path: Path) -> None:
    from PIL import Image

    Image.fromarray(C8).save(path, quality=100, subsampling="4:4:4")


_GROUPS = {
    "DICOM, gray": ("x12.dcm", "inverted.dcm", "ct-signed.dcm", "overlay.dcm"),
    "DICOM, window": ("window.dcm", "inverted-window.dcm", "ct.dcm", "padding.dcm"),
    "DICOM, table or sigmoid": ("table.dcm", "sigmoid.dcm"),
    "DICOM, 16 bits without a window": ("ct16.dcm", "gray16.dcm"),
    "DICOM, several frames": ("frames.dcm",),
    "DICOM, colours": ("rgb.dcm",),
    "DICOM, compressed": ("rle.dcm", "jpeg2000.dcm"),
}
FIELD_KINDS = (
    *(
        Kind(group, name, *DICOM[name], 1, "frame 4 of 7" if name == "frames.dcm" else "")
        for group, names in _GROUPS.items()
        for name in names
    ),
    Kind("NIfTI", "volume.nii", _volume, gray(G8.astype(float)), 0, "axial slice 2 of 3"),
    Kind("NIfTI", "volume.nii.gz", _volume, gray(G8.astype(float)), 0, "axial slice 2 of 3"),
    Kind("HEIC", "rgb.heic", _heic, C8.astype(float), 8),  # the colours have half the size
    Kind("AVIF", "rgb.avif", _avif, C8.astype(float), 4),
    Kind("numpy", "rgb.npy", _numpy(np.save, C8), C8.astype(float), 0),
    Kind("numpy", "gray.npy", _numpy(np.save, GRAY), gray(GRAY * 255), 1),
    Kind("numpy", "rgb.npz", _numpy(np.savez, np.moveaxis(C8, 2, 0)), C8.astype(float), 0),
)
