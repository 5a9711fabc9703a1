"""`mocofast bench data` on small files: every loader is timed, the fastest settings are written."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mocofast_bench import band_peers, data, loops, timing, tune
from mocofast_bench.albumentations_pairs import why_not
from mocofast_bench.commands import main
from mocofast_bench.reference_loop import ReferenceLoader
from mocofast_bench.tensor_pairs import TensorPairs
from PIL import Image

from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.loaders import dali_missing
from mocofast.settings import ConfigError, load_recipe
from tests.pictures import files

BATCHES = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with just enough images for batches of 2."""
    for i in range(2 * (loops.WARM_UP_BATCHES + BATCHES)):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    return tmp_path


def options(folder: Path) -> list[str]:
    short = "--recipe cifar10_r18 --batch-size 2 --workers 1 --repeats 1 --seconds 0 --device cpu"
    return ["data", str(folder), *short.split()]


def test_the_row_has_the_rate_of_every_loader_relative_to_the_references(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = folder.parent / "data.png"
    assert main([*options(folder), "--batches", str(BATCHES), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])
    rates = row["pairs_per_second"]
    assert set(rates) == {"torchvision", "reference", "v2 tensors"} | (
        set() if dali_missing() else {"dali"}
    ) | (set() if why_not() else {"albumentations"})
    assert row["decode"] == "full"
    for name, rate in rates.items():
        assert rate > 0
        assert row["speedup"][name] == pytest.approx(rate / rates["reference"], rel=0.01)
        assert f"\n{name} " in out
    for field in ("time_to_first_batch", "cores", "extra_bytes"):
        assert set(row[field]) == set(rates)
    assert all(row["time_to_first_batch"][name] > 0 and row["cores"][name] > 0 for name in rates)
    assert (row["images"], row["size"], row["workers"]) == (16, 32, 1)


def test_too_few_images_are_an_error_that_says_how_many_are_needed(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"16 images make 8 batches of 2; 6 \+ 3 are needed"):
        main([*options(folder), "--batches", str(BATCHES + 1)])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_loader_includes_its_processes() -> None:
    """A batch takes 64 MB here, and a process of the loader holds 100 MB."""

    class Holding:
        def epoch(self, epoch: int) -> Iterator[torch.Tensor]:
            with multiprocessing.get_context("spawn").Manager() as manager:
                kept = manager.list()
                kept.append(bytes(100 * 2**20))
                for _ in range(loops.WARM_UP_BATCHES + 1):
                    yield torch.ones(16 * 2**20)

        def close(self) -> None: ...

    found = data.memory_of(loops.TimedLoop(Holding, lambda batch: None), 1, torch.device("cpu"))
    assert found is not None
    # The batch may reuse memory that earlier tests freed. The memory of the process cannot.
    assert found > 100 * 2**20
    assert timing.resident_memory(own=False) == 0  # the process has ended


def test_tuning_refuses_to_plot(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--plot shows the comparison, which --tune leaves out"):
        main([*options(folder), "--tune", "--plot", str(tmp_path / "data.png")])


def test_the_v2_tensors_are_views_of_the_images(folder: Path) -> None:
    """Turns off all random changes of colour and shape: the view is the image, resized."""
    augment = AugmentConfig(
        size=20, crop_scale=(1.0, 1.0), flip=0.0, jitter_p=0.0, gray=0.0, blur=0.0
    )
    pairs = TensorPairs(files(folder, labelled=False), augment)
    assert len(pairs) == 16
    view = pairs[3][0]
    with Image.open(folder / sorted(path.name for path in folder.iterdir())[3]) as image:
        expected = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR, box=(0, 0, 30, 40)))
    pixels = view * torch.tensor(augment.std).view(3, 1, 1) + torch.tensor(augment.mean).view(
        3, 1, 1
    )
    # The crop is (nearly) the whole image (aspect 3/4): the means agree. Means of other images
    # differ by 3.
    assert (255 * pixels.mean((1, 2)) - torch.tensor(expected.mean((0, 1)))).abs().max() < 1
    everything = AugmentConfig(size=20, rotate=10.0, blur=1.0)
    loader = ReferenceLoader(files(folder, labelled=False), everything, 4, 0, TensorPairs)
    batch = next(loader.epoch(0))
    assert [view.shape for view in batch] == [(4, 3, 20, 20)] * 2
    assert not torch.equal(*batch)


