"""Real processes for tests of training on several ranks, kept until pytest ends.

    answers = ranks(2).run(scenario, "an argument")     # scenario(*args) on each, rank by rank

Every rank is a process of its own in a gloo group, one thread each. A job that takes too long kills
all of them and fails; the next one gets fresh processes.
"""

from __future__ import annotations

import atexit
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

PATIENCE = 60  # seconds a job may take
GRACE = 5  # seconds that the other ranks have once one has failed and the test has, too
GLOO_TIMEOUT = 30  # seconds, of the process group


class RankError(AssertionError):
    """What a rank raised, with its traceback, or that it died or took too long."""


class Ranks:
    """Processes that form one gloo group.

    Args:
        world: how many.
        timeout: of the process group, in seconds.
    """

    def __init__(self, world: int, timeout: float = GLOO_TIMEOUT) -> None:
        self.world = world
        self._timeout = timeout
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        """What `job(*args)` returns on each rank: a function of a module, and what pickles.

        Raises:
            RankError: where a rank raised, died, or did not answer in time.
        """
        answers = self.outcomes(job, *args, patience=patience, grace=GRACE)
        failed = [
            f"rank {rank} of {self.world}: {answer}"
            for rank, answer in enumerate(answers)
            if isinstance(answer, RankError)
        ]
        if failed:
            raise RankError("\n".join(failed))
        return answers

    def outcomes(
        self,
        job: Callable[..., Any],
        *args: Any,
        patience: float = PATIENCE,
        grace: float = PATIENCE,
    ) -> list[Any]:
        """As `run`, with a RankError in the place of an answer that a rank did not give.

        Args:
            patience: seconds until all must have answered.
            grace: seconds that the others have once one has failed.
        """
        if not self.processes:
            self._start()
        if not all(process.is_alive() for process in self.processes):
            self.stop()
            raise RankError("a process was killed between two jobs")
        for pipe in self._pipes:
            pipe.send((job, args))
        answers: list[Any] = [RankError("no answer in time")] * self.world
        waiting: dict[Any, int] = dict(zip(self._pipes, range(self.world), strict=True))
        deadline = monotonic() + patience
        while waiting and (ready := wait(list(waiting), timeout=max(0, deadline - monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, answer = pipe.recv()  # type: ignore[union-attr]
                    answers[rank] = answer if good else RankError(answer)
                except (EOFError, ConnectionResetError):
                    answers[rank] = RankError("the process died")
                if isinstance(answers[rank], RankError):
                    deadline = min(deadline, monotonic() + grace)
        if any(isinstance(answer, RankError) for answer in answers):
            self.stop()
        return answers

    def _start(self) -> None:
        context = get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(theirs, rank, self.world, str(store), self._timeout), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self.processes, self._pipes = [], []


def work(pipe: Connection, rank: int, world: int, store: str, timeout: float) -> None:
    """A rank's life: jobs from the pipe, answers to it, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, job(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


@cache
def ranks(world: int) -> Ranks:
    """The processes that all tests share."""
    shared = Ranks(world)
    atexit.register(shared.stop)
    return shared
