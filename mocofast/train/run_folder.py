"""What a run leaves behind: config.yaml, metrics.jsonl, train.log, TensorBoard events; and its screen lines."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mocofast import files, settings
from mocofast.config import Config

log = logging.getLogger("mocofast")


class _ScreenHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "on_screen", True):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class RunFolder:
    """The files of one run. Only rank 0 makes one."""

    def __init__(self, path: Path, config: Config, resumed_step: int | None) -> None:
        """resumed_step: the step that the run continues from; later metrics lines, from before the interruption,
        are dropped, since they will be written again. None for a new run."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(
            f"# mocofast pretrain {path / 'config.yaml'}\n"
            + yaml.safe_dump(settings.to_dict(config), sort_keys=False),
            encoding="utf-8",
        )
        self._log_to(path / "train.log")
        self._skipped: set[str] = set()
        if resumed_step is None:
            (path / "skipped.jsonl").unlink(missing_ok=True)
        elif (path / "skipped.jsonl").exists():
            named = (path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
            self._skipped = {json.loads(line)["file"] for line in named}
        self.metrics_path = path / "metrics.jsonl"
        kept = self._lines_until(resumed_step) if resumed_step is not None else []
        with files.atomic_write(self.metrics_path) as rewritten:
            rewritten.write_text("".join(kept), encoding="utf-8")
        self._metrics = open(self.metrics_path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for the run)
        from torch.utils.tensorboard import SummaryWriter  # here, since its import takes a second

        self._board = SummaryWriter(
            str(path), purge_step=None if resumed_step is None else resumed_step + 1
        )

    def _lines_until(self, step: int) -> list[str]:
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]

    def _log_to(self, path: Path) -> None:
        self._handlers: list[logging.Handler] = [
            logging.FileHandler(path, encoding="utf-8"),
            _ScreenHandler(),
        ]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handlers[1].setFormatter(logging.Formatter("%(message)s"))
        log.setLevel(logging.INFO)
        log.propagate = False
        for handler in self._handlers:
            log.addHandler(handler)

    def write(self, **metrics: Any) -> None:
        """One line of metrics.jsonl, and its numbers as TensorBoard scalars."""
        self._metrics.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, metrics["step"])

    def write_skipped(self, skipped: dict[str, str]) -> None:
        """Names in the log and in skipped.jsonl the files that could not be decoded, unless it has done so before.

        skipped: all so far, file -> reason.
        """
        for name, reason in sorted(skipped.items()):
            if name not in self._skipped:
                self._skipped.add(name)
                log.warning(
                    "skipped unreadable file %d, another image in its place: %s: %s",
                    len(self._skipped),
                    name,
                    reason,
                )
                with open(self.path / "skipped.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"file": name, "reason": reason}) + "\n")

    def close(self) -> None:
        """Flushes and closes every file."""
        self._metrics.close()
        self._board.close()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()


def choose_folder(config: Config, resuming: bool) -> Path:
    """`train.dir`, or runs/RECIPE: the newest existing one to resume, else one that is not taken yet."""
    if config.train.dir:
        return Path(config.train.dir)
    first = Path("runs") / config.recipe
    taken = [
        p for p in (first, *first.parent.glob(f"{config.recipe}-*")) if (p / "config.yaml").exists()
    ]
    if resuming:
        return max(taken, key=lambda p: p.stat().st_mtime, default=first)
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_name(f"{config.recipe}-{number}")
    return path
