"""Losses over rows of several ranks: float64 formulas, and two ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mocofast_bench.processes import on_ranks
from torch import Tensor
from torch.distributed.nn.functional import all_gather

import mocofast
from mocofast import ops
from tests.oracle import info_nce_oracle, rank_bounds

WORLD = 2
EPS = torch.finfo(torch.float32).eps

# (rows of all ranks, own rows): the first rank, a middle one, the last, a single row, and all rows.
ROWS = [
    (15, slice(0, 5)),
    (15, slice(5, 10)),
    (15, slice(10, 15)),
    (7, slice(3, 4)),
    (6, slice(0, 6)),
]


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def info_nce_over_rows(
    query: Tensor, keys: Tensor, own_rows: slice, temperature: float | Tensor
) -> Tensor:
    """Returns losses in float64, (N,), from logits and labels as in Algorithm 1 of MoCo v3."""
    logits = F.normalize(query.double()) @ F.normalize(keys.double()).T / temperature  # (N, M)
    labels = torch.arange(len(query)) + own_rows.start
    return F.cross_entropy(logits, labels, reduction="none")


def nt_xent_over_rows(z_a: Tensor, z_b: Tensor, own_rows: slice, temperature: float) -> Tensor:
    """Returns losses in float64, (2N,), of the own rows of SimCLR's (2M, 2M) logits."""
    count = len(z_a)
    z = F.normalize(torch.cat([z_a, z_b]).double())
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * count).bool(), -torch.inf)
    losses = F.cross_entropy(
        logits, (torch.arange(2 * count) + count) % (2 * count), reduction="none"
    )
    return torch.cat([losses[:count][own_rows], losses[count:][own_rows]])


def reduced(rows: Tensor, reduction: str) -> Tensor:
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


def assert_gradients_close(ours: Tensor, exact: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    incoming = features(9, *ours.shape)
    got = torch.autograd.grad(ours, leaves, incoming)
    want = torch.autograd.grad(exact, leaves, incoming.double())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("count", "own_rows"), ROWS)
def test_info_nce_takes_its_positives_from_the_own_rows(
    count: int, own_rows: slice, reduction: str
) -> None:
    query = features(0, own_rows.stop - own_rows.start, 4).requires_grad_()
    keys, temperature = features(1, count, 4).requires_grad_(), torch.tensor(0.3).requires_grad_()
    loss, rank = ops.info_nce(
        query,
        keys,
        temperature=temperature,
        reduction=reduction,
        return_rank=True,
        own_rows=own_rows,
    )
    exact = reduced(info_nce_over_rows(query, keys, own_rows, temperature), reduction)
    assert_gradients_close(loss, exact, [query, keys, temperature])
    rolled = keys.roll(-own_rows.start, 0)
    low, high = rank_bounds(query, keys[own_rows], rolled, 8 * EPS, exclude_period=count)
    assert bool(((low <= rank) & (rank <= high)).all())


def test_the_oracle_agrees_on_what_own_rows_are() -> None:
    query, keys, own_rows = features(0, 5, 4), features(1, 15, 4), slice(5, 10)
    rolled = keys.roll(-5, 0)
    expected = info_nce_oracle(query, keys[own_rows], rolled, 0.3, exclude_period=15)
    torch.testing.assert_close(info_nce_over_rows(query, keys, own_rows, 0.3), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("count", "own_rows"), ROWS)
def test_nt_xent_is_the_loss_of_the_own_rows(count: int, own_rows: slice, reduction: str) -> None:
    z_a, z_b = (features(i, count, 4).requires_grad_() for i in range(2))
    loss, rank = ops.nt_xent(
        z_a, z_b, temperature=0.3, reduction=reduction, return_rank=True, own_rows=own_rows
    )
    exact = reduced(nt_xent_over_rows(z_a, z_b, own_rows, 0.3), reduction)
    assert_gradients_close(loss, exact, [z_a, z_b])
    z = F.normalize(torch.cat([z_a, z_b]).detach().double())
    similarity = z @ z.T
    positive = torch.cat([(z[:count] * z[count:]).sum(1)] * 2)
    above = similarity.fill_diagonal_(-2) > positive[:, None] + 8 * EPS
    places = torch.arange(2 * count).view(2, count)[:, own_rows].flatten()
    assert rank.tolist() == above.sum(1)[places].tolist()
    assert not rank.is_floating_point()


