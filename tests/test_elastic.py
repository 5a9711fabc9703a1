"""Batch, order of the images, queue and learning rate do not depend on the number of ranks."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mocofast_bench.processes import free_port, on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mocofast import distributed, settings
from mocofast.config import Config, ConfigError
from mocofast.device import choose_autocast
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.models import encoders
from mocofast.models.encoders import TinyResNet
from mocofast.shares import share
from mocofast.train import train
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.metrics import mean_window
from mocofast.train.step import train_step
from tests import runs


@pytest.mark.parametrize(
    ("total", "world_size", "parts"),
    [(10, 3, 1), (256, 3, 4), (256, 4, 4), (24, 1, 4), (7, 7, 1), (40, 2, 5)],
)
def test_every_image_belongs_to_one_rank(total: int, world_size: int, parts: int) -> None:
    shares = share(total, world_size, parts)
    rows = [shares.rows(rank) for rank in range(world_size)]
    assert shares.counts == tuple(map(len, rows))
    joined = np.concatenate(rows)
    assert sorted(joined) == list(range(total))
    places = shares.places()
    in_order = joined if places is None else joined[places]
    assert in_order.tolist() == list(range(total))
    assert sum(shares.weight(rank) for rank in range(world_size)) == pytest.approx(world_size)
    if parts > 1:  # image i is in part i % parts
        of_ranks = [set(each % parts) for each in rows]
        assert sum(map(len, of_ranks)) == parts
    for number in (1, 2, 3, 100):
        several = shares.micro_batches(number)
        assert [sum(each.counts[rank] for each in several) for rank in range(world_size)] == [
            *shares.counts
        ]
        assert all(min(each.counts) > 0 for each in several)


def test_batches_that_cannot_be_divided_are_refused() -> None:
    for arguments, said in (
        ((2, 3, 1), "data.batch_size: expected an image for every rank, got 2 images and 3 ranks"),
        ((10, 1, 4), "model.bn_splits: the 10 images of a batch .* 4 parts"),
        ((12, 4, 3), "model.bn_splits: .* got 3 parts and 4 ranks"),
    ):
        with pytest.raises(ConfigError, match=said):
            share(*arguments)


def test_sums_of_a_window_are_averaged_for_another_number_of_ranks() -> None:
    states = [{"sums": {"loss": each}, "steps": 3} for each in (1.0, 2.0, 6.0)]
    assert mean_window(states) == {"sums": {"loss": 3.0}, "steps": 3}


# ---- steps of the methods on 3 ranks, whose shares differ, and on 1 ----

IMAGES, STEPS = 22, 3
METHODS: dict[str, dict[str, Any]] = {
    "moco": {"model.queue_size": 30},  # PlainEncoder: no layer mixes images
    "moco of parts": {"model.queue_size": 30, "model.bn_splits": 11},
    "moco_v3": {"model.sync_bn": True},
    "simclr": {"model.sync_bn": True},
    "byol": {"model.sync_bn": True},
    "swav": {"model.sync_bn": True, "model.prototypes": 7},
    "memory_bank": {"model.sync_bn": True, "model.queue_size": 11},
    "examples.barlow_twins": {"model.sync_bn": True},
}
# A micro-batch of most methods has other images on 3 ranks. Parts of BatchNorm keep them together.
CASES = [*((case, 1) for case in METHODS), ("moco of parts", 2)]


def method_of(case: str) -> tuple[Method, int]:
    """Returns the method, and the parts of its batch."""
    config = settings.load_recipe("digits")
    settings.apply(config, {"model.method": case.split()[0], "model.dim": 6, **METHODS[case]})
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if case == "moco":
            patch.setattr(encoders, "TinyResNet", runs.PlainEncoder)
        method = build_method(config, images=50)
    # A ReLU near 0 would turn rounding into another gradient.
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.GELU())
    return method, getattr(config.model, "bn_splits", 1)


def trained(case: str, accumulate: int) -> dict[str, Tensor]:
    """Returns weights, memories and metrics after a few steps on this rank's shares."""
    rank, world_size = distributed.rank_and_world_size()
    method, parts = method_of(case)
    shares = share(IMAGES, world_size, parts)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    model: torch.nn.Module = method
    if world_size > 1:
        model = DistributedDataParallel(method, broadcast_buffers=False)
    rows, values = torch.from_numpy(shares.rows(rank)), []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        views = torch.randn(method.num_views, IMAGES, 3, 8, 8, generator=draw)
        index = torch.randperm(50, generator=draw)[:IMAGES]
        metrics = train_step(
            model,
            tuple(views[:, rows]),
            optimizer,
            accumulate,
            choose_autocast("fp32", torch.device("cpu")),
            {"index": index[rows]} if method.batch_fields else {},
            shares=shares,
        )
        values.append(metrics.values / world_size)
        if world_size > 1:
            torch.distributed.all_reduce(values[-1])
    kept = {name: value for name, value in method.state_dict().items() if "running" not in name}
    return {**kept, "metrics": torch.stack(values)}


