"""`benchmarks/compare_builds.py` at tiny sizes, with this checkout on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import compare_builds
import numpy as np
import pytest
import torch
from builds import quantities
from compare_builds import OLD, OURS, Folders, Quantity
from mocofast_bench import timing
from PIL import Image

from mocofast.data.shard_index import local_index
from mocofast.evaluate.knn import knn_accuracy

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
    monkeypatch.setattr(compare_builds, "quantities", lambda: iter([SPLIT]))
    out = tmp_path / "rows.jsonl"
    assert compare_builds.main([str(ROOT), "--turns", "2", "--out", str(out)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["quantity"], row["goal"], row["target"]) == ("split", "at most a minute", 60)
    assert (row["turns"], row["busy"], row["count"]) == (2, 0, 1_000)
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
    rate = SPLIT._replace(unit="images_per_second", against=OLD, target=0.3)
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
    keys = [(q.name, str(q.options), q.busy, q.pytorch, q.passive) for q in every]
    assert len(set(keys)) == len(keys)


def test_folders_hold_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"IMAGES": 7, "FILES": 1_100, "TARS": 2, "SAMPLES": 5}.items():
        monkeypatch.setattr(compare_builds, name, value)
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        image = tmp_path / "images" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_text(name)
    made = tmp_path / "made"
    made.mkdir()
    folders = Folders(tmp_path / "images", made)
    assert Folders(None, made).missing("many images")
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


def test_plain_knn_classifies_as_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 16, generator=generator) for n in (600, 700))
    labels, truth = (torch.randint(8, (n,), generator=generator) for n in (600, 700))
    expected = knn_accuracy(bank, labels, queries, truth)
    got = quantities.plain_knn(bank, labels, queries, truth)
    assert got == pytest.approx([expected.top1, expected.top5], abs=2e-3)
