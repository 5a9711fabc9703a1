"""Checks the EMA kernel against float64, without a GPU in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels import ema
from mocofast_kernels.ema import BLOCK, ema_update_
from mocofast_kernels.tables import PLANS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# 1, either side of what one program updates, and several programs with a tail.
SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 809)


def _tensors(dtype: torch.dtype, seed: int, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]


def _expected(target: Tensor, source: Tensor, momentum: float) -> Tensor:
    return momentum * target.double() + (1 - momentum) * source.double()


def _assert_close(target: Tensor, expected: Tensor) -> None:
    # Float32 products and sum, then one rounding to the target's type.
    eps = torch.finfo(target.dtype).eps
    torch.testing.assert_close(target.double(), expected, rtol=0.51 * eps + 2e-7, atol=5e-7)


@pytest.mark.parametrize("target_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("source_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_element_is_the_average_in_every_pair_of_types(
    target_dtype: torch.dtype, source_dtype: torch.dtype, as_tensor: bool
) -> None:
    targets, sources = _tensors(target_dtype, 0), _tensors(source_dtype, 1)
    momentum: float | Tensor = (
        torch.tensor(0.9, device=DEVICE, dtype=torch.float64) if as_tensor else 0.9
    )
    expected = [_expected(t, s, 0.9) for t, s in zip(targets, sources)]
    unchanged = [s.clone() for s in sources]
    ema_update_(targets, sources, momentum)
    for target, value in zip(targets, expected):
        _assert_close(target, value)
    assert all(torch.equal(s, u) for s, u in zip(sources, unchanged))


def test_a_momentum_near_one_keeps_its_step() -> None:
    # 1 - 0.9999, rounded to float32 first, would have a relative error of 5e-4. 10,000 steps would
    # show this error.
    (target,), (source,) = _tensors(FP32, 0, (33,)), _tensors(FP32, 1, (33,))
    start = target.clone()
    ema_update_([target], [source], 0.9999)
    moved = (target - start).double() / (source - start).double()
    # The addition of the step to a number of size 1 rounds the step.
    assert abs(float(moved.median()) - 1e-4) < 2e-7


def test_layouts_of_memory_are_followed_and_gaps_are_left_alone() -> None:
    weight = torch.randn(8, 3, 5, 5).to(DEVICE, memory_format=torch.channels_last)
    buffer = torch.zeros(6, 8, device=DEVICE)
    pairs = [
        # Both channels-last, without gaps.
        (weight, torch.randn_like(weight)),
        # Both transposed.
        (torch.randn(7, 5, device=DEVICE).T, torch.randn(7, 5, device=DEVICE).T),
        # Different orders of elements.
        (torch.randn(7, 5, device=DEVICE).T, torch.randn(5, 7, device=DEVICE)),
        # Gaps.
        (buffer[:, ::2], torch.ones(6, 4, device=DEVICE)),
        # An address that is not a multiple of 16 bytes.
        (torch.zeros(9, device=DEVICE)[1:], torch.ones(8, device=DEVICE)),
    ]
    assert pairs[0][1].is_contiguous(memory_format=torch.channels_last)
    expected = [_expected(t, s, 0.75) for t, s in pairs]
    ema_update_([t for t, _ in pairs], [s for _, s in pairs], 0.75)
    for (target, _), value in zip(pairs, expected):
        _assert_close(target, value)
    assert not buffer[:, 1::2].any()


def test_integers_are_copied_doubles_stay_double_and_empty_tensors_pass() -> None:
    targets = [
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.float64),
        torch.ones(0),
    ]
    sources = [
        torch.tensor(5),
        torch.tensor([False, False]),
        torch.full((3,), 1 / 3).double(),
        torch.ones(0),
    ]
    targets, sources = [t.to(DEVICE) for t in targets], [s.to(DEVICE) for s in sources]
    expected = _expected(targets[2], sources[2], 0.99)
    ema_update_(targets, sources, 0.99)
    assert targets[0].item() == 5
    assert targets[1].tolist() == [False, False]
    torch.testing.assert_close(targets[2], expected, rtol=1e-15, atol=0)
    ema_update_([], [], 0.5)


def test_a_tied_tensor_is_updated_once() -> None:
    target, source = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    ema_update_([target, target.view(5)], [source, source], 0.5)
    assert target.tolist() == [0.5] * 5


def test_a_replaced_storage_is_written_and_the_old_one_is_not() -> None:
    target, source = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    ema_update_([target], [source], 0.5)
    old = target.data
    target.data = torch.zeros(5, device=DEVICE)
    source.data = torch.full((5,), 4.0, device=DEVICE)
    ema_update_([target], [source], 0.5)
    assert old.tolist() == [0.5] * 5
    assert target.tolist() == [2.0] * 5


def test_one_launch_for_each_pair_of_types_and_width_of_loads_and_one_plan_for_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, grids = ema._ema_kernel, []

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(ema, "_ema_kernel", Counting())
    targets, sources = _tensors(FP32, 0) + _tensors(BF16, 1), _tensors(FP32, 2) * 2
    ema._tables._plans.clear()
    for _ in range(3):
        ema_update_(targets, sources, 0.9)
    # For both types: 1 + 1 + 2 + 3 programs for sizes that rule out wide loads, 1 for BLOCK.
    assert grids == [(7,), (1,)] * 6
    assert len(ema._tables._plans) == 1


def test_remembered_tables_do_not_pile_up() -> None:
    kept = []  # keeps addresses from being used again
    for _ in range(PLANS + 3):
        kept.append((torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)))
        ema_update_([kept[-1][0]], [kept[-1][1]], 0.5)
    assert len(ema._tables._plans) == PLANS
    assert all(target.tolist() == [0.5, 0.5] for target, _ in kept)


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_update() -> None:
    targets, sources = _tensors(FP32, 0), _tensors(FP32, 1)
    momentum = torch.tensor(0.5, device="cuda")
    ema_update_(targets, sources, momentum)  # uploads the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, momentum)
    expected = [_expected(t, s, 0.25) for t, s in zip(targets, sources)]
    momentum.fill_(0.25)
    graph.replay()
    for target, value in zip(targets, expected):
        _assert_close(target, value)
