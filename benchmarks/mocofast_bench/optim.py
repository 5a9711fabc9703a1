"""Times optimiser steps with the EMA of the momentum encoder, on a ResNet-50's weights.

SGD and AdamW, with bfloat16 copies of query and key encoder or without (--no-copies), stand beside
PyTorch's fused and foreach steps followed by torch._foreach_lerp_ and casts. LARS stands beside
MoCo v3's loops over tensors, and beside timm's LARS followed by torch._foreach_lerp_. timm divides
by the sum of the norms of gradient and decay, and not by the norm of their sum: nearly equal steps.

The floor is the memory traffic of a step at the bandwidth of memory, measured in the same run. A
step reads and writes every tensor once. LARS reads weights and gradients twice, for the
norms. On a GPU all sides are also timed as CUDA graphs, without the cost of launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast.device import choose_device
from mocofast.errors import describe_error
from mocofast.optim.fused import FusedAdamW, FusedLARS, FusedOptimizer, FusedSGD
from mocofast_bench import timing
from mocofast_bench.sizes import weight_shapes
from mocofast_bench.timing import Call

MOMENTUM = 0.99  # of the EMA
LR = 1e-6  # small: weights hardly change over thousands of steps
DECAY = 1e-4  # weight decay

Shapes = Sequence[tuple[int, ...]]


class Weights(NamedTuple):
    """Tensors of a side. float32, except the shadows."""

    params: list[torch.nn.Parameter]  # with gradients
    targets: list[Tensor]  # averages of params
    # bfloat16 copies of params and of targets
    shadows: tuple[list[Tensor], list[Tensor]] | None


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the choice of an optimiser, and of copies."""
    parser.add_argument(
        "--only", choices=tuple(BENCHMARKS), help="time one optimiser (default: all)"
    )
    parser.add_argument(
        "--copies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="SGD and AdamW: write bfloat16 copies of both encoders, too (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the tables and returns the row."""
    device = choose_device(arguments.device)
    tensors, count = len(weight_shapes()), sum(torch.Size(s).numel() for s in weight_shapes())
    row = {
        "benchmark": "optim",
        **timing.environment(device),
        "tensors": tensors,
        "weights": count,
        "repeats": arguments.repeats,
        "copies": arguments.copies,
    }
    name = timing.device_name(device)
    print(f"{name}; {tensors} float32 tensors, {count / 1e6:.1f} M weights")
    for name in [arguments.only] if arguments.only else BENCHMARKS:
        row[name] = _measure(name, device, arguments.repeats, arguments.copies)
        arguments.keep(row)
    return row


def _measure(name: str, device: torch.device, repeats: int, copies: bool) -> dict[str, Any]:
    optimizer, others, skipped = build_sides(name, device, copies)
    steps: dict[str, Call] = {
        "mocofast": optimizer.step,
        **{side: s for side, (_, s) in others.items()},
    }
    if device.type == "cuda":
        for side, step in list(steps.items()):
            try:
                steps[f"{side}, graph"] = capture_graph(step)
            except RuntimeError as error:  # not every optimiser can be captured
                skipped[f"{side}, graph"] = describe_error(error).splitlines()[0]
    times, bandwidth = timing.interleaved_with_memory(steps, repeats, device)
    size = optimizer.traffic() + norm_traffic(optimizer)
    floor = size / bandwidth
    ours, theirs = list(steps)[:2]
    print(
        f"{name}: {size / 1e6:.0f} MB; memory {bandwidth / 1e9:.1f} GB/s; "
        f"floor {1e3 * floor:.3f} ms"
    )
    print(f"{'':24}{'ms':>10}{'quartiles':>20}{'speed':>9}{'of floor':>10}")
    for side, time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        speed = times[theirs].median / time.median
        share = floor / time.median
        print(f"{side:24}{1e3 * time.median:10.3f}{quartiles:>20}{speed:9.2f}{share:10.0%}")
    for side, reason in skipped.items():
        print(f"{side} is left out: {reason}")
    return {
        "skipped": skipped,
        **timing.entries(times),
        "bytes": size,
        "memory_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "floor_milliseconds": round(1e3 * floor, 4),
        "speedup": round(times[theirs].median / times[ours].median, 3),
        "fraction_of_floor": round(floor / times[ours].median, 3),
    }


def capture_graph(step: Call) -> Call:
    """Captures a CUDA graph of the step and returns the graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # creates state and tables, which is impossible during a capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def weights(device: torch.device, copies: bool = True, shapes: Shapes | None = None) -> Weights:
    """Returns random weights, gradients and targets for a side.

    copies: with shadows. shapes: of the weights, None: of a ResNet-50.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random_tensors(scale: float) -> list[Tensor]:
        return [
            scale * torch.randn(shape, device=device, generator=generator)
            for shape in shapes or weight_shapes()
        ]

    params = [torch.nn.Parameter(value) for value in random_tensors(0.1)]
    for param, gradient in zip(params, random_tensors(1e-3)):
        param.grad = gradient
    first, second = ([torch.zeros_like(p, dtype=torch.bfloat16) for p in params] for _ in range(2))
    return Weights(params, random_tensors(0.1), (first, second) if copies else None)


def _ours(name: str, w: Weights) -> FusedOptimizer:
    """Returns our optimiser. LARS has no shadows, as in MoCo v3."""
    options: dict[str, Any] = {"weight_decay": DECAY, "ema": (w.targets, MOMENTUM)}
    if name == "lars":
        return FusedLARS(w.params, LR, **options)
    options["shadows"] = w.shadows
    return (
        FusedAdamW(w.params, LR, **options)
        if name == "adamw"
        else FusedSGD(w.params, LR, 0.9, **options)
    )


def _torch(name: str, w: Weights, kind: str) -> Call:
    """Returns PyTorch's step, then average and casts. kind: "fused" or "foreach"."""
    options: dict[str, Any] = {"weight_decay": DECAY, kind: True}
    if name == "sgd":
        return _then_average(torch.optim.SGD(w.params, LR, momentum=0.9, **options), w)
    options["capturable"] = w.targets[0].is_cuda
    return _then_average(torch.optim.AdamW(w.params, LR, **options), w)


def _timm_lars(w: Weights) -> Call:
    """Returns the step of timm's LARS, with adapted rates for matrices alone, then the average."""
    from timm.optim import Lars

    groups = [
        {"params": [p for p in w.params if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in w.params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return _then_average(Lars(groups, LR, momentum=0.9), w, casts=False)


def _then_average(optimizer: torch.optim.Optimizer, w: Weights, casts: bool = True) -> Call:
    params = [p.detach() for p in w.params]

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(w.targets, params, 1 - MOMENTUM)
        if casts and w.shadows is not None:
            torch._foreach_copy_(w.shadows[0], params)
            torch._foreach_copy_(w.shadows[1], w.targets)

    return step


def lars_loops(w: Weights) -> Call:
    """Returns a LARS step, then the EMA, tensor by tensor (arXiv:2104.02057)."""
    buffers = [torch.zeros_like(p) for p in w.params]

    @torch.no_grad()
    def step() -> None:
        for param, buffer in zip(w.params, buffers):
            update = param.grad
            assert update is not None
            if param.ndim > 1:
                update = update.add(param, alpha=DECAY)
                param_norm, update_norm = torch.norm(param), torch.norm(update)
                one = torch.ones_like(param_norm)
                scale = torch.where(update_norm > 0, 0.001 * param_norm / update_norm, one)
                update = update.mul(torch.where(param_norm > 0, scale, one))
            buffer.mul_(0.9).add_(update)
            param.add_(buffer, alpha=-LR)
        for target, param in zip(w.targets, w.params):
            target.copy_(target * MOMENTUM + param * (1.0 - MOMENTUM))

    return step


# {optimiser: {name: step of another side}}. The first of the others is the one to beat.
Build = Callable[[Weights], Call]
BENCHMARKS: dict[str, dict[str, Build]] = {
    "sgd": {
        "fused, lerp, casts": lambda w: _torch("sgd", w, "fused"),
        "foreach, lerp, casts": lambda w: _torch("sgd", w, "foreach"),
    },
    "lars": {"loops": lars_loops, "timm, lerp": _timm_lars},
    "adamw": {
        "fused, lerp, casts": lambda w: _torch("adamw", w, "fused"),
        "foreach, lerp, casts": lambda w: _torch("adamw", w, "foreach"),
    },
}


def build_sides(
    name: str, device: torch.device, copies: bool = True, shapes: Shapes | None = None
) -> tuple[FusedOptimizer, dict[str, tuple[Weights, Call]], dict[str, str]]:
    """Returns our optimiser, {other side: its weights and step}, and {side left out: reason}.

    copies: with bfloat16 copies, in SGD and AdamW. shapes: as for `weights`.
    """
    others, skipped = {}, {}
    for side, build in BENCHMARKS[name].items():
        own = weights(device, copies, shapes)
        side = side if copies else side.removesuffix(", casts")
        try:
            others[side] = own, build(own)
        except ImportError as error:
            skipped[side] = describe_error(error).splitlines()[0]
    return _ours(name, weights(device, copies, shapes)), others, skipped


def norm_traffic(optimizer: FusedOptimizer) -> int:
    """Returns the bytes read by norms, in addition to `optimizer.traffic()`.

    LARS reads weights and gradients of two or more dimensions twice. SGD and AdamW: 0.
    """
    if not isinstance(optimizer, FusedLARS):
        return 0
    return sum(
        2 * p.nbytes for group in optimizer.param_groups for p in group["params"] if p.ndim > 1
    )
