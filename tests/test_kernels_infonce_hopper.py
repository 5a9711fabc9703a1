"""The warp-specialised sweeps: values on the CPU, machine code offline, and both on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.oracle import info_nce_oracle
from tests.triton_device import DEVICE

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from mocofast_kernels import infonce_blackwell, infonce_hopper, tiles
from mocofast_kernels.configs import SPECIALISED, TENSOR_MEMORY, Architecture, Tile
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.cpu_ranks import tie_share
from mocofast_kernels.infonce import infonce_forward

from tests import gluon_device

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)

TEMPERATURE = 0.2
TILES = [(C, tile) for C, found in SPECIALISED.items() for tile in found]
Inputs = tuple[Tensor, Tensor, Tensor]


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=1, eps=1e-12)


def _scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    terms = q * k
    return terms.sum(1), terms.sum(1) - tie_share(q.shape[1]) * terms.abs().sum(1)


@contextmanager
def counted(blackwell: bool = False) -> Iterator[list[Any]]:
    """Yields the grids of the sweep's launches, which Python computes where there is no GPU."""
    modules = [*[infonce_blackwell] * blackwell, infonce_hopper]
    gpu = Architecture(blackwell=blackwell)
    functions = {
        "unit_rows": _unit,
        "round_operand": lambda x, dtype, precision: x.to(dtype),
        "positive_scores_of": _scores,
    }
    with (
        mock.patch.object(tiles, "architecture", return_value=gpu),
        gluon_device.run(modules, "_specialised_sweep_kernel", **functions) as grids,
    ):
        yield grids


