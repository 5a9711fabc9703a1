"""Files and folders that are no checkpoints: a line says what they are. Libraries write them."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor, nn

from mocofast import cli
from mocofast.config import ConfigError
from mocofast.interop.export import export
from mocofast.interop.reading import read_any
from mocofast.interop.reference_checkpoints import load_any
from mocofast.train.checkpoint import load_checkpoint
from tests.test_export import trained
from tests.test_faults import run

WEIGHTS: dict[str, Tensor] = {"weight": torch.ones(2, 3)}


def image(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("checkpoint.pth"))
    return file.getvalue()


def array(save: Callable[[io.BytesIO, Any], None]) -> bytes:
    file = io.BytesIO()
    save(file, np.ones(3))
    return file.getvalue()


def torch_saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def torch_script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


KINDS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "jpeg": ("photo.jpg", lambda: image("JPEG"), "a JPEG image"),
    "jpeg under another name": ("x.safetensors", lambda: image("JPEG"), "a JPEG image"),
    "png": ("photo.png", lambda: image("PNG"), "a PNG image"),
    "webp": ("photo.webp", lambda: image("WEBP"), "a WebP image"),
    "gzip": ("x.pth.gz", lambda: gzip.compress(torch_saved(WEIGHTS)), "a gzip file; unpack"),
    "tar": ("x.pth.tar", tar, "a tar archive; unpack"),
    "numpy": ("x.npy", lambda: array(np.save), "an array of NumPy"),
    "arrays": ("x.npz", lambda: array(np.savez), "arrays of NumPy"),
    "html": ("x.pth", lambda: b"\n<!DOCTYPE html>\n<html></html>", "an HTML page"),
    "lfs": (
        "x.pth",
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        "a pointer of Git LFS",
    ),
    "text": ("notes.txt", lambda: "Größe: 3\n".encode() * 99, "a text file"),
    "empty": ("x.pth", bytes, "an empty file"),
    "safetensors": ("x.pth", lambda: save(WEIGHTS), "a file of safetensors; end its name in"),
    "torch": ("x.safetensors", lambda: torch_saved(WEIGHTS), "a file of torch.save; end its"),
    "torchscript": ("x.pt", torch_script, "a TorchScript model"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_named_in_a_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, write, said = KINDS[name]
    path = tmp_path / file
    path.write_bytes(write())
    assert cli.main(["knn", str(path)]) == 2
    error = capsys.readouterr().err
    expected = f"mocofast knn: {path}: no checkpoint of PyTorch or safetensors, but {said}"
    assert error.startswith(expected) and error.count("\n") == 1


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_our_exported_graphs_are_named(format: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / {"onnx": "x.onnx", "torch_export": "x.pt2"}[format]
    export(trained("resnet_tiny", {"augment.size": 32}), format, path)
    with pytest.raises(ConfigError, match="name the checkpoint that it was exported from"):
        load_any(str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [pickle.dumps({"a": np.ones(3)}), bytes(4000)])
def test_pytorchs_advice_to_run_code_is_not_repeated(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a readable checkpoint") as error:
        load_any(str(path))
    assert "weights_only" not in str(error.value)


def test_checkpoints_of_all_formats_are_read(tmp_path: Path) -> None:
    content = {"args": argparse.Namespace(lr=0.1), "state_dict": WEIGHTS}
    for zipped in (True, False):
        path = tmp_path / "x.pth.tar"
        path.write_bytes(torch_saved(content, _use_new_zipfile_serialization=zipped))
        assert torch.equal(read_any(path)[0]["state_dict"]["weight"], WEIGHTS["weight"])
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    assert torch.equal(read_any(tmp_path / "x.safetensors")[0]["weight"], WEIGHTS["weight"])


def test_folders_that_are_no_run_folders_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, train__max_steps=1)

    def error_of(path: Path, read: Callable[[Path], Any] = read_any) -> str:
        with pytest.raises(FileNotFoundError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: no run folder (")
        return str(error.value)

    linear = folder / "linear"
    linear.mkdir()
    results = {"command": "linear", "checkpoint": "runs/old.pt", "figures": {}}
    (linear / "results.json").write_text(json.dumps(results))
    assert f"results of mocofast linear; name {folder})" in error_of(linear)
    shutil.copytree(linear, tmp_path / "old-linear")
    assert "results of mocofast linear; name runs/old.pt)" in error_of(tmp_path / "old-linear")
    assert f"the checkpoints of a run; name {folder})" in error_of(folder / "checkpoints")
    assert f"a folder of 1 run folder; name one: {folder})" in error_of(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert "expected a folder with checkpoints/" in error_of(other)
    (other / "results.json").write_text("[")
    assert "expected a folder with checkpoints/" in error_of(other)
    (other / "config.json").write_text('{"model_type": "resnet"}')
    save_file(WEIGHTS, other / "model.safetensors")
    assert "a folder of transformers" in error_of(other, load_checkpoint)
    # A run folder that lost its checkpoints is one.
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last\.pt"):
        read_any(folder)
