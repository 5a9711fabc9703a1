"""Positives from two files (`data.pairs`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocofast import cli
from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data.interface import BatchSlice, sample_view
from mocofast.data.loaders import build_loader, eval_batches
from mocofast.data.pairs import PairSource
from mocofast.data.sources import load_datasets
from mocofast.data.torchvision_loader import apply_view
from tests import runs

CPU = torch.device("cpu")
SIDE = 20
AUGMENT = AugmentConfig(size=12, jitter=(0.2, 0.2, 0.2, 0.0), gray=0.2, blur=0.3)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Writes 8 places of two classes with two dates, and a place with one date."""
    root = tmp_path / "places"
    for place in range(8):
        folder = root / "ab"[place % 2] / f"place{place}"
        folder.mkdir(parents=True)
        for date in range(2):
            picture(10 * place + date).save(folder / f"202{date}.png")
    alone = root / "a" / "alone"
    alone.mkdir()
    picture(99).save(alone / "2020.png")
    return root


@pytest.mark.parametrize("name", ["torchvision", "device", "dali"])
def test_the_views_of_a_pair_are_of_two_files(name: str, places: Path) -> None:
    data = DataConfig(path=str(places), pairs="folder", holdout=0.0, workers=0, loader=name)
    found = load_datasets(data)
    source = found.train
    assert isinstance(source, PairSource)
    assert len(source) == 8
    assert "1 folder with one file left out: a/alone" in found.lines()
    # Views of more than two take turns.
    loader = build_loader(source, data, (AUGMENT,) * 3, BatchSlice(8), 5, CPU)
    (batch,) = loader.epoch(2)
    for view, pixels in enumerate(batch.views):
        for i, got in zip(batch.index.tolist(), pixels.permute(0, 2, 3, 1).numpy()):
            file = Image.open(source.views[view % 2].load(i))  # type: ignore[arg-type]
            assert f"202{view % 2}" in file.filename  # type: ignore[attr-defined]
            params = sample_view(AUGMENT, (SIDE, SIDE), 5, 2, i, view)
            expected = np.asarray(apply_view(file, params, AUGMENT)).astype(int)
            error = np.abs(got - expected)
            assert error.max() <= (0 if name == "torchvision" else 6)
    assert batch.labels is not None
    for i, label in zip(batch.index.tolist(), batch.labels.tolist()):
        assert source.name(i).startswith("ab"[label])
    [(images, _, index)] = eval_batches(source, SIDE, 99, 0)
    for image, i in zip(images.permute(0, 2, 3, 1).numpy(), index.tolist()):
        first = Image.open(source.views[0].load(i))  # type: ignore[arg-type]
        np.testing.assert_array_equal(image, np.asarray(first))


@pytest.mark.parametrize("name", ["torchvision", "device", "dali"])
def test_a_pair_with_a_bad_file_is_replaced_as_a_whole(name: str, places: Path) -> None:
    (places / "a" / "place2" / "2021.png").write_bytes(b"\x89PNG\r\n\x1a\nbad")
    data = DataConfig(path=str(places), pairs="folder", holdout=0.0, workers=0, loader=name)
    source = load_datasets(data).train
    loader = build_loader(source, data, (AUGMENT, AUGMENT), BatchSlice(8), 5, CPU)
    (batch,) = loader.epoch(0)
    [bad] = loader.skipped
    assert source.name(bad) == "a/place2/2020.png + a/place2/2021.png"
    assert bad not in batch.index.tolist()
    assert batch.index.tolist().count(bad + 1) == 2


