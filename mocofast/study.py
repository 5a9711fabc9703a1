"""The small-data study of the field's tutorials: four classes, few labels, a ResNet and a ViT, each trained from
scratch and from a MoCo pretraining on the unlabelled images. What differs between two runs of a pair is the start:
they see the same labelled images in the same order under the same schedule.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mocofast import __version__, files, settings
from mocofast.config import Config, ConfigError, DataConfig
from mocofast.data.loaders import count_workers
from mocofast.data.sources import Datasets, FolderSource, load_datasets
from mocofast.device import choose_autocast
from mocofast.evaluate.finetune import FinetuneConfig, finetune
from mocofast.methods.build import build_method
from mocofast.plots import new_figure
from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint
from mocofast.train.run import train

CLASSES = 4
STARTS = ("scratch", "pretrained")


@dataclass(frozen=True)
class Model:
    """One of the two encoders, how it is pretrained, and how it is trained on labels."""

    recipe: str
    pretraining: dict[str, Any]  # {"group.option": value} that differ from the recipe's
    tuning: FinetuneConfig


@dataclass(frozen=True)
class Setting:
    """Sizes of a study. Images are counted by class; 0 takes all."""

    models: dict[str, Model]
    unlabelled: int
    labelled: int
    test: int
    seeds: int


_VIT = {"optim.name": "adamw", "optim.lr_per": 0, "optim.weight_decay": 0.1}
SETTINGS = {
    "cpu": Setting(
        {
            "ResNet": Model(
                "cifar10_r18",
                {"data.batch_size": 128, "model.arch": "resnet_tiny", "model.queue_size": 1024, "model.mlp": True,
                 "train.epochs": 80},
                FinetuneConfig(lr=0.03, batch_size=32),
            ),
            "ViT": Model(
                "cifar10_moco_v3",
                {**_VIT, "data.batch_size": 128, "model.arch": "vit_micro_cifar", "model.hidden_dim": 256,
                 "model.dim": 64, "optim.lr": 1e-3, "optim.warmup_epochs": 4.0, "train.epochs": 40},
                FinetuneConfig(optimizer="adamw", lr=5e-4, weight_decay=0.05, batch_size=32),
            ),
        },
        unlabelled=500, labelled=50, test=200, seeds=3,
    ),
    "gpu": Setting(
        {
            "ResNet": Model(
                "cifar10_r18", {"model.mlp": True, "train.epochs": 400}, FinetuneConfig(lr=0.03, batch_size=64)
            ),
            "ViT": Model(
                "cifar10_moco_v3",
                {**_VIT, "model.arch": "vit_tiny_cifar", "optim.lr": 5e-4, "train.epochs": 400},
                FinetuneConfig(optimizer="adamw", lr=5e-4, weight_decay=0.05, batch_size=64),
            ),
        },
        unlabelled=0, labelled=250, test=0, seeds=5,
    ),
}  # fmt: skip


def four_class(data: str, out: Path, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Runs what `out` lacks of the study; writes results.json (as it goes), table.md and curves.png there.

    data: a folder of train/CLASS and test/CLASS (or val/CLASS), of which the first four classes count. Pretrainings,
    one a model, are run folders in `out` and resume; runs on labels, one a model, start and seed, are repeated only
    where they had not finished. On a CPU as many run at once as there are cores, each on one thread.

    Returns results.json's content. `runs`: by "MODEL START SEED", accuracies on the test images after every epoch, 0
    to 1. `knn`: of each model's features before and after its pretraining.
    ConfigError for images that are not such, or an `out` of another study.
    """
    described = json.loads(json.dumps({"data": str(Path(data).resolve()), **asdict(setting)}))
    results: dict[str, Any] = {"study": described, "knn": {}, "runs": {}}
    place = out / "results.json"
    if place.exists():
        results = json.loads(place.read_text(encoding="utf-8"))
        if results["study"] != described:
            raise ConfigError(
                f"out: {out} holds a study of other images or settings; choose another folder"
            )
    _link_images(data, out / "images", setting)
    results["versions"] = {
        "mocofast": __version__,
        "torch": torch.__version__,
        "device": _describe(device),
    }

    jobs = 1 if device.type == "cuda" else count_workers(-1)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _one_thread)
    pending: dict[Future[Any], tuple[str, str, int | None]] = {}

    def tune(name: str, start: str) -> None:
        for seed in range(setting.seeds):
            if f"{name} {start} {seed}" not in results["runs"]:
                pending[pool.submit(_tune, out, name, start, seed, setting, str(device))] = (
                    name,
                    start,
                    seed,
                )

    try:
        for name, model in reversed(setting.models.items()):  # the ViT's pretraining takes longest
            if name not in results["knn"]:
                pending[pool.submit(_pretrain, out, name, model, str(device))] = (
                    name,
                    "pretraining",
                    None,
                )
        for name in setting.models:
            tune(name, "scratch")
            if name in results["knn"]:
                tune(name, "pretrained")
        while pending:
            for done in wait(pending, return_when=FIRST_COMPLETED).done:
                name, start, seed = pending.pop(done)
                if seed is None:
                    results["knn"][name] = done.result()
                    tune(name, "pretrained")
                else:
                    results["runs"][f"{name} {start} {seed}"] = done.result()
                    print(
                        f"{name}, {start}, seed {seed}: accuracy {done.result()[-1]:.1%}",
                        flush=True,
                    )
                _write(place, json.dumps(results, indent=1))
    finally:
        pool.shutdown(cancel_futures=True)
    _write(out / "table.md", table(results, setting))
    draw(results, setting).savefig(out / "curves.png")
    return results


