"""Checkpoints: content, writing and reading.

A file holds only tensors, numbers, strings and containers, so that torch.load(weights_only=True)
reads the file:
    format, version, config (nested dictionaries), sizes (numbers of images and classes)
    model, optimizer (state dicts), method_random_state, random_states (one per rank)
    step, epoch, step_in_epoch (position in the data stream), windows (sums of metrics, per rank)
    threads (that computed on a CPU), precision (fp32, bf16 or fp16)
    data (fingerprint of the images, skipped files, stamp of the image files)
    before, after (kNN figures), measured_at, evaluation_due
    left_out (steps whose batch the model does not see)
    best, since_best (highest knn_top1, evaluations since then)
    scaler (of the loss, under fp16)
    parts (of a sharded run: the folder with the sharded tensors, see mocofast.train.parts)

mocofast.train.checkpoint_writer writes the files, and sharded_writer those of sharded runs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mocofast import __version__, distributed, settings
from mocofast.config import Config, ConfigError
from mocofast.data.interface import BatchSlice, Loader, Source
from mocofast.data.stamps import Stamp, changed
from mocofast.methods.base import Method
from mocofast.methods.build import build_method
from mocofast.models.encoders import untrained
from mocofast.optim.fused import FusedOptimizer
from mocofast.shares import Shares
from mocofast.train import parts
from mocofast.train.checkpoint_file import read_file
from mocofast.train.extend import take_other_images
from mocofast.train.file_kinds import other_folder
from mocofast.train.finite import check_finite
from mocofast.train.metrics import Window, mean_window
from mocofast.train.pace import Pace
from mocofast.train.random_states import random_state, set_random_state
from mocofast.train.sharding import Sharding, empty_like_own, load_model, load_optimizer

log = logging.getLogger("mocofast")

FORMAT = 2
LAST = "last.pt"


@dataclass
class RunState:
    """Everything of a run that a checkpoint keeps and a continued run restores.

    step: optimiser steps done. epoch: epochs done. step_in_epoch: steps done in the present epoch.
    before, after: kNN figures of the random encoder and of the last evaluation, empty without
        labels.
    evaluation_due: a signal ended the evaluation of this step early.
    measured_at: the step of `after`. None: not known.
    best: highest knn_top1 after an epoch. since_best: evaluations after the best evaluation.
    left_out: steps, counted from 1, whose batch the model does not see (train.skip_nonfinite).
    ranks_before: number of ranks that wrote the checkpoint to continue from.
    precision: fp32, bf16 or fp16. precision_before: of the checkpoint, "" for not known.
    changed: what differs in the image files since the checkpoint, as `stamps.changed`.
    sharding: of a model that is sharded over the ranks.
    """

    config: Config
    model: Method
    optimizer: FusedOptimizer
    loader: Loader
    source: Source  # the training images
    window: Window
    device: torch.device
    batch_slice: BatchSlice
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    evaluation_due: bool = False
    measured_at: int | None = None
    best: float = 0.0
    since_best: int = 0
    left_out: tuple[int, ...] = ()
    ranks_before: int = 0
    precision: str = "fp32"
    precision_before: str = ""
    changed: str = ""
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        """Begins the stamp of the image files, on rank 0."""
        self._stamp: Stamp | None = None
        if distributed.rank_and_world_size()[0] == 0:
            self._stamp = Stamp(self.source, self.config.data.checksum)

    scaler: torch.amp.GradScaler | None = None

    @property
    def pace(self) -> Pace:
        """The batches of every step."""
        return Pace(self.config.data, self.loader.steps_per_epoch)

    def shares(self) -> Shares:
        """Returns the images of every rank at the present step."""
        place = self.epoch, self.step_in_epoch
        return self.pace.shares(self.batch_slice, len(self.source), *place)

    def shares_of_a_batch(self) -> Shares:
        """Returns the images of every rank in a whole batch of the loader."""
        return self.batch_slice.shares(len(self.source), 0)

    def batches_seen(self) -> int:
        """Returns the batches of the loader that the run has taken."""
        return self.pace.seen(self.epoch, self.step_in_epoch)

    def epochs_done(self) -> float:
        """Returns the epochs that the run has done, with the part of the present epoch."""
        return self.batches_seen() / self.loader.steps_per_epoch

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of images and classes, which some methods are built for."""
        return {"images": len(self.source), "classes": len(self.source.classes)}

    def whole_encoder(self) -> nn.Module:
        """Returns the query encoder, of a sharded model a copy with whole weights.

        A collective call.
        """
        return self.model.encoder_q if self.sharding is None else self.sharding.whole()

    def measured(self, figures: dict[str, float], counts: bool) -> None:
        """Takes the kNN figures of the present step. counts: for the best figures, too."""
        self.after, self.evaluation_due, self.measured_at = figures, False, self.step
        if self.step == 0:
            self.before = figures
        elif counts:
            top1 = figures.get("knn_top1", 0.0)
            self.since_best = 0 if top1 > self.best else self.since_best + 1
            self.best = max(self.best, top1)

    def initialise(self, load: Callable[[Method], list[str]]) -> list[str]:
        """Gives a new model its first weights. Returns the lines of `load`."""
        if self.sharding is None:
            return load(self.model)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.train.seed)
            plain = build_method(self.config, **self.sizes)
        lines = load(plain)
        load_model(self.model, plain.state_dict())
        return lines

    def collect(self, alone: bool = False) -> dict[str, Any] | None:
        """Returns the content of a checkpoint on rank 0, elsewhere None. A collective call.

        alone: the call is of this rank alone, and the content has no parts of other ranks.
        The content of a sharded run is on all ranks, with this rank's part of sharded tensors.
        """
        gather: Callable[[Any], list[Any]] = distributed.gather_objects
        if alone:
            gather = lambda own: [own]  # noqa: E731
        random_states, windows = gather(random_state(self.device)), gather(self.window.state())
        skipped: dict[int, str] = {}
        for own in gather(dict(self.loader.skipped)):
            skipped |= own
        if distributed.rank_and_world_size()[0] != 0 and self.sharding is None:
            return None
        return {
            "format": FORMAT,
            "version": __version__,
            "config": settings.to_dict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "windows": windows,
            "random_states": random_states,
            "method_random_state": self.model.random_state(),
            "data": {
                "fingerprint": self.source.fingerprint(),
                "skipped": skipped,
                "stamp": self._stamp.get() if self._stamp else {},
            },
            "sizes": self.sizes,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "before": self.before,
            "after": self.after,
            "evaluation_due": self.evaluation_due,
            "measured_at": self.measured_at,
            "best": self.best,
            "since_best": self.since_best,
            "left_out": list(self.left_out),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any], extend: bool = False) -> list[str]:
        """Continues from the content of a checkpoint. Returns lines for the log.

        extend: other images are allowed, as many as before or more. The epoch and the step within
            the epoch stay, so an epoch of more steps gives the step a larger number.
        Raises ConfigError if the checkpoint was made from other images.
        """
        check_entries(saved, to_continue=True)
        with fitting():
            return self._restore(saved, extend)

    def _restore(self, saved: dict[str, Any], extend: bool) -> list[str]:
        lines = take_other_images(self, saved, extend)
        if saved["step_in_epoch"] > (steps := self.pace.steps(saved["epoch"])):
            raise ConfigError(
                f"checkpoint: step_in_epoch: expected at most {steps}, the "
                f"steps of an epoch, got {saved['step_in_epoch']}"
            )
        before = {} if lines else saved["data"].get("stamp", {})  # earlier versions lack a stamp
        found_now = self._stamp.get() if self._stamp else {}
        self.changed = distributed.from_main(changed(before, found_now))
        if self.changed == "content":
            raise ConfigError(
                "data.path: the content of image files has changed since the checkpoint "
                "(data.checksum); --data.checksum false continues with these files"
            )
        if "parts" in saved:  # values are read into this rank's parts
            parts.fill(saved, empty_like_own(self.model, self.optimizer))
        load_model(self.model, saved["model"])
        self.model.load_random_state(saved["method_random_state"])
        load_optimizer(self.optimizer, saved["optimizer"])
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.step_in_epoch = saved["step_in_epoch"]
        self.before, self.after = saved["before"], saved["after"]
        # Checkpoints of earlier versions lack the two.
        self.evaluation_due = saved.get("evaluation_due", False)
        self.measured_at = saved.get("measured_at")
        # Earlier checkpoints have no best value. The next evaluation is then the first to count.
        self.best, self.since_best = saved.get("best", 0.0), saved.get("since_best", 0)
        self.left_out = tuple(saved.get("left_out", ()))
        self.precision_before = saved.get("precision", "")
        if self.scaler is not None and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.loader.skipped.update(saved["data"]["skipped"])
        rank, world_size = distributed.rank_and_world_size()
        windows, random_states = saved["windows"], saved["random_states"]
        self.ranks_before = len(random_states)
        # If the number of ranks has changed, every rank takes the mean of the sums.
        same = len(windows) == world_size
        self.window.load_state(windows[rank] if same else mean_window(windows))
        if rank < len(random_states):
            set_random_state(random_states[rank], self.device)
        return lines


