"""Models 8 to 1,024 GPUs: bytes received by every rank in a step, and the time of the transfers.

    PYTHONPATH=.:kernels:benchmarks python -m mocofast_bench.scaling_model

Rewrites the tables of docs/scaling.md and plots docs/scaling.png, for mocofast and for the
reference. Needs a checkout of the repository.

Bytes are exact: tests/test_bench_scaling.py counts the bytes on the sockets of 2 and 4 real
processes. Times are not measured. Times follow from the assumptions in `Cluster`, which
docs/scaling.md lists.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"  # of the repository
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (32, 256)  # images per GPU: the reference's batch, and a batch that fills a large GPU
JPEG_BYTES = 1.1e5  # of an average ImageNet file
# Pairs of MoCo v2 views a second and core, measured on two cores of an AMD EPYC: the PIL DataLoader
# (docs/log.md), and the DALI loader with compiled operators (benchmarks/results/quick_cpu.jsonl).
PIL_PAIRS_PER_CORE = 80.0
OUR_PAIRS_PER_CORE = 430.0
SIDES = ("mocofast", "reference")


@dataclass(frozen=True)
class Workload:
    """Sizes to compute the bytes of a step."""

    ranks: int
    batch: int  # images per rank
    pixels: int  # values of an image, 3 S S
    dim: int  # C of a key
    parameters: int  # of the query encoder, with float32 gradients
    buffers: int  # bytes of the queue, the pointer and the BatchNorm buffers of both encoders


def received_bytes(step: Workload) -> dict[str, dict[str, float]]:
    """Returns the bytes received by a rank in a step, {side: {purpose: bytes}}.

    A rank sends as many bytes as a rank receives, except for broadcasts.

    mocofast: every image goes to a single rank as uint8. On average over permutations, 1/W of the
        images stay on their rank. Every key goes to all ranks once.
    reference: every image goes to all ranks as float32. Every key goes to all ranks twice: to
        restore the order, and for the queue. Rank 0 sends the permutation and, by
        DistributedDataParallel's default, all buffers.
    Gradients go around a ring (reduce-scatter and all-gather) on both sides.
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
    """Assumptions on the hardware.

    Rates are bytes a second and GPU, in one direction: 80% of the nominal rate, as applications
    reach.
    """

    per_node: int = 8
    inside: float = 0.8 * 450e9  # NVLink 4
    network: float = 0.8 * 50e9  # one 400 Gb/s port per GPU
    latency: float = 15e-6  # seconds per level of a collective's tree, log2(ranks) levels
    message: float = 1e-6  # seconds per peer in an all-to-all
    bucket: float = 25e6  # bytes of DDP's last bucket, which overlaps with nothing
    # Per GPU, encoders only: MLPerf's 7,012 on an H100, x 3/4 for the forward pass of the keys.
    images_per_second: float = 5259.0

    def nodes(self, ranks: int) -> int:
        """Returns the number of nodes."""
        return max(1, ranks // self.per_node)

    def all_gather(self, ranks: int, own: float) -> float:
        """Returns the seconds until every rank has the `own` bytes of all ranks.

        A port receives the bytes of one rank of every remote node. NVLink carries the rest.
        """
        remote = self.nodes(ranks) - 1
        return (
            remote * own / self.network
            + (ranks - 1 - remote) * own / self.inside
            + self._levels(ranks)
        )

    def all_to_all(self, ranks: int, own: float, peers: float) -> float:
        """Returns the seconds to send `own` bytes evenly to all ranks, in `peers` messages."""
        outside = max(0, ranks - self.per_node) / ranks
        inside = (min(ranks, self.per_node) - 1) / ranks
        return (
            own * (outside / self.network + inside / self.inside)
            + self.latency
            + peers * self.message
        )

    def all_reduce(self, ranks: int, size: float) -> float:
        """Returns the seconds to sum `size` bytes over all ranks.

        First inside the nodes, then every GPU sums a slice over the network, then inside again.
        """
        nodes, group = self.nodes(ranks), min(ranks, self.per_node)
        ring = 2 * (group - 1) / group * size / self.inside
        return (
            ring + 2 * (nodes - 1) / nodes * size / group / self.network + 2 * self._levels(ranks)
        )

    def broadcast(self, ranks: int, size: float) -> float:
        """Returns the seconds to send `size` bytes from one rank to all, by all ports of a node."""
        network = size / self.per_node / self.network if self.nodes(ranks) > 1 else 0.0
        return network + size / self.inside + self._levels(ranks)

    def _levels(self, ranks: int) -> float:
        return self.latency * math.log2(ranks)


def exposed_seconds(step: Workload, cluster: Cluster) -> dict[str, dict[str, float]]:
    """Returns the seconds that communication adds to a step, {side: {purpose: seconds}}.

    Gradients travel during the backward pass, half of the encoders' work. All gradients except
    the last bucket can overlap with the backward pass. Nothing else overlaps, although images
    and keys of mocofast could travel during the forward pass of the query encoder.
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
    """Returns the seconds of the encoders in a step, equal for both sides."""
    return step.batch / cluster.images_per_second


def efficiency(step: Workload, cluster: Cluster) -> dict[str, float]:
    """Returns {side: throughput per GPU / throughput of a single GPU without communication}."""
    alone = compute_seconds(step, cluster)
    return {
        side: alone / (alone + sum(parts.values()))
        for side, parts in exposed_seconds(step, cluster).items()
    }


def moco_v2() -> Workload:
    """Returns the sizes of MoCo v2, counted on the model.

    ResNet-50 with MoCo v2's head, 224 px, queue of 65,536 keys, 8 ranks with 32 images.
    """
    from mocofast.methods.moco import build
    from mocofast.settings import load_recipe

    config = load_recipe("moco_v2_r50_200ep")
    model = build(config)
    return Workload(
        ranks=8,
        batch=32,
        pixels=3 * math.prod(config.augment.shape),
        dim=config.model.dim,
        parameters=sum(p.numel() for p in model.encoder_q.parameters()),
        buffers=sum(
            b.numel() * b.element_size() for name, b in model.named_buffers() if "pixel" not in name
        ),
    )


def format_bytes(size: float) -> str:
    """Writes bytes with three digits and a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            number = size / scale
            return f"{number:.3g} {unit}" if number < 1e3 else f"{number:,.0f} {unit}"
    return f"{size:.0f} B"


def tables(base: Workload, cluster: Cluster) -> str:
    """Returns the Markdown between the markers of docs/scaling.md."""
    parts = [bytes_table(replace(base, batch=batch)) for batch in BATCHES]
    parts += [times_table(replace(base, batch=batch), cluster) for batch in BATCHES]
    return "\n\n".join([*parts, feeding_table(base, cluster)])


def bytes_table(base: Workload) -> str:
    """Returns the table of received bytes, with a line for every count of GPUs."""
    heads = ["images, ours", "images, reference", "ratio", "keys, ours", "keys, reference"]
    lines = []
    for ranks in RANKS:
        ours, reference = received_bytes(replace(base, ranks=ranks)).values()
        sizes = [ours["images"], reference["images"], ours["keys"], reference["keys"]]
        sizes += [ours["gradients"], reference["buffers"]]
        cells = [format_bytes(size) for size in sizes]
        cells.insert(2, f"{reference['images'] / ours['images']:.0f}x")
        lines.append([str(ranks), *cells])
    title = f"Bytes received by every rank in a step, {base.batch} images per GPU:"
    return table(title, [*heads, "gradients, both", "buffers, reference"], lines)


def times_table(base: Workload, cluster: Cluster) -> str:
    """Returns the table of communication times, with a line for every count of GPUs."""
    heads = ["images, ours", "keys, ours", "gradients", "efficiency, ours"]
    heads += ["images, reference", "rest, reference", "efficiency, reference"]
    lines = []
    for ranks in RANKS:
        workload = replace(base, ranks=ranks)
        ours, reference = exposed_seconds(workload, cluster).values()
        share = efficiency(workload, cluster)
        rest = sum(reference.values()) - reference["images"]
        times = [ours["images"], ours["keys"], ours["gradients"]]
        cells = [*(f"{1e3 * time:.2f}" for time in times), f"{share['mocofast']:.1%}"]
        cells += [f"{1e3 * reference['images']:,.2f}", f"{1e3 * rest:.2f}"]
        lines.append([str(ranks), *cells, f"{share['reference']:.1%}"])
    title = "Milliseconds that communication adds to a step of "
    title += (
        f"{1e3 * compute_seconds(base, cluster):.1f} ms, {base.batch} images per GPU (modelled):"
    )
    return table(title, heads, lines)


def feeding_table(base: Workload, cluster: Cluster) -> str:
    """Returns the table of what a cluster needs to feed the encoders with images."""
    rate = cluster.images_per_second
    heads = ["JPEG read, all", "PIL, v2 views: cores per GPU", "mocofast: cores per GPU"]
    lines = []
    for ranks in RANKS:
        gathered = 2 * 4 * ranks * 32 * base.pixels  # bytes: gathered tensors and torch.cat
        cells = [f"{format_bytes(ranks * rate * JPEG_BYTES)}/s"]
        cells += [f"{rate / pairs:.0f}" for pairs in (PIL_PAIRS_PER_CORE, OUR_PAIRS_PER_CORE)]
        lines.append([str(ranks), *cells, format_bytes(gathered)])
    title = f"Needed to feed {rate:,.0f} images per second and GPU:"
    return table(title, [*heads, "GPU memory of the reference's gather, 32 per GPU"], lines)


def table(title: str, heads: list[str], lines: list[list[str]], first: str = "GPUs") -> str:
    """Returns a table of Markdown below a title. first: the head of the first column."""
    rows = [f"| {' | '.join(cells)} |" for cells in ([first, *heads], *lines)]
    return "\n".join(
        [textwrap.fill(title, 100), "", rows[0], "|---" * (1 + len(heads)) + "|", *rows[1:]]
    )


def plot(base: Workload, cluster: Cluster, out: Path) -> None:
    """Plots bytes received in a step, and weak-scaling efficiency, over the number of GPUs."""
    from mocofast.plots import new_figure

    blue, orange, gray = "#1f6feb", "#e8710a", "#7a7f87"
    figure = new_figure(11, 4.6)
    bytes_axes, share_axes = figure.subplots(1, 2)
    # Left: bytes received by a rank.
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
    # Right: efficiency.
    for batch, style in zip(BATCHES, ("--", "-")):
        shares = [efficiency(replace(step, batch=batch), cluster) for step in steps]
        for side, color in zip(SIDES, (blue, orange)):
            label = f"{side}, {batch} images per GPU"
            share_axes.plot(
                RANKS, [s[side] for s in shares], color=color, linestyle=style, label=label
            )
    finish_axes(bytes_axes, share_axes)
    figure.savefig(out)


def finish_axes(bytes_axes: Any, share_axes: Any) -> None:
    """Sets scales, labels and legends of a plot over the number of GPUs."""
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    share_axes.set(
        ylim=(0, 1.02),
        ylabel="throughput per GPU, relative to one GPU",
        title="Weak scaling (modelled)",
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


def insert_tables(text: str, content: str, name: str = "tables") -> str:
    """Returns the document with `content` between the lines <!-- NAME --> and <!-- end -->.

    Raises ValueError if the lines are missing.
    """
    between = re.compile(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end -->)")
    if not between.search(text):
        raise ValueError(f"the document lacks the lines <!-- {name} --> and <!-- end -->")
    return between.sub(lambda _: f"{content}\n", text)


def main() -> int:
    """Rewrites the first tables of docs/scaling.md, and docs/scaling.png. Returns as `write`."""
    base, cluster = moco_v2(), Cluster()
    return write(
        "tables", tables(base, cluster), "scaling.png", lambda out: plot(base, cluster, out)
    )


def write(name: str, content: str, picture: str, draw: Callable[[Path], None]) -> int:
    """Rewrites tables and a plot of docs/scaling.md. Returns 1 outside a checkout, else 0.

    name: as of `insert_tables`. picture: the name of the plot, which `draw` writes.
    """
    document = DOCS / "scaling.md"
    if not document.is_file():
        print(
            f"{document} does not exist: run this command in a checkout of mocofast",
            file=sys.stderr,
        )
        return 1
    document.write_text(insert_tables(document.read_text("utf-8"), content, name), "utf-8")
    draw(DOCS / picture)
    print(f"Written: {document}, {DOCS / picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
