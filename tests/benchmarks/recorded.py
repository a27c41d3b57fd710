"""GPUs that are the CPU: Host takes every step at once, Recording replays what it has captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from time import perf_counter
from typing import Any

import torch
from emulation import backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rbwa_fused.engine import doors
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.segments import Table


class Host:
    """The CPU as a device that takes every step at once."""

    device = torch.device("cpu")
    spins = evictions = captures = 0
    waits: BaseException | None = None  # what a step that waits raises

    def mark(self) -> float:
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def spin(self, seconds: float) -> None:
        self.spins += 1

    def nothing(self) -> None:
        pass

    def evict(self) -> None:
        self.evictions += 1

    def synchronize(self) -> None:
        pass

    def no_waiting(self) -> Any:
        if self.waits is not None:
            raise self.waits
        return nullcontext()

    def aside(self) -> Any:
        return nullcontext()

    def pool(self) -> Any:
        return None

    def capture(self, step: Any, pool: Any = None) -> Any:
        self.captures += 1
        return step

    def peak_bytes(self) -> int:
        return 5 * 10**6

    def launches(self, step: Any) -> int | None:
        step()
        return 7

    def free_bytes(self) -> int:
        return 10**9

    def release(self) -> None:
        pass

    def description(self) -> dict[str, str | int | float]:
        return {"gpu": "none", "driver": "none", "torch": torch.__version__}

    def slug(self) -> str:
        return "none"


class Recorder(TorchDispatchMode):
    """Operators as a CUDA graph has them: what they compute is undone at the end, and `replay`
    runs them again on the same memory, without the Python that called them."""

    recording: Recorder | None = None

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Any:
        Recorder.recording = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Recorder.recording = None
        with torch.no_grad():
            for tensor, before in reversed(self._before):
                tensor.copy_(before)
        self._before.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("called a synchronizing operation")
        written = [
            given
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.save(tree_leaves(written))
        result = func(*args, **(kwargs or {}))
        self.add(func, args, kwargs or {}, result)
        return result

    def save(self, tensors: Sequence[Tensor]) -> None:
        """What is about to be written."""
        with _disable_current_modes():
            # No alias of them: ours notice another holder of their state, and lay it out anew.
            self._before += [(t, t.detach().clone()) for t in tensors]

    def add(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self._calls.append((func, args, kwargs, result))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, captured in self._calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(captured), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("called a synchronizing operation")
        return func(*args, **(kwargs or {}))


class Recording(Host):
    """A device whose graphs are recorded operators."""

    sides = 0

    def __init__(self) -> None:
        self.pools: list[Any] = []  # of its captures

    def pool(self) -> Any:
        return "a pool"

    def no_waiting(self) -> Any:
        return NoWaiting()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.sides += 1
        yield

    def capture(self, step: Any, pool: Any = None) -> Any:
        self.captures += 1
        self.pools.append(pool)
        recorder = Recorder()
        with recorder:
            step()
        return recorder.replay


def recorded_backend() -> doors.Backend:
    """The emulated kernels, which pass by torch's operators, for a Recorder to see."""
    kernels = backend()
    count = kernels.advance
    assert count is not None

    def tensors(deferred: DeviceCounters | None) -> list[Tensor]:
        found = [getattr(deferred, f.name) for f in fields(deferred)] if deferred else []
        return [t for t in tree_leaves(found) if isinstance(t, Tensor)]

    def call(params: Any, grads: Any, table: Table, counters: Any = None, clip: Any = None) -> Any:
        take, *arguments = kernels.call(params, grads, table, counters, clip)

        def step() -> None:
            recorder = Recorder.recording
            if recorder is not None:
                recorder.save([*params, *table.state, *tensors(counters)])
                with _disable_current_modes():  # a launch takes the coefficients along
                    rows, samplings = table.rows.clone(), table.samplings.clone()
                    ages = table.ages.clone()
                launched = replace(table, rows=rows, samplings=samplings, ages=ages, views=None)
                again, *args = kernels.call(params, list(grads), launched, counters, clip)
                recorder.add(again, tuple(args), {}, None)
            take(*arguments)

        return (step,)

    def advance(deferred: DeviceCounters) -> None:
        recorder = Recorder.recording
        if recorder is not None:
            recorder.save(tensors(deferred))
            recorder.add(count, (deferred,), {}, None)
        count(deferred)

    def sum_squares(grads: list[Tensor], sums: Tensor) -> None:
        recorder = Recorder.recording
        if recorder is not None:
            recorder.save([sums])
            recorder.add(kernels.sum_squares, (list(grads), sums), {}, None)
        kernels.sum_squares(grads, sums)

    return kernels._replace(call=call, advance=advance, sum_squares=sum_squares)
