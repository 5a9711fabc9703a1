"""Trains several runs one after the other in the processes of one `torchrun`: a script of tests.

Arguments: a file with a line for every run, the words after `mocofast`.
"""

import sys
from pathlib import Path

from mocofast import cli

for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    status = cli.main(line.split())
    if status:
        sys.exit(status)
