"""Ranks of positives where scores are equal or not a number: no hit, in every dtype and kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocofast import ops
from mocofast.methods.supervised import Supervised
from mocofast.models.encoders import TinyResNet
from mocofast.ops import backend
from tests import triton_device  # noqa: F401  # before triton


def take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the ops run Triton's kernels, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    kernels = backend._triton_backend()
    monkeypatch.setattr(backend, "backend_for", lambda _: kernels)


def tied_problem(kind: str, dtype: torch.dtype, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query (5, C), positive (5, C) and negatives (37, C) whose scores all tie."""
    generator = torch.Generator().manual_seed(C)
    exact = torch.promote_types(dtype, torch.float32)
    query, key = torch.randn(2, C, generator=generator, dtype=exact)
    lengths = torch.rand(37, 1, generator=generator, dtype=exact) + 0.5
    if kind == "equal":
        lengths = torch.ones_like(lengths)
    elif kind == "unit":  # as in a queue, rounded once more than the positive
        key = F.normalize(key, dim=0)
        lengths = torch.ones_like(lengths)
    rows = (key * lengths).to(dtype)
    return query.expand(5, C).to(dtype), rows[:5].clone(), rows


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        *(("cpu", dtype) for dtype in (torch.float64, torch.float32, *HALVES)),
        *(("triton", dtype) for dtype in (torch.float32, *HALVES)),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("C", [3, 64, 200])
def test_the_positive_loses_ties_in_every_dtype(
    device: str, dtype: torch.dtype, normalize: bool, C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "triton":
        take_triton(monkeypatch)
    exact = normalize and dtype not in HALVES
    for kind in ("equal", "unit", "lengths") if exact else ("equal",):
        query, positive, negatives = tied_problem(kind, dtype, C)
        own = negatives.expand(5, 37, C).contiguous()
        mask = torch.zeros(5, 37, dtype=torch.bool)
        masked: dict[str, Any] = {"exclude": mask}
        for theirs, options in ((negatives, {}), (negatives, masked), (own, {})):
            loss, rank = ops.info_nce(
                *(query, positive, theirs),
                normalize=normalize,
                temperature=0.5,
                return_rank=True,
                **options,
            )
            assert loss.isfinite().all()
            assert rank.tolist() == [37] * 5
        dense = (x.view(1, 5, C) for x in (query, positive))
        _, rank = ops.info_nce(*dense, negatives, normalize=normalize, return_rank=True)
        assert rank.tolist() == [[37] * 5]
    # A negative that is a little lower is not above: 2e-5, in float32.
    if dtype == torch.float32:
        lower = F.normalize(positive[:1].double(), dim=1) - 2e-5 * F.normalize(query[:1].double())
        query = F.normalize(query.double()).float()
        positive = F.normalize(positive.double()).float()
        _, rank = ops.info_nce(query, positive, lower.float(), normalize=False, return_rank=True)
        assert rank.tolist() == [0] * 5
    # In-batch: every other row ties.
    same = query[:1].expand(5, C).contiguous()
    assert ops.info_nce(same, same, return_rank=True)[1].tolist() == [4] * 5
    assert ops.nt_xent(same, same, return_rank=True)[1].tolist() == [8] * 10


# The last shape is too large for one call without a sweep over blocks.
@pytest.mark.parametrize(("count", "size"), [(4, 50), (48, 30_000)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("value", [1.0, 0.3, -2.7])
@pytest.mark.parametrize("C", [100, 1000])
def test_constant_features_are_no_hit(
    C: int, value: float, dtype: torch.dtype, count: int, size: int
) -> None:
    """Equal terms are rounded the same way at every addition: the largest error of a sum."""
    size = size * 100 // C
    for gradient in (False, True):
        query = torch.full((count, C), value, dtype=dtype, requires_grad=gradient)
        positive, negatives = torch.full_like(query, value), query.detach().new_full((size, C), 1)
        _, rank = ops.info_nce(query, positive, negatives * value, return_rank=True)
        assert rank.tolist() == [size] * count


@pytest.mark.parametrize(("C", "dtype"), [(100, torch.float32), (500, torch.bfloat16)])
def test_constant_features_are_no_hit_on_a_gpu(
    C: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_triton(monkeypatch)
    for value in (1.0, 0.3, -2.7):
        query, negatives = torch.full((4, C), value, dtype=dtype), torch.full((50, C), value)
        _, rank = ops.info_nce(query, query, negatives.to(dtype), return_rank=True)
        assert rank.tolist() == [50] * 4


@pytest.mark.parametrize("size", [40, 70_000])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_positive_that_the_queue_holds_ties(
    dtype: torch.dtype, normalized: bool, gradient: bool, size: int
) -> None:
    """A queue of 16 bits holds rounded keys. normalized: it holds unit vectors."""
    generator = torch.Generator().manual_seed(size)
    query, negatives = (torch.randn(n, 64, generator=generator).to(dtype) for n in (16, size))
    positive = (query.float() + 0.1 * torch.randn(16, 64, generator=generator)).to(dtype)
    pointer = torch.zeros(1, dtype=torch.int64)
    held = F.normalize(negatives.float()).to(dtype) if normalized else negatives
    ops.enqueue_(held, pointer, positive, normalize=normalized)
    for laid in (positive, positive.t().contiguous().t()):
        _, rank = ops.info_nce(
            query.requires_grad_(gradient),
            *(laid, held),
            return_rank=True,
            negatives_normalized=normalized,
        )
        assert rank.tolist() == [1] * 16


@pytest.mark.parametrize("device", ["cpu", "triton"])
def test_a_nan_is_never_a_hit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "triton":
        take_triton(monkeypatch)
    torch.manual_seed(0)
    query, positive, negatives = (torch.randn(n, 8) for n in (4, 4, 90))
    query[1, 3] = math.nan
    loss, rank = ops.info_nce(query, positive, negatives, return_rank=True)
    assert loss.isnan()
    assert [r == 90 for r in rank.tolist()] == [False, True, False, False]
    _, rank = ops.info_nce(torch.randn(4, 8), positive, negatives * math.nan, return_rank=True)
    assert rank.tolist() == [90] * 4
    query[:] = math.nan
    assert ops.info_nce(query, positive, return_rank=True)[1].tolist() == [3] * 4


def test_equal_logits_are_no_hit_of_a_classifier() -> None:
    model = Supervised(TinyResNet, classes=4)
    for p in model.encoder_q.fc.parameters():
        nn.init.zeros_(p)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
    output = model(images, labels=labels)
    assert output.rank is not None and output.rank.tolist() == [3] * 6
    assert float(output.metrics["acc1"]) == 0
    output = model(images * math.nan, labels=labels)
    assert output.rank is not None and output.rank.tolist() == [3] * 6
