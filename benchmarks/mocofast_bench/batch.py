"""Times losses over the pairs of a batch, forward and backward, beside eager PyTorch and packages.

CLIP's symmetric loss: mocofast, the eager formula of open_clip, Inf-CL's kernels (GPUs only) and
PyTorch's linear cross entropy (from PyTorch 2.13 on). SigLIP's loss: mocofast, the formula and
siglip-kernel's kernels (GPUs only).
Gradients go to images and texts. "extra MB" is the peak memory of a call.

The floor is 6 N N C operations (products for the logits and for both gradients) at the matrix rate
measured in the same run. CLIP's loss of many pairs takes twice as many, because every direction
computes the logits again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from mocofast.device import choose_device
from mocofast.errors import describe_error
from mocofast_bench import timing
from mocofast_bench.kernels import DTYPES, matrix_product
from mocofast_bench.peers import Unavailable, linear_cross_entropy
from mocofast_bench.timing import Call

SCALE, BIAS = 10.0, -10.0  # SigLIP's first values
Loss = Callable[[Tensor, Tensor], Tensor]  # takes images and texts (N, C)
Build = Callable[[torch.device], Loss]


def _clip(device: torch.device) -> Loss:
    return lambda image, text: ops.clip_loss(image, text, SCALE)


def _siglip(device: torch.device) -> Loss:
    return lambda image, text: ops.siglip_loss(image, text, SCALE, BIAS)


def eager_clip(device: torch.device) -> Loss:
    """Returns the formula of CLIP's paper, which writes N x N logits."""

    def loss(image: Tensor, text: Tensor) -> Tensor:
        logits = SCALE * image @ text.T
        labels = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return loss


def eager_siglip(device: torch.device) -> Loss:
    """Returns the formula of SigLIP's paper, which writes N x N logits."""

    def loss(image: Tensor, text: Tensor) -> Tensor:
        logits = SCALE * image @ text.T + BIAS
        signs = 2 * torch.eye(len(image), device=image.device, dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * logits).sum() / len(image)

    return loss


def inf_cl(device: torch.device) -> Loss:
    """Returns CLIP's loss by Inf-CL's kernels (Cheng et al. 2024, arXiv:2410.17243)."""
    if device.type != "cuda":
        raise Unavailable("its Triton kernels run on GPUs only")
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor) -> Tensor:
        C = image.shape[1]
        one, other = (
            cal_flash_loss(a, b, scale=SCALE, head_dim=C) for a, b in ((image, text), (text, image))
        )
        return (one.mean() + other.mean()) / 2

    return loss


def siglip_kernel(device: torch.device, **options: Any) -> Loss:
    """Returns SigLIP's loss by siglip-kernel (github.com/avocardio/siglip-kernel).

    options: of its loss. Without any, it chooses a kernel by the GPU and the dtype.
    """
    if device.type != "cuda" and not options:
        raise Unavailable("its Triton kernels run on GPUs only")
    from siglip_kernel import fused_siglip_loss

    log_scale, bias = (torch.tensor(x, device=device) for x in (math.log(SCALE), BIAS))
    return lambda image, text: fused_siglip_loss(image, text, log_scale, bias, **options)


def torch_linear(device: torch.device) -> Loss:
    """Returns CLIP's loss by PyTorch's linear cross entropy, with the texts as classes."""
    cross_entropy = linear_cross_entropy()

    def loss(image: Tensor, text: Tensor) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        one, other = (
            cross_entropy(SCALE * a, b, labels) for a, b in ((image, text), (text, image))
        )
        return (one + other) / 2

    return loss


# {loss: {side: how to build it}}. The first side is ours, the second the eager formula.
SIDES: dict[str, dict[str, Build]] = {
    "clip": {
        "mocofast": _clip,
        "eager": eager_clip,
        "inf-cl": inf_cl,
        "linear_cross_entropy": torch_linear,
    },
    "siglip": {"mocofast": _siglip, "eager": eager_siglip, "siglip-kernel": siglip_kernel},
}


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the sizes and the dtype of the problem."""
    parser.add_argument("--n", type=positive, default=4096, help="pairs (default: %(default)s)")
    parser.add_argument(
        "--c", type=positive, default=256, help="feature dimension (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="dtype of the features (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the tables and returns the row."""
    device, dtype = choose_device(arguments.device), DTYPES[arguments.dtype]
    N, C = arguments.n, arguments.c
    image, text = pairs(N, C, dtype, device)
    side = 8192 if device.type == "cuda" else 2048
    calls: dict[tuple[str, str], Call] = {("", "product"): matrix_product(side, dtype, device)}
    skipped: dict[str, str] = {}
    for loss, sides in SIDES.items():
        for name, build in sides.items():
            try:
                call = step(build(device), image, text)
                call()
            except (Unavailable, ImportError) as error:
                skipped[f"{loss}, {name}"] = describe_error(error).splitlines()[0]
            else:
                calls[loss, name] = call
    times = timing.interleaved(calls, arguments.repeats, device)
    rate = 2 * side**3 / times.pop(("", "product")).median
    floor = 6 * N * N * C / rate
    print(
        f"{timing.device_name(device)}; N {N}, C {C}, {arguments.dtype}; floor {1e3 * floor:.3f} ms"
    )
    print(f"{'':32}{'ms':>10}{'quartiles':>20}{'x eager':>9}{'extra MB':>10}")
    memory = {key: _memory(*key, N, C, dtype, device) for key in times}
    for (loss, name), time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        speed = times[loss, "eager"].median / time.median
        extra = memory[loss, name]
        shown = "" if extra is None else f"{extra / 1e6:10.1f}"
        print(f"{f'{loss}, {name}':32}{1e3 * time.median:10.3f}{quartiles:>20}{speed:9.2f}{shown}")
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}")
    return {
        "benchmark": "batch",
        **timing.environment(device),
        "n": N,
        "c": C,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        **timing.entries({", ".join(key): time for key, time in times.items()}),
        "extra_bytes": {", ".join(key): value for key, value in memory.items()},
        "skipped": skipped,
        "floor_milliseconds": round(1e3 * floor, 4),
    }


def pairs(N: int, C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns unit vectors (N, C) of images and texts, which require their gradients."""
    generator = torch.Generator(device).manual_seed(0)
    image, text = (
        F.normalize(torch.randn(N, C, generator=generator, device=device)).to(dtype)
        for _ in range(2)
    )
    return image.requires_grad_(), text.requires_grad_()


def step(loss: Loss, image: Tensor, text: Tensor) -> Call:
    """Returns a forward and backward pass."""

    def call() -> None:
        image.grad = text.grad = None
        loss(image, text).backward()

    return call


def _memory(
    loss: str, name: str, N: int, C: int, dtype: torch.dtype, device: torch.device
) -> int | None:
    """Returns the peak extra bytes of a call. On a CPU a new process has no memory left over."""
    arguments = loss, name, N, C, dtype, str(device)
    if device.type == "cuda":
        return _memory_here(*arguments)
    result: int | None = timing.in_fresh_process(_memory_here, *arguments)
    return result


def _memory_here(
    loss: str, name: str, N: int, C: int, dtype: torch.dtype, device_name: str
) -> int | None:
    device = torch.device(device_name)
    build = SIDES[loss][name]
    step(build(device), *pairs(min(N, 64), C, dtype, device))()  # loading code takes memory too
    return timing.peak_extra_memory(step(build(device), *pairs(N, C, dtype, device)), device)
