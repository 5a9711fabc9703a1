"""Schedules against the rules of facebookresearch/moco, and fused optimisers.

Optimisers are compared with PyTorch's, with MoCo v3's LARS, and with averaging in the model.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mocofast.optim
from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.moco import MoCo
from mocofast.ops import ema_update_
from mocofast.optim import FusedAdamW, FusedLARS, FusedSGD
from mocofast.optim.build import build_optimizer
from mocofast.optim.schedule import (
    cosine_momentum,
    learning_rate,
    scaled_by_batch,
    set_learning_rate,
)
from mocofast.train.step import train_step
from tests.eager_moco import PlainEncoder, random_batches


def rates(config: OptimConfig, steps_per_epoch: int, epochs: int) -> list[float]:
    return [
        learning_rate(config, s, steps_per_epoch, epochs) for s in range(steps_per_epoch * epochs)
    ]


def test_step_schedule_equals_the_references_by_epoch() -> None:
    got = rates(OptimConfig(), 5, 200)
    for step, rate in enumerate(got):
        expected = 0.03
        for milestone in (120, 160):  # adjust_learning_rate of main_moco.py
            expected *= 0.1 if step // 5 >= milestone else 1.0
        assert rate == pytest.approx(expected, rel=1e-12)


def test_cosine_schedule_equals_the_references_by_epoch() -> None:
    got = rates(OptimConfig(schedule="cosine"), 5, 200)
    for step, rate in enumerate(got):
        assert rate == pytest.approx(
            0.03 * 0.5 * (1.0 + math.cos(math.pi * (step // 5) / 200)), rel=1e-12
        )


def test_cosine_by_step_falls_at_every_step_to_almost_zero() -> None:
    got = rates(OptimConfig(schedule="cosine", per="step"), 7, 3)
    assert all(a > b for a, b in itertools.pairwise(got))
    assert got[0] == 0.03
    assert 0 < got[-1] < 0.03 * 0.01


def test_warm_up_rises_linearly_and_meets_the_schedule() -> None:
    config = OptimConfig(schedule="cosine", warmup_epochs=2, per="step", lr=1.0)
    got = rates(config, 10, 10)
    assert got[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert got[20] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(got[20:]))


def test_constant_stays() -> None:
    assert set(rates(OptimConfig(schedule="constant"), 3, 4)) == {0.03}


def test_sgd_follows_torchs_rule_in_float64_and_skips_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(
        model.parameters(), OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.1)
    )
    weight, velocity = model.weight.detach().double(), None
    frozen = model.bias.detach().clone()
    for step in range(4):
        rate = 0.5 / (step + 1)
        set_learning_rate(optimizer, rate)
        gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizer.step()
        d = gradient.double() + 0.1 * weight
        velocity = d if velocity is None else 0.9 * velocity + d
        weight = weight - rate * velocity
    # Four steps of float32 rounding, about 1e-7 each, on values near 1.
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.bias, frozen)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", FusedSGD), ("lars", FusedLARS), ("adamw", FusedAdamW)]
)
def test_the_configured_optimiser_gets_its_options(name: str, kind: type) -> None:
    config = OptimConfig(name=name, lr=0.3, momentum=0.8, betas=(0.8, 0.95), weight_decay=0.02)
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), config)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.3, 0.02, 2)
    assert (group["betas"] == (0.8, 0.95)) if name == "adamw" else (group["momentum"] == 0.8)


def test_a_rate_per_256_images_grows_with_the_batch() -> None:
    config = OptimConfig(lr=0.3, lr_per=256, schedule="constant")
    assert rates(scaled_by_batch(config, 4096), 2, 3) == pytest.approx([4.8] * 6)
    assert scaled_by_batch(OptimConfig(lr=0.3), 4096).lr == 0.3


def test_importing_the_optimisers_loads_neither_methods_nor_encoders() -> None:
    code = (
        "import sys, mocofast.optim; mocofast.optim.FusedSGD; "
        "unwanted = ('mocofast.methods', 'mocofast.models', 'torchvision'); "
        "print([m for m in sys.modules if m.startswith(unwanted)])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


# ---- fused steps with an average ----


def network(seed: int = 0) -> nn.Sequential:
    """Returns a network with a channels-last weight of four dimensions, norms and biases.

    No bias comes before a norm: the bias's gradient would be rounding noise, which Adam scales to
    full steps.
    """
    torch.manual_seed(seed)
    convolution = nn.Conv2d(3, 8, 3, bias=False)
    layers = nn.Sequential(
        convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5)
    )
    # torch's stubs miss this overload.
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def make(kind: str, params: Any, **more: Any) -> torch.optim.Optimizer:
    """Returns mocofast's or PyTorch's optimiser `kind`, with the same numbers."""
    numbers = {"lr": 0.05, "weight_decay": 0.1}
    if kind.endswith("AdamW"):
        numbers["lr"] = 0.01
    else:
        numbers["momentum"] = 0.9
    place = torch.optim if hasattr(torch.optim, kind) else mocofast.optim
    return getattr(place, kind)(params, **numbers, **more)


def assert_close(ours: nn.Module, expected: nn.Module) -> None:
    # Float32 rounding in another order, over ten steps, on values near 1.
    for a, b in zip(ours.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("ours", "torchs"), [("FusedSGD", "SGD"), ("FusedAdamW", "AdamW")])
def test_fused_steps_follow_torchs_and_exchange_state_dicts_with_it(ours: str, torchs: str) -> None:
    """4 fused steps, 3 of PyTorch and 3 fused steps, against 10 steps of PyTorch."""
    expected, model = network(), network()
    train(expected, make(torchs, expected.parameters()), 10)
    first, second, third = (make(kind, model.parameters()) for kind in (ours, torchs, ours))
    train(model, first, 4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(model, second, 3, 4)
    second.param_groups[0]["fused"] = None  # PyTorch's default
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    train(model, third, 3, 7)
    assert_close(model, expected)
    names = {"momentum_buffer"} if torchs == "SGD" else {"step", "exp_avg", "exp_avg_sq"}
    assert all(set(state) == names for state in third.state_dict()["state"].values())
    if torchs == "AdamW":
        # "fused" says that steps are on the device of the parameters, as the kernel needs.
        assert third.param_groups[0]["fused"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("ours", "torchs"), [("FusedSGD", "SGD"), ("FusedAdamW", "AdamW")])
def test_complex_parameters_keep_their_imaginary_parts(
    ours: str, torchs: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    start, key = torch.randn(2, 5, 7, dtype=dtype)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [make(ours, params[:1], ema=([key], 0.5)), make(torchs, params[1:])]
    wanted = key.clone()
    for _ in range(4):
        gradient = torch.randn(5, 7, dtype=dtype)
        for p, optimizer in zip(params, optimizers):
            p.grad = gradient.clone()
            optimizer.step()
        wanted = 0.5 * wanted + 0.5 * params[1].detach()
        torch.testing.assert_close(*params, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(key, wanted, rtol=1e-5, atol=1e-6)
    mine, theirs = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in theirs.items()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", ["FusedSGD", "FusedLARS", "FusedAdamW"])
def test_a_copied_or_pickled_optimiser_continues_with_its_averages(
    kind: str, duplicate: Callable[[Any], Any]
) -> None:
    model, key = network(), network(1)
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in model.parameters()]
    ema = (list(key.parameters()), 0.5)
    optimizer = make(kind, model.parameters(), ema=ema, shadows=(copies, None))
    train(model, optimizer, 2)
    others = duplicate((model, key, copies, optimizer))
    for part in ((model, optimizer), (others[0], others[3])):
        train(*part, 2, 2)
    assert others[3].owns_ema
    for ours, theirs in zip((model, key), others):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(copies, others[2]))


@pytest.mark.parametrize("kind", ["FusedSGD", "FusedLARS", "FusedAdamW"])
def test_sparse_gradients_are_refused_by_name(kind: str) -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(TypeError, match=f"{kind} takes dense gradients: got .*sparse_coo"):
        make(kind, table.parameters()).step()


def test_lars_refuses_complex_parameters() -> None:
    with pytest.raises(TypeError, match="FusedLARS takes no complex parameters"):
        FusedLARS([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], lr=0.1)


@pytest.mark.parametrize("kind", ["FusedSGD", "FusedLARS", "FusedAdamW"])
def test_a_state_dict_continues_bit_for_bit(kind: str) -> None:
    whole, parts = network(), network()
    train(whole, make(kind, whole.parameters()), 6)
    optimizer = make(kind, parts.parameters())
    train(parts, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = make(kind, parts.parameters())
    optimizer.load_state_dict(state)
    train(parts, optimizer, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))


def test_lars_equals_moco_v3s_and_keeps_the_names_of_its_state() -> None:
    """Compares with MoCo v3's formula, tensor by tensor. The first step has no momentum."""
    model, expected = network(), network()
    optimizer = FusedLARS(model.parameters(), lr=0.3, weight_decay=0.1)
    buffers = [torch.zeros_like(p) for p in expected.parameters()]
    for step in range(10):
        train(model, optimizer, 1, step)
        images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        loss = expected(images).square().mean()
        params = list(expected.parameters())
        with torch.no_grad():
            for p, g, b in zip(params, torch.autograd.grad(loss, params), buffers):
                if p.ndim > 1:
                    g = g + 0.1 * p
                    g = g * 0.001 * p.norm() / g.norm()
                b.mul_(0.9).add_(g)
                p.sub_(0.3 * b)
    assert_close(model, expected)
    assert all(set(state) == {"mu"} for state in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("kind", ["FusedSGD", "FusedLARS", "FusedAdamW"])
def test_a_step_averages_and_copies_with_and_without_gradients(kind: str) -> None:
    model, key = network(), network(1)
    shadows = [
        [torch.empty_like(p, dtype=torch.bfloat16) for p in model.parameters()] for _ in range(2)
    ]
    model[4].requires_grad_(False)
    start = [k.detach().double() for k in key.parameters()]
    frozen = model[4].weight.clone()
    optimizer = make(
        kind,
        model.parameters(),
        ema=(list(key.parameters()), 0.5),
        shadows=(shadows[0], shadows[1]),
    )
    train(model, optimizer, 1)
    assert torch.equal(model[4].weight, frozen) and model[4].weight not in optimizer.state
    for p, k, before, copy_q, copy_k in zip(model.parameters(), key.parameters(), start, *shadows):
        torch.testing.assert_close(k.double(), 0.5 * before + 0.5 * p.double(), rtol=0, atol=1e-7)
        assert torch.equal(copy_q, p.bfloat16()) and torch.equal(copy_k, k.bfloat16())


def test_averaging_in_the_optimiser_gives_the_trajectory_of_averaging_in_the_model() -> None:
    """MoCo averages before the next keys. A last average brings both runs to the same point.

    7 steps of 6 keys go around a queue of 16 twice.
    """
    batches = random_batches(7, 6)
    models = []
    for owned in (False, True):
        torch.manual_seed(3)
        model = MoCo(PlainEncoder, 5, 16, momentum=0.9)
        queries, keys = model.trained_pairs()
        ema = (keys, model.momentum) if owned else None
        optimizer = build_optimizer(queries, OptimConfig(lr=0.5), ema=ema)
        assert optimizer.owns_ema == owned
        losses = [train_step(model, pair, optimizer, 2, autocast("fp32")).loss for pair in batches]
        if not owned:
            ema_update_(keys, queries, model.momentum)
        models.append((torch.stack(losses), model.queue, *queries, *keys))
    for by_model, by_optimizer in zip(*models):
        assert torch.equal(by_model, by_optimizer)  # the same arithmetic on a CPU
    assert models[0][0].std() > 0.01  # the losses change: training happened


def autocast(precision: str) -> torch.autocast:
    return choose_autocast(precision, torch.device("cpu"))


def test_tied_weights_are_one_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = FusedSGD(model.parameters(), lr=0.5)
    assert len(optimizer.param_groups[0]["params"]) == 3
    model(torch.ones(2, 4)).sum().backward()
    weight, gradient = model[0].weight.detach().clone(), model[0].weight.grad
    assert gradient is not None
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), weight - 0.5 * gradient)
    view = nn.Parameter(model[0].weight.data)
    with pytest.raises(ValueError, match="share their memory"):
        FusedSGD([*model.parameters(), view], lr=0.5)


