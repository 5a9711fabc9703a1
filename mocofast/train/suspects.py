"""After a death of the process inside a decoder: finds the file, skips and names it.

RUN/decoding/ holds the journals of the ranks, while a run trains, and fatal.json with the files
that have ended a process. A run without a death removes the journals.
"""

from __future__ import annotations

import json
from pathlib import Path

from mocofast import distributed, files
from mocofast.data.interface import Loader, Source
from mocofast.data.journal import read_journal
from mocofast.data.trial import try_files
from mocofast.errors import printable

FOLDER = "decoding"
FATAL = "fatal.json"  # fingerprint of the source, files to skip, files for Python


def skip_fatal_files(loader: Loader, source: Source, run: Path) -> list[str]:
    """Adds the files that may have ended a process to the skipped samples, and begins a journal.

    All ranks call it together. Returns lines for the log.
    Only DALI's decoders are known to end a process, so other loaders keep no journal.
    """
    if not hasattr(loader, "keep_journal"):
        return []
    rank, world_size = distributed.rank_and_world_size()
    place, fingerprint = run / FOLDER, source.fingerprint()
    # The number of ranks may have changed.
    journals = sorted(place.glob("rank-*"))[rank::world_size]
    suspects = {i for path in journals for i in read_journal(path, fingerprint, len(source))}
    found = try_files(source, sorted(suspects))
    bad, python = _read(place / FATAL, fingerprint, len(source))
    tested = fatal = 0
    for own, count in distributed.gather_objects((found, len(suspects))):
        bad |= own.bad
        python |= set(own.python)
        tested, fatal = tested + count, fatal + own.fatal
    if rank == 0 and (bad or python):
        named = {str(index): reason for index, reason in bad.items()}
        content = {"fingerprint": fingerprint, "files": named, "python": sorted(python)}
        with files.atomic_write(place / FATAL) as path:
            path.write_text(json.dumps(content), encoding="utf-8")
    for path in journals:
        path.unlink(missing_ok=True)
    loader.skipped.update(bad)
    loader.decode_in_python(python)  # type: ignore[attr-defined]
    loader.keep_journal(place / f"rank-{rank}")
    lines = [f"skipped: {printable(source.name(i))}: {why}" for i, why in sorted(bad.items())]
    if tested:
        lines.append(
            f"the last process died while it decoded images: {tested} images tested in a process "
            f"of their own, {fatal} ended it"
        )
    return lines


def _read(path: Path, fingerprint: str, count: int) -> tuple[dict[int, str], set[int]]:
    """Returns the files of FATAL: {index: reason} to skip, and the samples for Python.

    Returns none for new images, or a damaged file.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] != fingerprint:
            return {}, set()
        bad = {int(index): str(reason) for index, reason in kept["files"].items()}
        python = {int(index) for index in kept["python"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, set()
    within = range(count)
    return {index: why for index, why in bad.items() if index in within}, python & set(within)
