"""Makes views from crops: by the compiled operators of photometric.c where they can serve,
otherwise by PyTorch's operators (`view_ops`).

The views are equal to the bit. PyTorch's operators round a product and a sum together where
the CPU can (AVX2, AVX-512, ARM), and apart elsewhere. `library` finds out which, and `compiled`
compares a few views when the library is loaded. Where a view differs, PyTorch's operators make
all views.

The library has all operators. Sines and cosines of rotations and logarithms of levels are
PyTorch's, which approximates them in its own way. Where rotated views alone differ, PyTorch
rotates.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocofast.config import AugmentConfig
from mocofast.data import stains, view_ops
from mocofast.data.interface import ViewParams, sample_view
from mocofast.data.library import compared
from mocofast.data.rotation import turned_places

FIELDS = 15  # floats of a view in photometric.c
_NO_ORDER = (-1, -1, -1, -1)
# Views that are compared when the library is loaded, and the shape of a view
_COMPARED, _SHAPE = 12, (33, 37)

_Mean = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.POINTER(ctypes.c_float), ctypes.c_int, ctypes.c_int)
_int, _pointer = ctypes.c_int, ctypes.c_void_p
_Early = ctypes.CFUNCTYPE(
    None,
    _int,
    *[_pointer] * 2,
    ctypes.c_int64,
    *[_int] * 4,
    _pointer,
    _int,
    *[_pointer] * 2,
    _Mean,
)
_Late = ctypes.CFUNCTYPE(
    None,
    _int,
    _pointer,
    ctypes.c_int64,
    *[_int] * 5,
    _pointer,
    _int,
    _pointer,
    ctypes.c_int64,
    *[_pointer] * 2,
    _Mean,
)


def make_views(
    crops: Tensor,
    params: Sequence[ViewParams],
    augment: AugmentConfig,
    out: Tensor,
) -> None:
    """Does what `view_ops.apply_view_ops` does, faster where the library can serve.

    crops: (n, H, W, C), uint8 or uint16.
    params: the parameters of n views.
    out: (n, H, W, C) of the same type, on the same device. May be `crops`.
    """
    library = compiled()[0] if out.device.type == "cpu" else None
    if library is None:
        view_ops.apply_view_ops(crops, params, augment, out)
        return
    if not library.rotates and any(p.angle for p in params):
        alone = [p._replace(**{**_NOTHING, "angle": p.angle}) for p in params]
        upright, crops = crops, torch.empty_like(crops)
        view_ops.apply_view_ops(upright, alone, augment, crops)
        params = [p._replace(angle=0.0) for p in params]
    library.make(crops, params, augment, out)


# The fields of ViewParams after the crop that leave a view as it is.
_NOTHING: dict[str, Any] = {
    "angle": 0.0,
    "order": (),
    "gray": False,
    "sigma": 0.0,
    "solarize": False,
    "flip": False,
    "vertical_flip": False,
    "turns": 0,
    "key": 0,
    "noise": 0.0,
}


class Photometric:
    """The compiled operators, with one set of instructions."""

    def __init__(self, library: ctypes.CDLL, variant: int) -> None:
        """library: photometric.c, compiled. variant: number in `library.VARIANTS`."""
        self.variant = variant
        self.rotates = True  # False: PyTorch rotates
        self._early = _Early(("photometric_early", library))
        self._late = _Late(("photometric_late", library))
        self._scratch = threading.local()  # a buffer for every thread

    def make(
        self,
        crops: Tensor,
        params: Sequence[ViewParams],
        augment: AugmentConfig,
        out: Tensor,
    ) -> None:
        """Does what `make_views` does, and rotates in every case. Holds no lock of Python while the
        views are made.
        """
        images = [crop.contiguous() for crop in crops]
        pixels = np.array([image.data_ptr() for image in images], dtype=np.uintp)
        made = out if out.is_contiguous() else out.contiguous()
        n, height, width, channels = out.shape
        if height != width and any(p.turns for p in params):
            raise ValueError(f"quarter turns: expected square views, got {height} x {width}")
        radii = [view_ops.box_radius(p.sigma) for p in params]
        # (n, FIELDS) float32, in the order of photometric.c
        table = np.array(
            [
                (
                    *(p.order or _NO_ORDER),
                    p.brightness,
                    p.contrast,
                    p.saturation,
                    p.hue,
                    p.gray,
                    radius,
                    math.ceil(radius),
                    p.solarize,
                    p.flip,
                    p.vertical_flip,
                    p.turns,
                )
                for p, radius in zip(params, radii)
            ],
            dtype=np.float32,
        ).reshape(n, FIELDS)
        places, turned = _places_of(params, height, width)
        reach = math.ceil(max(radii, default=0))
        size = channels * height * width
        more = max(2 * width * (height + 2 * reach), size + width + 1 if len(turned) else 0)
        scratch = self._buffer(size + more)
        top = 255 if out.dtype == torch.uint8 else 65535
        self._early(
            self.variant,
            pixels.ctypes.data,
            made.data_ptr(),
            n,
            height,
            width,
            channels,
            top,
            table.ctypes.data,
            augment.gray_first,
            places.ctypes.data,
            scratch.ctypes.data,
            _mean_by_pytorch,
        )
        if any(p.key for p in params):
            self._make_late(made, params, augment, top, scratch)
        if made is not out:
            out.copy_(made)

    def _make_late(
        self,
        views: Tensor,
        params: Sequence[ViewParams],
        augment: AugmentConfig,
        top: int,
        scratch: np.ndarray,
    ) -> None:
        """Applies the operators with numbers from the keys of views, in place.

        views: (n, H, W, C), in C order.
        scratch: C H W + W floats.
        """
        n, height, width, channels = views.shape
        keys = view_ops.signed_keys(params, views.device)
        numbers: list[Tensor] = []  # n times the floats of photometric.c's `struct late`
        if by_channel := any(augment.channel_jitter):
            numbers += view_ops.channel_factors(keys, augment, channels)
        logarithms = None
        if augment.hed:
            if channels != 3:
                raise ValueError(f"hed: expected 3 channels, got {channels}")
            logarithms = stains.logarithms(top)
            matrix, shift = stains.colour_map(*view_ops.stain_jitter(keys, augment))
            numbers += matrix.flatten(1), shift
        if augment.noise:
            numbers.append(view_ops.noise_deviations(params, top).unsqueeze(1))
        if not numbers:
            return
        table = torch.cat(numbers, dim=1)
        self._late(
            self.variant,
            views.data_ptr(),
            n,
            height,
            width,
            channels,
            top,
            by_channel,
            None if logarithms is None else logarithms.data_ptr(),
            augment.noise > 0,
            table.data_ptr(),
            table.shape[1],
            keys.data_ptr(),
            scratch.ctypes.data,
            _mean_by_pytorch,
        )

    def _buffer(self, size: int) -> np.ndarray:
        """Returns at least `size` floats, the same memory in every call of a thread."""
        buffer: np.ndarray | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._scratch.buffer = np.empty(size, dtype=np.float32)
        return buffer


def _places_of(
    params: Sequence[ViewParams], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the addresses of the places of views, (n,), 0 without an angle, and their memory."""
    addresses = np.zeros(len(params), dtype=np.uintp)
    rows = [i for i, p in enumerate(params) if p.angle]
    if not rows:
        return addresses, np.empty(0, dtype=np.float32)
    angles = torch.tensor([params[i].angle for i in rows], dtype=torch.float32, device="cpu")
    parts = turned_places(angles, height, width)
    memory = torch.cat([part.flatten(1) for part in parts], dim=1).numpy()
    addresses[rows] = memory.ctypes.data + memory.strides[0] * np.arange(len(rows), dtype=np.uintp)
    return addresses, memory


