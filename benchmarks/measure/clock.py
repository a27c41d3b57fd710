"""What timing asks of a device, and what the CPU and CUDA answer. Tests' GPU is the CPU again."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import cached_property
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

import rbwa_fused
from benchmarks.measure import machine
from benchmarks.measure.machine import version_of, words

FASTEST_CLOCK = 2.1e9  # Hz; above what multiprocessors reach, so that a spin is never too short
LONGEST_SPIN = 0.05  # seconds
COLD_BYTES = 128 * 2**20  # written between steps, or twice the L2 if that is more

Step = Callable[[], object]


class Clock(Protocol):
    """A queue of work on a device, and marks in it.

    Attributes:
        device: where the tensors are.
    """

    device: torch.device

    def mark(self) -> Any:
        """A mark in the queue, for `seconds`."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks that the device has passed."""

    def synchronize(self) -> None:
        """Waits until the queue is empty."""

    def peak_bytes(self) -> int:
        """The most memory that this process had so far."""

    def description(self) -> dict[str, str | int | float]:
        """What stands above the tables and in the JSON file."""


class Cpu:
    """The CPU, which has done what it was given, and the host's clock."""

    device = torch.device("cpu")

    def mark(self) -> float:
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def description(self) -> dict[str, str | int | float]:
        return machine.description(torch.get_num_threads())


class Cuda:
    """The current CUDA device and its current stream: beside a clock's methods what a GPU has."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._facts = torch.cuda.get_device_properties(self.device)
        self._side = torch.cuda.Stream()

    @cached_property
    def _cold(self) -> torch.Tensor:
        size = max(COLD_BYTES, 2 * self._facts.L2_cache_size)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def spin(self, seconds: float) -> None:
        """Keeps the device busy for at least so long, so that the host can queue work ahead."""
        if seconds > 0:
            torch.cuda._sleep(int(min(seconds, LONGEST_SPIN) * FASTEST_CLOCK))

    def nothing(self) -> None:
        """Queues a kernel that does nothing."""
        torch.cuda._sleep(0)

    def evict(self) -> None:
        """Writes more memory than the caches hold."""
        self._cold.zero_()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A context in which whatever waits for the device raises RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context whose work goes to a side stream, behind what is queued and before the rest."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)

    def pool(self) -> Any:
        """Memory for several captures, whose replays come one after another, in any order."""
        return torch.cuda.graph_pool_handle()

    def capture(self, step: Step, pool: Any = None) -> Step:
        """A function that replays a step, which is recorded and not taken; without a `pool` it
        gets memory of its own.

        Raises:
            RuntimeError: for a step that cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        replay: Step = graph.replay
        return replay

    def launches(self, step: Step) -> int | None:
        """Kernels that a step runs; None where nobody counts them."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            self.synchronize()
        with TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(trace))
            return kernels(trace.read_text())

    def free_bytes(self) -> int:
        """Memory that can be allocated."""
        self.release()
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        """Gives back the memory of what nobody refers to any more."""
        gc.collect()
        torch.cuda.empty_cache()

    def description(self) -> dict[str, str | int | float]:
        facts = self._facts
        return {
            "gpu": facts.name,
            "multiprocessors": facts.multi_processor_count,
            "compute capability": f"{facts.major}.{facts.minor}",
            "memory GB": round(facts.total_memory / 1e9, 1),
            "L2 MB": round(facts.L2_cache_size / 1e6, 1),
            "driver": driver(),
            "cuda": str(torch.version.cuda),
            "date": date.today().isoformat(),
            "python": python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton") or "none",
            "rbwa_fused": rbwa_fused.__version__,
        }

    def slug(self) -> str:
        """Its name in a form that file names take."""
        return words(self._facts.name)


def kernels(trace: str) -> int | None:
    """Kernels in a profiler's trace; None if it has none, which is a profiler that sees none."""
    events = json.loads(trace)["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events) or None


def driver() -> str:
    """The driver's version as nvidia-smi reads it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = printed.stdout.split()
    return lines[0] if lines else "unknown"
