"""Images and captions, from files to zero-shot accuracy: learns, continues exactly, is exported."""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mocofast_bench.processes import on_ranks
from PIL import Image

from mocofast import cli, distributed
from mocofast.config import Config, ConfigError, DataConfig, OptimConfig
from mocofast.data.interface import Batch
from mocofast.data.sources import load_datasets
from mocofast.interop.initial import initialise
from mocofast.methods.build import build_method
from mocofast.methods.clip import CLIP
from mocofast.models.encoders import features
from mocofast.models.text import ByteTokenizer
from mocofast.settings import apply, validate
from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint
from mocofast.train.optimizer import optimizer_of
from tests import runs

transformers: Any = pytest.importorskip("transformers")

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("a photo of a {}.", "the digit {}", "this is a {}, written by hand")


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: pairs.csv with captions of the training digits, and held-out digits in test/."""
    folder = tmp_path_factory.mktemp("digits")
    sets = load_datasets(DataConfig(source="digits"))
    assert sets.val is not None
    (folder / "images").mkdir()
    rows = [("file", "Caption")]
    for source, is_train in ((sets.train, True), (sets.val, False)):
        assert source.labels is not None
        for i, label in enumerate(source.labels.tolist()):
            name = f"images/{i}.png" if is_train else f"test/{WORDS[label]}/{i}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png(source.load(i)))
            if is_train:
                rows.append((name, FORMS[i % 3].format(WORDS[label])))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHORT = words(
    "--model.method clip --data.source list --model.text_width 32 --model.text_layers 1 "
    "--model.text_length 32 --model.dim 32 --optim.name adamw --optim.lr 0.002 "
    "--optim.warmup_epochs 2 --augment.jitter 0,0,0,0 --augment.rotate 0 --train.log_every 11 "
    "--data.workers 0 --train.epochs 8"
)
KINDS = {
    "softmax": words("--model.queue_size 0 --model.temperature 0.07"),
    "queues": words(
        "--model.queue_size 256 --model.momentum 0.9 --model.temperature 0.07 --optim.lr 0.001"
    ),
    "sigmoid": words(
        "--model.queue_size 0 --model.loss sigmoid --model.temperature 0.1 --model.logit_bias -4.9 "
        "--optim.lr 0.003"
    ),
}


def mocofast(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = ("--data.path", str(digits / "pairs.csv"), *SHORT, *KINDS[request.param])
    mocofast("pretrain", "digits", *options, "--train.dir", folder)
    return folder, options


def test_captions_teach_the_names_of_classes(
    run: tuple[Path, tuple[str, ...]], digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    losses = [line["loss"] for line in runs.metrics(folder) if "loss" in line]
    assert losses[-1] < losses[0]
    assert "verdict: healthy" in (folder / "train.log").read_text()
    capsys.readouterr()
    mocofast("zeroshot", folder, "--data.path", digits / "test", "--templates", *FORMS)
    figures = json.loads((folder / "zeroshot" / "results.json").read_text())["figures"]
    # Guessing: 0.1. 30 different captions make many false negatives.
    assert figures["top1"] > (0.7 if folder.name == "softmax" else 0.4)
    # The classifier that predict reads gives the same classes.
    image = next((digits / "test" / "three").iterdir())
    capsys.readouterr()
    mocofast("predict", folder / "zeroshot", image, "--json", "--top", 10)
    best = json.loads(capsys.readouterr().out)["predictions"]
    assert sum(entry["score"] for entry in best) == pytest.approx(1, abs=1e-5)
    assert {entry["name"] for entry in best} == set(WORDS)


def test_a_stopped_and_continued_run_equals_one_never_stopped(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    whole, options = run
    parts = tmp_path / "parts"
    mocofast("pretrain", "digits", *options, "--train.dir", parts, "--train.max_steps", 38)
    mocofast("pretrain", "--resume", parts, "--train.max_steps", 0)
    runs.assert_same_run(parts, whole)


def two_rank_runs(folder: Path, options: tuple[str, ...], rank: int) -> None:
    """Trains 12 steps on a rank, at once and in two parts."""
    with mock.patch("mocofast.distributed.shutdown", distributed.barrier):
        for kind in ("softmax", "queues"):
            given = ("pretrain", "digits", *options, *KINDS[kind], "--train.log_every", "3")
            whole, parts = folder / kind, folder / f"{kind}, in parts"
            mocofast(*given, "--train.dir", whole, "--train.max_steps", "12")
            mocofast(*given, "--train.dir", parts, "--train.max_steps", "7")
            mocofast("pretrain", "--resume", parts, "--train.max_steps", "12")


def test_two_ranks_stop_and_continue_as_if_never_stopped(digits: Path, tmp_path: Path) -> None:
    options = ("--data.path", str(digits / "pairs.csv"), *SHORT)
    on_ranks(partial(two_rank_runs, tmp_path, options))
    for kind in ("softmax", "queues"):
        whole, parts = tmp_path / kind, tmp_path / f"{kind}, in parts"
        assert [line["step"] for line in runs.metrics(whole) if "loss" in line] == [3, 6, 9, 12]
        runs.assert_same_run(parts, whole)


def small_config(**model: Any) -> Config:
    config = Config()
    options = {"method": "clip", "arch": "resnet_tiny", "dim": 16, "text_width": 16}
    options |= {"text_layers": 1, "text_length": 24, **model}
    apply(config, {f"model.{name}": value for name, value in options.items()})
    apply(config, {"augment.size": 8})
    return config


def test_bytes_are_those_of_byt5() -> None:
    tokens = ByteTokenizer(16)(["a cat", "Gr\u00fc\u00dfe", "a text that is too long for 16"])
    library = transformers.ByT5Tokenizer(extra_ids=0)
    expected = library(["a cat", "Gr\u00fc\u00dfe"], padding="max_length", max_length=16)
    assert tokens[:2].tolist() == expected.input_ids
    assert tokens[2].tolist() == [*(byte + 3 for byte in b"a text that is "), 1]


@pytest.mark.parametrize("queue_size", [0, 8])
def test_gains_biases_and_the_temperature_are_not_decayed(queue_size: int) -> None:
    """With no gradient but decay, matrices shrink and vectors stay; averages follow their own."""
    model = build_method(small_config(queue_size=queue_size, momentum=0.0))
    optim = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer_of(model, optim).step()
    for name, value in model.named_parameters():
        factor = 0.95 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value, factor * before[name], msg=name)


def test_the_scale_is_at_most_100() -> None:
    model = build_method(small_config(temperature=0.001)).train()
    tokens = model.batch_inputs(Batch((), torch.arange(4), None), Captions())["tokens"]
    output = model(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), tokens=tokens)
    assert float(output.metrics["temperature"]) == pytest.approx(0.01)
    assert float(model.logit_scale.exp()) == pytest.approx(100.0)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_pair_alone_ends_no_run_and_trains_with_the_sigmoid_loss(loss: str) -> None:
    model = build_method(small_config(loss=loss)).train()
    tokens = model.batch_inputs(Batch((), torch.arange(1), None), Captions())["tokens"]
    output = model(torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8), tokens=tokens)
    output.loss.backward()
    assert output.rank.tolist() == [0]  # there is no other text
    trained = bool(model.encoder_q.conv1.weight.grad.abs().max() > 0)
    assert trained == (loss == "sigmoid") == (output.loss.item() > 0)


class Captions:
    def caption(self, index: int) -> str:
        return f"photo {index}"


def saved_folder(kind: str, folder: Path) -> transformers.PreTrainedModel:
    """Writes a small text model of transformers with ByT5's tokenizer."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 20}
    if kind == "clip":
        text = {**sizes, "projection_dim": 16, "eos_token_id": 1, "pad_token_id": 0}
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.eval().save_pretrained(folder)
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_text_model_from_a_folder_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    theirs = saved_folder(kind, folder)
    model = build_method(small_config(text=str(folder)))
    assert isinstance(model, CLIP)
    texts = ["a photo", "a longer text, of more bytes than places"]
    tokens = model.tokenize(texts)
    assert tokens.shape == (2, 20)  # as many as the model has places
    with torch.no_grad():
        ours = model.eval().encode_texts("text_q", tokens)
        if kind == "clip":
            expected = theirs.get_text_features(tokens).pooler_output
        else:
            assert model.text_q.projection is not None
            pooled = theirs(input_ids=tokens, attention_mask=(tokens != 0).long()).pooler_output
            expected = pooled @ model.text_q.projection.weight.T
    torch.testing.assert_close(ours, F.normalize(expected, dim=1))
    (folder / "model.safetensors").unlink()  # then from random weights
    again = build_method(small_config(text=str(folder)))
    assert not torch.equal(again.eval().encode_texts("text_q", tokens), ours)


