"""Programs that end in one line, and not in a traceback, where nothing is wrong with them.

    sys.exit(run("name", main))

ends so for a reader that is gone (``| head -1``), a disk that is full and a package that is not
installed, `Parser` for arguments that it does not know.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

OWN = ("rbwa_fused", "benchmarks", "examples", "studies")  # whose missing modules are defects
SIGPIPE_STATUS = 141  # what shells say of a program that a broken pipe has ended


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(name: str, main: Callable[[], int | None]) -> int:
    """What a program's `main` does, to the last byte that it prints.

    Returns:
        The exit status: what `main` returns (None is 0); 141, silently, where nobody reads what it
        writes; 1 for any other OSError and for a package that is not installed, after a line on
        stderr that begins with the program's name.
    """
    try:
        try:
            return main() or 0
        finally:  # what cannot be written is known now, not at Python's end
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OWN:
            raise
        line = f"{error.name} is not installed"
    except BrokenPipeError:
        discard()
        return SIGPIPE_STATUS
    except OSError as error:
        line = str(error)
    with suppress(OSError):
        print(f"{name}: error: {line}", file=sys.stderr, flush=True)
    discard()
    return 1


def discard() -> None:
    """Output that cannot be written goes nowhere, or Python would try again at its end."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
