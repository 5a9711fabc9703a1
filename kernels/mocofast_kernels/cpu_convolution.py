"""Convolutions of channels-last images on CPUs with AVX2 or AVX-512, forward and backward, in C.

oneDNN, which PyTorch calls, lays out the weights anew in every call and multiplies the zeros around
the images. On small images this is most of the time. convolution.c reads the weights as they are
and leaves out the zeros.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocofast_kernels.cpu_library import INSTALL, library, threads_of_openmp

AHEAD = 24  # entries that the library reads beyond the last pixel, to fetch it early
LANES, PANEL = 16, 64  # channels of a vector, and of a panel of weights, at most
# The library's numbers for a type with instructions, the fastest first.
KINDS = {
    torch.float32: {0: "AVX-512", 2: "AVX2"},
    torch.bfloat16: {1: "AVX512-BF16"},
}
# Bytes of the pixels of a chunk, which stay in the second cache while all weights meet them.
CHUNK_BYTES = 384 * 1024
# Bytes of images that all panels of weights meet in a call, from the last cache.
CALL_BYTES = 8 * 2**20

_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


class Shape(NamedTuple):
    """A convolution of images (images, inputs, height, width), of one group."""

    images: int
    inputs: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (
            (length + 2 * p - d * (k - 1) - 1) // s + 1
            for length, k, s, p, d in zip(
                (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation
            )
        )
        return height, width

    @property
    def pixels(self) -> int:
        """The most pixels of all images, before or after."""
        height, width = self.size
        return self.images * max(self.height * self.width, height * width)


class _Gather(ctypes.Structure):
    """A sum of products over taps, for images of so many channels (depth, width).

    Class i of pixels has the taps class_taps[i] to class_taps[i + 1] (exclusive) of `tap` and
    `offset` and the rows class_rows[i] to class_rows[i + 1] of `to` and `from`. A row is a pixel of
    the result and the pixel of the source to which the offset of a tap is added.
    """

    _fields_ = (
        *((name, _int64) for name in ("classes", "depth", "width", "taps")),
        *((name, _pointer) for name in ("class_taps", "class_rows", "tap", "offset", "to", "from")),
    )
    tables: tuple[NDArray[Any], ...]  # alive as long as this structure


class _Weights(ctypes.Structure):
    """The sums of the weights' gradients: images (depth channels) and gradients (width channels).

    A link is an output pixel and an input pixel that a tap joins. Chunk i has the output pixels
    bounds[i, 0] to bounds[i, 1], the input pixels bounds[i, 2] to bounds[i, 3], and for tap t the
    links tap_links[i * taps + t] to tap_links[i * taps + t + 1].
    """

    _fields_ = (
        *(
            (name, _int64)
            for name in ("images", "images_at_a_time", "output_pixels", "input_pixels")
        ),
        *((name, _int64) for name in ("width", "depth", "taps")),
        *((name, _int64) for name in ("chunks", "most_outputs", "most_inputs")),
        *((name, _pointer) for name in ("bounds", "tap_links", "output", "input")),
    )
    tables: tuple[NDArray[Any], ...]  # alive as long as this structure


def convolves(dtype: torch.dtype) -> bool:
    """Says whether the library convolves images of this type on this CPU."""
    return dtype in KINDS and kind_of(dtype)[0] is not None


@functools.cache
def kind_of(dtype: torch.dtype) -> tuple[int | None, str]:
    """Returns how the library convolves a type of KINDS: its number, and the instructions.

    If not at all, None and the reason.
    """
    found, why = library()
    if found is None:
        return None, why
    if not hasattr(found, "convolution_runs"):
        return None, f"the library is of an older build: {INSTALL}"
    if threads_of_openmp() is None:
        return None, "PyTorch's threads are not GNU OpenMP's"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return None, "oneDNN's products with this CPU's AMX are far faster"
    for kind, name in KINDS[dtype].items():
        if found.convolution_runs(kind):
            return kind, name
    return None, f"this CPU or the C compiler does not know {' or '.join(KINDS[dtype].values())}"


def forward(images: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """Convolves.

    images: (images, inputs, height, width), float32 or bfloat16, channels-last.
    weight: (outputs, inputs, *kernel), of the same type, channels-last.
    shape: of the convolution. Channels are multiples of LANES.
    Returns (images, outputs, *shape.size), channels-last.
    """
    result = _empty((shape.images, shape.outputs, *shape.size), images.dtype)
    _gather(images, weight, result, shape, transposed=False)
    return result


def image_gradient(gradient: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """Returns the gradient of the images from the gradient of the result of `forward`."""
    sizes = (shape.images, shape.inputs, shape.height, shape.width)
    result = _empty(sizes, gradient.dtype)
    _gather(gradient, weight, result, shape, transposed=True)
    return result


def weight_gradient(gradient: Tensor, images: Tensor, shape: Shape) -> Tensor:
    """Returns the gradient of the weight, float32, from that of the result of `forward`."""
    sizes = (shape.outputs, shape.inputs, *shape.kernel)
    result = _empty(sizes, torch.float32)
    plan, threads = _weights_plan(shape, images.dtype), torch.get_num_threads()
    words = plan.images_at_a_time // (4 // images.element_size())
    words *= plan.most_inputs * PANEL + plan.most_outputs * shape.outputs
    scratch = torch.empty(words * threads, dtype=torch.int32, device="cpu")
    _functions()[1](
        kind_of(images.dtype)[0],
        ctypes.byref(plan),
        images.data_ptr(),
        gradient.data_ptr(),
        result.data_ptr(),
        scratch.data_ptr(),
        words,
        threads,
        threads_of_openmp(),
    )
    return result


def _gather(
    source: Tensor, weight: Tensor, result: Tensor, shape: Shape, *, transposed: bool
) -> None:
    threads = torch.get_num_threads()
    words = weight.numel() // result.shape[1] * PANEL * source.element_size() // 4
    scratch = torch.empty(words * threads, dtype=torch.int32, device="cpu")
    calls = 1
    if result.shape[1] > PANEL:
        calls = min(-(-source.nbytes // CALL_BYTES), shape.images)
    at_once = -(-shape.images // calls)
    for some, out in zip(source.split(at_once), result.split(at_once)):
        plan = (_backward_plan if transposed else _forward_plan)(shape._replace(images=len(some)))
        _functions()[0](
            kind_of(source.dtype)[0],
            ctypes.byref(plan),
            some.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            scratch.data_ptr(),
            transposed,
            threads,
            threads_of_openmp(),
        )


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Returns the library's functions: products over taps, and gradients of weights."""
    found, _ = library()
    assert found is not None
    gather, weights = found.convolution_gather, found.convolution_weights
    gather.argtypes = [ctypes.c_int, *[_pointer] * 5, ctypes.c_int, _int64, _pointer]
    weights.argtypes = [ctypes.c_int, *[_pointer] * 5, *[_int64] * 2, _pointer]
    gather.restype = weights.restype = None
    return gather, weights


