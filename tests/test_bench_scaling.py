"""Bytes exchanged between ranks in a step: counters of sockets beside the model.

4 and 2 real gloo processes train the same model twice, with our step and with the reference's
step. The losses on the same images are equal.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mocofast_bench import scaling_model, weak_scaling
from mocofast_bench.processes import on_ranks
from mocofast_bench.reference_loop import ReferenceMoCo, plain_sgd, reference_step
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mocofast import MoCo
from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.models.encoders import TinyResNet
from mocofast.optim.build import build_optimizer
from mocofast.settings import load_recipe
from mocofast.train.step import train_step
from tests.wire import Collective, Wire

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="reads Linux's socket counters"
)

WORLDS = (4, 2)
# An image has 12 kB: headers of messages, some 50 bytes, hardly matter.
BATCH, SIDE, DIM, QUEUE = 8, 64, 16, 64
WARM_UP_STEPS, STEPS = 3, 2  # DistributedDataParallel rebuilds the buckets in the second step
OPTIM = OptimConfig(lr=0.01)
# Bytes of headers, acknowledgements and barriers, and their share of the payload.
HEADERS, SHARE = 3000, 0.01


def views(world: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (WARM_UP_STEPS + STEPS, 2, world, BATCH, 3, SIDE, SIDE)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)[:, :, rank]
    return [(im_q, im_k) for im_q, im_k in pixels]


def ours(model: MoCo, world: int, rank: int) -> dict[str, Any]:
    trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = build_optimizer(model.parameters(), OPTIM)
    autocast = choose_autocast("fp32", torch.device("cpu"))
    losses, collectives, arrived = [], [], []
    for i, pair in enumerate(views(world, rank)):
        if i < WARM_UP_STEPS:
            losses.append(float(train_step(trained, pair, optimizer, 1, autocast).loss))
            continue
        state = model.shuffle.state()
        assert state is not None
        generator = torch.Generator()
        generator.set_state(state)
        origins = (
            torch.randperm(world * BATCH, generator=generator).view(world, BATCH)[rank] // BATCH
        )
        arrived.append(int((origins != rank).sum()))  # images that come from other ranks
        with Wire() as wire:
            losses.append(float(train_step(trained, pair, optimizer, 1, autocast).loss))
        collectives.append(wire.collectives)
    return {"losses": losses, "collectives": collectives, "arrived": arrived}


def reference(model: ReferenceMoCo, world: int, rank: int) -> dict[str, Any]:
    trained = DistributedDataParallel(model)
    optimizer = plain_sgd(model.parameters(), OPTIM)
    losses, collectives = [], []
    for i, pair in enumerate(views(world, rank)):
        im_q, im_k = ((im.float() - 127) / 50 for im in pair)
        if i < WARM_UP_STEPS:
            losses.append(reference_step(trained, (im_q, im_k), optimizer))
            continue
        with Wire() as wire:
            losses.append(reference_step(trained, (im_q, im_k), optimizer))
        collectives.append(wire.collectives)
    return {"losses": losses, "collectives": collectives}


def on_a_rank(world: int, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = MoCo(TinyResNet, DIM, QUEUE, pixel_mean=[127.0] * 3, pixel_std=[50.0] * 3)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = ReferenceMoCo(model)
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    found: dict[str, Any] = {
        "step": scaling_model.Workload(
            ranks=world,
            batch=BATCH,
            pixels=3 * SIDE**2,
            dim=DIM,
            parameters=sum(p.numel() for p in model.encoder_q.parameters()),
            buffers=sum(b.numel() * b.element_size() for b in plain.buffers()),
        )
    }
    for name, run, trained in (("mocofast", ours, model), ("reference", reference, plain)):
        torch.manual_seed(7 + rank)  # rank 0 makes the permutations, on both sides
        found[name] = run(trained, world, rank)  # type: ignore[operator]
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {world: on_ranks(partial(on_a_rank, world), world) for world in WORLDS}


def assert_close(measured: float, payload: float) -> None:
    assert payload - HEADERS / 10 <= measured <= payload * (1 + SHARE) + HEADERS, (
        f"{measured}, not {payload}"
    )


@pytest.mark.parametrize("world", WORLDS)
def test_both_sides_train_the_same_model(
    ranks: dict[int, list[dict[str, Any]]], world: int
) -> None:
    for rank in ranks[world]:
        assert rank["mocofast"]["losses"] == pytest.approx(rank["reference"]["losses"], rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_our_steady_step_exchanges_images_once_keys_once_and_gradients(
    ranks: dict[int, list[dict[str, Any]]], world: int
) -> None:
    for rank in ranks[world]:
        step: scaling_model.Workload = rank["step"]
        model = scaling_model.received_bytes(step)["mocofast"]
        for collectives, arrived in zip(
            rank["mocofast"]["collectives"], rank["mocofast"]["arrived"]
        ):
            images, keys, gradients = collectives
            assert (images.name, images.dtype) == ("alltoall_base_", torch.uint8)
            assert (keys.name, keys.dtype) == ("_allgather_base_", torch.float32)
            assert gradients.name == "allreduce_"
            # Images that this permutation moves between ranks. The model has the mean.
            for measured in (images.sent, images.received):
                assert_close(measured, arrived * step.pixels)
            for collective, purpose in ((keys, "keys"), (gradients, "gradients")):
                for measured in (collective.sent, collective.received):
                    assert_close(measured, model[purpose])


def purposes(collectives: list[Collective]) -> dict[str, list[Collective]]:
    """The reference's collectives of a step, told apart by operator, type and order."""
    gathers = [c for c in collectives if c.name == "allgather_"]
    broadcasts = [c for c in collectives if c.name == "broadcast_"]
    after_images = collectives.index(gathers[0])
    return {
        "images": gathers[:1],
        "keys": gathers[1:],
        "buffers": [c for c in broadcasts if collectives.index(c) < after_images],
        "permutation": [c for c in broadcasts if collectives.index(c) > after_images],
        "gradients": [c for c in collectives if c.name == "allreduce_"],
    }


