"""The ops under torch.compile(fullgraph=True), forward and backward, as in eager mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mocofast import ops
from mocofast.ops import custom_ops, sigmoid

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            not shutil.which("g++"), reason="inductor needs a C++ compiler on CPUs"
        ),
    ),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_compiled_equals_eager(
    function: Callable[..., Tensor], inputs: list[Tensor], backend: str
) -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    leaves = [x for x in inputs if x.requires_grad]
    expected = function(*inputs)
    loss = compiled(*inputs)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss.sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moco_with_a_queue(backend: str) -> None:
    weight, x = features(0, 5, 4).requires_grad_(), features(1, 7, 5)
    positive, queue = features(2, 7, 4), F.normalize(features(3, 11, 4))

    def loss(weight: Tensor) -> Tensor:
        return ops.info_nce(x @ weight, positive, queue, temperature=0.2, negatives_normalized=True)

    assert_compiled_equals_eager(loss, [weight], backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_input_with_a_gradient(reduction: str, dtype: torch.dtype) -> None:
    inputs = [features(i, n, 3).to(dtype).requires_grad_() for i, n in enumerate((5, 5, 9))]
    temperature = torch.tensor(0.3, requires_grad=True)

    def loss(query: Tensor, positive: Tensor, negatives: Tensor, temperature: Tensor) -> Tensor:
        return ops.info_nce(
            query, positive, negatives, temperature=temperature, reduction=reduction
        )

    assert_compiled_equals_eager(loss, [*inputs, temperature], "aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_batch_negatives_simclr_and_clip(backend: str) -> None:
    scale = torch.tensor(5.0, requires_grad=True)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return ops.info_nce(x, y) + ops.nt_xent(x, y) + ops.clip_loss(x, y, scale)

    assert_compiled_equals_eager(
        loss, [features(i, 6, 4).requires_grad_() for i in range(2)] + [scale], backend
    )


def test_own_rows_among_those_of_all_ranks() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        own_rows = slice(2, 4)
        return ops.info_nce(x[own_rows], y, own_rows=own_rows) + ops.nt_xent(
            x, y, own_rows=own_rows
        )

    inputs = [features(i, 6, 4).requires_grad_() for i in range(2)]
    assert_compiled_equals_eager(loss, inputs, "aot_eager")


def test_sigmoid_loss_ids_and_own_negatives() -> None:
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (5.0, -3.0))
    ids, hard = torch.arange(6) % 4, features(3, 6, 7, 4)

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        total = ops.siglip_loss(x, y, scale, bias) + ops.siglip_loss(y, x, 4.0, -2.0)
        total = total + ops.info_nce(x, y, query_ids=ids)
        return total + ops.info_nce(x, y, hard, exclude=hard[..., 0] > 1)

    inputs = [features(i, 6, 4).requires_grad_() for i in range(2)]
    assert_compiled_equals_eager(loss, [*inputs, scale, bias], "aot_eager")


def test_rank_and_no_gradient() -> None:
    query, positive, negatives = features(0, 5, 3), features(1, 5, 3), features(2, 9, 3)

    def both(query: Tensor) -> tuple[Tensor, Tensor]:
        return ops.info_nce(query, positive, negatives, reduction="none", return_rank=True)

    compiled: Any = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(query), both(query)):
        assert torch.equal(got, want)


def test_autocast_region() -> None:
    weight, x = features(0, 5, 4).requires_grad_(), features(1, 7, 5)
    positive, queue = features(2, 7, 4), features(3, 11, 4)

    def loss(weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ops.info_nce(x @ weight, positive, queue)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(weight), loss(weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, weight), torch.autograd.grad(want, weight))


def test_batches_of_changing_size_share_one_graph() -> None:
    positive, negatives = features(1, 40, 3), features(2, 9, 3)
    compiled = torch.compile(
        lambda query: ops.info_nce(query, positive[: len(query)], negatives),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for count in (5, 17, 40):
        query = features(count, count, 3).requires_grad_()
        expected = ops.info_nce(query, positive[:count], negatives)
        loss = compiled(query)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, query), torch.autograd.grad(expected, query)
        )


def test_the_queue_may_be_overwritten_inside_the_compiled_step() -> None:
    positive = features(1, 4, 6)

    def step(query: Tensor, queue: Tensor, pointer: Tensor) -> Tensor:
        loss = ops.info_nce(query, positive, queue, negatives_normalized=True)
        ops.enqueue_(queue, pointer, positive)
        return loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        query, queue, pointer = (
            features(0, 4, 6).requires_grad_(),
            F.normalize(features(2, 7, 6)),
            torch.tensor([5]),
        )
        loss = function(query, queue, pointer)
        loss.backward()
        results.append((loss.detach(), query.grad, queue, pointer))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
    assert int(results[1][3]) == 2


def test_a_model_average_inside_the_compiled_step() -> None:
    targets, sources = [features(0, 3), features(1, 2, 2)], [features(2, 3), features(3, 2, 2)]
    expected = [0.9 * t + 0.1 * s for t, s in zip(targets, sources)]
    torch.compile(
        lambda: ops.ema_update_(targets, sources, 0.9), fullgraph=True, backend="aot_eager"
    )()
    torch.testing.assert_close(targets, expected)


def test_the_custom_ops_pass_pytorchs_own_checks() -> None:
    """opcheck tests schema, fake tensors, autograd registration and AOT dispatch."""
    query, positive, negatives = (
        features(i, n, 3).requires_grad_() for i, n in enumerate((5, 5, 9))
    )
    temperature = torch.tensor(0.3, requires_grad=True)
    ids = torch.arange(5), torch.arange(9) % 7
    options = (True, True, True, torch.float32, 0)
    for tensor in (temperature, None):
        torch.library.opcheck(
            custom_ops.info_nce_op,
            (query, positive, negatives, tensor, 0.3, *options, *ids, None, True),
        )
    pair = query, positive, temperature, torch.tensor(-2.0, requires_grad=True)
    torch.library.opcheck(sigmoid.siglip_negatives_op, pair)
    no_gradient = [x.detach() for x in pair]
    torch.library.opcheck(sigmoid.siglip_grad_keys_op, (*no_gradient, features(3, 5)))
    queue, pointer, keys = torch.zeros(7, 3), torch.tensor([5]), features(5, 4, 3)
    torch.library.opcheck(custom_ops.enqueue_op, (queue, pointer, keys, True))
    torch.library.opcheck(custom_ops.ema_update_op, ([queue], [torch.ones(7, 3)], None, 0.5))
    torch.library.opcheck(
        custom_ops.grad_negatives_op,
        (
            features(3, 5),
            query.detach(),
            negatives.detach(),
            features(4, 5),
            None,
            0.3,
            True,
            True,
            torch.float32,
            0,
            *ids,
            None,
        ),
    )
