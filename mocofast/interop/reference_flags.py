"""The flags of main_moco.py and main_lincls.py, as facts of these scripts."""

from __future__ import annotations

import argparse
from typing import Any


def add_flags(parser: argparse.ArgumentParser, linear: bool) -> None:
    """Adds the flags of main_moco.py, or, if `linear`, of main_lincls.py.

    The parser then returns only the flags that are given.
    """

    def flag(*names: str, kind: Any = None, help: str, **more: Any) -> None:
        how = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": "VALUE"}
        parser.add_argument(*names, default=argparse.SUPPRESS, help=help, **{**how, **more})

    parser.add_argument("data", metavar="DIR", help="folder of train/ and val/ with class folders")
    flag("-a", "--arch", kind=str, help="encoder [resnet50]")
    flag("-j", "--workers", kind=int, help="loader threads of this machine [its cores]")
    flag("--epochs", kind=int, help="[v1/v2 100, v3 90]" if linear else "[v1/v2 200, v3 100]")
    flag("--start-epoch", kind=int, help="ignored: the checkpoint of --resume says it [0]")
    flag(
        "-b", "--batch-size", kind=int, help="images per step [v1/v2 256, v3 1024 (linear) or 4096]"
    )
    flag(
        "--lr", "--learning-rate", kind=float, dest="lr", help="learning rate (v3: for 256 images)"
    )
    flag("--schedule", kind=int, nargs="*", help="v1/v2: epochs of a tenfold decrease of lr")
    flag("--momentum", kind=float, help="momentum of SGD or LARS [0.9]")
    flag("--wd", "--weight-decay", kind=float, dest="weight_decay", help="weight decay")
    flag("-p", "--print-freq", kind=int, help="steps between log lines")
    flag("--resume", kind=str, help="checkpoint or run folder of mocofast")
    flag("--seed", kind=int, help="seed [0]")
    flag("--gpu", kind=int, help="GPU to use")
    flag("--world-size", kind=int, help="number of nodes (above 1: use torchrun)")
    flag("--rank", kind=int, help="number of this node")
    flag("--dist-url", kind=str, help="tcp://HOST:PORT of the first node")
    flag(
        "--dist-backend",
        kind=str,
        choices=("nccl", "gloo"),
        help="ignored: nccl on GPUs, gloo on CPUs",
    )
    flag("--multiprocessing-distributed", kind=bool, help="starts a process for every GPU")
    if linear:
        flag("-e", "--evaluate", kind=bool, help="refused: no classifier is kept")
        flag(
            "--pretrained",
            kind=str,
            help="checkpoint of mocofast, facebookresearch/moco or moco-v3",
        )
        return
    flag("--moco-dim", kind=int, help="dimension of the embedding [v1/v2 128, v3 256]")
    flag("--moco-m", kind=float, help="momentum of the key encoder [v1/v2 0.999, v3 0.99]")
    flag("--moco-t", kind=float, help="temperature [v1/v2 0.07, v3 1.0]")
    flag("--moco-k", kind=int, help="v1/v2: queue size [65536]")
    flag("--mlp", kind=bool, help="v1/v2: MLP head")
    flag("--aug-plus", kind=bool, help="v1/v2: the augmentation of v2")
    flag("--cos", kind=bool, help="v1/v2: cosine schedule")
    flag("--moco-mlp-dim", kind=int, help="v3: hidden width of projector and predictor [4096]")
    flag("--moco-m-cos", kind=bool, help="v3: the momentum rises to 1 along a cosine")
    flag("--stop-grad-conv1", kind=bool, help="v3: freezes the random patch projection of a ViT")
    flag("--optimizer", kind=str, choices=("lars", "adamw"), help="v3: optimiser [lars]")
    flag("--warmup-epochs", kind=int, help="v3: epochs of warm-up [10]")
    flag("--crop-min", kind=float, help="v3: smallest share of a random crop [0.08]")
