"""Measures a quantity once, in the build of PYTHONPATH. `compare_builds.py` starts this file.

    python benchmarks/builds/quantities.py NAME OPTIONS

OPTIONS: keyword arguments of the function NAME, as JSON. Prints a line of JSON: {"build": the
folder of the build, "values": {side: number}}. The side of the build is called mocofast.

A quantity runs in this build and in old builds, back to commit e04e1de. Hence a folder of its own:
Python looks into the folder of a script first, and `benchmarks` holds this build's mocofast_bench.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")
RECIPE = "moco_v2_r50_200ep"
QUEUE = 4096  # keys, of steps and runs
TEMPERATURE = 0.1  # of kNN
TILE = 512  # rows of similarities that plain PyTorch computes at a time

Values = dict[str, float]  # {side: number}


def info_nce(threads: int, keys: int, repeats: int) -> Values:
    """Returns the ms of InfoNCE, 256 queries, dimension 128, float32, forward and backward."""
    from mocofast_bench import peers

    torch.set_num_threads(threads)
    sizes, dtype = (256, keys, 128), torch.float32
    count = peers.sets_past_the_cache(sizes, dtype, CPU)
    call = peers.call_over(peers.mocofast(sizes, dtype), peers.input_sets(sizes, dtype, CPU, count))
    return _milliseconds({"mocofast": call}, repeats)


def step(arch: str, size: int, batch: int, threads: int, repeats: int) -> Values:
    """Returns the ms of a training step, in the precision that `auto` takes."""
    from mocofast_bench import training_steps

    from mocofast.settings import load_recipe

    if find_spec("mocofast.memory"):  # as `mocofast pretrain` does, in builds that have it
        importlib.import_module("mocofast.memory").keep_freed()
    torch.set_num_threads(threads)
    config = load_recipe(RECIPE)
    config.data.path, config.data.batch_size = ".", batch
    config.model.arch, config.model.queue_size = arch, QUEUE
    config.augment.size, config.train.precision = size, "auto"
    return _milliseconds({"mocofast": training_steps.mocofast(config, CPU)}, repeats)


def pretrain(folder: str, size: int, steps: int, every: int) -> Values:
    """Returns the images/s of `mocofast pretrain` with ResNet-18, without the first entry.

    every: steps between entries of metrics.jsonl, at least two entries.
    """
    with tempfile.TemporaryDirectory() as run:
        command = _pretrain(folder, run, size, every)
        # Without labels there is no kNN, whose time is not part of the rate.
        command += ["--train.max_steps", str(steps), "--data.labels", "none"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines]
    return {"mocofast": statistics.median(rates[1:])}


def first_step(folder: str, size: int, arch: str = "resnet18", recipe: str = "") -> Values:
    """Returns the CPU seconds of `mocofast pretrain` to the end of the first step.

    arch: trained on batches of 32. recipe: with its own network and batches instead.
    """
    with tempfile.TemporaryDirectory() as run:
        command = _pretrain(folder, run, size, 1, arch, recipe)
        return {"mocofast": _to_first_step(command, Path(run, "metrics.jsonl"))}


def _to_first_step(command: list[str], metrics: Path) -> float:
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            while not metrics.exists() or '"loss"' not in metrics.read_text(encoding="utf-8"):
                if process.poll() is not None:
                    raise RuntimeError(f"pretrain ended with {process.returncode}")
                time.sleep(0.02)
            return _cpu_seconds(process.pid)
        finally:
            process.kill()


def demo(busy: int) -> Values:
    """Returns the seconds of the demo (`mocofast pretrain`), beside busy processes and quiet.

    busy: number of processes that only keep a core busy.
    """
    from mocofast_bench import timing

    values = {}
    for side, count in (("quiet", 0), ("mocofast", busy)):
        with tempfile.TemporaryDirectory() as run, timing.busy_neighbours(count):
            command = [sys.executable, "-m", "mocofast", "pretrain", "--train.dir", run]
            before = time.monotonic()
            subprocess.run(command, check=True, stdout=sys.stderr)
            values[side] = time.monotonic() - before
    return values


def views_ahead(epochs: int, repeats: int) -> Values:
    """Returns the CPU ms of an epoch of `pretrain digits`, and of its views, today and ahead.

    epochs: whose views are made together. "with views ahead" is what an epoch would take with them.
    """
    from mocofast_bench import views_ahead
    from mocofast_bench.timing import cpu_medians

    from mocofast.memory import keep_freed
    from mocofast.settings import load_recipe

    keep_freed()
    torch.set_num_threads(1)  # as `pretrain` takes for a tiny network
    sides = views_ahead.build_sides(load_recipe("digits"), epochs)
    seconds = cpu_medians(sides._asdict(), repeats)
    epoch, views = 1e3 * seconds["epoch"], 1e3 * seconds["views"]
    ahead = 1e3 * seconds["ahead"] / epochs
    together = {"with views ahead": epoch - views + ahead}
    return {"mocofast": epoch, **together, "views": views, "views ahead": ahead}


def loader(
    folder: str,
    recipe: str,
    batch: int,
    decode: str,
    seconds: float,
    changes: dict[str, float] | None = None,
) -> Values:
    """Returns the pairs/s of the DALI loader over whole epochs, from the start of the first one.

    decode: as `data.decode`, in builds that have the option. seconds: least time of the epochs.
    changes: fields of `augment` with other values than the recipe's.
    """
    from mocofast.config import DataConfig
    from mocofast.data.interface import BatchSlice, view_augments
    from mocofast.data.loaders import build_loader
    from mocofast.data.sources import load_datasets
    from mocofast.settings import load_recipe

    data = DataConfig(source="folder", path=folder, loader="dali", labels="none", holdout=0.0)
    if hasattr(data, "decode"):
        data.decode = decode
    source = load_datasets(data).train
    augment = load_recipe(recipe).augment
    for name, value in (changes or {}).items():
        setattr(augment, name, value)
    augments = view_augments(augment, 2)
    made = build_loader(source, data, augments, BatchSlice(batch), 0, CPU)
    pairs, epoch, began = 0, 0, time.monotonic()
    try:
        while (spent := time.monotonic() - began) < seconds or not pairs:
            pairs += sum(len(views.views[0]) for views in made.epoch(epoch))
            epoch += 1
    finally:
        made.close()
    return {"mocofast": pairs / spent}


def _pretrain(
    folder: str, run: str, size: int, every: int, arch: str = "resnet18", recipe: str = ""
) -> list[str]:
    options = {
        "data.source": "folder",
        "data.path": folder,
        "augment.size": size,
        "train.log_every": every,
        "train.dir": run,
    }
    if not recipe:
        options |= {"model.arch": arch, "model.queue_size": QUEUE, "data.batch_size": 32}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "mocofast", "pretrain", recipe or RECIPE, *words]


def _cpu_seconds(process: int) -> float:
    """Returns the CPU seconds of a process, its children that run, and children that ended."""
    ticks = 0
    for pid in (process, *_descendants(process)):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # the process has ended meanwhile
            continue
        ticks += sum(map(int, fields[11:15]))  # user and system, own and of ended children
    return ticks / os.sysconf("SC_CLK_TCK")


def _descendants(process: int) -> Iterator[int]:
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            yield child
            yield from _descendants(child)


def split(count: int, classes: int, shuffled: bool, repeats: int) -> Values:
    """Returns the CPU seconds of a stratified split of labels, by class or in random order."""
    from mocofast.data.names import stratified_holdout

    labels = _labels(count, classes)
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    return _cpu({"mocofast": lambda: stratified_holdout(labels, 0.1, 0)}, repeats)


def few_shot(count: int, classes: int, repeats: int) -> Values:
    """Returns the CPU seconds of `few_shot_accuracy`, most of them for ten choices of samples."""
    from mocofast.evaluate.knn import few_shot_accuracy

    torch.set_num_threads(1)
    labels, features = torch.from_numpy(_labels(count, classes)), _random(count, 4)
    queries, truth = _random(100, 4), torch.zeros(100, dtype=torch.int64)
    return _cpu(
        {"mocofast": lambda: few_shot_accuracy(features, labels, queries, truth, shots=1)}, repeats
    )


def subset(count: int, classes: int, hashed: bool, repeats: int) -> Values:
    """Returns the CPU seconds of the choice of nine tenths of a folder's images.

    hashed: with the fingerprint of what was chosen, as for the checkpoint of a run.
    """
    from mocofast.data import sources

    labels = _labels(count, classes)
    names = [f"class{label:05d}/{number:08d}.jpg" for number, label in enumerate(labels)]
    source = sources.FolderSource(
        ".", names, labels, tuple(f"class{i:05d}" for i in range(classes))
    )
    index = np.flatnonzero(np.arange(count) % 10)

    def choose() -> None:
        part = sources._part(source, index)
        if hashed:
            part.fingerprint()

    return _cpu({"mocofast": choose}, repeats)


def listing(folder: str) -> Values:
    """Returns the CPU seconds of a listing of FOLDER/train, and of torchvision's."""
    from torchvision.datasets import ImageFolder

    from mocofast.config import DataConfig
    from mocofast.data.download import cache_folder
    from mocofast.data.sources import load_datasets

    for kept in (cache_folder() / "folders").glob("*"):  # lists that this build would read
        kept.unlink()
    data = DataConfig(path=folder, source="folder")
    return _cpu(
        {
            "mocofast": lambda: load_datasets(data),
            "ImageFolder": lambda: ImageFolder(os.path.join(folder, "train")),
        },
        1,
    )


