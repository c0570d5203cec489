"""`python ./kelp/nn/inference/ …` is `kelp predict …`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Run as a folder: Python put this folder first on the path, where its modules would
        # shadow others; the repository root belongs there.
        sys.path[0] = str(Path(__file__).resolve().parents[3])
    from kelp.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))
