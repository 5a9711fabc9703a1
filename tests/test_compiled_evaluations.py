"""Evaluations on a CPU compute convolutions in C, and save plain tensors."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mocofast_kernels import cpu_convolution
from torch import Tensor, nn

import mocofast
from mocofast import cli
from mocofast.evaluate import features, finetune, linear
from mocofast.evaluate.monitor import KNNMonitor
from mocofast.evaluate.options import FinetuneConfig, LinearConfig
from mocofast.interop import predicting
from mocofast.interop.classifiers import FILE
from mocofast.methods.moco import MoCo
from mocofast.models import batch_norm, convolutions
from mocofast.models.encoders import build_encoder
from tests import runs
from tests.test_cli import call
from tests.test_evaluate import CPU, MEAN, STD, batches_of, bright_datasets, tiny_encoder

pytestmark = pytest.mark.skipif(
    not cpu_convolution.convolves(torch.float32), reason="no AVX-512, or not compiled"
)

LAYERS = 8  # convolutions of resnet_tiny in C, all but the first
IMAGES, HELD = 60, 18


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on small JPEG files of two classes."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    images = runs.make_images(tmp_path_factory.mktemp("images"), IMAGES)
    status = cli.main(
        [
            *("pretrain", "digits", "--data.source", "folder", "--data.path", str(images)),
            *("--data.workers", "0", "--data.batch_size", "16", "--train.dir", str(folder)),
            *("--augment.size", "16", "--data.holdout", str(HELD / IMAGES)),
            *("--train.max_steps", "2", "--knn.every", "0", "--knn.start", "false"),
        ]
    )
    assert status == 0
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Returns how often the library computes, {name of the function: calls}."""
    found = dict.fromkeys(("forward", "weight_gradient"), 0)

    def counting(name: str) -> Any:
        real = getattr(cpu_convolution, name)

        def counted(*given: Any) -> Tensor:
            found[name] += 1
            result: Tensor = real(*given)
            return result

        return counted

    for name in found:
        monkeypatch.setattr(cpu_convolution, name, counting(name))
    return found


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside the block evaluations compute without the library."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (features, finetune, linear, predicting):
            patch.setattr(module, "compiled_convolutions", lambda _: contextlib.nullcontext())
        yield


def tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors_in(value)


def check_file(path: Path) -> dict[str, Any]:
    """Returns the content of a file, which must hold plain, contiguous tensors."""
    content: dict[str, Any] = torch.load(path, weights_only=True)  # refuses classes of mocofast
    found = list(tensors_in(content))
    assert any(tensor.dim() == 4 for tensor in found)
    assert all(type(tensor) is Tensor and tensor.is_contiguous() for tensor in found)
    return content


EPOCHS, BATCH = 2, 21  # of 42 images


@pytest.mark.parametrize(
    ("command", "options", "batches", "steps"),
    [
        ("knn", ("--knn.k", "5"), 2, 0),
        ("linear", (), 2, 0),
        ("linear", ("--linear.protocol", "reference", "--linear.epochs", "3"), 1 + 3, 0),
        (
            "finetune",
            ("--finetune.epochs", str(EPOCHS), "--finetune.batch_size", str(BATCH)),
            EPOCHS * 2 + 1,
            EPOCHS * 2,
        ),
    ],
)
def test_commands_convolve_in_c_and_save_plain_tensors(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    counts: dict[str, int],
    tmp_path: Path,
    command: str,
    options: tuple[str, ...],
    batches: int,
    steps: int,
) -> None:
    """batches: of training and held-out images, or one of them. steps: of training."""
    status, _, err = call(capsys, command, str(run), *options, "--dir", str(tmp_path))
    assert status == 0, err
    assert counts == {"forward": LAYERS * batches, "weight_gradient": LAYERS * steps}
    content = check_file(tmp_path / FILE)
    with plain():
        status, _, err = call(capsys, command, str(run), *options, "--dir", str(tmp_path / "b"))
    assert status == 0, err
    assert counts["forward"] == LAYERS * batches
    expected = check_file(tmp_path / "b" / FILE)
    assert content["encoder"].keys() == expected["encoder"].keys()
    for name, value in content["encoder"].items():
        torch.testing.assert_close(value, expected["encoder"][name], rtol=1e-2, atol=1e-3)


