"""Runs on partly labelled sets, zip archives and lists, through the command line."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocofast import cli
from tests import runs

SMALL = (
    *("--model.arch", "resnet_tiny", "--augment.size", "16", "--data.batch_size", "8"),
    *("--data.workers", "0", "--data.loader", "torchvision", "--knn.k", "3"),
)


def save(root: Path, part: str, count: int) -> None:
    """Writes images of 20 x 20 pixels, half of them red (class a), half of them blue (class b)."""
    rng = np.random.default_rng(len(part))
    for i in range(count):
        pixels = rng.integers(0, 128, (20, 20, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 127
        name = f"{i}.png" if part == "unlabeled" else f"{'ab'[i % 2]}/{i}.png"
        (root / part / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / name)


@pytest.fixture(scope="module")
def partly_labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    for part, count in (("train", 12), ("unlabeled", 20), ("Test", 6)):
        save(root, part, count)
    (root / "train" / "notes.txt").write_text("text")
    (root / "Test" / "zebra").mkdir()  # a class that train/ lacks
    Image.new("RGB", (20, 20)).save(root / "Test" / "zebra" / "0.png")
    return root


def mocofast(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def figures(out: str) -> dict[str, float]:
    return {k: float(v) for k, v in re.findall(r"^(\w+) ([\d.e-]+)$", out, re.MULTILINE)}


def test_a_partly_labelled_zip_trains_resumes_and_is_evaluated_on_its_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], partly_labelled: Path
) -> None:
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(partly_labelled.rglob("*.*")):
            out.write(file, f"set/{file.relative_to(partly_labelled)}")
    data = ("--data.source", "zip", "--data.path", str(archive))
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    common = ("pretrain", "digits", *SMALL, *data, "--train.log_every", "1")
    out_text = mocofast(capsys, *common, "--train.dir", whole, "--train.max_steps", "5")
    assert "data: 32 images of 2 classes, 20 unlabelled; held out: set/Test/, 6" in out_text
    assert "data: 1 file of other kinds ignored: 1 .txt" in out_text
    zebra = "1 image of set/Test/ not evaluated: of classes that set/train/ and set/unlabeled/ lack"
    assert f"{zebra} (zebra)" in out_text
    assert "--augment.size" not in out_text  # images are larger than views
    for steps in ("2", "5"):
        mocofast(
            capsys,
            *(*common, "--train.dir", parts, "--train.max_steps", steps, "--resume", "auto"),
        )
    assert runs.metrics(Path(parts)) == runs.metrics(Path(whole))
    # Other images do not take the options of the run's images.
    knn = mocofast(capsys, "knn", whole, "--data.path", str(partly_labelled), "--knn.k", "3")
    assert "32 images of 2 classes, 20 unlabelled; held out: Test/, 6" in knn
    assert figures(knn)["knn_top1"] >= 0.5
    assert figures(mocofast(capsys, "linear", whole))["linear_top1"] >= 0.5
    assert figures(
        mocofast(capsys, "finetune", whole, "--finetune.epochs", "1", "--finetune.batch_size", "6")
    )


def test_evaluation_says_what_pretraining_says_about_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 1000 << i % 2, (20, 20), dtype=np.uint16)
        path = tmp_path / "set" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    run = str(tmp_path / "run")
    data = ("--data.source", "folder", "--data.path", str(tmp_path / "set"))
    out = mocofast(
        capsys,
        *("pretrain", "digits", *SMALL, *data, "--data.holdout", "0.4"),
        *("--train.dir", run, "--train.max_steps", "1", "--data.batch_size", "4"),
    )
    advice = next(line for line in out.splitlines() if "--data.range 0,2047" in line)
    options = ("--finetune.epochs", "1", "--finetune.batch_size", "6")
    for command in (("linear", run), ("finetune", run, *options), ("knn", run, "--knn.k", "3")):
        assert advice.removeprefix("data: ") in mocofast(capsys, *command)


def test_supervised_training_takes_labelled_images_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], partly_labelled: Path
) -> None:
    out = mocofast(
        capsys,
        *("pretrain", "digits", *SMALL, "--model.method", "supervised"),
        *("--data.source", "folder", "--data.path", str(partly_labelled)),
        *("--train.dir", str(tmp_path / "run"), "--train.max_steps", "1"),
    )
    assert ", 12 images in 1 step an epoch" in out
    assert "supervised, 2 classes" in out


def test_a_mistake_in_the_options_of_a_set_has_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], partly_labelled: Path
) -> None:
    data = ("--data.source", "folder", "--data.path", str(partly_labelled))
    for words, said in (
        (("--data.val", "nowhere"), "data.val: no images or folders in 'nowhere'"),
        (("--data.include", "*.gif"), "32 images left out by data.include"),
        (("--data.group", "9"), "data.group: "),
        (("--data.group", "9" * 5000), "data.group: expected the level"),
        (("--data.labels", "no.csv"), "data.labels: there is no list 'no.csv'"),
        (("--data.path", str(partly_labelled / "train/notes.txt")), "is a file"),
    ):
        assert cli.main(["pretrain", "digits", *SMALL, *data, *words]) == 2
        assert said in capsys.readouterr().err


def test_a_set_without_a_good_image_and_a_run_below_a_file_are_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"no image")
    words = ("--data.source", "folder", "--data.batch_size", "2", "--train.max_steps", "1")
    for run, said in (
        (tmp_path / "run", "data: none of the 2 images can be decoded; the first: a.png: "),
        (folder / "a.png/run", f"train.dir: a parent of {folder / 'a.png/run'} is a file"),
    ):
        options = ("--data.path", str(folder), "--train.dir", str(run), *words)
        assert cli.main(["pretrain", "digits", *SMALL, *options]) == 2
        assert f"mocofast pretrain: {said}" in capsys.readouterr().err
    assert not (tmp_path / "run/exception.pt").exists()


@pytest.mark.slow
def test_two_processes_resume_exactly_on_lists_tables_and_pairs(tmp_path: Path) -> None:
    """All runs in the processes of one torchrun."""
    images = runs.make_images(tmp_path / "images", 24)
    files = sorted(images.rglob("*.jpg"))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in files]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    (tmp_path / "pairs.csv").write_text(
        "path,path_2\n"
        + "".join(
            f"{a.relative_to(images)},{b.relative_to(images)}\n"
            for a, b in zip(files[::2], files[1::2])
        )
    )
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = {"image": [p.read_bytes() for p in files], "label": [i % 2 for i in range(24)]}
    parquet.write_table(pa.table(content), tmp_path / "set.parquet")
    sets = {
        "list": f"--data.source list --data.path {tmp_path}/list.csv",
        "parquet": f"--data.source parquet --data.path {tmp_path}/set.parquet",
        "pairs": f"--data.source folder --data.path {images} --data.pairs {tmp_path}/pairs.csv",
    }
    common = (
        "pretrain digits --data.batch_size 4 --data.workers 0 --data.loader torchvision "
        "--data.holdout 0.2 --augment.size 16 --model.arch resnet_tiny --model.queue_size 8 "
        "--train.log_every 1 --knn.start false --train.epochs 2 --resume auto"
    )
    lines = [
        f"{common} {options} --train.dir {tmp_path}/{name}-{out} --train.max_steps {steps}"
        for name, options in sets.items()
        for out, steps in (("whole", 6), ("parts", 3), ("parts", 6))
    ]
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    script = str(Path(__file__).with_name("two_rank_runs.py"))
    runs.torchrun(2, str(tmp_path / "runs.txt"), script=script)
    for name in sets:
        runs.assert_same_run(tmp_path / f"{name}-parts", tmp_path / f"{name}-whole")
