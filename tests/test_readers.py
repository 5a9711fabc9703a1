"""Functions of the user that read files (`data.reader`), bands, and arrays of numpy."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mocofast import cli
from mocofast.config import AugmentConfig, ConfigError, DataConfig
from mocofast.data.arrays import central_view, read_numbers
from mocofast.data.decoding import decode, read_header
from mocofast.data.interface import BatchSlice
from mocofast.data.loaders import build_loader, dali_missing, eval_batches
from mocofast.data.prepare import PrepareConfig, prepare
from mocofast.data.sources import load_datasets
from mocofast.data.statistics import StatsConfig, measure
from tests import runs

CPU = torch.device("cpu")
LOADERS = ("torchvision", "device") if dali_missing() else ("torchvision", "dali", "device")
SIDE = 24
WHOLE = AugmentConfig(size=SIDE, crop_scale=(1.0, 1.0), jitter=(0.0,) * 4, gray=0.0, flip=0.0)

MODULE = """
import io
import numpy as np

def raw(file):
    content = file if isinstance(file, bytes) else open(file, "rb").read()
    head, _, body = content.partition(b"\\n")
    if head.count(b" ") != 2:
        raise KeyError("no header")
    return np.frombuffer(body, np.uint16).reshape(tuple(map(int, head.split())))

def doubled(file):
    return raw(file).astype(np.float64) * 2

def flat(file):
    return np.zeros(7)