def test_predict_and_embed_convolve_in_c(
    run: Path, capsys: pytest.CaptureFixture[str], counts: dict[str, int], tmp_path: Path
) -> None:
    images = mocofast.load(run).config.data.path
    image = str(next(Path(images).rglob("*.jpg")))
    dir, out = tmp_path / "linear", tmp_path / "out.npz"
    assert call(capsys, "linear", str(run), "--dir", str(dir))[0] == 0
    for words, batches in (
        (("embed", str(run), images, str(out)), 1),
        (("predict", str(dir), image, "--json"), 1),
        # The features of the image, and of the training images.
        (("predict", str(run / "checkpoints" / "last.pt"), image, "--json"), 2),
    ):
        found = []
        for block in (contextlib.nullcontext(), plain()):
            counts["forward"] = 0
            with block:
                status, text, err = call(capsys, *words)
            assert status == 0, err
            assert counts["forward"] == (0 if found else LAYERS * batches)
            if words[0] == "embed":
                found.append(np.load(out)["features"])
            else:
                row = json.loads(text)
                shown = {entry["name"]: entry["score"] for entry in row["predictions"]}
                found.append(np.array([shown[name] for name in sorted(shown)]))
        assert len(found[0]) == (IMAGES if words[0] == "embed" else 2)
        np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_python_convolves_in_c(run: Path, counts: dict[str, int]) -> None:
    trained = mocofast.load(run)
    found = trained.embed(Path(trained.config.data.path) / "class0")
    assert counts["forward"] == LAYERS
    assert not any(type(m) is convolutions.CompiledConv2d for m in trained.encoder.modules())
    with plain():
        expected = trained.embed(Path(trained.config.data.path) / "class0")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_exports_of_a_run_hold_plain_tensors(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "encoder.pt"
    assert call(capsys, "export", str(run), "--format", "torchvision", str(file))[0] == 0
    check_file(file)


@pytest.mark.parametrize("at_once", [1, 2])
def test_features_of_a_resnet_equal_the_plain_encoders(
    at_once: int, counts: dict[str, int]
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 32)(num_classes=8)
    wide = copy.deepcopy(encoder).double().eval()
    places = {name: value.data_ptr() for name, value in encoder.state_dict().items()}
    pixels = torch.randint(256, (24, 3, 40, 40), dtype=torch.uint8)
    batches = batches_of(pixels, torch.zeros(24, dtype=torch.int64), 8)
    found, _ = features.extract(encoder, batches, CPU, "output", MEAN, STD, at_once=at_once)
    assert counts["forward"] == 19 * 3
    with torch.no_grad():
        expected = wide((pixels.double() - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, value in encoder.state_dict().items():
        assert value.is_contiguous()
        assert value.data_ptr() == places[name]


@pytest.mark.parametrize("splits", [1, 2])
def test_the_monitor_of_a_training_convolves_in_c(
    splits: int, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without BatchNorm in C, weights of a training with splits have their channels first."""
    monkeypatch.setattr(batch_norm, "normalises", lambda dtype: False)
    datasets, config = bright_datasets()
    torch.manual_seed(0)
    method = MoCo(build_encoder("resnet_tiny"), dim=16, queue_size=64, bn_splits=splits)
    method.to_fastest_format(CPU, splits)
    encoder = method.encoder_q
    first = encoder.get_submodule("layer1.conv1")
    assert isinstance(first, nn.Conv2d)
    assert first.weight.is_contiguous() == (splits > 1)
    before = {name: (t.data_ptr(), t.stride()) for name, t in encoder.state_dict().items()}
    orders = []
    handle = encoder.register_forward_pre_hook(
        lambda _, given: orders.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    monitor = KNNMonitor.of(datasets, config, CPU)
    assert monitor is not None
    found = monitor.evaluate(encoder)
    handle.remove()
    assert orders == [True, True]
    assert counts["forward"] == LAYERS * 2
    after = {name: (t.data_ptr(), t.stride()) for name, t in encoder.state_dict().items()}
    assert after == before
    # Independently: an encoder of plain layers with the same weights.
    expected = tiny_encoder()
    named = {n: t for n, t in encoder.state_dict().items() if not n.startswith("fc.")}
    expected.load_state_dict(named, strict=False)
    with plain():
        assert monitor.evaluate(expected) == pytest.approx(found, abs=0.02)
    assert counts["forward"] == LAYERS * 2


def test_a_probe_and_a_training_leave_the_encoder_as_it_was(counts: dict[str, int]) -> None:
    datasets, config = bright_datasets()
    tuned = []
    for block in (contextlib.nullcontext(), plain()):
        encoder = tiny_encoder()
        kinds = [type(part) for part in encoder.modules()]
        with block:
            autocast = torch.autocast("cpu", enabled=False)
            tuning = FinetuneConfig(epochs=1, batch_size=80, head="probe")
            probe = linear.linear_probe(encoder, datasets, config, LinearConfig(), CPU)
            found = finetune.finetune(encoder, datasets, config, tuning, CPU, autocast)
        assert [type(part) for part in encoder.modules()] == kinds
        assert all(value.is_contiguous() for value in encoder.state_dict().values())
        tuned.append((probe, found, encoder.state_dict()))
    assert counts["weight_gradient"] == LAYERS * 2
    (probe, found, ours), (plain_probe, plain_found, theirs) = tuned
    assert probe[:3] == pytest.approx(plain_probe[:3], abs=0.02)
    assert found == pytest.approx(plain_found, abs=0.05)
    start = tiny_encoder().state_dict()
    name = "layer2.conv1.weight"
    step, expected = ours[name] - start[name], theirs[name] - start[name]
    assert expected.norm() > 0
    assert (step - expected).norm() < 0.01 * expected.norm()