def every_method(rank: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    return {case: trained(*case) for case in CASES}


@pytest.fixture(scope="module")
def three_ranks() -> list[dict[tuple[str, int], dict[str, Tensor]]]:
    return on_ranks(every_method, 3)


@pytest.mark.parametrize("case", CASES)
def test_uneven_shares_train_as_one_process_does(
    case: tuple[str, int], three_ranks: list[dict[tuple[str, int], dict[str, Tensor]]]
) -> None:
    expected, untrained = trained(*case), method_of(case[0])[0].state_dict()
    moved = [name for name in untrained if "running" not in name]
    assert any((expected[name] - untrained[name]).abs().max() > 1e-3 for name in moved)
    for found in three_ranks:
        for name, value in expected.items():
            torch.testing.assert_close(
                found[case][name],
                value,
                rtol=1e-3,
                atol=2e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# ---- a run on 4, 1, 3 and 2 ranks ----

RANKS = (4, 1, 3, 2)
EACH = 4  # steps


def run_of(folder: Path, parts: int) -> Config:
    config = settings.load_recipe("digits")
    options = {"train.device": "cpu", "data.workers": 0, "knn.start": False, "knn.every": 0}
    options |= {"train.log_every": 1, "train.epochs": 2, "data.batch_size": 100, "optim.lr": 0.02}
    options |= {"model.queue_size": 330, "model.bn_splits": parts, "train.dir": str(folder)}
    settings.apply(config, options)
    return config


def change_ranks(rank: int, folder: Path, ports: tuple[int, ...]) -> None:
    """Trains in turns on RANKS ranks."""
    distributed.barrier()
    distributed.shutdown()  # `train` joins the group of a turn
    for parts in (1, 4):
        if parts == 1:
            encoders.TinyResNet = runs.PlainEncoder  # type: ignore[assignment,misc]
        else:
            encoders.TinyResNet = TinyResNet
        config = run_of(folder / f"changing{parts}", parts)
        for turn, world_size in enumerate(RANKS):
            config.train.max_steps = EACH * (turn + 1)
            variables = {"WORLD_SIZE": world_size, "MASTER_PORT": ports[turn]}
            os.environ |= {name: str(value) for name, value in variables.items()}
            if rank < world_size:
                train(config, resume="auto")
            wait(folder / f"turn{parts}-{turn}", rank)
        if rank == 0:
            os.environ["WORLD_SIZE"] = "1"
            whole = run_of(folder / f"whole{parts}", parts)
            whole.train.max_steps = EACH * len(RANKS)
            train(whole)


def wait(barrier: Path, rank: int) -> None:
    """Waits for all 4 processes, which are in no group."""
    barrier.mkdir(exist_ok=True)
    (barrier / str(rank)).touch()
    deadline = time.monotonic() + 200
    while len(list(barrier.iterdir())) < max(RANKS) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def changed_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    ports = tuple(free_port() for _ in RANKS)
    on_ranks(partial(change_ranks, folder=folder, ports=ports), max(RANKS))
    return folder


@pytest.mark.parametrize("parts", [1, 4])
def test_a_run_does_not_depend_on_the_number_of_ranks(parts: int, changed_ranks: Path) -> None:
    """parts 1: an encoder without BatchNorm. parts 4: `model.bn_splits` pins its statistics."""
    whole, changing = (changed_ranks / f"{name}{parts}" for name in ("whole", "changing"))
    expected, got = (
        [line for line in runs.metrics(each) if "loss" in line] for each in (whole, changing)
    )
    assert [line["step"] for line in got] == list(range(1, EACH * len(RANKS) + 1))
    for ours, theirs in zip(got, expected):
        assert (ours["step"], ours["epoch"], ours["lr"]) == (
            theirs["step"],
            theirs["epoch"],
            theirs["lr"],
        )
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-4)
    one, other = (load_checkpoint(each) for each in (whole, changing))
    for name in ("step", "epoch", "step_in_epoch"):
        assert other[name] == one[name]
    # The data stream, and the random state of the shuffle, which no number of ranks changes.
    if parts > 1:
        assert torch.equal(other["method_random_state"], one["method_random_state"])
    assert torch.equal(other["model"]["queue_ptr"], one["model"]["queue_ptr"])
    for name, value in one["model"].items():
        if "running" not in name:
            torch.testing.assert_close(
                other["model"][name], value, rtol=1e-2, atol=2e-3, msg=lambda t, n=name: f"{n}: {t}"
            )