@_Mean
def _mean_by_pytorch(plane: ctypes._Pointer, height: int, width: int) -> float:
    """Returns PyTorch's mean of (height, width) float32, whose sum float32 does not hold."""
    values = torch.from_numpy(np.ctypeslib.as_array(plane, (1, 1, height, width)))
    return values.mean((2, 3)).item()


@cache
def compiled() -> tuple[Photometric | None, str]:
    """Returns the compiled operators and their instructions, or None and the reason."""
    found = compared(Photometric, differs, "views")
    operators, why = found
    if operators is None or not rotation_differs(operators):
        return found
    operators.rotates = False
    return operators, f"{why}, rotation by PyTorch"


def differs(operators: Photometric) -> bool:
    """Returns whether a view without a rotation differs from PyTorch's view."""
    late = {"vertical_flip": 0.5, "channel_jitter": (0.2, 0.2), "hed": 0.1, "noise": 0.1}
    return _differs(operators, blur=0.7, solarize=0.3, **late)


def rotation_differs(operators: Photometric) -> bool:
    """Returns whether a rotated view differs from PyTorch's view."""
    return _differs(operators, rotate=180.0, jitter_p=0.0)


def _differs(operators: Photometric, **options: Any) -> bool:
    """Compares views of 8 and of 16 bits. options: of AugmentConfig."""
    for channels, dtype in ((3, np.uint8), (3, np.uint16), (2, np.uint16)):
        colours = {} if channels == 3 else {"gray": 0.0, "hed": 0.0}
        augment = AugmentConfig(size=_SHAPE, **{"gray": 0.2, **options, **colours})
        rng = np.random.default_rng(channels)
        shape = (_COMPARED, *_SHAPE, channels)
        numbers = rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)
        crops = torch.from_numpy(numbers)
        params = [sample_view(augment, _SHAPE, 1, 0, i, 0) for i in range(_COMPARED)]
        expected, got = torch.empty_like(crops), torch.empty_like(crops)
        view_ops.apply_view_ops(crops, params, augment, expected)
        operators.make(crops, params, augment, got)
        if not np.array_equal(expected.numpy(), got.numpy()):
            return True
    return False
