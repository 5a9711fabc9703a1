"""The `mocofast` command.

The options of a run are made from config.py and from the methods' modules, so every option has one
name and one default.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mocofast import completion, front, interrupts, settings
from mocofast.config import ConfigError
from mocofast.detection.commands import detect, segment
from mocofast.errors import printable
from mocofast.evaluation_arguments import add_arch, size_of
from mocofast.evaluation_commands import finetune, knn, linear, log_to_screen, zeroshot
from mocofast.fit_command import fit
from mocofast.image_commands import embed, predict
from mocofast.parser import (
    WIDTH,
    Parser,
    add_device,
    add_flags,
    add_run_settings,
    add_words,
    given_settings,
)
from mocofast.report_commands import report, views
from mocofast.run_commands import compare, sweep

OFTEN = (
    *("--data.path", "--train.dir", "--train.epochs", "--optim.lr", "--model.method"),
    *("--model.arch", "--resume"),
)


def _details() -> str:
    recipes = "\n".join(f"  {name:23}{settings.about(name)}" for name in settings.recipes())
    return (
        f"recipes:\n{recipes}\n\n"
        "Several GPUs: torchrun --nproc-per-node N -m mocofast pretrain ...\n"
        f"Exit status {interrupts.EXIT_INTERRUPTED}: stopped by a signal, with a checkpoint. "
        f"{interrupts.EXIT_DIVERGED}: diverged, loss or weights are not finite."
    )


def _pretrain_parser(argv: Sequence[str]) -> Parser:
    """Returns the parser of `mocofast pretrain`. argv: the words to parse, for their method."""
    recipes = textwrap.fill(f"Recipes: {', '.join(settings.recipes())}", WIDTH - 2)
    parser = Parser(
        prog="mocofast pretrain",
        usage="mocofast pretrain [RECIPE] [IMAGES] [--init FILE] [--resume auto|PATH] "
        "[--OPTION VALUE ...]",
        description="Pretrains with momentum contrast. Defaults in [brackets] are MoCo v1's, and a "
        f"recipe changes some.\n{recipes}",
        often=OFTEN,
        examples=front.EXAMPLES,
        details=_details,
    )
    add_words(
        parser,
        "name of a recipe, or a .yaml file; a folder of images, a zip archive, a list or "
        f"shards, as --data.path [{settings.DEFAULT_RECIPE}, or auto with images]",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        default="",
        help="continue PATH, a run folder or a checkpoint; auto: continue if there is a run",
    )
    parser.add_argument(
        "--cooldown",
        metavar="EPOCHS",
        type=int,
        default=0,
        help="with --resume PATH of a run with optim.schedule wsd: branch from the checkpoint into "
        "a folder of its own, lower the learning rate to 0 over EPOCHS, and end. The run itself "
        "stays as it is, and can be continued",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="with --resume: continue with another rate, more --train.epochs, or more images",
    )
    parser.add_argument(
        "--init",
        metavar="FILE",
        default="",
        help="start a new run from the weights of a file: a run folder, or a checkpoint of any "
        "known project (docs/checkpoints.md)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also time a few steps: profile.png and profile.txt in the run folder show the parts "
        "of a step and their floors, trace.json.gz opens in Perfetto. The results stay the same",
    )
    add_run_settings(parser, argv)
    return parser


def pretrain(argv: Sequence[str]) -> int:
    """train an encoder without labels"""
    arguments = _pretrain_parser(argv).parse(argv)
    with front.importing():
        from mocofast.train import configure
        from mocofast.train.run import train

    recipe, images = configure.split_words(arguments.words)
    given, cooldown = given_settings(arguments), arguments.cooldown
    config = configure.configure(recipe, arguments.resume, given, images, cooldown)
    if arguments.extend and not arguments.resume:
        raise ConfigError("--extend: continues a run, which --resume PATH names")
    if arguments.init and arguments.resume not in ("", "auto"):
        raise ConfigError("--init: starts a new run, but --resume PATH continues one; leave it out")
    initialise = None
    if arguments.init:
        from mocofast.interop import initial

        initialise = partial(initial.initialise, path=arguments.init, arch=config.model.arch)
    result = train(
        config,
        arguments.resume,
        arguments.profile,
        configure.kept_options(config, recipe, given),
        initialise=initialise,
        extend=arguments.extend,
    )
    return interrupts.EXIT_INTERRUPTED if result.interrupted else 0


def export(argv: Sequence[str]) -> int:
    """a checkpoint's encoder for torchvision, timm, detectron2 or facebookresearch/moco"""
    from mocofast.interop.formats import FORMATS

    parser = Parser(
        prog="mocofast export", description="Writes a checkpoint's query encoder in another format."
    )
    parser.add_argument(
        "checkpoint", help="a run folder, or a checkpoint file of any known project"
    )
    parser.add_argument("--format", metavar="FORMAT", required=True, help=" | ".join(FORMATS))
    parser.add_argument("out", help="the file to write; a name in .safetensors selects safetensors")
    add_arch(parser)
    parser.add_argument(
        "--augment.size",
        metavar="HEIGHT,WIDTH",
        default=argparse.SUPPRESS,
        help="the images of onnx and torch_export (default: those of training), and of a ViT of "
        "another project whose position embeddings are no square",
    )
    arguments = parser.parse(argv)
    from mocofast.interop import export as writing
    from mocofast.interop.reference_checkpoints import as_checkpoint, load_any

    size = size_of(arguments) if given_settings(arguments) else 0
    loaded = load_any(arguments.checkpoint, arguments.arch, size)
    checkpoint = as_checkpoint(loaded)
    print(writing.export(checkpoint, arguments.format, arguments.out, size))
    return 0