def test_tuning_takes_what_is_clearly_faster_option_by_option() -> None:
    """Invented speeds: 4 workers win clearly, prefetch 4 wins by less than noise, 1 loses."""
    speed = {"workers": {1: 50.0, 2: 100.0, 4: 150.0}, "prefetch": {1: 0.5, 2: 1.0, 4: 1.01}}
    seen = []

    def measure(candidates: list[DataConfig]) -> list[list[float]]:
        seen.append([(data.workers, data.prefetch) for data in candidates])
        return [
            [speed["workers"][d.workers] * speed["prefetch"][d.prefetch] * x for x in (0.9, 1, 3)]
            for d in candidates
        ]

    rows: list[dict[str, object]] = []
    stages: list[tuple[str, list[object]]] = [("workers", [1, 2, 4]), ("prefetch", [1, 2, 4])]
    best = tune.tune_loader(DataConfig(loader="dali", workers=2), stages, measure, rows)
    assert (best.workers, best.prefetch) == (4, 2)
    # Every option is tried with the best values so far.
    assert seen == [[(2, 2), (1, 2), (4, 2)], [(4, 2), (4, 1), (4, 4)]]
    assert [row.get("workers", row.get("prefetch")) for row in rows if row["best"]] == [4, 2]


def test_tuning_writes_a_recipe_that_pretrain_accepts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uses real loaders, with a batch for every measurement."""
    (folder / "0.jpg").write_bytes(b"no image")
    out = folder.parent / "tuned.yaml"
    assert main([*options(folder), "--batches", "1", "--tune", "--out", str(out)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    tuned, recipe = load_recipe(str(out)), load_recipe("cifar10_r18")
    best = {
        key: value
        for r in row["rows"]
        if r["best"] and r["loader"] == tuned.data.loader
        for key, value in r.items()
    }
    assert (tuned.data.workers, tuned.data.prefetch) == (best["workers"], best["prefetch"])
    assert (tuned.data.source, tuned.data.path) == ("folder", str(folder.resolve()))
    assert (tuned.model, tuned.augment, tuned.optim) == (recipe.model, recipe.augment, recipe.optim)
    assert tuned.data.batch_size == recipe.data.batch_size  # not --batch-size of the benchmark


def test_options_of_the_gpu_decoder_are_tuned_on_a_gpu_alone(folder: Path) -> None:
    source = files(folder, labelled=False)
    names = [
        [name for name, _ in tune._stages("dali", 4, source, torch.device(kind))]
        for kind in ("cpu", "cuda")
    ]
    assert names == [
        ["workers", "prefetch"],
        ["workers", "prefetch", "hw_decoder_load", "preallocate"],
    ]
    # (width, height)
    assert tune._stages("dali", 4, source, torch.device("cuda"))[-1][1] == [(30, 40)]
    assert tune._stages("torchvision", 1, source, torch.device("cuda"))[0] == ("workers", [1])


def test_images_of_13_bands_are_compared_with_the_peers_that_are_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tifffile")
    count = 2 * (loops.WARM_UP_BATCHES + BATCHES)
    words = [*options(tmp_path), "--make-geotiff", str(count), "--batches", str(BATCHES)]
    assert main(words) == 0
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])
    assert (row["images"], row["channels"], row["source"]) == (16, 13, "folder")
    assert {"torchvision", *row["absent"]} <= {*row["pairs_per_second"], *row["absent"]}
    assert {"torchgeo", "lightly-train"} <= {*row["pairs_per_second"], *row["absent"]}
    for name, reason in row["absent"].items():
        assert f"{name} left out: {reason}" in out
    assert row["pairs_per_second"]["torchvision"] > 0
    assert "reference" not in row["pairs_per_second"]


def test_the_bands_are_a_geotiff_of_13_bands_of_16_bits(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    band_peers.write_geotiffs(tmp_path, 2)
    with tifffile.TiffFile(tmp_path / "00001.tif") as file:
        assert file.is_geotiff
        pixels = file.asarray()
    assert (pixels.shape, pixels.dtype) == ((264, 264, 13), np.uint16)
    assert 4000 < pixels.mean() < 6000
