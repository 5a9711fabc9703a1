"""Study: what pretraining gives if labels are few, on four classes, with a ResNet and a ViT.

Trains every encoder on labels twice: from scratch, and from a MoCo pretraining on the unlabelled
images. Except for the start, the two runs of a pair are equal: same labelled images, order and
schedule.
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
from mocofast.data.interface import Source
from mocofast.data.loaders import count_workers
from mocofast.data.sources import Subset, load_datasets
from mocofast.device import run_autocast
from mocofast.evaluate.finetune import FinetuneConfig, finetune
from mocofast.methods.build import build_method
from mocofast.plots import new_figure, save_figure
from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint
from mocofast.train.run import train

CLASSES = 4
STARTS = ("scratch", "pretrained")


@dataclass(frozen=True)
class StudyModel:
    """An encoder, its pretraining, and its training on labels."""

    recipe: str
    pretraining: dict[str, Any]  # {"group.option": value} that differ from the recipe
    tuning: FinetuneConfig


@dataclass(frozen=True)
class StudySize:
    """Encoders, numbers of images per class (0: all), and number of seeds."""

    models: dict[str, StudyModel]
    unlabelled: int
    labelled: int
    test: int
    seeds: int


_VIT = {"optim.name": "adamw", "optim.lr_per": 0, "optim.weight_decay": 0.1}
SIZES = {
    "cpu": StudySize(
        models={
            "ResNet": StudyModel(
                recipe="cifar10_r18",
                pretraining={
                    "data.batch_size": 128,
                    "model.arch": "resnet_tiny",
                    "model.queue_size": 1024,
                    "model.mlp": True,
                    "train.epochs": 80,
                },
                tuning=FinetuneConfig(lr=0.03, batch_size=32),
            ),
            "ViT": StudyModel(
                recipe="cifar10_moco_v3",
                pretraining={
                    **_VIT,
                    "data.batch_size": 128,
                    "model.arch": "vit_micro_cifar",
                    "model.hidden_dim": 256,
                    "model.dim": 64,
                    "optim.lr": 1e-3,
                    "optim.warmup_epochs": 4.0,
                    "train.epochs": 40,
                },
                tuning=FinetuneConfig(optimizer="adamw", lr=5e-4, weight_decay=0.05, batch_size=32),
            ),
        },
        unlabelled=500,
        labelled=50,
        test=200,
        seeds=3,
    ),
    "gpu": StudySize(
        models={
            "ResNet": StudyModel(
                recipe="cifar10_r18",
                pretraining={"model.mlp": True, "train.epochs": 400},
                tuning=FinetuneConfig(lr=0.03, batch_size=64),
            ),
            "ViT": StudyModel(
                recipe="cifar10_moco_v3",
                pretraining={
                    **_VIT,
                    "model.arch": "vit_tiny_cifar",
                    "optim.lr": 5e-4,
                    "train.epochs": 400,
                },
                tuning=FinetuneConfig(optimizer="adamw", lr=5e-4, weight_decay=0.05, batch_size=64),
            ),
        },
        unlabelled=0,
        labelled=250,
        test=0,
        seeds=5,
    ),
}


def four_class(data: str, out: Path, size: StudySize, device: torch.device) -> dict[str, Any]:
    """Runs the study, or continues the study in `out`.

    Writes results.json (after every run), table.md and curves.png into `out`. Pretrainings (a run
    folder a model) are resumed. Runs on labels (model, start, seed) that had not finished are
    repeated. On a CPU, runs as many processes as there are cores, each on one thread.

    data: a folder of train/CLASS and test/CLASS (or val/CLASS). The first four classes are used.
    Returns the content of results.json:
        runs: {"MODEL START SEED": accuracies on the test images after every epoch, 0 to 1}.
        knn: {MODEL: kNN accuracy before and after the pretraining}.
    Raises ConfigError for other images, or if `out` holds another study.
    """
    results = _begin(data, out, size, device)
    jobs = 1 if device.type == "cuda" else count_workers(-1)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _one_thread)
    pending: dict[Future[Any], tuple[str, str, int | None]] = {}  # (model, start, seed)

    def pretrain(name: str) -> None:
        future = pool.submit(_pretrain, out, name, size.models[name], str(device))
        pending[future] = (name, "pretraining", None)

    def tune(name: str, start: str) -> None:
        for seed in range(size.seeds):
            if f"{name} {start} {seed}" not in results["runs"]:
                future = pool.submit(_tune, out, name, start, seed, size, str(device))
                pending[future] = (name, start, seed)

    try:
        # What is missing. The ViT's pretraining takes longest, so it starts first.
        for name in reversed(size.models):
            if name not in results["knn"]:
                pretrain(name)
        for name in size.models:
            tune(name, "scratch")
            if name in results["knn"]:
                tune(name, "pretrained")
        # Results are saved as they come.
        while pending:
            for done in wait(pending, return_when=FIRST_COMPLETED).done:
                name, start, seed = pending.pop(done)
                if seed is None:
                    results["knn"][name] = done.result()
                    tune(name, "pretrained")
                else:
                    accuracies = results["runs"][f"{name} {start} {seed}"] = done.result()
                    print(
                        f"{name}, {start}, seed {seed}: accuracy {accuracies[-1]:.1%}", flush=True
                    )
                _write(out / "results.json", json.dumps(results, indent=1))
    finally:
        pool.shutdown(cancel_futures=True)
    _write(out / "table.md", table(results, size))
    save_figure(plot_study(results, size), out / "curves.png")
    return results


def _begin(data: str, out: Path, size: StudySize, device: torch.device) -> dict[str, Any]:
    """Returns the results in `out` so far, and links the images."""
    described = json.loads(json.dumps({"data": str(Path(data).resolve()), **asdict(size)}))
    results: dict[str, Any] = {"study": described, "knn": {}, "runs": {}}
    path = out / "results.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["study"] != described:
            raise ConfigError(
                f"out: {out} holds a study of other images or settings; choose another folder"
            )
    _link_images(data, out / "images", size)
    results["versions"] = {
        "mocofast": __version__,
        "torch": torch.__version__,
        "device": _device_name(device),
    }
    return results


def _one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def _link_images(data: str, folder: Path, size: StudySize) -> None:
    """Writes `folder`/train/CLASS and `folder`/test/CLASS: links to randomly chosen images."""
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
        ("train", datasets.train, size.unlabelled),
        ("test", datasets.val, size.test),
    ):
        assert source.labels is not None
        for index in _choose_images(source, count, rng):
            path = Path(str(source.load(int(index)))).resolve()
            link = unfinished / part / source.classes[source.labels[index]]
            link = link / f"{index:06}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    unfinished.rename(folder)


def _choose_images(source: Source, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns indices of `count` images (0: all) of every class among the first four classes."""
    assert source.labels is not None
    members = [rng.permutation(np.flatnonzero(source.labels == label)) for label in range(CLASSES)]
    return np.sort(np.concatenate([each[: count or None] for each in members]))


