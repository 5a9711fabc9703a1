"""The `mocofast` command. Every option of a run is generated from config.py, so it has one name and one default."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mocofast import settings
from mocofast.config import Config, ConfigError, DataConfig, KNNConfig

if TYPE_CHECKING:
    from mocofast.data.sources import Datasets
    from mocofast.methods.base import Method


class _Parser(argparse.ArgumentParser):
    """Errors in one line that names the nearest known option; exit status 2; no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

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
    from mocofast.train.interrupt import EXIT_INTERRUPTED
    from mocofast.train.resume import configure
    from mocofast.train.run import train

    parser = _Parser(
        prog="mocofast pretrain",
        description=(
            "Pretrains with momentum contrast. Without arguments: the digits, minutes on two CPU cores.\n"
            "Several GPUs: torchrun --nproc-per-node N -m mocofast pretrain ...\n"
            f"Recipes: {', '.join(settings.recipes())}.\n"
            "Defaults in [brackets] are those of MoCo v1; a recipe changes some.\n"
            f"Exit status {EXIT_INTERRUPTED}: stopped by Ctrl-C or SIGTERM; a checkpoint was written."
        ),
    )
    parser.add_argument(
        "recipe", nargs="?", help=f"name of a recipe, or a .yaml file [{settings.DEFAULT_RECIPE}]"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        default="",
        help="auto: continue the newest checkpoint of the run folder, if any; PATH: a run folder or checkpoint",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also look at some steps after the first ones: profile.png and profile.txt in the run folder say where "
        "a step's time goes and what its floor is, trace.json.gz opens in Perfetto; the run's results stay the same",
    )
    _add_settings(parser, settings.groups())
    arguments = parser.parse(argv)
    config = configure(arguments.recipe, arguments.resume, _given(arguments))
    return EXIT_INTERRUPTED if train(config, arguments.resume, arguments.profile).interrupted else 0


def _evaluation_parser(name: str, description: str, group: str, kind: type) -> _Parser:
    """A parser of `mocofast NAME CKPT --data.path DIR ...` with one more group of options."""
    parser = _Parser(prog=f"mocofast {name}", description=description)
    parser.add_argument("checkpoint", help="a run folder, or a checkpoint file")
    parser.add_argument(
        "--device", metavar="VALUE", default="auto", help="auto, cpu, cuda or cuda:N [auto]"
    )
    _add_settings(parser, {"data": DataConfig, group: kind})
    return parser


def _load(arguments: argparse.Namespace) -> tuple[Method, Config, Datasets]:
    """The model, its run's configuration with the data options of the command line, and the images."""
    from mocofast.data.sources import load_datasets
    from mocofast.train.checkpoint import load_checkpoint, model_from_checkpoint

    model, config = model_from_checkpoint(load_checkpoint(arguments.checkpoint))
    given = _given(arguments)
    if "data.path" in given:
        given.setdefault("data.source", "folder")
    settings.apply(
        config,
        {name: value for name, value in given.items() if name.split(".")[0] in settings.groups()},
    )
    settings.validate(config)
    return model, config, load_datasets(config.data, config.train.seed)


def knn(argv: Sequence[str]) -> int:
    """k-nearest-neighbour accuracy of a checkpoint"""
    from mocofast.device import choose_device
    from mocofast.evaluate.monitor import KNNMonitor

    description = "Weighted kNN accuracy of a checkpoint's query encoder on labelled images."
    arguments = _evaluation_parser("knn", description, "knn", KNNConfig).parse(argv)
    model, config, datasets = _load(arguments)
    device = choose_device(arguments.device)
    monitor = KNNMonitor.of(datasets, config, device)
    if monitor is None:
        raise ConfigError(
            f"data.path: kNN needs labelled images, some of them held out; got {datasets.note}"
        )
    print(datasets.note)
    for name, value in monitor.evaluate(model.encoder_q.to(device)).items():
        print(f"{name} {value:.4f}")
    return 0


def _log_to_screen() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)


