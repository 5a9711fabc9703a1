"""Losses over the pairs of a small batch on a CPU, against float64 and the sweep over blocks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from mocofast_kernels import cpu_in_batch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mocofast import ops
from mocofast.ops import in_batch

LOSSES = (
    "info_nce",
    "info_nce as given",
    "nt_xent",
    "clip_loss",
    "supervised_contrastive",
    "siglip_loss",
)
SCALE = 9.0
BIAS = -2.0


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(features: Tensor) -> Tensor:
    """Returns classes of several rows, and a row without a positive."""
    return torch.arange(len(features)).sub(1).div(3, rounding_mode="floor")


def ours(loss: str, a: Tensor, b: Tensor, scale: Any = SCALE, **options: Any) -> Any:
    if loss == "clip_loss":
        return ops.clip_loss(a, b, scale, **options)
    if loss == "siglip_loss":
        return ops.siglip_loss(a, b, scale, BIAS)
    if loss == "supervised_contrastive":
        features = torch.cat([a, b])
        return ops.supervised_contrastive(features, labels_of(features), temperature=1 / scale)
    if loss == "nt_xent":
        return ops.nt_xent(a, b, temperature=1 / scale, **options)
    options["normalize"] = loss == "info_nce"
    return ops.info_nce(a, b, temperature=1 / scale, **options)


def eager(loss: str, a: Tensor, b: Tensor, scale: Any = SCALE) -> Tensor:
    """Returns the published formula's mean, by cross entropy."""
    if loss == "siglip_loss":
        signs = 2 * torch.eye(len(a)) - 1
        return -F.logsigmoid(signs * (scale * a @ b.T + BIAS)).sum() / len(a)
    if loss == "supervised_contrastive":
        features = F.normalize(torch.cat([a, b]))
        labels, same = labels_of(features), torch.eye(len(features)).bool()
        scores = scale * features @ features.T
        logs = scores - torch.logsumexp(scores.masked_fill(same, -math.inf), 1, keepdim=True)
        positives = (labels[:, None] == labels) & ~same
        rows = [-logs[i, positives[i]].mean() for i in range(len(logs)) if positives[i].any()]
        return torch.stack(rows).mean()
    if loss in ("info_nce", "nt_xent"):
        a, b = F.normalize(a), F.normalize(b)
    labels = torch.arange(len(a))
    if loss == "nt_xent":
        views = torch.cat([a, b])
        logits = (scale * views @ views.T).masked_fill(torch.eye(2 * len(a)).bool(), -math.inf)
        return F.cross_entropy(logits, torch.cat([labels + len(a), labels]))
    logits = scale * a @ b.T
    if loss == "clip_loss":
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return F.cross_entropy(logits, labels)


