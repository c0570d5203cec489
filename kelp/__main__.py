"""`python -m kelp` is the `kelp` program."""

import sys

from kelp.cli import main

if __name__ == "__main__":
    sys.exit(main())
