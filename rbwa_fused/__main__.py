"""``python -m rbwa_fused``: what a bug report needs, and a check of each backend."""

from __future__ import annotations

import platform
import sys

import torch
from torch import nn

import rbwa_fused as rf
from rbwa_fused import ops


def facts() -> dict[str, str]:
    """Versions and what was compiled, in the order in which they are printed."""
    built = ops._C is not None
    return {
        "rbwa_fused": rf.__version__,
        "torch": f"{torch.__version__} (built with CUDA {torch.version.cuda})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "cpu kernels": f"built with {ops._C.COMPILER}" if built else ops.BUILD_HINT,
        "cpu instruction set": ops._C.cpu_capability() if built else "-",
        "direct call": "yes" if ops._direct else "no (every step goes through the dispatcher)",
    }


def disagreement(backend: str) -> float:
    """The largest difference between a backend and the reference in float64 after a few steps."""
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (1, 7, 5000)]
        opt = rf.FusedSGD(
            params, lr=0.1, momentum=0.9, weight_decay=0.01, average=rf.ema(0.9), backend=name
        )
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
        results.append([t for p in params for t in (p.detach(), *opt.state[p].values())])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or "unknown"


def main() -> int:
    """Prints the facts and checks each backend; the exit status is 0 if all agree."""
    for name, value in facts().items():
        print(f"{name:20} {value}")
    status = 0
    for backend in ops.BACKENDS:
        if backend == "reference":
            continue  # the yardstick
        try:
            difference = disagreement(backend)
        except RuntimeError as error:
            print(f"{'check ' + backend:20} not available: {error}")
            continue
        verdict = "ok" if difference == 0.0 else "WRONG"
        status |= difference != 0.0
        print(f"{'check ' + backend:20} {verdict}, differs from the reference by {difference:g}")
    return status


if __name__ == "__main__":
    sys.exit(main())
