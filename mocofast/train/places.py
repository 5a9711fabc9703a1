"""The folder of a checkpoint, and places that a file from elsewhere names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from mocofast.config import Config, ConfigError


def run_folder_of(path: str | Path) -> Path | None:
    """Returns the run folder that a path names, or in which a checkpoint lies. None elsewhere."""
    path = Path(path)
    if path.is_dir():
        return path
    if path.parent.name == "checkpoints":
        return path.parent.parent
    return path.parent if (path.parent / "config.yaml").exists() else None


def check_places(config: Config, path: str | Path, given: Collection[str], writes: bool) -> None:
    """Raises ConfigError if a checkpoint outside a run folder names where to write, or a URL.

    Nothing is written or fetched because a file from elsewhere says so.

    config: of the checkpoint. path: of the checkpoint. given: options that the user names.
    writes: the command writes into `train.dir`.
    """
    if run_folder_of(path) is not None:
        return
    if writes and config.train.dir and "train.dir" not in given:
        raise ConfigError(
            f"train.dir: {path} lies in no run folder, and names {config.train.dir!r}. "
            "Name the folder to write: --train.dir FOLDER"
        )
    for field in dataclasses.fields(config.data):
        value, name = getattr(config.data, field.name), f"data.{field.name}"
        texts = value if isinstance(value, tuple) else (value,)
        if name not in given and any("://" in text for text in texts if isinstance(text, str)):
            raise ConfigError(
                f"{name}: {path} lies in no run folder, and names {value!r:.200}. If these are the "
                f"images to fetch, name the place: --{name} URL"
            )
