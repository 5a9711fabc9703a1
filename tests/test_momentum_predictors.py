"""MoCo v3 and BYOL against eager formulas, in one process and over two ranks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn

from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.build import build_method
from mocofast.methods.byol import BYOL
from mocofast.methods.moco_v3 import MoCoV3
from mocofast.methods.predicting import PredictingMethod
from mocofast.models.encoders import TinyResNet
from mocofast.models.sync_batch_norm import sync_batch_norm
from mocofast.settings import load_recipe
from mocofast.train.optimizer import optimizer_of
from mocofast.train.step import train_step
from tests.eager_moco import (
    PlainEncoder,
    assert_same_to_rounding,
    differ_from_rank_0,
    random_batches,
    sgd_trajectory,
)

WORLD = 2
# m at every step, as a schedule would set m. The first update averages equal weights and shows
# nothing.
MOMENTA = (0.9, 0.8, 0.95, 0.7)
BATCH = 10  # images: 5 on each of two ranks


def moco_v3(base: type[nn.Module] = TinyResNet, temperature: float = 0.3) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(base, 13, 17, 0.99, temperature)


def moco_v3_as_for_vits() -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(TinyResNet, 13, 17, 0.99, 0.3, projector_layers=3, predictor_norm=True)


def byol() -> BYOL:
    torch.manual_seed(0)
    return BYOL(TinyResNet, 13, 17, 0.99)


METHODS: dict[str, Callable[[], PredictingMethod]] = {
    "MoCo v3": moco_v3,
    "MoCo v3 as for ViTs": moco_v3_as_for_vits,
    "BYOL": byol,
}


class Eager(nn.Module):
    """The algorithms of the papers, on a copy of a method's weights.

    The moving average is updated before the momentum encoder runs.
    """

    def __init__(self, model: PredictingMethod, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder_q = copy.deepcopy(model.encoder_q)
        self.encoder_k = copy.deepcopy(model.encoder_k)
        self.predictor = copy.deepcopy(model.predictor)
        self.temperature = model.temperature if isinstance(model, MoCoV3) else None
        self.momentum = model.momentum
        self.to(dtype)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, q2 = self.predictor(self.encoder_q(x1)), self.predictor(self.encoder_q(x2))
        with torch.no_grad():
            for target, online in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                target.copy_(self.momentum * target + (1 - self.momentum) * online)
            k1, k2 = self.encoder_k(x1), self.encoder_k(x2)
        return self.compare(q1, k2) + self.compare(q2, k1)

    def compare(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns the loss of predictions q and targets k, both (N, C)."""
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        if self.temperature is None:  # BYOL
            return (q - k).square().sum(1).mean()
        logits = q @ k.t() / self.temperature  # (N, N)
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(q)))


# A learning rate of 0.02, because at 0.1 BatchNorms over 10 images amplify the rounding of float32
# to 1e-4 within four steps.
trajectory = partial(sgd_trajectory, lr=0.02, weight_decay=0.0, momenta=MOMENTA)


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_equals_the_eager_methods(method: str) -> None:
    batches = random_batches(len(MOMENTA), BATCH)
    model = METHODS[method]()
    eager, exact = Eager(model, torch.float32), Eager(model, torch.float64)
    assert_same_to_rounding(*(trajectory(each, batches) for each in (model, eager, exact)))


def on_a_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    """Trains every method on this rank's half of every batch, with BatchNorm over both ranks."""
    batches = [
        (x1.chunk(WORLD)[rank], x2.chunk(WORLD)[rank])
        for x1, x2 in random_batches(len(MOMENTA), BATCH)
    ]
    found = {}
    for name, make in METHODS.items():
        model = make()
        sync_batch_norm(model)
        differ_from_rank_0(model, rank)
        found[name] = trajectory(model, batches)
    model = moco_v3().eval()
    if rank == 0:  # in eval mode no collective may wait for the other rank
        found["eval"] = {"loss": model(*batches[0]).loss.detach()}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(on_a_rank, WORLD)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_with_batchnorm_over_both_are_one_eager_process_of_twice_the_batch(
    ranks: list[dict[str, Any]], method: str
) -> None:
    batches = random_batches(len(MOMENTA), BATCH)
    model = METHODS[method]()
    dtypes = (torch.float32, torch.float64)
    eager, exact = (trajectory(Eager(model, dtype), batches) for dtype in dtypes)
    ours = dict(ranks[0][method])
    # The loss of a rank is the mean over the images of this rank.
    ours["losses"] = (ours["losses"] + ranks[1][method]["losses"]) / 2
    assert_same_to_rounding(ours, eager, exact)
    for name, value in ranks[1][method].items():
        if name != "losses":
            assert torch.equal(value, ranks[0][method][name]), name