def _options(kind: type, group: str, arguments: argparse.Namespace) -> Any:
    """The group's dataclass with the values of the command line."""
    options, given = kind(), _given(arguments)
    for setting in settings.settings(group, kind):
        if setting.name in given:
            setattr(
                options, setting.name.split(".")[1], settings.coerce(setting, given[setting.name])
            )
    return options


def linear(argv: Sequence[str]) -> int:
    """accuracy of a linear classifier on a checkpoint's frozen features"""
    from mocofast.device import choose_device
    from mocofast.evaluate.linear import LinearConfig, linear_probe

    description = (
        "Trains a linear classifier on a checkpoint's frozen query encoder and validates it."
    )
    arguments = _evaluation_parser("linear", description, "linear", LinearConfig).parse(argv)
    options = _options(LinearConfig, "linear", arguments)
    model, config, datasets = _load(arguments)
    device = choose_device(arguments.device)
    _log_to_screen()
    print(datasets.note)
    result = linear_probe(model.encoder_q.to(device), datasets, config, options, device)
    for name, value in result._asdict().items():
        if value is not None:
            print(f"{'linear_' if name.startswith('top') else ''}{name} {value:.4g}")
    return 0


def finetune(argv: Sequence[str]) -> int:
    """accuracy of a checkpoint's encoder after training all of it on labels"""
    from mocofast.device import choose_autocast, choose_device
    from mocofast.evaluate.finetune import FinetuneConfig
    from mocofast.evaluate.finetune import finetune as run
    from mocofast.train.checkpoint import save_atomically

    description = "Trains a checkpoint's query encoder and a new linear head on labelled images, and validates it."
    parser = _evaluation_parser("finetune", description, "finetune", FinetuneConfig)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the trained classifier's state dict, in torchvision's names",
    )
    arguments = parser.parse(argv)
    options = _options(FinetuneConfig, "finetune", arguments)
    model, config, datasets = _load(arguments)
    device = choose_device(arguments.device)
    _log_to_screen()
    print(datasets.note)
    encoder = model.encoder_q.to(device)
    result = run(
        encoder, datasets, config, options, device, choose_autocast(config.train.precision, device)
    )
    if arguments.out:
        save_atomically(encoder.state_dict(), Path(arguments.out))
    print(f"finetune_top1 {result.top1:.4g}\nfinetune_top5 {result.top5:.4g}")
    return 0


def export(argv: Sequence[str]) -> int:
    """a checkpoint's encoder for torchvision, timm, detectron2 or facebookresearch/moco"""
    from mocofast.interop.export import FORMATS
    from mocofast.interop.export import export as write
    from mocofast.train.checkpoint import load_checkpoint

    parser = _Parser(
        prog="mocofast export", description="Writes a checkpoint's query encoder in another format."
    )
    parser.add_argument("checkpoint", help="a run folder, or a checkpoint file")
    parser.add_argument("--format", metavar="FORMAT", required=True, help=" | ".join(FORMATS))
    parser.add_argument("out", help="the file to write; .safetensors selects that file format")
    arguments = parser.parse(argv)
    print(write(load_checkpoint(arguments.checkpoint), arguments.format, arguments.out))
    return 0


def prepare(argv: Sequence[str]) -> int:
    """a compact copy of a folder of images, as tar shards"""
    from mocofast.data import prepare as module

    parser = _Parser(prog="mocofast prepare", description=module.__doc__)
    parser.add_argument("source", help="a folder of images, as data.path of data.source=folder")
    parser.add_argument("out", help="the folder to write, for data.source=shards; must not exist")
    for setting in settings.settings("prepare", module.PrepareConfig):
        flag = f"--{setting.name.split('.')[1].replace('_', '-')}"
        shown = f"{setting.help} [{setting.default}]"
        parser.add_argument(
            flag, type=setting.type, default=setting.default, metavar="N", help=shown
        )
    given = vars(parser.parse(argv))
    source, out = given.pop("source"), given.pop("out")
    meta = module.prepare(source, out, module.PrepareConfig(**given))
    for name, reason in meta["skipped"].items():
        print(f"left out: {name}: {reason}")
    print(
        f"{sum(meta['images'].values())} images in {out}; mocofast pretrain --data.source shards --data.path {out}"
    )
    return 0


