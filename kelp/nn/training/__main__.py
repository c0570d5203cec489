"""`python ./kelp/nn/training/ …` is `kelp train …`."""

import sys
from pathlib import Path

if not __package__:
    # Started as a folder: its own modules must not be found at the top, the package must.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from kelp.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
