"""Times an encoder's convolutions in C beside PyTorch's (oneDNN's), on a CPU with AVX-512.

Every different convolution that training compiles is timed: the result, the gradient of the images
and the gradient of the weight. The last line is the sum over the network, in which a convolution
counts as often as it occurs in a forward pass.

The floor is the products, without those of the zeros around the images, at the matrix rate measured
in the same run. It leaves out the memory traffic. The ratio and the share of the floor are those of
the three calls together. Every call takes the same tensors, which stay in the caches where they
fit.

A star marks gradients of weights that training leaves to PyTorch, for large 1 x 1 convolutions. The
line has our time, the sum has PyTorch's time on both sides.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mocofast_kernels import cpu_convolution
from mocofast_kernels.cpu_convolution import KINDS, Shape, convolves
from torch import Tensor

from mocofast.device import choose_autocast, choose_device
from mocofast.models.convolutions import CompiledConv2d, compile_convolutions
from mocofast.models.encoders import build_encoder
from mocofast.ops.convolution import weight_by_pytorch
from mocofast.train.profile import matrix_rate
from mocofast_bench import timing

OURS, PYTORCH = "mocofast", "pytorch"
CALLS = ("result", "image gradient", "weight gradient")
ALONE = "PyTorch alone computes"


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the encoder, sizes and the dtype."""
    parser.add_argument("--arch", default="resnet18", help="encoder (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=positive,
        default=32,
        help="width and height of an image, in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=positive, default=32, help="images of a call (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of images and weights (default: bfloat16 where C computes it, else float32)",
    )
    parser.set_defaults(device="cpu")


def why_not(device: str) -> str:
    """Returns why nothing can be compared here, "" if it can. device: of the command line."""
    if device not in ("auto", "cpu") or choose_device(device).type != "cpu":
        return "times convolutions on CPUs alone; --device cpu works"
    if not any(map(convolves, KINDS)):
        why = cpu_convolution.kind_of(torch.float32)[1]
        return f"{ALONE} convolutions on this machine: {why}"
    return ""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row.

    Raises SystemExit if C computes no convolution of the encoder, or not in this dtype.
    """
    device = torch.device("cpu")
    name = arguments.dtype or ("bfloat16" if convolves(torch.bfloat16) else "float32")
    dtype: torch.dtype = getattr(torch, name)
    if not convolves(dtype):
        why = cpu_convolution.kind_of(dtype)[1]
        raise SystemExit(f"--dtype {name}: {ALONE} such convolutions on this machine: {why}")
    shapes = occurrences(arguments.arch, arguments.size, arguments.batch)
    if not shapes:
        raise SystemExit(f"--arch {arguments.arch}: {ALONE} its convolutions")
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    rate = matrix_rate(device, choose_autocast(precision, device))
    rows: list[dict[str, Any]] = []
    row: dict[str, Any] = {
        "benchmark": "convolution",
        **timing.environment(device),
        "arch": arguments.arch,
        "size": arguments.size,
        "batch_size": arguments.batch,
        "dtype": name,
        "repeats": arguments.repeats,
        "matrix_gflops": round(rate / 1e9, 1),
        "rows": rows,
    }
    print(f"{arguments.arch}, {arguments.size} px, batch {arguments.batch}, {name}")
    print(
        f"{row['device']}, threads: {row['threads']}; matrix rate {rate / 1e9:.0f} GFLOP/s; "
        "ms of mocofast and of PyTorch"
    )
    print(_line(("channels", "pixels", "kernel", "stride", "times"), CALLS, "ratio", "of floor"))
    for shape, times in shapes.items():
        rows.append(_measure(shape, times, dtype, rate, arguments.repeats))
        print(_text(rows[-1]))
        arguments.keep(row)
    row["network"] = network(rows, rate)
    print(_text(row["network"]))
    return row


# ---- which convolutions ----


def occurrences(arch: str, size: int, batch: int) -> dict[Shape, int]:
    """Returns {convolution: how often it occurs in a forward pass}, in the order of the network.

    Convolutions that C does not compute are left out. arch, size: as of `build_encoder`.
    """
    encoder = build_encoder(arch, size)(num_classes=128).eval()
    compile_convolutions(encoder)
    found: Counter[Shape] = Counter()

    def count(part: CompiledConv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        sizes = (batch, *inputs[0].shape[1:], part.out_channels)
        options: Any = (part.kernel_size, part.stride, part.padding, part.dilation)
        found[Shape(*sizes, *options)] += 1

    for part in encoder.modules():
        if type(part) is CompiledConv2d:
            part.register_forward_hook(count)
    with torch.no_grad():
        encoder(torch.zeros(1, 3, size, size))
    return dict(found)


def operations(shape: Shape) -> int:
    """Returns the operations of a call, without products of the zeros around the images."""
    pixels = [  # pairs of an output row (column) and a tap that sees a row (column) of the image
        sum(0 <= o * s + k * d - p < length for o in range(outputs) for k in range(kernel))
        for length, outputs, kernel, s, p, d in zip(
            (shape.height, shape.width),
            *(shape.size, shape.kernel, shape.stride, shape.padding, shape.dilation),
        )
    ]
    return 2 * shape.images * pixels[0] * pixels[1] * shape.inputs * shape.outputs


# ---- sides ----


def sides(shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Returns {call: {side: function}}, for random channels-last tensors."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    images = random(shape.images, shape.inputs, shape.height, shape.width)
    weight = random(shape.outputs, shape.inputs, *shape.kernel)
    gradient = random(shape.images, shape.outputs, *shape.size)
    options = (shape.stride, shape.padding, shape.dilation)

    def backward(of_images: bool) -> Tensor:
        gradients = torch.ops.aten.convolution_backward(
            *(gradient, images, weight, None, *options, False, [0, 0], 1),
            [of_images, not of_images, False],
        )
        result: Tensor = gradients[0 if of_images else 1]
        return result

    ours = (
        partial(cpu_convolution.forward, images, weight, shape),
        partial(cpu_convolution.image_gradient, gradient, weight, shape),
        partial(cpu_convolution.weight_gradient, gradient, images, shape),
    )
    pytorch = (
        partial(F.conv2d, images, weight, None, *options),
        partial(backward, True),
        partial(backward, False),
    )
    return {call: {OURS: a, PYTORCH: b} for call, a, b in zip(CALLS, ours, pytorch)}


# ---- rows ----


def _measure(
    shape: Shape, times: int, dtype: torch.dtype, rate: float, repeats: int
) -> dict[str, Any]:
    """Returns the entries of a convolution. rate: operations a second of a matrix product."""
    functions = {
        (call, side): function
        for call, both in sides(shape, dtype).items()
        for side, function in both.items()
    }
    seconds = timing.interleaved(functions, repeats, torch.device("cpu"))
    flops = operations(shape)
    calls = {}
    for call in CALLS:
        entries = timing.entries({side: seconds[call, side] for side in (OURS, PYTORCH)})
        calls[call] = {**entries, **_shares(entries["milliseconds"], flops, rate)}
    total = _sums([call["milliseconds"] for call in calls.values()], [1] * len(calls))
    return {
        **shape._asdict(),
        "times": times,
        "weight_by_pytorch": weight_by_pytorch(shape),
        "calls": calls,
        "total": {"milliseconds": total, **_shares(total, len(CALLS) * flops, rate)},
    }


def network(rows: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Returns the sums over the convolutions of a forward pass and their gradients.

    rows: as of `_measure`. rate: operations a second of a matrix product.
    """
    times = [row["times"] for row in rows]
    calls = {}
    for call in CALLS:
        parts = [dict(row["calls"][call]["milliseconds"]) for row in rows]
        for row, part in zip(rows, parts):
            if call == "weight gradient" and row["weight_by_pytorch"]:
                part[OURS] = part[PYTORCH]
        flops = sum(n * row["calls"][call]["flops"] for n, row in zip(times, rows))
        sums = _sums(parts, times)
        calls[call] = {"milliseconds": sums, **_shares(sums, flops, rate)}
    total = _sums([call["milliseconds"] for call in calls.values()], [1] * len(calls))
    flops = sum(call["flops"] for call in calls.values())
    return {
        "times": sum(times),
        "calls": calls,
        "total": {"milliseconds": total, **_shares(total, flops, rate)},
    }


def _sums(parts: Sequence[dict[str, float]], times: Sequence[int]) -> dict[str, float]:
    return {
        side: round(sum(n * part[side] for n, part in zip(times, parts)), 4)
        for side in (OURS, PYTORCH)
    }


def _shares(milliseconds: dict[str, float], flops: int, rate: float) -> dict[str, Any]:
    floor = 1e3 * flops / rate
    return {
        "flops": flops,
        "floor_milliseconds": round(floor, 4),
        "speedup": round(milliseconds[PYTORCH] / milliseconds[OURS], 3),
        "fraction_of_floor": round(floor / milliseconds[OURS], 3),
    }


# ---- table ----


def _text(row: dict[str, Any]) -> str:
    """Returns the line of a convolution, or of the network."""
    names = ("network", "", "", "", str(row["times"]))
    if "kernel" in row:
        stride = row["stride"]
        names = (
            f"{row['inputs']}-{row['outputs']}",
            f"{row['height']}x{row['width']}",
            "x".join(map(str, row["kernel"])),
            str(stride[0]) if stride[0] == stride[1] else "x".join(map(str, stride)),
            str(row["times"]),
        )
    both = []
    for call in CALLS:
        ours, pytorch = (row["calls"][call]["milliseconds"][side] for side in (OURS, PYTORCH))
        mark = "*" if call == "weight gradient" and row.get("weight_by_pytorch") else ""
        both.append(f"{ours:.3f}{mark}{pytorch:8.3f}")
    total = row["total"]
    return _line(names, both, f"{total['speedup']:.2f}x", f"{total['fraction_of_floor']:.0%}")


def _line(names: Sequence[str], calls: Sequence[str], ratio: str, share: str) -> str:
    columns = "".join(f"{name:>{width}}" for name, width in zip(names, (10, 9, 7, 7, 6)))
    return columns + "".join(f"{call:>17}" for call in calls) + f"{ratio:>8}{share:>10}"
