"""Command lines of facebookresearch/moco (v1, v2) and facebookresearch/moco-v3 as our recipes.

Flags, defaults and meanings are facts of main_moco.py and main_lincls.py in these projects (last
runnable commit of facebookresearch/moco: 3b42c2a). The project is inferred from the flags. Without
a project-specific flag it is MoCo v1.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from mocofast import settings
from mocofast.config import Config, ConfigError
from mocofast.data.layout import has_evaluation_folder
from mocofast.data.sources import load_datasets
from mocofast.device import choose_device
from mocofast.evaluate.linear import LinearConfig, linear_probe
from mocofast.interop.reference_checkpoints import load_pretrained
from mocofast.interrupts import EXIT_INTERRUPTED
from mocofast.train.configure import configure
from mocofast.train.run import train

V1 = {
    "arch": "resnet50",
    "epochs": 200,
    "batch_size": 256,
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": [120, 160],
    "moco_dim": 128,
    "moco_k": 65536,
    "moco_m": 0.999,
    "moco_t": 0.07,
    "mlp": False,
    "aug_plus": False,
    "cos": False,
}
V3 = {
    "arch": "resnet50",
    "epochs": 100,
    "batch_size": 4096,
    "lr": 0.6,
    "momentum": 0.9,
    "weight_decay": 1e-6,
    "moco_dim": 256,
    "moco_mlp_dim": 4096,
    "moco_m": 0.99,
    "moco_m_cos": False,
    "moco_t": 1.0,
    "stop_grad_conv1": False,
    "optimizer": "lars",
    "warmup_epochs": 10,
    "crop_min": 0.08,
}
LINEAR_V1 = {"epochs": 100, "batch_size": 256, "lr": 30.0, "schedule": [60, 80]}
LINEAR_V3 = {"epochs": 90, "batch_size": 1024, "lr": 0.1}
RECIPES = {
    1: ("moco_v1_r50", "moco_v2_r50_200ep", "moco_v2_r50_800ep"),
    3: ("moco_v3_r50", "moco_v3_vit_s", "moco_v3_vit_b"),
}
_AUG_PLUS = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_first": False, "blur": 0.5}
_BYOL_AUG = {
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "jitter_p": 0.8,
    "gray_first": False,
    "blur": 1.0,
    "blur_2": 0.1,
    "solarize_2": 0.2,
}


class Equivalent(NamedTuple):
    """The equivalent run of mocofast."""

    recipe: str  # the nearest recipe
    options: dict[str, Any]  # {"group.option": value} that differ from the recipe
    notes: list[str]  # explanations of flags without an option

    def command(self, resume: str = "") -> str:
        """Returns the equivalent `mocofast pretrain ...`."""
        words = ["mocofast", "pretrain", self.recipe, *(["--resume", resume] if resume else [])]
        return shlex.join([*words, *settings.as_flags(self.options)])


def pretraining(given: Mapping[str, Any]) -> Equivalent:
    """Returns the run of mocofast that is equivalent to a command line of main_moco.py.

    given: the flags, as parsed by `add_flags`.
    Raises ConfigError for flags of both projects, and for flags without an equivalent.
    """
    is_v3 = _is_v3(given)
    flags = {**(V3 if is_v3 else V1), **given}
    config = _moco_v3(flags) if is_v3 else _moco(flags)
    config.data.path = given["data"]
    if not has_evaluation_folder(Path(given["data"]).expanduser()):
        config.data.holdout = 0.0  # main_moco.py trains on all images
    if "workers" in given:
        config.data.workers = -(-given["workers"] // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "seed" in given:
        config.train.seed = given["seed"]
    if "print_freq" in given:
        config.train.log_every = given["print_freq"]
    if "gpu" in given and not (
        given.get("multiprocessing_distributed") or "WORLD_SIZE" in os.environ
    ):
        config.train.device = _gpu(given["gpu"])
    # --start-epoch has no effect beside --resume.
    notes = []
    if given.get("start_epoch"):
        if not given.get("resume"):
            raise ConfigError(
                f"--start-epoch {given['start_epoch']}: expected 0 without --resume: "
                "only a checkpoint starts at a later epoch"
            )
        notes.append("--start-epoch: the checkpoint of --resume says where to go on")
    # The nearest recipe.
    differences = {
        name: settings.differences(config, settings.load_recipe(name))
        for name in RECIPES[3 if is_v3 else 1]
    }
    recipe = min(differences, key=lambda name: len(differences[name]))
    return Equivalent(recipe, differences[recipe], notes)


def _is_v3(given: Mapping[str, Any]) -> bool:
    arch = given.get("arch", "")
    of_v3 = [_as_flag(name) for name in given if name in V3.keys() - V1.keys()]
    of_v3 += [f"-a {arch}"] * arch.startswith("vit_")
    of_v1 = [_as_flag(name) for name in given if name in V1.keys() - V3.keys()]
    if of_v1 and of_v3:
        raise ConfigError(
            f"{', '.join(of_v1)} of MoCo v1/v2's main_moco.py and {', '.join(of_v3)} of MoCo v3's: "
            "expected the flags of one of them"
        )
    return bool(of_v3)


def _as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _moco(flags: Mapping[str, Any]) -> Config:
    config = Config()
    m, o = config.model, config.optim
    m.arch, m.dim, m.queue_size = flags["arch"], flags["moco_dim"], flags["moco_k"]
    m.momentum, m.temperature, m.mlp = flags["moco_m"], flags["moco_t"], flags["mlp"]
    # In main_moco.py, -b is the batch of a node.
    config.data.batch_size = flags["batch_size"] * _nodes(flags)
    config.train.epochs = flags["epochs"]
    o.lr, o.momentum, o.weight_decay = flags["lr"], flags["momentum"], flags["weight_decay"]
    o.schedule, o.milestones = "cosine" if flags["cos"] else "step", tuple(flags["schedule"])
    if flags["aug_plus"]:
        settings.apply(config, {f"augment.{name}": value for name, value in _AUG_PLUS.items()})
    return config


def _moco_v3(flags: Mapping[str, Any]) -> Config:
    config = Config()
    settings.apply(config, {"model.method": "moco_v3"})
    m, o = config.model, config.optim
    if flags["arch"].startswith("vit_conv"):
        raise ConfigError(
            f"-a {flags['arch']}: mocofast has no ViTs with convolutional stems; "
            "expected vit_small or vit_base"
        )
    if flags["arch"].startswith("vit_") and not flags["stop_grad_conv1"]:
        raise ConfigError(
            f"-a {flags['arch']}: the patch projection of mocofast's ViTs is frozen; "
            "expected --stop-grad-conv1"
        )
    m.arch, m.dim, m.hidden_dim = flags["arch"], flags["moco_dim"], flags["moco_mlp_dim"]
    m.momentum, m.temperature, m.sync_bn = flags["moco_m"], flags["moco_t"], True
    m.momentum_schedule = "cosine" if flags["moco_m_cos"] else "constant"
    config.data.batch_size, config.train.epochs = flags["batch_size"], flags["epochs"]
    o.name, o.lr, o.lr_per, o.momentum = flags["optimizer"], flags["lr"], 256, flags["momentum"]
    o.weight_decay, o.warmup_epochs = flags["weight_decay"], float(flags["warmup_epochs"])
    o.schedule, o.per = "cosine", "step"
    augment = {**_BYOL_AUG, "crop_scale": (flags["crop_min"], 1.0)}
    settings.apply(config, {f"augment.{name}": value for name, value in augment.items()})
    return config


def _nodes(given: Mapping[str, Any]) -> int:
    return max(1, given.get("world_size", 1))


def _gpu(number: int) -> str:
    if number >= torch.cuda.device_count():
        raise ConfigError(f"--gpu {number}: this machine has {torch.cuda.device_count()} GPUs")
    return f"cuda:{number}"


def processes(given: Mapping[str, Any], equivalent: Equivalent) -> tuple[int, str]:
    """Returns the number of processes to start on this machine, and why. 1: this process.

    Under torchrun the number is always 1.
    Raises ConfigError for several machines, with the torchrun command to use.
    """
    if "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        return 1, f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, started by torchrun"
    every_gpu, gpus = given.get("multiprocessing_distributed", False), torch.cuda.device_count()
    if _nodes(given) > 1:
        url = urlsplit(given.get("dist_url", ""))
        rank = given.get("rank", -1)
        line = (
            f"torchrun --nnodes {_nodes(given)} --node-rank {rank if rank >= 0 else 'RANK'} "
            f"--nproc-per-node {(gpus or 'GPUS') if every_gpu else 1} "
            f"--master-addr {url.hostname or 'HOST'} --master-port {url.port or 'PORT'} "
            f"-m {equivalent.command(given.get('resume', ''))}"
        )
        raise ConfigError(f"--world-size {given['world_size']}: on each node start\n  {line}")
    if every_gpu and gpus > 1:
        return gpus, f"torchrun --standalone --nproc-per-node {gpus}, for this machine's GPUs"
    if every_gpu:
        return 1, (
            f"--multiprocessing-distributed: one process, as this machine has {gpus} GPUs; "
            "on several GPUs this command starts "
            "torchrun --nproc-per-node=GPUS -m mocofast main_moco ... itself"
        )
    return 1, f"one process on one device, of {gpus} GPUs; --multiprocessing-distributed takes all"


def main_moco(given: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Runs a command line of main_moco.py, prints the equivalent command, returns the exit status.

    given: the flags parsed from `argv`.
    """
    equivalent, resume = pretraining(given), given.get("resume", "")
    count, why = processes(given, equivalent)
    if count > 1:
        print(f"starting {why}", flush=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *launcher, "-m", "mocofast", "main_moco", *argv]
        os.execv(sys.executable, command)
    config = configure(equivalent.recipe, resume, equivalent.options, check=False)
    if os.environ.get("RANK", "0") == "0":
        print(f"# the equivalent recipe; also: {equivalent.command(resume)}")
        print(settings.as_yaml(settings.differences(config, Config())))
        print("\n".join([*equivalent.notes, why]), flush=True)
    return EXIT_INTERRUPTED if train(config, resume).interrupted else 0


