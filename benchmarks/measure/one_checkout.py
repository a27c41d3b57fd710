"""One checkout's rows, for ``python -m benchmarks.checkouts``: run as a file, by the Python of that
checkout, which must find its own rbwa_fused. It imports nothing of this project but that.

Reads a JSON object a line: "shapes", "threads" and patterns of rows ("only") first, answered with a
digest of each row's weights after a few steps; then names of rows, each answered with the median
seconds of a step.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

TINY = [[8]] * 62  # a step of these is the host's time
FEW = 12  # steps before the first is timed, and whose weights are compared


def rows(shapes: Sequence[Sequence[int]]) -> dict[str, Callable[[], Callable[[], object]]]:
    """Names, and what makes each row's step."""
    import rbwa_fused as rf

    def params(of: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
        made = torch.Generator().manual_seed(0)
        both = [[torch.randn(*shape, generator=made) for shape in of] for _ in range(2)]
        weights = [torch.nn.Parameter(0.1 * w.to(dtype)) for w in both[0]]
        for p, g in zip(weights, both[1], strict=True):
            p.grad = 0.01 * g.to(dtype)
        return weights

    def one(
        of: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        groups: int = 1,
        scheduled: bool = False,
        cls: str = "FusedSGD",
        **options: Any,
    ) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            own = params(of, dtype)
            each = len(own) // groups
            parts = [{"params": own[i * each : (i + 1) * each]} for i in range(groups)]
            opt = getattr(rf, cls)(parts, lr=0.01, momentum=0.9, **options)
            steps = [0]

            def step() -> None:
                if scheduled:
                    steps[0] += 1
                    for group in opt.param_groups:
                        group["lr"] = 0.01 / (1 + 1e-6 * steps[0])
                opt.step()

            step.opt = opt  # type: ignore[attr-defined]
            return step

        return make

    ema, rbwa = rf.ema(0.999), rf.rbwa(steps_per_epoch=1, start_epoch=0)
    in_cache = [[4096]] * 16
    explicit: dict[str, Any] = {"cls": "RSGDM", "difference": "explicit"}
    found = {
        "host time: momentum": one(TINY),
        "host time: EMA": one(TINY, average=ema),
        "host time: 31 groups": one(TINY, groups=31),
        "host time: 31 groups, lr changes": one(TINY, groups=31, scheduled=True),
        "model: momentum": one(shapes),
        "model: EMA": one(shapes, average=ema),
        "model: RBWA": one(shapes, average=rbwa),
        "model: RSGDM": one(shapes, cls="RSGDM"),
        "model: explicit RSGDM and EMA": one(shapes, average=ema, **explicit),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found[f"in cache: {name}, momentum"] = one(in_cache, dtype)
        found[f"in cache: {name}, EMA"] = one(in_cache, dtype, average=ema)
        found[f"in cache: {name}, explicit RSGDM and EMA"] = one(
            in_cache, dtype, average=ema, **explicit
        )
    return found


def digest(opt: Any) -> str:
    """Of weights and state."""
    total = hashlib.sha1()
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state.get(p, {})
            for tensor in (p, *(state[k] for k in sorted(state) if state[k] is not None)):
                total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def timed(step: Callable[[], object], seconds: float = 0.05) -> float:
    """The median of as many steps as take so long."""
    taken: list[float] = []
    end = perf_counter() + seconds
    while not taken or perf_counter() < end:
        start = perf_counter()
        step()
        taken.append(perf_counter() - start)
    return median(taken)


def main() -> None:
    """Answers what is asked on stdin."""
    import rbwa_fused

    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(told["threads"])
    steps = {}
    digests = {}
    for name, make in rows(told["shapes"]).items():
        if not any(fnmatch(name, pattern) for pattern in told["only"]):
            continue
        steps[name] = step = make()
        for _ in range(FEW):
            step()
        digests[name] = digest(step.opt)  # type: ignore[attr-defined]
    where = str(Path(rbwa_fused.__file__ or "").parent.parent)
    print(json.dumps({"where": where, "rows": digests}), flush=True)
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(timed(steps[json.loads(line)])), flush=True)


if __name__ == "__main__":
    main()
