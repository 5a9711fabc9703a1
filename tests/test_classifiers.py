"""Commands that evaluate an encoder, save a classifier, and use it; sweeps and comparisons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mocofast import cli
from mocofast.config import ConfigError
from mocofast.data.arrays import ArraySource
from mocofast.data.interface import Source
from mocofast.errors import NothingDecodedError
from mocofast.evaluate import ranks as evaluation_ranks
from mocofast.interop.classifiers import FILE, load_classifier
from tests import runs
from tests.test_cli import call

DIGITS = ("--train.max_steps", "2", "--knn.every", "0", "--knn.start", "false")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on small JPEG files of two classes, train/ and val/ by hold-out."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    images = runs.make_images(tmp_path_factory.mktemp("images"), 60)
    status = cli.main(
        [
            *("pretrain", "digits", "--data.source", "folder", "--data.path", str(images)),
            *("--data.workers", "0", "--data.batch_size", "16", "--train.dir", str(folder)),
            *("--augment.size", "16", "--data.holdout", "0.3", *DIGITS),
        ]
    )
    assert status == 0
    return folder


def values_of(out: str) -> dict[str, float]:
    return {k: float(v) for k, v in re.findall(r"^(\w+) ([\d.e-]+)$", out, re.MULTILINE)}


@pytest.mark.parametrize("command", ["linear", "finetune", "knn"])
def test_a_command_saves_a_classifier_whose_accuracy_it_printed(
    run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    own = {
        "linear": (),
        "knn": ("--knn.k", "5"),
        "finetune": ("--finetune.epochs", "3", "--finetune.batch_size", "16"),
    }[command]
    status, out, err = call(capsys, command, str(run), *own)
    assert status == 0, err
    folder = run / command
    results = json.loads((folder / "results.json").read_text())
    figures = results["figures"]
    assert values_of(out)[f"{command}_top1"] == pytest.approx(figures["top1"], abs=1e-4)
    low, high = figures["intervals"]["top1"]
    assert low <= figures["top1"] <= high
    counts = np.array(figures["confusion"])
    assert counts.sum() == figures["images"] == 18
    assert counts.diagonal().sum() / 18 == pytest.approx(figures["top1"])
    assert Image.open(folder / "confusion.png").size[0] > 300
    rows = (folder / "per_class.csv").read_text().splitlines()
    assert rows[0] == "name,precision,recall,f1,images"
    assert len(rows) == 3
    # The file alone classifies the held-out images as well.
    classifier = load_classifier(folder / FILE)
    assert classifier.targets.names == ("class0", "class1")
    status, out, err = call(capsys, "predict", str(folder), str(images_of(run)), "--json")
    assert (status, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    right = [row["predictions"][0]["name"] in row["image"] for row in found]
    assert len(right) == 60
    assert np.mean(right) >= figures["top1"] - 0.35
    for row in found:
        assert sum(entry["score"] for entry in row["predictions"]) == pytest.approx(1, abs=1e-3)


def images_of(run: Path) -> Path:
    text = (run / "config.yaml").read_text()
    return Path(re.search(r"^  path: (.+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    file = run / "config.yaml"
    below = f"{file / 'a'} cannot be a folder: {file} is a file"
    export = ("export", str(run), "--format", "torchvision", str(file / "a/b.pt"))
    for words, said in (
        (("linear", str(run), "--dir", str(file / "a")), f"--dir: {below}"),
        (export, f"out: {below}"),
        (("linear", str(run)), f"--dir: {run / 'linear'} cannot be written"),
        (("knn", str(run), "--dir", str(tmp_path / "a/b")), "--dir: "),
        (("embed", str(run), str(images_of(run)), str(tmp_path / "f.npz")), "OUT: "),
    ):
        status, out, err = call(capsys, *words)
        assert (status, out) == (2, "") and said in err, err


def test_predict_without_a_classifier_shows_neighbours(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = next(images_of(run).rglob("*.jpg"))
    (tmp_path / "bad.jpg").write_text("no image")
    checkpoint = run / "checkpoints" / "last.pt"
    named = [str(tmp_path / "none.jpg"), str(image), str(tmp_path / "bad.jpg")]
    status, out, err = call(capsys, "predict", str(checkpoint), *named, "--json")
    assert status == 1
    assert f"predict: {named[0]}: there is no such image\n" in err
    assert "bad.jpg: " in err
    row = json.loads(out)
    assert len(row["neighbours"]) == 5
    similar = [near["similarity"] for near in row["neighbours"]]
    assert similar == sorted(similar, reverse=True)
    assert max(similar) <= 1.0001
    assert {near["label"] for near in row["neighbours"]} <= {"class0", "class1"}
    assert sum(entry["score"] for entry in row["predictions"]) == pytest.approx(1, abs=1e-5)
    assert call(capsys, "predict", str(run), "/nowhere.jpg")[0] == 2
    assert call(capsys, "predict", str(run), str(image), "--top", "0")[0] == 2


def test_both_files_of_embed_hold_the_encoders_features(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(images_of(run))
    folder = tmp_path / "new/folder"
    for name in ("out.npz", "out.parquet"):
        status, out, err = call(capsys, "embed", str(run), path, str(folder / name))
        assert status == 0, err
        assert "60 features of dimension 64" in out
    found = np.load(folder / "out.npz")
    assert found["features"].shape == (60, 64)
    assert found["features"].dtype == np.float32
    for name, label in zip(found["names"], found["labels"]):
        assert found["classes"][label] in name
    parquet = pytest.importorskip("pyarrow.parquet").read_table(folder / "out.parquet")
    assert parquet["name"].to_pylist() == found["names"].tolist()
    assert parquet["label"].to_pylist() == found["classes"][found["labels"]].tolist()
    features = np.array(parquet["feature"].to_pylist(), dtype=np.float32)
    assert np.array_equal(features, found["features"])
    # Independently: the first image through the encoder of the checkpoint.
    from mocofast.data.evaluation import center_view
    from mocofast.interop.reference_checkpoints import load_any
    from mocofast.models.encoders import features as features_of
    from mocofast.models.pixels import pixel_statistics, prepare_images

    loaded = load_any(str(run))
    pixels = center_view(Image.open(Path(path) / found["names"][0]).convert("RGB"), 16)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
    with torch.no_grad():
        prepared = prepare_images(image, *pixel_statistics(loaded.config.augment))
        expected: Tensor = features_of(loaded.method.encoder_q.eval(), prepared)
    np.testing.assert_allclose(found["features"][:1], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert call(capsys, "embed", str(run), path, str(tmp_path / "out.csv"))[0] == 2


def test_a_damaged_classifier_is_an_error(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save({"format": "mocofast classifier", "config": {}}, tmp_path / FILE)
    status, _, err = call(capsys, "predict", str(tmp_path), "x.jpg")
    assert status == 2
    assert "not a whole classifier" in err


def test_two_ranks_give_the_figures_of_one(run: Path, tmp_path: Path) -> None:
    """Over the commands: gradients, BatchNorm, features and scores of both ranks together."""
    commands = {
        "linear": (
            *("--linear.protocol", "reference", "--linear.epochs", "2", "--linear.lr", "0.5"),
            *(
                "--linear.batch_size",
                "38",
                "--linear.bootstrap",
                "0",
            ),  # the last batch has 4 images
            *("--data.labels", "0.98"),  # 41 images: one rank has one image more
        ),
        "finetune": (
            *("--finetune.epochs", "2", "--finetune.batch_size", "16"),
            *("--finetune.bootstrap", "0", "--data.labels", "0.9"),
        ),
    }
    for command, options in commands.items():
        weights = []
        for ranks in (1, 2):
            folder = tmp_path / f"{command}{ranks}"
            arguments = (command, str(run), *options, "--dir", str(folder), "--device", "cpu")
            if ranks == 1:
                assert cli.main(arguments) == 0
            else:
                out = runs.torchrun(2, *arguments).stdout
                assert out.count(f"{command}_top1") == 1
            content = torch.load(folder / FILE, weights_only=True)
            weights.append(content["encoder"])
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_sweep_of_short_runs_shows_the_accuracy_after_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    command = ("sweep", "digits", "--dir", str(folder), "--train.max_steps", "2")
    status, out, err = call(capsys, *command, "--grid", "optim.lr", "0.05", "0.5")
    assert status == 0, err
    said = re.findall(r"^(before|after): +kNN accuracy ([.\d]+)", out + err, re.M)
    (before, *_), after = ([float(x) for w, x in said if w == p] for p in ("before", "after"))
    rows = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [row["figures"]["knn_top1"] for row in rows] == pytest.approx(after, abs=6e-5)
    assert len(rows) == 2 and before not in after
    # The folders alone do not tell this accuracy, and the one before training is none.
    _, table, _ = call(capsys, "compare", *(str(folder / row["folder"]) for row in rows))
    assert "knn_first" in table and "knn_top1" not in table


def test_a_sweep_runs_every_combination_once_and_continues(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    command = ("sweep", "digits", "--dir", str(folder), *DIGITS, "--train.log_every", "1")
    command += ("--grid", "optim.lr", "0.03", "0.12")
    status, out, err = call(capsys, *command)
    assert status == 0, err
    saved = json.loads((folder / "sweep.json").read_text())
    assert [row["options"] for row in saved["runs"]] == [{"optim.lr": "0.03"}, {"optim.lr": "0.12"}]
    assert (folder / "sweep.png").exists()
    assert "| 0.12 |" in (folder / "table.md").read_text()
    assert (folder / "lr=0.03" / "checkpoints" / "last.pt").exists()
    before = (folder / "lr=0.03" / "metrics.jsonl").stat().st_mtime_ns
    status, out, _ = call(capsys, *command)
    assert out.count("done before") == 2
    assert (folder / "lr=0.03" / "metrics.jsonl").stat().st_mtime_ns == before
    status, _, err = call(capsys, *command, "--model.dim", "32")
    assert status == 2
    assert "holds a sweep with other options" in err
    for bad, said in (
        (("--grid", "optim.lrr", "1"), "did you mean"),
        (("--grid", "optim.lr", "1", "1"), "different values"),
        ((), "--grid or --list"),
    ):
        status, _, err = call(capsys, "sweep", "digits", "--dir", str(tmp_path / "x"), *bad)
        assert status == 2
        assert said in err
    # The two runs side by side.
    picture = tmp_path / "new/folder/c.png"
    pair = (str(folder / "lr=0.03"), str(folder / "lr=0.12"))
    status, out, err = call(capsys, "compare", *pair, "--out", str(picture))
    assert status == 0, err
    row = next(line for line in out.splitlines() if "--optim.lr" in line)
    assert row.split("|")[2].strip() == "0.03"
    assert "--model.dim" not in out
    assert Image.open(picture).size[0] > 800
    assert call(capsys, "compare", pair[0], str(tmp_path))[0] == 2
    assert call(capsys, "compare", pair[0])[0] == 2


def test_a_rank_without_a_readable_image_has_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two, whose other rank has found `others`."""
    others: list[tuple[object, str, str]] = []
    monkeypatch.setattr(evaluation_ranks, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(evaluation_ranks, "gather_objects", lambda own: [own, *others])
    source = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), None, ())

    def nothing(part: Source) -> tuple[torch.Tensor, ...]:
        raise NothingDecodedError(f"none of {len(part)}")

    others[:] = [((torch.ones(2, 3),), "", "")]
    assert torch.equal(evaluation_ranks.over_ranks(nothing, source)[0], torch.ones(2, 3))
    others[:] = [(None, "", "none of 2")]
    with pytest.raises(NothingDecodedError, match="none of 2"):
        evaluation_ranks.over_ranks(nothing, source)
    others[:] = [(None, "out of memory", "")]
    with pytest.raises(ConfigError, match="out of memory"):
        evaluation_ranks.over_ranks(nothing, source)