def probing(given: Mapping[str, Any], is_v3: bool) -> LinearConfig:
    """Returns the linear probe of a command line of main_lincls.py.

    given: the flags, as parsed by `add_flags`.
    is_v3: whether MoCo v3 trained the encoder.
    Raises ConfigError for flags without an equivalent.
    """
    for name, why in {
        "evaluate": "mocofast keeps no trained classifier; the probe validates as it trains",
        "resume": "a linear probe is not continued but starts again",
        "start_epoch": "a linear probe is not continued but starts again",
    }.items():
        if given.get(name):
            raise ConfigError(f"{_as_flag(name)}: {why}")
    for name, fixed in {"momentum": 0.9, "weight_decay": 0.0}.items():
        if given.get(name, fixed) != fixed:
            raise ConfigError(f"{_as_flag(name)} {given[name]}: the protocol's is {fixed}")
    if is_v3 and "schedule" in given:
        raise ConfigError(
            "--schedule: a flag of MoCo v1/v2's main_lincls.py, and MoCo v3 trained this encoder"
        )
    flags = {**(LINEAR_V3 if is_v3 else LINEAR_V1), **given}
    options = LinearConfig("reference", flags["epochs"], flags["lr"], flags["batch_size"])
    if is_v3:
        options.lr *= options.batch_size / 256
        options.schedule = "cosine"
    else:
        options.milestones = tuple(flags["schedule"])
    return options


