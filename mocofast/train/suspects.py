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
from mocofast.data.trial import fatal_files
from mocofast.errors import printable

FOLDER = "decoding"
FATAL = "fatal.json"  # {"fingerprint": of the source, "files": {index: reason}}


def skip_fatal_files(loader: Loader, source: Source, run: Path) -> list[str]:
    """Adds the files that have ended a process to the skipped samples, and begins a new journal.

    All ranks call it together. Returns lines for the log.
    Only DALI's decoders are known to end a process, so other loaders keep no journal.
    """
    keep_journal = getattr(loader, "keep_journal", None)
    if keep_journal is None:
        return []
    rank, world_size = distributed.rank_and_world_size()
    place, fingerprint = run / FOLDER, source.fingerprint()
    # The number of ranks may have changed.
    journals = sorted(place.glob("rank-*"))[rank::world_size]
    suspects = {i for path in journals for i in read_journal(path, fingerprint, len(source))}
    found = fatal_files(source, sorted(suspects))
    fatal = _read(place / FATAL, fingerprint, len(source))
    tested = ended = 0
    for own, count in distributed.gather_objects((found, len(suspects))):
        fatal |= own
        tested, ended = tested + count, ended + len(own)
    if rank == 0 and fatal:
        content = {"fingerprint": fingerprint, "files": {str(i): why for i, why in fatal.items()}}
        with files.atomic_write(place / FATAL) as path:
            path.write_text(json.dumps(content), encoding="utf-8")
    for path in journals:
        path.unlink(missing_ok=True)
    loader.skipped.update(fatal)
    keep_journal(place / f"rank-{rank}")
    lines = [f"skipped: {printable(source.name(i))}: {why}" for i, why in sorted(fatal.items())]
    if tested:
        lines.append(
            f"the last process died while it decoded images: {tested} images tested in a process "
            f"of their own, {ended} ended it"
        )
    return lines


def _read(path: Path, fingerprint: str, count: int) -> dict[int, str]:
    """Returns the files of FATAL, {index: reason}. None for new images, or a damaged file."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] != fingerprint:
            return {}
        found = {int(index): str(reason) for index, reason in kept["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {index: reason for index, reason in found.items() if 0 <= index < count}
