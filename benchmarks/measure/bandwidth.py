"""What a machine does without arithmetic: the copy's bandwidth, and a kernel that does nothing."""

from __future__ import annotations

import random
from statistics import median

import torch

from benchmarks.measure.clock import Cuda
from benchmarks.measure.timing import Samples, timed

HOST_BYTES = 2**28  # more than any cache holds
HOST_BUFFERS = 4  # where they lie matters: pairs are drawn
DEVICE_BYTES = 2**30
COPIES = 20
EMPTY_KERNELS = 50
EMPTY_LEAD = 0.005  # seconds, more than the host takes to queue them


def of_host(seed: int) -> float:
    """GB/s of `b.copy_(a)` with torch's threads: bytes read and written, median over pairs of
    buffers."""
    buffers = [torch.ones(HOST_BYTES // 4) for _ in range(HOST_BUFFERS)]
    samples = Samples()
    choose = random.Random(seed)
    for _ in range(COPIES):
        a, b = choose.sample(buffers, 2)
        samples.add(*timed(lambda a=a, b=b: b.copy_(a)))  # type: ignore[misc]
    return 2 * HOST_BYTES / median(samples.kept()) / 1e9


def of_device(device: Cuda, size: int = DEVICE_BYTES) -> float:
    """GB/s of a copy of `size` bytes on the device: bytes read and written, median."""
    source = torch.ones(size, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    target.copy_(source)
    marks = []
    for _ in range(COPIES):
        before = device.mark()
        target.copy_(source)
        marks.append((before, device.mark()))
    device.synchronize()
    return 2 * size / median(device.seconds(*pair) for pair in marks) / 1e9


def empty_ms(device: Cuda) -> float:
    """Milliseconds between two marks with an empty kernel between them: what a launch costs the
    device beside its work; median."""
    device.synchronize()
    device.spin(EMPTY_LEAD)
    marks = []
    for _ in range(EMPTY_KERNELS):
        before = device.mark()
        device.nothing()
        marks.append((before, device.mark()))
    device.synchronize()
    return 1e3 * median(device.seconds(*pair) for pair in marks)
