"""`benchmarks/compare_builds.py` at tiny sizes, with this checkout on both sides."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare_builds
import numpy as np
import pytest
import torch
from builds import goals, quantities
from compare_builds import OLD, OURS, Folders, Quantity
from mocofast_bench import timing, views_ahead
from PIL import Image

from mocofast import memory
from mocofast.config import Config
from mocofast.data.device_loader import DeviceLoader
from mocofast.data.interface import BatchSlice, view_augments
from mocofast.data.shard_index import local_index
from mocofast.data.sources import load_datasets
from mocofast.evaluate.knn import knn_accuracy
from mocofast.settings import apply, load_recipe
from tests.pictures import jpeg

ROOT = Path(__file__).parent.parent
SPLIT = Quantity(
    "split",
    {"count": 1_000, "classes": 10, "shuffled": True, "repeats": 1},
    "cpu_seconds",
    "at most a minute",
    60.0,
    against="",
)


def test_a_row_holds_both_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, str]] = []
    neighbours = timing.busy_neighbours

    def begin(count: int, program: str) -> Any:
        begun.append((count, program))
        return neighbours(count, program)

    monkeypatch.setattr(timing, "busy_neighbours", begin)
    monkeypatch.setattr(compare_builds, "quantities", lambda: iter([SPLIT._replace(light=1)]))
    out = tmp_path / "rows.jsonl"
    assert compare_builds.main([str(ROOT), "--turns", "2", "--out", str(out)]) == 0
    assert sorted(begun) == [(0, timing.BUSY), (1, timing.LIGHT)]
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["quantity"], row["goal"], row["target"]) == ("split", "at most a minute", 60)
    assert (row["turns"], row["busy"], row["light"], row["count"]) == (2, 0, 1, 1_000)
    assert row["commits"] == dict.fromkeys((OLD, OURS), timing.commit_of(ROOT))
    assert set(row["cpu_seconds"]) == set(row["quartiles"]) == {OLD, OURS}
    for side, seconds in row["cpu_seconds"].items():
        low, high = row["quartiles"][side]
        assert 0 < low <= seconds <= high < 60
    assert set(row["ratios"]) == {OLD}
    assert row["met"]


def test_a_quantity_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = SPLIT._replace(options={"unknown": 1})
    monkeypatch.setattr(compare_builds, "quantities", lambda: iter([broken, SPLIT]))
    out = tmp_path / "rows.jsonl"
    assert compare_builds.main([str(ROOT), "--turns", "1", "--out", str(out)]) == 1
    assert "split failed" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 1


def test_ratios_above_1_are_better_for_times_and_for_rates() -> None:
    samples = {OLD: [6.0, 9.0, 4.0], OURS: [2.0, 2.0, 2.0]}
    times = compare_builds.results(SPLIT._replace(against=OLD, target=3.5), samples)
    assert times["ratios"] == {OLD: 3.0}  # the median of 3, 4.5 and 2
    assert times["cpu_seconds"] == {OLD: 6.0, OURS: 2.0}
    assert times["quartiles"][OLD] == [5.0, 7.5]
    assert not times["met"]
    for unit in compare_builds.RATES:
        rate = SPLIT._replace(unit=unit, against=OLD, target=0.3)
        found = compare_builds.results(rate, samples)
        assert found["ratios"] == {OLD: 0.333}
        assert found["met"]


def test_the_process_of_another_build_is_an_error(tmp_path: Path) -> None:
    variables = compare_builds.environment(ROOT, tmp_path, passive=False)
    with pytest.raises(RuntimeError, match="instead of"):
        compare_builds.in_build(tmp_path, "split", SPLIT.options, variables)


def test_runs_are_of_the_build_wherever_the_script_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mocofast").mkdir()
    (tmp_path / "mocofast" / "__init__.py").write_text("raise ImportError('another build')")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(72):
        file = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    options = {"folder": str(tmp_path / "images"), "size": 16}
    variables = compare_builds.environment(ROOT, tmp_path / "cache", passive=False)
    times = compare_builds.in_build(ROOT, "first_step", options, variables)
    assert 1 < times["mocofast"] < 300  # the import of PyTorch alone takes more than a second
    rates = compare_builds.in_build(ROOT, "pretrain", options | {"steps": 2, "every": 1}, variables)
    assert 0 < rates["mocofast"] < 1e5
    files = {"folder": options["folder"], "recipe": "cifar10_r18", "batch": 8, "seconds": 0.01}
    for decode in ("full", "scaled"):
        own = {"decode": decode, "changes": {"hed": 0.05}}
        pairs = compare_builds.in_build(ROOT, "loader", files | own, variables)
        assert 1 < pairs["mocofast"] < 1e5


def test_a_first_step_is_of_the_network_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = []

    def to_first_step(command: list[str], metrics: Path) -> float:
        assert command[1:4] == ["-m", "mocofast", "pretrain"]
        flags = command[5:]
        config = load_recipe(command[4])
        apply(config, {name[2:]: value for name, value in zip(flags[::2], flags[1::2])})
        assert Path(config.train.dir) == metrics.parent
        configs.append(config)
        return 1.0

    monkeypatch.setattr(quantities, "_to_first_step", to_first_step)
    for own in ({}, {"arch": "resnet50"}, {"recipe": "cifar10_r18"}):
        assert quantities.first_step(folder="images", size=32, **own) == {"mocofast": 1.0}
    models = [config.model for config in configs]
    assert [model.arch for model in models] == ["resnet18", "resnet50", "resnet18_cifar"]
    assert [model.bn_splits for model in models] == [1, 1, 8]
    assert [config.data.batch_size for config in configs] == [32, 32, 512]
    for config in configs:
        assert (config.data.source, config.data.path) == ("folder", "images")
        assert (config.augment.size, config.train.log_every) == (32, 1)
        assert config.knn.start_limit == 5  # the default: kNN may end early


def test_cold_calls_are_asked_of_this_build_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def interleaved(calls: dict[str, Any], repeats: int, device: Any, **how: Any) -> Any:
        for call in calls.values():
            call()
        asked.append({"sides": set(calls), "repeats": repeats, **how})
        return dict.fromkeys(calls, timing.Timing(0.5, 0.5, 0.5))

    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(quantities, "shapes", lambda arch: [(3, 4)])
    plain, cold = {"arch": "", "threads": 1, "repeats": 3}, {"cold": True}
    for options in (plain, plain | cold):
        values = quantities.ema(**options)
        assert values == {"mocofast": 500.0, "foreach_lerp": 500.0}
        values = quantities.optimizer(name="sgd", copies=True, **options)
        assert values == {"mocofast": 500.0, "fused, lerp": 500.0}
    # `interleaved` of old builds has no `cold`
    assert [{key: a[key] for key in a if key != "sides"} for a in asked] == [
        *2 * [{"repeats": 3}],
        *2 * [{"repeats": 3, "cold": True}],
    ]
    every = [q for q in goals.quantities() if q.name in ("ema", "optimizer") and not q.busy]
    for name, count in (("ema", 6), ("optimizer", 24)):
        of_name = [q for q in every if q.name == name]
        colds = [q for q in of_name if q.options.get("cold")]
        assert (len(colds), len(of_name)) == (count, 2 * count)
        assert all(q.builds == (OURS,) and q.target == 1.0 for q in colds)


def test_decoders_are_timed_on_equal_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = pytest.importorskip("mocofast_bench.decoders", reason="needs DALI")
    monkeypatch.setattr(decoders, "BATCH", 3)
    for number in range(7):  # the last batch holds one
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    Image.new("L", (20, 15), 90).save(tmp_path / "gray.jpg")
    values = quantities.decoder(str(tmp_path), repeats=2)
    assert {"mocofast", "DALI", "torchvision", "PIL"} <= set(values)
    assert all(0 < value < 1000 for value in values.values())

    files = [jpeg(number) for number in range(7)]
    sides = decoders.build_sides(files)
    for decoder in sides.values():
        for _ in range(2):  # a round begins with the first file
            decoder.decode()
            for got, file in zip(decoder.pixels(), files, strict=True):
                with Image.open(io.BytesIO(file)) as image:
                    assert np.abs(got - np.asarray(image).astype(int)).max() <= 2
    for side, levels in (("mocofast", 1), ("torchvision", 3)):
        off = [pixels ^ np.uint8(levels) for pixels in sides["PIL"].pixels()]
        wrong = {**sides, side: sides[side]._replace(pixels=lambda off=off: iter(off))}
        with pytest.raises(RuntimeError, match=f"{side} decodes file 0 to other pixels"):
            decoders.check_equal(files, wrong)


def test_the_demo_runs_quiet_and_beside_busy_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[int] = []
    commands: list[list[str]] = []

    @contextlib.contextmanager
    def neighbours(count: int) -> Iterator[None]:
        beside.append(count)
        yield

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        time.sleep(0.02 * (1 + beside[-1]))

    monkeypatch.setattr(timing, "busy_neighbours", neighbours)
    monkeypatch.setattr(subprocess, "run", run)
    seconds = quantities.demo(2)
    assert 0.02 <= seconds["quiet"] < seconds["mocofast"]
    assert seconds["mocofast"] >= 0.06
    assert beside == [0, 2]
    assert all(
        command[1:5] == ["-m", "mocofast", "pretrain", "--train.dir"] for command in commands
    )


def test_views_of_epochs_made_together_are_those_of_the_loader() -> None:
    config = load_recipe("digits")
    sides = views_ahead.build_sides(config, 2)
    source, augments = load_datasets(config.data).train, view_augments(config.augment, 2)
    loader = DeviceLoader(source, augments, BatchSlice(128), config.train.seed, torch.device("cpu"))
    batches = [batch.views for batch in loader.epoch(0)]
    for views, ahead in zip(zip(*batches), sides.ahead(), strict=True):
        assert len(ahead) == 2 * 128 * len(batches)  # the second epoch is as long
        first = ahead[: len(ahead) // 2].permute(0, 3, 1, 2)
        torch.testing.assert_close(torch.cat(views), first, rtol=0, atol=0)


def test_a_gain_of_views_ahead_is_what_their_epoch_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[Config, int]] = []
    sides = views_ahead.Sides(lambda: None, lambda: None, list)

    def build(config: Config, epochs: int) -> views_ahead.Sides:
        built.append((config, epochs))
        return sides

    def medians(calls: dict[str, Any], repeats: int) -> dict[str, float]:
        assert (calls, repeats) == (sides._asdict(), 5)
        return {"epoch": 0.1, "views": 0.02, "ahead": 0.06}  # seconds, of 4 epochs together

    monkeypatch.setattr(views_ahead, "build_sides", build)
    monkeypatch.setattr(timing, "cpu_medians", medians)
    monkeypatch.setattr(memory, "keep_freed", lambda: None)
    values = quantities.views_ahead(epochs=4, repeats=5)
    expected = {"mocofast": 100, "with views ahead": 95, "views": 20, "views ahead": 15}
    assert values == pytest.approx(expected)
    assert built == [(load_recipe("digits"), 4)]
    found = compare_builds.results(
        next(q for q in goals.quantities() if q.name == "views_ahead"),
        {OURS: [100.0], "with views ahead": [95.0]},
    )
    assert not found["met"]  # a gain of 5 %


def test_choices_of_the_user_do_not_reach_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in compare_builds.environment(ROOT, tmp_path, passive=False)
    passive = compare_builds.environment(ROOT, tmp_path, passive=True)
    assert passive["OMP_WAIT_POLICY"] == "passive"


def test_quantities_name_functions_and_take_their_options() -> None:
    every = list(compare_builds.quantities())
    assert {quantity.name for quantity in every} == set(quantities.QUANTITIES)
    keys = [(q.name, str(q.options), q.busy, q.pytorch, q.light, q.passive) for q in every]
    assert len(set(keys)) == len(keys)


def test_folders_hold_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"IMAGES": 7, "FILES": 1_100, "TARS": 2, "SAMPLES": 5}
    for name, value in (*sizes.items(), ("LARGE", 2), ("LARGE_SIZE", (40, 30))):
        monkeypatch.setattr(compare_builds, name, value)
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        image = tmp_path / "images" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text(name)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, gray in enumerate((10, 250, 90)):
        Image.new("L", (20, 15), gray).save(photos / f"{number}.jpg")
    made = tmp_path / "made"
    made.mkdir()
    folders = Folders(tmp_path / "images", photos, made)
    assert not any(map(folders.missing, ("", "images", "many images", "photos", "large photos")))
    none = Folders(None, None, made)
    assert [none.missing(name) for name in ("images", "many images")] == ["--images"] * 2
    assert [none.missing(name) for name in ("photos", "large photos")] == ["--photos"] * 2
    assert not any(map(none.missing, ("", "files", "tars")))
    enlarged = sorted(folders.path("large photos").iterdir())
    for file, level in zip(enlarged, (10, 250), strict=True):
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((40, 30), "RGB")
            assert np.asarray(image).mean() == pytest.approx(level, abs=2)
    linked = sorted(file for file in folders.path("many images").rglob("*.png"))
    assert [file.parent.name for file in linked] == ["cat"] * 5 + ["dog"] * 2
    assert linked[-1].read_text() == "dog/3.png"
    files = list(folders.path("files").glob("train/*/*.jpg"))
    assert (len(files), len({file.parent for file in files})) == (1_100, 2)
    shards = sorted(folders.path("tars").iterdir())
    for shard in shards:
        index = local_index(shard)
        assert len(index.keys) == 5
        assert index.members.label_names[index.labels].tolist() == [b"0", b"1", b"2", b"3", b"4"]
    assert len(shards) == 2


def test_both_attentions_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, torch.Tensor] = {}

    def called(calls: dict[str, Any], repeats: int) -> dict[str, float]:
        losses.update({side: call() for side, call in calls.items()})
        return dict.fromkeys(calls, float(repeats))

    monkeypatch.setattr(quantities, "_milliseconds", called)
    for bf16, error in ((False, 1e-5), (True, 2e-2)):
        options = {"size": 16, "batch": 2, "bf16": bf16, "threads": 1, "repeats": 3}
        values = quantities.attention("vit_micro_cifar", **options)
        assert values == {"mocofast": 3, "torchvision": 3}
        torch.testing.assert_close(*losses.values(), rtol=error, atol=0)


def test_plain_knn_classifies_as_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 16, generator=generator) for n in (600, 700))
    labels, truth = (torch.randint(8, (n,), generator=generator) for n in (600, 700))
    expected = knn_accuracy(bank, labels, queries, truth)
    got = quantities.plain_knn(bank, labels, queries, truth)
    assert got == pytest.approx([expected.top1, expected.top5], abs=2e-3)
