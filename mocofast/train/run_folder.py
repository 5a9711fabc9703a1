"""The files of a run, and its lines on the screen.

config.yaml, metrics.jsonl, train.log, skipped.jsonl, curves.png and TensorBoard events.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml
from tqdm import tqdm

from mocofast import files, interrupts, settings
from mocofast.config import TRACKERS, Config
from mocofast.errors import printable
from mocofast.log_format import PrintableFormatter
from mocofast.models.libraries import TIMM
from mocofast.plots import plot_curves
from mocofast.train.log_files import LogFile
from mocofast.train.metrics import LOSS, RATES, duration
from mocofast.train.trackers import Trackers

log = logging.getLogger("mocofast")


class LoopOptions(Protocol):
    """The options of a loop that its folder needs."""

    @property
    def dir(self) -> str: ...
    @property
    def epochs(self) -> int: ...


class FolderOptions(Protocol):
    """The configuration of a run, of pretraining or of another task."""

    @property
    def recipe(self) -> str: ...
    @property
    def train(self) -> LoopOptions: ...


class StepLine(NamedTuple):
    """What the log line and metrics.jsonl say about the steps since the last line.

    epoch: epochs done, with a fraction. remaining: seconds to the end of the run, estimated.
    memory: peak in GiB. values: means of the metrics, and the rates.
    """

    step: int
    epoch: float
    lr: float
    chance_loss: float | None
    memory: float
    remaining: float
    values: Mapping[str, float]


class _ScreenHandler(logging.Handler):
    """Prints lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "on_screen", True):
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:  # the reader has left, or the disk behind the output is full
                interrupts.drop_output()
                print("standard output is closed; train.log has all lines", file=sys.stderr)