def _inputs(N: int, K: int, C: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Returns queries, positives near their queries, and unit negatives of bfloat16."""
    generator = torch.Generator().manual_seed(N + K + C)
    query = torch.randn(N, C, generator=generator)
    positive = (query / 4 + torch.randn(N, C, generator=generator)).to(dtype)
    negatives = _unit(torch.randn(K, C, generator=generator))
    # Two negatives tie with the positives of the first two queries.
    negatives[K // 2 : K // 2 + 2] = _unit(positive[:2])
    return query.to(DEVICE, dtype), positive.to(DEVICE), negatives.to(DEVICE, torch.bfloat16)


def _forward(inputs: Inputs, tile: Tile | None, **changes: Any) -> InfoNCEForward:
    options: dict[str, Any] = {
        "normalize": True,
        "normalize_negatives": False,
        "exclude_period": 0,
        "return_rank": True,
        "compute_grad": True,
        "dot_dtype": torch.bfloat16,
    }
    return infonce_forward(*inputs, TEMPERATURE, **{**options, **changes}, tile=tile)


def _assert_equal_sweeps(inputs: Inputs, tile: Tile, **changes: Any) -> InfoNCEForward:
    """Compares with the other sweep, whose operands round alike, and with float64."""
    ours, other = _forward(inputs, tile, **changes), _forward(inputs, None, **changes)
    if ours.rank is not None:
        assert torch.equal(ours.rank, other.rank)
    for name in ("loss", "lse", "grad_query", "grad_positive", "grad_scale"):
        mine, theirs = getattr(ours, name).float(), getattr(other, name).float()
        # Weights next to a step of bfloat16 may round to either side.
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4, msg=name)
    query = inputs[0].double().requires_grad_()
    exact = info_nce_oracle(query, *inputs[1:], TEMPERATURE, normalize_negatives=False)
    if changes.get("mean"):
        exact = exact.mean()
    (gradient,) = torch.autograd.grad(exact.sum(), query)
    # bfloat16 rounds scores by up to 2^-8 / T.
    torch.testing.assert_close(ours.loss.double(), exact, rtol=0, atol=2e-2)
    error = (ours.grad_query.double() - gradient).norm() / gradient.norm()
    assert error < 1e-2, error
    return ours


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU computes the values below")
@pytest.mark.parametrize(
    ("C", "tile", "rank"),
    [
        pytest.param(C, tile, rank, marks=() if rank and C == 128 else pytest.mark.slow)
        for (C, tile), rank in product(TILES, (True, False))
    ],
)
def test_values_are_those_of_the_other_sweep(C: int, tile: Tile, rank: bool) -> None:
    # 70 queries: the second warpgroup has 6. 21 tiles in 3 splits are more than the ring holds,
    # and the last tile is ragged.
    inputs = _inputs(70, 20 * tile.stream + 5, C)
    with counted() as grids:
        ours = _assert_equal_sweeps(inputs, tile, return_rank=rank)
    assert grids == [(1, 3)]
    if rank:  # a tie counts against the positive
        assert ours.rank is not None and ours.rank[:2].min() >= 1


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU computes the values below")
@pytest.mark.parametrize(
    ("N", "K", "dtype", "changes"),
    [
        (3, 7, torch.bfloat16, {}),  # fewer negatives than a tile, no query of the second warpgroup
        # two blocks of queries, whole tiles
        pytest.param(129, 256, torch.float32, {"mean": True}, marks=pytest.mark.slow),
        (5, 300, torch.bfloat16, {"num_splits": 1}),
    ],
)
def test_small_and_odd_sizes(N: int, K: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    inputs = _inputs(N, K, 64, dtype)
    with counted() as grids:
        _assert_equal_sweeps(inputs, SPECIALISED[64][0], **changes)
    assert grids[0][0] == -(-N // 128)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU computes the values below")
@pytest.mark.parametrize(
    ("N", "K", "C", "changes"),
    [
        # two blocks of queries, more tiles than the ring holds
        (130, 6 * 128 + 5, 64, {"num_splits": 1}),
        (3, 7, 64, {"return_rank": False}),
        pytest.param(70, 20 * 128 + 5, 128, {"mean": True}, marks=pytest.mark.slow),
    ],
)
def test_the_sweep_for_blackwell_has_the_values_of_the_other(
    N: int, K: int, C: int, changes: dict[str, Any]
) -> None:
    with counted(blackwell=True) as grids:
        _assert_equal_sweeps(_inputs(N, K, C), SPECIALISED[C][0], **changes)
    assert grids[0][0] == -(-N // 128)


def _assert_wrong_without_waits(inputs: Any, tile: Any, changes: pytest.MonkeyPatch) -> None:
    """Whoever comes first reads a place of the ring before its tile, or after the next one."""
    right = _forward(inputs, tile).loss
    changes.setattr(gluon_device.Barrier, "wait", lambda *_: None)
    wrong = _forward(inputs, tile).loss
    assert not torch.allclose(wrong, right, rtol=1e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU has barriers of its own")
@pytest.mark.parametrize("sort", ["wait", "change"])
def test_the_sweep_for_blackwell_needs_its_barriers(
    sort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, tile = _inputs(4, 1000, 64), SPECIALISED[64][0]
    if sort == "wait":
        with counted(blackwell=True):
            _assert_wrong_without_waits(inputs, tile, monkeypatch)
        return
    monkeypatch.setattr(gluon_device, "PATIENCE", 0.5)
    change = gluon_device.Barrier.change
    # Arrivals without bytes do not count: neither scores, weights nor places of the ring.
    monkeypatch.setattr(
        gluon_device.Barrier, "change", lambda x, n, size: size and change(x, n, size)
    )
    with counted(blackwell=True), pytest.raises(AssertionError, match="nobody ends"):
        _forward(inputs, tile, num_splits=1)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU has barriers of its own")
def test_values_on_the_cpu_need_the_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's ring shows what a kernel with wrong barriers would do."""
    inputs, tile = _inputs(4, 1000, 64), SPECIALISED[64][0]
    with counted(), monkeypatch.context() as changes:
        _assert_wrong_without_waits(inputs, tile, changes)
    with counted(), monkeypatch.context() as changes:
        change = gluon_device.Barrier.change
        changes.setattr(gluon_device, "PATIENCE", 0.5)
        # No place of the ring is ever freed.
        changes.setattr(
            gluon_device.Barrier, "change", lambda x, n, size: size and change(x, n, size)
        )
        with pytest.raises(AssertionError, match="nobody ends"):
            _forward(inputs, tile, num_splits=1)


def test_calls_that_the_sweep_lacks_take_the_rule_s_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, tile = _inputs(4, 200, 64), SPECIALISED[64][0]
    offset = torch.zeros(200 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(200, 64)
    offset.copy_(inputs[2])
    with (
        mock.patch.object(tiles, "architecture", return_value=Architecture(hopper=True)),
        mock.patch.object(infonce_hopper, "specialised_sweep", side_effect=KeyError) as sweep,
    ):
        _forward(inputs, tile, compute_grad=False)
        _forward(inputs, tile, exclude_period=4)
        _forward((*inputs[:2], offset), tile)  # copies need addresses divisible by 16
        assert not sweep.called
        with pytest.raises(KeyError):
            _forward(inputs, tile)
    long, tile = _inputs(4, 200, 256), SPECIALISED[256][0]
    with mock.patch.object(tiles, "architecture", return_value=Architecture(blackwell=True)):
        _forward(long, tile)  # tensor memory has no room for rows of 256 columns
    assert 256 not in TENSOR_MEMORY
    monkeypatch.setitem(sys.modules, "mocofast_kernels.infonce_hopper", None)
    _forward(inputs, SPECIALISED[64][0])  # a Triton without Gluon's functions


@pytest.mark.gpu
@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] not in (9, 10),
    reason="needs H100, H200 or B200",
)
@pytest.mark.parametrize(("C", "tile"), TILES)
@pytest.mark.parametrize("rank", [True, False])
def test_a_gpu_computes_the_values_of_the_other_sweep(C: int, tile: Tile, rank: bool) -> None:
    if torch.cuda.get_device_capability()[0] == 10 and C not in TENSOR_MEMORY:
        pytest.skip("no sweep for Blackwell has rows of this length")
    inputs = _inputs(300, 400 * tile.stream + 5, C)
    one = _assert_equal_sweeps(inputs, tile, return_rank=rank)
    other = _forward(inputs, tile, return_rank=rank)
    assert torch.equal(one.loss, other.loss) and torch.equal(one.grad_query, other.grad_query)
