"""Larger steps from some epoch on (data.batch_sizes), and every schedule in every method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast import cli
from mocofast.config import METHODS, DataConfig
from mocofast.data.interface import BatchSlice
from mocofast.train.pace import Pace
from tests.runs import assert_same_run, metrics, weights

SHORT = "digits --knn.start false --train.log_every 1 --checkpoint.every_epochs 1"
# Views, tokens, rate and batches follow schedules.
SCHEDULES = (
    "--model.arch vit_micro_cifar --augment.size 12 --augment.sizes 0:8,1:12 --model.dim 16 "
    "--augment.crop_scales 0:0.6:1,1:0.3:0.9 --model.token_dropout 0.4 --optim.schedule wsd "
    "--train.epochs 3 --knn.every 1"
)
BATCHES = "--data.batch_size 256 --data.batch_sizes 0:256,1:512 --knn.patience 9"
PROJECTOR = f"{BATCHES} --model.hidden_dim 32"
OF_METHOD = {
    "moco": f"{BATCHES} --model.queue_warmup 2 --model.queue_size 512",
    "moco_v3": PROJECTOR,
    "byol": PROJECTOR,
    "simclr": PROJECTOR,
    "memory_bank": f"{BATCHES} --model.queue_size 64",
    "swav": f"{PROJECTOR} --model.prototypes 8 --model.freeze_prototypes 2",
    "supervised": BATCHES,
    "clip": "--data.batch_size 8 --data.batch_sizes 0:8,1:16 --data.workers 0 "
    "--augment.jitter 0,0,0,0 --augment.rotate 0 --model.text_width 16 --model.text_layers 1 "
    "--model.text_length 16 --model.queue_size 0",
}


def pretrain(folder: Path, *options: str) -> Path:
    """Runs `mocofast pretrain digits` in `folder` and returns the folder."""
    words = [word for option in options for word in option.split()]
    assert cli.main(["pretrain", *SHORT.split(), "--train.dir", str(folder), *words]) == 0
    return folder


def test_steps_of_joined_batches_are_counted() -> None:
    """Five batches an epoch: 5 steps, then 3 (2, 2, 1 batches), then 2 (3 and 2)."""
    pace = Pace(DataConfig(batch_size=8, batch_sizes=("0:8", "1:16", "3:24")), 5)
    assert [pace.steps(epoch) for epoch in range(5)] == [5, 3, 3, 2, 2]
    assert [pace.before(epoch) for epoch in range(6)] == [0, 5, 8, 11, 13, 15]
    places = [(epoch, step) for epoch in range(5) for step in range(pace.steps(epoch))]
    assert [pace.place(step) for step in range(15)] == places
    assert [pace.seen(*place) for place in places[5:]] == [5, 7, 9, 10, 12, 14, 15, 18, 20, 23]
    totals = [pace.shares(BatchSlice(8, 0, 2, uneven=True), 43, 1, s).counts for s in range(3)]
    assert totals == [(8, 8), (8, 8), (4, 4)]


def test_a_joined_step_is_a_step_of_a_large_batch(tmp_path: Path) -> None:
    """Batches are parts of one order, so two of 256 images are one of 512."""
    options = "--optim.schedule wsd --train.max_steps 2 --train.epochs 2 --data.batch_size"
    joined = pretrain(tmp_path / "joined", f"{options} 256 --data.batch_sizes 0:512")
    large = pretrain(tmp_path / "large", f"{options} 512")
    ours, expected = weights(joined), weights(large)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert [line["epoch"] for line in metrics(joined)] == pytest.approx([0.4, 0.8])


@pytest.fixture
def captions(tmp_path: Path) -> str:
    """Options of 40 noise images with captions."""
    rng, rows = np.random.default_rng(0), ["file,caption"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,word {i % 4}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    return f"--data.source list --data.path {tmp_path / 'pairs.csv'}"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_follows_all_schedules_and_resumes_exactly(
    method: str, captions: str, tmp_path: Path
) -> None:
    options = f"--model.method {method} {SCHEDULES} {OF_METHOD[method]}"
    if method == "clip":
        options += f" {captions}"
    planned = f"{options} --optim.cooldown_epochs 1"
    whole = pretrain(tmp_path / "whole", planned)
    parts = tmp_path / "parts"
    for last_step in (2, 6, 0):  # after a step of one batch, of two, and to the end
        pretrain(parts, planned, f"--resume auto --train.max_steps {last_step}")
    assert_same_run(parts, whole)
    # The branch of a trunk is the run that knew its length from the start.
    trunk = pretrain(tmp_path / "trunk", options, "--checkpoint.keep 9")
    saved = sorted((trunk / "checkpoints").glob("step_*.pt"))[1]
    assert cli.main(["pretrain", "--resume", str(saved), "--cooldown", "1"]) == 0
    branch = metrics(tmp_path / "trunk-epoch2-cooldown1")
    assert branch == [line for line in metrics(whole) if line["step"] > int(saved.stem[5:])]
    assert sum("loss" in line for line in branch) > 1
