"""The evidence of a run, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mocofast import settings
from mocofast.config import ConfigError
from mocofast.health.verdict import Evidence
from mocofast.health.watch import looked_at, read_signals
from mocofast.plots import read_metrics


def evidence_of(folder: Path) -> Evidence:
    """Returns the evidence of a run folder, which may lack files, for `diagnose` and `verdict`.

    Raises ConfigError if the folder has no config.yaml that can be read.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml")
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config = settings.from_dict(values)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder} is no run folder: its config.yaml: {reason}") from None
    facts, lines = read_signals(folder)
    records = records_of(folder)
    measured = [record for record in records if record.get("knn_top1") is not None]
    before = measured[0] if measured and measured[0]["step"] == 0 else {}
    after = measured[-1] if measured and measured[-1]["step"] else {}
    return Evidence(config, facts, looked_at(lines), before, after)


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run folder's metrics.jsonl, sorted by step. [] without the file.

    Raises ConfigError for a damaged file.
    """
    path = folder / "metrics.jsonl"
    try:
        return read_metrics(path) if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); mocofast pretrain --resume {folder} sets damaged lines "
            "aside"
        ) from None
