"""Prints what a bug report needs, and checks each kernel against the plain PyTorch reference."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import torch
from torch import nn

import rbwa_fused as rf
from rbwa_fused.command import Parser, run
from rbwa_fused.engine import backends

PROG = "python -m rbwa_fused"
STEPS = 5


def facts() -> dict[str, str]:
    """Versions and what was compiled, in the order in which they are printed."""
    cpu, cuda = backends._C, backends._C_cuda
    return {
        "rbwa_fused": rf.__version__,
        "torch": f"{torch.__version__} (built with CUDA {torch.version.cuda})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "cpu kernels": f"built with {cpu.COMPILER}" if cpu is not None else backends.CPU_MISSING,
        "cpu instruction set": cpu.cpu_capability() if cpu is not None else "-",
        "direct call": "yes" if hasattr(cpu, "step") else "no (all goes through the dispatcher)",
        "cuda kernels": (
            f"built with CUDA {cuda.TOOLKIT / 1000:.1f} for {cuda.ARCHITECTURES}"
            if cuda is not None
            else backends.CUDA_MISSING
        ),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def disagreement(backend: str, device: torch.device) -> float:
    """The largest difference between a backend and the reference in float64 after a few steps."""
    results = []
    for name, place in ((backend, device), ("reference", torch.device("cpu"))):
        generator = torch.Generator().manual_seed(0)

        def random(n: int, drawn: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(n, dtype=torch.float64, generator=drawn)

        params = [nn.Parameter(random(n).to(place)) for n in (1, 7, 5000)]
        opt = rf.FusedSGD(
            params, lr=0.1, momentum=0.9, weight_decay=0.01, average=rf.ema(0.9), backend=name
        )
        for _ in range(STEPS):
            for p in params:
                p.grad = random(p.numel()).to(place)
            opt.step()
        results.append([t.cpu() for p in params for t in (p.detach(), *opt.state[p].values())])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the facts and checks each backend.

    Returns:
        The exit status: 0 if a kernel was checked and all that were agree with the reference.
    """
    status = "Exit status 0: a kernel was checked, and all that were agree; 1: none was, or not."
    Parser(prog=PROG, description=__doc__, epilog=status).parse_args(argv)
    for name, value in facts().items():
        print(f"{name:20} {value}")
    verdicts = []
    for backend in backends.BACKENDS:
        if backend == "reference":
            continue  # the yardstick
        gpu = backend != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        why = backends.unavailable(backend, device)
        if why is not None:
            print(f"{'check ' + backend:20} not run: {why}")
            continue
        difference = disagreement(backend, device)
        verdict = "ok" if difference == 0.0 else "WRONG"
        verdicts.append(verdict)
        print(f"{'check ' + backend:20} {verdict}, differs from the reference by {difference:g}")
    return 0 if set(verdicts) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(run(PROG, main))