@pytest.mark.parametrize("world", WORLDS)
def test_the_references_step_has_three_gathers_and_broadcasts_all_buffers(
    ranks: dict[int, list[dict[str, Any]]], world: int
) -> None:
    for number, rank in enumerate(ranks[world]):
        model = scaling_model.received_bytes(rank["step"])["reference"]
        for collectives in rank["reference"]["collectives"]:
            found = purposes(collectives)
            assert sum(map(len, found.values())) == len(collectives)
            assert (len(found["images"]), len(found["keys"])) == (1, 2)
            assert found["images"][0].dtype == torch.float32
            for purpose, parts in found.items():
                received = sum(c.received for c in parts)
                if purpose in ("buffers", "permutation") and number == 0:
                    assert received < HEADERS  # rank 0 sends them
                else:
                    assert_close(received, model[purpose])


@pytest.mark.parametrize("world", WORLDS)
def test_shuffle_receives_ranks_times_fewer_images_and_a_quarter_of_the_bytes_of_each(
    ranks: dict[int, list[dict[str, Any]]], world: int
) -> None:
    step: scaling_model.Workload = ranks[world][0]["step"]
    model = scaling_model.received_bytes(step)
    assert model["reference"]["images"] / model["mocofast"]["images"] == pytest.approx(4 * world)
    ours = sum(c[0].received for rank in ranks[world] for c in rank["mocofast"]["collectives"])
    arrived = sum(n for rank in ranks[world] for n in rank["mocofast"]["arrived"])
    theirs = sum(
        purposes(c)["images"][0].received
        for rank in ranks[world]
        for c in rank["reference"]["collectives"]
    )
    # Few permutations differ from the mean: our bytes are scaled to the mean.
    mean = world * STEPS * BATCH * (world - 1) / world
    assert theirs / (ours * mean / arrived) == pytest.approx(4 * world, rel=0.03)


