"""X-rays in DICOM, OME stacks and Sentinel-2-like scenes, from training to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mocofast import cli
from mocofast.config import AugmentConfig, DataConfig
from mocofast.data.interface import Batch, BatchSlice
from mocofast.data.loaders import build_loader
from mocofast.data.sources import load_datasets
from mocofast.interop.export import export
from tests import runs
from tests.field_files import dicom, geotiff
from tests.test_export import query_features, run

for library in ("pydicom", "tifffile", "rasterio"):
    pytest.importorskip(library, reason=f"{library} is not installed: see the extras in setup.py")

SIDE = 20
STEPS = 4


def texture(i: int, channels: int, side: int = SIDE) -> np.ndarray:
    """Returns shares (side, side, channels) in [0, 1]: bright images (class b) and dark ones."""
    rng = np.random.default_rng(i)
    coarse = np.kron(rng.random((5, 5, channels)), np.ones((side // 5, side // 5, 1)))
    return 0.3 * coarse + 0.05 + 0.6 * (i % 2)


def xray(path: Path, i: int) -> None:
    pixels = np.rint(4095 * texture(i, 1)[..., 0]).astype(np.uint16)
    meaning = "MONOCHROME1" if i % 4 > 1 else "MONOCHROME2"
    stored = 4095 - pixels if meaning == "MONOCHROME1" else pixels
    dicom(path.with_suffix(".dcm"), stored.astype(np.uint16), 12, PhotometricInterpretation=meaning)


def ome(path: Path, i: int) -> None:
    import tifffile

    planes = np.moveaxis(texture(i, 5), 2, 0)  # C, Y, X
    stack = np.stack([planes * share for share in (0.2, 1, 0.3)])  # Z, C, Y, X
    pixels = np.rint(65535 * stack).astype(np.uint16)
    tifffile.imwrite(path.with_suffix(".ome.tif"), pixels, metadata={"axes": "ZCYX"})


def scene(path: Path, i: int) -> None:
    geotiff(path.with_suffix(".tif"), np.rint(9000 * texture(i, 13, 40)).astype(np.uint16))


class Field(NamedTuple):
    """A kind of images."""

    write: Callable[[Path, int], None]
    channels: int
    options: tuple[str, ...]
    images: str  # words of the log


FIELDS = {
    "xray": Field(xray, 1, (), "18 images of 2 classes; 6 of them held out"),
    "ome": Field(ome, 5, (), "show page 2 of 3 (axis Z)"),
    "scene": Field(
        scene,
        13,
        ("--data.window", "20", "--data.range", "divide:10000"),
        "12 files give 48 images: windows of 20 pixels",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Writes 18 files of every kind in two classes."""
    found = {}
    for name, field in FIELDS.items():
        found[name] = tmp_path_factory.mktemp(name)
        for i in range(18):
            folder = found[name] / "ab"[i % 2]
            folder.mkdir(exist_ok=True)
            field.write(folder / str(i), i)
    return found


def arguments(name: str, images: Path, out: Path, loader: str = "auto") -> list[str]:
    field = FIELDS[name]
    return [
        *("pretrain", "digits", "--data.source", "folder", "--data.path", str(images)),
        *("--data.channels", str(field.channels), *field.options, "--data.holdout", "0.34"),
        *("--data.batch_size", "6", "--data.workers", "0", "--data.loader", loader),
        *("--augment.size", "16", "--augment.color_ops", "auto", "--augment.mean", "0.4"),
        *("--augment.std", "0.25", "--model.arch", "resnet_tiny", "--knn.k", "3"),
        *("--knn.shots", "0", "--train.log_every", "1", "--train.dir", str(out)),
        *("--train.device", "cpu", "--model.queue_size", "12"),
    ]


def limit(steps: int) -> tuple[str, ...]:
    return "--train.max_steps", str(steps), "--resume", "auto"


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_trains_resumes_exactly_and_is_evaluated_and_exported(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main([*arguments(name, folders[name], whole), *limit(STEPS)]) == 0
    out = capsys.readouterr().out
    assert FIELDS[name].images in out
    for steps in (1, STEPS):
        assert cli.main([*arguments(name, folders[name], parts), *limit(steps)]) == 0
    runs.assert_same_run(parts, whole)
    assert not (whole / "skipped.jsonl").exists()
    if name == "xray":  # the loaders show equal levels
        dali = tmp_path / "dali"
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        assert cli.main([*arguments(name, folders[name], dali, "dali"), *limit(STEPS)]) == 0
        assert runs.metrics(dali) == runs.metrics(whole)

    def figure(command: str, *words: str) -> float:
        capsys.readouterr()
        assert cli.main([command, str(whole), *words]) == 0
        lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
        return float(lines[f"{command}_top1"])

    assert figure("knn", "--knn.k", "3", "--knn.shots", "0") == 1.0  # bright or dark
    assert figure("linear") == 1.0
    figure("finetune", "--finetune.epochs", "1", "--finetune.batch_size", "6")
    file = tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(whole), "--format", "torchvision", str(file)]) == 0
    checkpoint = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)
    images = torch.randn(2, FIELDS[name].channels, 16, 16)
    with torch.no_grad():
        features = run(export(checkpoint, "torchvision", file).how_to_load)(images)
    assert torch.equal(features, query_features(checkpoint, images))


@pytest.mark.parametrize("name", FIELDS)
def test_two_ranks_see_the_batches_of_one_process(name: str, folders: dict[str, Path]) -> None:
    field = FIELDS[name]
    values = dict(zip(field.options[::2], field.options[1::2]))
    data = DataConfig(
        path=str(folders[name]),
        channels=field.channels,
        workers=0,
        loader="torchvision",
        window=int(values.get("--data.window", 0)),
        range=values.get("--data.range", "auto"),
    )
    augment = AugmentConfig(size=16, color_ops="auto")

    def batch(rank: int, ranks: int) -> Batch:
        source = load_datasets(data, seed=1).train  # every process finds the images itself
        loader = build_loader(
            source, data, (augment, augment), BatchSlice(8, rank, ranks), 5, torch.device("cpu")
        )
        return next(iter(loader.epoch(1, start=1)))

    whole, parts = batch(0, 1), [batch(rank, 2) for rank in range(2)]
    assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
    for view, *halves in zip(whole.views, *(part.views for part in parts)):
        assert torch.equal(view, torch.cat(halves))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_two_processes_resume_exactly(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.torchrun(2, *arguments(name, folders[name], whole), *limit(STEPS))
    for steps in (1, STEPS):
        runs.torchrun(2, *arguments(name, folders[name], parts), *limit(steps))
    runs.assert_same_run(parts, whole)