def main_lincls(given: Mapping[str, Any]) -> int:
    """Runs a command line of main_lincls.py, prints the equivalent options, returns the status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or _nodes(given) > 1:
        raise ConfigError(
            "the linear probe runs in one process on one device; "
            "expected neither torchrun nor --world-size"
        )
    if not given.get("pretrained"):
        raise ConfigError(
            "--pretrained: expected a checkpoint of the encoder to probe, got nothing"
        )
    model, config, ours = load_pretrained(given["pretrained"], given.get("arch"))
    options = probing(given, config.model.method == "moco_v3")
    values = {
        "data.source": "folder",
        "data.path": given["data"],
        "data.workers": given.get("workers", -1),
    }
    settings.apply(config, {**values, "train.seed": given.get("seed", config.train.seed)})
    device = choose_device(_gpu(given["gpu"]) if "gpu" in given else "auto")
    default = LinearConfig()
    changed = {
        f"linear.{name}": v for name, v in vars(options).items() if v != getattr(default, name)
    }
    print(settings.as_yaml(changed))
    if ours:
        words = ["mocofast", "linear", given["pretrained"], "--data.path", given["data"]]
        print(f"# also: {shlex.join([*words, *settings.as_flags(changed)])}")
    datasets = load_datasets(config.data, config.train.seed)
    print(f"{datasets.lines()}\none process on {device}", flush=True)
    result = linear_probe(model.encoder_q.to(device), datasets, config, options, device)
    print(f"linear_top1 {result.top1:.4g}\nlinear_top5 {result.top5:.4g}")
    return 0
