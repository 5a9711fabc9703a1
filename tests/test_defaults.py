"""PyTorch's defaults for new tensors play no part: dtype and device of the arguments decide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mocofast_kernels import cpu_sweep, tables
from torch import Tensor, nn

from mocofast import ops
from mocofast.config import AugmentConfig
from mocofast.data.interface import sample_view
from mocofast.data.library import rounds_together
from mocofast.data.loaders import eval_batches
from mocofast.data.photometric import make_views
from mocofast.data.sources import ArraySource
from mocofast.data.view_ops import apply_view_ops
from mocofast.evaluate import knn
from mocofast.optim import FusedAdamW


def numbers(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def info_nce(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A problem large enough for the compiled sweep."""
    query, positive, negatives = (
        numbers(seed, size, 64).to(dtype).requires_grad_()
        for seed, size in enumerate((64, 64, 4096))
    )
    loss, rank = ops.info_nce(query, positive, negatives, return_rank=True)
    return [loss, rank, *torch.autograd.grad(loss, (query, positive, negatives))]


def half_info_nce() -> list[Tensor]:
    return info_nce(torch.bfloat16)


def ranks_by_pytorch() -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sweep, "sweep_of", lambda rows: None)
        return info_nce()


def adamw() -> list[Tensor]:
    param = nn.Parameter(numbers(0, 7, 5))
    optimizer = FusedAdamW([param], 0.1)
    for seed in (1, 2):
        param.grad = numbers(seed, 7, 5)
        optimizer.step()
    return [param, *optimizer.state[param].values()]


def neighbours() -> list[Tensor]:
    train, val = numbers(0, 60, 8), numbers(1, 20, 8)
    labels = torch.arange(60, device="cpu") % 5
    own = labels[:20]
    top = knn.knn_accuracy(train, labels, val, own, k=7)
    few = knn.few_shot_accuracy(train, labels, val, own, shots=2)
    shares = torch.tensor([*top, *few], dtype=torch.float64, device="cpu")
    return [shares, *knn.nearest_labels([(train, labels)], val, 7)]


def views() -> list[Tensor]:
    augment = AugmentConfig(
        size=16, hed=0.1, noise=0.05, rotate=20, blur=1.0, channel_jitter=(1, 1)
    )
    crops = (numbers(0, 4, 16, 16, 3) * 50 + 128).clamp(0, 255).to(torch.uint8)
    params = [sample_view(augment, (16, 16), 3, 0, i, 0) for i in range(4)]
    found = [torch.empty_like(crops) for _ in range(2)]
    for make, out in zip((apply_view_ops, make_views), found):
        make(crops, params, augment, out)
    return found


def evaluation_crops() -> list[Tensor]:
    levels = torch.arange(5 * 40 * 30 * 3, device="cpu").remainder(251).to(torch.uint8).numpy()
    source = ArraySource(levels.reshape(5, 40, 30, 3), np.arange(5), tuple("abcde"))
    (batch,) = eval_batches(source, 16, 5, 0, torch.device("cpu"))
    return [x for x in batch if x is not None]


def small_losses() -> list[Tensor]:
    a, b = (numbers(seed, 9, 8).requires_grad_() for seed in (0, 1))
    labels = torch.arange(9, device="cpu") % 3
    losses = [
        ops.info_nce(a, b),
        ops.nt_xent(a, b),
        ops.clip_loss(a, b, 2.0),
        ops.siglip_loss(a, b, 2.0, -1.0),
        ops.supervised_contrastive(a, labels) + ops.info_nce(a, b.detach(), numbers(2, 20, 8)),
    ]
    return [*losses, *torch.autograd.grad(torch.stack(losses).sum(), (a, b))]


def table_of_addresses() -> list[Tensor]:
    (table,) = tables.TableCache(8).plan([(numbers(0, 3, 7), numbers(1, 3, 7))], 2).tables
    return [table.sizes, table.owners, table.starts]


@pytest.mark.parametrize(
    ("compute", "device"),
    [
        (info_nce, "meta"),
        (half_info_nce, "meta"),
        (ranks_by_pytorch, "meta"),
        (adamw, "meta"),
        (neighbours, "meta"),
        (views, "meta"),
        (evaluation_crops, "meta"),
        (small_losses, "meta"),
        (table_of_addresses, "meta"),
        (lambda: [torch.tensor(rounds_together(), device="cpu")], "meta"),
        (lambda: [ops.unit_gradient(torch.device("cpu"))], "meta"),
    ],
)
def test_defaults_play_no_part(
    compute: Callable[[], list[Tensor]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mocofast.ops.known_gradients._units", {})
    expected, default = compute(), torch.get_default_dtype()
    monkeypatch.setattr("mocofast.ops.known_gradients._units", {})
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device(device):
            found = compute()
    finally:
        torch.set_default_dtype(default)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
