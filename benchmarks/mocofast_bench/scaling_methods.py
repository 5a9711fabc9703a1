"""Models a step of MoCo v2 and v3 on 8 to 1,024 GPUs, H100 and H200, with DDP and with FSDP2.

`python -m mocofast_bench.scaling_methods` writes the tables and a plot into docs/scaling.md. Bytes
follow the collectives of a step, which tests/test_bench_scaling_methods.py counts on sockets. Times
are not measured.
"""

from __future__ import annotations

import math
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mocofast_bench.scaling_model import (
    OUR_PAIRS_PER_CORE,
    RANKS,
    Cluster,
    finish_axes,
    format_bytes,
    table,
    write,
)

MFU = 0.4  # share of the matrix rate that a ViT reaches
MATRIX_RATE = 989e12  # bf16 operations a second of an H100 and of an H200
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second of the memory
CORES = 16  # of a node, per GPU
# Local SGD (DiLoCo): steps between two exchanges, and the slow link between islands of 8 GPUs.
LOCAL_STEPS = (1, 50, 500)
SLOW_LINK = 0.8 * 10e9 / 8  # bytes a second and GPU: 10 Gb/s


@dataclass(frozen=True)
class Case:
    """A method, a model and a way to share the work.

    Numbers of weights: `trained` (with gradients), `encoder` (of which there are two), `blocks`
    (those of `encoder` in blocks of a ViT) and `predictor`. `norms`: (layers, channels) of
    synchronised BatchNorm in the query encoder with predictor, and in the momentum encoder.
    """

    name: str
    trained: int
    encoder: int
    dim: int
    views: int  # that every encoder sees
    batch: int  # images per GPU of an H100
    images_per_second: float = 0.0  # of an H100, encoders alone
    grows_with: str = ""  # "bandwidth" or "matrix rate" of a GPU
    pixels: int = 0  # values of an image that the shuffle sends, or 0
    predictor: int = 0
    blocks: int = 0
    depth: int = 0  # number of blocks
    norms: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    fsdp: bool = False

    def on(self, gpu: str) -> Case:
        """Returns the case with the rate and the batch of a GPU.

        A batch grows with the memory, 140.4 / 79.6 GiB, in steps of 32 images.
        """
        if gpu == "H100":
            return self
        rate = BANDWIDTHS[gpu] / BANDWIDTHS["H100"] if self.grows_with == "bandwidth" else 1.0
        batch = int(self.batch * 140.4 / 79.6) // 32 * 32
        return replace(self, batch=batch, images_per_second=rate * self.images_per_second)


def received_bytes(case: Case, ranks: int) -> dict[str, float]:
    """Returns the bytes that a rank receives in a step, {purpose: bytes}.

    DDP: a ring sums the gradients. FSDP2: weights travel before every pass of a view, forward and
    backward, those of blocks in bf16 and others in float32, and gradients once, in float32.
    """
    w, n = ranks, case.batch
    others = (w - 1) / w
    gathered, summed = passes(case)
    (_, trained), (_, momentum) = case.norms
    found = {
        "images": others * n * case.pixels,
        "keys": (w - 1) * n * case.dim * 4 * case.views,
        # Means and variances are gathered. Two sums a channel go around a ring in the backward.
        "norms": (w - 1) * 8 * case.views * (trained + momentum)
        + others * 16 * case.views * trained,
        "weights": others * gathered,
        "gradients": others * (summed if case.fsdp else 8 * case.trained),
    }
    return {purpose: size for purpose, size in found.items() if size}


def passes(case: Case) -> tuple[float, float]:
    """Returns the bytes of weights that FSDP2 gathers, and of gradients that FSDP2 sums."""
    if not case.fsdp:
        return 0.0, 0.0
    rounds = 3 * case.views  # both encoders forward, and one backward
    gathered = rounds * (2 * case.blocks + 4 * (case.encoder - case.blocks)) + 4 * case.predictor
    return gathered, 4 * case.trained


