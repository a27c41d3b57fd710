"""One command as a process group: its output copied as it comes, all of it over when it is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE = 5.0  # seconds that a command has to say where it stood
BEGINNING, END = 2**20, 2**18  # bytes of a command's output that are kept


class Output:
    """What a command says. Of one that says too much the beginning and the end are kept.

    Args:
        write: gets it as it comes, but for what is in between.
    """

    def __init__(self, write: Callable[[bytes], object] = lambda data: None) -> None:
        self._write = write
        self._beginning, self._end = bytearray(), b""
        self._bytes = 0
        self._open = True

    def follow(self, pipe: Any) -> None:
        """Takes what comes out of a pipe, to its end or to `close`."""
        with pipe:
            while self._open and (chunk := pipe.read(2**16)):
                self._bytes += len(chunk)
                first = chunk[: BEGINNING - len(self._beginning)]
                self._beginning += first
                self._write(first)
                self._end = (self._end + chunk[len(first) :])[-END:]

    def close(self) -> None:
        """Writes the end; what comes from now on is nobody's."""
        self._open = False
        self._write(self._rest())

    def text(self) -> str:
        return (bytes(self._beginning) + self._rest()).decode(errors="replace")

    def _rest(self) -> bytes:
        missing = self._bytes - len(self._beginning) - len(self._end)
        return (b"\n[%d bytes left out]\n" % missing if missing > 0 else b"") + self._end


def own_group() -> None:
    """Before the command begins: what is started in the background ignores SIGINT otherwise."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def path() -> str:
    """PATH, and behind it where ninja, nvcc and compute-sanitizer are where it does not say so."""
    beside = os.path.dirname(sys.executable)
    return os.pathsep.join([os.environ.get("PATH", os.defpath), beside, "/usr/local/cuda/bin"])


def take(
    command: Sequence[str], seconds: float, output: Output, environment: Mapping[str, str]
) -> int:
    """The exit status of a command, which is over then, with all that it has started.

    Raises:
        subprocess.TimeoutExpired: if it took longer.
        OSError: if it cannot be started.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path(), "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        preexec_fn=own_group,
    )
    reader = Thread(target=output.follow, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        return process.wait(seconds)
    finally:
        end(process)
        reader.join(GRACE)  # longer only if somebody has left the group and still holds the pipe
        output.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group: asks first, so that pytest and the benchmarks say where they stood."""
    for number in (signal.SIGINT, signal.SIGKILL):
        # One that hangs in the driver is left behind.
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)
