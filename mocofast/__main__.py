"""The command `mocofast`, and `python -m mocofast`, as torchrun starts it."""

import io
import os
import sys

from mocofast import interrupts


def main() -> int:
    """Runs the command of sys.argv. Returns its exit status. Ctrl-C may come while modules load."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start, as by `mocofast ... >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # open to the end
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a terminal of latin-1 has no CJK
    with interrupts.watching():
        try:
            from mocofast import cli
        except interrupts.Stopped as stop:
            print("mocofast: stopped", file=sys.stderr)
            return 128 + stop.number
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
