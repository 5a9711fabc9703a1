"""The command line: help, mistakes, evaluation and export of a small run."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mocofast import cli, front, settings
from tests import runs


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process. Returns exit status, stdout and stderr."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # argparse exits
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_every_option_with_meaning_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = call(capsys, "pretrain", "--help-all")
    assert status == 0
    text = re.sub(r"\s+", " ", out)
    for group, kind in settings.groups().items():
        for setting in settings.settings(group, kind):
            assert f"--{setting.name} VALUE {setting.help}" in text
            assert f"[{settings.shown(setting.default)}]" in text
    for name in settings.recipes():
        assert re.search(rf"^  {name} +\w", out, re.M) and f" {name} {settings.about(name)}" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = call(capsys, name, "--help")
    assert status == 0
    assert f"mocofast {name}" in out
    # The flags of the reference's scripts are all shown.
    assert len(out.splitlines()) <= 30 or name.startswith("main_")
    assert "()" not in out
    assert name in call(capsys, "--help")[1]
    status, every, _ = call(capsys, name, "--help-all")
    options = r"^  (--[\w.-]+)"
    assert status == 0
    assert {*re.findall(options, out, re.M)} <= {*re.findall(options, every, re.M)}
    assert not [line for line in f"{out}{every}".splitlines() if len(line) > 100]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("knn", "RUN"), "augment.blur"),
        (("knn", "RUN"), "knn.every"),
        (("linear", "RUN"), "data.batch_size"),
        (("embed", "RUN", "PHOTOS", "x.npz"), "data.path"),
        (("views", "PHOTOS"), "data.drop_last"),
    ],
)
def test_an_option_that_a_command_does_not_use_is_refused(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], option: str
) -> None:
    status, _, err = call(capsys, *words, f"--{option}", "1")
    assert status == 2
    assert err.startswith(f"mocofast {words[0]}: --{option}: no effect")
    assert f"--{option} " not in call(capsys, words[0], "--help-all")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage"),
        (("pretrian",), "did you mean 'pretrain'"),
        (("pretrain", "digit"), "did you mean 'digits'"),
        (("pretrain", "x" * 300), "File name too long"),
        (("pretrain", "--train.dir", "\udcff"), "train.dir: expected text in UTF-8, got '\\udcff'"),
        (("pretrain", "--optim.lrr", "1"), "did you mean '--optim.lr'"),
        (("pretrain", "--optim.lrr=1"), "did you mean '--optim.lr'"),
        (("pretrain", "--optim.l", "1"), "unknown option '--optim.l'"),  # no abbreviations
        (("pretrain", "--optim.lr"), "expected one argument"),
        (("pretrain", "--optim.lr", "x"), "expected float, got 'x'"),
        (("pretrain", "--data.loader", "dalli"), "did you mean 'dali'"),
        (("pretrain", "--model.arch", "resnet5"), "resnet50"),
        (("pretrain", "moco_v1_r50"), "data.path"),
        (("pretrain", "moco_v1_r50", "--data.path", "/nowhere"), "/nowhere"),
        (("pretrain", "--data.batch_size", "5000"), "data.batch_size"),
        (("pretrain", "--resume", "/nowhere"), "/nowhere"),
        (("knn", "/nowhere"), "/nowhere"),
        (("export", "/nowhere", "--format", "onnx", "x.pt"), "/nowhere"),
        (("bench", "kernel"), "kernels"),
    ],
)
def test_mistakes_are_named_in_a_line_with_status_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # a run that starts anyway leaves its folder here
    status, out, err = call(capsys, *arguments)
    assert status == 2
    assert said in out + err
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: two steps of a torchvision ResNet on small JPEG files."""
    images = runs.make_images(tmp_path_factory.mktemp("images"), 60)
    folder = tmp_path_factory.mktemp("runs") / "small"
    runs.mocofast(
        *("pretrain", "digits", "--model.arch", "resnet18", "--model.mlp", "true"),
        *("--data.source", "folder", "--data.path", str(images), "--data.workers", "0"),
        *("--augment.size", "32", "--data.batch_size", "16", "--train.max_steps", "2"),
        *("--train.dir", str(folder), "--knn.shots", "2"),
    )
    return folder


def test_knn_and_linear_report_accuracies(run_folder: Path) -> None:
    out = runs.mocofast("knn", str(run_folder), "--knn.k", "3").stdout
    values = dict(re.findall(r"^(\w+) ([\d.]+)$", out, re.MULTILINE))
    assert {"knn_top1", "knn_top5", "few_shot_top1"} <= values.keys()
    assert all(0 <= float(value) <= 1 for value in values.values())
    out = runs.mocofast("linear", str(run_folder)).stdout
    values = dict(re.findall(r"^(\w+) ([\d.e-]+)$", out, re.MULTILINE))
    assert 0.5 <= float(values["linear_top1"]) <= 1  # two classes that differ by their tint