class RunFolder:
    """The files of one run. Rank 0 alone has a RunFolder.

    command: words of the command line that take config.yaml.
    """

    command = "mocofast pretrain"

    def __init__(self, path: Path, config: FolderOptions, resumed_step: int | None) -> None:
        """Opens the files.

        config: a dataclass of groups of options, which config.yaml holds.
        resumed_step: the step to continue from, or None for a new run. Metrics of later steps are
            dropped, because the continued run writes them again.
        """
        self.path, self._config = path, config
        path.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path / "config.yaml") as written:
            written.write_text(
                f"# {self.command} {path / 'config.yaml'}\n"
                + yaml.safe_dump(settings.to_dict(config), sort_keys=False),
                encoding="utf-8",
            )
        self._log_to(path / "train.log")
        self._open_skipped(resumed_step is not None)
        self._open_metrics(resumed_step)
        names = getattr(config.train, "log_to", TRACKERS[:1])
        self._trackers = Trackers(names, path, settings.to_dict(config), resumed_step)

    def _log_to(self, path: Path) -> None:
        self._handlers: list[logging.Handler] = [
            LogFile(path, encoding="utf-8"),
            _ScreenHandler(),
        ]
        self._handlers[0].setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
        self._handlers[1].setFormatter(PrintableFormatter("%(message)s"))
        log.setLevel(logging.INFO)
        log.propagate = False
        for handler in self._handlers:
            log.addHandler(handler)

    def _open_skipped(self, resumed: bool) -> None:
        """Reads the names of the files that were skipped so far. A new run has none."""
        self._skipped_path = self.path / "skipped.jsonl"
        self._skipped: set[str] = set()
        if not resumed:
            self._skipped_path.unlink(missing_ok=True)
        elif self._skipped_path.exists():
            lines = self._repaired(self._skipped_path, "file")
            self._skipped = {json.loads(line)["file"] for line in lines}
        self._skipped_file = files.LineFile(self._skipped_path)

    def _open_metrics(self, resumed_step: int | None) -> None:
        """Opens metrics.jsonl after the lines up to `resumed_step`."""
        self.metrics_path = self.path / "metrics.jsonl"
        kept = self._lines_until(resumed_step) if resumed_step is not None else []
        with files.atomic_write(self.metrics_path) as rewritten:
            rewritten.write_text("".join(kept), encoding="utf-8")
        self._metrics = files.LineFile(self.metrics_path)

    def _lines_until(self, step: int) -> list[str]:
        if not self.metrics_path.exists():
            return []
        lines = self._repaired(self.metrics_path, "step")
        return [line for line in lines if json.loads(line)["step"] <= step]

    def _repaired(self, path: Path, needed: str) -> list[str]:
        """Returns the whole lines of a file. Lines that cannot be read move to PATH.damaged.

        needed: an entry of every line.
        """
        lines, bad = whole_lines(path, needed)
        if bad:
            damaged = path.with_name(f"{path.name}.damaged")
            shutil.copyfile(path, damaged)
            with files.atomic_write(path) as rewritten:
                rewritten.write_text("".join(lines), encoding="utf-8")
            log.warning(
                "%d lines of %s cannot be read and are left out; %s is the file as it was",
                bad,
                path,
                damaged,
            )
        return lines

    # ---- metrics ----

    def write(self, **metrics: Any) -> None:
        """Writes a line of metrics.jsonl, and adds its numbers to the trackers (train.log_to).

        NaN and infinity become null, and reach no tracker.
        """
        metrics = files.as_json_knows(metrics)
        self._metrics.write(json.dumps(metrics, allow_nan=False) + "\n")
        numbers = {
            name: value
            for name, value in metrics.items()
            if name not in ("step", "epoch") and isinstance(value, (int, float))
        }
        self._trackers.add(numbers, metrics["step"])

    def write_steps(self, line: StepLine, bar: tqdm[Any]) -> None:
        """Writes the metrics of the last steps to files, log and progress bar."""
        values = line.values
        self.write(
            step=line.step,
            epoch=line.epoch,
            lr=line.lr,
            chance_loss=line.chance_loss,
            memory_gib=line.memory,
            **values,
        )
        loss = f"loss {values[LOSS]:.3f}"
        if line.chance_loss is not None:
            loss += f" (chance {line.chance_loss:.2f})"
        metrics = "".join(
            f"  {describe_metric(name, value)}"
            for name, value in values.items()
            if name not in (LOSS, *RATES)
        )
        bar.set_postfix_str(loss + metrics)
        text = (
            f"epoch {line.epoch:6.2f}/{self._config.train.epochs}  step {line.step}  "
            f"{loss}{metrics}  lr {line.lr:.4g}  {values['images_per_second']:.0f} images/s  "
            f"data wait {values['data_wait']:.0%}  ETA {duration(line.remaining)}  "
            f"memory {line.memory:.1f} GiB"
        )
        # With a progress bar the line goes to train.log alone.
        log.info(text, extra={"on_screen": bar.disable})

    def write_evaluation(
        self, step: int, epoch: float, values: Mapping[str, float], when: str
    ) -> None:
        """Writes the figures of an evaluation.

        when: for example "after epoch 3".
        """
        self.write(step=step, epoch=epoch, **values)
        log.info("%s: %s", when, self.describe(values))

    def write_skipped(self, skipped: Mapping[str, str]) -> None:
        """Names files that could not be decoded, in the log and in skipped.jsonl, each file once.

        skipped: all files so far, {file: reason}.
        """
        for name, reason in sorted(skipped.items()):
            if name in self._skipped:
                continue
            self._skipped.add(name)
            log.warning(
                "skipped unreadable file %d, and took another image instead: %s: %s",
                len(self._skipped),
                printable(name),
                printable(reason),
            )
            self._skipped_file.write(json.dumps({"file": name, "reason": reason}) + "\n")

    def describe(self, values: Mapping[str, float]) -> str:
        """Returns the figures of an evaluation in words."""
        return "  ".join(describe_metric(name, value) for name, value in values.items())

    def close(self) -> None:
        """Flushes and closes every file."""
        self._metrics.close()
        self._skipped_file.close()
        self._trackers.close()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()