def test_groups_have_their_own_numbers_and_later_groups_no_average() -> None:
    a, b, c, k = (nn.Parameter(torch.ones(2)) for _ in range(4))
    optimizer = FusedSGD(
        [{"params": [a]}, {"params": [b], "lr": 0.25}], lr=0.5, ema=([k, k.detach().clone()], 0.0)
    )
    optimizer.add_param_group({"params": [c], "lr": 1.0})
    for p in (a, b, c):
        p.grad = torch.ones(2)
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss == 3.0
    assert [p[0].item() for p in (a, b, c, k)] == [0.5, 0.75, 0.0, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": ([], 0.9)}, "ema must have a tensor for each parameter: got 0 for 1"),
        ({"ema": ([torch.ones(3)], 0.9)}, r"ema, tensor 0 must be floating, of shape \(2,\)"),
        ({"ema": ([torch.ones(2, dtype=torch.int64)], 0.9)}, "must be floating"),
        ({"ema": ([torch.ones(2)], 1.5)}, r"momentum must be in \[0, 1\]: got 1.5"),
        ({"shadows": (None, [torch.ones(2)])}, "no targets; pass ema"),
        ({"shadows": ([torch.ones(2, device="meta")], None)}, r"shadows\[0\], tensor 0 .* on cpu"),
        ({"lr": -1.0}, "-1"),
    ],
)
@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS, FusedAdamW])
def test_unusable_arguments_are_named(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **change})


