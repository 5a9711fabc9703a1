"""Times ghost BatchNorm on a ResNet-50's activations, channels-last.

mocofast: in Triton's kernels on a GPU, in C on a CPU with AVX-512 (float32 and bfloat16), else by
PyTorch: a loop over splits without gradients, a fold with gradients. The first line says which.
unsplit: PyTorch's BatchNorm over the whole batch, which is less work (cuDNN on a GPU).
loop: PyTorch's BatchNorm, called once for every split.
fold: PyTorch's BatchNorm, called once, with splits folded into channels.

Modes are the forward pass (key encoder), forward and backward (query encoder), and a forward
pass with residual and ReLU. The floor is the memory traffic at the bandwidth measured
in the same run, for kernels: the forward pass reads x for the statistics and again for the output,
the backward pass reads x and the gradient for the sums and again for the gradient of x. Every
call takes the next inputs, and all inputs together exceed the caches. On a GPU mocofast and
unsplit are also timed as CUDA graphs, without the cost of launches.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mocofast_kernels.cpu_ghost_bn import normalises
from torch import Tensor

from mocofast.device import choose_device
from mocofast.ops import backend, batch_norm, batch_norm_pytorch
from mocofast_bench import timing
from mocofast_bench.optim import capture_graph

# (channels, width = height) of activations in a ResNet-50.
LAYERS = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
MOMENTUM, EPS = 0.1, 1e-5
ROTATED = 256 * 2**20  # bytes of all inputs together, more than caches hold


class NormInputs(NamedTuple):
    """Tensors of one call."""

    x: Tensor  # (N, C, S, S), channels-last
    residual: Tensor  # (N, C, S, S)
    grad: Tensor  # (N, C, S, S)
    weight: Tensor  # (C,), float32
    bias: Tensor  # (C,), float32
    running_mean: Tensor  # (C,), float32
    running_var: Tensor  # (C,), float32


class Mode(NamedTuple):
    """What is timed."""

    backward: bool
    fused: bool  # with residual and ReLU
    sweeps: int  # arrays of the size of x that are read and written


MODES = {
    "forward": Mode(backward=False, fused=False, sweeps=3),
    "forward, backward": Mode(backward=True, fused=False, sweeps=8),
    "forward, residual, ReLU": Mode(backward=False, fused=True, sweeps=4),
}

Norm = Callable[[NormInputs, int, bool], Tensor]  # (inputs, splits, fused) -> output


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the batch, the number of splits, the dtype and the layer."""
    parser.add_argument("--n", type=positive, help="images (default: 256 on a GPU, 16 on a CPU)")
    parser.add_argument(
        "--splits",
        type=positive,
        default=8,
        help="groups of samples that are normalised apart (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of activations (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        choices=range(1, len(LAYERS) + 1),
        help="layer of the ResNet-50 (default: all, on a CPU 4 to 6)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the tables and returns the row.

    Raises SystemExit if --n is not a multiple of --splits.
    """
    device = choose_device(arguments.device)
    on_gpu = device.type == "cuda"
    n = arguments.n or (256 if on_gpu else 16)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    if n % arguments.splits:
        raise SystemExit(f"--n must be divisible by --splits: got {n} and {arguments.splits}")
    layers: tuple[tuple[int, int], ...] = LAYERS if on_gpu else LAYERS[3:]
    if arguments.layer:
        layers = (LAYERS[arguments.layer - 1],)
    by = computed_by(device, dtype)
    print(
        f"{timing.device_name(device)}; {n} images, {arguments.splits} splits, {dtype}; "
        f"mocofast computes by {by}"
    )
    rows: list[dict[str, Any]] = []
    row = {
        "benchmark": "norm",
        **timing.environment(device),
        "splits": arguments.splits,
        "dtype": str(dtype).removeprefix("torch."),
        "computed_by": by,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    for channels, side in layers:
        inputs = activations(n, channels, side, dtype, device)
        for name, mode in MODES.items():
            steps = rotated_steps(inputs, arguments.splits, mode)
            times, bandwidth = timing.interleaved_with_memory(steps, arguments.repeats, device)
            traffic = mode.sweeps * inputs[0].x.nbytes
            rows.append(_report(name, (n, channels, side, side), traffic, bandwidth, times))
            arguments.keep(row)
    return row


def computed_by(device: torch.device, dtype: torch.dtype) -> str:
    """Returns what computes our side: Triton, C or PyTorch."""
    if device.type == "cpu":
        return "C" if normalises(dtype) else "PyTorch"
    return "Triton" if backend.fuses_batch_norm(device.type) else "PyTorch"


def _report(
    mode: str,
    shape: tuple[int, ...],
    traffic: int,
    bandwidth: float,
    times: dict[str, timing.Timing],
) -> dict[str, Any]:
    floor = traffic / bandwidth
    whole = times["unsplit"].median
    print(
        f"{shape}, {mode}: {traffic / 1e6:.0f} MB; memory {bandwidth / 1e9:.1f} GB/s; "
        f"floor {1e3 * floor:.3f} ms"
    )
    print(f"{'':20}{'ms':>10}{'quartiles':>20}{'of unsplit':>12}{'of floor':>10}")
    for side, time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        ratio, share = time.median / whole, floor / time.median
        print(f"{side:20}{1e3 * time.median:10.3f}{quartiles:>20}{ratio:11.2f}x{share:10.0%}")
    return {
        "shape": shape,
        "mode": mode,
        **timing.entries(times),
        "bytes": traffic,
        "memory_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "floor_milliseconds": round(1e3 * floor, 4),
        "time_of_unsplit": round(times["mocofast"].median / whole, 3),
        "fraction_of_floor": round(floor / times["mocofast"].median, 3),
    }


def activations(
    n: int, channels: int, side: int, dtype: torch.dtype, device: torch.device
) -> list[NormInputs]:
    """Returns sets of random inputs, ROTATED bytes in all (32 sets at most).

    n, channels, side: x is (n, channels, side, side).
    """
    generator = torch.Generator(device).manual_seed(0)

    def random_images() -> Tensor:
        x = torch.randn(n, channels, side, side, device=device, generator=generator).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    size = n * channels * side**2 * dtype.itemsize
    sets = []
    for _ in range(min(32, -(-ROTATED // size))):
        rows = (torch.rand(channels, device=device, generator=generator) + 0.5 for _ in range(4))
        sets.append(NormInputs(random_images(), random_images(), random_images(), *rows))
    return sets


def rotated_steps(
    inputs: list[NormInputs], splits: int, mode: Mode
) -> dict[str, Callable[[], Any]]:
    """Returns {name: call} of every side. Every call takes the next inputs."""
    sides: dict[str, Norm] = {"mocofast": ghost, "unsplit": unsplit, "loop": loop, "fold": fold}
    steps = {
        name: _rotated([_step(norm, i, splits, mode) for i in inputs])
        for name, norm in sides.items()
    }
    if inputs[0].x.is_cuda:
        for name in ("mocofast", "unsplit"):
            steps[f"{name}, graph"] = _rotated(
                [capture_graph(_step(sides[name], i, splits, mode)) for i in inputs]
            )
    return steps


def _rotated(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    turns = itertools.cycle(calls)

    def call() -> None:
        next(turns)()

    return call


def _step(norm: Norm, inputs: NormInputs, splits: int, mode: Mode) -> Callable[[], Any]:
    if not mode.backward:
        return torch.no_grad()(lambda: norm(inputs, splits, mode.fused))
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.weight, inputs.bias)]
    tracked = inputs._replace(x=leaves[0], weight=leaves[1], bias=leaves[2])
    return lambda: torch.autograd.grad(norm(tracked, splits, mode.fused), leaves, inputs.grad)


def ghost(i: NormInputs, splits: int, fused: bool) -> Tensor:
    """Our ghost BatchNorm."""
    residual = i.residual if fused else None
    rows = (i.weight, i.bias, i.running_mean, i.running_var)
    return batch_norm.ghost_batch_norm(i.x, *rows, splits, MOMENTUM, EPS, fused, residual)


def unsplit(i: NormInputs, splits: int, fused: bool) -> Tensor:
    """PyTorch's BatchNorm over the whole batch."""
    return _finish(_native(i.x, i), i, fused)


def loop(i: NormInputs, splits: int, fused: bool) -> Tensor:
    """PyTorch's BatchNorm, called for each split."""
    outputs = [_native(i.x[split::splits], i) for split in range(splits)]
    return _finish(torch.stack(outputs, dim=1).flatten(0, 1), i, fused)


def fold(i: NormInputs, splits: int, fused: bool) -> Tensor:
    """PyTorch's BatchNorm, called once over re-ordered channels."""
    rows = (i.weight, i.bias, i.running_mean, i.running_var)
    return _finish(
        batch_norm_pytorch.splits_as_channels(i.x, *rows, splits, MOMENTUM, EPS), i, fused
    )


def _native(x: Tensor, i: NormInputs) -> Tensor:
    return F.batch_norm(x, i.running_mean, i.running_var, i.weight, i.bias, True, MOMENTUM, EPS)


def _finish(y: Tensor, i: NormInputs, fused: bool) -> Tensor:
    return y.add_(i.residual).relu_() if fused else y