def prepare(argv: Sequence[str]) -> int:
    """a compact copy of a folder of images, as tar shards"""
    from mocofast.data.options import PrepareConfig

    parser = Parser(
        prog="mocofast prepare",
        usage="mocofast prepare SOURCE OUT [--OPTION VALUE ...]",
        description=inspect.getdoc(PrepareConfig),
        often=("--size", "--quality", "--workers"),
        examples=("mocofast prepare PHOTOS STORE",),
    )
    parser.add_argument("source", help="a folder of images, as data.path of data.source=folder")
    parser.add_argument("out", help="a new folder to write, for data.source=shards")
    add_flags(parser, PrepareConfig)
    given = vars(parser.parse(argv))
    from mocofast.data import prepare as module

    source, out = given.pop("source"), given.pop("out")
    meta = module.prepare(source, out, PrepareConfig(**given))
    for remark in meta["remarks"]:
        print(remark)
    for name, reason in meta["skipped"].items():
        print(f"left out: {printable(name)}: {printable(reason)}")
    print(
        f"{sum(meta['images'].values())} images in {out}; "
        f"mocofast pretrain --data.source shards --data.path {out}"
    )
    return 0


def stats(argv: Sequence[str]) -> int:
    """channel means, deviations and ranges of a set of images, as options to paste"""
    from mocofast.data.options import StatsConfig

    parser = Parser(
        prog="mocofast stats",
        usage="mocofast stats PATH [--OPTION VALUE ...]",
        description=inspect.getdoc(StatsConfig),
        often=("--images", "--channels", "--range", "--percentiles"),
        examples=("mocofast stats PHOTOS",),
    )
    parser.add_argument("path", help="the images, as data.path")
    add_flags(parser, StatsConfig)
    given = vars(parser.parse(argv))
    from mocofast.data import statistics as module

    print(module.measure(given.pop("path"), StatsConfig(**given)).report())
    return 0


def launch(argv: Sequence[str]) -> int:
    """pretraining on the machines of SLURM, Kubernetes, SkyPilot or Ray"""
    from mocofast.launch import job
    from mocofast.launch.request import LaunchConfig

    parser = Parser(
        prog="mocofast launch",
        usage="mocofast launch slurm|k8s|sky|ray [RECIPE] [IMAGES] [--nodes N] [--gpus N] "
        "[--dry-run] [...] [--GROUP.OPTION VALUE ...]",
        description="Writes the job of a cluster engine, and submits the job. The run continues "
        "after a failure,\na pre-emption, or the end of a job's time. docs/cluster.md has examples."
        "\nRECIPE, IMAGES and --GROUP.OPTION are those of `mocofast pretrain`.",
    )
    parser.add_argument("engine", choices=tuple(job.ENGINES), help="the engine of the cluster")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the file and the command. Submit nothing"
    )
    add_flags(parser, LaunchConfig)
    if completion.is_asked():
        add_words(parser, "as of pretrain")
        add_run_settings(parser, argv)
        completion.answer(parser)
    own, words = parser.parse_known_args(argv)
    given = vars(own)
    engine, dry_run = given.pop("engine"), given.pop("dry_run")
    training = _pretrain_parser(words)
    training.prog = "mocofast launch"
    run = training.parse(words)
    if run.resume or run.cooldown or run.profile or run.init:
        raise ConfigError("launch: starts or continues a run, by --resume auto alone")
    from mocofast.train import configure

    recipe, images = configure.split_words(run.words)
    config = configure.configure(recipe, "", given_settings(run), images)
    return job.launch(engine, job.checked(LaunchConfig(**given), words, config), dry_run)


