"""Checkpoints: written atomically, in the background, pruned; loaded with weights_only.

Layout of a file: `format`, `config` (nested dictionaries), `model` (state dict of the method), `optimizer`, `epoch`
and `step_in_epoch` (the position in the data stream), `step`, and what else a continued run needs (see train.py).
Only tensors, numbers, strings and containers of them, so that torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch

from mocofast import files, settings
from mocofast.config import Config, ConfigError
from mocofast.errors import describe_error
from mocofast.methods.base import Method
from mocofast.methods.build import build_method

FORMAT = 2
LAST = "last.pt"


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """torch.save, but `path` is always whole: it has the old content or the new."""
    with files.atomic_write(path) as file:
        torch.save(state, file)


def _snapshot(value: Any) -> Any:
    """A copy on the CPU that later steps cannot change."""
    if isinstance(value, torch.Tensor):
        # clone() keeps strides: channels-last weights stay so.
        return value.detach().clone() if value.device.type == "cpu" else value.detach().to("cpu")
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_snapshot(item) for item in value)
    return value


class CheckpointWriter:
    """Writes `folder`/step_NNNNNNNN.pt and last.pt on a thread; keeps the newest `keep` of the former."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, state: dict[str, Any]) -> None:
        """Takes a snapshot now and writes it in the background; an earlier write's error is raised here."""
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(_snapshot(state),), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written; raises what a write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any]) -> None:
        try:
            last = self.folder / LAST
            if self.keep:
                numbered = self.folder / f"step_{state['step']:08d}.pt"
                save_atomically(state, numbered)
                link = last.with_name(LAST + ".tmp")
                link.unlink(missing_ok=True)
                try:
                    os.link(numbered, link)
                    os.replace(link, last)
                except OSError:  # a file system without hard links
                    save_atomically(state, last)
                for old in sorted(self.folder.glob("step_*.pt"))[: -self.keep]:
                    old.unlink()
            else:
                save_atomically(state, last)
        except BaseException as error:
            self._error = error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. `path`: the file, or a run folder (its checkpoints/last.pt).

    Raises FileNotFoundError if none is there, ConfigError (a ValueError) for a file that is no mocofast checkpoint.
    """
    return checked(*read_file(path))


def read_file(path: str | Path) -> tuple[Any, Path]:
    """What torch.save wrote, ours or another's, on the CPU, and its file; `path` and errors as of `load_checkpoint`,
    which also looks at the content."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoints" / LAST
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True), path
    except Exception as error:
        raise ConfigError(f"{path}: not a readable checkpoint ({describe_error(error)})") from error


def checked(state: Any, path: Path) -> dict[str, Any]:
    """`state`, read from `path`, if it is a checkpoint of ours, else ConfigError."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: not a mocofast checkpoint of format {FORMAT} (for facebookresearch/moco's files see "
            "mocofast.interop.load_reference_state_dict)"
        )
    return state


def model_from_checkpoint(state: dict[str, Any]) -> tuple[Method, Config]:
    """The trained model, on the CPU, and the configuration of its run."""
    config = settings.from_dict(state["config"])
    model = build_method(config, **state.get("sizes", {}))
    model.load_state_dict(state["model"])
    return model, config
