"""Losses on a ring of gloo ranks: equal to the loss over gathered features, with less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mocofast_bench.processes import on_ranks
from mocofast_kernels.cpu import InfoNCEForward
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from mocofast.ops import ring
from tests.test_ops_exclusion import Largest, features

ROWS = (5, 3, 1, 4)  # of the ranks: numbers may differ
DIM = 6
COUNT = 700  # rows of a rank, where memory is counted


def loss_of(name: str, x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Any:
    if name == "nt_xent":
        return ops.nt_xent(x, y, temperature=1 / scale, return_rank=True, **options)
    if name == "clip_loss":
        return ops.clip_loss(x, y, scale, **options), None
    return ops.siglip_loss(x, y, scale, -scale, **options), None


NAMES = ("nt_xent", "clip_loss", "siglip_loss")


def views(world_size: int, dtype: torch.dtype) -> list[Tensor]:
    rows = sum(ROWS[:world_size])
    return [F.normalize(features(seed, rows, DIM)).to(dtype) for seed in (0, 1)]


def memory_on_a_rank(rank: int) -> dict[str, int]:
    """Returns {loss: elements of the largest tensor of forward and backward}."""
    sizes = {}
    for name in NAMES:
        x, y = (features(10 * rank + i, COUNT, 64).requires_grad_() for i in range(2))
        with Largest() as largest:
            loss, _ = loss_of(name, x, y, torch.tensor(5.0), group=dist.group.WORLD)
            loss.backward()
        sizes[name] = largest.size
    return sizes


def messages_on_a_rank(rank: int) -> list[str]:
    """Returns the messages of calls in which the ranks disagree."""
    group, good = dist.group.WORLD, features(0, 3, 4)
    calls: list[Callable[[], Any]] = [
        lambda: ops.clip_loss(features(0, 3, 4 + rank), features(0, 3, 4 + rank), 1, group=group),
        lambda: ops.nt_xent(*(good.to(torch.float64 if rank else torch.float32),) * 2, group=group),
        lambda: ops.siglip_loss(good, good.clone().requires_grad_(rank > 0), 1, 0, group=group),
        lambda: ops.nt_xent(good, good, own_rows=slice(0, 3), group=group),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match=r".") as error:
            call()
        messages.append(str(error.value))
    single = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="group must hold this rank"):
            ops.nt_xent(good, good, group=single)
    else:  # a group of one rank is the plain loss
        torch.testing.assert_close(ops.nt_xent(good, good, group=single), ops.nt_xent(good, good))
    # A pair on every rank: the pairs of other ranks are negatives.
    pairs = features(1, 2, 4)
    own = pairs[rank : rank + 1]
    expected = ops.clip_loss(pairs, pairs.flip(1), 1)
    mean = ops.clip_loss(own, own.flip(1), 1, group=group)
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected)
    views = ops.nt_xent(own, own.flip(1), group=group)
    expected = ops.nt_xent(pairs, pairs.flip(1), own_rows=slice(rank, rank + 1))
    torch.testing.assert_close(views, expected)
    return messages


def on_a_rank(rank: int) -> dict[Any, Any]:
    size = dist.get_world_size()
    found: dict[Any, Any] = {}
    for dtype in (torch.float32, torch.float64):
        for name in NAMES:
            x, y = (z.split(ROWS[:size])[rank].clone().requires_grad_() for z in views(size, dtype))
            scale = torch.tensor(5.0, requires_grad=True)
            loss, positive_rank = loss_of(name, x, y, scale, group=dist.group.WORLD)
            loss.backward()
            found[name, dtype] = loss.detach(), positive_rank, x.grad, y.grad, scale.grad
    found["memory"] = memory_on_a_rank(rank)
    found["messages"] = messages_on_a_rank(rank) if size == 2 else []
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[Any, Any]]:
    """Returns what each of two ranks found."""
    return on_ranks(on_a_rank, 2)


@pytest.fixture(scope="module")
def four() -> list[dict[Any, Any]]:
    """Returns what each of four ranks found."""
    return on_ranks(on_a_rank, 4)


def gathered(name: str, x: Tensor, y: Tensor, scale: Tensor, rows: slice) -> tuple[Tensor, Any]:
    """Returns the loss of the rows of a rank from whole logits in float64, and positive ranks."""
    if name == "nt_xent":
        _, positive_rank = ops.nt_xent(
            x.detach().float(), y.detach().float(), temperature=0.2, return_rank=True, own_rows=rows
        )
        z, count = F.normalize(torch.cat([x, y])), len(x)
        logits = (z @ z.T * scale).masked_fill(torch.eye(2 * count).bool(), -torch.inf)
        labels = (torch.arange(2 * count) + count) % (2 * count)
        losses = F.cross_entropy(logits, labels, reduction="none").view(2, count)
        return losses[:, rows].mean(), positive_rank
    logits = scale * x @ y.T
    if name == "clip_loss":
        losses = [
            F.cross_entropy(part[rows], torch.arange(len(x))[rows]) for part in (logits, logits.T)
        ]
        return (losses[0] + losses[1]) / 2, None
    signs = 2 * torch.eye(len(x)) - 1
    losses = -F.logsigmoid(signs * (logits - scale))[rows].sum(1)
    return losses.mean(), None


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_on_a_ring_are_those_over_the_gathered_features(
    world_size: int, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue("two" if world_size == 2 else "four")
    stops = torch.tensor(ROWS[:world_size]).cumsum(0).tolist()
    places = [slice(stop - count, stop) for count, stop in zip(ROWS, stops)]
    for name in NAMES:
        x, y = (z.requires_grad_() for z in views(world_size, torch.float64))
        scales = [torch.tensor(5.0, dtype=torch.float64, requires_grad=True) for _ in places]
        exact = [gathered(name, x, y, s, rows) for s, rows in zip(scales, places)]
        # Gradients reach the features of every rank: as if all losses were added.
        sum(loss for loss, _ in exact).backward()
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
            for rank, rows in enumerate(places):
                loss, positive_rank, *gradients = found[rank][name, dtype]
                # The inputs in float32 are rounded.
                atol = tolerance if dtype == torch.float32 else 2e-7
                torch.testing.assert_close(
                    loss.double(), exact[rank][0].detach(), rtol=tolerance, atol=atol
                )
                for got, want in zip(gradients, (x.grad[rows], y.grad[rows], scales[rank].grad)):
                    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
                if positive_rank is not None:
                    assert torch.equal(positive_rank, exact[rank][1])


def test_memory_grows_with_the_rows_of_a_rank_alone(two: list[Any], four: list[Any]) -> None:
    largest = two[0]["memory"]
    assert largest == four[0]["memory"]
    block = (2 * COUNT) * 512  # logits of a block: 512 queries at a time
    assert max(largest.values()) <= block < 4 * COUNT * COUNT


def test_ranks_that_disagree_all_raise(two: list[Any]) -> None:
    first, second = (found["messages"] for found in two)
    assert first == second
    for message, words in zip(first, ("widths", "types", "needs of a gradient", "own_rows")):
        assert words in message


def test_results_against_two_sets_merge_without_loss_of_digits() -> None:
    """An easy positive has a loss of 1e-9 against either set, a hard one a loss of 300."""

    def against(loss: Tensor) -> InfoNCEForward:
        return InfoNCEForward(loss, loss - 1, None, None, None, torch.ones(len(loss)))

    first, second = torch.tensor([1e-9, 300.0, 0.0, 2.0]), torch.tensor([3e-9, 299.0, 0.5, 1.0])
    merged = ring._merged(against(first), against(second))
    exact = torch.log(first.double().exp() + second.double().exp() - 1)
    exact[0] = 4e-9
    torch.testing.assert_close(merged.loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.lse, merged.loss - 1)
    shares = (first - merged.loss).exp() + (second - merged.loss).exp()
    torch.testing.assert_close(merged.grad_scale, shares)