def _config(out: Path, name: str, model: StudyModel, device: str) -> Config:
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


def _pretrain(out: Path, name: str, model: StudyModel, device: str) -> dict[str, float]:
    """Returns the kNN accuracy of the encoder before and after the pretraining."""
    result = train(_config(out, name, model, device), resume="auto")
    if result.interrupted:
        raise InterruptedError(f"the pretraining of the {name} was interrupted")
    return {"before": result.before["knn_top1"], "after": result.after["knn_top1"]}


def _tune(out: Path, name: str, start: str, seed: int, size: StudySize, device: str) -> list[float]:
    """Trains on labelled images chosen by `seed`. Returns the test accuracy after every epoch."""
    model = size.models[name]
    config = _config(out, name, model, device)
    config.train.seed = seed
    if start == "pretrained":
        encoder = model_from_checkpoint(load_checkpoint(config.train.dir))[0].encoder_q
    else:
        torch.manual_seed(seed)
        encoder = build_method(config).encoder_q
    datasets = load_datasets(config.data)
    chosen = _choose_images(datasets.train, size.labelled, np.random.default_rng(seed))
    where = torch.device(device)
    encoder = encoder.to(where)
    accuracy: list[float] = []
    finetune(
        encoder,
        datasets._replace(train=Subset(datasets.train, chosen)),
        config,
        model.tuning,
        where,
        run_autocast(config, encoder, where),
        on_epoch=lambda result: accuracy.append(result.top1),
    )
    return accuracy


def _write(path: Path, text: str) -> None:
    with files.atomic_write(path) as file:
        file.write_text(text, encoding="utf-8")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count_workers(-1)} cores"


def _curves(results: dict[str, Any], size: StudySize, name: str, start: str) -> np.ndarray:
    """Returns accuracies (seeds, epochs)."""
    return np.array([results["runs"][f"{name} {start} {seed}"] for seed in range(size.seeds)])


def table(results: dict[str, Any], size: StudySize) -> str:
    """Returns a Markdown table of accuracies in percent: mean ± standard deviation over seeds.

    The gain by pretraining is the difference of runs with the same seed.
    """
    rows = [
        "| model | start | accuracy, epoch 5 | last epoch | gain by pretraining "
        "| change from epoch to epoch |",
        "|---|---|---|---|---|---|",
    ]
    for name in size.models:
        scratch, pretrained = (_curves(results, size, name, start) for start in STARTS)
        for start, curves in zip(STARTS, (scratch, pretrained)):
            gain = _spread(pretrained[:, -1] - scratch[:, -1]) if start == "pretrained" else ""
            steps = np.abs(np.diff(curves, axis=1)).mean(axis=1)
            early = _spread(curves[:, :5][:, -1])
            last = _spread(curves[:, -1])
            rows.append(f"| {name} | {start} | {early} | {last} | {gain} | {_spread(steps)} |")
    return "\n".join(rows) + "\n"


def _spread(shares: np.ndarray) -> str:
    deviation = f" ± {100 * shares.std(ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * shares.mean():.1f}{deviation}"


def plot_study(results: dict[str, Any], size: StudySize) -> Figure:
    """Returns a figure of accuracy by epoch, with a panel for every model.

    Lines: mean over seeds. Bands: from the worst seed to the best seed.
    """
    figure = new_figure(10, 4.2)
    panels = figure.subplots(1, len(size.models), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, size.models):
        for start, color in zip(STARTS, ("#7a7f87", "#1f6feb")):
            curves = _curves(results, size, name, start)
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.fill_between(
                epochs, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0
            )
            label = "from scratch" if start == "scratch" else "from MoCo's pretraining"
            axes.plot(epochs, curves.mean(0), color=color, label=label)
        axes.axhline(1 / CLASSES, color="#7a7f87", linestyle=":", linewidth=1)
        axes.set_title(f"{name}, {CLASSES * size.labelled} labelled images", fontsize=11)
        axes.set_xlabel("epoch on the labelled images")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.legend(frameon=False, loc=(0.52, 0.1))
    panels[0].set_ylabel("accuracy on test images (dotted: chance)")
    return figure
