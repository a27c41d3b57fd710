"""What timing asks of a GPU, and CUDA's answer. Tests answer with the CPU and the host's clock."""

from __future__ import annotations

import gc
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

import rbwa_fused
from benchmarks.machine import version_of, words

FASTEST_CLOCK = 2.1e9  # Hz; above what multiprocessors reach, so that a spin is never too short
LONGEST_SPIN = 0.05  # seconds
COLD_BYTES = 128 * 2**20  # written between steps, or twice the L2 if that is more

Step = Callable[[], object]


class Device(Protocol):
    """A queue of work on a device, marks in it, and what is beside it.

    Attributes:
        device: where the tensors are.
    """

    device: torch.device

    def mark(self) -> Any:
        """A mark in the queue, for `seconds`."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks that the device has passed."""

    def spin(self, seconds: float) -> None:
        """Keeps the device busy for at least so long, so that the host can queue work ahead."""

    def evict(self) -> None:
        """Writes more memory than the caches hold."""

    def synchronize(self) -> None:
        """Waits until the queue is empty."""

    def no_waiting(self) -> Any:
        """A context in which whatever waits for the device raises RuntimeError."""

    def capture(self, step: Step) -> Step:
        """A function that replays a step, which is recorded and not taken.

        Raises:
            RuntimeError: for a step that cannot be captured.
        """

    def launches(self, step: Step) -> int | None:
        """Kernels that a step runs; None where nobody counts them."""

    def free_bytes(self) -> int:
        """Memory that can be allocated."""

    def release(self) -> None:
        """Gives back the memory of what nobody refers to any more."""

    def description(self) -> dict[str, str | int | float]:
        """What stands above the tables and in the JSON file."""

    def slug(self) -> str:
        """Its name in a form that file names take."""


class Cuda:
    """The current CUDA device and its current stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._facts = torch.cuda.get_device_properties(self.device)
        cold = max(COLD_BYTES, 2 * self._facts.L2_cache_size)
        self._cold = torch.empty(cold, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def spin(self, seconds: float) -> None:
        if seconds > 0:
            torch.cuda._sleep(int(min(seconds, LONGEST_SPIN) * FASTEST_CLOCK))

    def evict(self) -> None:
        self._cold.zero_()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Step = graph.replay
        return replay

    def launches(self, step: Step) -> int | None:
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            self.synchronize()
        with TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(trace))
            return kernels(trace.read_text())

    def free_bytes(self) -> int:
        self.release()
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
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
