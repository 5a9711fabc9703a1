"""Every command of README, documentation and help runs, on small images.

A run that would train copies a small run into its folder: what a command trains, other tests train.
All else is real: words, recipes and options, files to read, and files to write.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mocofast import cli, front, study
from mocofast.config import Config
from mocofast.detection import launch as detection
from mocofast.train import run
from mocofast.train.result import Result
from mocofast.train.run_folder import choose_folder
from tests import runs

PAGES = [runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^( *)```(?:console|bash|sh)?\n(.*?)^\1```|((?:^    .*\n)+)", re.M | re.S)
COMMAND = re.compile(r"^ *(?:\$ )?(?:mocofast|(?:torchrun .*|python )-m mocofast) (.*)$", re.M)


def commands_of(page: Path) -> Iterator[list[str]]:
    """Yields the words after `mocofast` of the commands in the blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        lines = re.sub(r" *\\\n *", " ", block[2] or block[3] or "")
        for words in COMMAND.findall(lines):
            if "--network" not in words:  # between ranks: test_two_hosts.py
                yield shlex.split(words, comments=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a run, a run on captions, and files of other projects."""
    place = tmp_path_factory.mktemp("small")
    photos = runs.make_images(place / "PHOTOS", 40)
    names = [path.relative_to(place) for path in sorted(photos.glob("*/*.jpg"))]
    (place / "PAIRS.csv").write_text(
        "path,caption\n" + "".join(f"{name},a photo of {name.parent.name}\n" for name in names)
    )
    tiny = ("--augment.size", "16", "--data.batch_size", "8", "--train.max_steps", "1")
    tiny = (*tiny, "--data.workers", "0", "--model.dim", "16", "--model.queue_size", "8")
    words = ("pretrain", "digits", "--data.source", "folder", "--data.path", str(photos))
    runs.mocofast(*words, *tiny, "--model.arch", "resnet18", "--train.dir", str(place / "run"))
    words = ("pretrain", "digits", "--data.source", "list", "--data.path", str(place / "PAIRS.csv"))
    clip = ("--model.method", "clip", "--model.text_width", "16", "--model.text_layers", "1")
    runs.mocofast(*words, *tiny, *clip, "--train.dir", str(place / "clip"))
    for name, layout in (
        ("moco_v2_800ep_pretrain.pth.tar", "reference"),
        ("dino.pth", "torchvision"),
    ):
        runs.mocofast("export", str(place / "run"), "--format", layout, str(place / name))
    return place


def copy(run: Path, folder: Path) -> None:
    """Copies a run folder by links: its checkpoints have many megabytes."""
    shutil.copytree(run, folder, copy_function=os.link)


@pytest.fixture
def stage(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lays out the names of the documentation in the working folder, and replaces training."""
    shutil.copytree(small / "PHOTOS", tmp_path / "PHOTOS")
    for name in ("LABELLED", "VOC", "SCENES", "tiles"):
        (tmp_path / name).symlink_to("PHOTOS")
    for part in ("train", "test"):
        for index, name in enumerate(("ship", "dog")):
            shutil.copytree(small / f"PHOTOS/class{index}", tmp_path / "CIFAR" / part / name)
    for name in ("photo.jpg", "IMAGE", "more/one.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(small / "PHOTOS/class0/0000.jpg", tmp_path / name)
    for name in ("PAIRS.csv", "moco_v2_800ep_pretrain.pth.tar", "dino.pth"):
        os.link(small / name, tmp_path / name)
    (tmp_path / "NAMES.csv").write_text("class0,cat\nclass1,dog\n")
    (tmp_path / "TEMPLATES.txt").write_text("a photo of a {}.\n")
    (tmp_path / "trials.yaml").write_text("- optim.lr: 0.1\n- optim.lr: 0.2\n")
    for name in ("RECIPE", "digits", "digits-2", "detect/pretrained", "detect/scratch"):
        copy(small / "run", tmp_path / "runs" / name)
    for name in ("RUN", "clip", "runs/clip_r50"):
        copy(small / "clip", tmp_path / name)
    (tmp_path / "package").mkdir()
    shutil.copy(runs.ROOT / "examples/barlow_twins.py", tmp_path / "package/my_moco.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def train(config: Config, *_: Any, **__: Any) -> Result:
        folder = choose_folder(config, False)
        if not folder.exists():  # two commands may name one folder
            copy(small / "run", folder)
        return Result(folder, 1, False, {}, {})

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr("mocofast.interop.reference_commands.train", train)
    monkeypatch.setattr(detection, "_start_or_continue", lambda *_: None)
    monkeypatch.setattr(detection, "_status", lambda _: 0)
    monkeypatch.setattr(detection, "_side_by_side", lambda *_: 0)

    def four_class(data: str, out: Path, *_: Any) -> None:
        out.mkdir(parents=True)
        (out / "table.md").touch()

    monkeypatch.setattr(study, "four_class", four_class)
    yield tmp_path
    shutil.rmtree(tmp_path)  # classifiers of megabytes each


def parse_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what a benchmark does."""
    parse = argparse.ArgumentParser.parse_args

    def replaced(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
        given = parse(parser, words)
        given.run = lambda _: None
        return given

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", replaced)


# At the default rate a step on two images of 16 pixels may end in NaN: BatchNorm has two values.
SHORTER = {"finetune": ["--finetune.epochs", "1", "--finetune.lr", "1e-4"], "launch": ["--dry-run"]}


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command, which must succeed."""
    with monkeypatch.context() as patch:
        if words[0] == "bench":
            parse_alone(patch)
        try:
            status = cli.main([*words, *SHORTER.get(words[0], [])])
        except SystemExit as end:  # argparse refuses the words
            status = end.code  # type: ignore[assignment]
    assert status == 0, words


@pytest.mark.parametrize(
    "page",
    # test_docs.py runs the tutorial, with all its training.
    [page for page in PAGES if page.stem not in ("tutorial", "log") and [*commands_of(page)]],
    ids=lambda page: page.stem,
)
def test_the_commands_of_a_page_run(
    stage: Path, monkeypatch: pytest.MonkeyPatch, page: Path
) -> None:
    for words in commands_of(page):
        check(words, monkeypatch)


def test_the_examples_of_the_help_run(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [re.split("   +", line)[0] for line in front.EXAMPLES]
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        shown = re.search(r"^examples:\n((?:  .*\n)+)", capsys.readouterr().out, re.M)
        if shown and name != "pretrain":
            examples += shown[1].splitlines()
    assert len(examples) > 15
    for example in examples:
        check(shlex.split(example)[1:], monkeypatch)
