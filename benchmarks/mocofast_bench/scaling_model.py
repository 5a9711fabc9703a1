"""A model of 8 to 1,024 GPUs: bytes that each rank receives in a step, and the time they cost; ours beside the
reference's.

    python -m mocofast_bench.scaling_model      rewrites the tables of docs/scaling.md and draws docs/scaling.png

The bytes are exact, and tests/test_scaling.py counts them on the sockets of 2 and 4 real processes. The times are no
measurement: they follow from the assumptions in `Cluster`, which docs/scaling.md states.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"  # of the repository
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (32, 256)  # images per GPU: the reference's own, and one that fills a large GPU
JPEG_BYTES = 1.1e5  # of an average ImageNet file
PIL_PAIRS_PER_CORE = 50.0  # MoCo v2 views a second, as measured (docs/log.md)
SIDES = ("mocofast", "reference")


@dataclass(frozen=True)
class Workload:
    """What the bytes of one step depend on."""

    ranks: int
    batch: int  # images per rank
    pixels: int  # values of an image, 3 S S
    dim: int  # C of a key
    parameters: int  # of the query encoder, whose float32 gradients are averaged
    buffers: int  # bytes of the queue, its pointer and both encoders' BatchNorm buffers


def received_bytes(step: Workload) -> dict[str, dict[str, float]]:
    """Bytes that reach one rank in one step, by side and purpose. Each rank sends as many, broadcasts apart.

    Ours: every image goes to one rank as uint8 (the average over permutations: 1/W stay at home), every key to all
    once. The reference's: every image to all as float32, every key to all twice (to restore the order, and for the
    queue), the permutation from rank 0, and, by DistributedDataParallel's default, all buffers from rank 0.
    Gradients: a ring of reduce-scatter and all-gather, on both sides.
    """
    w, n = step.ranks, step.batch
    gradients = 2 * (w - 1) / w * 4 * step.parameters
    keys = (w - 1) * n * step.dim * 4
    return {
        "mocofast": {"images": (w - 1) / w * n * step.pixels, "keys": keys, "gradients": gradients},
        "reference": {
            "images": (w - 1) * n * step.pixels * 4,
            "keys": 2 * keys,
            "gradients": gradients,
            "buffers": step.buffers,
            "permutation": 8 * w * n,
        },
    }


@dataclass(frozen=True)
class Cluster:
    """Assumptions. Rates are bytes per second and GPU, one direction, as applications see them (80% of nominal)."""

    per_node: int = 8
    inside: float = 0.8 * 450e9  # NVLink 4
    network: float = 0.8 * 50e9  # one 400 Gb/s port per GPU
    latency: float = 15e-6  # seconds per level of a collective's tree, log2(ranks) levels
    message: float = 1e-6  # seconds per peer in an all-to-all
    bucket: float = 25e6  # bytes: DDP's last bucket, which nothing is left to hide
    images_per_second: float = (
        5259.0  # per GPU, encoders only: MLPerf's 7,012 on an H100 x 3/4 for the key forward
    )

    def nodes(self, ranks: int) -> int:
        return max(1, ranks // self.per_node)

    def all_gather(self, ranks: int, own: float) -> float:
        """Seconds until every rank has the `own` bytes of all: over each port those of its peers in other nodes."""
        remote = self.nodes(ranks) - 1
        return (
            remote * own / self.network
            + (ranks - 1 - remote) * own / self.inside
            + self._levels(ranks)
        )

    def all_to_all(self, ranks: int, own: float, peers: float) -> float:
        """Seconds to spread `own` bytes evenly over all ranks, in messages to `peers` of them."""
        outside = max(0, ranks - self.per_node) / ranks
        inside = (min(ranks, self.per_node) - 1) / ranks
        return (
            own * (outside / self.network + inside / self.inside)
            + self.latency
            + peers * self.message
        )

    def all_reduce(self, ranks: int, size: float) -> float:
        """Seconds to sum `size` bytes: inside the nodes, then each GPU its share over its port, then inside again."""
        nodes, group = self.nodes(ranks), min(ranks, self.per_node)
        ring = 2 * (group - 1) / group * size / self.inside
        return (
            ring + 2 * (nodes - 1) / nodes * size / group / self.network + 2 * self._levels(ranks)
        )

    def broadcast(self, ranks: int, size: float) -> float:
        """Seconds for `size` bytes from one rank to all, a node's ports together."""
        network = size / self.per_node / self.network if self.nodes(ranks) > 1 else 0.0
        return network + size / self.inside + self._levels(ranks)

    def _levels(self, ranks: int) -> float:
        return self.latency * math.log2(ranks)