def test_averaging_in_the_optimiser_gives_the_trajectory_of_averaging_in_the_method() -> None:
    # AdamW and LARS update an encoder with a moving average and a predictor without.
    for name in ("adamw", "lars"):
        config = OptimConfig(name=name, lr=0.01 if name == "adamw" else 1.0, weight_decay=0.01)
        fused, own = moco_v3(), moco_v3()
        autocast = choose_autocast("fp32", torch.device("cpu"))
        batches = random_batches(3, BATCH)
        optimizer = optimizer_of(fused, config)
        for views in batches:
            train_step(fused, views, optimizer, 1, autocast)
        optimizer = optimizer_of(own, config)
        optimizer._register_companions(None, None)
        for views in batches:
            train_step(own, views, optimizer, 1, autocast)
        own(*batches[0])  # updates the average after the last step
        for (parameter, got), expected in zip(fused.named_parameters(), own.parameters()):
            torch.testing.assert_close(
                got, expected, rtol=1e-5, atol=1e-6, msg=f"{name} {parameter}"
            )


def test_the_predictor_is_trained_and_has_no_moving_average() -> None:
    model = byol()
    queries, keys = model.trained_pairs()
    assert [id(p) for p in queries] == [id(p) for p in model.encoder_q.parameters()]
    assert [id(p) for p in keys] == [id(p) for p in model.encoder_k.parameters()]
    groups = optimizer_of(model, OptimConfig()).param_groups
    trained = [*model.encoder_q.parameters(), *model.predictor.parameters()]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_positive_ranks_and_chance_loss_of_moco_v3_follow_from_the_logits() -> None:
    model = moco_v3(PlainEncoder)
    x1, x2 = random_batches(1, 7)[0]
    assert model.chance_loss is None
    positive_rank = model(x1, x2).rank
    eager = Eager(model, torch.float64)
    q = [F.normalize(eager.predictor(eager.encoder_q(x.double())), dim=1) for x in (x1, x2)]
    k = [F.normalize(eager.encoder_k(x.double()), dim=1) for x in (x1, x2)]
    scores = [q[0] @ k[1].t(), q[1] @ k[0].t()]
    above = torch.cat([(s > s.diagonal()[:, None]).sum(1) for s in scores])
    assert torch.equal(positive_rank.long(), above)
    chance = F.cross_entropy(torch.zeros(7, 7, dtype=torch.float64), torch.arange(7))
    assert model.chance_loss == pytest.approx(float(2 * 2 * 0.3 * chance))


@pytest.mark.parametrize("method", METHODS)
def test_eval_mode_changes_nothing_and_waits_for_nobody(
    method: str, ranks: list[dict[str, Any]]
) -> None:
    model = METHODS[method]().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model(*random_batches(1, BATCH)[0]).loss
    assert torch.isfinite(loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.isfinite(ranks[0]["eval"]["loss"])


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        moco_v3(temperature=0.0)
    with pytest.raises(ValueError, match="momentum must be in"):
        BYOL(TinyResNet, 4, 4, 1.5)
    with pytest.raises(ValueError, match=r"expected a linear layer in its \.fc"):
        BYOL(lambda num_classes: nn.ModuleDict({"fc": nn.Identity()}), 4, 4, 0.5)


def test_uint8_views_give_the_loss_of_normalised_views() -> None:
    mean, std = torch.tensor([120.0, 110, 100]), torch.tensor([60.0, 61, 62])
    torch.manual_seed(0)
    model = BYOL(PlainEncoder, 5, 6, 0.9, pixel_mean=mean, pixel_std=std)
    pixels = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    floats = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(model.eval()(*pixels).loss, model(*floats).loss)
    with pytest.raises(ValueError, match="im_2 must have the shape of im_1"):
        model(pixels[0], pixels[1, :2])


def test_a_state_dict_keeps_projector_in_the_head_and_predictor_apart() -> None:
    names = moco_v3().state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"encoder_q", "encoder_k", "predictor"}
    assert "encoder_q.fc.0.weight" in names
    # The projector ends in a BatchNorm without weights.
    assert "encoder_q.fc.4.running_mean" in names
    assert "encoder_q.fc.4.weight" not in names
    assert "predictor.4.running_mean" not in names


def test_residual_blocks_of_moco_v3s_resnets_start_as_identities() -> None:
    config = load_recipe("cifar10_moco_v3")
    state = build_method(config).state_dict()
    last = [name for name in state if re.fullmatch(r"encoder_[qk]\.layer\d\.\d\.bn2\.weight", name)]
    assert len(last) == 16  # 8 blocks of a ResNet-18, in two encoders
    assert all(not state[name].any() for name in last)
    assert state["encoder_q.layer1.0.bn1.weight"].all()
