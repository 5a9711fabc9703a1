"""Exports for transformers, ONNX and torch.export give equal features in these libraries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mocofast import cli, settings
from mocofast.config import ConfigError
from mocofast.data.evaluation import center_view
from mocofast.evaluate.results import folder_of
from mocofast.interop.export import export
from mocofast.interop.initial import initialise
from mocofast.interop.reference_checkpoints import load_any
from mocofast.methods.build import build_method
from mocofast.models.encoders import features
from mocofast.models.pixels import prepare_images
from mocofast.train.checkpoint_writer import save_atomically
from tests.test_export import query_features, trained

SMALL = {"augment.size": 32}


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {"augment.size": 64}),
        ("resnet50", {"augment.size": 64}),
        ("vit_tiny_cifar", SMALL),
    ],
)
def test_transformers_computes_equal_features_of_an_image(
    arch: str, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    checkpoint = trained(arch, options)
    folder = tmp_path / "out" / "model"
    written = export(checkpoint, "transformers", folder)
    assert {f.name for f in folder.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
    }
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    scope: dict[str, Any] = {"image": image}
    with torch.no_grad():
        exec(written.how_to_load, scope)
    size = options["augment.size"]
    crop = torch.from_numpy(np.array(center_view(image, size))).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(checkpoint["config"]["augment"][n]) * 255 for n in ("mean", "std"))
    ours = query_features(checkpoint, prepare_images(crop, mean, std))
    # The model is compared to 1e-5 on one input. The processor may round resized pixels otherwise.
    inputs = scope["inputs"]["pixel_values"]
    torch.testing.assert_close(
        scope["features"], query_features(checkpoint, inputs), rtol=1e-5, atol=1e-5
    )
    assert (inputs - prepare_images(crop, mean, std)).abs().max() < 1.5 / 255 / min(
        checkpoint["config"]["augment"]["std"]
    )
    assert ours.shape == scope["features"].shape
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "| Epochs | 7 |" in card
    with pytest.raises(ConfigError, match="expected a new folder"):
        export(checkpoint, "transformers", folder)


@pytest.mark.parametrize(
    ("arch", "named"),
    [("resnet18", None), ("resnet50", None), ("vit_small", None), ("vit_tiny_cifar", True)],
)
def test_folders_of_transformers_are_read(arch: str, named: bool | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = trained(arch, SMALL)
    folder = tmp_path / "hf.model"
    export(checkpoint, "transformers", folder)
    images = torch.randn(2, 3, 32, 32)
    expected = query_features(checkpoint, images)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = theirs(images)
    pooled = states.last_hidden_state[:, 0] if "vit" in arch else states.pooler_output.flatten(1)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    # Models of transformers put a name before the encoder where they have a head, too.
    whole = {"vit": transformers.ViTForImageClassification}.get(
        theirs.config.model_type, transformers.ResNetForImageClassification
    )
    whole.from_pretrained(folder).save_pretrained(tmp_path / "classifier")
    theirs.save_pretrained(tmp_path / "pooled")  # with a pooler, of a ViT
    pooled_too, classifier = tmp_path / "pooled", tmp_path / "classifier"
    for path in (folder, folder / "model.safetensors", pooled_too, classifier):
        loaded = load_any(str(path), arch if named else None)
        assert loaded.config.model.arch == arch and loaded.layout == "transformers"
        with torch.no_grad():
            found = features(loaded.method.encoder_q.eval(), images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_of_transformers_with_other_heads_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    checkpoint = trained("vit_micro_cifar", SMALL)
    folder = tmp_path / "hf"
    export(checkpoint, "transformers", folder)
    told = folder / "config.json"
    text = told.read_text()
    told.write_text(text.replace('"num_attention_heads": 4', '"num_attention_heads": 8'))
    assert told.read_text() != text
    model = build_method(settings.from_dict(checkpoint["config"]))
    before = model.state_dict()["encoder_q.conv_proj.weight"].clone()
    message = "hf: vit_micro_cifar has 4 heads, and config.json tells num_attention_heads 8"
    with pytest.raises(ConfigError, match=message):
        load_any(str(folder), "vit_micro_cifar")
    with pytest.raises(ConfigError, match=message):
        initialise(model, str(folder), "vit_micro_cifar")
    assert torch.equal(model.state_dict()["encoder_q.conv_proj.weight"], before)


def test_commands_and_warm_starts_read_a_folder_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    checkpoint = trained("vit_micro_cifar", SMALL)
    folder = tmp_path / "hf"
    export(checkpoint, "transformers", folder)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "back.safetensors"
    words = ["export", "hf", "--model.arch", "vit_micro_cifar", "--format", "safetensors", str(out)]
    assert cli.main(words) == 0
    name = "encoder.layers.encoder_layer_3.self_attention.in_proj_weight"
    query = checkpoint["model"][f"encoder_q.{name}"]
    assert torch.equal(load_file(out)[name], query)
    model = build_method(settings.from_dict(checkpoint["config"]))
    assert initialise(model, "hf", "vit_micro_cifar")[0].startswith("weights of hf: encoder")
    assert torch.equal(model.state_dict()[f"encoder_k.{name}"], query)
    # A run does not continue from it, and results go beside the folder of a model.
    assert cli.main(["pretrain", "--resume", "hf"]) == 2
    assert "hf: no run folder (a folder of transformers" in capsys.readouterr().err
    assert folder_of("hf", "knn") == Path("runs/hf-knn")


@pytest.mark.parametrize("arch", ["resnet18_cifar", "vit_tiny_cifar", "timm/convnext_atto"])
def test_onnxruntime_computes_equal_features_for_any_number_of_images(
    arch: str, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    checkpoint = trained(arch, SMALL)
    written = export(checkpoint, "onnx", tmp_path / "model.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        scope: dict[str, Any] = {"images": images.numpy(), "onnxruntime": onnxruntime}
        exec(written.how_to_load, scope)
        expected = query_features(checkpoint, images)
        found = torch.from_numpy(scope["features"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_openvino_reads_the_graph_of_onnx(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    checkpoint = trained("resnet18_cifar", SMALL)
    written = export(checkpoint, "onnx", tmp_path / "model.onnx")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # the default is bf16 on CPUs that have bf16
    model = openvino.Core().compile_model(str(written.path), "CPU", exact)
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        found = torch.from_numpy(model(images.numpy())[0])
        torch.testing.assert_close(found, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_tiny_cifar"])
def test_an_exported_program_computes_equal_features_for_any_number_of_images(
    arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained(arch, SMALL)
    scope: dict[str, Any] = {}
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    exec(export(checkpoint, "torch_export", tmp_path / "model.pt2").how_to_load, scope)
    assert not [r.message for r in caplog.records if "archive file" in r.getMessage()]
    for count in (1, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            found = scope["model"](images)
        torch.testing.assert_close(found, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "name", "package"),
    [("transformers", "model", "transformers"), ("onnx", "model.onnx", "onnxscript")],
)
def test_the_command_prints_our_own_lines_alone(
    format: str, name: str, package: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    path, out = tmp_path / "run.pt", tmp_path / name
    save_atomically(trained("resnet18", SMALL), path)
    assert cli.main(["export", str(path), "--format", format, str(out)]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and "[torch.onnx]" not in printed.out
    assert printed.out.startswith(f"{out}: 120 tensors, ")


@pytest.mark.parametrize("arch", ["resnet_tiny", "vit_micro_cifar"])
def test_a_graph_may_be_of_other_images_than_those_of_training(arch: str, tmp_path: Path) -> None:
    path, out = tmp_path / "run.pt", tmp_path / "model.pt2"
    checkpoint = trained(arch, SMALL)
    save_atomically(checkpoint, path)
    words = ["export", str(path), "--augment.size", "24,48", "--format"]
    assert cli.main([*words, "torch_export", str(out)]) == 0
    images = torch.randn(3, 3, 24, 48)
    with torch.no_grad():
        found = torch.export.load(out).module()(images)
    torch.testing.assert_close(found, query_features(checkpoint, images), rtol=1e-5, atol=1e-5)
    assert cli.main([*words, "safetensors", str(tmp_path / "x.safetensors")]) == 2
    with pytest.raises(ConfigError, match=r"augment.size: .*24 x 48 pixels"):
        export(checkpoint, "torchvision", tmp_path / "x.pt", (24, 48))
    export(checkpoint, "torchvision", tmp_path / "x.pt", 32)  # the size of training


@pytest.mark.parametrize(
    ("arch", "format", "out", "message"),
    [
        ("resnet_tiny", "onnx", "x.pt", "out: format onnx expects a name ending in .onnx"),
        ("resnet_tiny", "torch_export", "x", "out: format torch_export expects .* .pt2"),
        ("resnet_tiny", "transformers", "x", "format: transformers is for resnet18 to resnet152"),
    ],
)
def test_what_cannot_be_exported_says_why(
    arch: str, format: str, out: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(trained(arch), format, tmp_path / out)
    assert list(tmp_path.iterdir()) == []