def step_files(folder: Path, pattern: str = "step_*.pt") -> list[Path]:
    """Returns the step files of a folder of checkpoints, the last written first.

    pattern: of other files.

    (After a run went back to an older checkpoint, larger numbers are older files.)
    """
    written = [(file.stat().st_mtime_ns, file.name, file) for file in folder.glob(pattern)]
    return [file for *_, file in sorted(written, reverse=True)]


def has_checkpoint(run: Path) -> bool:
    """Returns whether a run folder holds checkpoints."""
    return any((run / "checkpoints").glob("*.pt"))


class OtherKindError(ConfigError):
    """The file is mocofast's, but of another command than pretrain."""


def load_checkpoint(
    path: str | Path,
    check: Callable[[Any, Path], dict[str, Any]] | None = None,
    whole: bool = True,
) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    path: the file, or a run folder. Of a run folder checkpoints/last.pt is read, or the newest
        step file that is whole. The log names files that are missing or damaged.
    check: returns the content of a file, or raises ConfigError for another kind of checkpoint.
        None: `checked`.
    whole: as for `read_file`.
    Raises FileNotFoundError if there is no file, ConfigError (a ValueError) if the file is no
    mocofast checkpoint, or damaged.
    """
    path, check = Path(path), check or checked
    if not path.is_dir():
        return check(read_file(path, whole), path)
    folder = path / "checkpoints"
    last, errors = folder / LAST, []
    for file in (last, *step_files(folder)):
        try:
            state = check(read_file(file, whole), file)
        except OtherKindError:  # the other files of the folder are of the same kind
            raise
        except (FileNotFoundError, ConfigError) as error:
            errors.append(str(error))
            continue
        if errors:
            log.warning("%s; taking %s, of step %d", "; ".join(errors), file, state["step"])
        return state
    if len(errors) == 1 and not last.exists():
        if not (folder.is_dir() or (path / "config.yaml").is_file()):
            raise FileNotFoundError(f"{path}: no run folder ({other_folder(path)})")
        raise FileNotFoundError(f"no checkpoint at {last}")
    raise ConfigError(f"no checkpoint of {path} can be read: {'; '.join(errors)}")


# The entries that every checkpoint needs, and their kinds.
_ENTRIES: dict[str, type | tuple[type, ...]] = {"config": Mapping, "model": Mapping}
_STATE: dict[str, type | tuple[type, ...]] = {
    **_ENTRIES,
    "optimizer": Mapping,
    "data": Mapping,
    "before": Mapping,
    "after": Mapping,
    "windows": list,
    "random_states": list,
}
_COUNTS = ("step", "epoch", "step_in_epoch")


def checked(state: Any, path: Path) -> dict[str, Any]:
    """Returns `state`, read from `path`, if it is a mocofast checkpoint. Raises ConfigError."""
    found = state.get("format") if isinstance(state, dict) else None
    if isinstance(found, str) and found.startswith("mocofast "):  # detect, segment, classifier
        raise OtherKindError(
            f"{path}: not a mocofast checkpoint of pretraining, but a file of {found!r}; name the "
            "run folder of the pretraining"
        )
    if not isinstance(found, int) or found != FORMAT:
        raise ConfigError(
            f"{path}: not a mocofast checkpoint of format {FORMAT}, from pretraining (for "
            "facebookresearch/moco's files see mocofast.interop.load_reference_state_dict)"
        )
    return state


def check_entries(state: Mapping[str, Any], to_continue: bool = False) -> None:
    """Raises ConfigError if an entry of a checkpoint is missing or of another kind.

    to_continue: the state of a run is needed, too.
    """
    for name, kind in (_STATE if to_continue else _ENTRIES).items():
        if not isinstance(state.get(name), kind):
            raise ConfigError(f"checkpoint: no entry {name!r} of the kind that a run writes")
    if to_continue:
        check_counts(state)


def check_counts(state: Mapping[str, Any]) -> None:
    """Raises ConfigError if a number of steps or epochs is missing or no such number."""
    for name in _COUNTS:
        value = state.get(name)
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise ConfigError(f"checkpoint: {name}: expected a number of steps, got {value!r:.60}")


MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Inside the block, content of a checkpoint that does not fit raises ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except MISFITS as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"checkpoint: the content does not fit the model ({type(error).__name__}: {first:.300})"
        ) from error


def model_from_checkpoint(state: dict[str, Any]) -> tuple[Method, Config]:
    """Returns the trained model, on the CPU, and the configuration of its run."""
    check_entries(state)
    with fitting():
        config = settings.from_dict(state["config"])
        sizes = {name: int(count) for name, count in state.get("sizes", {}).items()}
        model = build_method(untrained(config), **sizes)
        model.load_state_dict(state["model"])
    check_finite(model.state_dict(), "checkpoint")
    return model, config
