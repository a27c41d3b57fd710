"""The tables of docs/scaling.md, each a function of the formulas alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import floor, log10

from benchmarks.report.markdown import NONE, table
from studies.scaling.collectives import (
    gather_anywhere,
    gather_by_levels,
    gather_through_all,
    sent,
    sent_between_nodes,
    tree_all_reduce,
)
from studies.scaling.strategies import (
    BFLOAT16,
    FLOAT32,
    GB,
    MASTERS,
    Cost,
    Machine,
    Strategy,
    Training,
    ddp,
    fewest,
    hidden_from,
    sharded,
    strategies,
    zero1,
)

H100 = Machine(memory=80 * GB, hbm=3.35e12, flops=989e12, nvlink=450 * GB, network=50 * GB)
H200 = replace(H100, memory=141 * GB, hbm=4.8e12)
SLOW = replace(H200, network=12.5 * GB / 8)  # one 100 Gb/s card for a node of eight
NETWORKS = {"400 Gb/s a GPU": H200, "100 Gb/s a node": SLOW}
SMALL = Training(parameters=8e9, layers=32, averaged=False)
LARGE = Training(parameters=70e9, layers=80, averaged=False)
MODELS = {"8B": SMALL, "70B": LARGE}
GPUS = (1, 8, 64, 512, 4096)
GROUP, K = 8, 16  # GPUs that hold one model; steps between averages of weights
KS = (1, 4, 16, 64, 256)
FEW_TOKENS = 1024
MANY = 512  # GPUs, where one number stands for many
PERIOD = 10  # of an average that is not sampled every step


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    ms = 1e3 * seconds
    if ms == 0:
        return "0"
    digits = max(0, 2 - floor(log10(ms))) if ms >= 0.01 else 4
    return f"{ms:,.{digits}f}"


def part_of(shards: int) -> str:
    """What one GPU has of a model."""
    return "all of it" if shards == 1 else f"1/{shards:,}"


def bytes_a_parameter() -> str:
    """What a step and its average read and write."""
    kinds = (FLOAT32, MASTERS, BFLOAT16)

    def row(name: str, of: Callable[..., float]) -> list[str]:
        return [name, *(f"{of(kind):g}" for kind in kinds)]

    rows = [
        row("SGD", lambda p: p.step(0)),
        row("SGD + momentum, RSGDM", lambda p: p.step()),
        ["RBWA, RBWA-E: more", "+0", "+0", f"+{BFLOAT16.sampled():g}"],
        row("EMA, SWA, every step: more", lambda p: p.sampled()),
        row(f"EMA, SWA, every {PERIOD} steps: more", lambda p: p.sampled(PERIOD)),
        row("an average by a pass of its own: more", lambda p: p.sampled_apart),
        row("copied back by one more pass: more", lambda p: p.copied_back),
        row("`averaged()`, in and out", lambda p: p.swapped),
        row("held, with momentum", lambda p: p.held(averaged=False)),
        row("held, with an EMA as well", lambda p: p.held(averaged=True)),
    ]
    return table(["bytes a parameter", "float32", "bf16, masters", "bf16"], rows)


def step_and_average() -> str:
    """Milliseconds on an H200, where everything is on every GPU and where each has its shard."""
    rows = []
    for name, t in MODELS.items():
        for shards in GPUS:
            own = t.parameters / shards
            p = t.precision
            moved = (p.step(), p.sampled(), p.sampled(PERIOD), 0, p.sampled_apart)
            step, *averages = (H200.pass_over(b * own) for b in moved)
            cells = [milliseconds(a) if a else "0" for a in averages]
            rows.append([f"{name}, {part_of(shards)}", milliseconds(step), *cells])
    header = ["ms", "step", "EMA", f"EMA / {PERIOD}", "RBWA", "EMA apart"]
    return table(header, rows)


def collectives() -> str:
    """An all-reduce of 8B gradients in bf16."""
    size = SMALL.precision.gradient * SMALL.parameters
    rows = []
    for n in GPUS[1:]:
        levels = H200.levels
        seconds = [
            2 * gather_through_all(n, size, levels),
            2 * gather_by_levels(n, size, levels, rings=True),
            2 * gather_by_levels(n, size, levels),
            tree_all_reduce(n, size, levels.outer if n > levels.a_node else levels.inner),
            2 * gather_anywhere(n, size, SLOW.levels),
        ]
        moved = [2 * sent(n, size), 2 * sent_between_nodes(n, size, levels)]
        rows.append(
            [f"{n:,}", *(f"{b / GB:.2f}" for b in moved), *(milliseconds(s) for s in seconds)]
        )
    header = ["GPUs", "GB sent", "out of the node", "rings through all", "by levels, rings"]
    return table([*header, "by levels, halving", "tree", "best on the slow network"], rows)


def room() -> str:
    """Fewest GPUs."""
    rows = []
    chosen: dict[str, Strategy] = {"DDP, every k": ddp, "ZeRO-1": zero1, "sharded": sharded}
    for name, strategy in chosen.items():
        for model, t in MODELS.items():
            cells = []
            for machine in (H100, H200):
                for averaged in (False, True):
                    count = fewest(strategy, machine, replace(t, averaged=averaged))
                    cells.append(NONE if count is None else f"{count}")
            rows.append([f"{name}, {model}", *cells])
    header = ["fewest GPUs", "80 GB, RBWA", "80 GB, EMA", "141 GB, RBWA", "141 GB, EMA"]
    return table(header, rows)


def times(name: str, tokens: int) -> str:
    """Milliseconds of a step on the fast and on the slow network; RBWA."""
    t = replace(MODELS[name], tokens=tokens)
    found = strategies(GROUP, K)
    rows = []
    for network, machine in NETWORKS.items():
        for n in GPUS if machine is H200 else GPUS[2:]:  # the others are in one node
            costs = [strategy(machine, t, n) for strategy in found.values()]
            cells = [milliseconds(c.seconds) if c.fits(machine) else NONE for c in costs]
            if any(cell != NONE for cell in cells):
                rows.append([f"{network}, {n:,}", *cells])
    return table([f"ms, {name}, {tokens:,} tokens", *found], rows)


def parts() -> str:
    """Where the time goes, 8B on many GPUs."""
    rows = []
    for network, machine in NETWORKS.items():
        for name, strategy in strategies(GROUP, K).items():
            c: Cost = strategy(machine, replace(SMALL, averaged=True), MANY)
            figures: Sequence[float] = (
                *(c.compute, c.step, c.average, c.during_forward, c.during_backward, c.after),
                *(c.seconds, c.one_by_one),
            )
            rows.append([f"{network}, {name}", *map(milliseconds, figures)])
    header = ["ms", "passes", "step", "EMA", "in forward", "in backward", "after"]
    return table([*header, "overlapped", "one by one"], rows)


def hidden() -> str:
    """Tokens from which collectives hide behind the passes."""
    rows = []
    found = strategies(GROUP, K)
    chosen = {name: found[name] for name in ("DDP", "ZeRO-1", "sharded", "hybrid")}
    for network, machine in NETWORKS.items():
        for n in GPUS[1:] if machine is H200 else GPUS[2:]:
            cells = [f"{hidden_from(s, machine, SMALL, n):,}" for s in chosen.values()]
            rows.append([f"{network}, {n:,}", *cells])
    return table(["tokens of a GPU and step", *chosen], rows)


def periods() -> str:
    """What a longer period gives, 8B replicas of a node each on many GPUs."""
    rows = []
    for network, machine in NETWORKS.items():
        for tokens in (SMALL.tokens, FEW_TOKENS):
            t = replace(SMALL, tokens=tokens)
            all_steps = strategies(GROUP, 1)["hybrid"](machine, t, MANY)
            pulled = [strategies(GROUP, k)["replicas"](machine, t, MANY) for k in KS]
            cells = [milliseconds(c.seconds) for c in (all_steps, *pulled)]
            rows.append([f"{network}, {tokens:,} tokens", *cells])
    header = ["ms", "hybrid", *(f"k = {k}" for k in KS)]
    return table(header, rows)


def buffer() -> str:
    """What an average's buffer costs where it makes a model outgrow its node: 70B on H200."""
    rows = []
    for network, machine in NETWORKS.items():
        for average, averaged, group in (("RBWA", False, GROUP), ("EMA", True, 2 * GROUP)):
            t = replace(LARGE, averaged=averaged)
            found = strategies(group, K)
            own = [found[name](machine, t, MANY) for name in ("hybrid", "replicas")]
            if not all(c.fits(machine) for c in own):
                raise ArithmeticError(f"{average} does not fit {group} GPUs")
            if found["hybrid"](machine, t, group // 2).fits(machine):
                raise ArithmeticError(f"{average} fits half of {group} GPUs")
            cells = [milliseconds(c.seconds) for c in own]
            rows.append([f"{network}, {average}", f"{group}", *cells])
    return table(["ms, 70B", "GPUs a model", "hybrid", "replicas"], rows)


def evaluation() -> str:
    """What `averaged()` costs: its copies, and weights that must be gathered once more."""
    rows = []
    for name, t in MODELS.items():
        for n in (GPUS[0], GPUS[1], MANY):
            own = t.parameters / n
            copies = [H200.pass_over(p.swapped * own) for p in (FLOAT32, MASTERS)]
            gathers = [
                sharded(machine, t, n).during_forward if n > 1 else 0.0
                for machine in NETWORKS.values()
            ]
            cells = [milliseconds(s) if s else "0" for s in (*copies, *gathers)]
            rows.append([f"{name}, {part_of(n)}", *cells])
    header = ["ms", "float32", "bf16, masters", "all-gather, fast", "all-gather, slow"]
    return table(header, rows)
