"""Bytes of MoCo v3 with DDP and FSDP2 on the sockets of two processes, beside the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench import scaling_methods
from mocofast_bench.processes import on_ranks
from mocofast_bench.scaling_methods import Case
from mocofast_bench.scaling_model import DOCS, Cluster, insert_tables

from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.moco_v3 import MoCoV3
from mocofast.models.encoders import build_encoder
from mocofast.models.recompute import blocks_of
from mocofast.models.sync_batch_norm import sync_batch_norm
from mocofast.train.engine import Engine
from mocofast.train.optimizer import optimizer_of
from mocofast.train.sharding import Sharding
from tests.wire import Collective, Wire

CPU = torch.device("cpu")
WARM_UP_STEPS = 3  # DistributedDataParallel rebuilds the buckets in the second step


def step_of(fsdp: bool, rank: int) -> tuple[Case, list[Collective]]:
    """Returns the collectives of a step of a small ViT under bf16."""
    torch.manual_seed(0)
    build = build_encoder("vit_micro_cifar", 8)
    model: Any = MoCoV3(build, 8, 16, 0.9, 0.2, projector_layers=3, predictor_norm=True)
    sync_batch_norm(model)
    case = scaling_methods.counted_case(model, "", dim=8, views=2, batch=4, fsdp=fsdp)
    assert case.depth == len(list(blocks_of(model.encoder_q))) == 4
    autocast = choose_autocast("bf16" if fsdp else "fp32", CPU)
    if fsdp:
        Sharding(model, CPU, autocast)
    optimizer = optimizer_of(model, OptimConfig(name="adamw", lr=1e-3))
    engine = Engine("eager", model, optimizer, autocast, 1, case.batch)
    for _ in range(WARM_UP_STEPS):
        engine.step(tuple(torch.randn(2, case.batch, 3, 8, 8)))
    with Wire() as wire:
        engine.step(tuple(torch.randn(2, case.batch, 3, 8, 8)))
    return case, wire.collectives


def numbers(collectives: list[Collective], name: str) -> list[int]:
    return [each.received for each in collectives if each.name == name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's socket counters")
@pytest.mark.parametrize("fsdp", [False, True])
def test_weights_gradients_and_the_number_of_collectives(fsdp: bool) -> None:
    for case, collectives in on_ranks(partial(step_of, fsdp)):
        expected = scaling_methods.received_bytes(case, 2)
        gathers, sums = numbers(collectives, "_allgather_base_"), numbers(collectives, "allreduce_")
        (layers, _), (momentum_layers, _) = case.norms
        small = case.views * (layers + momentum_layers + 1)  # norms and keys, mostly headers
        if fsdp:
            assert len(sums) == case.views * layers
            assert len(gathers) == small + 3 * case.views * (case.depth + 1) + 1
            large = sum(each.received for each in collectives if each.dtype == torch.bfloat16)
            large += sum(n for n in gathers if n > 10_000) - large
            assert large == pytest.approx(expected["weights"], rel=0.02)
            # gloo sends twice the bytes of a ring.
            scattered = numbers(collectives, "_reduce_scatter_base_")
            assert sum(scattered) == pytest.approx(2 * expected["gradients"], rel=0.01)
        else:
            assert len(gathers) == small
            assert len(sums) == case.views * layers + 1
            assert max(sums) == pytest.approx(expected["gradients"], rel=0.01)


def test_the_rates_of_the_cases() -> None:
    v2, v3, vit, sharded = scaling_methods.cases()
    assert v2.trained == 27_966_656 and (v2.dim, v2.views) == (128, 1)
    assert (
        v3.norms[0][0] == 53 + 3
    )  # a ResNet-50, two layers of a projector, a layer of a predictor
    assert vit.depth == 24 and vit.blocks == 24 * (12 * 1024**2 + 13 * 1024)
    assert sharded.fsdp and sharded.trained == vit.trained
    # Twice the work of v2 for an image, and 4 x 123 GFLOP forward and backward a view of ViT-L.
    assert v3.images_per_second == v2.images_per_second / 2
    assert vit.images_per_second == pytest.approx(0.4 * 989e12 / (8 * 122.8e9), rel=0.01)
    assert v2.on("H200").images_per_second == pytest.approx(5259 * 4.8 / 3.35)
    assert (vit.on("H200").batch, vit.on("H200").images_per_second) == (96, vit.images_per_second)


def test_the_document_holds_what_the_script_computes(tmp_path: Path) -> None:
    text = (DOCS / "scaling.md").read_text("utf-8")
    content = scaling_methods.tables(Cluster())
    assert "| 1024 |" in content and insert_tables(text, content, "methods") == text
    scaling_methods.plot(Cluster(), tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 10_000
