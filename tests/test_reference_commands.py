"""Command lines of facebookresearch/moco and moco-v3: their equivalents, refusals, and runs."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mocofast import cli, settings
from mocofast.config import Config, ConfigError
from mocofast.evaluate.linear import LinearConfig
from mocofast.interop import reference_commands, reference_flags
from mocofast.interop.reference_checkpoints import load_pretrained
from mocofast.models.encoders import features
from mocofast.train.configure import configure
from tests import runs
from tests.timm_names import timms

ON_EIGHT_GPUS = (
    "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0"
)
# Commands of both READMEs and of moco-v3's CONFIG.md, and the recipes of the same figures.
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "v1": (f"-a resnet50 --lr 0.03 --batch-size 256 {ON_EIGHT_GPUS}", "moco_v1_r50", {}),
    "v2": (
        "-a resnet50 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos "
        f"{ON_EIGHT_GPUS}",
        "moco_v2_r50_200ep",
        {},
    ),
    "v2, 4 GPUs": (
        "--lr 0.015 --batch-size 128 --mlp --moco-t 0.2 --aug-plus --cos --epochs 800",
        "moco_v2_r50_800ep",
        {"optim.lr": 0.015, "data.batch_size": 128},
    ),
    "v3, 100 epochs": (
        "--moco-m-cos --crop-min=.2",
        "moco_v3_r50",
        {"train.epochs": 100, "optim.lr": 0.6},
    ),
    "v3, 300 epochs": ("--lr=.3 --epochs=300 --moco-m-cos --crop-min=.2", "moco_v3_r50", {}),
    "v3, 1000 epochs": (
        "--lr=.3 --wd=1.5e-6 --epochs=1000 --moco-m=0.996 --moco-m-cos --crop-min=.2",
        "moco_v3_r50",
        {"train.epochs": 1000, "optim.weight_decay": 1.5e-6, "model.momentum": 0.996},
    ),
    "v3, ViT-S": (
        "-a vit_small -b 1024 --optimizer=adamw --lr=1.5e-4 --weight-decay=.1 --epochs=300 "
        f"--warmup-epochs=40 --stop-grad-conv1 --moco-m-cos --moco-t=.2 {ON_EIGHT_GPUS}",
        "moco_v3_vit_s",
        {"data.batch_size": 1024},
    ),
    "v3, ViT-B": (
        "-a vit_base --optimizer=adamw --lr=1.5e-4 --weight-decay=.1 --epochs=300 "
        "--warmup-epochs=40 --stop-grad-conv1 --moco-m-cos --moco-t=.2",
        "moco_v3_vit_b",
        {},
    ),
}


def parsed(line: str, linear: bool = False) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    reference_flags.add_flags(parser, linear)
    return vars(parser.parse_args(shlex.split(line)))


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        runs.make_images(tmp_path / "imagenet" / part, 4)
    return tmp_path / "imagenet"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_are_the_recipes_of_their_figures(name: str, imagenet: Path) -> None:
    line, recipe, differences = PUBLISHED[name]
    equivalent = reference_commands.pretraining(parsed(f"{line} {imagenet}"))
    assert equivalent.recipe == recipe
    assert equivalent.options == {"data.path": str(imagenet), **differences}
    # The printed command gives the same configuration through the parser of the command line.
    words = shlex.split(equivalent.command())
    assert words[:3] == ["mocofast", "pretrain", recipe]
    options = dict(zip((word.removeprefix("--") for word in words[3::2]), words[4::2]))
    assert configure(recipe, "", options) == configure(recipe, "", equivalent.options)


def test_every_other_flag_has_its_option(imagenet: Path) -> None:
    line = (
        "-a resnet18 -j 3 --epochs 7 -b 64 --learning-rate 0.1 --schedule 2 4 --momentum 0.8 "
        "--weight-decay 0.01 -p 5 "
        "--seed 9 --moco-dim 32 --moco-k 640 --moco-m 0.99 --moco-t 0.3 --mlp"
    )
    equivalent = reference_commands.pretraining(parsed(f"{line} -- {imagenet}"))
    expected = Config()
    m, o = expected.model, expected.optim
    expected.data.path, expected.data.workers, expected.data.batch_size = str(imagenet), 3, 64
    m.arch, m.dim, m.queue_size, m.momentum, m.temperature, m.mlp = (
        "resnet18",
        32,
        640,
        0.99,
        0.3,
        True,
    )
    o.lr, o.milestones, o.momentum, o.weight_decay = 0.1, (2, 4), 0.8, 0.01
    expected.train.epochs, expected.train.log_every, expected.train.seed = 7, 5, 9
    got = configure(equivalent.recipe, "", equivalent.options)
    got.recipe = "custom"
    assert got == expected
    # -b is the batch of a node. Without a folder val/, all images are trained on.
    options = reference_commands.pretraining(
        parsed(f"--world-size 2 -b 64 {imagenet / 'train'}")
    ).options
    assert (options["data.batch_size"], options["data.holdout"]) == (128, 0.0)
    options = reference_commands.pretraining(parsed(f"--schedule -- {imagenet}")).options
    assert options["optim.milestones"] == ()
    assert (
        settings.coerce(
            next(s for s in settings.settings("optim", type(o)) if "miles" in s.name), ","
        )
        == ()
    )


def test_linear_protocols_of_both_projects() -> None:
    line = f"-a resnet50 --lr 30.0 --batch-size 256 --pretrained FILE {ON_EIGHT_GPUS} DIR"
    assert reference_commands.probing(parsed(line, linear=True), is_v3=False) == LinearConfig(
        "reference"
    )
    options = reference_commands.probing(
        parsed("-a vit_small --lr=3 --pretrained FILE DIR", linear=True), is_v3=True
    )
    assert options == LinearConfig(
        "reference", epochs=90, lr=12.0, batch_size=1024, schedule="cosine"
    )
    options = reference_commands.probing(
        parsed("--schedule 1 2 --epochs 3 --pretrained FILE DIR", linear=True), False
    )
    assert (options.milestones, options.epochs) == ((1, 2), 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--mlp --moco-m-cos", "--mlp of MoCo v1/v2's .* --moco-m-cos of MoCo v3's"),
        ("-a vit_small --cos --stop-grad-conv1", "--cos of .* --stop-grad-conv1, -a vit_small of"),
        ("-a vit_small --moco-m-cos", "expected --stop-grad-conv1"),
        ("-a vit_conv_small --stop-grad-conv1", "no ViTs with convolutional stems"),
        ("--start-epoch 3", "--start-epoch 3: expected 0 without --resume"),
        ("--gpu 99", r"--gpu 99: this machine has \d+ GPUs"),
    ],
)
def test_what_has_no_equivalent_is_refused_and_named(line: str, said: str, imagenet: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        reference_commands.pretraining(parsed(f"{line} {imagenet}"))


@pytest.mark.parametrize(
    ("line", "is_v3", "said"),
    [
        ("-e", False, "--evaluate: mocofast keeps no trained classifier"),
        ("--resume x", False, "--resume: a linear probe is not continued"),
        ("--wd 0.1", False, "--weight-decay 0.1: the protocol's is 0.0"),
        ("--schedule 3", True, "--schedule: a flag of MoCo v1/v2's"),
    ],
)
def test_linear_flags_without_an_equivalent_are_refused(line: str, is_v3: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reference_commands.probing(parsed(f"{line} -- DIR", linear=True), is_v3)


def test_several_nodes_are_refused_with_the_line_for_torchrun(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    given = parsed(
        "--moco-m-cos --crop-min=.2 --dist-url tcp://first:1234 --multiprocessing-distributed "
        f"--world-size 2 --rank 1 {imagenet}"
    )
    equivalent = reference_commands.pretraining(given)
    with pytest.raises(ConfigError) as error:
        reference_commands.processes(given, equivalent)
    assert str(error.value).splitlines()[-1].strip() == (
        "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 "
        f"--master-addr first --master-port 1234 -m {equivalent.command()}"
    )
    # A node with 8 GPUs starts 8 processes. Under torchrun, every process runs by itself.
    given["world_size"] = 1
    assert reference_commands.processes(given, equivalent)[0] == 8
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert reference_commands.processes(given, equivalent)[0] == 1
    for name, value in {"WORLD_SIZE": "16", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    given["world_size"] = 2
    assert reference_commands.processes(given, equivalent) == (
        1,
        "process 3 of 16, started by torchrun",
    )


def test_one_command_line_starts_all_gpus(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def execv(_: str, words: list[str]) -> None:
        called.append(words)
        raise SystemExit

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("os.execv", execv)
    argv = [*shlex.split(PUBLISHED["v2"][0]), str(imagenet)]
    with pytest.raises(SystemExit):
        cli.main(["main_moco", *argv])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert called == [[sys.executable, *launcher, "-m", "mocofast", "main_moco", *argv]]


def test_a_vit_of_moco_v3_loads_from_timms_names(tmp_path: Path) -> None:
    """The smallest ViT of moco-v3. A forward pass of an image depends on every weight."""
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224", num_heads=12).eval()
    for p in theirs.parameters():  # initial biases and norms (0 and 1) would hide a swap
        nn.init.normal_(p, std=0.05)
    state = {f"module.base_encoder.{name}": value for name, value in theirs.state_dict().items()}
    path = tmp_path / "vit.pth.tar"
    torch.save(
        {
            "epoch": 300,
            "arch": "vit_small",
            "state_dict": {**state, "module.predictor.0.weight": torch.ones(1)},
        },
        path,
    )
    model, config, ours = load_pretrained(str(path), "vit_small")
    assert (config.model.method, config.model.arch, ours) == ("moco_v3", "vit_small", False)
    encoder = model.encoder_q.eval()
    assert {
        timms(name) for name in encoder.state_dict() if not name.startswith("heads.")
    } <= theirs.state_dict().keys()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        # float32 sums in another order through 12 layers
        torch.testing.assert_close(
            features(encoder, image), theirs.forward_features(image)[:, 0], rtol=1e-3, atol=1e-4
        )
    with pytest.raises(ConfigError, match=r"-a vit_base: the encoder of .* is vit_small"):
        load_pretrained(str(path), "vit_base")
    del state["module.base_encoder.cls_token"]
    torch.save({"arch": "vit_small", "state_dict": state}, path)
    with pytest.raises(ConfigError, match=r"not the weights of vit_small: .* class_token"):
        load_pretrained(str(path), None)


def test_unchanged_lines_train_and_probe_both_kinds_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of 24 pixels, resized to 224, in batches of 4: the commands work together."""
    for part, count in (("train", 12), ("val", 4)):
        runs.make_images(tmp_path / "images" / part, count)
    monkeypatch.chdir(tmp_path)  # runs/ is written here
    line = "-a resnet18 -b 4 -j 0 --epochs 1 --moco-k 16 --mlp --moco-t 0.2 --aug-plus --cos -p 1"
    assert cli.main(["main_moco", *line.split(), *ON_EIGHT_GPUS.split(), "images"]) == 0
    out = capsys.readouterr().out
    assert "model:\n  arch: resnet18\n  queue_size: 16\n  temperature: 0.2\n  mlp: true\n" in out
    assert (
        "mocofast pretrain moco_v2_r50_200ep --model.arch resnet18 --model.queue_size 16 "
        "--data.path images" in out
    )
    assert "torchrun --nproc-per-node=GPUS -m mocofast main_moco" in out
    folder = tmp_path / "runs" / "moco_v2_r50_200ep"
    assert [line["step"] for line in runs.metrics(folder) if "loss" in line] == [1, 2, 3]
    assert (
        cli.main(
            ["main_moco", *line.split(), "--resume", str(folder), "--start-epoch", "1", "images"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "--start-epoch: the checkpoint of --resume says where to go on" in out
    assert "continuing at step 3, epoch 1 + 0 steps" in out
    assert (
        cli.main(["export", str(folder), "--format", "reference", "checkpoint_0000.pth.tar"]) == 0
    )
    capsys.readouterr()

    probe = "-a resnet18 --lr 1.0 -b 8 -j 0 --epochs 2 images --schedule 1 --pretrained"
    said = []
    for pretrained in (str(folder), "checkpoint_0000.pth.tar"):
        assert cli.main(["main_lincls", *probe.split(), pretrained]) == 0
        out = capsys.readouterr().out
        assert "linear:\n  protocol: reference\n  epochs: 2\n  lr: 1.0\n  batch_size: 8\n" in out
        said.append(re.findall(r"^linear_top\d [\d.]+$", out, re.MULTILINE))
    assert len(said[0]) == 2
    assert said[0] == said[1]  # the same encoder, under the same seed


def test_a_missing_or_foreign_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.make_images(tmp_path / "images", 4)
    torch.save({"state_dict": {"model.conv1": torch.ones(1)}}, tmp_path / "other.pt")
    for words, said in (
        ([], "--pretrained: expected a checkpoint"),
        (["--pretrained", str(tmp_path / "none.pt")], "no checkpoint at"),
        (
            ["--pretrained", str(tmp_path / "other.pt")],
            "expected the names of facebookresearch/moco",
        ),
    ):
        assert cli.main(["main_lincls", str(tmp_path / "images"), *words]) == 2
        assert said in capsys.readouterr().err
