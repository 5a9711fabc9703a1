"""Kinds of files beside photos and TIFF: which reader reads a file, by its content.

DALI never sees these files, and PIL sees HEIC alone.
"""

from __future__ import annotations

from PIL import Image

from mocofast.data import dicom, image_codecs, nifti, numpy_files
from mocofast.data.items import FileReader, opened

_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEAD = 352  # bytes that tell the kind


def reader_of(file: str | bytes) -> FileReader | None:
    """Returns the reader of a file, or None for photos and TIFF. Raises OSError."""
    return reader_for(head_of(file))


def head_of(file: str | bytes) -> bytes:
    """Returns the first bytes of a file, which tell its kind. Raises OSError."""
    if isinstance(file, bytes):
        return file[:_HEAD]
    with opened(file) as start:
        return start.read(_HEAD)


def reader_for(head: bytes) -> FileReader | None:
    """Returns the reader of a file with this head, or None for photos and TIFF."""
    if head.startswith(numpy_files.MAGIC) or _is_npz(head):
        return numpy_files
    if dicom.is_dicom(head):
        return dicom
    if nifti.is_nifti(head):
        return nifti.AXIAL
    if image_codecs.is_beyond_pil(head):
        return image_codecs
    if _is_heif(head):
        _register_heif()
    return None


def _is_heif(head: bytes) -> bool:
    """True for HEIC and its relatives. AVIF is read by PIL itself."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF


def _register_heif() -> None:
    """Lets PIL open HEIC. Raises ImportError with a pip command."""
    try:
        import pillow_heif
    except ImportError as error:
        raise ImportError("HEIC needs pillow-heif: pip install 'mocofast[heic]'") from error
    if "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()


def _is_npz(head: bytes) -> bool:
    """True for a zip archive whose first member is an array."""
    length = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + length].endswith(b".npy")
