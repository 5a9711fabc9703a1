"""Files that unpack to very many pixels: skipped and named, with bounded memory."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data import nifti
from mocofast.data.arrays import PixelFormat
from mocofast.data.decoding import decode, read_header, read_pixels
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader, dali_missing
from mocofast.data.sources import FolderSource
from tests.pictures import jpeg

BOMB = Image.DecompressionBombError
SIDE = 20_000  # 400 million pixels


def png_of(side: int) -> bytes:
    """Returns a PNG file of a black square, whose pixels were never in memory."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = side.to_bytes(4, "big") * 2 + bytes((1, 0, 0, 0, 0))
    chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )


def npz_of(side: int) -> bytes:
    """Returns an archive with an array of zeros (side, side), which was never in memory."""
    buffer, head = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (side, side)}
    )
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as member,
    ):
        member.write(head.getvalue())
        for _ in range(side):
            member.write(bytes(side))
    return buffer.getvalue()


@pytest.mark.parametrize("make", [png_of, npz_of])
def test_a_bomb_is_refused_by_its_header(make: object) -> None:
    small, bomb = make(80), make(SIDE)  # type: ignore[operator]
    assert len(bomb) < 2**20
    levels = PixelFormat(1, np.dtype(np.uint16))
    assert decode(small).size == (80, 80)
    for read in (read_header, decode, read_pixels, levels.load, levels.size):
        with pytest.raises(BOMB, match=r"400000000 pixels|20000 x 20000 pixels"):
            read(bomb)


def test_a_packed_volume_unpacks_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = nibabel.Nifti1Image(np.ones((8, 9, 10), np.int16), np.eye(4)).to_bytes()
    packed = gzip.compress(volume)
    assert nifti.AXIAL.pixels(packed, 1).values.shape == (9, 8, 1)
    monkeypatch.setattr(nifti, "LARGEST", len(volume) - 1)
    with pytest.raises(ValueError, match="a bomb"):
        nifti.AXIAL.pixels(packed, 1)


def test_dicom_of_too_many_pixels_is_refused() -> None:
    pydicom = pytest.importorskip("pydicom")
    from mocofast.data import dicom

    dataset = pydicom.Dataset()
    dataset.Rows = dataset.Columns = SIDE
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    with pytest.raises(BOMB, match="20000 x 20000 pixels"):
        dicom.extent(buffer.getvalue(), 1)


@pytest.mark.parametrize(
    "loader",
    [
        "torchvision",
        pytest.param("dali", marks=pytest.mark.skipif(bool(dali_missing()), reason="no DALI")),
    ],
)
def test_loaders_skip_and_name_bombs(tmp_path: Path, loader: str) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "6.png").write_bytes(png_of(SIDE))
    (tmp_path / "7.npz").write_bytes(npz_of(SIDE))
    source = FolderSource(tmp_path, sorted(path.name for path in tmp_path.iterdir()))
    data = DataConfig(loader=loader, workers=0 if loader == "torchvision" else 1)
    stream = build_loader(
        source, data, (AugmentConfig(size=16),), BatchSlice(8), 0, torch.device("cpu")
    )
    next(stream.epoch(0))
    stream.close()
    assert {source.name(i) for i in stream.skipped} == {"6.png", "7.npz"}
    assert all("DecompressionBombError" in reason for reason in stream.skipped.values())
