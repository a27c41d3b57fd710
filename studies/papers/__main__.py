"""The papers' experiments, with seeds, controls and pictures.

    python -m studies.papers table5                 # every system, on scikit-learn's digits
    python -m studies.papers table5 --hard          # 300 images, a fifth of the labels wrong
    python -m studies.papers table1 --data cifar10 --root FOLDER
    python -m studies.papers flatness
    python -m studies.papers table5 --help

table1: RBWA by batch size; table2: across networks and data; table3: RBWA-E; table4: RSGDM; table5:
every system. Needs scikit-learn, torchvision, matplotlib and tqdm beside PyTorch. Each finished run
is in results.json at once; the same command goes on where it was stopped, then prints the table and
writes table.md, table.csv and a picture.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None) -> int:
    """See main.py. Exit code 1 also for what cannot be written, 141 if nobody reads it."""
    listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listening:
        signal.signal(signal.SIGINT, leave)
    from rbwa_fused.command import run

    def performed() -> int:
        from studies.papers import main  # seconds, in which Ctrl-C confuses numpy's imports

        if listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main.main(argv)

    return run("papers", performed)


def leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before there is anything to keep."""
    print("papers: interrupted: nothing started", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
