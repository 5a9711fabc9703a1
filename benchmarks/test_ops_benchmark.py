"""Times small problems of the ops beside eager PyTorch, with pytest-benchmark.

    pytest benchmarks/test_ops_benchmark.py --benchmark-enable --benchmark-group-by=group

`mocofast bench kernels` and `mocofast bench ema` compare full sizes, with memory and the limits
of the machine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mocofast_bench import eager_formulas, kernels, timing
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mocofast import ops
from mocofast.device import choose_device

SIZES = [(64, 4096, 64), (128, 16384, 128)]  # N, K, C


@pytest.mark.parametrize("side", ["mocofast", "with rank", "eager"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_info_nce_forward_and_backward(
    benchmark: BenchmarkFixture, sizes: tuple[int, int, int], side: str
) -> None:
    benchmark.group = f"info_nce {sizes}"
    device = choose_device("auto")
    step = kernels.steps(sizes, torch.float32, device)[side]

    def synchronised() -> None:
        step()
        timing.synchronize(device)

    benchmark(synchronised)


def foreach_lerp_(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """Does what `ema_update_` does on a CPU, without checks."""
    torch._foreach_lerp_(targets, sources, 1 - momentum)


@pytest.mark.parametrize(
    "update",
    [ops.ema_update_, foreach_lerp_, eager_formulas.ema_update_],
    ids=["mocofast", "foreach_lerp", "eager"],
)
def test_ema(benchmark: BenchmarkFixture, update: Callable[..., None]) -> None:
    benchmark.group = "ema, 64 tensors of 64 x 64 x 3 x 3"
    targets, sources = ([torch.randn(64, 64, 3, 3) for _ in range(64)] for _ in range(2))
    benchmark(update, targets, sources, 0.999)


@pytest.mark.parametrize(
    "enqueue", [ops.enqueue_, eager_formulas.enqueue_], ids=["mocofast", "eager"]
)
def test_enqueue(benchmark: BenchmarkFixture, enqueue: Callable[..., None]) -> None:
    benchmark.group = "enqueue 256 of 65536 x 128"
    queue, pointer, keys = torch.zeros(65536, 128), torch.tensor([0]), torch.randn(256, 128)
    benchmark(enqueue, queue, pointer, keys)
