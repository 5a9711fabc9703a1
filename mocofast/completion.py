"""Tab completion of commands, options and their values, by the package argcomplete.

The shell starts the command with variables that describe the line (`register-python-argcomplete`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

ASKED = "_ARGCOMPLETE"  # how many words of the line come before the arguments, set by the shell


def is_asked() -> bool:
    """Returns whether the shell asks what may stand at the cursor."""
    return ASKED in os.environ


def complete(commands: Mapping[str, Callable[[Sequence[str]], int]]) -> int:
    """Answers the shell. The parser of the command that stands on the line ends the process.

    commands: as of `mocofast.front.run`. Returns an exit status if nothing can be answered.
    """
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    start = int(os.environ[ASKED])
    complete_words = line.split()[start : None if line.endswith(" ") else -1]
    if not complete_words:
        parser = argparse.ArgumentParser(prog="mocofast")
        parser.add_argument("command", choices=list(commands))
        answer(parser)
    elif complete_words[0] in commands:
        os.environ[ASKED] = str(start + 1)
        return commands[complete_words[0]](complete_words[1:])
    return 1


def answer(parser: argparse.ArgumentParser) -> None:
    """Writes what may stand at the cursor, and ends the process, if the shell asks."""
    if is_asked():
        import argcomplete

        argcomplete.autocomplete(parser)


def offer(action: argparse.Action, values: Iterable[str], files: bool = False) -> None:
    """Names the values of an argument. files: names of files, too."""

    def completer(prefix: str, **_: object) -> list[str]:
        found = [value for value in values if value.startswith(prefix)]
        if files:
            from argcomplete.completers import FilesCompleter

            found += FilesCompleter()(prefix)
        return found

    action.completer = completer  # type: ignore[attr-defined]