@pytest.mark.parametrize("world", [2, 4, 7])
def test_on_average_one_image_in_w_stays_at_home(world: int) -> None:
    """`received_bytes` agrees with 2,000 permutations (4 standard errors are below 2%)."""
    generator = torch.Generator().manual_seed(0)
    home = torch.arange(world).repeat_interleave(BATCH)
    crossed = [
        int((home[torch.randperm(world * BATCH, generator=generator)] != home).sum())
        for _ in range(2000)
    ]
    step = scaling_model.Workload(world, BATCH, pixels=10, dim=1, parameters=0, buffers=0)
    assert 10 * sum(crossed) / len(crossed) / world == pytest.approx(
        scaling_model.received_bytes(step)["mocofast"]["images"], rel=0.02
    )


def test_weak_scaling_times_both_sides_over_real_processes() -> None:
    config = load_recipe("digits")
    config.data.batch_size, config.model.queue_size = 4, 16
    found = weak_scaling.measure(2, config, repeats=1, steps=2)
    assert set(found) == {"mocofast", "reference"}
    for values in found.values():
        # 2 ranks cannot use more CPU time than 2 x the elapsed time.
        passed = 1e3 / values["images_per_second"]
        assert 0 < values["cpu_milliseconds_per_image"] <= 2 * passed * 1.05


# ---- the model of times ----

FREE = scaling_model.Cluster(latency=0.0, message=0.0)  # bandwidth alone


def test_times_of_collectives_are_bytes_over_the_links_they_cross() -> None:
    inside, network, size = FREE.inside, FREE.network, 1e9
    assert FREE.all_gather(8, size) == pytest.approx(7 * size / inside)
    assert FREE.all_gather(16, size) == pytest.approx(size / network + 14 * size / inside)
    assert FREE.all_to_all(16, size, 15) == pytest.approx(
        size * (8 / 16 / network + 7 / 16 / inside)
    )
    assert FREE.all_reduce(8, size) == pytest.approx(2 * 7 / 8 * size / inside)
    assert FREE.all_reduce(32, size) == pytest.approx(
        2 * 7 / 8 * size / inside + 2 * 3 / 4 * size / 8 / network
    )
    assert FREE.broadcast(8, size) == pytest.approx(size / inside)
    with_latency = replace(FREE, latency=1.0, message=0.25)
    assert with_latency.all_gather(64, 0.0) == pytest.approx(6)
    assert with_latency.all_to_all(64, 0.0, 32) == pytest.approx(9)


def test_gradients_hide_behind_backward_up_to_the_last_bucket() -> None:
    step = scaling_model.Workload(
        64, 256, pixels=3 * 224**2, dim=128, parameters=28_000_000, buffers=0
    )
    whole = FREE.all_reduce(64, 4 * step.parameters)
    slow, instant = replace(FREE, images_per_second=1.0), replace(FREE, images_per_second=1e12)
    assert scaling_model.exposed_seconds(step, slow)["mocofast"]["gradients"] == pytest.approx(
        whole * 25 / 112
    )
    assert scaling_model.exposed_seconds(step, instant)["mocofast"]["gradients"] == pytest.approx(
        whole, rel=1e-3
    )


def test_the_document_holds_what_the_script_computes() -> None:
    text = (scaling_model.DOCS / "scaling.md").read_text("utf-8")
    content = scaling_model.tables(scaling_model.moco_v2(), scaling_model.Cluster())
    assert "| 1024 |" in content and content in text
    assert scaling_model.insert_tables(text, content) == text, (
        "run python -m mocofast_bench.scaling_model"
    )


def test_the_scaling_model_says_where_it_can_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_model, "DOCS", tmp_path / "docs")  # as in an installed wheel
    assert scaling_model.main() == 1
    assert "run this command in a checkout" in capsys.readouterr().err


def test_the_figure_is_plotted(tmp_path: Path) -> None:
    step = scaling_model.Workload(
        8, 32, pixels=3 * 224**2, dim=128, parameters=28_000_000, buffers=34_000_000
    )
    scaling_model.plot(step, scaling_model.Cluster(), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