def _empty(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns memory for images. PyTorch's default type and device may be others."""
    return torch.empty(sizes, dtype=dtype, device="cpu", memory_format=torch.channels_last)


# Networks have some dozens of shapes at a size of the views.
@functools.lru_cache(maxsize=128)
def _forward_plan(shape: Shape) -> _Gather:
    output, tap, pixel = _links(shape)
    height, width = shape.size
    pixels = (height * width, shape.height * shape.width)
    return _gather_plan(output, tap, pixel, shape, pixels, (shape.inputs, shape.outputs))


@functools.lru_cache(maxsize=128)
def _backward_plan(shape: Shape) -> _Gather:
    output, tap, pixel = _links(shape)
    height, width = shape.size
    pixels = (shape.height * shape.width, height * width)
    return _gather_plan(pixel, tap, output, shape, pixels, (shape.outputs, shape.inputs))


def _gather_plan(
    to: NDArray[np.int64],
    tap: NDArray[np.int64],
    begin: NDArray[np.int64],
    shape: Shape,
    pixels: tuple[int, int],
    channels: tuple[int, int],
) -> _Gather:
    """Returns the plan of a sum of products.

    to, tap, begin: the links, pixels of the result and of the source.
    pixels: of an image of the result, and of the source. channels: of the source, of the result.
    """
    taps = shape.kernel[0] * shape.kernel[1]
    tables = _classes(to, tap, begin, shape.images, *pixels, taps)
    depth, width = channels
    plan = _Gather(len(tables[0]) - 1, depth, width, taps, *(a.ctypes.data for a in tables))
    plan.tables = tables
    return plan


@functools.lru_cache(maxsize=128)
def _weights_plan(shape: Shape, dtype: torch.dtype) -> _Weights:
    taps = shape.kernel[0] * shape.kernel[1]
    output, tap, pixel = _links(shape)
    tables = _chunks(output, tap, pixel, shape, taps)
    bounds = tables[0]
    pair = 4 // dtype.itemsize
    most_outputs, most_inputs = (bounds[:, 1::2] - bounds[:, ::2]).max(axis=0).tolist()
    at_a_time = max(1, CHUNK_BYTES // (4 * PANEL * max(most_inputs, 1))) * pair
    plan = _Weights(
        shape.images,
        min(at_a_time, -(-shape.images // pair) * pair),
        shape.size[0] * shape.size[1],
        shape.height * shape.width,
        shape.outputs,
        shape.inputs,
        taps,
        len(bounds),
        most_outputs,
        most_inputs,
        *(a.ctypes.data for a in tables),
    )
    plan.tables = tables
    return plan


def _links(
    shape: Shape,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns output pixels, taps and input pixels, where a tap joins the two pixels."""
    (height, width), (rows, columns) = shape.size, shape.kernel
    oy, ox, ky, kx = np.indices((height, width, rows, columns))
    iy = oy * shape.stride[0] + ky * shape.dilation[0] - shape.padding[0]
    ix = ox * shape.stride[1] + kx * shape.dilation[1] - shape.padding[1]
    inside = (iy >= 0) & (iy < shape.height) & (ix >= 0) & (ix < shape.width)
    return (
        (oy * width + ox)[inside],
        (ky * columns + kx)[inside],
        (iy * shape.width + ix)[inside],
    )


def _classes(
    to: NDArray[np.int64],
    tap: NDArray[np.int64],
    begin: NDArray[np.int64],
    images: int,
    pixels: int,
    sources: int,
    taps: int,
) -> tuple[NDArray[Any], ...]:
    """Groups the pixels of a result by their taps. Returns the tables of `_Gather`.

    to, tap, begin: the links, pixels of the result and of the source.
    """
    source = np.full((pixels, taps), -1)
    source[to, tap] = begin
    # Pixels with the same taps have the same distances between the sources of their taps.
    kinds, kind = np.unique(source >= 0, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    class_taps, class_rows, offsets, rows, bases = [0], [0], [], [], []
    for number, has in enumerate(kinds):
        members = np.flatnonzero(kind == number)
        first = int(has.argmax())  # 0 where a pixel has no tap at all
        base = np.maximum(source[members, first], 0)
        offsets.append((source[members[0]] - base[0])[has])
        class_taps.append(class_taps[-1] + int(has.sum()))
        image = np.arange(images)[:, None]
        rows.append((image * pixels + members).ravel())
        bases.append((image * sources + base).ravel())
        class_rows.append(class_rows[-1] + len(rows[-1]))
    return (
        np.array(class_taps, np.int64),
        np.array(class_rows, np.int64),
        np.nonzero(kinds)[1].astype(np.int32),
        np.concatenate(offsets).astype(np.int32),
        np.concatenate(rows).astype(np.int32),
        np.concatenate((*bases, np.zeros(AHEAD, np.int64))).astype(np.int32),
    )


def _chunks(
    output: NDArray[np.int64],
    tap: NDArray[np.int64],
    pixel: NDArray[np.int64],
    shape: Shape,
    taps: int,
) -> tuple[NDArray[Any], ...]:
    """Divides the output pixels into chunks. Returns the tables of `_Weights`."""
    pixels = shape.size[0] * shape.size[1]
    length = pixels
    while True:
        chunk = output // length
        count = -(-pixels // length)
        numbers = np.arange(count)
        begin, end = np.full(count, shape.height * shape.width), np.zeros(count, np.int64)
        np.minimum.at(begin, chunk, pixel)
        np.maximum.at(end, chunk, pixel + 1)
        begin = np.minimum(begin, end)  # a chunk without links
        if length == 1 or (end - begin).max() * 4 * PANEL <= CHUNK_BYTES:
            break
        length = -(-length // 2)
    bounds = np.stack(
        (numbers * length, np.minimum((numbers + 1) * length, pixels), begin, end), axis=1
    )
    order = np.lexsort((output, tap, chunk))
    group = (chunk * taps + tap)[order]
    return (
        np.ascontiguousarray(bounds, np.int64),
        np.searchsorted(group, np.arange(count * taps + 1)).astype(np.int64),
        output[order].astype(np.int32),
        pixel[order].astype(np.int32),
    )
