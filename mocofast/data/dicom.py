"""DICOM files, read by pydicom.

Numbers become what the files mean: BitsStored and the sign, slope and intercept (or the table)
of the modality, for example Hounsfield units. MONOCHROME1 (white is the smallest number) is
inverted. Where a VOI window (or table) is stated, the window is black to white. Without a window
all stored bits are, or for 16 bits the range of a TIFF of the same numbers. Of several frames
the frame in the middle is read.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mocofast.data.items import WHOLE, Extent, check_pixels, opened
from mocofast.data.ranges import Pixels

INSTALL = "pip install 'mocofast[dicom]'"
PREAMBLE = 128  # bytes before the mark
MARK = b"DICM"
# Group 8, an element below 0x80, and the representation, or a short length with zeros at its end.
_OLD = re.compile(rb"\x08\0[\0-\x7f]\0([A-Z][A-Z]..|.\0\0\0)", re.DOTALL)
_GRAY = ("MONOCHROME1", "MONOCHROME2")


def extent(file: str | bytes, wanted: int, part: int = WHOLE) -> Extent:
    """Returns the size of an image. Arguments: as `items.FileReader`."""
    dataset = _read(file, header=True)
    frames = _frames(dataset)
    remark = "" if part != WHOLE or frames == 1 else f"frame {frames // 2 + 1} of {frames}"
    deep = int(dataset.BitsAllocated) > 8 and dataset.PhotometricInterpretation in _GRAY
    return Extent(int(dataset.Rows), int(dataset.Columns), deep, remark, "DICOM")


def pixels(file: str | bytes, wanted: int, part: int = WHOLE) -> Pixels:
    """Returns the numbers of an image. Arguments: as `items.FileReader`."""
    dataset = _read(file)
    frames = _frames(dataset)
    stored = _stored(dataset, frames // 2 if part == WHOLE else part)
    return _color(dataset, stored) if stored.ndim == 3 else _gray(dataset, stored, part)


def count(file: str | bytes) -> int:
    """Returns the number of frames."""
    return _frames(_read(file, header=True))


def is_dicom(head: bytes) -> bool:
    """Returns whether a file is DICOM. head: the first bytes of the file.

    Old files begin with the first element of group 8, without preamble and mark.
    """
    return head[PREAMBLE : PREAMBLE + len(MARK)] == MARK or _OLD.match(head) is not None


def _read(file: str | bytes, header: bool = False) -> Any:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ImportError(f"DICOM needs pydicom: {INSTALL}") from error
    with opened(file) as content:
        dataset = dcmread(content, stop_before_pixels=header, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:  # as in old files
        implicit, little = dataset.original_encoding
        kinds = {(True, True): "", (False, True): ".1", (False, False): ".2"}
        dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2{kinds[implicit, little]}"
    if "Rows" not in dataset or "Columns" not in dataset:
        raise ValueError("DICOM without an image")
    check_pixels(int(dataset.Rows), int(dataset.Columns))
    return dataset


def _frames(dataset: Any) -> int:
    return max(1, int(dataset.get("NumberOfFrames", 1) or 1))


def _stored(dataset: Any, frame: int) -> np.ndarray:
    """Returns the stored numbers of one frame, (H, W), or (H, W, 3) RGB."""
    from pydicom.pixels import pixel_array

    bits = dataset.get("BitsStored")
    try:
        if bits is not None:  # pydicom sets bits above to 0, as if HighBit were BitsStored - 1
            dataset.BitsStored = max(bits, int(dataset.get("HighBit", bits - 1)) + 1)
        return pixel_array(dataset, index=frame, raw=False)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        syntax = dataset.file_meta.get("TransferSyntaxUID", "")
        if not getattr(syntax, "is_compressed", False):
            raise
        words = f"DICOM of {syntax.name} is not decoded ({' '.join(str(error).split())})"
        if "missing dependencies" in str(error):
            raise ImportError(f"{words}; {INSTALL} installs decoders") from error
        raise ValueError(words) from error
    finally:
        if bits is not None:
            dataset.BitsStored = bits


def _color(dataset: Any, stored: np.ndarray) -> Pixels:
    top = 255.0 if stored.dtype == np.uint8 else 2.0 ** int(dataset.BitsStored) - 1
    return Pixels(stored, 0.0, top, stated=True)


def _gray(dataset: Any, stored: np.ndarray, part: int) -> Pixels:
    """Returns the meaning of stored numbers (H, W), with the numbers of black and white."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    if dataset.PhotometricInterpretation not in _GRAY:
        if dataset.PhotometricInterpretation != "PALETTE COLOR":
            raise ValueError(f"DICOM of {dataset.PhotometricInterpretation} is not known")
        colors = apply_color_lut(stored, dataset)
        return Pixels(colors, 0.0, float(np.iinfo(colors.dtype).max), stated=True)
    frame = _functional_groups(dataset, part)
    padding = _padding(dataset, stored)
    stored, ends = _used_bits(dataset, stored)
    if "ModalityLUTSequence" in frame:
        values = apply_modality_lut(stored, frame)
        bits = int(frame.ModalityLUTSequence[0].LUTDescriptor[2])
        ends = (0.0, 2.0**bits - 1)
    else:
        slope, intercept = float(frame.get("RescaleSlope", 1)), frame.get("RescaleIntercept", 0)
        values = stored.astype(np.float64) * slope + float(intercept)
        first, last = sorted(end * slope + float(intercept) for end in ends)
        ends = (first, last)
    low, high = ends
    window = _window(frame)
    # 16 bits without a window are rarely in full use: `data.range` auto treats the numbers as
    # those of a TIFF file.
    stated = window is not None or "VOILUTSequence" in frame or _bits(dataset, stored) < 16
    if "VOILUTSequence" in frame or (window is not None and window[2]):
        whole = values if "VOILUTSequence" not in frame else np.rint(values).astype(np.int64)
        values = apply_voi_lut(whole, frame, prefer_lut=True)
        if "VOILUTSequence" in frame:
            ends = (0.0, 2.0 ** int(frame.VOILUTSequence[0].LUTDescriptor[2]) - 1)
        low, high = ends
    elif window is not None:
        low, high, _ = window
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = sum(ends) - values
        low, high = sum(ends) - high, sum(ends) - low
    unsigned = not stated and stored.dtype == np.uint16 and ends == (0.0, 65535.0)
    values[padding] = low if stated or unsigned else values[~padding].min(initial=high)
    kind = np.uint16 if unsigned else np.float32
    return Pixels(values.astype(kind)[..., None], low, high, stated=stated)


