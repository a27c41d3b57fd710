"""What one process of many does alone, and how the others learn that it failed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import distributed

from rbwa_fused.command import discard


def on_first(work: Callable[..., object], *args: object) -> None:
    """Calls `work(*args)`, which prints or saves, on rank 0. All ranks call this.

    Where that fails every rank ends, or the others would wait for one that is gone. Where nobody
    reads any more what is printed, all go on in silence: a training is more than its output.

    Raises:
        OSError: on rank 0, what failed.
        SystemExit: on the others.
    """
    failed: list[OSError | None] = [None]
    if distributed.get_rank() == 0:
        try:
            work(*args)
            sys.stdout.flush()
        except BrokenPipeError:
            discard()
        except OSError as error:
            failed[0] = error
    distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0] if distributed.get_rank() == 0 else SystemExit(1)
