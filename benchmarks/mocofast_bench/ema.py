"""Times the EMA of a ResNet-50 with MoCo v2's head (28 M weights).

Other implementations: a loop over tensors as in facebookresearch/moco, torch._foreach_lerp_,
torch.optim.swa_utils.AveragedModel and timm's ModelEmaV3.

The floor is the memory traffic of an EMA (read targets and sources, write targets) at the
bandwidth of memory measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mocofast import ops
from mocofast.device import choose_device
from mocofast_bench import eager_formulas, timing
from mocofast_bench.sizes import weight_shapes

MOMENTUM = 0.999


class Averager(NamedTuple):
    """One implementation of the EMA."""

    averages: list[Tensor]
    update: Callable[[], Any]  # updates `averages` once


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds the dtype of the averaged weights."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of all weights (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints the table and returns the row."""
    # Measure all implementations and memory in turns.
    device, dtype = choose_device(arguments.device), getattr(torch, arguments.dtype)
    sources, candidates, skipped = build_averagers(weight_shapes(), dtype, device)
    count, size, tensors = sum(s.numel() for s in sources), dtype.itemsize, len(sources)
    updates = {name: averager.update for name, averager in candidates.items()}
    times, bandwidth = timing.interleaved_with_memory(updates, arguments.repeats, device)
    traffic = 3 * count * size
    floor = traffic / bandwidth
    loop = times["loop"].median
    # Print the table.
    print(
        f"EMA of {tensors} tensors, {count / 1e6:.1f} M {arguments.dtype} weights, "
        f"{traffic / 1e6:.0f} MB"
    )
    print(
        f"{timing.device_name(device)}; memory {bandwidth / 1e9:.1f} GB/s; "
        f"floor {1e3 * floor:.3f} ms"
    )
    print(f"{'':28}{'ms':>10}{'quartiles':>20}{'x loop':>9}{'of floor':>10}")
    for name, time in times.items():
        quartiles = f"{1e3 * time.low:.3f} - {1e3 * time.high:.3f}"
        speed, share = loop / time.median, floor / time.median
        print(f"{name:28}{1e3 * time.median:10.3f}{quartiles:>20}{speed:9.2f}{share:10.0%}")
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}")
    return {
        "benchmark": "ema",
        **timing.environment(device),
        "tensors": tensors,
        "weights": count,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        **timing.entries(times),
        "skipped": skipped,
        "bytes": traffic,
        "memory_gigabytes_per_second": round(bandwidth / 1e9, 2),
        "floor_milliseconds": round(1e3 * floor, 4),
        "speedup": round(loop / times["mocofast"].median, 3),
        "speedup_over_foreach_lerp": round(
            times["foreach_lerp"].median / times["mocofast"].median, 3
        ),
        "fraction_of_floor": round(floor / times["mocofast"].median, 3),
    }


def build_averagers(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], dict[str, Averager], dict[str, str]]:
    """Builds every implementation of the EMA.

    shapes: shapes of the weights.

    Returns:
        sources: weights to be averaged.
        averagers: {name: implementation}, all with averages of their own.
        skipped: {name: why the implementation cannot run here}.
    """
    model = nn.ParameterList(torch.randn(shape, device=device).to(dtype) for shape in shapes)
    sources: list[Tensor] = list(model.parameters())
    ours, looped, lerped = ([torch.randn_like(source) for source in sources] for _ in range(3))

    @torch.no_grad()
    def foreach() -> None:
        torch._foreach_lerp_(lerped, sources, 1 - MOMENTUM)

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM))
    averaged.update_parameters(model)  # the first update only copies
    result = {
        "mocofast": Averager(ours, lambda: ops.ema_update_(ours, sources, MOMENTUM)),
        "loop": Averager(looped, lambda: eager_formulas.ema_update_(looped, sources, MOMENTUM)),
        "foreach_lerp": Averager(lerped, foreach),
        "swa_utils.AveragedModel": Averager(
            list(averaged.module.parameters()), lambda: averaged.update_parameters(model)
        ),
    }
    try:
        from timm.utils import ModelEmaV3
    except ImportError as error:
        return sources, result, {"timm.ModelEmaV3": str(error)}
    timm_ema = ModelEmaV3(model, decay=MOMENTUM)
    averages: list[Tensor] = list(timm_ema.module.parameters())
    result["timm.ModelEmaV3"] = Averager(averages, lambda: timm_ema.update(model))
    return sources, result, {}