def index(folder: str) -> Values:
    """Returns the CPU seconds of the index of all tar files of a folder."""
    from mocofast.data.shard_index import INDEX, local_index

    for kept in Path(folder).glob(f"*{INDEX}"):
        kept.unlink()
    shards = sorted(Path(folder).glob("*.tar"))
    return _cpu({"mocofast": lambda: [local_index(shard) for shard in shards]}, 1)


def knn(bank: int, queries: int, threads: int, repeats: int) -> Values:
    """Returns the ms of kNN at 128 dimensions, and of plain PyTorch."""
    from mocofast.evaluate.knn import knn_accuracy

    torch.set_num_threads(threads)
    sets = [_random(bank, 128), torch.arange(bank) % 10]
    sets += [_random(queries, 128), torch.arange(queries) % 10]
    calls = {"mocofast": lambda: knn_accuracy(*sets), "plain PyTorch": lambda: plain_knn(*sets)}
    return _milliseconds(calls, repeats)


def plain_knn(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 200
) -> list[float]:
    """Returns top-1 and top-5 of kNN, by a product, a top-k and a sum, a tile at a time."""
    bank, classes = F.normalize(bank), int(labels.max()) + 1
    hits = torch.zeros(2)
    for rows, own in zip(queries.split(TILE), truth.split(TILE)):
        similarity, found = (F.normalize(rows) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, labels[found], (similarity / TEMPERATURE).exp())
        right = votes.topk(5).indices == own[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    shares: list[float] = (hits / len(queries)).tolist()
    return shares


def decoder(folder: str, repeats: int) -> Values:
    """Returns the CPU ms of decoding a photo as the DALI loader does on a CPU, and of others.

    folder: of JPEG files. Raises RuntimeError if a side decodes one to other pixels than PIL.
    """
    from mocofast_bench import decoders
    from mocofast_bench.timing import cpu_medians

    torch.set_num_threads(1)
    files = [file.read_bytes() for file in sorted(Path(folder).iterdir())]
    sides = decoders.build_sides(files)
    decoders.check_equal(files, sides)
    medians = cpu_medians({side: each.decode for side, each in sides.items()}, repeats)
    return {side: 1e3 * seconds / len(files) for side, seconds in medians.items()}


def ema(arch: str, threads: int, repeats: int, cold: bool = False) -> Values:
    """Returns the ms of an EMA of all weights, and of torch._foreach_lerp_.

    cold: each call after a pass over other memory, as in training.
    """
    from mocofast_bench.ema import build_averagers

    torch.set_num_threads(threads)
    averagers = build_averagers(shapes(arch), torch.float32, CPU)[1]
    sides = ("mocofast", "foreach_lerp")
    return _milliseconds({side: averagers[side].update for side in sides}, repeats, cold)


def optimizer(
    name: str, arch: str, copies: bool, threads: int, repeats: int, cold: bool = False
) -> Values:
    """Returns the ms of a step with average, and of PyTorch's fused step and _foreach_lerp_.

    name: "sgd" or "adamw". copies: both also write bfloat16 copies of weights and averages.
    cold: as for `ema`.
    """
    from mocofast_bench.optim import build_sides

    torch.set_num_threads(threads)
    ours, others, _ = build_sides(name, CPU, copies, shapes(arch))
    fused = next(call for side, (_, call) in others.items() if side.startswith("fused"))
    return _milliseconds({"mocofast": ours.step, "fused, lerp": fused}, repeats, cold)


def attention(arch: str, size: int, batch: int, bf16: bool, threads: int, repeats: int) -> Values:
    """Returns the ms of a ViT's forward and backward pass, and with torchvision's attention.

    bf16: under autocast.
    """
    from mocofast_bench.attention import build_sides

    torch.set_num_threads(threads)
    return _milliseconds(build_sides(arch, size, batch, bf16), repeats)


def shapes(arch: str) -> list[tuple[int, ...]]:
    """Returns the shapes of the weights of torchvision's network, with 128 outputs."""
    from torchvision import models

    with torch.device("meta"):
        network = models.get_model(arch, num_classes=128)
    return [tuple(weight.shape) for weight in network.parameters()]


def _labels(count: int, classes: int) -> np.ndarray:
    """Returns equally many labels of every class, by class: (count,) int64."""
    return np.arange(count) * classes // count


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def _milliseconds(calls: dict[str, Callable[[], Any]], repeats: int, cold: bool = False) -> Values:
    from mocofast_bench.timing import interleaved

    # Old builds know no `cold`.
    times = interleaved(calls, repeats, CPU, **({"cold": True} if cold else {}))
    return {side: 1e3 * time.median for side, time in times.items()}


def _cpu(calls: dict[str, Callable[[], Any]], repeats: int) -> Values:
    """Returns the least CPU seconds of a call, all threads together."""
    values = {}
    for side, call in calls.items():
        spent = []
        for _ in range(repeats):
            before = time.process_time()
            call()
            spent.append(time.process_time() - before)
        values[side] = min(spent)
    return values


QUANTITIES: dict[str, Callable[..., Values]] = {
    function.__name__: function
    for function in (
        *(info_nce, step, pretrain, demo, views_ahead, loader, first_step, split, few_shot),
        *(subset, listing, index, knn, decoder, ema, optimizer, attention),
    )
}


def main() -> None:
    """Measures, and prints the line."""
    import mocofast

    name, options = sys.argv[1:]
    values = QUANTITIES[name](**json.loads(options))
    print(json.dumps({"build": str(Path(mocofast.__file__).parents[1]), "values": values}))


if __name__ == "__main__":
    main()
