"""InfoNCE with excluded, own and dense negatives, and in float64, against whole logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mocofast_kernels import cpu
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mocofast import ops


def features(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(
    query: Tensor, positive: Tensor, negatives: Tensor, left_out: Tensor, temperature: Any = 0.1
) -> Tensor:
    """Returns losses (...) in float64 from logits (..., 1 + M).

    query, positive: (..., C). negatives: (..., M, C), broadcast. left_out: bool (..., M).
    """
    q, k, n = (F.normalize(x.double(), dim=-1) for x in (query, positive, negatives))
    scores = (q[..., None, :] * n).sum(-1) / temperature
    logits = torch.cat(
        [(q * k).sum(-1, keepdim=True) / temperature, scores.masked_fill(left_out, -math.inf)], -1
    )
    return logits.logsumexp(-1) - logits[..., 0]


def assert_equal(ours: Tensor, exact: Tensor, leaves: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    incoming = features(9, *ours.shape)
    got = torch.autograd.grad(ours, leaves, incoming.to(ours.dtype))
    want = torch.autograd.grad(exact, leaves, incoming.double())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("kind", ["ids", "mask", "both"])
def test_a_negative_is_left_out_by_equal_ids_and_by_the_mask(
    kind: str, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(cpu, "LOGITS", 16 * 256)
    inputs = [features(i, n, 5, dtype=dtype).requires_grad_() for i, n in enumerate((37, 37, 600))]
    query_ids, key_ids = torch.arange(37) % 5, torch.arange(600) % 7  # ids 5 and 6: no query's
    mask = features(4, 37, 600) > 1
    mask[3] = True  # no negative is left
    left_out = torch.zeros(37, 600, dtype=torch.bool)
    options: dict[str, Any] = {}
    if kind != "mask":
        options |= {"query_ids": query_ids.int(), "key_ids": key_ids}
        left_out |= query_ids[:, None] == key_ids
    if kind != "ids":
        options["exclude"] = mask
        left_out |= mask
    loss, rank = ops.info_nce(
        *inputs, temperature=temperature, reduction="none", return_rank=True, **options
    )
    exact = whole(*inputs[:2], inputs[2].expand(37, -1, -1), left_out, temperature)
    assert loss.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6 / temperature
    assert_equal(loss, exact, inputs, tolerance)
    q, k, n = (F.normalize(x.detach().double()) for x in inputs)
    above = (q @ n.T > (q * k).sum(1, keepdim=True)) & ~left_out
    assert rank.tolist() == above.sum(1).tolist()


@pytest.mark.parametrize("own_rows", [None, slice(6, 11)])
def test_in_batch_negatives_of_the_same_label_are_left_out(own_rows: slice | None) -> None:
    keys = features(1, 17, 5).requires_grad_()
    rows = own_rows or slice(0, 17)
    query = features(0, rows.stop - rows.start, 5).requires_grad_()
    labels = torch.arange(17) % 4
    mask = features(3, len(query), 17) > 1.5
    left_out = (labels[rows, None] == labels) | mask
    left_out |= torch.arange(17)[rows, None] == torch.arange(17)
    by_ids: dict[str, Any] = {"query_ids": labels[rows], "exclude": mask}
    if own_rows is not None:
        by_ids["key_ids"] = labels
    loss = ops.info_nce(query, keys, own_rows=own_rows, reduction="none", **by_ids)
    exact = whole(query, keys[rows], keys.expand(len(query), -1, -1), left_out)
    assert_equal(loss, exact, [query, keys], 2e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
def test_rows_have_negatives_of_their_own(dense: bool, dtype: torch.dtype, normalize: bool) -> None:
    shape = (6, 4, 8) if dense else (6, 8)
    inputs = [features(i, *s) for i, s in enumerate([shape, shape, (6, 9, 8)])]
    if not normalize:
        inputs = [F.normalize(x, dim=-1) for x in inputs]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    query_ids, key_ids = torch.arange(6) % 3, torch.arange(54).view(6, 9) % 5
    if dense:
        query_ids = query_ids[:, None].expand(6, 4)
    mask = features(5, *shape[:-1], 9) > 1.5
    own = key_ids[:, None] if dense else key_ids
    left_out = (query_ids[..., None] == own) | mask
    left_out[0] = True  # no negative is left: the loss is 0
    mask[0] = True
    loss, rank = ops.info_nce(
        *inputs,
        temperature=temperature,
        reduction="none",
        normalize=normalize,
        return_rank=True,
        query_ids=query_ids,
        key_ids=key_ids,
        exclude=mask,
    )
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    query, positive, negatives = exact_inputs
    negatives = negatives[:, None] if dense else negatives
    if normalize:
        exact = whole(query, positive, negatives, left_out, temperature)
    else:
        scores = (query[..., None, :] * negatives).sum(-1) / temperature
        own_score = (query * positive).sum(-1, keepdim=True) / temperature
        logits = torch.cat([own_score, scores.masked_fill(left_out, -math.inf)], -1)
        exact = logits.logsumexp(-1) - logits[..., 0]
    assert loss.shape == rank.shape == shape[:-1]
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
    incoming = features(9, *loss.shape)
    got = torch.autograd.grad(loss, [*inputs, temperature], incoming.to(loss.dtype))
    want = torch.autograd.grad(exact, [*exact_inputs, temperature], incoming.double())
    rounding = 2**-8 if dtype == torch.bfloat16 else 2 * tolerance
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=2 * tolerance)
    q, k, n = (F.normalize(x.detach().double(), dim=-1) for x in (query, positive, negatives))
    above = ((q[..., None, :] * n).sum(-1) > (q * k).sum(-1, keepdim=True)) & ~left_out
    assert torch.equal(rank.long(), above.sum(-1))


@pytest.mark.parametrize("in_batch", [False, True])
def test_dense_features_are_queries_at_every_place(in_batch: bool) -> None:
    query, positive = (features(i, 4, 3, 6).requires_grad_() for i in range(2))
    queue = features(2, 11, 6)
    negatives = positive.flatten(0, 1) if in_batch else queue
    ids = torch.arange(4)[:, None].expand(4, 3)  # places of the same image are no negatives
    key_ids = ids.flatten() if in_batch else torch.arange(11) % 6
    left_out = ids.flatten()[:, None] == key_ids
    loss, rank = ops.info_nce(
        query,
        positive,
        None if in_batch else queue,
        reduction="none",
        return_rank=True,
        query_ids=ids,
        key_ids=None if in_batch else key_ids,
    )
    assert loss.shape == rank.shape == (4, 3)
    exact = whole(
        query.flatten(0, 1), positive.flatten(0, 1), negatives.expand(12, -1, -1), left_out
    )
    assert_equal(loss.flatten(), exact, [query, positive], 2e-5)
    mean = ops.info_nce(
        query,
        positive,
        None if in_batch else queue,
        query_ids=ids,
        key_ids=key_ids.view(4, 3) if in_batch else key_ids,
    )
    torch.testing.assert_close(mean, loss.mean())


def test_in_float64_the_in_batch_losses_are_exact_to_float64() -> None:
    x, y = (features(i, 12, 5, dtype=torch.float64).requires_grad_() for i in range(2))
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    own = torch.eye(12, dtype=torch.bool)
    losses = [whole(a, b, b.expand(12, -1, -1), own, 0.5) for a, b in ((x, y), (y, x))]
    with torch.autocast("cpu", torch.bfloat16):  # autocast leaves float64 alone
        ours = [ops.info_nce(a, b, temperature=0.5) for a, b in ((x, y), (y, x))]
    for got, want in zip(ours, losses):
        assert_equal(got, want.mean(), [x, y], 1e-12)
    clip = ops.clip_loss(F.normalize(x), F.normalize(y), scale)
    labels = torch.arange(12)
    logits = scale * F.normalize(x) @ F.normalize(y).T
    exact = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert_equal(clip, exact, [x, y, scale], 1e-12)
    assert ops.nt_xent(x, y).dtype == torch.float64


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.numel())
        return result


def test_ids_and_labels_make_no_matrix_of_all_logits() -> None:
    query, keys = features(0, 1500, 8).requires_grad_(), features(1, 1500, 8).requires_grad_()
    negatives = features(2, 4000, 8)
    query_ids, key_ids = torch.arange(1500) % 50, torch.arange(4000) % 60
    with Largest() as by_ids:
        ops.info_nce(query, keys, negatives, query_ids=query_ids, key_ids=key_ids).backward()
    assert by_ids.size <= cpu.LOGITS < 1500 * 4000 / 8
    with Largest() as by_labels:
        ops.supervised_contrastive(query, query_ids).backward()
        ops.siglip_loss(query, keys, 10.0, -10.0).backward()
    assert by_labels.size <= cpu.LOGITS < 1500 * 1500 / 4
