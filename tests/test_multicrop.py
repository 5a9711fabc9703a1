"""Multi-crop: methods against plain re-implementations, engines, and views of every loader."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn

from mocofast.methods.base import Method
from mocofast.methods.byol import BYOL
from mocofast.methods.moco import MoCo
from mocofast.methods.moco_v3 import MoCoV3
from mocofast.methods.simclr import SimCLR
from mocofast.methods.swav import SwAV
from mocofast.models.encoders import TinyResNet
from mocofast.models.sync_batch_norm import sync_batch_norm
from tests.eager_methods import Batch, trajectory
from tests.eager_moco import assert_same_to_rounding, differ_from_rank_0
from tests.eager_multicrop import EAGER

STEPS, SIZE = 5, 12
SIDES = (8, 8, 5, 5, 4)  # of two large views, and of three small views of two sizes

SMALL: dict[str, Callable[[], Method]] = {
    # Frozen for two steps. The queue holds two batches, so the assignment uses it from step 2 on.
    "swav": partial(
        *(SwAV, TinyResNet),
        dim=13,
        hidden_dim=16,
        prototypes=11,
        freeze_prototypes=2,
        feature_queue=2 * SIZE,
    ),
    "simclr": partial(SimCLR, TinyResNet, dim=13, hidden_dim=16, temperature=0.2),
    "moco": partial(MoCo, TinyResNet, 13, 50, 0.9, 0.2, mlp=True, shuffle_bn=False),
    "moco symmetric": partial(MoCo, TinyResNet, 13, 50, 0.9, 0.2, shuffle_bn=False, symmetric=True),
    "moco v3": partial(MoCoV3, TinyResNet, 13, 17, 0.9, 0.3),
    "byol": partial(BYOL, TinyResNet, 13, 17, 0.9),
}


def small(name: str) -> Method:
    """Returns a small method with smooth activations, because ReLU turns rounding into jumps."""
    torch.manual_seed(0)
    model = SMALL[name]()
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, child_name, nn.SiLU())
    return model


def crops(dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(STEPS):
        views = tuple(torch.randn(SIZE, 3, side, side, generator=generator) for side in SIDES)
        none = torch.zeros(SIZE, dtype=torch.int64)
        batches.append(Batch(tuple(view.to(dtype) for view in views), none, none))
    return batches


def learned(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns losses and weights, without queues and statistics of BatchNorm."""
    left_out = ("queue", "negatives", "running_")
    return {k: v for k, v in found.items() if not any(word in k for word in left_out)}


def eager_trajectories(name: str) -> list[dict[str, Tensor]]:
    model = small(name)
    dtypes = (torch.float32, torch.float64)
    return [learned(trajectory(EAGER[type(model)](model, d), crops())) for d in dtypes]


@pytest.mark.parametrize("name", SMALL)
def test_trajectory_is_that_of_the_plain_re_implementation(name: str) -> None:
    eager, exact = eager_trajectories(name)
    assert_same_to_rounding(learned(trajectory(small(name), crops())), eager, exact)


def two_ranks(rank: int) -> dict[str, Any]:
    """Trains every method on this rank's half of every batch, with BatchNorm over both ranks."""
    found: dict[str, Any] = {}
    for name in SMALL:
        model = small(name)
        sync_batch_norm(model)
        differ_from_rank_0(model, rank)
        found[name] = trajectory(model, [batch.rank_slice(rank, 2) for batch in crops()])
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(two_ranks)


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_follow_one_process_on_the_whole_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    eager, exact = eager_trajectories(name)
    for rank in ranks:
        assert_same_to_rounding(learned(rank[name]), eager, exact, factor=5.0)
    for queue in ("queue", "feature_queue"):
        if queue in ranks[0][name]:
            assert torch.equal(ranks[0][name][queue], ranks[1][name][queue])
