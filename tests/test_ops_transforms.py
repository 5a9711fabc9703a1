"""Losses under torch.func: vmap is right for every size, derivatives are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mocofast import ops

# N, K, C of a small problem, of one with a block, of one with a call of the compiled library, and
# of one with several blocks
SIZES = [(4, 9, 8), (64, 512, 64), (256, 4096, 128), (600, 9000, 64)]
Loss = Callable[..., Tensor]


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def eager(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Returns the losses of rows in float64."""
    query, positive, negatives = (
        torch.nn.functional.normalize(x.double(), dim=1) for x in (query, positive, negatives)
    )
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], 1)
    return (logits / temperature).logsumexp(1) - logits[:, 0] / temperature


@pytest.mark.parametrize("size", SIZES)
def test_vmap_of_info_nce_is_right_at_every_size(size: tuple[int, int, int]) -> None:
    count, keys, dim = size
    query, positive, negatives = inputs((2, count, dim), (2, count, dim), (2, keys, dim))

    def loss(query: Tensor, positive: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        return ops.info_nce(query, positive, negatives, reduction="none", return_rank=True)

    for mapped in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        given = [x if dim == 0 else x[0] for x, dim in zip((query, positive, negatives), mapped)]
        losses, ranks = torch.func.vmap(loss, mapped)(*given)
        for i in range(2):
            own = [x[i] if dim == 0 else x for x, dim in zip(given, mapped)]
            torch.testing.assert_close(losses[i].double(), eager(*own, 0.1), rtol=1e-5, atol=1e-5)
            assert torch.equal(ranks[i], loss(*own)[1])
    # The mean, and two levels of vmap.
    expected = torch.stack([eager(x, positive[0], negatives[0], 0.1).mean() for x in query])
    mean = torch.func.vmap(lambda x: ops.info_nce(x, positive[0], negatives[0]))
    torch.testing.assert_close(mean(query).double(), expected, rtol=1e-5, atol=1e-5)
    twice = torch.func.vmap(mean)(query[None])
    torch.testing.assert_close(twice[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_vmap_takes_temperatures_ids_and_masks() -> None:
    query, positive, negatives = inputs((5, 8), (5, 8), (9, 8))
    temperatures = torch.tensor([0.1, 0.7])
    ids, key_ids = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 5, 5, 0]]), torch.arange(9)
    masks = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(1)) < 0.4

    def loss(temperature: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return ops.info_nce(
            query,
            positive,
            negatives,
            temperature=temperature,
            query_ids=ids,
            key_ids=key_ids,
            exclude=mask,
        )

    got = torch.func.vmap(loss)(temperatures, ids, masks)
    for i in range(2):
        torch.testing.assert_close(got[i], loss(temperatures[i], ids[i], masks[i]))
    assert abs(got[0] - got[1]) > 0.1


def test_vmap_of_other_losses_is_right() -> None:
    first, second = inputs((2, 700, 64), (700, 64))
    losses: list[Loss] = [
        lambda x: ops.nt_xent(x, second),
        lambda x: ops.nt_xent(x, second, own_rows=slice(100, 300), reduction="none"),
        lambda x: ops.clip_loss(x, second / 8, 1.5),
        lambda x: ops.info_nce(x, second),
        lambda x: ops.info_nce(x, second, first.view(700, 2, 64)),  # own negatives
        lambda x: ops.supervised_contrastive(x, torch.arange(700) % 7),
    ]
    for loss in losses:
        expected = torch.stack([loss(x) for x in first])
        torch.testing.assert_close(torch.func.vmap(loss)(first), expected)
    with pytest.raises(RuntimeError, match="siglip_loss, and losses of a group"):
        torch.func.vmap(lambda x: ops.siglip_loss(x, second, 1.0, -1.0))(first)


@pytest.mark.parametrize("size", SIZES)
def test_derivatives_of_torch_func_are_refused_by_name(size: tuple[int, int, int]) -> None:
    count, keys, dim = size
    query, positive, negatives = inputs((count, dim), (count, dim), (keys, dim))

    def loss(query: Tensor) -> Tensor:
        return ops.info_nce(query, positive, negatives)

    each, stacked = torch.func.vmap(loss), query[None]
    leaf = query.clone().requires_grad_()
    calls: list[Callable[[], object]] = [
        lambda: torch.func.grad(loss)(query),
        lambda: torch.func.grad(lambda x: each(x).sum())(stacked),
        lambda: torch.func.vmap(torch.func.grad(loss))(stacked),
        lambda: each(leaf[None]),
        lambda: torch.func.jvp(loss, (query,), (positive,)),
        lambda: torch.func.jvp(each, (stacked,), (stacked,)),
        lambda: torch.func.jacfwd(loss)(query),
        lambda: torch.func.grad(lambda x: ops.info_nce(query, positive, x))(negatives),
        lambda: torch.func.grad(lambda x: ops.info_nce(x, positive))(query),  # in-batch
        lambda: torch.func.grad(lambda x: ops.nt_xent(x, positive))(query),
        lambda: torch.func.grad(lambda x: ops.clip_loss(x, positive, 1.0))(query),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"^of the transforms .* torch\.autograd\.grad"):
            call()
    with torch.no_grad():
        torch.testing.assert_close(each(leaf[None])[0], loss(query))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward mode"):
            loss(forward_ad.make_dual(query, positive))
        assert torch.equal(loss(query), loss(query.clone()))  # without a tangent


def test_a_loss_without_a_gradient_is_right_inside_a_derivative() -> None:
    query, positive, negatives = inputs((256, 64), (256, 64), (4096, 64))

    def weighted(x: Tensor) -> Tensor:
        return (ops.info_nce(x.detach(), positive, negatives) * x).sum()

    expected = ops.info_nce(query, positive, negatives).expand(256, 64)
    torch.testing.assert_close(torch.func.grad(weighted)(query), expected)