@pytest.mark.parametrize("decode", ["full", "scaled"])
def test_dali_shows_pairs_of_any_sizes_as_the_torchvision_loader(
    decode: str, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    for place in range(7):
        folder = tmp_path / f"place{place}"
        folder.mkdir()
        for date, size in enumerate(((130, 100), (90 + place, 150))):
            picture(10 * place + date).resize(size).save(folder / f"{date}.jpg", quality=95)
    whole = (tmp_path / "place4" / "1.jpg").read_bytes()
    (tmp_path / "place4" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    found = []
    for name in ("torchvision", "dali"):
        data = DataConfig(path=str(tmp_path), pairs="folder", labels="none", decode=decode)
        data.loader, data.workers = name, int(name == "dali")
        source = load_datasets(data).train
        loader = build_loader(source, data, (AUGMENT,) * 3, BatchSlice(3), 5, CPU)
        found.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch)])
        assert list(loader.skipped) == [4]
        loader.close()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.index, theirs.index)
        for a, b in zip(ours.views, theirs.views):
            assert (a.int() - b.int()).abs().float().mean() < 0.5


def test_held_out_pairs_share_no_file_with_the_training(places: Path) -> None:
    for date in (2, 3):
        picture(500 + date).save(places / "a" / "place0" / f"202{date}.png")
    found = load_datasets(DataConfig(path=str(places), pairs="folder", holdout=0.3), seed=3)
    assert found.val is not None and found.train.labels is not None
    assert found.val.labels is not None
    train = {part for i in range(len(found.train)) for part in found.train.name(i).split(" + ")}
    val = {found.val.name(i) for i in range(len(found.val))}
    assert val
    assert not {name.rpartition("/")[0] for name in train} & {n.rpartition("/")[0] for n in val}
    assert "18 files" not in found.note
    again = load_datasets(DataConfig(path=str(places), pairs="folder", holdout=0.3), seed=3)
    assert again.train.fingerprint() == found.train.fingerprint()


def test_a_list_names_the_pairs(places: Path, tmp_path: Path) -> None:
    rows = "".join(
        f"places/{'ab'[i % 2]}/place{i}/2020.png,places/{'ab'[j % 2]}/place{j}/2021.png\n"
        for i, j in ((0, 2), (1, 3), (4, 6), (5, 11))
    )
    (tmp_path / "pairs.csv").write_text(f"path,path_2\n{rows}")
    data = DataConfig(path=str(places), pairs=str(tmp_path / "pairs.csv"), holdout=0.0)
    found = load_datasets(data)
    assert [found.train.name(i) for i in range(len(found.train))] == [
        "a/place0/2020.png + a/place2/2021.png",
        "b/place1/2020.png + b/place3/2021.png",
        "a/place4/2020.png + a/place6/2021.png",
    ]
    assert "1 pair of" in found.lines()
    (tmp_path / "pairs.csv").write_text("path,other\na,b\n")
    with pytest.raises(ConfigError, match=r"data\.pairs: .* needs columns path and path_2"):
        load_datasets(data)


def test_what_cannot_be_paired_is_an_error(places: Path) -> None:
    for change, said in (
        ({"window": 8}, "data.pairs: files that give several images"),
        ({"group": "1"}, "data.group: data.pairs keeps"),
        ({"include": ("*2020*",)}, "data.pairs: 'folder' gives no pair of 9 files"),
    ):
        options = {"path": str(places), "pairs": "folder", **change}
        with pytest.raises(ConfigError, match=said):
            load_datasets(DataConfig(**options))  # type: ignore[arg-type]


def test_a_run_on_pairs_resumes_exactly(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *("pretrain", "digits", "--data.source", "folder", "--data.path", str(places)),
        *("--data.pairs", "folder", "--data.holdout", "0.3", "--model.arch", "resnet_tiny"),
        *("--augment.size", "16", "--data.batch_size", "3", "--data.workers", "0"),
        *("--knn.k", "3", "--knn.shots", "0", "--train.log_every", "1"),
    ]
    for out, steps in (("whole", "5"), ("parts", "3"), ("parts", "5")):
        resume = ("--train.dir", str(tmp_path / out), "--resume", "auto", "--train.max_steps")
        assert cli.main([*command, *resume, steps]) == 0, capsys.readouterr().err
    assert runs.metrics(tmp_path / "parts") == runs.metrics(tmp_path / "whole")
    assert cli.main(["knn", str(tmp_path / "whole"), "--knn.k", "3"]) == 0
