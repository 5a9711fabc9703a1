"""The other methods than MoCo follow plain re-implementations, in one process and on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn

from mocofast.config import Config, ConfigError, ModelConfig
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.methods.clip import CLIP
from mocofast.methods.memory_bank import MemoryBank
from mocofast.methods.simclr import SimCLR
from mocofast.methods.supervised import Supervised
from mocofast.methods.swav import SwAV
from mocofast.models.encoders import TinyResNet
from mocofast.models.sync_batch_norm import sync_batch_norm
from mocofast.models.text import byte_texts
from tests.eager_methods import EAGER, Batch, Captions, random_batches, trajectory
from tests.eager_moco import assert_same_to_rounding, differ_from_rank_0

# 31 slots and 13 dimensions are primes. In 5 batches of 12 images, images come back.
IMAGES, CLASSES, STEPS, SIZE = 31, 5, 5, 12


def small_clip(**options: Any) -> CLIP:
    return CLIP(TinyResNet, byte_texts(16, 1, 12, dim=13), dim=13, **options)


SMALL: dict[str, Callable[[], Method]] = {
    "simclr": partial(SimCLR, TinyResNet, dim=13, hidden_dim=16, temperature=0.2),
    "memory bank": partial(
        MemoryBank, TinyResNet, IMAGES, dim=13, negatives=40, temperature=0.2, mlp=True
    ),
    # Frozen for two of the five steps.
    "swav": partial(SwAV, TinyResNet, dim=13, hidden_dim=16, prototypes=11, freeze_prototypes=2),
    "supervised": partial(Supervised, TinyResNet, CLASSES),
    "clip": small_clip,
    # At the largest scale, 1 / 0.01, which the first steps want to pass.
    "clip, clamped": partial(small_clip, temperature=0.01),
    "clip, sigmoid": partial(small_clip, temperature=0.1, loss="sigmoid"),
    # 17 keys: the last keys of a batch wrap around.
    "clip, queues": partial(small_clip, queue_size=17, momentum=0.9),
}


def small(name: str) -> Method:
    """Returns a small method with smooth activations.

    At the kink of a ReLU, rounding would decide between gradients that differ by 1e-3.
    """
    torch.manual_seed(0)
    model = SMALL[name]()
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, child_name, nn.SiLU())
    return model


def batches_for(model: Method) -> list[Batch]:
    return random_batches(STEPS, SIZE, IMAGES, CLASSES, model.num_views)


def eager_trajectories(model: Method) -> list[dict[str, Tensor]]:
    """Returns the trajectory of the plain re-implementation, in float32 and in float64."""
    eager = EAGER[type(model)]
    dtypes = (torch.float32, torch.float64)
    return [trajectory(eager(model, dtype), batches_for(model)) for dtype in dtypes]


@pytest.mark.parametrize("name", SMALL)
def test_trajectory_is_that_of_the_plain_re_implementation(name: str) -> None:
    model = small(name)
    eager, exact = eager_trajectories(model)
    ours = trajectory(model, batches_for(model))
    assert_same_to_rounding(ours, eager, exact)


def two_ranks(rank: int) -> dict[str, Any]:
    """Trains every method on this rank's half of every batch, with BatchNorm over both ranks."""
    found: dict[str, Any] = {}
    for name in SMALL:
        model = small(name)
        sync_batch_norm(model)
        differ_from_rank_0(model, rank)
        found[name] = trajectory(model, [batch.rank_slice(rank, 2) for batch in batches_for(model)])
    # In eval mode, on one rank only: no collective may wait for the other rank.
    if rank == 0:
        found["eval"] = {name: evaluated(small(name)) for name in SMALL}
    return found


def evaluated(model: Method) -> Tensor:
    """Returns the loss of the first batch in eval mode."""
    batch = batches_for(model)[0]
    fields = model.batch_inputs(batch, Captions())
    with torch.no_grad():
        return model.eval()(*batch.views, **fields).loss


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(two_ranks)


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_follow_one_process_on_the_whole_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    eager, exact = eager_trajectories(small(name))
    for rank in ranks:
        # Sums over ranks round once more.
        assert_same_to_rounding(rank[name], eager, exact, factor=5.0)
    assert ranks[0]["eval"][name].isfinite()


def test_memories_wait_for_a_steps_last_micro_batch() -> None:
    bank, swav = small("memory bank"), small("swav")
    first, second = (batch.rank_slice(0, 2) for batch in batches_for(bank)[:2])
    before = bank.bank.clone()
    for batch, last in ((first, False), (second, True)):
        assert torch.equal(bank.bank, before)
        bank(*batch.views, index=batch.index, enqueue=last)
        swav(*batch.views * 2, enqueue=last)
    changed = (bank.bank != before).any(1).nonzero().flatten()
    assert torch.equal(changed, torch.cat([first.index, second.index]).unique())
    assert swav.steps == 1


def test_data_that_a_method_cannot_learn_from_are_named() -> None:
    bank, batch = small("memory bank"), random_batches(1, IMAGES, IMAGES, CLASSES, 1)[0]
    with pytest.raises(ConfigError, match=r"data.batch_size.* 31 images"):
        bank(*batch.views, index=batch.index)
    config = Config(model=ModelConfig(method="supervised", arch="resnet_tiny"))
    with pytest.raises(ConfigError, match="supervised needs images of two classes or more"):
        build_method(config, images=7, classes=0)
