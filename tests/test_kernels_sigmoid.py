"""The kernels of the sigmoid loss against float64: compiled on a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_ops_pairs import siglip
from tests.triton_device import DEVICE

pytest.importorskip("triton")

from mocofast_kernels import cpu_sigmoid
from mocofast_kernels.exclusion import Exclusion
from mocofast_kernels.sigmoid import sigmoid_forward, sigmoid_grad_negatives

from mocofast import ops
from mocofast.ops import backend

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton"
)


def _rows(seed: int, count: int, C: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, C, generator=generator)).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("N", "K", "C", "dtype", "period"),
    [
        (37, 37, 24, torch.float32, 37),
        (5, 90, 101, torch.float32, 0),  # keys of another rank, unaligned rows, two splits
        (70, 33, 300, torch.bfloat16, 70),  # chunks of columns, more rows than keys
        (33, 70, 64, torch.float16, 33),  # the period comes again
    ],
)
def test_sums_and_gradients_are_those_of_float64(
    N: int, K: int, C: int, dtype: torch.dtype, period: int
) -> None:
    query, keys = _rows(0, N, C, dtype), _rows(1, K, C, dtype)
    scale, bias = torch.tensor(10.0, device=DEVICE), torch.tensor(-8.0, device=DEVICE)
    incoming = torch.linspace(-1e-6, 3e-6, N, device=DEVICE)  # as small as a mean makes them
    x, y = query.double(), keys.double().requires_grad_()
    logits = scale.double() * x @ y.T + bias.double()
    row, column = torch.arange(N, device=DEVICE), torch.arange(K, device=DEVICE)
    counts = torch.ones_like(logits, dtype=torch.bool)
    if period:
        counts = (row % period)[:, None] != (column % period)[None, :]
    losses = F.softplus(logits, threshold=60).masked_fill(~counts, 0).sum(1)
    shares = logits.sigmoid().masked_fill(~counts, 0)
    (of_keys,) = torch.autograd.grad(losses, y, incoming.double())

    arguments = query, bias, keys, scale, Exclusion(period)
    ours = sigmoid_forward(*arguments)
    # bfloat16 and float16 round shares, 2^-9 and 2^-12, and float32 sums.
    tolerance = {torch.bfloat16: 2**-9, torch.float16: 2**-11, torch.float32: 2**-19}[dtype]
    pairs = [
        (ours.loss, losses.detach(), 1e-5),
        (ours.weight, shares.sum(1).detach(), 1e-5),
        (ours.output, (shares @ y).detach(), tolerance),
        (sigmoid_grad_negatives(*arguments, incoming), of_keys, tolerance),
    ]
    for mine, exact, error in pairs:
        assert mine.dtype == torch.float32
        assert (mine.double() - exact).norm() <= error * exact.norm()


def test_siglip_loss_takes_the_kernels_and_keeps_its_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = backend.backend_for("cuda")
    assert kernels.sigmoid_forward is sigmoid_forward
    monkeypatch.setattr(backend, "backend_for", lambda device_type: kernels)
    rows = torch.eye(5, 8, device=DEVICE).requires_grad_()
    scale, bias = (torch.tensor(x, device=DEVICE, requires_grad=True) for x in (40.0, -20.0))
    leaves = [rows, scale, bias]
    loss = ops.siglip_loss(rows, rows, scale, bias)
    exact = siglip(rows.cpu(), rows.cpu(), scale.cpu(), bias.cpu()).to(DEVICE)
    assert 1e-9 < exact < 2e-8
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(exact, leaves)
    for mine, want in zip(torch.autograd.grad(loss, leaves), wanted):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-12)


def test_what_no_kernel_computes_takes_pytorchs_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, number = _rows(0, 4, 8, torch.float32), torch.ones((), device=DEVICE)
    masked = Exclusion(mask=torch.eye(4, dtype=torch.bool, device=DEVICE))
    for excluded, x in ((masked, rows), (Exclusion(4), rows.repeat(1, 1025))):
        arguments = x, number, x, number, excluded
        expected = cpu_sigmoid.sigmoid_forward(*arguments)
        for mine, theirs in zip(sigmoid_forward(*arguments), expected):
            assert torch.equal(mine, theirs)
        incoming = torch.ones(4, device=DEVICE)
        mine = sigmoid_grad_negatives(*arguments, incoming)
        assert torch.equal(mine, cpu_sigmoid.sigmoid_grad_negatives(*arguments, incoming))