def _one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def _link_images(data: str, folder: Path, setting: Setting) -> None:
    """`folder`/train/CLASS and test/CLASS: links to the study's images, drawn at random."""
    if folder.exists():
        return
    datasets = load_datasets(DataConfig(path=data))
    if datasets.val is None or len(datasets.train.classes) < CLASSES:
        raise ConfigError(
            f"data.path: the study needs {CLASSES} classes, each a folder; got {datasets.note}"
        )
    rng = np.random.default_rng(0)
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, source, count in (
        ("train", datasets.train, setting.unlabelled),
        ("test", datasets.val, setting.test),
    ):
        assert isinstance(source, FolderSource)
        assert source.labels is not None
        for index in _drawn(source, count, rng):
            path = Path(source.load(int(index))).resolve()
            place = (
                unfinished
                / part
                / source.classes[source.labels[index]]
                / f"{index:06}{path.suffix}"
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    unfinished.rename(folder)


def _drawn(source: FolderSource, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `count` images of each of the first four classes; 0 takes all."""
    assert source.labels is not None
    members = [rng.permutation(np.flatnonzero(source.labels == label)) for label in range(CLASSES)]
    return np.sort(np.concatenate([each[: count or None] for each in members]))


def _config(out: Path, name: str, model: Model, device: str) -> Config:
    config = settings.load_recipe(model.recipe)
    on_gpu = device.startswith("cuda")
    values = {
        **model.pretraining,
        "data.source": "folder",
        "data.path": str(out / "images"),
        "data.loader": "device" if on_gpu else "torchvision",
        "data.workers": -1 if on_gpu else 0,
        "train.device": device,
        "train.dir": str(out / f"pretrain-{name}"),
        "checkpoint.every_epochs": 10,
        "knn.every": 0,
        "knn.features": "backbone",
    }
    settings.apply(config, values)
    settings.validate(config)
    return config


def _pretrain(out: Path, name: str, model: Model, device: str) -> dict[str, float]:
    """kNN accuracy of the random encoder and of the pretrained one."""
    result = train(_config(out, name, model, device), resume="auto")
    if result.interrupted:
        raise InterruptedError(f"the pretraining of the {name} was interrupted")
    return {"before": result.before["knn_top1"], "after": result.after["knn_top1"]}


def _tune(
    out: Path, name: str, start: str, seed: int, setting: Setting, device: str
) -> list[float]:
    """Accuracy on the test images after every epoch on the labelled ones, which `seed` draws."""
    model = setting.models[name]
    config = _config(out, name, model, device)
    config.train.seed = seed
    if start == "pretrained":
        encoder = model_from_checkpoint(load_checkpoint(config.train.dir))[0].encoder_q
    else:
        torch.manual_seed(seed)
        encoder = build_method(config).encoder_q
    train_images, val, note = load_datasets(config.data)
    assert isinstance(train_images, FolderSource)
    labelled = train_images.subset(
        _drawn(train_images, setting.labelled, np.random.default_rng(seed))
    )
    place = torch.device(device)
    accuracy: list[float] = []
    finetune(
        encoder.to(place),
        Datasets(labelled, val, note),
        config,
        model.tuning,
        place,
        choose_autocast(config.train.precision, place),
        on_epoch=lambda result: accuracy.append(result.top1),
    )
    return accuracy


def _write(path: Path, text: str) -> None:
    with files.atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count_workers(-1)} cores"


def _curves(results: dict[str, Any], setting: Setting, name: str, start: str) -> np.ndarray:
    """Accuracies (seeds, epochs)."""
    return np.array([results["runs"][f"{name} {start} {seed}"] for seed in range(setting.seeds)])


def table(results: dict[str, Any], setting: Setting) -> str:
    """Markdown. Of accuracies: mean and standard deviation over seeds, in percent; of differences: seed by seed."""
    rows = [
        "| model | start | accuracy, epoch 5 | last epoch | gain by pretraining | change from epoch to epoch |",
        "|---|---|---|---|---|---|",
    ]
    for name in setting.models:
        scratch, pretrained = (_curves(results, setting, name, start) for start in STARTS)
        for start, curves in zip(STARTS, (scratch, pretrained)):
            gain = _spread(pretrained[:, -1] - scratch[:, -1]) if start == "pretrained" else ""
            steps = np.abs(np.diff(curves, axis=1)).mean(axis=1)
            early = _spread(curves[:, :5][:, -1])
            rows.append(
                f"| {name} | {start} | {early} | {_spread(curves[:, -1])} | {gain} | {_spread(steps)} |"
            )
    return "\n".join(rows) + "\n"


def _spread(shares: np.ndarray) -> str:
    deviation = f" ± {100 * shares.std(ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * shares.mean():.1f}{deviation}"


def draw(results: dict[str, Any], setting: Setting) -> Figure:
    """A panel a model: accuracy by epoch, the mean over seeds in a band from the worst to the best."""
    figure = new_figure(10, 4.2)
    panels = figure.subplots(1, len(setting.models), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, setting.models):
        for start, color in zip(STARTS, ("#7a7f87", "#1f6feb")):
            curves = _curves(results, setting, name, start)
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.fill_between(
                epochs, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0
            )
            label = "from scratch" if start == "scratch" else "from MoCo's pretraining"
            axes.plot(epochs, curves.mean(0), color=color, label=label)
        axes.axhline(1 / CLASSES, color="#7a7f87", linestyle=":", linewidth=1)
        axes.set_title(f"{name}, {CLASSES * setting.labelled} labelled images", fontsize=11)
        axes.set_xlabel("epoch on the labelled images")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.legend(frameon=False, loc=(0.52, 0.1))
    panels[0].set_ylabel("accuracy on test images (dotted: chance)")
    return figure
