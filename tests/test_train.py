"""Whole runs through the command line: files, stops, continued runs, two ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mocofast_bench.processes import free_port
from mocofast_bench.step import HostSynchronisations
from torch import nn

from mocofast.config import OptimConfig
from mocofast.device import choose_autocast
from mocofast.methods.moco import MoCo
from mocofast.optim.build import build_optimizer
from mocofast.train.metrics import Window
from mocofast.train.step import train_step
from tests import runs


def options(**values: object) -> list[str]:
    """Returns the words of a command line. group__option=value becomes --group.option value."""
    pairs = [(f"--{name.replace('__', '.')}", str(value)) for name, value in values.items()]
    return [word for pair in pairs for word in pair]


# An epoch has 11 steps. The queue wraps around within the steps of these tests. No checkpoint falls
# on the end of a window.
SHORT = options(train__log_every=3, model__queue_size=300, knn__every=1, data__workers=1)


COMPARED = ("step", "loss", "knn_top1", "knn_top5")  # entries of a line that have no times
PRETRAIN = [sys.executable, "-m", "mocofast", "pretrain", "digits", *SHORT]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_images(tmp_path_factory.mktemp("images"), 80)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of the default recipe, an epoch and a half: folder and output."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    own = options(train__dir=folder, train__max_steps=17)
    return folder, runs.mocofast("pretrain", "digits", *SHORT, *own).stdout


def test_a_run_leaves_everything_it_promises(digits_run: tuple[Path, str]) -> None:
    folder, out = digits_run
    for name in ("config.yaml", "metrics.jsonl", "train.log", "curves.png", "checkpoints/last.pt"):
        assert (folder / name).stat().st_size > 0
    assert list(folder.glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train] == [3, 6, 9, 12, 15]
    names = {"step", "epoch", "loss", "lr", "images_per_second"}
    assert all(names <= line.keys() for line in train)
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 11]
    assert "before: kNN accuracy 0." in out
    assert "after:  kNN accuracy 0." in out
    assert f"written to {folder}" in out


def test_a_run_that_does_not_evaluate_at_its_start_trains_the_same(
    digits_run: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = digits_run
    own = options(train__dir=tmp_path / "run", train__max_steps=17, knn__start="false")
    out = runs.mocofast("pretrain", "digits", *SHORT, *own).stdout
    found, expected = (
        [
            {name: value for name, value in json.loads(line).items() if name in COMPARED}
            for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        for place in (tmp_path / "run", folder)
    )
    assert expected[0]["step"] == 0
    assert found == expected[1:]
    assert "before: " not in out
    assert "after:  kNN accuracy 0." in out


def test_the_configuration_in_the_run_folder_runs_again_to_the_same_metrics(
    digits_run: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = digits_run
    again = tmp_path / "again"
    runs.mocofast("pretrain", str(folder / "config.yaml"), "--train.dir", str(again))
    assert runs.metrics(again) == runs.metrics(folder)


# Inside the first epoch, at the end of the first epoch, inside the second epoch.
@pytest.mark.parametrize("stop", [4, 11, 13])
def test_a_stopped_and_continued_run_equals_one_never_stopped(
    digits_run: tuple[Path, str], tmp_path: Path, stop: int
) -> None:
    whole, _ = digits_run
    folder = tmp_path / "parts"
    runs.mocofast("pretrain", "digits", *SHORT, *options(train__dir=folder, train__max_steps=stop))
    runs.mocofast("pretrain", "--resume", "auto", *options(train__dir=folder, train__max_steps=17))
    runs.assert_same_run(folder, whole)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_resuming_is_exact_on_image_files_with_both_loaders(
    images: Path, tmp_path: Path, loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    common = [
        *SHORT,
        *options(
            data__source="folder", data__path=images, data__loader=loader, data__batch_size=16
        ),
        *options(
            augment__size=16,
            augment__jitter="0.4,0.4,0.4,0.1",
            augment__gray=0.2,
            augment__blur=0.5,
        ),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.mocofast("pretrain", "digits", *common, *options(train__dir=whole, train__max_steps=7))
    runs.mocofast("pretrain", "digits", *common, *options(train__dir=parts, train__max_steps=2))
    runs.mocofast("pretrain", "--resume", str(parts), "--train.max_steps", "7")
    runs.assert_same_run(parts, whole)


def test_metrics_from_after_the_checkpoint_are_not_written_twice(tmp_path: Path) -> None:
    """A run that died after the last checkpoint has logged steps, which are then trained again."""
    folder = tmp_path / "run"
    base = ["pretrain", "digits", *SHORT, *options(train__dir=folder)]
    runs.mocofast(*base, *options(train__max_steps=4))
    lines = runs.metrics(folder)
    # Lines of a killed process. The last line is torn.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 9, "lo')
    runs.mocofast(*base, "--resume", "auto", *options(train__max_steps=6))
    after = runs.metrics(folder)
    assert after[: len(lines)] == lines
    assert [line["step"] for line in after if "loss" in line] == [3, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_ends_with_its_own_status(
    tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    command = [*PRETRAIN, *options(train__dir=folder)]
    process = subprocess.Popen(
        command,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=runs.ROOT,
    )
    _wait_for_a_metrics_line(folder)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "Traceback" not in err
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] >= 3
    assert f"--resume {folder}" in out


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path) -> None:
    folder, port = tmp_path / "run", str(free_port())
    command = [*PRETRAIN, *options(train__dir=folder)]
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            command,
            env=runs.environment() | world | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=runs.ROOT,
        )
        for r in (0, 1)
    ]
    _wait_for_a_metrics_line(folder)
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], outputs


def _wait_for_a_metrics_line(folder: Path) -> None:
    """Waits until a run has logged a step. Fails after a minute."""
    path = folder / "metrics.jsonl"
    for _ in range(600):
        if path.exists() and '"loss"' in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("no metrics line within a minute")


def test_two_ranks_of_half_the_batch_follow_one_rank(images: Path, tmp_path: Path) -> None:
    """Without BatchNorm the division of a batch changes only the order of float32 sums."""
    common = [
        *("pretrain", "digits", *SHORT),
        *options(data__source="folder", data__path=images, data__batch_size=64, train__max_steps=6),
        *options(augment__size=16, data__loader="torchvision"),
        *options(model__queue_size=150, optim__lr=0.5),
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    script = str(Path(runs.__file__))
    runs.torchrun(1, *common, "--train.dir", str(one), script=script)
    runs.torchrun(2, *common, "--train.dir", str(two), script=script)
    first, second = runs.metrics(one), runs.metrics(two)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    expected, got = runs.weights(one), runs.weights(two)
    before = MoCo(runs.PlainEncoder, 64, 150).encoder_q.fc.weight
    assert not torch.allclose(expected["encoder_q.fc.weight"], before, atol=1e-3)
    for name in expected:
        # float32 sums in another order differ, and six steps at a learning rate of 0.5 amplify the
        # difference.
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_micro_batches_follow_the_whole_batch() -> None:
    """A queue of 50 keys and batches of 24 images: the queue wraps around within a batch."""
    results = []
    for accumulate in (1, 2, 3):
        torch.manual_seed(0)
        model = MoCo(runs.PlainEncoder, 16, 50, momentum=0.9)
        optimizer = build_optimizer(model.parameters(), OptimConfig(lr=0.5))
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(5):
            views = tuple(torch.randn(24, 3, 8, 8, generator=generator) for _ in range(2))
            autocast = choose_autocast("fp32", torch.device("cpu"))
            losses.append(train_step(model, views, optimizer, accumulate, autocast).values)
        results.append((torch.stack(losses), model.state_dict()))
    losses, state = results[0]
    for other_losses, other in results[1:]:
        torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-5)
        for name in state:
            torch.testing.assert_close(other[name], state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_steady_step_never_waits_for_the_device(splits: int) -> None:
    torch.manual_seed(0)

    def encoder(num_classes: int) -> nn.Module:
        from mocofast.models.encoders import TinyResNet

        return TinyResNet(num_classes)

    mean = std = torch.full((3,), 127.0)
    model = MoCo(encoder, 16, 50, mlp=False, bn_splits=splits, pixel_mean=mean, pixel_std=std)
    optimizer = build_optimizer(model.parameters(), OptimConfig())
    views = tuple(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8) for _ in range(2))
    autocast = choose_autocast("fp32", torch.device("cpu"))
    window = Window(torch.device("cpu"))
    train_step(model, views, optimizer, 1, autocast)  # the first step sets things up
    with HostSynchronisations() as waits:
        metrics = train_step(model, views, optimizer, 1, autocast)
        window.add(metrics, 8, 0.0)
        pending = window.flush()
        window.add(train_step(model, views, optimizer, 1, autocast), 8, 0.0)
    assert waits.count == 0
    # The means of the first step alone, although the next step was launched before the means are
    # read.
    assert pending.wait()["loss"] == float(metrics.loss)
    with HostSynchronisations() as waits:
        torch.ones(1).item()  # shows that the counter counts
    assert waits.count == 1


def test_unreadable_files_are_replaced_counted_and_named(tmp_path: Path) -> None:
    broken = runs.make_images(tmp_path / "images", 60)
    names = []
    for path in sorted(broken.rglob("*.jpg"))[:6:2]:
        path.write_bytes(path.read_bytes()[:100])
        names.append(str(path.name))
    (broken / "class0" / "empty.jpg").write_bytes(b"")
    (broken / "class1" / "text.png").write_text("not an image")
    folder = tmp_path / "run"
    common = options(
        data__source="folder", data__path=broken, data__batch_size=20, augment__size=16
    )
    out = runs.mocofast(
        "pretrain", "digits", *SHORT, *common, *options(train__dir=folder, train__epochs=2)
    )
    named = {
        Path(json.loads(line)["file"]).name
        for line in (folder / "skipped.jsonl").read_text().splitlines()
    }
    # Images that are held out for kNN are not part of the training stream.
    assert named <= {*names, "empty.jpg", "text.png"}
    assert len(named) >= 3
    assert all(name in out.stdout for name in named)
    assert "step" in (folder / "train.log").read_text()


def test_a_finished_run_is_not_overwritten_by_accident(digits_run: tuple[Path, str]) -> None:
    folder, _ = digits_run
    before = (folder / "metrics.jsonl").read_bytes()
    done = runs.mocofast("pretrain", "digits", *SHORT, "--train.dir", str(folder), check=False)
    assert done.returncode == 2
    assert "--resume auto" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("optim.lr", "0.5", "optim.lr"),
        ("model.queue_size", "301", "model.queue_size"),
        ("train.seed", "3", "train.seed"),
    ],
)
def test_another_run_is_not_continued(
    digits_run: tuple[Path, str], option: str, value: str, said: str
) -> None:
    folder, _ = digits_run
    done = runs.mocofast("pretrain", "--resume", str(folder), f"--{option}", value, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
