"""`python ./kelp/data_prep/ …` is `kelp slice …`, as is `python -m kelp.data_prep …`."""

import sys
from pathlib import Path

if not __package__:
    # Run by its folder: Python has put that folder first, where its modules would shadow others.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from kelp.cli import main

if __name__ == "__main__":
    sys.exit(main(["slice", *sys.argv[1:]]))
