"""`mocofast detect` and `mocofast segment`: they learn, resume exactly, compare, and refuse."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mocofast import cli
from mocofast.detection.launch import configure, labels_of, table
from mocofast.detection.options import KINDS, DetectConfig, apply
from mocofast.detection.page import TaskRun, verdict
from mocofast.detection.run import train
from tests import runs, shapes
from tests.test_report import checked

pytest.importorskip("pycocotools")

CPU = torch.device("cpu")
SMALL = (
    *("--model.arch", "resnet_tiny", "--data.batch_size", "4", "--data.workers", "1"),
    *("--optim.warmup_steps", "2", "--train.log_every", "1", "--train.device", "cpu"),
)
DETECT = (
    *("--model.name", "retinanet", "--model.width", "16", "--model.anchor", "12"),
    *("--data.sizes", "32", "--data.val_size", "32", *SMALL),
)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_voc(tmp_path_factory.mktemp("voc"))


def detect(*arguments: str) -> int:
    return cli.main(["detect", *arguments])


def test_a_run_writes_its_files_and_its_config_runs_again(voc: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    options = ("--data.path", str(voc), *DETECT, "--train.epochs", "2", "--train.eval_every", "1")
    assert detect("scratch", *options, "--train.dir", str(first)) == 0
    lines = runs.metrics(first)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    parts = {"loss", "classification", "bbox_regression"}
    assert parts | {"step", "epoch", "lr", "chance_loss"} == lines[0].keys()
    assert {"ap", "ap50", "ap75", "voc07_ap50", "ap_disc", "ap50_square"} <= lines[3].keys()
    assert "data wait" in (first / "train.log").read_text()
    for name in ("curves.png", "predictions.png"):
        with Image.open(first / name) as image:
            assert min(image.size) > 300
    text = checked(first / "report.html", "classes")
    assert "data:image/jpeg" in text and 'scope="row">disc' in text
    content = yaml.safe_load((first / "config.yaml").read_text())
    assert content["model"]["mean"] == [0.485, 0.456, 0.406] and content["recipe"] == "detect"
    again = tmp_path / "again"
    assert detect(str(first / "config.yaml"), "--train.dir", str(again)) == 0
    runs.assert_same_run(again, first)
    (again / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.3, "loss": null}\n')
    both = tmp_path / "both.html"
    assert cli.main(["report", str(first), str(again), "--out", str(both)]) == 0
    text = checked(both, "classes")
    assert "AP50, first" in text and "Problem: diverged" in text and "model.width" in text


def test_a_warm_up_longer_than_the_run_is_named(voc: Path, tmp_path: Path) -> None:
    options = ("--data.path", str(voc), *DETECT, "--train.epochs", "1")
    for steps in (3, 4):  # the run has 3
        folder = tmp_path / str(steps)
        words = ("--optim.warmup_steps", str(steps), "--train.dir", str(folder))
        assert detect("scratch", *options, *words) == 0
        said = (
            "optim.warmup_steps: 4, and the run has 3 steps" in (folder / "train.log").read_text()
        )
        assert said == (steps == 4)


def test_a_continued_run_equals_a_run_that_never_stopped(voc: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--data.path", str(voc), *DETECT, "--train.epochs", "3", "--train.eval_every", "2")
    assert detect("scratch", *options, "--train.dir", str(whole)) == 0
    for stop in ("2", "4", "6"):  # inside an epoch, after its end, and at an evaluation
        words = ["scratch", *options, "--train.dir", str(parts), "--resume", "auto"]
        assert detect(*words, "--train.max_steps", stop) == 0
    assert detect("--resume", str(parts), "--train.max_steps", "0") == 0
    runs.assert_same_run(parts, whole)
    assert detect("--resume", str(parts)) == 0  # nothing is left to do
    runs.assert_same_run(parts, whole)


def test_a_signal_ends_a_run_with_75_and_it_continues(voc: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--data.path", str(voc), *DETECT, "--train.epochs", "12")
    assert detect("scratch", *options, "--train.dir", str(whole)) == 0
    process = subprocess.Popen(
        [
            *(sys.executable, "-u", "-m", "mocofast", "detect", "scratch", *options),
            *("--train.dir", str(stopped)),
        ],
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=runs.ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3 " in line:
            process.send_signal(signal.SIGTERM)
            break
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 75, out
    assert f"to continue: mocofast detect --resume {stopped}" in out
    torch.set_num_threads(1)  # as the process; a continued run takes the number itself
    assert detect("--resume", str(stopped)) == 0
    assert runs.metrics(stopped) == runs.metrics(whole)


def test_two_ranks_train_and_evaluate_all_images(voc: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    options = ("--data.path", str(voc), *DETECT, "--train.epochs", "1", "--train.dir", str(folder))
    runs.torchrun(2, "detect", "scratch", *options)
    lines = runs.metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert "evaluate on, 2 classes" in (folder / "train.log").read_text()
    # The saved weights, measured by one process, give the figures of two.
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    torch.save({**state, "measured_at": -1}, folder / "checkpoints" / "last.pt")
    assert detect("--resume", str(folder)) == 0
    assert runs.metrics(folder)[-1] == lines[-1]


def test_starts_are_compared_side_by_side(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained, folder = tmp_path / "cells", tmp_path / "compared"
    images = ("--data.path", str(voc / "JPEGImages"), "--augment.size", "32")
    small = ("--model.arch", "resnet_tiny", "--model.queue_size", "16", "--data.batch_size", "8")
    runs.mocofast(
        *("pretrain", "moco_v2_r50_200ep", *images, *small, "--augment.mean", "0.3,0.3,0.3"),
        *("--train.epochs", "1", "--train.dir", str(pretrained), "--knn.every", "0"),
    )
    options = ["--data.path", str(voc), *DETECT, "--train.epochs", "1", "--train.seeds", "3,4"]
    options[options.index("--model.arch") : options.index("--model.arch") + 2] = []
    words = [str(pretrained), "scratch", *options, "--train.dir", str(folder)]
    assert detect(*words) == 0
    out = capsys.readouterr().out
    assert "| cells | 2 | " in out and "| scratch | 2 | " in out
    assert "in percent:\n| start |" in out
    assert (folder / "comparison.md").read_text().startswith("In percent:\n\n| start |")
    content = json.loads((folder / "comparison.json").read_text())
    assert len(content["cells"]) == len(content["scratch"]) == 2
    # Equal encoders and pixels, different weights. Seeds differ, too.
    losses = {}
    for name in ("cells-seed3", "cells-seed4", "scratch-seed3", "scratch-seed4"):
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert config["model"]["arch"] == "resnet_tiny"
        assert config["model"]["mean"] == [0.3, 0.3, 0.3] and config["train"]["seeds"] == []
        losses[name] = runs.metrics(folder / name)[0]["loss"]
    assert len(set(losses.values())) == 4
    assert detect(*words, "--resume", "auto") == 0  # all runs have ended
    assert json.loads((folder / "comparison.json").read_text()) == content
    assert cli.main(["knn", str(folder / "cells-seed3")]) == 2
    said = capsys.readouterr().err
    assert "not a mocofast checkpoint of pretraining, but a file of 'mocofast detect 1'" in said
    assert said.count("checkpoints/") == 1  # said once, not of every file


def test_starts_have_names_of_their_own(tmp_path: Path) -> None:
    for name in ("lr=0.03", "lr=0.1", "a/run", "b/run"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    rates = [str(tmp_path / "lr=0.03"), "scratch", str(tmp_path / "lr=0.1"), "moco.pth"]
    assert labels_of(rates) == ["lr=0.03", "scratch", "lr=0.1", "moco"]
    files = [str(tmp_path / name / "checkpoints/last.pt") for name in ("lr=0.03", "lr=0.1")]
    assert labels_of(files) == ["lr=0.03-checkpoints-last", "lr=0.1-checkpoints-last"]
    runs = [str(tmp_path / "a/run"), str(tmp_path / "b/run")]
    assert labels_of(runs) == [f"{tmp_path.name}-{name}-run" for name in "ab"]


def test_defaults_are_small_on_a_cpu_alone() -> None:
    given = {"model.width": "32"}
    small, inits = configure("detect", ["scratch"], given, small=True)
    assert inits == ["scratch"] and isinstance(small, DetectConfig)
    assert (small.model.name, small.model.width, small.data.sizes) == ("faster_rcnn", 32, (160,))
    paper, _ = configure("detect", ["scratch"], given, small=False)
    assert isinstance(paper, DetectConfig)
    assert (paper.model.name, paper.model.width) == ("faster_rcnn_c4", 32)
    assert (paper.data.val_size, paper.optim.lr_per) == (800, 16)


def test_the_table_has_means_and_deviations() -> None:
    figures = {"a": [{"ap": 0.2, "ap50": 0.5}, {"ap": 0.4, "ap50": 0.5}], "b": [{"ap": 0.125}]}
    lines = table(figures).splitlines()
    assert lines[0] == "| start | runs | ap | ap50 |"
    assert lines[2:] == ["| a | 2 | 30.0 ± 14.1 | 50.0 ± 0.0 |", "| b | 1 | 12.5 |  |"]


def test_a_single_log_line_is_too_early_for_a_verdict() -> None:
    figures = {"miou": 0.1, "pixel_accuracy": 0.3, "iou_background": 0.0, "iou_1": 0.4}
    lines = [{"loss": 1.3, "step": 1, "epoch": 1}, {"loss": 1.1, "step": 2, "epoch": 2}]
    run = TaskRun("seg", Path("seg"), KINDS["segment"](), lines[:1], figures, [])
    assert verdict(run)[1].startswith("too early to tell, one log line")
    assert verdict(run._replace(records=lines))[1].startswith("learns: mean IoU 10.0%")


def outcomes(task: str, given: dict[str, Any], path: Path, steps: int) -> list[dict[str, float]]:
    """Returns the figures after one step and after `steps` steps, from scratch."""
    values = []
    for count in (1, steps):
        config = KINDS[task]()
        config.model.init = "scratch"
        own = {"train.dir": str(path / f"run{count}"), "train.max_steps": count}
        shared = {"data.batch_size": 8, "model.arch": "resnet_tiny", "train.log_every": steps}
        apply(config, {"data.path": str(path), **shared, **given, **own})
        values.append(train(config, CPU, None).values)
    return values


def test_segmentation_learns_shapes(tmp_path: Path) -> None:
    path = shapes.write_voc(tmp_path / "set", train=40, val=10, side=48)
    given = {"data.crop": 48, "data.scale": "0.8,1.25", "model.stride": 4, "train.epochs": 12}
    given |= {"data.classes": ",".join(shapes.CLASSES), "optim.lr_per": 0, "optim.lr": 0.1}
    before, after = outcomes("segment", {**given, "optim.warmup_steps": 5}, path, 60)
    assert before["miou"] < 0.35 and after["miou"] > 0.7, (before, after)
    assert after["iou_disc"] > 0.5 and after["iou_square"] > 0.5
    with Image.open(path / "run60" / "predictions.png") as image:
        assert min(image.size) > 300


@pytest.mark.slow
def test_mask_rcnn_learns_boxes_and_masks(tmp_path: Path) -> None:
    path = shapes.write_voc(tmp_path / "set", train=40, val=10, side=48)
    given = {"model.name": "mask_rcnn", "model.width": 16, "model.anchor": 8, "model.rois": 32}
    given |= {"data.sizes": "48", "data.val_size": 48, "train.epochs": 24, "optim.lr_per": 0}
    given |= {"optim.lr": 0.05, "data.classes": ",".join(shapes.CLASSES)}
    before, after = outcomes("detect", {**given, "optim.warmup_steps": 10}, path, 120)
    assert before["ap50"] < 0.1 and after["ap50"] > 0.4, (before, after)
    assert before["mask_ap50"] < 0.1 and after["mask_ap50"] > 0.4, (before, after)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "CKPT: expected scratch"),
        (["nowhere"], "got 'nowhere'"),
        (["scratch", "--data.path", "nowhere"], "nowhere is no folder"),
        (["scratch", "--model.norm", "frozen"], "scratch has none; take sync"),
        (["scratch", "--model.arch", "vit_small"], "needs a ResNet"),
        (["scratch", "--model.arch", "resnet_tinny"], "the nearest known one is 'resnet_tiny'"),
        (["scratch", "--model.name", "yolo"], "expected one of faster_rcnn"),
        (["scratch", "--optim.milestones", "2"], "shares of the run"),
        (["scratch", "scratch"], "different names"),
        (["scratch", "--resume", "nowhere"], "which has its CKPT already"),
        (["--resume", "nowhere"], "no checkpoint at nowhere"),
        (["x.yaml"], "x.yaml: cannot be read"),
        (["scratch", "--data.sizes", "32", "--data.batch_size", "1"], "needs 2 images or more"),
        (["scratch", "--data.lr", "1"], "unknown option '--data.lr'"),
    ],
)
def test_mistakes_end_with_2_and_a_line(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    path = [] if "--data.path" in words or "--resume" in words[:1] else ["--data.path", str(voc)]
    folder = tmp_path / "run"
    try:
        status = detect(*words, *path, "--train.dir", str(folder))
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and len(error.splitlines()) == 1, error
    assert not folder.exists()


@pytest.mark.parametrize("folder", ["locked", "locked/run"])
def test_a_folder_that_cannot_be_made_is_said_in_a_line(
    voc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
) -> None:
    make = Path.mkdir

    def refused(path: Path, *arguments: Any, **options: Any) -> None:  # root may write anywhere
        if "locked" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    status = detect("scratch", "--data.path", str(voc), "--train.dir", str(tmp_path / folder))
    said = capsys.readouterr().err
    assert status == 2 and f"train.dir: {tmp_path / folder} cannot be made (Permission" in said


def test_a_run_is_continued_with_its_own_options_and_images_only(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = tmp_path / "run", shapes.write_voc(tmp_path / "other", seed=5)
    options = ("--data.path", str(voc), *DETECT, "--train.dir", str(folder))
    assert detect("scratch", *options, "--train.epochs", "1", "--train.max_steps", "1") == 0
    assert detect("scratch", *options, "--train.epochs", "1") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert detect("--resume", str(folder), "--optim.lr", "0.5") == 2
    assert "optim.lr: 0.5, but the run to continue has 0.02" in capsys.readouterr().err
    assert detect("--resume", str(folder), "--data.path", str(other)) == 2
    assert "not the images and boxes of the run" in capsys.readouterr().err
    assert cli.main(["segment", "--resume", str(folder)]) == 2
    assert "no checkpoint of mocofast segment" in capsys.readouterr().err
    assert cli.main(["doctor", str(folder)]) == 0
    assert "whole" in capsys.readouterr().out
    file = folder / "checkpoints" / "last.pt"
    state = torch.load(file, weights_only=True)
    for wrong, said in (
        ({"model": {**state["model"], "more": torch.ones(1)}}, "does not fit the model"),
        ({"windows": 1}, "no entry 'windows'"),
        ({"config": {"model": 3}}, "expected options, got 3"),
    ):
        torch.save({**state, **wrong}, file)
        assert detect("--resume", str(file)) == 2
        assert said in capsys.readouterr().err


def test_a_run_that_diverges_ends_with_76(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data.path", str(voc), *DETECT, "--train.dir", str(tmp_path / "run"))
    assert detect("scratch", *options, "--optim.lr", "1e30", "--train.epochs", "9") == 76
    assert "lower --optim.lr" in capsys.readouterr().err
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_help_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    for task, model in (("detect", "faster_rcnn_c4"), ("segment", "deeplabv3")):
        with pytest.raises(SystemExit):
            cli.main([task, "--help"])
        assert model in capsys.readouterr().out
