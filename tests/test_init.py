"""Warm starts from files (--init), and runs that are continued with other options (--extend)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from mocofast import MoCo, cli
from mocofast.config import ConfigError
from mocofast.interop import to_reference_state_dict
from mocofast.interop.initial import initialise
from mocofast.interop.reference_checkpoints import load_any
from mocofast.models.encoders import TinyResNet
from mocofast.train.checkpoint import load_checkpoint

SHORT = ("--train.device", "cpu", "--data.workers", "0", "--knn.start", "false")


def pretrain(folder: Path, *options: str) -> int:
    words = ["pretrain", "digits", *SHORT, "--model.queue_size", "300", "--train.dir", str(folder)]
    return cli.main([*words, *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert pretrain(folder, "--train.max_steps", "3") == 0
    return folder


def test_a_new_run_starts_from_the_weights_of_another_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At rate 0 the weights stay. The queue has moved on.
    options = ("--init", str(run), "--optim.lr", "0", "--train.max_steps", "1")
    assert pretrain(tmp_path / "next", *options) == 0
    assert "taken" not in (out := capsys.readouterr().out)
    assert f"weights of {run}: encoder, head, momentum encoder, queue" in out
    old, new = (load_checkpoint(f)["model"] for f in (run, tmp_path / "next"))
    assert torch.equal(old["encoder_q.conv1.weight"], new["encoder_q.conv1.weight"])
    assert not torch.equal(old["encoder_q.conv1.weight"], old["encoder_k.conv1.weight"])
    changed = (old["queue"] != new["queue"]).any(1)
    assert 0 < int(changed.sum()) < len(changed)


def test_other_heads_queues_and_files_are_said(run: Path) -> None:
    torch.manual_seed(0)
    model = MoCo(TinyResNet, dim=7, queue_size=50)
    (line,) = initialise(model, str(run), "resnet_tiny")
    assert line.endswith("encoder, momentum encoder; new: head, queue")
    saved = load_checkpoint(run)["model"]
    for side in ("encoder_q", "encoder_k"):
        name = f"{side}.layer2.conv1.weight"
        assert torch.equal(model.state_dict()[name], saved[name])


@pytest.mark.parametrize(
    "beside", [{}, {"accuracy.total": torch.zeros(1)}], ids=["alone", "metric"]
)
@pytest.mark.parametrize("wrapper", ["model.", "method.module."])
def test_a_model_of_another_loop_gives_both_encoders_and_the_queue(
    wrapper: str, beside: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """mocofast.MoCo in a module of Lightning, whose queue is (K, C), also beside a metric."""
    torch.manual_seed(0)
    theirs, model = (MoCo(TinyResNet, dim=7, queue_size=50) for _ in range(2))
    with torch.no_grad():
        theirs.encoder_k.conv1.weight.normal_()
        theirs.queue_ptr.fill_(12)
    state = {wrapper + name: value for name, value in theirs.state_dict().items()}
    torch.save({"state_dict": state | beside}, tmp_path / "loop.ckpt")
    (line,) = initialise(model, str(tmp_path / "loop.ckpt"), "resnet_tiny")
    assert line.endswith("encoder, head, momentum encoder, queue")
    loaded = load_any(str(tmp_path / "loop.ckpt"))
    assert loaded.is_complete
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(loaded.method.state_dict()[name], value), name


@pytest.mark.parametrize(
    "prefix", ["momentum_backbone.", "encoder_k.module.0.", "target_encoder.net."]
)
def test_momentum_encoders_of_other_projects_are_taken(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    query, key = (torchvision.models.resnet18().state_dict() for _ in range(2))
    state = {f"backbone.{n}": v for n, v in query.items()} | {prefix + n: v for n, v in key.items()}
    torch.save({"state_dict": state}, tmp_path / "foreign.ckpt")
    model = MoCo(torchvision.models.resnet18, dim=16, queue_size=50)
    (line,) = initialise(model, str(tmp_path / "foreign.ckpt"), "resnet18")
    assert line.endswith("encoder, momentum encoder; new: head, queue")
    assert torch.equal(model.encoder_q.conv1.weight, query["conv1.weight"])
    assert torch.equal(model.encoder_k.conv1.weight, key["conv1.weight"])


def test_a_query_encoder_alone_starts_both_encoders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=16)
    path = tmp_path / "published.pth"
    state = {f"module.encoder_q.{n}": v for n, v in theirs.state_dict().items()}
    torch.save({"arch": "resnet18", "state_dict": state}, path)
    model = MoCo(torchvision.models.resnet18, dim=16, queue_size=50)
    (line,) = initialise(model, str(path), "resnet18")
    assert line.endswith("encoder, head; new: queue")
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.encoder_q.state_dict()[name], value)
        assert torch.equal(model.encoder_k.state_dict()[name], value)
    # A complete file gives the queue, too.
    other = MoCo(torchvision.models.resnet18, dim=16, queue_size=50)
    torch.save({"state_dict": to_reference_state_dict(other)}, path)
    assert "queue" in initialise(model, str(path), "resnet18")[0]
    assert torch.equal(model.queue, other.queue)


def test_files_of_other_encoders_are_refused_before_anything_changes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MoCo(torchvision.models.resnet18, dim=16, queue_size=50)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"--init .*: not the weights of resnet18") as error:
        initialise(model, str(run), "resnet18")
    assert len(str(error.value)) < 600
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert pretrain(tmp_path / "none", "--init", str(tmp_path / "no file")) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_finished_run_is_extended_by_epochs_at_another_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ("--train.epochs", "1", "--train.log_every", "5")
    assert pretrain(folder, *options) == 0
    steps = load_checkpoint(folder)["step"]
    further = ["pretrain", "--resume", str(folder), "--train.epochs", "2", "--optim.lr", "0.001"]
    assert cli.main(further) == 2
    assert "--extend continues with the new value" in capsys.readouterr().err
    assert cli.main([*further, "--extend"]) == 0
    saved = load_checkpoint(folder)
    assert (saved["step"], saved["epoch"]) == (2 * steps, 2)
    assert saved["config"]["optim"]["lr"] == 0.001
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line][-1] == 2 * steps
    # The length of the whole run, not of the extension.
    shorter = ["pretrain", "--resume", str(folder), "--extend", "--train.epochs", "1"]
    capsys.readouterr()
    assert cli.main(shorter) == 2
    assert "is in epoch 2 already" in (error := capsys.readouterr().err)
    assert "3 for 1 more" in error and load_checkpoint(folder)["config"]["train"]["epochs"] == 2
    # Options that cannot change the trajectory need no --extend. Others stay refused.
    free = ["--data.prefetch", "3", "--data.workers", "1", "--data.hw_decoder_load", "0.5"]
    free += ["--data.preallocate", "100,80"]
    assert cli.main(["pretrain", "--resume", str(folder), *free]) == 0
    assert cli.main([*further, "--extend", "--model.dim", "5"]) == 2
    capsys.readouterr()
    assert cli.main([*further, "--extend", "--optim.name", "adamw"]) == 2
    error = capsys.readouterr().err
    assert "optim.name: 'adamw', but the run to continue has 'sgd'" in error
    assert "--extend" not in error
    assert cli.main(["pretrain", "--resume", str(folder), "--init", str(folder)]) == 2
    assert "--init: starts a new run" in capsys.readouterr().err
    assert cli.main(["pretrain", "digits", "--extend"]) == 2


def photos(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{'ab'[number % 2]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)


def test_a_finished_run_continues_with_more_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "set", 24)
    folder, images = tmp_path / "run", ("--data.path", str(tmp_path / "set"))
    options = ("--data.source", "folder", "--data.holdout", "0", "--knn.every", "0")
    options += ("--data.batch_size", "8", "--train.epochs", "2", "--train.log_every", "1")
    assert pretrain(folder, *images, *options) == 0
    assert load_checkpoint(folder)["step"] == 6
    photos(tmp_path / "set", 40)
    further = ["pretrain", "--resume", str(folder), *images, "--train.epochs", "3"]
    assert cli.main([*further, "--optim.schedule", "constant"]) == 2
    capsys.readouterr()
    assert cli.main(["pretrain", "--resume", str(folder), *images]) == 2
    assert "--extend continues with as many images or more" in capsys.readouterr().err
    assert cli.main([*further, "--extend"]) == 0
    out = capsys.readouterr().out
    assert "40 images instead of 24: step 6 counts as step 10, of epochs of 5 steps" in out
    saved = load_checkpoint(folder)
    assert (saved["step"], saved["epoch"], saved["sizes"]["images"]) == (15, 3, 40)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 7), *range(11, 16)]
    # The same images again need no --extend. Fewer images would count backwards.
    for path in list((tmp_path / "set").rglob("*.png"))[:24]:
        path.unlink()
    assert cli.main([*further, "--extend", "--train.epochs", "4"]) == 2
    assert "has fewer steps than before; --init starts" in capsys.readouterr().err


def test_a_memory_bank_has_a_slot_for_every_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "set", 16)
    folder, images = tmp_path / "run", ("--data.path", str(tmp_path / "set"))
    options = ("--data.source", "folder", "--data.holdout", "0", "--knn.every", "0")
    options += ("--data.batch_size", "8", "--train.epochs", "1", "--model.method", "memory_bank")
    assert pretrain(folder, *images, *options, "--model.queue_size", "8") == 0
    photos(tmp_path / "set", 24)
    further = ["pretrain", "--resume", str(folder), *images, "--train.epochs", "2", "--extend"]
    assert cli.main(further) == 2
    assert "memory_bank holds" in capsys.readouterr().err