def exposed_seconds(step: Workload, cluster: Cluster) -> dict[str, dict[str, float]]:
    """Seconds that communication adds to a step, by side and purpose.

    Gradients travel while backward, half of the encoders' work, still runs; all but the last bucket can hide there.
    Nothing else is hidden, though images and keys of ours could travel beside the query's forward.
    """
    w, n = step.ranks, step.batch
    size = 4.0 * step.parameters
    reduce = cluster.all_reduce(w, size)
    gradients = max(
        reduce - compute_seconds(step, cluster) / 2, reduce * min(1, cluster.bucket / size)
    )
    keys = cluster.all_gather(w, n * step.dim * 4)
    return {
        "mocofast": {
            "images": cluster.all_to_all(w, n * step.pixels, min(n, w - 1)),
            "keys": keys,
            "gradients": gradients,
        },
        "reference": {
            "images": cluster.all_gather(w, n * step.pixels * 4),
            "keys": 2 * keys,
            "gradients": gradients,
            "buffers": cluster.broadcast(w, step.buffers),
            "permutation": cluster.broadcast(w, 8 * w * n),
        },
    }


def compute_seconds(step: Workload, cluster: Cluster) -> float:
    """Seconds of the encoders in a step; the same for both sides, so that only communication differs."""
    return step.batch / cluster.images_per_second


def efficiency(step: Workload, cluster: Cluster) -> dict[str, float]:
    """Throughput per GPU relative to a GPU that exchanges nothing."""
    alone = compute_seconds(step, cluster)
    return {
        side: alone / (alone + sum(parts.values()))
        for side, parts in exposed_seconds(step, cluster).items()
    }


def moco_v2() -> Workload:
    """ResNet-50 with MoCo v2's head at 224 px, queue of 65,536 keys, counted on the model itself."""
    from mocofast.methods.moco import build
    from mocofast.settings import load_recipe

    config = load_recipe("moco_v2_r50_200ep")
    model = build(config)
    return Workload(
        ranks=8,
        batch=32,
        pixels=3 * config.augment.size**2,
        dim=config.model.dim,
        parameters=sum(p.numel() for p in model.encoder_q.parameters()),
        buffers=sum(
            b.numel() * b.element_size() for name, b in model.named_buffers() if "pixel" not in name
        ),
    )


