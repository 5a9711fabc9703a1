"""The sigmoid loss and the supervised contrastive loss against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from tests.test_ops_exclusion import assert_equal, features


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Returns -1/N sum_ij log sigmoid(z_ij (t x_i.y_j + b)), eq. 1 of the paper, in float64."""
    logits = scale.double() * image.double() @ text.double().T + bias.double()
    return -F.logsigmoid((2 * torch.eye(len(image)) - 1) * logits).sum() / len(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 37, 700])  # 700: two blocks of rows
def test_siglip_loss_is_the_papers_formula(count: int, dtype: torch.dtype) -> None:
    image, text = (
        F.normalize(features(i, count, 6, dtype=dtype)).requires_grad_() for i in range(2)
    )
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -8.0))
    leaves = [image, text, scale, bias]
    loss = ops.siglip_loss(image, text, scale, bias)
    assert loss.dtype == dtype
    assert_equal(loss, siglip(*leaves), leaves, 2e-5)
    by_numbers = ops.siglip_loss(image, text, 10, -8)
    torch.testing.assert_close(by_numbers, loss.detach(), rtol=1e-6, atol=1e-6)


def test_siglip_keeps_its_digits_under_autocast_and_where_pairs_match() -> None:
    rows = torch.eye(5, 8).requires_grad_()
    numbers = torch.tensor(40.0), torch.tensor(-20.0)
    exact = siglip(rows, rows, *numbers)
    assert 1e-9 < exact < 2e-8
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.siglip_loss(rows, rows, *numbers)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="siglip_loss has no second derivative"):
        gradient.sum().backward()


def supervised(
    z: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, temperature: float
) -> Tensor:
    """Returns losses (N,) by L_out, eq. 2 of the paper. keys is z: rows leave themselves out."""
    scores = F.normalize(z.double()) @ F.normalize(keys.double()).T / temperature
    positive = labels[:, None] == key_labels
    if keys is z:
        own = torch.eye(len(z), dtype=torch.bool)
        scores, positive = scores.masked_fill(own, -math.inf), positive & ~own
    log_shares = scores - scores.logsumexp(1, keepdim=True)
    sums = log_shares.masked_fill(~positive, 0).sum(1)
    return -sums / positive.sum(1).clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("with_keys", [False, True])
def test_supervised_contrastive_is_the_papers_formula(
    with_keys: bool, temperature: float, dtype: torch.dtype
) -> None:
    z, keys = (features(i, n, 6, dtype=dtype).requires_grad_() for i, n in enumerate((23, 40)))
    labels, key_labels = (
        torch.arange(23) // 3 - 2,
        torch.arange(40) % 9,
    )  # 22: the only row of its label
    if with_keys:
        loss = ops.supervised_contrastive(
            z, labels, keys, key_labels, temperature=temperature, reduction="none"
        )
        exact = supervised(z, labels, keys, key_labels, temperature)
        leaves = [z, keys]
    else:
        labels[-1] = 99
        loss = ops.supervised_contrastive(z, labels, temperature=temperature, reduction="none")
        exact, leaves = supervised(z, labels, z, labels, temperature), [z]
    assert loss.dtype == dtype
    assert_equal(loss, exact, leaves, 1e-10 if dtype == torch.float64 else 3e-6 / temperature)


def test_views_of_a_sample_are_positives_and_without_labels_the_only_ones() -> None:
    z = features(0, 7, 2, 6)
    labels = torch.arange(7) % 3
    loss = ops.supervised_contrastive(z, labels, reduction="none")
    flat, rows = z.flatten(0, 1), labels.repeat_interleave(2)
    torch.testing.assert_close(
        loss.flatten().double(), supervised(flat, rows, flat, rows, 0.1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ops.supervised_contrastive(z, temperature=0.5), ops.nt_xent(z[:, 0], z[:, 1])
    )


def test_the_mean_is_over_rows_with_positives() -> None:
    z = features(0, 5, 4).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 2])
    rows = ops.supervised_contrastive(z, labels, reduction="none")
    assert rows[3:].tolist() == [0, 0]
    torch.testing.assert_close(ops.supervised_contrastive(z, labels), rows[:3].mean())
    alone = ops.supervised_contrastive(z, torch.arange(5))
    alone.backward()
    assert alone == 0 and not z.grad.any()


def test_supervised_contrastive_compiles_as_one_graph() -> None:
    z, labels = features(0, 9, 4).requires_grad_(), torch.arange(9) % 3
    compiled = torch.compile(
        lambda x: ops.supervised_contrastive(x, labels), fullgraph=True, backend="aot_eager"
    )
    losses = compiled(z), ops.supervised_contrastive(z, labels)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in losses))