def bench(argv: Sequence[str]) -> int:
    """time the kernels and loaders beside eager PyTorch"""
    from mocofast_bench.commands import main

    return main(["--help" if word == "--help-all" else word for word in argv])


def doctor(argv: Sequence[str]) -> int:
    """what this machine has, which path each part takes, and why; or the files of a run"""
    parser = Parser(
        prog="mocofast doctor",
        description="Shows what this machine has, and which path each part takes.\n"
        "With a run folder: checks the folder's files. Exit status 1 if a file is damaged.",
    )
    parser.add_argument("run", nargs="?", help="a run folder to check")
    parser.add_argument(
        "--network",
        action="store_true",
        help="measure between the ranks: torchrun --nproc-per-node 2 -m mocofast doctor --network",
    )
    given = parser.parse(argv)
    if given.network:
        from mocofast.network import measure

        for line in measure():
            print(line)
        return 0
    from mocofast.doctor import main

    return main(given.run)


def main_moco(argv: Sequence[str]) -> int:
    """facebookresearch/moco's and moco-v3's main_moco.py, flag for flag"""
    from mocofast.interop import reference_flags

    parser = Parser(
        prog="mocofast main_moco",
        description=(
            "Runs a command line of main_moco.py, and prints the mocofast command.\n"
            "A flag that only MoCo v3 has, or a ViT, selects MoCo v3.\n"
            "All other command lines select MoCo v1 or v2."
        ),
    )
    reference_flags.add_flags(parser, linear=False)
    given = vars(parser.parse(argv))
    from mocofast.interop import reference_commands

    return reference_commands.main_moco(given, argv)


def main_lincls(argv: Sequence[str]) -> int:
    """facebookresearch/moco's and moco-v3's main_lincls.py, flag for flag"""
    from mocofast.interop import reference_flags

    parser = Parser(
        prog="mocofast main_lincls",
        description=(
            "Runs a command line of main_lincls.py.\n"
            "The checkpoint tells whether the protocol is MoCo's or MoCo v3's."
        ),
    )
    reference_flags.add_flags(parser, linear=True)
    given = vars(parser.parse(argv))
    from mocofast.interop import reference_commands

    log_to_screen()
    return reference_commands.main_lincls(given)


def study(argv: Sequence[str]) -> int:
    """what pretraining gives where labels are few: four classes, a ResNet and a ViT"""
    parser = Parser(
        prog="mocofast study",
        description="Trains a ResNet and a ViT on labels twice: from scratch, and from a MoCo "
        "pretraining on the unlabelled images.\nExcept for the start, the two runs of a pair are "
        "equal. docs/study.md shows a result.",
    )
    parser.add_argument("name", choices=("four-class",), help="which study: four-class")
    parser.add_argument(
        "--data.path", metavar="DIR", dest="path", required=True, help="train/CLASS and test/CLASS"
    )
    parser.add_argument(
        "--setting",
        choices=("cpu", "gpu"),  # the names in mocofast.study.SIZES
        default="cpu",
        help="sizes of the study, for a CPU or for a GPU [cpu]",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="",
        help="folder to write, or to continue [runs/four-class-SETTING]",
    )
    add_device(parser)
    given = parser.parse(argv)
    from mocofast import study as module
    from mocofast.device import choose_device

    out = Path(given.out or f"runs/{given.name}-{given.setting}")
    try:
        module.four_class(given.path, out, module.SIZES[given.setting], choose_device(given.device))
    except KeyboardInterrupt:
        print(f"stopped; the same command continues in {out}", file=sys.stderr)
        return interrupts.EXIT_INTERRUPTED
    print(
        f"{(out / 'table.md').read_text(encoding='utf-8')}"
        f"written to {out}: results.json, table.md, curves.png"
    )
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command
    for command in (
        pretrain,
        knn,
        linear,
        finetune,
        zeroshot,
        detect,
        segment,
        report,
        views,
        embed,
        predict,
        compare,
        sweep,
        export,
        prepare,
        stats,
        launch,
        fit,
        study,
        bench,
        doctor,
        main_moco,
        main_lincls,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status, see `mocofast.front.run`."""
    return front.run(COMMANDS, sys.argv[1:] if argv is None else argv)
