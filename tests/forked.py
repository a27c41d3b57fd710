"""Lives that are forked from a program which has imported everything, and may be killed."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, default_int_handler, signal
from typing import Any

from started import environment


class Lives:
    """A process that runs a file whose end is `fork_lives`."""

    def __init__(self, file: Path) -> None:
        self.process = subprocess.Popen(
            (sys.executable, "-W", "ignore", str(file)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(Path(__file__).parent),
            # A shell's background job ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal(SIGINT, default_int_handler),
        )

    def begin(self, **arguments: Any) -> int:
        """Starts one; returns its process id."""
        self._say(json.dumps(arguments))
        return self._answer()

    def end(self) -> int:
        """Waits for it; returns its exit code. Until then it may be killed, also if it is over."""
        self._say("")
        return self._answer()

    def close(self) -> None:
        with self.process:  # waits for it, and closes its pipes
            pass

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def _answer(self) -> int:
        out = self.process.stdout
        assert out is not None
        assert select.select([out], [], [], 120)[0], "no answer for two minutes"
        return int(out.readline())


def fork_lives(live: Callable[..., int | None]) -> None:
    """Forks one for every `Lives.begin`, and says how it ended at `Lives.end`."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = live(**json.loads(line)) or 0
            finally:
                os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
