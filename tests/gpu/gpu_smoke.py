"""Every compiled kernel on small tensors, against the reference on the CPU, bit for bit.

    python tests/gpu/gpu_smoke.py
    python tests/gpu/gpu_smoke.py --backend triton
    python tests/gpu/gpu_smoke.py --device cpu --backend cpu
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/gpu_smoke.py

Parameters have sizes around vectors, tails and several chunks, views off the alignment and layouts
of all kinds (cases.py); gradients come in other layouts, off the alignment, or not at all. On a GPU
capturable steps are captured and replayed, whatever the backend. Prints what differs or cannot be
run as soon as that is known and ends with status 1, or "ok" and how many graphs that were. Without
torch's caching of memory a sanitizer sees where each tensor ends, but nothing can be captured:
these steps are then taken one by one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from cases import DTYPES, gradients, params
from rules import KERNELS, Rule
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import reference

STEPS = 4
CHUNKS = 3 * 4096 + 5  # elements: several chunks and a tail
SCALE = 8.0  # a power of two, so that unscaling loses no bit
SKIPPED = (1, 3)  # steps under AMP, the very first among them
REPLAYS = 3
SEGMENTS = 500  # of 160 bytes with a param group each, where 32,688 fit
CPU = torch.device("cpu")

# "own" is the parameter's dtype, float32 what 16-bit parameters have without asking; the last two
# write back, one from a buffer, one (where it is wide enough) into the parameter itself.
AVERAGES = ("none", "own", "float32", "lookahead", "rbwa")
UNMASTERED = [name for name, rule in KERNELS.items() if not rule.master]
SCALED = list(zip(UNMASTERED, cycle(("rbwa", "own", "float32")), strict=False))


def policy(average: str, dtype: torch.dtype) -> rf.Average | None:
    """The policy of that name for parameters of a dtype."""
    return {
        "none": None,
        "own": rf.Average(rf.Ema(0.7), start=1, dtype=dtype),
        "float32": rf.mean(start=1),
        "lookahead": rf.lookahead(k=2, alpha=0.3),
        "rbwa": rf.rbwa(steps_per_epoch=2, start_epoch=1),
    }[average]


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its strides and at its offset in a storage of its size."""
    storage = tensor.untyped_storage()
    whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
    there = whole.to(device, copy=True)
    return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def tensors(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of every size and layout."""
    large = torch.linspace(-1, 1, CHUNKS, dtype=torch.float64).to(dtype)
    return [*params(dtype), nn.Parameter(large)]


def one_group_each(ps: list[nn.Parameter], **options: Any) -> rf.FusedSGD:
    """An optimizer with a param group, and a learning rate, for each parameter."""
    groups = [{"params": [p], "lr": 0.001 * (1 + i)} for i, p in enumerate(ps)]
    return rf.FusedSGD(groups, **options)


class Run:
    """One optimizer and its parameters: on the device under test, or the reference's."""

    def __init__(
        self,
        make: Callable[..., Any],
        options: dict[str, Any],
        drawn: Sequence[nn.Parameter],
        backend: str,
        device: torch.device,
    ) -> None:
        self.device = device
        self.params = [nn.Parameter(placed(p, device)) for p in drawn]
        self.opt = make(self.params, backend=backend, **options)

    def use_gradients(self, step: int, scale: float = 1.0, absent: bool = True) -> None:
        """Puts a step's gradients in place; one parameter has none, if `absent`."""
        drawn = gradients(self.params, step)
        for i, (p, g) in enumerate(zip(self.params, drawn, strict=True)):
            p.grad = None if absent and i == 2 * step else placed(g, self.device).mul_(scale)

    def results(self) -> dict[str, Tensor]:
        """Parameters, state and gradients, on the CPU."""
        named = {"samples": torch.tensor(self.opt.n_averaged)}
        for i, p in enumerate(self.params):
            named[f"parameter {i}"] = p.detach()
            if p.grad is not None:
                named[f"gradient {i}"] = p.grad
            held = self.opt.state.get(p, {})
            named |= {f"{key} {i}": t for key, t in held.items() if isinstance(t, Tensor)}
        return {name: tensor.cpu().clone() for name, tensor in named.items()}


def differences(ours: Run, reference: Run) -> list[str]:
    """Names of what is not the same; NaN never is."""
    a, b = ours.results(), reference.results()
    wrong = [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return sorted([*wrong, *(a.keys() ^ b.keys())])


class Smoke:
    """All checks of one backend; `wrong` collects a line for each that fails, which is printed at
    once, `done` counts the checks and `graphs` the captured steps."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend = backend
        self.device = device
        self.wrong: list[str] = []
        self.done = 0
        self.graphs = 0

    def report(self, line: str) -> None:
        self.wrong.append(line)
        print(f"WRONG: {line}", flush=True)

    def pair(
        self, rule: Rule, options: dict[str, Any], dtype: torch.dtype, **own: Any
    ) -> tuple[Run, Run]:
        """A run on the backend under test, with options of its own, and the reference's."""
        return (
            Run(rule.made, {**options, **own}, tensors(dtype), self.backend, self.device),
            Run(rule.made, options, tensors(dtype), "reference", CPU),
        )

    def compare(self, what: str, two: tuple[Run, Run]) -> None:
        wrong = differences(*two)
        if wrong:
            self.report(f"{what}: {len(wrong)} tensors differ, {', '.join(wrong[:4])}")

    def steps(self, dtype: torch.dtype, rule: str, average: str) -> None:
        """A few steps, then the averages in place and the weights back. Half of the runs leave the
        parameters where they are."""
        own = policy(average, KERNELS[rule].kept(dtype))
        two = self.pair(KERNELS[rule], {"average": own}, dtype, flatten=average != "own")
        for step in range(1, STEPS + 1):
            for run in two:
                run.use_gradients(step)
                run.opt.step()
        what = f"{dtype}, {rule}, {average}"
        self.compare(what, two)
        with two[0].opt.averaged(), two[1].opt.averaged():
            self.compare(f"{what}, inside averaged()", two)
        self.compare(f"{what}, after averaged()", two)

    def scaled(self, dtype: torch.dtype, rule: str, average: str) -> None:
        """What torch.amp.GradScaler does around a step, overflows included."""
        own = policy(average, KERNELS[rule].kept(dtype))
        two = self.pair(KERNELS[rule], {"average": own}, dtype)
        for step in range(1, STEPS + 1):
            skip = step in SKIPPED
            for run in two:
                run.use_gradients(step, SCALE)
                if skip:
                    run.params[-1].grad = torch.full_like(run.params[-1], torch.inf)
                run.opt.grad_scale = torch.tensor([SCALE], device=run.device)
                # A sum over devices: 2 skips as 1 does.
                run.opt.found_inf = torch.tensor([2.0 if skip else 0.0], device=run.device)
                run.opt.step()
                del run.opt.grad_scale, run.opt.found_inf
        self.compare(f"{dtype}, {rule}, {average}, AMP", two)

    def many(self) -> None:
        """More segments and param groups than fit into the arguments of one launch."""
        drawn = [nn.Parameter(torch.linspace(-1, 1, 3 + i % 7)) for i in range(SEGMENTS)]
        options = {"momentum": 0.9, "average": rf.ema(0.9)}
        two = (
            Run(one_group_each, options, drawn, self.backend, self.device),
            Run(one_group_each, options, drawn, "reference", CPU),
        )
        for step in range(1, 3):
            for run in two:
                run.use_gradients(step)
                run.opt.step()
        self.compare(f"{SEGMENTS} param groups", two)

    def capturable(self, dtype: torch.dtype, rule: str, average: str) -> None:
        """One step, again and again with other gradients and another learning rate."""
        own = policy(average, KERNELS[rule].kept(dtype))
        options = {"average": own, "lr": torch.tensor(0.1)}
        lr = torch.tensor(0.1, device=self.device)
        ours, reference = self.pair(KERNELS[rule], options, dtype, lr=lr, capturable=True)
        for run in (ours, reference):
            run.use_gradients(0, absent=False)
            run.opt.step()
        again = self.recorded(ours.opt.step)
        for step in range(1, REPLAYS + 1):
            reference.use_gradients(step, absent=False)
            for p, static in zip(reference.params, ours.params, strict=True):
                assert p.grad is not None and static.grad is not None
                static.grad.copy_(p.grad)
            for run in (ours, reference):
                run.opt.param_groups[0]["lr"].fill_(0.1 / step)
            again()
            reference.opt.step()
        self.compare(f"{dtype}, {rule}, {average}, capturable", (ours, reference))

    def replicas(self, dtype: torch.dtype, count: int) -> None:
        """Models pulled to their mean; more than the registers keep, too."""
        ours, theirs = (
            [[placed(p, device).mul_(k + 1) for p in tensors(dtype)] for k in range(count)]
            for device in (self.device, CPU)
        )
        for alpha in (0.3, 1.0):
            rf.pull_(ours, alpha)
            for replicas in zip(*theirs, strict=True):
                reference.pull_(replicas, alpha)
            pairs = zip(chain(*ours), chain(*theirs), strict=True)
            if not all(torch.equal(a.cpu(), b) for a, b in pairs):
                self.report(f"{dtype}, {count} replicas pulled by {alpha}")

    def recorded(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """A CUDA graph's replay of a step where it can be captured, else the step."""
        if self.device.type != "cuda" or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
            return step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self.graphs += 1
        return graph.replay

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What each check is about, and the check."""
        yield f"{SEGMENTS} param groups", self.many
        for dtype in DTYPES:
            for count in (2, 3, 6):
                yield f"{dtype}, {count} replicas", partial(self.replicas, dtype, count)
            for rule in KERNELS:
                for average in AVERAGES:
                    if not KERNELS[rule].takes(policy(average, KERNELS[rule].kept(dtype))):
                        continue
                    what = f"{dtype}, {rule}, {average}"
                    yield what, partial(self.steps, dtype, rule, average)
            for rule, average in SCALED:
                what = f"{dtype}, {rule}, {average}"
                if not KERNELS[rule].takes(policy(average, KERNELS[rule].kept(dtype))):
                    continue
                yield f"{what}, AMP", partial(self.scaled, dtype, rule, average)
                yield f"{what}, capturable", partial(self.capturable, dtype, rule, average)

    def all(self) -> list[str]:
        """Runs everything; the lines that say what is wrong. One that raises is wrong and stops no
        other, unless the device does nothing any more."""
        for what, check in self.checks():
            try:
                check()
            except Exception as error:  # of kernels, Triton's compiler, torch
                lines = str(error).strip().splitlines()
                self.report(f"{what}: {type(error).__name__}: {lines[0] if lines else ''}")
                if not self.answers():
                    self.report(f"the device answers no more after {self.done} checks")
                    break
            self.done += 1
        return self.wrong

    def answers(self) -> bool:
        """Whether the device still does what it is given."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all checks; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda", "triton"))
    args = parser.parse_args(argv)
    smoke = Smoke(args.backend, torch.device(args.device))
    try:
        wrong = smoke.all()
    except KeyboardInterrupt:  # of whoever has no more time
        print(f"interrupted after {smoke.done} checks, {len(smoke.wrong)} lines say WRONG")
        return 130
    ok = f"ok, {smoke.graphs} graphs captured" if smoke.graphs else "ok"
    print(f"{len(wrong)} lines say WRONG, of {smoke.done} checks" if wrong else ok)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