@pytest.fixture(params=["compiled", "PyTorch"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call that a small batch could serve: whether its logits were kept.

    Without the compiled library, or on a CPU without AVX-512, both are PyTorch's operators.
    """
    seen: list[bool] = []
    if request.param == "PyTorch":
        monkeypatch.setattr(cpu_in_batch, "serves", lambda query, key: False)

    def watched(compute: Any, *arguments: Any, **options: Any) -> Any:
        found = compute(*arguments, **options)
        seen.append(found is not None)
        return found

    for name in ("in_batch", "supervised", "sigmoid"):
        compute = getattr(cpu_in_batch, name)
        monkeypatch.setattr(cpu_in_batch, name, partial(watched, compute))
    return seen


def pair(count: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a, b = features(0, count, dim) / dim**0.5, features(1, count, dim) / dim**0.5
    return (a + b).to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("count", "dim"), [(2, 3), (7, 5), (64, 33), (150, 70)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_loss_and_gradients_match_float64(
    loss: str, count: int, dim: int, dtype: torch.dtype, calls: list[bool]
) -> None:
    a, b = pair(count, dim, dtype)
    scale = torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32))
    scale.requires_grad_()
    value = ours(loss, a, b, scale)
    value.mul(3).backward()
    assert calls == [True]
    wide_a, wide_b = (x.detach().double().requires_grad_() for x in (a, b))
    wide_scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    expected = eager(loss, wide_a, wide_b, wide_scale)
    expected.mul(3).backward()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=200 * eps)
    for own, other in ((a, wide_a), (b, wide_b), (scale, wide_scale)):
        assert own.grad is not None and other.grad is not None
        assert own.grad.dtype == own.dtype
        slack = (torch.finfo(own.dtype).eps + 1000 * eps) * other.grad.norm()
        assert (own.grad.double() - other.grad).norm() <= slack


@pytest.mark.parametrize("loss", LOSSES[:3])
def test_ranks_and_loss_are_those_of_the_sweep(
    loss: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair(40, 6)
    with torch.no_grad():
        a[3] = a[5] = b[3] = b[5]  # ties
    found = ours(loss, a, b, return_rank=True)
    monkeypatch.setattr(in_batch.cpu_in_batch, "LOGITS", 0)
    expected = ours(loss, a, b, return_rank=True)
    assert calls == [True]
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1].dtype == expected[1].dtype
    assert found[1][3] >= 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("which", [0, 1])
def test_only_wanted_gradients_are_computed(loss: str, which: int, calls: list[bool]) -> None:
    both = pair(12, 8)
    ours(loss, *both).backward()
    expected = both[which].grad
    alone = [x.detach() for x in both]
    alone[which].requires_grad_()
    ours(loss, *alone).backward()
    assert calls == [True, True]
    torch.testing.assert_close(alone[which].grad, expected, rtol=0, atol=0)
    assert alone[1 - which].grad is None


@pytest.mark.parametrize("loss", LOSSES[:-1])  # a sigmoid has no range
def test_numbers_out_of_range_go_through_the_sweep(loss: str, calls: list[bool]) -> None:
    a, b = pair(9, 8)
    scale = 400.0  # logits of unit vectors lie up to 1,150 bits apart
    value = ours(loss, a, b, scale)
    value.backward()
    expected = eager(loss, a.detach().double(), b.detach().double(), scale)
    assert calls == [False]
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-4)
    assert a.grad is not None and a.grad.isfinite().all()
    with torch.no_grad():
        a[2, 1] = math.nan
    rows = ours(loss, a, b)
    assert calls == [False, False]
    assert rows.isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_bits_are_equal_for_any_number_of_threads(loss: str, calls: list[bool]) -> None:
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            a, b = pair(120, 128)
            value = ours(loss, a, b)
            found.append((value.detach(), *torch.autograd.grad(value, (a, b))))
        finally:
            torch.set_num_threads(before)
    assert calls == [True] * 3
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_derivative_and_transforms_are_refused(loss: str) -> None:
    a, b = pair(6, 4)
    (grad,) = torch.autograd.grad(ours(loss, a, b), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda x: ours(loss, x, b.detach()))(a.detach())


def test_what_has_other_rules_goes_another_way(calls: list[bool]) -> None:
    a, b = pair(6, 4)
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    ops.info_nce(a, b, query_ids=ids)
    ops.info_nce(a, b, exclude=torch.eye(6).bool())
    ops.info_nce(a, b, b)  # the own key is a negative
    ops.info_nce(a[:3], b, own_rows=slice(1, 4))
    ops.info_nce(a, b, reduction="none")
    with torch.no_grad():
        ops.info_nce(a, b)
    large = torch.ones(513, 2, requires_grad=True)
    ops.info_nce(large, large.detach())
    assert calls == []
    ops.info_nce(a, b)
    dense = features(2, 3, 2, 4).requires_grad_()
    ops.info_nce(dense, dense.detach())  # 6 queries
    assert calls == [True, True]


class InverseOf:
    """A scale that was given as a temperature."""

    def __init__(self, temperature: Tensor) -> None:
        self.temperature = temperature

    def __rtruediv__(self, one: int) -> Tensor:
        return self.temperature


@pytest.mark.parametrize("logits", [0, cpu_in_batch.LOGITS], ids=["sweep", "kept"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_a_scalar_of_few_bits_is_inverted_in_many(
    dtype: torch.dtype, loss: str, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_in_batch, "LOGITS", logits)
    a, b = (x.detach().double().requires_grad_() for x in pair(8, 6))
    takes_scale = loss in ("clip_loss", "siglip_loss")
    given = torch.tensor(SCALE if takes_scale else 1 / SCALE, dtype=dtype).requires_grad_()
    value = ours(loss, a, b, given if takes_scale else InverseOf(given))
    value.backward()
    exact = given.detach().double().requires_grad_()
    expected = eager(loss, a, b, exact if takes_scale else 1 / exact)
    (gradient,) = torch.autograd.grad(expected, exact)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert given.grad is not None and given.grad.dtype == dtype
    assert float(given.grad) == pytest.approx(float(gradient), rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("loss", LOSSES)
def test_fake_tensors_and_tracers_look_at_no_value(loss: str) -> None:
    with FakeTensorMode():
        a, b = pair(6, 4)
        value = ours(loss, a, b)
        value.backward()
        assert value.shape == () and a.grad is not None and a.grad.shape == a.shape
        assert isinstance(value, FakeTensor)
    if loss in LOSSES[:4]:  # the others add real tensors, labels or scalars
        assert isinstance(ours(loss, a, b), FakeTensor)  # outside of the mode
    a, b = (x.detach() for x in pair(6, 4))

    def gradient(a: Tensor, b: Tensor) -> Tensor:
        given = a.detach().requires_grad_()
        return torch.autograd.grad(ours(loss, given, b), given)[0]

    traced = make_fx(gradient)(b, a)
    torch.testing.assert_close(traced(a, b), gradient(a, b))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_for_several_gradients_at_once(loss: str) -> None:
    a, b = pair(200, 170)  # more numbers than PyTorch multiplies on one thread
    value = ours(loss, a, b)
    given = torch.tensor([1.0, -2.0])
    (both,) = torch.autograd.grad(value, a, given, is_grads_batched=True, retain_graph=True)
    for number, found in zip(given, both):
        (alone,) = torch.autograd.grad(value, a, number, retain_graph=True)
        torch.testing.assert_close(found, alone, rtol=0, atol=0)
