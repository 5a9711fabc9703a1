"""Multi-crop: methods against plain re-implementations, engines, and views of every loader."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn

from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.base import Method
from mocofast.methods.byol import BYOL
from mocofast.methods.moco import MoCo
from mocofast.methods.moco_v3 import MoCoV3
from mocofast.methods.simclr import SimCLR
from mocofast.methods.swav import SwAV
from mocofast.models.encoders import TinyResNet
from mocofast.models.sizes import encode
from mocofast.models.sync_batch_norm import sync_batch_norm
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of
from mocofast.train.step import train_step
from tests.eager_methods import Batch, trajectory
from tests.eager_moco import PlainEncoder, assert_same_to_rounding, differ_from_rank_0
from tests.eager_multicrop import EAGER

CPU = torch.device("cpu")

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


def crops() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    none = torch.zeros(SIZE, dtype=torch.int64)
    return [
        Batch(
            tuple(torch.randn(SIZE, 3, side, side, generator=generator) for side in SIDES),
            *(none, none),
        )
        for _ in range(STEPS)
    ]


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


def trained(
    name: str, mode: str, precision: str = "fp32", accumulate: int = 1, backend: Any = None
) -> dict[str, Tensor]:
    """Returns the losses and the state after a few steps in a mode of the engine, or plain."""
    method = small(name).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(method, OptimConfig())
    autocast = choose_autocast(precision, CPU)
    step: Callable[..., Any] = partial(
        train_step, method, optimizer=optimizer, accumulate=accumulate, autocast=autocast
    )
    if mode != "plain":
        images = SIZE // accumulate
        step = Engine(mode, method, optimizer, autocast, accumulate, images, backend).step
    losses = [step(batch.views).values.clone() for batch in crops()]
    return {"losses": torch.stack(losses), **method.state_dict()}


@pytest.mark.parametrize("name", ["swav", "moco symmetric"])
def test_every_mode_of_the_engine_gives_one_trajectory(name: str) -> None:
    compiled: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    plain = trained(name, "plain")
    for ours in (trained(name, "graph"), trained(name, "compile", backend=counting)):
        for key, value in plain.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=key)
    # All sizes of SwAV are one graph. MoCo has large and small queries, and keys.
    assert len(compiled) == {"swav": 1, "moco symmetric": 3}[name]
    if name == "swav":  # MoCo runs its query encoder more than once, and sums in another order
        shadows, autocast = (trained(name, mode, "bf16") for mode in ("eager", "plain"))
        for key, value in autocast.items():
            assert torch.equal(shadows[key], value), key


def test_accumulated_small_views_are_those_of_their_images() -> None:
    # Without BatchNorm and with all keys in the queue, micro-batches make the whole batch.
    def run(accumulate: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        method = MoCo(PlainEncoder, 13, 50, 0.9, 0.2, shuffle_bn=False)
        optimizer = optimizer_of(method, OptimConfig())
        autocast = choose_autocast("fp32", CPU)
        for batch in crops():
            train_step(method, batch.views, optimizer, accumulate, autocast)
        return method.state_dict()

    whole, parts = run(1), run(3)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_an_encoder_whose_head_lies_deeper_runs_size_by_size() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.head = nn.Module()
            self.head.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head.fc(self.stem(x).mean((2, 3)))

    encoder, views = Deep(), crops()[0].views
    expected = torch.cat([encoder(view) for view in views])
    torch.testing.assert_close(encode(encoder, *views), expected)
    assert list(encoder.state_dict()) == list(Deep().state_dict())


def test_small_views_of_other_images_are_refused() -> None:
    views = crops()[0].views
    with pytest.raises(ValueError, match=r"small views must have the images.*\(11, 3, 4, 4\)"):
        small("byol")(*views[:2], views[-1][:-1])
