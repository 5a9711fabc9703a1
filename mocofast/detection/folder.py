"""The run folder and the checkpoints of a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocofast.config import ConfigError
from mocofast.detection.options import TaskConfig
from mocofast.train.checkpoint import load_checkpoint
from mocofast.train.run_folder import RunFolder

# The entries of a checkpoint, and their kinds.
_ENTRIES: dict[str, type] = {
    **dict.fromkeys(("config", "model", "optimizer", "values"), Mapping),
    **dict.fromkeys(("windows", "random_states"), list),
    **dict.fromkeys(("step", "epoch", "step_in_epoch", "measured_at", "threads"), int),
    "fingerprint": str,
}


class TaskFolder(RunFolder):
    """The files of a run of `mocofast detect` or `mocofast segment`."""

    def __init__(self, path: Path, config: TaskConfig, resumed_step: int | None) -> None:
        self.command = f"mocofast {config.recipe}"
        super().__init__(path, config, resumed_step)

    def describe(self, values: Mapping[str, float]) -> str:
        """Returns the figures of an evaluation in words."""
        return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def read_saved(path: Path, task: str) -> dict[str, Any]:
    """Returns the content of a checkpoint of a task.

    path: a file or a run folder. Raises FileNotFoundError, and ConfigError for other files.
    """

    def check(content: Any, file: Path) -> dict[str, Any]:
        if not isinstance(content, dict) or content.get("format") != format_of(task):
            raise ConfigError(f"{file}: no checkpoint of mocofast {task}")
        for name, kind in _ENTRIES.items():
            if not isinstance(content.get(name), kind):
                raise ConfigError(f"{file}: no entry {name!r} of the kind that a run writes")
        return content

    return load_checkpoint(path, check)


def format_of(task: str) -> str:
    """Returns the entry "format" of the checkpoints of a task."""
    return f"mocofast {task} 1"