def bench(argv: Sequence[str]) -> int:
    """time the kernels and loaders beside eager PyTorch"""
    from mocofast_bench.commands import main

    return main(argv)


def doctor(argv: Sequence[str]) -> int:
    """what this machine has, which path each part takes, and why"""
    from mocofast.doctor import main

    _Parser(
        prog="mocofast doctor",
        description="Shows what this machine has, and which path each part takes.",
    ).parse(argv)
    main()
    return 0


def main_moco(argv: Sequence[str]) -> int:
    """facebookresearch/moco's and moco-v3's main_moco.py, flag for flag"""
    from mocofast.interop import reference_commands

    parser = _Parser(
        prog="mocofast main_moco",
        description=(
            "Runs a command line of main_moco.py and prints what it is here. A flag that only MoCo v3's has, or\n"
            "a ViT, makes it MoCo v3's; without one it is MoCo v1's or v2's."
        ),
    )
    reference_commands.add_flags(parser, linear=False)
    return reference_commands.main_moco(vars(parser.parse(argv)), argv)


def main_lincls(argv: Sequence[str]) -> int:
    """their main_lincls.py"""
    from mocofast.interop import reference_commands

    parser = _Parser(
        prog="mocofast main_lincls",
        description="Runs a command line of main_lincls.py, in MoCo's way or MoCo v3's, as the checkpoint says.",
    )
    reference_commands.add_flags(parser, linear=True)
    given = vars(parser.parse(argv))
    _log_to_screen()
    return reference_commands.main_lincls(given)


def study(argv: Sequence[str]) -> int:
    """what pretraining gives where labels are few: four classes, a ResNet and a ViT"""
    from mocofast import study as module
    from mocofast.device import choose_device
    from mocofast.train.interrupt import EXIT_INTERRUPTED

    parser = _Parser(prog="mocofast study", description=module.__doc__)
    parser.add_argument("name", choices=("four-class",), help="which study: four-class")
    parser.add_argument(
        "--data.path", metavar="DIR", dest="path", required=True, help="train/CLASS and test/CLASS"
    )
    parser.add_argument(
        "--setting",
        choices=tuple(module.SIZES),
        default="cpu",
        help="its sizes, for a [cpu] or a gpu",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="",
        help="where to write, and continue [runs/four-class-SETTING]",
    )
    parser.add_argument(
        "--device", metavar="VALUE", default="auto", help="auto, cpu, cuda or cuda:N [auto]"
    )
    given = parser.parse(argv)
    out = Path(given.out or f"runs/{given.name}-{given.setting}")
    try:
        module.four_class(
            given.path, out, module.SIZES[given.setting], choose_device(given.device)
        )
    except KeyboardInterrupt:
        print(f"stopped; the same command continues in {out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(
        f"{(out / 'table.md').read_text(encoding='utf-8')}written to {out}: results.json, table.md, curves.png"
    )
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command
    for command in (
        pretrain,
        knn,
        linear,
        finetune,
        export,
        prepare,
        study,
        bench,
        doctor,
        main_moco,
        main_lincls,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 2 for arguments that cannot be used, 75 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:12}{command.__doc__}" for name, command in COMMANDS.items())
    usage = (
        f"usage: mocofast COMMAND [...]\n\n{lines}\n\nmocofast COMMAND --help lists its options."
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        from mocofast import __version__

        print(f"mocofast {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"mocofast: unknown command {name!r}{settings.nearest(name, COMMANDS)}\n\n{usage}",
            file=sys.stderr,
        )
        return 2
    try:
        return COMMANDS[name](rest)
    except (ConfigError, FileNotFoundError, NotADirectoryError) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank meets the same error
            print(f"mocofast {name}: {error}", file=sys.stderr)
        return 2
