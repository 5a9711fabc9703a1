"""Losses of small batches by one call of the compiled library, against float64."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mocofast_kernels import cpu_compiled_batch, cpu_in_batch
from mocofast_kernels.cpu_compiled_batch import InBatch, Kind, compiled_batch, scaled, serves
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(
    cpu_compiled_batch._compiled() is None, reason="no compiled library, or no AVX-512"
)
SCALE, BIAS = 6.0, -3.0
EPS = torch.finfo(torch.float32).eps
NORMALIZED = (Kind.PAIRS, Kind.VIEWS, Kind.LABELS)


def features(count: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows, their keys, and labels: classes of up to 4 rows, and a row without a positive.

    In one dimension rows are numbers of .5 to 1: a gradient by a normalised number near 0 would be
    large, and logits of large numbers lie far apart.
    """
    generator = torch.Generator().manual_seed(100 * count + dim)
    x, y = torch.randn(2, count, dim, generator=generator) / dim**0.5
    if dim == 1:
        x, y = (value.sign() * (1 + value.abs().tanh()) / 2 for value in (x, y))
    labels = torch.randint(0, 1 + count // 4, (count,), generator=generator) + 2**40
    labels[-1] = -1
    return x, x + y if dim > 1 else y, labels


def cross_entropy(logits: Tensor, positive: Tensor, left_out: Tensor) -> Tensor:
    """Returns the losses of rows. left_out: bool, entries that are neither."""
    total = torch.logsumexp(logits.masked_fill(left_out, -math.inf), 1)
    return total - logits.gather(1, positive[:, None])[:, 0]


def formula(
    kind: Kind, x: Tensor, y: Tensor, labels: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Returns the published formula's mean loss."""
    count = len(x)
    if kind in NORMALIZED:
        x, y = F.normalize(x), F.normalize(y)
    places, none = torch.arange(count), torch.zeros(count, count).bool()
    if kind in (Kind.VIEWS, Kind.LABELS):
        logits, own = scale * x @ x.T, torch.eye(count).bool()
        if kind == Kind.VIEWS:
            return cross_entropy(logits, places.roll(count // 2), own).mean()
        logs = logits - torch.logsumexp(logits.masked_fill(own, -math.inf), 1, keepdim=True)
        same = (labels[:, None] == labels) & ~own
        rows = [-logs[i, same[i]].mean() for i in range(count) if same[i].any()]
        return torch.stack(rows).mean() if rows else 0 * logits.sum()
    logits = scale * x @ y.T
    if kind == Kind.SIGMOID:
        signs = 2 * torch.eye(count) - 1
        return F.softplus(-signs * (logits + bias), threshold=100).sum() / count
    loss = cross_entropy(logits, places, none).mean()
    if kind == Kind.PAIRS:
        return loss
    return (loss + cross_entropy(logits.T, places, none).mean()) / 2


def compute(kind: Kind, x: Tensor, y: Tensor, labels: Tensor, rank: bool = False) -> InBatch | None:
    one = kind in (Kind.VIEWS, Kind.LABELS)
    return compiled_batch(
        kind,
        x,
        None if one else y,
        SCALE,
        bias=BIAS if kind == Kind.SIGMOID else 0.0,
        labels=labels if kind == Kind.LABELS else None,
        normalize=kind in NORMALIZED,
        return_rank=rank,
        need_key=not one,
    )


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("count", [1, 2, 3, 31, 33, 150])
@pytest.mark.parametrize("dim", [1, 7, 64, 130])
def test_loss_and_gradients_match_float64(kind: Kind, count: int, dim: int) -> None:
    if kind == Kind.VIEWS:
        count *= 2
    if count < {Kind.SIGMOID: 1, Kind.VIEWS: 4}.get(kind, 2):
        pytest.skip("no negative")
    x, y, labels = features(count, dim)
    found = compute(kind, x, y, labels)
    assert found is not None
    inputs = [value.double().requires_grad_() for value in (x, y)]
    scale, bias = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (SCALE, BIAS)
    )
    value = formula(kind, *inputs, labels, scale, bias)
    grads = torch.autograd.grad(value, [*inputs, scale, bias], allow_unused=True)
    expected = float(value.detach())
    # Of several positives the loss is a difference of two logits.
    least = 1.0 if kind == Kind.LABELS else EPS
    assert abs(float(found.loss) - expected) <= 50 * EPS * max(expected, least)
    for own, other in zip(found[2:], grads):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert own.dtype == torch.float32
            # Gradients are differences of terms of this size.
            slack = 50 * EPS * (float(other.norm()) + SCALE / count**0.5)
            assert float((own - other).norm()) <= slack


@pytest.mark.parametrize("kind", [Kind.PAIRS, Kind.VIEWS])
@pytest.mark.parametrize("count", [6, 34])
def test_ranks_count_negatives_and_ties(kind: Kind, count: int) -> None:
    x, y, labels = features(count, 5)
    x[1], y[1] = x[0], y[0]  # a tie
    if kind == Kind.VIEWS:
        x[count // 2 + 1] = x[count // 2]
    found = compute(kind, x, y, labels, rank=True)
    assert found is not None and found.rank is not None
    rows = F.normalize(x.double())
    keys = rows if kind == Kind.VIEWS else F.normalize(y.double())
    scores, places = rows @ keys.T, torch.arange(count)
    positive = places.roll(count // 2) if kind == Kind.VIEWS else places
    reach = scores >= scores[places, positive][:, None] - 1e-6
    reach[places, positive] = False
    if kind == Kind.VIEWS:
        reach[places, places] = False
    assert torch.equal(found.rank, reach.sum(1, dtype=torch.int32))
    assert found.rank[0] >= 1


def test_a_nearly_perfect_match_keeps_the_digits_of_its_small_loss() -> None:
    x = 4 * torch.eye(8)
    for kind in (Kind.PAIRS, Kind.BOTH_WAYS):
        found = compiled_batch(kind, x, x.clone(), 3.0, need_key=True)
        assert found is not None
        exact = math.log1p(7 * math.exp(-48.0))
        assert float(found.loss) == pytest.approx(exact, rel=1e-5)
        assert float(found.grad_scale) == pytest.approx(-16 * exact, rel=1e-5)


@pytest.mark.parametrize("bias", [0.0, 0.01, 0.3, 1.0, -1.0, 5.0])
def test_logarithms_of_the_sigmoid_loss_are_exact_to_3e_7(bias: float) -> None:
    """All logits are the bias: 17 terms of one value."""
    x = torch.zeros(17, 3)
    found = compiled_batch(Kind.SIGMOID, x, x, 1.0, bias=bias, need_key=True)
    assert found is not None
    exact = math.log1p(math.exp(-bias)) + 16 * math.log1p(math.exp(bias))
    assert float(found.loss) == pytest.approx(exact, rel=3e-7)


def test_labels_may_have_any_stride() -> None:
    x, _, labels = features(34, 5)
    spread = torch.stack([labels, torch.arange(34)], 1)[:, 0]
    assert spread.stride() == (2,)
    own, other = (cpu_in_batch.supervised(x, y, SCALE, normalize=True) for y in (labels, spread))
    assert own is not None and other is not None
    assert torch.equal(own.loss, other.loss) and torch.equal(own.grad_query, other.grad_query)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e20])
@pytest.mark.parametrize("kind", Kind)
def test_numbers_that_are_not_finite(kind: Kind, value: float) -> None:
    x, y, labels = features(6, 5)
    x[2, 3] = value
    found = compute(kind, x, y, labels)
    if kind != Kind.SIGMOID:
        # A number of 1e20 has a norm of inf, and is 0 after the division, as in PyTorch.
        assert (found is None) == (value != 1e20 or kind == Kind.BOTH_WAYS)
        alone = torch.arange(6)  # no row has a positive
        assert value == 1e20 or compute(Kind.LABELS, x, y, alone) is None
        return
    assert found is not None
    expected = cpu_in_batch._sigmoid(x, y, SCALE, BIAS, True)
    for own, other in zip(found[:4], expected[:4]):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert found.grad_scale is not None and found.grad_scale.isfinite() == (value == 1e20)


@pytest.mark.parametrize("kind", Kind)
def test_threads_that_call_at_once_get_the_bits_of_a_call_alone(kind: Kind) -> None:
    given = features(66, 33)
    alone = compute(kind, *given, rank=kind in (Kind.PAIRS, Kind.VIEWS))
    assert alone is not None
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: compute(kind, *given), range(40)):
            assert found is not None
            for own, other in zip(found, alone):
                assert own is None or other is None or torch.equal(own, other)


def test_what_the_library_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 6)
    assert serves(x, None) and serves(x, x.bfloat16()) and serves(x.half(), x)
    assert not serves(x, x.double())
    assert not serves(x.T, None)
    assert not serves(x, torch.ones(6, 4).T)
    assert not serves(torch._neg_view(x), None)
    assert not serves(x.to("meta"), None)
    monkeypatch.setattr(cpu_compiled_batch, "PRODUCTS", 95)
    assert not serves(x, None)  # 96
    monkeypatch.undo()
    monkeypatch.setattr(cpu_compiled_batch, "_compiled", lambda: None)
    assert not serves(x, None)


def test_without_memory_an_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compiled_batch, "_compiled", lambda: lambda *_: 0)
    with pytest.raises(MemoryError, match="logits of 4 rows"):
        compiled_batch(Kind.PAIRS, torch.ones(4, 6), torch.ones(4, 6), 1.0)


def test_a_norm_of_0_is_a_constant_divisor() -> None:
    x, y, labels = features(6, 5)
    x[2] = 0
    found = compute(Kind.PAIRS, x, y, labels)
    expected = cpu_in_batch._in_batch(x, y, SCALE, True, False, False, True)
    assert found is not None and expected is not None
    for own, other in zip(found[2:4], expected[2:4]):
        assert own is not None and other is not None
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    x[2, 1] = 1e-13
    found = compute(Kind.PAIRS, x, y, labels)
    expected = cpu_in_batch._in_batch(x, y, SCALE, True, False, False, True)
    assert found is not None and expected is not None
    torch.testing.assert_close(found.grad_query, expected.grad_query, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2**15 + 7])
def test_a_gradient_is_scaled_as_pytorch_does(count: int) -> None:
    grad = torch.randn(count, generator=torch.Generator().manual_seed(0))
    for factor in (torch.tensor(0.3), torch.tensor(math.nan), torch.tensor(0.3).double()):
        torch.testing.assert_close(
            scaled(grad, factor), grad * factor, rtol=0, atol=0, equal_nan=True
        )
    wide = grad.double()
    assert torch.equal(scaled(wide, torch.tensor(0.3)), wide * torch.tensor(0.3))
