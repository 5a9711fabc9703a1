"""The `mocofast` command. Every option of a run is generated from config.py, so it has one name and one default."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mocofast import settings
from mocofast.config import Config
from mocofast.settings import ConfigError


class _Parser(argparse.ArgumentParser):
    """Errors in one line that names the nearest known option; exit status 2; no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            what = "option" if name.startswith("-") else "argument"
            self.error(f"unknown {what} {name!r}{settings.nearest(name, known)}")
        return arguments

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _add_settings(parser: argparse.ArgumentParser, groups: dict[str, type]) -> None:
    for group, kind in groups.items():
        section = parser.add_argument_group(group, (kind.__doc__ or "").splitlines()[0])
        for setting in settings.settings(group, kind):
            default = settings.shown(setting.default)
            values = f" ({' | '.join(setting.choices)})" if setting.choices else ""
            section.add_argument(
                f"--{setting.name}",
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=f"{setting.help}{values} [{default}]".replace("%", "%%"),
            )


def _given(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: value for name, value in vars(arguments).items() if "." in name}


def pretrain(argv: Sequence[str]) -> int:
    """train an encoder without labels"""
    from mocofast.checkpoint import load_checkpoint
    from mocofast.interrupt import EXIT_INTERRUPTED
    from mocofast.train import train

    parser = _Parser(
        prog="mocofast pretrain",
        description=(
            "Pretrains with momentum contrast. Without arguments: the digits, minutes on two CPU cores.\n"
            "Several GPUs: torchrun --nproc-per-node N -m mocofast pretrain ...\n"
            f"Recipes: {', '.join(settings.recipes())}. Defaults in [brackets] are those of MoCo v1; a recipe\n"
            "changes some. Exit status 75: stopped by a signal, a checkpoint was written."
        ),
    )
    parser.add_argument("recipe", nargs="?", help=f"name of a recipe, or a .yaml file [{settings.DEFAULT_RECIPE}]")
    parser.add_argument(
        "--resume", metavar="auto|PATH", default="",
        help="auto: continue the newest checkpoint of the run folder; PATH: a run folder or checkpoint",
    )  # fmt: skip
    _add_settings(parser, settings.groups())
    arguments = parser.parse(argv)
    given = _given(arguments)
    resume: str = arguments.resume
    if arguments.recipe:
        config = settings.load_recipe(arguments.recipe)
    elif resume and resume != "auto":
        config = settings.from_dict(load_checkpoint(resume)["config"])  # the run says what it is
        if os.path.isdir(resume):
            config.train.dir = resume
    elif resume and os.path.exists(os.path.join(given.get("train.dir", ""), "checkpoints", "last.pt")):
        config = settings.from_dict(load_checkpoint(given["train.dir"])["config"])
    else:
        config = settings.load_recipe(settings.DEFAULT_RECIPE)
    settings.apply(config, given)
    settings.validate(config)
    return EXIT_INTERRUPTED if train(config, resume).interrupted else 0


def _checkpoint_command(name: str, description: str) -> _Parser:
    """A parser of `mocofast NAME CKPT --data.path DIR ...`."""
    from mocofast.config import DataConfig

    parser = _Parser(prog=f"mocofast {name}", description=description)
    parser.add_argument("checkpoint", help="a run folder, or a checkpoint file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    _add_settings(parser, {"data": DataConfig})
    return parser


def _load(arguments: argparse.Namespace) -> tuple[Any, Config]:
    """The model and its run's configuration, with the data options of the command line."""
    from mocofast.checkpoint import load_checkpoint, model_from_checkpoint

    model, config = model_from_checkpoint(load_checkpoint(arguments.checkpoint))
    given = _given(arguments)
    if "data.path" in given and "data.source" not in given:
        given["data.source"] = "folder"
    settings.apply(config, {name: value for name, value in given.items() if name.split(".")[0] in settings.groups()})
    settings.validate(config)
    return model, config


def knn(argv: Sequence[str]) -> int:
    """k-nearest-neighbour accuracy of a checkpoint"""
    from mocofast.config import KNNConfig
    from mocofast.data.sources import load_splits
    from mocofast.monitor import KNNMonitor
    from mocofast.train import choose_device

    parser = _checkpoint_command("knn", "Weighted kNN accuracy of a checkpoint's query encoder on labelled images.")
    _add_settings(parser, {"knn": KNNConfig})
    arguments = parser.parse(argv)
    model, config = _load(arguments)
    splits = load_splits(config.data, config.train.seed)
    if splits.val is None or splits.train.labels is None:
        raise ConfigError(f"data.path: kNN needs labelled images with a held-out split; {config.data.path} has none")
    device = choose_device(arguments.device)
    values = KNNMonitor(splits.train, splits.val, config, device).evaluate(model.encoder_q.to(device))
    print(f"{len(splits.train)} labelled images vote on {len(splits.val)}")
    for name, value in values.items():
        print(f"{name} {value:.4f}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"pretrain": pretrain, "knn": knn}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 2 for arguments that cannot be used, 75 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items())
    usage = f"usage: mocofast COMMAND [...]\n\n{lines}\n\nmocofast COMMAND --help lists its options."
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        from mocofast import __version__

        print(f"mocofast {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"mocofast: unknown command {name!r}{settings.nearest(name, COMMANDS)}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest)
    except (ConfigError, FileNotFoundError) as error:
        print(f"mocofast {name}: {error}", file=sys.stderr)
        return 2