def test_knn_refuses_shots_above_the_smallest_class_before_it_computes(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("knn", str(run_folder), "--knn.shots", "99", "--dir", str(tmp_path / "knn"))
    status, out, err = call(capsys, *words)
    assert status == 2 and not (tmp_path / "knn").exists()
    assert re.search(r"knn.shots: expected at most \d+, the images of class", err), err
    assert "knn_top1" not in out


def test_finetuning_trains_the_whole_encoder_and_writes_a_classifier(
    run_folder: Path, tmp_path: Path
) -> None:
    out_file = tmp_path / "classifier.pt"
    # 40 steps, because validation needs running statistics of BatchNorm that have forgotten the
    # pretraining (0.9 ** 40 = 1.5 %).
    out = runs.mocofast(
        *("finetune", str(run_folder), "--finetune.epochs", "20", "--finetune.batch_size", "24"),
        *("--finetune.lr", "0.05", "--out", str(out_file)),
    ).stdout
    values = dict(re.findall(r"^(\w+) ([\d.e-]+)$", out, re.MULTILINE))
    assert float(values["finetune_top1"]) == 1.0  # two classes that differ by their tint
    state = torch.load(out_file, weights_only=True)
    assert state["fc.weight"].shape == (2, 512)
    trained = torch.load(run_folder / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert not torch.equal(state["conv1.weight"], trained["encoder_q.conv1.weight"])


def test_an_export_loads_into_torchvision_apart_from_the_head(
    run_folder: Path, tmp_path: Path
) -> None:
    from torchvision.models import resnet18

    out = runs.mocofast(
        "export", str(run_folder), "--format", "torchvision", str(tmp_path / "backbone.pt")
    ).stdout
    assert "resnet18" in out
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    model = resnet18()
    head = {name: value for name, value in model.state_dict().items() if name.startswith("fc.")}
    model.load_state_dict(state | head, strict=True)
    trained = torch.load(run_folder / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert torch.equal(model.conv1.weight, trained["encoder_q.conv1.weight"])


def test_the_reference_format_holds_the_queue_transposed(run_folder: Path, tmp_path: Path) -> None:
    runs.mocofast(
        "export", str(run_folder), "--format", "reference", str(tmp_path / "moco.pth.tar")
    )
    state = torch.load(tmp_path / "moco.pth.tar", weights_only=True)
    trained = torch.load(run_folder / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert state["arch"] == "resnet18"
    assert torch.equal(state["state_dict"]["module.queue"], trained["queue"].T)
    assert "module.encoder_q.fc.0.weight" in state["state_dict"]


def test_unlabelled_images_train_without_a_knn_monitor_and_say_so(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in runs.make_images(tmp_path / "images", 20).rglob("*.jpg"):
        path.rename(flat / path.name)
    out = runs.mocofast(
        *("pretrain", "digits", "--data.source", "folder", "--data.path", str(flat)),
        *("--data.batch_size", "8"),
        *("--train.max_steps", "1", "--train.dir", str(tmp_path / "run"), "--data.workers", "0"),
    ).stdout
    assert "no kNN monitor: no labels" in out
    assert "unlabelled" in out
    [written] = re.findall(r"^written to .*?: (.*)$", out, re.M)
    files = written.replace("TensorBoard events, ", "").split(", ")
    assert "views.png" in files and all((tmp_path / "run" / name).exists() for name in files)
    done = runs.mocofast("knn", str(tmp_path / "run"), check=False)
    assert done.returncode == 2
    assert "labelled" in done.stderr


def test_imports_of_a_run_are_no_garbage() -> None:
    assert gc.isenabled()
    with front.importing():
        assert not gc.isenabled()
        kept: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(kept)
    gc.unfreeze()


def test_help_loads_no_large_package() -> None:
    """Loading PyTorch takes seconds."""
    script = (
        "import contextlib, io, sys\nfrom mocofast import cli\n"
        "large = {'PIL', 'argcomplete', 'matplotlib', 'numpy', 'pycocotools', 'scipy', 'sklearn',\n"
        "         'torch', 'torchvision', 'yaml'}\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n            cli.main([name, '--help'])\n"
        "        except SystemExit as end:\n            assert not end.code, name\n"
        "    assert not large & sys.modules.keys(), (name, large & sys.modules.keys())\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, *cli.COMMANDS],
        env=runs.environment(),
        cwd=runs.ROOT,
        check=True,
    )


def test_the_settings_of_the_study_are_those_of_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mocofast.study import SIZES

    assert f"--setting {{{','.join(SIZES)}}}" in call(capsys, "study", "--help")[1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mocofast pre", {"pretrain", "prepare", "predict"}),
        ("mocofast pretrain cifar10_b", {"cifar10_byol"}),
        ("mocofast pretrain digits --data.loader t", {"torchvision"}),
        ("mocofast pretrain --model.method byol --optim.sched", {"--optim.schedule"}),
        ("mocofast sweep --model.sym", {"--model.symmetric"}),
        ("mocofast linear README.md --linear.prot", {"--linear.protocol"}),
        ("mocofast knn pyproj", {"pyproject.toml"}),
        ("mocofast bench ker", {"kernels"}),
        ("mocofast launch slurm digits --optim.sched", {"--optim.schedule"}),
        ("mocofast launch slurm --gpus", {"--gpus"}),
    ],
)
def test_the_tab_key_completes_commands_options_values_and_files(
    tmp_path: Path, line: str, expected: set[str]
) -> None:
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    script = "import sys; from mocofast import cli; sys.exit(cli.main())"
    subprocess.run(
        [sys.executable, "-c", script], env=runs.environment() | asked, cwd=runs.ROOT, check=True
    )
    assert {word.strip() for word in answer.read_text().split("\n")} == expected
