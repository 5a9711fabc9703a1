"""Times optimiser steps with the EMA of the momentum encoder, on a ResNet-50's weights.

SGD and AdamW, with bfloat16 copies of query and key encoder, stand beside PyTorch's fused steps
followed by torch._foreach_lerp_ and casts. LARS stands beside MoCo v3's loops over tensors.

The floor is the memory traffic of a step at the copy bandwidth measured in the same run. A
step reads and writes every tensor once. LARS reads weights and gradients twice, for the
norms. On a GPU all sides are also timed as CUDA graphs, without the cost of launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast.device import choose_device
from mocofast.optim.fused import FusedAdamW, FusedLARS, FusedOptimizer, FusedSGD
from mocofast_bench import timing
from mocofast_bench.sizes import weight_shapes
from mocofast_bench.timing import Call

MOMENTUM = 0.99  # of the EMA
LR = 1e-6  # small: weights hardly change over thousands of steps
DECAY = 1e-4  # weight decay

Pair = tuple[FusedOptimizer, dict[str, Call]]  # our optimiser, and {name: step} of the other side


class Weights(NamedTuple):
    """Tensors of a side, with the shapes of a ResNet-50. float32, except the shadows."""

    params: list[torch.nn.Parameter]  # with gradients
    targets: list[Tensor]  # averages of params
    shadows: tuple[list[Tensor], list[Tensor]]  # bfloat16 copies of params and of targets


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the choice of an optimiser."""
    parser.add_argument(
        "--only", choices=tuple(BENCHMARKS), help="time one optimiser (default: all)"
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
    }
    name = timing.device_name(device)
    print(f"{name}; {tensors} float32 tensors, {count / 1e6:.1f} M weights")
    for name in [arguments.only] if arguments.only else BENCHMARKS:
        row[name] = _measure(name, device, arguments.repeats)
    return row


def _measure(name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    optimizer, others = BENCHMARKS[name](weights(device), weights(device))
    steps: dict[str, Call] = {"mocofast": optimizer.step, **others}
    if device.type == "cuda":
        steps |= {f"{side}, graph": capture_graph(step) for side, step in steps.items()}
    times, bandwidth = timing.interleaved_with_copy(steps, repeats, device)
    size = optimizer.traffic() + norm_traffic(optimizer)
    floor = size / bandwidth
    ours, theirs = list(steps)[:2]
    print(
        f"{name}: {size / 1e6:.0f} MB; copy {bandwidth / 1e9:.1f} GB/s; floor {1e3 * floor:.3f} ms"
    )
    print(f"{'':24}{'ms':>10}{'quartiles':>20}{'speed':>9}{'of floor':>10}")
    for side, time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        speed = times[theirs].median / time.median
        share = floor / time.median
        print(f"{side:24}{1e3 * time.median:10.3f}{quartiles:>20}{speed:9.2f}{share:10.0%}")
    return {
        "milliseconds": {side: round(1e3 * time.median, 4) for side, time in times.items()},
        "quartiles": {side: [round(1e3 * t, 4) for t in time[1:]] for side, time in times.items()},
        "bytes": size,
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 2),
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


def weights(device: torch.device) -> Weights:
    """Returns random weights, gradients and targets for a side."""
    generator = torch.Generator(device).manual_seed(0)

    def random_tensors(scale: float) -> list[Tensor]:
        return [
            scale * torch.randn(shape, device=device, generator=generator)
            for shape in weight_shapes()
        ]

    params = [torch.nn.Parameter(value) for value in random_tensors(0.1)]
    for param, gradient in zip(params, random_tensors(1e-3)):
        param.grad = gradient
    first, second = ([torch.zeros_like(p, dtype=torch.bfloat16) for p in params] for _ in range(2))
    return Weights(params, random_tensors(0.1), (first, second))


def sgd(w: Weights, v: Weights) -> Pair:
    """Returns SGD with momentum and weight decay.

    w: weights of our optimiser.
    v: weights of the second side.
    """
    ours = FusedSGD(
        w.params, LR, 0.9, weight_decay=DECAY, ema=(w.targets, MOMENTUM), shadows=w.shadows
    )
    theirs = torch.optim.SGD(v.params, LR, momentum=0.9, weight_decay=DECAY, fused=True)
    return ours, {"fused, lerp, casts": _then_average(theirs, v)}


def adamw(w: Weights, v: Weights) -> Pair:
    """Returns AdamW. w, v: as in `sgd`."""
    ours = FusedAdamW(
        w.params, LR, weight_decay=DECAY, ema=(w.targets, MOMENTUM), shadows=w.shadows
    )
    capturable = v.targets[0].is_cuda
    theirs = torch.optim.AdamW(v.params, LR, weight_decay=DECAY, fused=True, capturable=capturable)
    return ours, {"fused, lerp, casts": _then_average(theirs, v)}


def lars(w: Weights, v: Weights) -> Pair:
    """Returns LARS without shadows: MoCo v3 has no shadows. w, v: as in `sgd`."""
    ours = FusedLARS(w.params, LR, weight_decay=DECAY, ema=(w.targets, MOMENTUM))
    buffers = [torch.zeros_like(p) for p in v.params]
    return ours, {"loops": lambda: lars_loops(v, buffers)}


def _then_average(optimizer: torch.optim.Optimizer, w: Weights) -> Call:
    params = [p.detach() for p in w.params]

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(w.targets, params, 1 - MOMENTUM)
        torch._foreach_copy_(w.shadows[0], params)
        torch._foreach_copy_(w.shadows[1], w.targets)

    return step


@torch.no_grad()
def lars_loops(w: Weights, buffers: list[Tensor]) -> None:
    """Makes a LARS step, then the EMA, tensor by tensor (arXiv:2104.02057)."""
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


def norm_traffic(optimizer: FusedOptimizer) -> int:
    """Returns the bytes read by norms, in addition to `optimizer.traffic()`.

    LARS reads weights and gradients of two or more dimensions twice. SGD and AdamW: 0.
    """
    if not isinstance(optimizer, FusedLARS):
        return 0
    return sum(
        2 * p.nbytes for group in optimizer.param_groups for p in group["params"] if p.ndim > 1
    )


BENCHMARKS = {"sgd": sgd, "lars": lars, "adamw": adamw}
