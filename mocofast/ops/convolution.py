"""Convolution of channels-last images, in C where the CPU has AVX2 or AVX-512.

`mocofast_kernels.cpu_convolution` says why C is faster than PyTorch (oneDNN) on small images. Sums
have another order than in PyTorch: results are equal to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mocofast_kernels import cpu_convolution
from mocofast_kernels.cpu_convolution import Shape, convolves
from torch import Tensor
from torch.autograd.function import once_differentiable

from mocofast.ops.transforms import is_transformed

# Above so many pixels of all images, which leave the caches, oneDNN computes the gradient of the
# weights of a 1 x 1 convolution faster (docs/log.md).
LARGE = 32 * 16 * 16


def convolve(
    images: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    master: Tensor | None = None,
) -> Tensor | None:
    """Convolves, or returns None where PyTorch has to: torch.nn.functional.conv2d.

    images: (N, C, H, W). weight: (O, C, kh, kw), of the same type.
    stride, padding, dilation: pairs of ints, as in torch.nn.functional.conv2d. A single group and
        no bias.
    master: float32, of which `weight` is a copy in another type: gets the gradient in the place of
        `weight`, in float32.
    Returns (N, O, H', W'), channels-last. A first derivative exists, a second one does not.

    Images of bfloat16 whose channels are no multiple of 16, as pixels, go to PyTorch, but for the
    gradient of the weight on several threads (see `_Pixels`).

    None: for another type than float32 or bfloat16 (with the instructions of the CPU), channels in
    no multiple of 16 otherwise, weights in another order than channels-last, other devices, and
    where PyTorch traces, compiles or transforms functions or watches operations.
    """
    if (
        type(images) is not Tensor
        or images.device.type != "cpu"
        or weight.device.type != "cpu"
        or images.dim() != 4
        or images.dtype != weight.dtype
        or not convolves(images.dtype)
        or weight.shape[0] % cpu_convolution.LANES
        or (weight.shape[1] % cpu_convolution.LANES and images.dtype != torch.bfloat16)
        or weight.shape[1] != images.shape[1]
        or not weight.is_contiguous(memory_format=torch.channels_last)
        or weight.is_neg()
        or is_transformed()
    ):
        return None
    shape = Shape(
        *(images.shape[0], weight.shape[1], images.shape[2], images.shape[3], weight.shape[0]),
        *(_two(numbers) for numbers in (weight.shape[2:], stride, padding, dilation)),
    )
    if not shape.images or min(shape.size) < 1 or shape.pixels >= 2**31:
        return None
    images = images.contiguous(memory_format=torch.channels_last).resolve_neg()
    master, weight = (weight, weight) if master is None else (master, weight.detach())
    function = _Pixels if shape.inputs % cpu_convolution.LANES else _Convolution
    result: Tensor = function.apply(images, weight, master, shape)
    return result


def weight_by_pytorch(shape: Shape) -> bool:
    """Says whether PyTorch computes the gradient of the weight faster."""
    height, width = shape.size
    return shape.kernel == (1, 1) and shape.images * height * width > LARGE


def _two(numbers: Sequence[int]) -> tuple[int, int]:
    first, second = numbers
    return first, second


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, master: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.shape, ctx.dtype = shape, master.dtype
        return cpu_convolution.forward(images, weight, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        shape: Shape = ctx.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = cpu_convolution.image_gradient(gradient, weight, shape)
        if ctx.needs_input_grad[2]:
            if weight_by_pytorch(shape):
                of_weight = _pytorch_weight_gradient(gradient, images, weight, shape)
            else:
                of_weight = cpu_convolution.weight_gradient(gradient, images, shape)
            of_weight = of_weight.to(ctx.dtype)
        return of_images, None, of_weight, None


class _Pixels(torch.autograd.Function):
    """The first convolution of an encoder in bfloat16, by PyTorch.

    On several threads C computes the gradient of the weight: oneDNN's threads wait for one another
    without sleep. Beside busy processes a gradient took up to 390 ms on two threads, .5 ms on one
    (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, master: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.shape, ctx.dtype = shape, master.dtype
        y = torch.conv2d(images, weight, None, shape.stride, shape.padding, shape.dilation)
        return y.contiguous(memory_format=torch.channels_last)  # images of a channel show no order

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _pytorch_gradients(gradient, images, weight, ctx.shape, of_images=True)
        if ctx.needs_input_grad[2]:
            of_pixels = _pytorch_weight_gradient
            if torch.get_num_threads() > 1:
                of_pixels = _pixel_weight_gradient
            of_weight = of_pixels(gradient, images, weight, ctx.shape).to(ctx.dtype)
        return of_images, None, of_weight, None


def _pixel_weight_gradient(
    gradient: Tensor, images: Tensor, weight: Tensor, shape: Shape
) -> Tensor:
    """Returns the gradient of the weight for images of few channels, float32.

    The columns of the kernel become channels: every pixel gets its neighbours in the row.
    """
    (rows, columns), (_, across) = shape.kernel, shape.stride
    count, width = shape.images, shape.size[1]
    used = columns * shape.inputs
    depth = -(-used // cpu_convolution.LANES) * cpu_convolution.LANES
    sides = (0, 0, shape.padding[1], shape.padding[1])
    padded = F.pad(images.permute(0, 2, 3, 1), sides).contiguous()
    whole, line, pixel, channel = padded.stride()
    neighbours = padded.as_strided(
        (count, shape.height, width, columns, shape.inputs),
        (whole, line, pixel * across, pixel * shape.dilation[1], channel),
    )
    wide = images.new_zeros(count, shape.height, width, depth)
    wide[..., :used].unflatten(-1, (columns, shape.inputs)).copy_(neighbours)
    of_rows = shape._replace(
        inputs=depth,
        width=width,
        kernel=(rows, 1),
        stride=(shape.stride[0], 1),
        padding=(shape.padding[0], 0),
        dilation=(shape.dilation[0], 1),
    )
    gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
    found = cpu_convolution.weight_gradient(gradient, wide.permute(0, 3, 1, 2), of_rows)
    return found[:, :used, :, 0].unflatten(1, (columns, shape.inputs)).permute(0, 2, 3, 1)


def _pytorch_weight_gradient(
    gradient: Tensor, images: Tensor, weight: Tensor, shape: Shape
) -> Tensor:
    return _pytorch_gradients(gradient, images, weight, shape, of_images=False)


def _pytorch_gradients(
    gradient: Tensor, images: Tensor, weight: Tensor, shape: Shape, *, of_images: bool
) -> Tensor:
    """Returns the gradient of the images or of the weight, by PyTorch."""
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient,
        images,
        weight,
        None,
        shape.stride,
        shape.padding,
        shape.dilation,
        False,
        [0, 0],
        1,
        [of_images, not of_images, False],
    )
    return gradients[0 if of_images else 1]
