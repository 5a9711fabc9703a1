"""Images and captions, from files to zero-shot accuracy: learns, continues exactly, is exported."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast import cli
from mocofast.config import DataConfig
from mocofast.data.sources import load_datasets
from tests import runs

pytest.importorskip("transformers")

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("a photo of a {}.", "the digit {}", "this is a {}, written by hand")


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: pairs.csv with captions of the training digits, and held-out digits in test/."""
    folder = tmp_path_factory.mktemp("digits")
    sets = load_datasets(DataConfig(source="digits"))
    assert sets.val is not None
    (folder / "images").mkdir()
    rows = [("file", "Caption")]
    for source, is_train in ((sets.train, True), (sets.val, False)):
        assert source.labels is not None
        for i, label in enumerate(source.labels.tolist()):
            name = f"images/{i}.png" if is_train else f"test/{WORDS[label]}/{i}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png(source.load(i)))
            if is_train:
                rows.append((name, FORMS[i % 3].format(WORDS[label])))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHORT = words(
    "--model.method clip --data.source list --model.text_width 32 --model.text_layers 1 "
    "--model.text_length 32 --model.dim 32 --optim.name adamw --optim.lr 0.002 "
    "--augment.jitter 0,0,0,0 --augment.rotate 0 --train.log_every 11 --data.workers 0 "
    "--train.epochs 8"
)
KINDS = {
    "softmax": words("--model.queue_size 0"),
    "queues": words("--model.queue_size 256 --model.momentum 0.9"),
    "sigmoid": words("--model.queue_size 0 --model.loss sigmoid --model.temperature 0.1"),
}


def mocofast(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = ("--data.path", str(digits / "pairs.csv"), *SHORT, *KINDS[request.param])
    mocofast("pretrain", "digits", *options, "--train.dir", folder)
    return folder, options


def test_captions_teach_the_names_of_classes(
    run: tuple[Path, tuple[str, ...]], digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    lines = [line for line in runs.metrics(folder) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "verdict: healthy" in (folder / "train.log").read_text()
    capsys.readouterr()
    mocofast("zeroshot", folder, "--data.path", digits / "test", "--templates", *FORMS)
    figures = json.loads((folder / "zeroshot" / "results.json").read_text())["figures"]
    assert figures["top1"] > 0.8  # guessing: 0.1
    # The classifier that predict reads gives the same classes.
    image = next((digits / "test" / "three").iterdir())
    capsys.readouterr()
    mocofast("predict", folder / "zeroshot", image, "--json", "--top", 10)
    best = json.loads(capsys.readouterr().out)["predictions"]
    assert sum(entry["score"] for entry in best) == pytest.approx(1, abs=1e-5)
    assert {entry["name"] for entry in best} == set(WORDS)


def test_a_stopped_and_continued_run_equals_one_never_stopped(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    whole, options = run
    parts = tmp_path / "parts"
    mocofast("pretrain", "digits", *options, "--train.dir", parts, "--train.max_steps", 38)
    mocofast("pretrain", "--resume", parts, "--train.max_steps", 0)
    runs.assert_same_run(parts, whole)