class PretrainingFolder(RunFolder):
    """The files of a pretraining run."""

    def __init__(self, path: Path, config: Config, resumed_step: int | None) -> None:
        super().__init__(path, config, resumed_step)
        self._shots = config.knn.shots
        self._method = config.model.method
        self._format = "timm" if config.model.arch.startswith(TIMM) else "torchvision"

    def finish(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        when: str = "",
        page: str = "",
    ) -> None:
        """Plots the curves, and logs the kNN figures, the files and the next commands.

        before, after: kNN figures of the random encoder and of the trained encoder, or empty.
        when: says when `after` was measured. May be empty.
        page: name of the report, or "" without a report.
        """
        curves = self.path / "curves.png"
        try:
            plot_curves(self.metrics_path, curves)
        except OSError as error:
            log.warning("%s", files.refusal(curves, error))
        if before:
            log.info("before: %s", self.describe(before))
        if after:
            log.info("after:  %s%s", self.describe(after), when)
        # Runs of few steps have no curve, and continued runs no views.
        pictures = [name for name in (curves.name, "views.png") if (self.path / name).exists()]
        log.info(
            "written to %s: config.yaml, metrics.jsonl, signals.jsonl, train.log, "
            "%sTensorBoard events, checkpoints/last.pt",
            self.path,
            "".join(f"{name}, " for name in (*pictures, page) if name),
        )
        run = shlex.quote(str(self.path))
        backbone = shlex.quote(str(self.path / "backbone.pt"))
        if page:
            log.info("next: open %s in a browser", self.path / page)
        elif pictures:
            log.info("next: look at %s", self.path / pictures[0])
        if after:
            log.info("next: mocofast linear %s", run)
        log.info("next: mocofast export %s --format %s %s", run, self._format, backbone)
        if not after:
            command = "zeroshot" if self._method == "clip" else "linear"
            log.info(
                "with labelled images: mocofast %s %s --data.path FOLDER_OF_CLASS_FOLDERS",
                *(command, run),
            )

    def describe(self, values: Mapping[str, float]) -> str:
        """Returns the figures of the kNN monitor in words."""
        text = f"kNN accuracy {values['knn_top1']:.4f}"
        if "few_shot_top1" in values:
            text += (
                f"; 1-nearest neighbour with {self._shots} labels a class "
                f"{values['few_shot_top1']:.4f}"
            )
        return text


def whole_lines(path: Path, needed: str = "") -> tuple[list[str], int]:
    """Returns the lines of a file of JSON objects, with line ends, and the number of bad lines.

    needed: an entry of every line, or "".
    A killed process leaves a torn last line, a damaged disk anything.
    """
    lines, bad = [], 0
    for content in path.read_bytes().splitlines(keepends=True):
        try:
            line = content.decode("utf-8")
            entry = json.loads(line)
            is_whole = isinstance(entry, dict) and (not needed or needed in entry)
        except (ValueError, RecursionError):
            is_whole = False
        if is_whole and line.endswith("\n"):
            lines.append(line)
        else:
            bad += 1
    return lines, bad


def describe_metric(name: str, value: float) -> str:
    """Formats a metric for the log line. acc1 and acc5 are shares, shown as acc@1 and acc@5."""
    accuracy = re.fullmatch(r"acc(\d+)", name)
    return f"acc@{accuracy[1]} {value:.1%}" if accuracy else f"{name} {value:.4g}"


def choose_folder(config: FolderOptions, resuming: bool) -> Path:
    """Chooses the run folder: `train.dir`, or a folder in runs/ named after the recipe.

    resuming: take the newest existing run of the recipe. Otherwise take a name that is free.
    """
    if config.train.dir:
        return Path(config.train.dir)
    first = Path("runs") / config.recipe
    runs = [first, *first.parent.glob(f"{config.recipe}-*")]
    taken = [path for path in runs if (path / "config.yaml").exists()]
    if resuming:
        return max(taken, key=lambda path: path.stat().st_mtime, default=first)
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_name(f"{config.recipe}-{number}")
    return path
