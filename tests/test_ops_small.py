"""InfoNCE of a few rows by one call of the compiled library, against float64 and PyTorch's path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mocofast_kernels import cpu, cpu_one_block, cpu_sweep
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mocofast import ops
from tests.oracle import info_nce_oracle, rank_bounds

pytestmark = pytest.mark.skipif(
    cpu_sweep.compiled(torch.float32)[0] is None, reason="no compiled sweep on this machine"
)
EPS = torch.finfo(torch.float32).eps


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of `info_nce`: whether the library computed."""
    seen: list[bool] = []
    compiled = cpu_one_block.compiled_block

    def watched(*arguments: object) -> object:
        found = compiled(*arguments)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(cpu, "compiled_block", watched)
    return seen


@pytest.mark.parametrize(
    ("count", "size", "dim"),
    [
        (1, 1, 1),
        (1, 9, 5),
        (7, 13, 15),  # primes, and lanes left over
        (16, 64, 16),  # whole panels, keys and vectors
        (17, 63, 17),
        (33, 200, 64),
        (600, 16, 128),
        (5, 300, 200),
    ],
)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradient_match_float64(
    count: int, size: int, dim: int, normalized: bool, reduction: str, calls: list[bool]
) -> None:
    query, positive = features(0, count, dim).requires_grad_(), 3 * features(1, count, dim)
    negatives = features(2, size, dim)
    if normalized:
        negatives = F.normalize(negatives)
    options: Any = {"temperature": 0.1, "negatives_normalized": normalized}
    given: Any = (query, positive, negatives)
    loss, rank = ops.info_nce(*given, reduction=reduction, return_rank=True, **options)
    assert torch.equal(loss, ops.info_nce(*given, reduction=reduction, **options))
    weights = features(3, count) if reduction == "none" else torch.tensor(1.0)
    (grad,) = torch.autograd.grad((loss * weights).sum(), query)
    assert calls == [True, True]
    low, high = rank_bounds(query, positive, negatives, 8 * EPS, True, not normalized)
    assert ((low <= rank) & (rank <= high)).all()
    wide = query.detach().double().requires_grad_()
    rows = info_nce_oracle(wide, positive, negatives, 0.1, True, not normalized)
    expected = rows if reduction == "none" else rows.mean()
    (expected_grad,) = torch.autograd.grad((expected * weights.double()).sum(), wide)
    slack = 32 * EPS / 0.1
    torch.testing.assert_close(loss.double(), expected, rtol=slack, atol=slack)
    assert (grad.double() - expected_grad).norm() <= 64 * slack * expected_grad.norm() + 1e-7


@pytest.mark.parametrize("dtypes", ["bff", "bbb", "hfh", "fbb"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numbers_of_16_bits_are_computed_in_float32(
    dtypes: str, reduction: str, calls: list[bool]
) -> None:
    names = {"b": torch.bfloat16, "h": torch.float16, "f": torch.float32}
    query, positive, negatives = (
        features(seed, count, 24).to(names[name])
        for seed, (count, name) in enumerate(zip((20, 20, 70), dtypes))
    )
    query.requires_grad_()
    loss = ops.info_nce(query, positive, negatives, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), query)
    assert calls == [True]
    assert (loss.dtype, grad.dtype) == (torch.float32, query.dtype)
    wide = query.detach().double().requires_grad_()
    rows = info_nce_oracle(wide, positive.double(), negatives.double(), 0.1)
    expected = rows if reduction == "none" else rows.mean()
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    rounded = torch.finfo(query.dtype).eps  # of the gradient alone
    assert (grad.double() - expected_grad).norm() <= (rounded + 1e-5) * expected_grad.norm()


def test_many_keys_of_16_bits_are_not_copied(calls: list[bool]) -> None:
    query = features(0, 4, 8).requires_grad_()
    ops.info_nce(query, features(1, 4, 8), features(2, 2**17 + 1, 8).bfloat16())
    assert calls == [False]


def test_rows_without_direction_short_rows_and_nan_are_as_in_pytorchs_path() -> None:
    query, positive = features(0, 9, 12), features(1, 9, 12)
    query[0], query[1], query[2, 3], positive[4], positive[5, 0] = (
        0,
        query[1] * 1e-20,
        math.nan,
        0,
        1e4,
    )
    negatives = features(2, 40, 12)
    negatives[7] = 0
    negatives[8], positive[6] = query[6], query[6]  # a tie
    given = query, positive, negatives, 10.0, True, True, False
    found = cpu_one_block.compiled_block(*given)
    assert found is not None
    loss, rank, grad = cpu_one_block.one_block(*given)
    assert rank is not None and found[1] is not None
    assert torch.equal(found[1], rank)
    assert found[1][[2, 6]].tolist() == [40, 1]
    torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=1e-5, equal_nan=True)
    scale = grad.abs().amax(1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(found[2] / scale, grad / scale, rtol=0, atol=1e-4, equal_nan=True)
    assert found[0].isnan().tolist() == [row == 2 for row in range(9)]


def test_bits_are_equal_for_any_number_of_threads(calls: list[bool]) -> None:
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            query = features(0, 16, 64).requires_grad_()
            loss = ops.info_nce(query, features(1, 16, 64), features(2, 1024, 64))
            found.append((loss.detach(), *torch.autograd.grad(loss, query)))
        finally:
            torch.set_num_threads(before)
    assert calls == [True] * 3
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


def test_what_the_library_does_not_take_goes_another_way(calls: list[bool]) -> None:
    def computed(query: Tensor, positive: Tensor, negatives: Tensor) -> None:
        query = query.detach().requires_grad_()
        loss = ops.info_nce(query, positive, negatives)
        (grad,) = torch.autograd.grad(loss, query)
        rows = info_nce_oracle(query.detach().double(), positive.double(), negatives.double(), 0.1)
        torch.testing.assert_close(loss.double(), rows.mean(), rtol=0.02, atol=0.02)
        assert grad.isfinite().all()

    plain = features(0, 8, 16), features(1, 8, 16), features(2, 50, 16)
    computed(*plain)
    computed(features(0, 16, 8).t(), *plain[1:])  # another order in memory
    computed(*plain[:2], torch._neg_view(-plain[2]))
    computed(*(x.double() for x in plain))  # never offered to the library
    computed(features(0, 1, 64), features(1, 1, 64), features(2, 2**17 + 1, 64))  # 16 lanes
    assert calls == [True, False, False, False]
    elsewhere = [x.to("meta") for x in plain]  # of another device, as of CUDA without Triton
    options = {"normalize": True, "normalize_negatives": True, "return_rank": False, "mean": True}
    found = cpu.infonce_forward(
        *elsewhere,
        0.1,
        exclude_period=0,
        compute_grad=True,
        only_query=True,
        dot_dtype=torch.float32,
        **options,
    )
    assert found.grad_query is not None and found.grad_query.is_meta
    assert calls[-1] is False
    with FlopCounterMode(display=False) as counter:
        computed(*plain)
    assert calls[-1] is False
    assert counter.get_total_flops() > 0