def test_folders_without_a_text_model_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"model.text: expected a folder with a config.json"):
            build_method(small_config(text=str(folder)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ConfigError, match=r"model.text: .* has no text model of transformers"):
        build_method(small_config(text=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model.queue_size: expected 0 with"):
        validate(small_config(loss="sigmoid", queue_size=4))


def test_exported_towers_give_the_embeddings_of_the_run(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    mocofast("export", folder, "--format", "text", tmp_path / "text")
    found: dict[str, Any] = {}
    exec(capsys.readouterr().out.partition("\n\n")[2], found)
    model, _ = model_from_checkpoint(load_checkpoint(folder))
    assert isinstance(model, CLIP)
    model.eval()
    with torch.no_grad():
        text = model.encode_texts("text_q", model.tokenize(["a photo of a cat."]))
        image = torch.rand(2, 3, 8, 8)
        embedding = model.encode_images("encoder_q", image)
        pooled = features(model.encoder_q, image)
    torch.testing.assert_close(F.normalize(found["text"], dim=1), text)
    torch.testing.assert_close(F.normalize(pooled @ found["p"]["image"].T, dim=1), embedding)
    assert float(found["p"]["logit_scale"]) == pytest.approx(float(model.scale()))
    # The folder is a --model.text, and the image encoder is exported as of any method.
    again = build_method(small_config(text=str(tmp_path / "text"), dim=32, text_length=32))
    tokens = again.tokenize(["a photo of a cat."])
    torch.testing.assert_close(again.eval().encode_texts("text_q", tokens), text)
    mocofast("export", folder, "--format", "safetensors", tmp_path / "image.safetensors")
    out = str(tmp_path / "text")
    assert cli.main(["export", str(folder), "--format", "text", out]) == 2  # it exists
    assert "expected a new folder" in capsys.readouterr().err


def test_zeroshot_says_what_it_needs(
    run: tuple[Path, tuple[str, ...]], digits: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, data = str(run[0]), ("--data.path", str(digits / "test"))
    (tmp_path / "names.csv").write_text("zero,the number 0\none,the number 1\n")
    wrong = {
        ("--templates", "a photo"): "expected {} where the name stands",
        ("--names", str(tmp_path / "names.csv"), *data): "lacks 8 classes",
        (): "needs labelled images",  # the pairs of the run have no labels
    }
    for words, message in wrong.items():
        assert cli.main(["zeroshot", folder, *words]) == 2
        assert message in capsys.readouterr().err
    mocofast("zeroshot", folder, "--classes", "one", "two", "--dir", tmp_path / "two")
    mocofast("predict", tmp_path / "two", next((digits / "test" / "two").iterdir()), "--json")
    (best, _) = json.loads(capsys.readouterr().out.splitlines()[-1])["predictions"]
    assert best["name"] == "two"


def test_bf16_and_micro_batches_train(digits: Path, tmp_path: Path) -> None:
    options = ("--data.path", str(digits / "pairs.csv"), *SHORT, "--train.max_steps", "4")
    mocofast(
        *("pretrain", "digits", *options, *KINDS["queues"], "--train.dir", tmp_path / "run"),
        *("--train.precision", "bf16", "--train.accumulate", "2", "--train.log_every", "2"),
    )
    state = runs.weights(tmp_path / "run")
    assert state["queue_ptr"].item() == 4 * 128 % 256 == state["image_queue_ptr"].item()
    for name in ("encoder_q.fc.0.weight", "text_q.model.text_projection.weight"):
        average = state[name.replace("_q.", "_k.", 1)]
        assert 0 < (state[name] - average).norm() < 0.2 * state[name].norm()


def test_a_run_starts_from_the_towers_of_another(
    run: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    folder, _ = run
    theirs = runs.weights(folder)
    model = build_method(small_config(dim=32, text_width=32, text_length=32, queue_size=8))
    assert isinstance(model, CLIP)
    lines = initialise(model, str(folder), "resnet_tiny")
    assert "head" in lines[0] and "text encoder" in lines[0] and lines[0].endswith("new: queue")
    state = model.state_dict()
    keys = "_k." if "text_k.model.text_projection.weight" in theirs else "_q."
    for name in ("encoder_q.conv1.weight", "text_q.model.text_projection.weight", "logit_scale"):
        assert torch.equal(state[name], theirs[name])
        average = name.replace("_q.", "_k.")
        assert torch.equal(state[average], theirs[name.replace("_q.", keys)])