def format_bytes(size: float) -> str:
    """Bytes with three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return (
                f"{size / scale:.3g} {unit}"
                if size < 1e3 * scale
                else f"{size / scale:,.0f} {unit}"
            )
    return f"{size:.0f} B"


def tables(base: Workload, cluster: Cluster) -> str:
    """The Markdown of docs/scaling.md between its markers."""
    lines = []
    for batch in BATCHES:
        lines += [
            f"Bytes received by each rank in a step, {batch} images per GPU:",
            "",
            "| GPUs | images, ours | images, reference | ratio | keys, ours | keys, reference | gradients, both "
            "| buffers, reference |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for ranks in RANKS:
            ours, reference = received_bytes(replace(base, ranks=ranks, batch=batch)).values()
            cells = [
                str(ranks), format_bytes(ours["images"]), format_bytes(reference["images"]),
                f"{reference['images'] / ours['images']:.0f}x", format_bytes(ours["keys"]), format_bytes(reference["keys"]),
                format_bytes(ours["gradients"]), format_bytes(reference["buffers"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for batch in BATCHES:
        alone = compute_seconds(replace(base, batch=batch), cluster)
        lines += [
            f"Milliseconds that communication adds to a step of {1e3 * alone:.1f} ms, {batch} images per GPU "
            "(modelled):",
            "",
            "| GPUs | images, ours | keys, ours | gradients | efficiency, ours | images, reference | rest, reference "
            "| efficiency, reference |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for ranks in RANKS:
            step = replace(base, ranks=ranks, batch=batch)
            ours, reference = exposed_seconds(step, cluster).values()
            share = efficiency(step, cluster)
            rest = sum(reference.values()) - reference["images"]
            times = [ours["images"], ours["keys"], ours["gradients"]]
            cells = [str(ranks), *(f"{1e3 * t:.2f}" for t in times), f"{share['mocofast']:.1%}"]
            cells += [
                f"{1e3 * reference['images']:,.2f}",
                f"{1e3 * rest:.2f}",
                f"{share['reference']:.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    rate = cluster.images_per_second
    lines += [
        f"What feeding {rate:,.0f} images per second and GPU takes:",
        "",
        "| GPUs | JPEG read, all | PIL, v2 views: cores per GPU | GPU memory of the reference's gather, 32 per GPU |",
        "|---|---|---|---|",
    ]
    for ranks in RANKS:
        gathered = 2 * 4 * ranks * 32 * base.pixels  # the parts, and their concatenation
        read, cores = ranks * rate * JPEG_BYTES, rate / PIL_PAIRS_PER_CORE
        lines.append(
            f"| {ranks} | {format_bytes(read)}/s | {cores:.0f} | {format_bytes(gathered)} |"
        )
    return "\n".join(lines)


def plot(base: Workload, cluster: Cluster, out: Path) -> None:
    """Bytes received per step, and weak-scaling efficiency, over the number of GPUs."""
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    from mocofast.plots import new_figure

    blue, orange, gray = "#1f6feb", "#e8710a", "#7a7f87"
    figure = new_figure(11, 4.6)
    bytes_axes, share_axes = figure.subplots(1, 2)
    steps = [replace(base, ranks=ranks) for ranks in RANKS]
    rows = [received_bytes(step) for step in steps]
    for side, purpose, color, style in (
        ("reference", "images", orange, "-"),
        ("reference", "keys", orange, "--"),
        ("reference", "buffers", orange, ":"),
        ("mocofast", "images", blue, "-"),
        ("mocofast", "keys", blue, "--"),
        ("mocofast", "gradients", gray, "-"),
    ):
        label = "gradients, both" if purpose == "gradients" else f"{purpose}, {side}"
        bytes_axes.plot(
            RANKS,
            [row[side][purpose] / 1e6 for row in rows],
            color=color,
            linestyle=style,
            label=label,
        )
    bytes_axes.set(
        yscale="log", ylabel="MB received by a rank in a step", title=f"{base.batch} images per GPU"
    )
    for batch, style in zip(BATCHES, ("--", "-")):
        shares = [efficiency(replace(step, batch=batch), cluster) for step in steps]
        for side, color in zip(SIDES, (blue, orange)):
            label = f"{side}, {batch} images per GPU"
            share_axes.plot(
                RANKS, [s[side] for s in shares], color=color, linestyle=style, label=label
            )
    share_axes.set(
        ylim=(0, 1.02), ylabel="throughput per GPU, of one alone", title="Weak scaling (modelled)"
    )
    share_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (bytes_axes, share_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("GPUs")
        axes.grid(color="#e6e8eb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def insert_tables(text: str, content: str) -> str:
    """The document with `content` between its markers."""
    return re.sub(
        r"(?s)(<!-- tables -->\n).*(\n<!-- end -->)", lambda m: m[1] + content + m[2], text
    )


if __name__ == "__main__":
    base, cluster = moco_v2(), Cluster()
    document = DOCS / "scaling.md"
    document.write_text(insert_tables(document.read_text("utf-8"), tables(base, cluster)), "utf-8")
    plot(base, cluster, DOCS / "scaling.png")
    print(f"written: {document}, {DOCS / 'scaling.png'}")