def test_all_rows_are_the_same_as_no_own_rows() -> None:
    x, y = features(0, 6, 4), features(1, 6, 4)
    assert torch.equal(ops.info_nce(x, y, own_rows=slice(0, 6)), ops.info_nce(x, y))
    assert torch.equal(ops.nt_xent(x, y, own_rows=slice(0, 6)), ops.nt_xent(x, y))


def test_unit_keys_give_the_same_with_and_without_their_normalisation() -> None:
    query, keys = features(0, 3, 8), F.normalize(features(1, 9, 8))
    for own_rows, q in ((slice(3, 6), query), (None, features(2, 9, 8))):
        torch.testing.assert_close(
            ops.info_nce(q, keys, negatives_normalized=True, own_rows=own_rows),
            ops.info_nce(q, keys, own_rows=own_rows),
        )


# --- two ranks ---


def whole_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Returns an encoder's weight, (6, 4), and two views of 10 images, (10, 6)."""
    return features(0, 6, 4).requires_grad_(), features(1, 10, 6), features(2, 10, 6)


def on_a_rank(rank: int) -> dict[str, Any]:
    """Returns losses of this rank's half batch, and gradients averaged over ranks, as in DDP."""
    found: dict[str, Any] = {}
    weight, *views = whole_batch()
    x_a, x_b = (x.chunk(WORLD)[rank] for x in views)
    own_rows = slice(rank * len(x_a), (rank + 1) * len(x_a))

    # MoCo v3, as in the docstring of info_nce: the keys carry no gradient.
    key = (x_b @ weight).detach()
    keys = torch.empty(WORLD * len(key), key.shape[1])
    dist.all_gather_into_tensor(keys, key)
    found["info_nce"] = ops.info_nce(
        x_a @ weight, keys, temperature=0.2, return_rank=True, own_rows=own_rows
    )

    # SimCLR, as in the docstring of nt_xent: gradients reach the views of both ranks.
    z_a, z_b = x_a @ weight, x_b @ weight
    all_a, all_b = torch.cat(all_gather(z_a)), torch.cat(all_gather(z_b))
    found["nt_xent"] = ops.nt_xent(all_a, all_b, return_rank=True, own_rows=own_rows)

    for name, (loss, positive_rank) in list(found.items()):
        (gradient,) = torch.autograd.grad(loss, weight)
        dist.all_reduce(gradient)
        found[name] = (loss.detach(), positive_rank, gradient / WORLD)
    return found


def test_two_ranks_are_one_process_on_the_whole_batch() -> None:
    ranks = on_ranks(on_a_rank, WORLD)
    weight, x_a, x_b = whole_batch()
    z_a, z_b = x_a @ weight, x_b @ weight
    alone = {
        "info_nce": ops.info_nce(z_a, z_b.detach(), temperature=0.2, return_rank=True),
        "nt_xent": ops.nt_xent(z_a, z_b, return_rank=True),
    }
    for name, (loss, positive_rank) in alone.items():
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        losses, positive_ranks, gradients = zip(*(rank[name] for rank in ranks))
        torch.testing.assert_close(sum(losses) / WORLD, loss.detach(), rtol=1e-5, atol=1e-6)
        for got in gradients:
            torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)
        # nt_xent: (views a, views b) of each rank.
        views = 2 if name == "nt_xent" else 1
        got = torch.cat([r.view(views, -1) for r in positive_ranks], dim=1).flatten()
        assert got.tolist() == positive_rank.tolist()


def test_methods_need_the_public_ops_alone() -> None:
    methods = list(Path(mocofast.__file__).parent.joinpath("methods").glob("*.py"))
    assert len(methods) > 5
    for path in methods:
        assert "autograd" not in path.read_text("utf-8").replace("torch.autograd", ""), path
