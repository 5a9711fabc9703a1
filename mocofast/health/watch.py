"""Watches a run: writes signals.jsonl, warns in the log, and says the verdict."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mocofast import files
from mocofast.config import Config
from mocofast.data.sources import Datasets
from mocofast.health.facts import facts_of
from mocofast.health.signals import Snapshot, weights_of
from mocofast.health.verdict import Evidence, diagnose, verdict
from mocofast.methods.base import Method
from mocofast.models.libraries import PRETRAINED
from mocofast.ops.local import is_dtensor

log = logging.getLogger("mocofast")

FILE = "signals.jsonl"
SETTLED = 5  # log lines with the same finding, before the log warns
LOOKED_AT = 200  # log lines of the beginning and of the end, for a verdict
LEAK_EVERY = 4  # log lines between tests for a leak of BatchNorm


class Watch:
    """The signals of one run, on rank 0. The first line of signals.jsonl holds the facts.

    folder: of the run. resumed_step: the step to continue from, None for a new run.
    pretrained: the run started from the weights of a file.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        method: Method,
        datasets: Datasets,
        resumed_step: int | None,
        pretrained: bool,
    ) -> None:
        self._path, self._config, self._method = folder / FILE, config, method
        self.facts = facts_of(method, datasets)
        # Lines after the step of the checkpoint are written again.
        facts, known = ({}, []) if resumed_step is None else read_signals(folder)
        has_weights = pretrained or config.model.arch.endswith(PRETRAINED)
        self.facts["pretrained"] = facts.get("pretrained", has_weights)
        self._lines = [line for line in known if line["step"] <= (resumed_step or 0)]
        content: list[dict[str, Any]] = [{"facts": self.facts}, *self._lines]
        with files.atomic_write(self._path) as rewritten:
            rewritten.write_text("".join(json.dumps(line) + "\n" for line in content), "utf-8")
        self._file = files.LineFile(self._path)
        # The test copies encoders, which sharded encoders do not allow.
        sharded = is_dtensor(next(method.parameters()))
        self._may_leak = not sharded and not getattr(config.model, "shuffle_bn", True)
        self._looks = 0
        self._snapshot: Snapshot | None = None
        self._earlier = (resumed_step or 0, weights_of(method))
        self._seen: dict[str, int] = {}  # {name of a finding: lines in a row}

    def look(self, views: Sequence[Tensor], pair: tuple[Tensor, Tensor] | None) -> None:
        """Starts to copy what the last step left. Call it before the next step."""
        leak = self._looks % LEAK_EVERY == LEAK_EVERY // 4 and self._may_leak
        self._snapshot = Snapshot(self._method, views, pair, leak)
        self._looks += 1

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Writes the line of `step`, when the copies have arrived. Returns the signals.

        values: the averages of the log line.
        """
        if self._snapshot is None:
            return {}
        begin, weights = self._earlier
        signals = self._snapshot.signals(weights, step - begin)
        self._earlier, self._snapshot = (step, self._snapshot.weights), None
        line = files.as_json_knows({"step": step, **values, **signals})
        self._lines.append(line)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._warn()
        return signals

    def _warn(self) -> None:
        """Warns once of a finding that has stayed for some lines."""
        found = {f.name: f for f in diagnose(self._evidence({}, {}))}
        self._seen = {name: self._seen.get(name, 0) + 1 for name in found}
        for name, count in self._seen.items():
            if count == SETTLED:
                log.warning("health: %s", found[name])

    def conclude(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Says the verdict in the log, after the last line.

        before, after: figures of the kNN monitor, or empty.
        """
        self._file.close()
        log.info("verdict: %s", verdict(self._evidence(before, after)))

    def _evidence(self, before: Mapping[str, float], after: Mapping[str, float]) -> Evidence:
        return Evidence(self._config, self.facts, looked_at(self._lines), before, after)


class Attendant:
    """What the other ranks of a sharded run do while rank 0 watches: they give their parts."""

    def __init__(self, method: Method) -> None:
        self._method = method
        weights_of(method)

    def look(self, views: Sequence[Tensor], pair: tuple[Tensor, Tensor] | None) -> None:
        """Takes part in `Watch.look`."""
        Snapshot(self._method, views, pair)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def conclude(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Says nothing."""


def looked_at(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines that a verdict looks at: of long runs the beginning and the end."""
    return lines if len(lines) <= 2 * LOOKED_AT else lines[:LOOKED_AT] + lines[-LOOKED_AT:]


def read_signals(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the facts and the lines of a run folder's signals.jsonl. Leaves torn lines out."""
    facts: dict[str, Any] = {}
    lines = []
    path = folder / FILE
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            found = line.get("facts")
            facts |= found if isinstance(found, dict) else {}
            if isinstance(line.get("step"), int):
                lines.append(line)
    return facts, lines