not_callable = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_files").mkdir()
    (tmp_path / "my_files" / "reads.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    # The module of the test before, from another folder
    for name in ("my_files", "my_files.reads"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)


def picture(i: int, channels: int = 5) -> np.ndarray:
    """Returns numbers (SIDE, SIDE, channels) uint16, which tell image and channel."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    planes = [1000 * i + 300 * c + 20 * y + 5 * x for c in range(channels)]
    return np.stack(planes, axis=2).astype(np.uint16)


def raw(image: np.ndarray) -> bytes:
    return " ".join(map(str, image.shape)).encode() + b"\n" + image.tobytes()


def npy(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def npz(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mask=np.zeros(3), image=image)
    return buffer.getvalue()


def write(root: Path, source: str, files: dict[str, bytes]) -> str:
    """Writes files as a source. Returns the value of data.path."""
    root.mkdir(exist_ok=True)
    if source == "zip":
        with zipfile.ZipFile(root / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return str(root / "set.zip")
    if source == "shards":
        with tarfile.open(root / "a.tar", "w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                label = tarfile.TarInfo(f"{name.rpartition('.')[0]}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"0" if name < "b" else b"1"))
        return str(root)
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(content)
    if source == "list":
        rows = "".join(f"{name},{name[0]}\n" for name in files)
        (root / "list.csv").write_text(f"path,label\n{rows}")
        return str(root / "list.csv")
    return str(root)


def shown(data: DataConfig, name: str) -> dict[int, np.ndarray]:
    """Returns the whole images that a loader shows, {index: (SIDE, SIDE, C)}."""
    source = load_datasets(data).train
    data.loader, data.workers = name, 1
    loader = build_loader(source, data, (WHOLE,), BatchSlice(len(source)), 0, CPU)
    (batch,) = loader.epoch(0)
    loader.close()
    views = batch.views[0].permute(0, 2, 3, 1).numpy()
    return dict(zip(batch.index.tolist(), views))


@pytest.mark.parametrize("source", ["folder", "list", "zip", "shards"])
@pytest.mark.parametrize("kind", ["function", "npy", "npz"])
def test_every_loader_and_the_evaluation_show_the_numbers(
    source: str, kind: str, tmp_path: Path
) -> None:
    """Five channels of 16 bits, from every source."""
    pictures = {f"{'ab'[i % 2]}/{i}": picture(i) for i in range(4)}
    write_one, end = {"function": (raw, "bin"), "npy": (npy, "npy"), "npz": (npz, "npz")}[kind]
    files = {f"{name}.{end}": write_one(image) for name, image in pictures.items()}
    path = write(tmp_path / "set", source, files)
    data = DataConfig(source=source, path=path, channels=5, holdout=0.0)
    data.reader = "my_files.reads:raw" if kind == "function" else "auto"
    images = load_datasets(data).train
    assert images.classes in (("a", "b"), ("0", "1"))
    names = [images.name(i).removeprefix("a.tar:").removesuffix(f".{end}") for i in range(4)]
    expected = {i: pictures[name] for i, name in enumerate(names)}
    for name in LOADERS:
        found = shown(data, name)
        assert {i: np.array_equal(found[i], expected[i]) for i in found} == dict.fromkeys(
            range(4), True
        )
    [(evaluated, _, index)] = eval_batches(images, 16, 9, 1, CPU, 5)
    for image, i in zip(evaluated.permute(0, 2, 3, 1).numpy(), index.tolist()):
        np.testing.assert_array_equal(image, central_view(expected[i], 16))


def test_errors_name_the_file_and_the_function(tmp_path: Path) -> None:
    files = {f"{i}.bin": raw(picture(i)) for i in range(3)} | {"notes.txt": b"text"}
    path = write(tmp_path / "set", "folder", files)
    source = load_datasets(DataConfig(path=path, channels=5, reader="my_files.reads:raw")).train
    for name in LOADERS:
        data = DataConfig(loader=name, channels=5, workers=1)
        loader = build_loader(source, data, (WHOLE,), BatchSlice(4), 0, CPU)
        next(iter(loader.epoch(0)))
        loader.close()
        reasons = {source.name(i): reason for i, reason in loader.skipped.items()}
        assert reasons == {
            "notes.txt": "ReaderError: my_files.reads:raw raised KeyError: 'no header'"
        }
    flat = load_datasets(DataConfig(path=path, reader="my_files.reads:flat")).train
    with pytest.raises(ValueError, match=r"my_files\.reads:flat returned \(7,\) float64, expected"):
        flat.load(0).pixels(3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        ("my_files.nowhere:raw", "there is no module 'my_files.nowhere'"),
        ("my_files.reads:nothing", "does not define nothing"),
        ("my_files.reads:not_callable", "is no function, but of type int"),
    ],
)
def test_a_function_that_is_not_there_is_an_error(reader: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "set", "folder", {"0.bin": raw(picture(0))})
    with pytest.raises(ConfigError, match=rf"^data\.reader: .*{said}"):
        load_datasets(DataConfig(path=path, reader=reader))


def test_bands_are_read_in_their_order_from_every_kind(tmp_path: Path) -> None:
    files = {"0.npy": npy(picture(0)), "1.npz": npz(picture(1).transpose(2, 0, 1))}
    data = DataConfig(path=write(tmp_path / "set", "folder", files), bands=(4, 3, 2))
    data.range = "dtype"
    for name in LOADERS:
        found = shown(data, name)
        for i, image in found.items():
            expected = (picture(i)[..., [3, 2, 1]] * 255.0 / 65535 + 0.5).astype(np.uint8)
            assert np.abs(image.astype(int) - expected).max() <= 1
    with pytest.raises(ConfigError, match=r"data\.bands: 2 bands for data\.channels=3; --data"):
        load_datasets(DataConfig(path=data.path, bands=(1, 2)))
    wrong = load_datasets(DataConfig(path=data.path, bands=(1, 2, 6))).train
    with pytest.raises(ValueError, match=r"has 5 channels, data\.bands names 6"):
        wrong.load(0).pixels(3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "wanted", "read", "remark"),
    [
        ((30, 31, 4), 3, slice(0, 3), "channels 1 to 3 of 4 (data.channels=4 reads all)"),
        ((13, 30, 31), 5, slice(0, 5), "channels 1 to 5 of 13 (data.channels=13 reads all)"),
        ((30, 31, 13), 1, slice(0, 1), "channel 1 of 13 (data.channels=13 reads all)"),
        ((30, 31, 2), 3, [0, 0, 0], "channel 1 of 2 (data.channels=2 reads all)"),
        ((30, 31, 5), 5, slice(0, 5), ""),
    ],
)
def test_first_channels_of_arrays_are_read(
    shape: tuple[int, ...], wanted: int, read: slice | list[int], remark: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "a.npy")
    values = np.random.default_rng(0).integers(0, 60_000, shape).astype(np.uint16)
    np.save(path, values)
    last = values.transpose(1, 2, 0) if shape[0] == 13 else values
    np.testing.assert_array_equal(read_numbers(path, wanted).values, last[..., read])
    assert read_header(path, wanted) == (30, 31, "NPY", False, True, remark)


@pytest.mark.parametrize("shape", [(), (7,), (8, 9), (30, 31, 32), (2, 3, 4, 5)])
def test_arrays_that_are_no_images_are_errors(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=r"pixels must be \(H, W, 5\) or \(5, H, W\)"):
        read_numbers(str(tmp_path / "a.npy"), 5)


def test_prepare_and_stats_call_the_function(tmp_path: Path) -> None:
    files = {f"{i}.bin": raw(picture(i, 3)) for i in range(3)}
    path = write(tmp_path / "set", "folder", files)
    values = np.stack([picture(i, 3) for i in range(3)]).reshape(-1, 3) * 2.0
    options = StatsConfig(reader="my_files.reads:doubled", range="0,20000", workers=1)
    found = measure(path, options)
    np.testing.assert_allclose(found.mean, values.mean(0) / 20000, atol=1e-4)
    out = tmp_path / "out"
    prepare(path, str(out), PrepareConfig(reader="my_files.reads:doubled", range="0,20000"))
    stored = load_datasets(DataConfig(source="shards", path=str(out))).train
    for i in range(3):
        expected = np.floor(picture(int(stored.name(i)[-1]), 3) * 2.0 / 20000 * 255 + 0.5)
        np.testing.assert_array_equal(np.asarray(decode(stored.load(i))), expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plane", "up"), "--plane: expected one of axial, coronal, sagittal, got 'up'"),
        (("--bands", "0"), "--bands: expected numbers of channels, from 1, got '0'"),
        (("--reader", "my_files"), "--reader: expected auto, any or package.module:function"),
    ],
)
def test_flags_of_stats_are_checked(
    words: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["stats", str(tmp_path), *words])
    assert said in capsys.readouterr().err


def test_a_run_with_a_function_resumes_exactly_from_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{'ab'[i % 2]}{i}.bin": raw(picture(i)) for i in range(16)}
    path = write(tmp_path / "set", "shards", files)
    command = [
        *("pretrain", "digits", "--data.source", "shards", "--data.path", path, "--data.channels"),
        *("5", "--data.reader", "my_files.reads:doubled", "--model.arch", "resnet_tiny"),
        *("--augment.size", "16", "--augment.color_ops", "auto", "--data.batch_size", "4"),
        *("--augment.mean", "0.5", "--augment.std", "0.25"),
        *("--data.workers", "0", "--knn.k", "3", "--train.log_every", "1"),
    ]
    for out, steps in (("whole", "5"), ("parts", "2"), ("parts", "5")):
        resume = ("--train.dir", str(tmp_path / out), "--resume", "auto", "--train.max_steps")
        assert cli.main([*command, *resume, steps]) == 0, capsys.readouterr().err
    assert runs.metrics(tmp_path / "parts") == runs.metrics(tmp_path / "whole")
