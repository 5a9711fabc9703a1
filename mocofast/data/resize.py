"""Cuts crops and resizes them: by the compiled functions of resize.c where they can serve,
otherwise by PyTorch's operator.

The crops are equal to the bit. `compiled` compares a few crops of every type when the library is
loaded. Where a crop differs, PyTorch's operator resizes all crops of the type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast.data.library import compared

Box = tuple[int, int, int, int]  # top, left, height, width
Flips = tuple[bool, bool]  # exchange left and right, top and bottom

_Crops = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
)


def resized_crops(
    images: Sequence[Tensor], boxes: Sequence[Box], out: Tensor, flips: Sequence[Flips] = ()
) -> None:
    """Cuts a crop of every image and resizes it, antialiased and bilinear.

    images: n images on the CPU, (H, W, C), uint8 or uint16.
    boxes: the crop of every image.
    out: (n, height, width, C) of the same type, in C order.
    flips: how every crop is flipped. Empty: no crop is.
    """
    flips = flips or [(False, False)] * len(out)
    resize, _ = compiled(out.dtype)
    if resize is not None:
        resize.crops(images, boxes, out, flips)
        return
    for image, box, (across, down), made in zip(images, boxes, flips, out.numpy()):
        # PyTorch does not flip uint16.
        crop = resized_by_pytorch(image, box, (out.shape[1], out.shape[2])).numpy()
        made[:] = crop[:: -1 if down else 1, :: -1 if across else 1]


def resized_crop(image: Tensor, box: Box, shape: tuple[int, int]) -> Tensor:
    """Returns a crop of an image, resized to (*shape, C). See `resized_crops`."""
    out = torch.empty((1, *shape, image.shape[2]), dtype=image.dtype, device="cpu")
    resized_crops([image], [box], out)
    return out[0]


def resized_by_pytorch(image: Tensor, box: Box, shape: tuple[int, int]) -> Tensor:
    """Does what `resized_crop` does, by PyTorch's operator. uint16 is rounded half to even."""
    top, left, height, width = box
    crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
    dtype = image.dtype
    crop = crop if dtype == torch.uint8 else crop.float()
    if shape[1] == 1 and not (dtype == torch.uint8 and image.shape[2] <= 4):
        # PyTorch 2.11 repeats the first row where the result is 1 pixel wide, but for bytes of up
        # to 4 channels. Here rows are resized as columns, then columns as rows.
        crop = F.interpolate(crop.mT, (1, height), mode="bilinear", antialias=True)
        resized = F.interpolate(crop, (1, shape[0]), mode="bilinear", antialias=True).mT
    else:
        resized = F.interpolate(crop, shape, mode="bilinear", antialias=True)
    if dtype != torch.uint8:
        resized = resized.round_().clamp_(0, 65535).to(dtype)
    return resized[0].permute(1, 2, 0)


class Resize:
    """The compiled functions, with one set of instructions."""

    def __init__(self, library: ctypes.CDLL, variant: int) -> None:
        """library: resize.c, compiled. variant: number in `library.VARIANTS`."""
        self.variant = variant
        self._crops = _Crops(("resize_make", library))

    def crops(
        self, images: Sequence[Tensor], boxes: Sequence[Box], out: Tensor, flips: Sequence[Flips]
    ) -> None:
        """Does what `resized_crops` does. Reads the crops in place, and holds no lock of Python
        while they are resized. Raises MemoryError.
        """
        n, tall, wide, channels = out.shape
        size = out.itemsize
        # The channels of a pixel, and the pixels of a row, must lie side by side.
        images = [
            image if image.stride()[1:] == (channels, 1) else image.contiguous() for image in images
        ]
        # (4, n): place of the first pixel, bytes of a row, height, width
        table = np.array(
            [
                (
                    image.data_ptr() + size * (top * image.stride(0) + left * channels),
                    size * image.stride(0),
                    height,
                    width,
                )
                for image, (top, left, height, width) in zip(images, boxes)
            ],
            dtype=np.int64,
        ).T.copy()
        assert out.is_contiguous() and table.shape == (4, n)
        places, rows, heights, widths = (column.ctypes.data for column in table)
        flags = np.array(flips, dtype=np.uint8).reshape(n, 2)
        top = 255 if out.dtype == torch.uint8 else 65535
        if not self._crops(
            self.variant,
            n,
            places,
            rows,
            heights,
            widths,
            flags.ctypes.data,
            tall,
            wide,
            channels,
            top,
            out.data_ptr(),
        ):
            raise MemoryError("not enough memory to resize a crop")


@cache
def compiled(dtype: torch.dtype) -> tuple[Resize | None, str]:
    """Returns the compiled functions and their instructions, or None and the reason.

    dtype: uint8 or uint16.
    """
    return compared(Resize, lambda resize: differs(resize, dtype), "crops")


# Crops that are compared when the library is loaded: height and width of the crop, and of the view.
# Between 2 and 14 taps.
_COMPARED = ((5, 9, 16, 16), (24, 16, 16, 20), (40, 33, 16, 16), (60, 100, 12, 16))


def differs(resize: Resize, dtype: torch.dtype) -> bool:
    """Returns whether a crop differs from PyTorch's crop."""
    rng = np.random.default_rng(0)
    top = int(torch.iinfo(dtype).max)
    for channels in (1, 3, 5, 13):
        for height, width, *shape in _COMPARED:
            levels = rng.integers(0, top + 1, (height + 1, width + 2, channels))
            image = torch.from_numpy(levels.astype(np.uint8 if top == 255 else np.uint16))
            box = (1, 2, height, width)
            out = torch.empty((1, *shape, channels), dtype=dtype, device="cpu")
            resize.crops([image], [box], out, [(True, True)])
            expected = resized_by_pytorch(image, box, (shape[0], shape[1]))
            if not np.array_equal(out[0].numpy()[::-1, ::-1], expected.numpy()):
                return True
    return False
