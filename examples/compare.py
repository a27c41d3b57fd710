"""`python -m studies.digits` by its old name; not an example."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a file
    from studies.moved import run

    run("examples.compare", "studies.digits")
