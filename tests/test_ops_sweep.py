"""The compiled sweep over the negatives, against float64 and against PyTorch's operators."""

from __future__ import annotations

import ctypes
import importlib.util
import math
from typing import Any

import pytest
import torch
from mocofast_kernels import cpu, cpu_library, cpu_products, cpu_sweep
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import test_ops_cpu
from tests.test_ops_cpu import features

TYPES = [torch.float32, torch.bfloat16]


def sweep_of(rows: Tensor) -> cpu_sweep.Sweep:
    sweep = cpu_sweep.sweep_of(rows)
    if sweep is None:
        pytest.skip(f"no compiled sweep: {cpu_sweep.compiled(rows.dtype)[1]}")
    return sweep


def forward(negatives: Tensor, count: int = 40, **changes: Any) -> cpu.InfoNCEForward:
    width = negatives.shape[1]
    query, positive = features(0, count, width), features(1, count, width)
    return test_ops_cpu.forward(query, positive, negatives, 0.1, **changes)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("count", "size", "dim"),
    [
        (1, 1, 2),
        (16, 7, 16),  # one vector of rows, fewer keys than are computed at a time
        (17, 257, 18),  # one row and one key more than a panel and a tile
        (33, 600, 66),  # the least last vector of columns
        (70, 521, 200),  # columns: three groups and a half vector
        (5, 9, 130),
    ],
)
def test_sums_match_float64(
    count: int, size: int, dim: int, dtype: torch.dtype, normalize: bool
) -> None:
    rows, keys = (features(0, count, dim) / dim**0.5).to(dtype), features(1, size, dim).to(dtype)
    divisor = keys.double().norm(dim=1, keepdim=True) if normalize else 1.0
    exact = keys.double() / divisor
    logits = rows.double() @ exact.t()
    tie = logits.median(1, keepdim=True).values.float() - 1e-3
    total, output, above = sweep_of(rows).sums(keys, slice(0, count), normalize, tie, True)
    assert output is not None
    weights = torch.exp2(logits)
    torch.testing.assert_close(total.double(), weights.sum(1, keepdim=True), rtol=2e-6, atol=0)
    error = (output - weights @ exact).norm() / (weights @ exact).norm()
    # A weight of bfloat16 is off by 2^-9, and divided by the norm.
    assert error <= (2e-6 if dtype == torch.float32 else 2**-8)
    assert above is not None and (above - (logits >= tie).sum(1)).abs().max() <= 1


def test_some_rows_alone_get_their_own_sums() -> None:
    rows, keys = features(0, 50, 24), features(1, 30, 24)
    sweep = sweep_of(rows)
    every, _, _ = sweep.sums(keys, slice(0, 50), False, None, False)
    some, output, above = sweep.sums(keys, slice(32, 50), False, None, False)
    assert torch.equal(some, every[32:]) and output is None and above is None


@pytest.mark.parametrize("dtype", TYPES)
def test_a_single_row_may_have_any_stride(dtype: torch.dtype) -> None:
    row, keys = features(0, 1, 24).to(dtype), features(1, 30, 24).to(dtype)
    column = torch.empty(24, 1, dtype=dtype).copy_(row.t()).t()
    assert column.stride() == (1, 1)  # the first between rows, of which there is one
    sums = [sweep_of(x).sums(keys, slice(0, 1), False, None, True)[:2] for x in (row, column)]
    for one, other in zip(*sums):
        assert one is not None and other is not None and torch.equal(one, other)


def test_powers_of_two_are_exact_to_two_ulp_and_keep_inf_and_nan() -> None:
    logits = torch.cat([torch.linspace(-125, 127, 1023), torch.tensor([math.inf, -math.inf])])
    logits = torch.cat([logits, torch.tensor([math.nan, 128.0, -200.0, 0.0, -1.0])])
    (got, _, _) = sweep_of(logits[:, None]).sums(
        torch.ones(1, 1), slice(0, len(logits)), False, None, False
    )
    want = torch.exp2(logits.double()).float()[:, None]
    torch.testing.assert_close(got, want, rtol=2 * 2.0**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_results_are_those_of_pytorchs_operators(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With negatives without a direction, of huge and tiny numbers, and of other types."""
    monkeypatch.setattr(cpu_products, "cpu_bf16", lambda: "AVX512-BF16")
    sweep_of(torch.zeros(1, 2, dtype=dtype))
    negatives = features(2, 5000, 30)
    negatives[7], negatives[8], negatives[9] = 0, negatives[8] * 1e25, negatives[9] * 1e-25
    for stored in (negatives, negatives.bfloat16(), negatives.t().contiguous().t()):
        got = forward(stored, dot_dtype=dtype)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_sweep, "sweep_of", lambda rows: None)
            want = forward(stored, dot_dtype=dtype)
        slack = 1e-5 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(got.loss, want.loss, rtol=slack, atol=slack)
        assert got.rank is not None and want.rank is not None
        # A tie is decided by rounding, which differs where logits are rounded to bfloat16.
        assert (got.rank - want.rank).abs().max() <= (1 if dtype == torch.float32 else 100)
        for name in ("grad_query", "grad_positive"):
            one, other = getattr(got, name), getattr(want, name)
            assert (one - other).norm() <= slack * other.norm(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_negative_makes_the_loss_nan_as_pytorchs_operators_do(bad: float) -> None:
    sweep_of(torch.zeros(1, 1))
    negatives = features(2, 5000, 30)
    negatives[4999, 29] = bad
    result = forward(negatives)
    assert bool(result.loss.isnan().all())
    assert result.rank is not None and bool((result.rank == 5000).all())


class Watching(TorchDispatchMode):
    """Collects the names of operations, as a counter of FLOP does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_counter_of_operations_sees_every_product() -> None:
    negatives = features(2, 5000, 30)
    with Watching() as seen:
        forward(negatives)
    products = [name for name in seen.names if "mm" in name or "linear" in name]
    blocks = -(-5000 // (cpu.LOGITS // 40))
    assert len(products) == 2 * blocks


class OtherCPU(ctypes.CDLL):
    """The library on a CPU without its instructions."""

    def sweep_runs(self, bfloat16: bool) -> int:
        return 0


@pytest.mark.parametrize("library", ["missing", "older", "of another CPU"])
def test_pytorch_serves_where_the_library_cannot(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_of(torch.zeros(1, 1))
    negatives = features(2, 5000, 30)
    want = forward(negatives)
    path = importlib.util.find_spec(cpu_library.NAME)
    assert path is not None and path.origin is not None
    found, said = {
        "missing": ((None, f"not compiled: {cpu_library.INSTALL}"), "install a C compiler"),
        "older": ((ctypes.CDLL(None), ""), "sweep_keys"),  # the functions of this process
        "of another CPU": ((OtherCPU(path.origin), ""), "does not know AVX-512"),
    }[library]
    monkeypatch.setattr(cpu_sweep, "library", lambda: found)
    monkeypatch.setattr(cpu_sweep, "compiled", cpu_sweep.compiled.__wrapped__)  # keeps nothing
    assert cpu_sweep.sweep_of(torch.zeros(1, 1)) is None
    assert said in cpu_sweep.compiled(torch.float32)[1]
    torch.testing.assert_close(forward(negatives).loss, want.loss, rtol=1e-5, atol=1e-5)