def added_seconds(case: Case, ranks: int, cluster: Cluster) -> dict[str, float]:
    """Returns the seconds that communication adds to a step, {purpose: seconds}.

    Gradients of DDP overlap with the backward pass, half of the encoders' work, except for the
    last bucket. FSDP2 fetches the weights of the next block while a block computes, so all but
    one block can overlap. Statistics of BatchNorm, keys and images overlap with nothing.
    """
    compute, (gathered, summed) = case.batch / case.images_per_second, passes(case)
    found = {
        "images": cluster.all_to_all(ranks, case.batch * case.pixels, min(case.batch, ranks - 1)),
        "keys": case.views * cluster.all_gather(ranks, case.batch * case.dim * 4),
    }
    if not case.pixels:
        del found["images"]
    (layers, channels), (momentum_layers, momentum_channels) = case.norms
    if layers:
        own = case.views * 8 * (channels + momentum_channels)
        found["norms"] = (
            cluster.all_gather(ranks, own)
            + cluster.all_reduce(ranks, case.views * 8 * channels)
            # Every layer waits for its own collective.
            + (case.views * (layers + momentum_layers) - 1) * cluster.all_gather(ranks, 0)
            + (case.views * layers - 1) * cluster.all_reduce(ranks, 0)
        )
    if case.fsdp:
        rounds = 3 * case.views * case.depth
        weights = cluster.all_gather(ranks, gathered / ranks)
        weights += (rounds - 1) * cluster.all_gather(ranks, 0)
        sums = cluster.all_reduce(ranks, summed) / 2  # a reduce-scatter is half an all-reduce
        sums += (case.depth - 1) * cluster.all_reduce(ranks, 0) / 2
        found["weights and gradients"] = max(
            weights + sums - compute, (weights + sums) / case.depth
        )
    else:
        size = 4.0 * case.trained
        reduce = cluster.all_reduce(ranks, size)
        found["gradients"] = max(reduce - compute / 2, reduce * min(1, cluster.bucket / size))
    return found


def cases() -> list[Case]:
    """Returns MoCo v2 and v3 with a ResNet-50, and v3 with a ViT-L, counted on the models."""
    # MLPerf's rate of training, of which a step with a momentum encoder reaches 3/4 (Cluster).
    resnet = Cluster().images_per_second
    v2 = _counted("MoCo v2, ResNet-50, DDP", "moco_v2_r50_200ep", 1, 256, resnet, "bandwidth")
    v3 = _counted("MoCo v3, ResNet-50, DDP", "moco_v3_r50", 2, 256, resnet / 2, "bandwidth")
    vit = _counted("MoCo v3, ViT-L, DDP", "moco_v3_vit_l", 2, 64, 0.0, "matrix rate")
    # Query forward and backward and key forward, of both views: 8 forward passes of an image.
    macs = 24 * (12 * 1024**2 * 197 + 2 * 197**2 * 1024)
    vit = replace(vit, images_per_second=MFU * MATRIX_RATE / (8 * 2 * macs))
    return [v2, v3, vit, replace(vit, name="MoCo v3, ViT-L, FSDP2", fsdp=True)]


def _counted(name: str, recipe: str, views: int, batch: int, rate: float, grows_with: str) -> Case:
    """Returns the case of a recipe."""
    import torch

    from mocofast.methods.build import build_method
    from mocofast.settings import load_recipe

    config = load_recipe(recipe)
    with torch.device("meta"):
        method = build_method(config, 1, 2)
    case = counted_case(method, name, config.model.dim, views, batch)
    pixels = 3 * math.prod(config.augment.shape) if hasattr(method, "shuffle") else 0
    return replace(case, images_per_second=rate, grows_with=grows_with, pixels=pixels)


def counted_case(
    method: Any, name: str, dim: int, views: int, batch: int, fsdp: bool = False
) -> Case:
    """Returns a case with the numbers of weights and channels of a method, and no rate."""
    from mocofast.models.flexible_vit import FlexibleViT
    from mocofast.models.recompute import blocks_of
    from mocofast.models.sync_batch_norm import SyncBatchNorm

    predictor = [method.predictor] if hasattr(method, "predictor") else []
    query = [method.encoder_q, *predictor]
    is_vit = any(isinstance(module, FlexibleViT) for module in method.encoder_q.modules())
    blocks = list(blocks_of(method.encoder_q)) if is_vit else []

    def norms(*modules: Any) -> tuple[int, int]:
        parts = [part for module in modules for part in module.modules()]
        found = [part.num_features for part in parts if isinstance(part, SyncBatchNorm)]
        return len(found), sum(found)

    return Case(
        name,
        trained=sum(p.numel() for p in method.parameters() if p.requires_grad),
        encoder=_weights(method.encoder_k),
        predictor=_weights(*predictor),
        dim=dim,
        views=views,
        batch=batch,
        blocks=_weights(*blocks),
        depth=len(blocks),
        norms=(norms(*query), norms(method.encoder_k)),
        fsdp=fsdp,
    )


