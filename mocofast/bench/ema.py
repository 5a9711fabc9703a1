"""The EMA of a ResNet-50 with MoCo v2's head (28 M weights) beside the reference's loop and torch._foreach_lerp_.

The floor is the traffic that any of them needs (read both, write one) at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from mocofast_kernels import reference
from torch import nn

from mocofast import ops
from mocofast.bench import timing

MOMENTUM = 0.999
HEAD = (2048, 2048, 128)


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Type of the averaged weights."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of all weights (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return the row."""
    device, dtype = timing.resolved(arguments.device), getattr(torch, arguments.dtype)
    sources = [torch.randn(shape, device=device).to(dtype) for shape in weight_shapes()]
    targets = [torch.randn_like(source) for source in sources]
    count, size = sum(t.numel() for t in targets), targets[0].element_size()
    block = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    copy = torch.empty_like(block)

    def foreach() -> None:
        torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)

    times = timing.interleaved(
        {
            "mocofast": lambda: ops.ema_update_(targets, sources, MOMENTUM),
            "loop": lambda: reference.ema_update_(targets, sources, MOMENTUM),
            "foreach_lerp": foreach,
            "copy": lambda: copy.copy_(block),
        },
        arguments.repeats,
        device,
    )
    bandwidth = 2 * block.numel() / times.pop("copy").median
    traffic = 3 * count * size
    floor = traffic / bandwidth
    loop = times["loop"].median
    print(f"EMA of {len(targets)} tensors, {count / 1e6:.1f} M {arguments.dtype} weights, {traffic / 1e6:.0f} MB")
    print(f"{timing.device_name(device)}; copy {bandwidth / 1e9:.1f} GB/s; floor {1e3 * floor:.3f} ms")
    print(f"{'':16}{'ms':>10}{'quartiles':>20}{'x loop':>9}{'of floor':>10}")
    for name, time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        print(
            f"{name:16}{1e3 * time.median:10.3f}{quartiles:>20}{loop / time.median:9.2f}{floor / time.median:10.0%}"
        )
    return {
        "benchmark": "ema",
        **timing.environment(device),
        "tensors": len(targets),
        "weights": count,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in times.items()},
        "quartiles": {name: [round(1e3 * t, 4) for t in time[1:]] for name, time in times.items()},
        "bytes": traffic,
        "copy_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "floor_milliseconds": round(1e3 * floor, 4),
        "speedup": round(loop / times["mocofast"].median, 3),
        "fraction_of_floor": round(floor / times["mocofast"].median, 3),
    }


def weight_shapes() -> list[tuple[int, ...]]:
    """Shapes of the parameters of torchvision's ResNet-50 with a two-layer head."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        network = resnet50()
        inside, hidden, out = HEAD
        network.fc = nn.Sequential(nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, out))
    return [tuple(parameter.shape) for parameter in network.parameters()]
