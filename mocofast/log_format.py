"""The format of log lines."""

from __future__ import annotations

import logging

from mocofast.errors import printable


class PrintableFormatter(logging.Formatter):
    """Formats lines of a log. Names of files reach no terminal and no log with control characters,
    and names that are no text are no error.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line. Line ends stay."""
        return "\n".join(map(printable, super().format(record).split("\n")))
