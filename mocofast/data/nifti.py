"""NIfTI volumes, read by nibabel: slices in the canonical orientation.

A slice is shown as radiologists see it. Axial: anterior at the top, the right of the patient at
the left. Coronal: superior at the top, the right of the patient at the left. Sagittal: superior
at the top, anterior at the left.

Of a file that is not packed only the slice is read. `.nii.gz` is unpacked for every slice.
"""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any

import numpy as np

from mocofast.data.items import ALL, WHOLE, Extent, native
from mocofast.data.ranges import Pixels, type_bounds

INSTALL = "pip install 'mocofast[nifti]'"
PLANES = ("sagittal", "coronal", "axial")  # perpendicular to the axes right, anterior, superior
LARGEST = 4 << 30  # bytes of a volume that a packed file in an archive may hold
_GZIP = b"\x1f\x8b"


def is_nifti(head: bytes) -> bool:
    """Returns whether a file is NIfTI. head: the first 352 bytes of the file."""
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 352)
        except zlib.error:
            return False
        # 352 packed bytes unpack to less than 348 bytes at times. The header begins with its size.
        if len(head) < 348:
            return head[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c")
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


class Nifti:
    """An `items.FileReader` of slices. part: number of the slice, from the left, posterior or
    inferior end.
    """

    def __init__(self, plane: str) -> None:
        """plane: one of PLANES."""
        self.axis, self.plane = PLANES.index(plane), plane

    def extent(self, file: str | bytes, wanted: int, part: int = WHOLE) -> Extent:
        """Returns the size of a slice."""
        image = _open(file)
        sizes = _canonical_sizes(image)
        slices = sizes.pop(self.axis)
        remark = _volumes(image, wanted)[1]
        words = [remark] if remark else []
        if part == WHOLE and slices > 1:
            words.append(f"{self.plane} slice {slices // 2 + 1} of {slices}")
        deep = image.get_data_dtype() != np.uint8
        return Extent(sizes[1], sizes[0], deep, ", ".join(words), "NIfTI")

    def pixels(self, file: str | bytes, wanted: int, part: int = WHOLE) -> Pixels:
        """Returns the numbers of a slice."""
        image = _open(file)
        axes, flips = _orientation(image)
        sizes = _canonical_sizes(image)
        index = sizes[self.axis] // 2 if part == WHOLE else part
        if not 0 <= index < sizes[self.axis]:
            raise ValueError(f"has {sizes[self.axis]} {self.plane} slices, not slice {index + 1}")
        across = axes[self.axis]
        if flips[self.axis]:
            index = sizes[self.axis] - 1 - index
        volumes, _ = _volumes(image, wanted)
        place: list[Any] = [slice(None)] * 3
        place[across] = index
        values = np.asarray(image.dataobj[tuple(place) + volumes])
        if values.dtype.names:  # RGB
            values = np.stack([values[name] for name in values.dtype.names[:3]], axis=-1)
        values = values.reshape(*values.shape[:2], -1)
        # To (first, second canonical axis beside the slice, C).
        first, second = (axis for axis in range(3) if axis != self.axis)
        if axes[first] > axes[second]:
            values = values.swapaxes(0, 1)
        values = values[:: -1 if flips[first] else 1, :: -1 if flips[second] else 1]
        values = native(np.ascontiguousarray(values[::-1, ::-1].swapaxes(0, 1)))
        low, high = (float(image.header[name]) for name in ("cal_min", "cal_max"))
        if high > low:
            return Pixels(values, low, high, stated=True)
        return Pixels(values, *type_bounds(values.dtype))

    def count(self, file: str | bytes) -> int:
        """Returns the number of slices."""
        return _canonical_sizes(_open(file))[self.axis]


AXIAL = Nifti("axial")


def _open(file: str | bytes) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"NIfTI needs nibabel: {INSTALL}") from error
    if isinstance(file, str):
        image: Any = nibabel.load(file)
    else:
        content = _unpacked(file) if file.startswith(_GZIP) else file
        kind: Any = nibabel.Nifti2Image if content[4:8] == b"n+2\0" else nibabel.Nifti1Image
        image = kind.from_stream(io.BytesIO(content))
    if len(image.shape) < 2:
        raise ValueError(f"a NIfTI of shape {image.shape} is no image")
    if len(image.shape) == 2:
        image = image.__class__(np.asarray(image.dataobj)[..., None], image.affine, image.header)
    return image


def _unpacked(file: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(file)) as packed:
        content = packed.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"unpacks to more than {LARGEST >> 30} GiB: a bomb?")
    return content


def _orientation(image: Any) -> tuple[list[int], list[bool]]:
    """Returns the axis of the file and whether it runs backwards, for every canonical axis:
    right, anterior, superior.
    """
    from nibabel.orientations import io_orientation

    found = io_orientation(image.affine)[:3]
    if np.isnan(found).any() or sorted(found[:, 0].tolist()) != [0, 1, 2]:
        return [0, 1, 2], [False] * 3
    axes = np.argsort(found[:, 0]).tolist()
    return axes, [bool(found[axis, 1] < 0) for axis in axes]


def _canonical_sizes(image: Any) -> list[int]:
    """Returns the numbers of voxels to the right, anterior and superior."""
    return [int(image.shape[axis]) for axis in _orientation(image)[0]]


def _volumes(image: Any, wanted: int) -> tuple[tuple[Any, ...], str]:
    """Returns the index of the axes after the third, and a remark on volumes left out.

    All volumes are channels if their number is `wanted`. Otherwise the volume in the middle is
    read.
    """
    more = image.shape[3:]
    count = int(np.prod(more))
    if count in (1, wanted) or wanted == ALL:
        return (slice(None),) * len(more), ""
    place = tuple(int(i) for i in np.unravel_index(count // 2, more))
    return place, f"volume {count // 2 + 1} of {count} (data.channels={count} reads all)"