def test_state_dicts_of_other_rules_are_refused_and_change_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = FusedSGD([p], lr=0.5)
    for other in ({"nesterov": True, "momentum": 0.9}, {"dampening": 0.5}, {"maximize": True}):
        state = torch.optim.SGD([p], lr=0.1, **other).state_dict()  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=next(iter(other))):
            optimizer.load_state_dict(state)
        with pytest.raises(ValueError, match=next(iter(other))):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **other})
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdamW([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5 and len(optimizer.param_groups) == 1


def test_momentum_of_the_key_encoder_rises_to_one_as_in_moco_v3() -> None:
    values = [cosine_momentum(0.99, step, 100) for step in (0, 25, 50, 100)]
    # Half of the way to 1 after half of the run. cos(pi / 4) = 0.70710678 after a quarter.
    assert values == pytest.approx([0.99, 1 - 0.01 * 1.70710678 / 2, 0.995, 1.0], abs=1e-10)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_limit_scales_longer_gradients_before_the_step(accumulate: int) -> None:
    """One step at rate 1 without momentum: the weights move by the clipped gradient."""
    from mocofast.config import OptimConfig
    from mocofast.device import choose_autocast
    from mocofast.methods.moco import MoCo
    from mocofast.models.encoders import TinyResNet
    from mocofast.train.optimizer import optimizer_of
    from mocofast.train.step import train_step

    moved = {}
    for limit in (0.0, 1e-3, 1e6):
        torch.manual_seed(0)
        model = MoCo(TinyResNet, dim=8, queue_size=16)
        config = OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=limit)
        before = torch.cat([p.detach().flatten().clone() for p in model.encoder_q.parameters()])
        views = (torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
        cpu = choose_autocast("fp32", torch.device("cpu"))
        train_step(model, views, optimizer_of(model, config), accumulate, cpu)
        after = torch.cat([p.detach().flatten() for p in model.encoder_q.parameters()])
        moved[limit] = (before - after).double()
    assert torch.equal(moved[0.0], moved[1e6])
    assert abs(float(moved[1e-3].norm()) - 1e-3) < 1e-6
    cosine = torch.nn.functional.cosine_similarity(moved[0.0], moved[1e-3], dim=0)
    assert float(cosine) > 0.999
