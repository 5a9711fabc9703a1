"""The public ops on the Triton kernels: compiled on a GPU, interpreted on other machines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.oracle import info_nce_oracle
from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels import infonce

from mocofast import ops
from mocofast.ops import backend

PLAIN = backend.backend_for("cpu")


@pytest.fixture(autouse=True)
def _triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend.backend_for("cuda")
    assert kernels.infonce_forward.__module__ == "mocofast_kernels.infonce"
    monkeypatch.setattr(backend, "backend_for", lambda device_type: kernels)


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_gives_every_gradient(in_batch: bool, reduction: str) -> None:
    inputs = [
        features(i, n, 20).requires_grad_()
        for i, n in enumerate((7, 7) if in_batch else (7, 7, 67))
    ]
    temperature = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    incoming = features(5, 7) if reduction == "none" else torch.ones((), device=DEVICE)
    loss, rank = ops.info_nce(
        *inputs, temperature=temperature, reduction=reduction, return_rank=True
    )
    expected = info_nce_oracle(
        *inputs[:2], inputs[-1], temperature, exclude_period=7 if in_batch else 0
    )
    if reduction == "mean":
        expected = expected.mean()
    leaves = [*inputs, temperature]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert rank.shape == (7,)
    for got, want in zip(
        torch.autograd.grad(loss, leaves, incoming),
        torch.autograd.grad(expected, leaves, incoming.double()),
    ):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_the_mean_of_more_rows_than_its_sum_takes_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(infonce, "MEAN_ROWS", 4)
    inputs = features(0, 11, 8), features(1, 11, 8), features(2, 5, 8)
    losses = info_nce_oracle(*inputs, 0.1)
    torch.testing.assert_close(ops.info_nce(*inputs).double(), losses.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_and_its_gradients_are_those_of_the_losses_of_rows(dtype: torch.dtype) -> None:
    """Also with a gradient from above, which a product brings in."""
    count = 7
    inputs = [features(i, n, 8).to(dtype).requires_grad_() for i, n in enumerate((count, count, 5))]
    temperature = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    leaves = [*inputs, temperature]
    losses = ops.info_nce(*inputs, temperature=temperature, reduction="none")
    want = torch.autograd.grad(losses.mean(), leaves)
    loss = ops.info_nce(*inputs, temperature=temperature)
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-6, atol=1e-6)
    for factor in (None, 3.0):
        loss = ops.info_nce(*inputs, temperature=temperature)
        if factor is None:
            got = torch.autograd.grad(loss, leaves, ops.unit_gradient(loss.device))
        else:
            got = torch.autograd.grad(loss * factor, leaves)
        for a, b, leaf in zip(got, want, leaves):
            assert a.dtype == leaf.dtype
            b = b.double() * (factor or 1)
            assert (a - b).norm() <= 2 * torch.finfo(leaf.dtype).eps * b.norm()


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("dim", [20, 140])
def test_negatives_with_the_id_of_the_query_are_left_out(in_batch: bool, dim: int) -> None:
    count = 37 if in_batch else 7
    inputs = [
        features(i, n, dim).requires_grad_()
        for i, n in enumerate((count, count) if in_batch else (7, 7, 150))
    ]
    query_ids = torch.arange(count, device=DEVICE) % 6 + 2**40
    key_ids = query_ids if in_batch else torch.arange(150, device=DEVICE) % 7 + 2**40
    left_out = query_ids[:, None] == key_ids
    own = torch.eye(count, len(key_ids), dtype=torch.bool, device=DEVICE)
    results = []
    for options in ({"query_ids": query_ids, "key_ids": key_ids}, {"exclude": left_out}):
        loss, rank = ops.info_nce(*inputs, return_rank=True, reduction="none", **options)
        results.append((rank, loss, *torch.autograd.grad(loss, inputs, features(5, count))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    q, k, n = (F.normalize(x.detach().double()) for x in (*inputs[:2], inputs[-1]))
    scores = (q @ n.T).masked_fill(left_out | own if in_batch else left_out, -torch.inf)
    logits = torch.cat([(q * k).sum(1, keepdim=True), scores], 1) / 0.1
    exact = logits.logsumexp(1) - logits[:, 0]
    torch.testing.assert_close(results[0][1].double(), exact, rtol=1e-5, atol=1e-5)


def test_nt_xent_and_clip_agree_with_the_pytorch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(0, 9, 16).requires_grad_(), features(1, 9, 16).requires_grad_()
    scale = torch.tensor(3.0, device=DEVICE, requires_grad=True)

    def both() -> tuple[Tensor, ...]:
        loss = ops.nt_xent(x, y) + ops.clip_loss(x, y, scale)
        loss = loss + ops.nt_xent(x, y, own_rows=slice(3, 7))
        return loss.detach(), *torch.autograd.grad(loss, (x, y, scale))

    triton = both()
    monkeypatch.setattr(backend, "backend_for", lambda device_type: PLAIN)
    for got, want in zip(triton, both()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_enqueue_and_ema_agree_with_their_definitions() -> None:
    queue, pointer, keys = (
        torch.zeros(5, 8, device=DEVICE),
        torch.tensor([3], device=DEVICE),
        features(0, 4, 8),
    )
    ops.enqueue_(queue, pointer, keys)
    unit = keys / keys.norm(dim=1, keepdim=True)
    torch.testing.assert_close(queue[[3, 4, 0, 1]], unit)
    assert not queue[2].any()
    assert pointer.tolist() == [2]

    targets, sources = (
        [features(1, 3, 5), features(2, 7).bfloat16()],
        [features(3, 3, 5), features(4, 7).bfloat16()],
    )
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in zip(targets, sources)]
    ops.ema_update_(targets, sources, 0.9)
    for got, want in zip(targets, expected):
        torch.testing.assert_close(
            got, want.to(got.dtype), rtol=torch.finfo(got.dtype).eps, atol=1e-6
        )
