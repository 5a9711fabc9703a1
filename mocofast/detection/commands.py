"""The commands `mocofast detect` and `mocofast segment`. Loads PyTorch after the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mocofast import interrupts
from mocofast.detection.options import KINDS, groups
from mocofast.parser import Parser, add_settings, given_settings

log = logging.getLogger("mocofast")


def detect(argv: Sequence[str]) -> int:
    """object detection on a checkpoint's encoder: Pascal VOC's and COCO's AP"""
    return _main(
        "detect",
        argv,
        "Trains a detector on the encoder of a checkpoint, and measures its average precision.\n"
        "Defaults in [brackets]: Faster R-CNN R50-C4 as in MoCo's table on VOC07+12.\n"
        "On a CPU the defaults are small. The first line of the output names them.",
    )


def segment(argv: Sequence[str]) -> int:
    """semantic segmentation on a checkpoint's encoder: mean IoU"""
    return _main(
        "segment",
        argv,
        "Trains a segmentation network on the encoder of a checkpoint, and measures its mean IoU.\n"
        "On a CPU the defaults are small. The first line of the output names them.",
    )


def _main(task: str, argv: Sequence[str], description: str) -> int:
    parser = Parser(
        prog=f"mocofast {task}",
        usage=f"mocofast {task} CKPT [CKPT ...] --data.path DIR [--resume auto|PATH] "
        "[--OPTION VALUE ...]",
        description=(
            f"{description}\n"
            "Several CKPT or --train.seeds train run after run, and end with a table.\n"
            f"Several GPUs: torchrun --nproc-per-node N -m mocofast {task} ...\n"
            f"Exit status {interrupts.EXIT_INTERRUPTED}: stopped by a signal, with a checkpoint. "
            f"{interrupts.EXIT_DIVERGED}: diverged, loss or weights are not finite."
        ),
        often=("--resume", "--model.name", "--data.path", "--train.dir", "--train.epochs"),
        examples=(f"mocofast {task} runs/RECIPE scratch --data.path VOC",),
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CKPT",
        help="where the encoder starts: scratch, imagenet (torchvision's weights, where on disk), "
        "a run folder, or a checkpoint file of any known project; or the config.yaml of a run",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        default="",
        help="auto: continue what --train.dir holds, and start what it lacks; PATH: continue this "
        "run folder or checkpoint",
    )
    add_settings(parser, groups(KINDS[task]))
    arguments = parser.parse(argv)
    from mocofast.detection.launch import launch

    return launch(task, arguments.words, arguments.resume, given_settings(arguments))
