"""The four-class study writes results, and repeats no finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast import cli, study
from mocofast.config import ConfigError
from mocofast.study import SIZES, StudySize, four_class, plot_study, table
from tests import runs

CPU = torch.device("cpu")


def tiny() -> StudySize:
    """Returns the study for a CPU: one epoch without labels, two with labels, two seeds."""
    cpu = SIZES["cpu"]
    short = {"train.epochs": 1, "optim.warmup_epochs": 0.0, "data.batch_size": 16}
    models = {
        name: replace(
            model,
            pretraining={**model.pretraining, **short},
            tuning=replace(model.tuning, epochs=2, batch_size=8),
        )
        for name, model in cpu.models.items()
    }
    return replace(cpu, models=models, unlabelled=8, labelled=4, test=3, seeds=2)


def test_it_runs_every_pair_once_and_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for part in ("train", "test"):
        runs.make_images(data / part, 5 * 10, classes=5, side=32)
    size = tiny()
    monkeypatch.setattr(study, "count_workers", lambda _: 1)  # one process besides this process
    results = four_class(str(data), out, size, CPU)
    assert results == json.loads((out / "results.json").read_text())
    names = {
        f"{model} {start} {seed}"
        for model in ("ResNet", "ViT")
        for start in study.STARTS
        for seed in (0, 1)
    }
    assert results["runs"].keys() == names
    assert {len(accuracies) for accuracies in results["runs"].values()} == {2}
    # Accuracies are shares of 4 x 3 images.
    shares = [share for run in results["runs"].values() for share in run]
    assert all(round(12 * share, 6) % 1 == 0 for share in shares)
    assert results["knn"].keys() == {"ResNet", "ViT"}

    # Four of five classes, the given number of images, every link to a different file.
    links = sorted((out / "images" / "train").rglob("*.jpg"))
    assert {link.parent.name for link in links} == {"class0", "class1", "class2", "class3"}
    assert len({link.resolve() for link in links}) == 4 * 8
    assert all(link.resolve().parent == data / "train" / link.parent.name for link in links)
    assert len((out / "table.md").read_text().splitlines()) == 2 + 4
    assert Image.open(out / "curves.png").size[0] > 800

    # Only a run without a result is repeated, and gives the same result.
    lost = results["runs"].pop("ViT pretrained 1")
    (out / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert four_class(str(data), out, size, CPU)["runs"]["ViT pretrained 1"] == lost
    said = [line for line in capsys.readouterr().out.splitlines() if "seed" in line]
    assert len(said) == 1
    assert said[0].startswith("ViT, pretrained, seed 1: accuracy")
    with pytest.raises(ConfigError, match="a study of other images or settings"):
        four_class(str(data), out, replace(size, seeds=3), CPU)


def test_the_table_holds_means_and_deviations_and_the_gain_seed_by_seed() -> None:
    size = replace(tiny(), models={"ViT": tiny().models["ViT"]})
    shares = {
        "ViT scratch 0": [0.25, 0.35, 0.45],
        "ViT scratch 1": [0.35, 0.35, 0.55],
        "ViT pretrained 0": [0.5, 0.6, 0.5],
        "ViT pretrained 1": [0.5, 0.5, 0.7],
    }
    lines = table({"runs": shares}, size).splitlines()
    # Computed by hand: the deviation of two values is their distance / sqrt(2), and the gains are 5
    # and 15 points.
    assert lines[2] == "| ViT | scratch | 50.0 ± 7.1 | 50.0 ± 7.1 |  | 10.0 ± 0.0 |"
    assert lines[3] == "| ViT | pretrained | 60.0 ± 14.1 | 60.0 ± 14.1 | 10.0 ± 7.1 | 10.0 ± 0.0 |"
    figure = plot_study({"runs": shares}, size)
    scratch = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(np.asarray(scratch), [0.3, 0.35, 0.5])


def test_images_that_are_not_four_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.make_images(tmp_path / "data", 12, classes=3)
    folders = ("--data.path", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert cli.main(["study", "four-class", *folders, "--device", "cpu"]) == 2
    assert "needs 4 classes, each a folder; got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
