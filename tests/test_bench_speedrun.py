"""`mocofast bench speedrun`: counted FLOPs, the log that continues, the search, WSD branches."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from mocofast_bench import speedrun
from mocofast_bench.commands import main
from mocofast_bench.speedrun_runs import flops
from mocofast_bench.speedrun_tasks import TASKS

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.data.sources import load_datasets
from mocofast.models import encoders
from mocofast.models.encoders import build_encoder
from mocofast.train.build import new_state
from tests.runs import PlainEncoder

SHORT = {"data.batch_size": 512, "train.epochs": 2, "model.queue_size": 512}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the digits' task two epochs of two steps of a small encoder."""
    monkeypatch.setattr(encoders, "TinyResNet", PlainEncoder)
    task = replace(TASKS["digits"], both=SHORT, budget={"train.epochs": 1})
    monkeypatch.setitem(TASKS, "digits", task)


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("batch", "queue"), [(512, 512), (128, 1024)])
def test_flops_are_those_of_the_layers_for_every_size(batch: int, queue: int) -> None:
    """The counter sees the products of the loss in one of the two cases."""
    config = TASKS["digits"].config()
    sizes = {"augment.sizes": ("0:4", "1:8")}
    settings.apply(config, {**sizes, "data.batch_size": batch, "model.queue_size": queue})

    def step(side: int) -> int:
        conv = 2 * 27 * 8 * (side // 2) ** 2  # 3x3, 3 to 8 channels, stride 2
        head = 2 * 8 * 64
        # Both encoders forward. Backward: weights of the convolution, inputs and weights of fc.
        encoders_ = batch * (2 * (conv + head) + conv + 2 * head)
        return encoders_ + 4 * batch * queue * 64  # scores against the keys, and their gradient

    assert flops(config) == 1438 // batch * (step(4) + step(8))


def test_flops_of_simclr_count_the_products_of_the_loss() -> None:
    config = TASKS["digits"].config()
    settings.apply(config, {"model.method": "simclr", "model.hidden_dim": 32})
    conv, head = 2 * 27 * 8 * 4**2, 2 * (8 * 32 + 32 * 64)  # of an image
    step = 1024 * (2 * conv + 3 * head) + 3 * 2 * 1024 * 1024 * 64  # 512 pairs
    assert flops(config) == 4 * step


def test_the_quarter_resnet_has_a_quarter_of_the_width() -> None:
    encoder = build_encoder("mocofast.models.narrow:resnet18_quarter", 32)(num_classes=10)
    names = dict(torchvision.models.resnet18(num_classes=10).named_parameters())
    for name, p in encoder.named_parameters():
        whole = names.pop(name).shape
        if name != "conv1.weight":
            assert p.shape[0] == whole[0] // (1 if name.startswith("fc") else 4)
    assert not names
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_the_sides_run_once_and_a_second_command_reads_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["speedrun", "digits", "--fast", "digits", "--seeds", "1"]
    command += ["--out", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    assert main(command) == 0
    first = rows(tmp_path)
    assert [row["name"] for row in first] == ["plain", "reference", "fast digits"]
    for row in first:
        assert row["epoch"] == [1, 2]
        assert 0 < row["cpu"][0] < row["cpu"][1]  # type: ignore[index]
        assert all(0 < knn <= 1 for knn in row["knn"])  # type: ignore[attr-defined]
    capsys.readouterr()
    assert main(command) == 0
    assert rows(tmp_path) == first
    table = capsys.readouterr().out
    assert f"{100 * first[1]['knn'][-1]:.2f}" in table  # type: ignore[index]
    assert (tmp_path / "plot.png").stat().st_size > 1000
    low = ["--sides", "plain", "--precision", "bf16", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["speedrun", "digits", *low]) == 0
    [rounded] = rows(tmp_path)[3:]
    assert rounded["name"] == "plain bf16"
    assert rounded["flops"] == first[0]["flops"]
    assert rounded["knn"] != first[0]["knn"]


def test_the_search_takes_other_seeds_and_prints_the_best_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speedrun", "digits", "--search", "3", "--out", str(tmp_path)]) == 0
    done = rows(tmp_path)
    assert [row["seed"] for row in done] == [100, 100, 100, 101, 102]
    best = max(done[:3], key=lambda row: row["knn"])  # type: ignore[arg-type, return-value]
    assert {row["name"] for row in done[3:]} == {best["name"]}
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert f"search {result['options']}" == best["name"]


def test_budgets_from_one_trunk_are_compared_with_cosine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speedrun, "BUDGETS", (5, 10))
    command = ["speedrun", "digits", "--wsd", "--seeds", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    wsd, short, long = rows(tmp_path)
    assert (short["name"], long["name"], short["epochs"]) == ("cosine 10", "cosine 20", 10)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    branches: Any = wsd["knn"]
    for budget, branch, cosine in zip(("10", "20"), branches, (short, long)):
        assert result["points"][budget] == pytest.approx(
            100 * (branch - cosine["knn"][-1]), abs=1e-3
        )


@pytest.mark.parametrize(
    ("epochs", "cooldowns"),
    [(100, {40: 4, 60: 6, 80: 8, 100: 10}), (20, {8: 1, 12: 1, 16: 1, 20: 2})],
)
def test_budgets_are_parts_of_the_plain_recipe(epochs: int, cooldowns: dict[int, int]) -> None:
    assert speedrun._budgets(epochs) == cooldowns


def test_budgets_in_bf16_are_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def measured(config: Config, loop: object) -> dict[str, object]:
        seen.append(config.train.precision)
        return {"knn": [0.5], "cpu": [1.0]}

    def branches(task: object, path: str, seed: int, precision: str) -> dict[str, object]:
        seen.append(precision)
        return {"knn": [0.5, 0.5], "cpu": [1.0, 1.0]}

    monkeypatch.setattr(speedrun, "BUDGETS", (5, 10))
    monkeypatch.setattr(speedrun, "measured", measured)
    monkeypatch.setattr(speedrun, "_branches", branches)
    command = ["speedrun", "digits", "--wsd", "--seeds", "1", "--out", str(tmp_path)]
    for precision in ("fp32", "bf16"):
        assert main([*command, "--precision", precision]) == 0
    assert seen == ["fp32"] * 3 + ["bf16"] * 3
    assert [row["name"] for row in rows(tmp_path)[3:]] == [
        "wsd bf16",
        "cosine 10 bf16",
        "cosine 20 bf16",
    ]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_and_every_knob_can_be_trained(name: str) -> None:
    task = TASKS[name]
    config = task.config()
    settings.validate(config)
    for values in itertools.islice(itertools.product(*task.knobs.values()), 0, None, 7):
        settings.apply(config, {**task.budget, **dict(zip(task.knobs, values))})
        settings.validate(config)
    images = load_datasets(settings.load_recipe("digits").data, 0)
    config.data.loader = "auto"
    assert new_state(config, images, torch.device("cpu"), 0, 1).model.encoder_q is not None


def test_sides_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for command, message in (
        (["digits", "--sides", "slow"], "--sides"),
        (["digits", "--sides", "plain,fast"], "needs --fast"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(["speedrun", *command, "--out", str(tmp_path)])