def _bits(dataset: Any, stored: np.ndarray) -> int:
    return int(dataset.get("BitsStored", 8 * stored.dtype.itemsize))


def _used_bits(dataset: Any, stored: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Returns numbers without bits that are not in use, and the smallest and largest number."""
    if stored.dtype.kind == "f":
        return stored, (float(stored.min()), float(stored.max()))
    room = 8 * stored.dtype.itemsize
    bits = _bits(dataset, stored)
    signed = stored.dtype.kind == "i"
    if bits < room:
        # To the left end, and back with the sign.
        left = room - 1 - int(dataset.get("HighBit", bits - 1))
        stored = np.left_shift(stored, stored.dtype.type(left))
        stored = np.right_shift(stored, stored.dtype.type(room - bits))
    half = 2.0 ** (bits - 1)
    return stored, (-half, half - 1) if signed else (0.0, 2 * half - 1)


def _functional_groups(dataset: Any, part: int) -> Any:
    """Returns the data set with the rescale and window of one frame of an enhanced file."""
    from pydicom.dataset import Dataset

    shared = dataset.get("SharedFunctionalGroupsSequence")
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    if not shared and not own:
        return dataset
    found = Dataset()
    found.update(dataset)
    frame = _frames(dataset) // 2 if part == WHOLE else part
    for groups in (shared[0] if shared else None, own[frame] if own else None):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            if groups is not None and groups.get(name):
                found.update(groups[name][0])
    return found


def _window(frame: Any) -> tuple[float, float, bool] | None:
    """Returns the numbers of black and white of the first VOI window, and whether the window is
    a sigmoid, or None without a window (DICOM PS3.3, C.11.2.1.2).
    """
    center, width = (_first(frame.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    kind = str(frame.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if kind == "LINEAR_EXACT":
        return (center - width / 2, center + width / 2, False) if width > 0 else None
    if kind == "SIGMOID":
        return 0.0, 0.0, True
    if width <= 1:
        return None
    return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2, False


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    values = value if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    return float(values[0]) if len(values) else None


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Returns (H, W) bool, True for stored numbers that mark the outside of the image."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    ends = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    return (stored >= ends[0]) & (stored <= ends[1])