def _weights(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def efficiency(case: Case, ranks: int, cluster: Cluster) -> float:
    """Returns throughput per GPU / throughput of a GPU without communication."""
    alone = case.batch / case.images_per_second
    return alone / (alone + sum(added_seconds(case, ranks, cluster).values()))


def tables(cluster: Cluster) -> str:
    """Returns the Markdown of the methods' tables."""
    found = cases()
    parts = [*(_case_table(case, cluster) for case in found), _feeding_line(found)]
    return "\n\n".join([*parts, _local_table(found)])


def _case_table(case: Case, cluster: Cluster) -> str:
    purposes = list(received_bytes(case, 8))
    heads = [*purposes]
    for gpu in BANDWIDTHS:
        heads += [f"{gpu}: efficiency", f"{gpu}: longest wait"]
    lines = []
    for ranks in RANKS:
        sizes = received_bytes(case, ranks)
        cells = [str(ranks), *(format_bytes(sizes[purpose]) for purpose in purposes)]
        for gpu in BANDWIDTHS:
            on = case.on(gpu)
            added = added_seconds(on, ranks, cluster)
            longest = max(added, key=lambda purpose: added[purpose])
            share = efficiency(on, ranks, cluster)
            cells += [f"{share:.1%}", f"{longest}, {1e3 * added[longest]:.2f} ms"]
        lines.append(cells)
    steps = [
        f"{on.batch} images and {1e3 * on.batch / on.images_per_second:.0f} ms a step on an {gpu}"
        for gpu in BANDWIDTHS
        for on in [case.on(gpu)]
    ]
    title = f"**{case.name}**, {' and '.join(steps)}. Bytes received with the images of an H100:"
    return table(title, heads, lines)


def _local_table(found: list[Case]) -> str:
    """Returns the table of local SGD: islands of 8 GPUs that exchange weights every H steps."""
    lines = []
    for case in found[1:3]:
        for steps in LOCAL_STEPS:
            size = 8 * case.trained / 8 / steps  # a ring over the islands, 1/8 of it a GPU
            alone = case.batch / case.images_per_second
            share = alone / (alone + size / SLOW_LINK)
            memory = format_bytes(8 * case.trained)
            lines.append([case.name, str(steps), format_bytes(size), f"{share:.0%}", memory])
    title = "Islands of 8 H100 with 10 Gb/s a GPU between them, local SGD:"
    heads = ["steps between exchanges", "bytes a step and GPU", "efficiency", "more memory"]
    return table(title, heads, lines, "method")


def _feeding_line(found: list[Case]) -> str:
    """Returns how many images a second 16 cores feed, beside the rates of the encoders."""
    rates = [f"{case.images_per_second:,.0f} ({case.name})" for case in found[:3]]
    fed = CORES * OUR_PAIRS_PER_CORE
    line = f"{CORES} cores feed {fed:,.0f} images a second, and an H100 takes {', '.join(rates)}."
    return textwrap.fill(line, 100)


def plot(cluster: Cluster, out: Path) -> None:
    """Plots bytes received, and weak-scaling efficiency, over the number of GPUs."""
    from mocofast.plots import new_figure

    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    for case, color in zip(cases(), ("#1f6feb", "#e8710a", "#7a7f87", "#2da44e")):
        sizes = [sum(received_bytes(case, ranks).values()) / 1e6 for ranks in RANKS]
        left.plot(RANKS, sizes, color=color, label=case.name)
        for gpu, style in zip(BANDWIDTHS, ("-", "--")):
            shares = [efficiency(case.on(gpu), ranks, cluster) for ranks in RANKS]
            right.plot(RANKS, shares, color=color, linestyle=style, label=f"{case.name}, {gpu}")
    left.set(yscale="log", ylabel="MB received by a rank in a step", title="Batches of an H100")
    finish_axes(left, right)
    figure.savefig(out)


def main() -> int:
    """Rewrites the tables of the methods in docs/scaling.md, and the plot. Returns as `write`."""
    cluster = Cluster()
    picture = "scaling_methods.png"
    return write("methods", tables(cluster), picture, lambda out: plot(cluster, out))


if __name__ == "__main__":
    sys.exit(main())
