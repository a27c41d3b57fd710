"""The mean over the processes of a group, with bits of its own, and what to say if one is gone.

An all-reduce adds in an order that depends on the backend, its algorithm and the number of
processes. Its two halves are here with the kernel of `rbwa_fused.pull_` between them: each process
receives one piece of everybody's tensor, takes the mean in the order of the ranks, and gives it to
all. That moves the bytes of a ring all-reduce and has the bits of a pull in one process, whatever K
and the backend are; what is equal everywhere stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from rbwa_fused.engine import backends

Group = dist.ProcessGroup | None  # None is the default group
UNCHANGED = "The weights of this rank are unchanged by this pull, and can be saved."


@contextmanager
def explained(what: str, state: str, errors: type[Exception] = RuntimeError) -> Iterator[None]:
    """Says of a collective that failed what has happened, and what state this rank is in."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except errors as error:
        raise RuntimeError(
            f"{what}: a process of the group has gone, or did not answer within the group's "
            f"timeout. {state} Restart all ranks from the last checkpoint."
        ) from error


class GroupMean:
    """The mean of a flat tensor over the K processes of a group, under way.

    Args:
        mine: 1-d, a multiple of K elements, float32 or float64; not to be written to until `turn`.
        group: of the processes.
    """

    def __init__(self, mine: Tensor, group: Group) -> None:
        self._group = group
        self._world = dist.get_world_size(group)
        self._received = torch.empty_like(mine)
        self._piece: Tensor | None = None
        with _explained(dist.DistError):  # other errors of a call are not the processes'
            self._work = dist.all_to_all_single(self._received, mine, group=group, async_op=True)

    def turn(self) -> None:
        """Waits for the first half and starts the second, unless that is done."""
        if self._piece is not None:
            return
        self._wait()
        pieces = self._received.view(self._world, -1)
        backends.pull_([[piece] for piece in pieces], 1.0)  # each is their mean now
        self._piece = pieces[0].clone()
        with _explained(dist.DistError):
            self._work = dist.all_gather_into_tensor(
                self._received, self._piece, group=self._group, async_op=True
            )

    def result(self) -> Tensor:
        """Waits for the mean, a tensor like the process's own."""
        self.turn()
        self._wait()
        return self._received

    def _wait(self) -> None:
        assert self._work is not None  # as it would be outside the group
        with _explained():
            self._work.wait()


class BackendMean(GroupMean):
    """The same by one all-reduce of the backend's, in the order of its sum; it may know which
    processes share a node."""

    def __init__(self, mine: Tensor, group: Group) -> None:
        self._group = group
        self._world = dist.get_world_size(group)
        self._received = mine.clone()
        with _explained(dist.DistError):
            self._work = dist.all_reduce(self._received, group=group, async_op=True)

    def turn(self) -> None:
        """Nothing: an all-reduce needs no second start."""

    def result(self) -> Tensor:
        """Once."""
        self._wait()
        return self._received.div_(self._world)


def _explained(errors: type[Exception] = RuntimeError) -> AbstractContextManager[None]:
    return explained("Elastic", UNCHANGED, errors)
