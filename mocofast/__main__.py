"""`python -m mocofast`, as torchrun starts it."""

import sys

from mocofast.cli import main

if __name__ == "__main__":
    sys.exit(main())
