"""Trains a small network on real digit images with every method and compares them.

    python -m studies.digits                      # all methods, 3 seeds
    python -m studies.digits --method rbwa,rbwa-control --dtype float64
    python -m studies.digits --help

Needs scikit-learn, matplotlib and tqdm beside PyTorch. Writes results.json after every finished
run, then a table and curves.png. Ctrl-C keeps what is finished. With --checkpoint-every N a start
with the same options goes on where the last one was stopped or killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison. Exit code 0; 130 after Ctrl-C; 1 if a result cannot be written, or a
    file in the output folder not be gone on with; 141 if nobody reads what it prints."""
    listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listening:
        signal.signal(signal.SIGINT, leave)
    from rbwa_fused.command import run

    def compared() -> int:
        from studies.digits import compare  # seconds, in which Ctrl-C confuses numpy's imports

        if listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return compare.main(argv)

    return run("digits", compared)


def leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before there is anything to keep."""
    print("digits: interrupted: nothing started", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
