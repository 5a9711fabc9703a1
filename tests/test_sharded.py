"""EMA and fused optimisers on models sharded by FSDP2, on two gloo ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mocofast_bench.processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import VisionTransformer

from mocofast import MoCo, ops
from mocofast.optim import FusedAdamW, FusedLARS, FusedSGD
from tests.eager_moco import PlainEncoder, random_batches

WORLD, STEPS = 2, 4


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    vit = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=40)
    vit.heads = nn.Linear(24, 7)  # 7 rows: ranks hold parts of unequal sizes
    return vit


def sharded(model: nn.Module) -> nn.Module:
    for block in model.encoder.layers:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in model.state_dict().items()
    }


def trained(rank: int, kind: str, shard: bool, fused_average: bool) -> dict[str, Any]:
    """Trains a ViT with a moving average. Returns the whole weights of both."""
    torch.manual_seed(0)
    query = small_vit()
    key = copy.deepcopy(query).requires_grad_(False)
    run: nn.Module = query
    if shard:
        run, key = sharded(query), sharded(key)
    else:
        run = DistributedDataParallel(query)
    queries, keys = list(query.parameters()), list(key.parameters())
    options: dict[str, Any] = {"ema": (keys, 0.9)} if fused_average else {}
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = FusedSGD(queries, lr=0.1, momentum=0.9, weight_decay=0.01, **options)
    else:
        # AdamW would scale up the rounding of a gradient that is 0: the bias of attention's keys.
        optimizer = FusedAdamW(queries, lr=0.01, eps=1e-3, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        images = torch.randn(WORLD * 2, 3, 16, 16, generator=generator).chunk(WORLD)[rank]
        optimizer.zero_grad(set_to_none=True)
        run(images).square().mean().backward()
        optimizer.step()
        if not fused_average:
            ops.ema_update_(keys, queries, 0.9)
        if shard and step == 1:  # a forward pass unshards, and reshards afterwards
            key(images)
            key.unshard()  # type: ignore[operator]
            key.reshard()  # type: ignore[operator]
    return {"query": whole(query), "key": whole(key)}


def moco_trained(rank: int, sharded_parts: tuple[str, ...], fused: bool) -> dict[str, Tensor]:
    """Trains MoCo, under DDP without parts. Returns losses and the whole state dict.

    sharded_parts: attributes, and "" for the model, in the order of the calls of fully_shard.
    """
    torch.manual_seed(0)
    model = MoCo(PlainEncoder, 8, 20, momentum=0.8)
    for name in sharded_parts:
        fully_shard(model.get_submodule(name))
    run: nn.Module = model if sharded_parts else DistributedDataParallel(model)
    queries, keys = model.trained_pairs()
    optimizer = FusedSGD(queries, 0.3, 0.9, ema=(keys, model.momentum) if fused else None)
    losses = []
    for im_q, im_k in random_batches(STEPS, WORLD * 3):
        parts = im_q.chunk(WORLD)[rank], im_k.chunk(WORLD)[rank]
        loss = run(*parts, update_keys=not fused).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **whole(model)}


MOCO_PARTS = {
    "encoders": ("encoder_q", "encoder_k"),
    "encoders and model": ("encoder_q", "encoder_k", ""),
    "model": ("",),
}


def moco_cases(rank: int) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for fused in (False, True):
        cases[f"DDP, {fused}"] = moco_trained(rank, (), fused)
        for name, parts in MOCO_PARTS.items():
            try:
                cases[f"{name}, {fused}"] = moco_trained(rank, parts, fused)
            except RuntimeError as error:
                cases[f"{name}, {fused}"] = str(error)
    return cases


@pytest.fixture(scope="module")
def moco_results() -> dict[str, Any]:
    return on_ranks(moco_cases, WORLD)[0]


@pytest.mark.parametrize("parts", MOCO_PARTS)
@pytest.mark.parametrize("fused", [False, True], ids=["average apart", "average in the optimiser"])
def test_moco_sharded_in_another_loop_equals_ddp(
    parts: str, fused: bool, moco_results: dict[str, Any]
) -> None:
    found, expected = (moco_results[f"{name}, {fused}"] for name in (parts, "DDP"))
    if parts == "model" and not fused:  # the average of whole weights would be lost
        assert "fully_shard(model.encoder_q), fully_shard(model.encoder_k), then" in found
        return
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert expected["losses"].std() > 0.01


def all_cases(rank: int) -> dict[str, Any]:
    cases: dict[str, Any] = {
        f"{kind}, {average}": [
            trained(rank, kind, shard, average == "fused") for shard in (True, False)
        ]
        for kind in ("sgd", "adamw")
        for average in ("fused", "apart")
    }
    mesh = init_device_mesh("cpu", (WORLD,))
    here = [
        DTensor.from_local(torch.ones(2, 3), mesh, [placement])
        for placement in (Shard(0), Replicate())
    ]
    # A tied weight, listed as itself and as another wrapper of its memory, moves once.
    tied, source = here[0] * 0, here[0]
    again = DTensor.from_local(tied.to_local(), mesh, [Shard(0)])
    ops.ema_update_([tied, tied, again], [source] * 3, 0.5)
    cases["tied"] = tied.to_local().tolist()
    try:
        ops.ema_update_([here[0]], [DTensor.from_local(torch.ones(4, 3), mesh, [Replicate()])], 0.5)
    except ValueError as error:
        cases["other placements"] = str(error)
    try:
        FusedLARS([nn.Parameter(here[0])], lr=0.1)
    except TypeError as error:
        cases["lars"] = str(error)
    return cases


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(all_cases, WORLD)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("average", ["fused", "apart"])
def test_fsdp2_with_a_moving_average_equals_ddp(
    results: list[dict[str, Any]], kind: str, average: str
) -> None:
    start = whole(small_vit())
    for found in results:
        ours, expected = found[f"{kind}, {average}"]
        for side in ("query", "key"):
            assert ours[side].keys() == expected[side].keys()
            for name, value in expected[side].items():
                torch.testing.assert_close(ours[side][name], value, rtol=0, atol=1e-6)
        moved = [name for name, value in expected["key"].items() if (value != start[name]).any()]
        assert len(moved) > 25  # the comparison is not of weights that stand still


def test_other_placements_and_lars_are_refused(results: list[dict[str, Any]]) -> None:
    assert results[0]["other placements"].startswith("sources[0] must be sharded as targets[0]")
    assert "FusedSGD and FusedAdamW take sharded models" in results[0]["lars"]


def test_tied_weights_of_sharded_models_move_once(results: list[dict[str, Any]]) -> None:
    assert [found["tied"] for found in results] == [[[0.5] * 3] * 2] * WORLD


def test_other_wrappers_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    target, source = TwoTensor(torch.ones(2), torch.ones(2)), torch.zeros(2)
    with pytest.raises(TypeError, match=r"targets\[0\] is a TwoTensor"):
        ops.ema_update_([target], [source], 0.5)
    with pytest.raises(TypeError, match="params is a TwoTensor"):
        FusedSGD([nn.Parameter(target)], lr=0.1)
    assert source.tolist() == [0, 0]
