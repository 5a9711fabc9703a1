"""Optimiser steps with the momentum encoder's average, on a ResNet-50's weights: SGD and AdamW, with bfloat16 copies
of both encoders, beside PyTorch's fused steps followed by torch._foreach_lerp_ and casts; LARS beside the loops over
tensors that MoCo v3 takes for it and for the average.

The floor is the traffic of a step that reads and writes everything once (LARS reads weights and gradients twice, for
their norms) at the copy bandwidth measured in the same run. On a GPU both sides are also timed as CUDA graphs, which
leaves out the launches.
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

MOMENTUM = 0.99  # of the average
LR = 1e-6  # so that weights stay what they are through thousands of steps
DECAY = 1e-4

Pair = tuple[FusedOptimizer, dict[str, Call]]  # ours, and by name the step of the other side


class Weights(NamedTuple):
    """One side's tensors, ResNet-50's by shape, float32 but for the shadows."""

    params: list[torch.nn.Parameter]  # with gradients
    targets: list[Tensor]
    shadows: tuple[list[Tensor], list[Tensor]]  # bfloat16


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Which steps."""
    parser.add_argument(
        "--only",
        choices=tuple(BENCHMARKS),
        help="one of the optimisers (default: all, one after the other)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the tables, return the row."""
    device = choose_device(arguments.device)
    count = sum(torch.Size(shape).numel() for shape in weight_shapes())
    row = {
        "benchmark": "optim",
        **timing.environment(device),
        "tensors": len(weight_shapes()),
        "weights": count,
        "repeats": arguments.repeats,
    }
    print(
        f"{timing.device_name(device)}; {len(weight_shapes())} float32 tensors, {count / 1e6:.1f} M weights"
    )
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
        print(
            f"{side:24}{1e3 * time.median:10.3f}{quartiles:>20}{speed:9.2f}{floor / time.median:10.0%}"
        )
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
    """Replays of a CUDA graph of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # makes state and tables, which a capture cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def weights(device: torch.device) -> Weights:
    """Random weights, gradients and targets, for one side alone."""
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
    """SGD with momentum and weight decay: ours of w, the other side's step of v."""
    ours = FusedSGD(
        w.params, LR, 0.9, weight_decay=DECAY, ema=(w.targets, MOMENTUM), shadows=w.shadows
    )
    theirs = torch.optim.SGD(v.params, LR, momentum=0.9, weight_decay=DECAY, fused=True)
    return ours, {"fused, lerp, casts": _then_average(theirs, v)}


def adamw(w: Weights, v: Weights) -> Pair:
    """AdamW."""
    ours = FusedAdamW(
        w.params, LR, weight_decay=DECAY, ema=(w.targets, MOMENTUM), shadows=w.shadows
    )
    capturable = v.targets[0].is_cuda
    theirs = torch.optim.AdamW(v.params, LR, weight_decay=DECAY, fused=True, capturable=capturable)
    return ours, {"fused, lerp, casts": _then_average(theirs, v)}


def lars(w: Weights, v: Weights) -> Pair:
    """LARS and the average, without shadows, of which MoCo v3 has none."""
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
    """A LARS step, then the average, tensor by tensor and operation by operation (arXiv:2104.02057)."""
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
    """Bytes beyond `traffic`: LARS reads weights and gradients of two or more dimensions twice, for their norms."""
    if not isinstance(optimizer, FusedLARS):
        return 0
    return sum(
        2 * p.nbytes for group in optimizer.param_groups for p in group["params"] if p.ndim > 1
    )


BENCHMARKS = {"sgd": sgd, "lars": lars, "adamw": adamw}
