"""The answers of README.md and what they rest on, with the figures that the formulas give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from studies.scaling.strategies import (
    FLOAT32,
    GB,
    Machine,
    Strategy,
    Training,
    hidden_from,
    sharded,
    strategies,
)
from studies.scaling.tables import (
    FEW_TOKENS,
    GROUP,
    H200,
    LARGE,
    MANY,
    SLOW,
    SMALL,
    K,
    milliseconds,
)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table of words."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def answers() -> str:
    """What to use when."""
    found, longer, apart = strategies(GROUP, K), strategies(GROUP, 4 * K), strategies(2 * GROUP, K)
    few, with_ema = replace(SMALL, tokens=FEW_TOKENS), replace(LARGE, averaged=True)

    def ms(
        name: str, machine: Machine = H200, t: Training = SMALL, by: Mapping[str, Strategy] = found
    ) -> str:
        return milliseconds(by[name](machine, t, MANY).seconds)

    def pass_of(moved: float, shards: int) -> str:
        return milliseconds(H200.pass_over(moved * SMALL.parameters / shards))

    p = SMALL.precision
    alone = found["DDP"](H200, SMALL, 1).seconds
    enough = hidden_from(found["sharded"], H200, SMALL, MANY)
    rows = [
        [
            "fast network, several GPUs",
            "shards (FSDP2), any average, sampled every step in the shard",
            f"8B on {MANY} GPUs: {ms('sharded')} ms a step, DDP {ms('DDP')}, ZeRO-1 "
            f"{ms('ZeRO-1')}; an EMA adds {pass_of(p.sampled(), MANY)} ms and sends nothing",
        ],
        [
            f"the same, fewer than {enough:,} tokens a GPU and step",
            "hybrid: shards within a node, gradients all-reduced between nodes",
            f"{FEW_TOKENS:,} tokens: {ms('hybrid', t=few)} ms, shards over all "
            f"{ms('sharded', t=few)}; averaging weights every {K} steps instead gains little: "
            f"{ms('replicas', t=few)}",
        ],
        [
            "slow network between nodes",
            f"a sharded replica in each node, pulled together every {K} steps or more; if what "
            "is trained may change, see below",
            f"{ms('replicas', SLOW)} ms, every {4 * K} steps {ms('replicas', SLOW, by=longer)}; "
            f"hybrid {ms('hybrid', SLOW)}, shards over all {ms('sharded', SLOW)}",
        ],
        [
            "the model fits one GPU, no sharding wanted",
            f"DDP; on a slow network weights averaged every {K} steps",
            f"DDP {ms('DDP')} ms on the fast network; on the slow one {ms('DDP', SLOW)}, "
            f"averaging {ms(f'every {K}', SLOW)}",
        ],
        [
            "memory just too short for an average",
            "RBWA, which has no buffer, or more shards",
            f"70B fits {GROUP} GPUs of 141 GB with RBWA, {2 * GROUP} with an EMA; with the slow "
            f"network between nodes {ms('replicas', SLOW, LARGE)} and "
            f"{ms('replicas', SLOW, with_ema, apart)} ms",
        ],
        [
            "an EMA in a pass of its own (AveragedModel)",
            "fine in shards; fuse it where one GPU averages everything",
            f"8B on one GPU: {pass_of(p.sampled_apart, 1)} ms apart, "
            f"{pass_of(p.sampled(), 1)} fused, of a step of {milliseconds(alone)}; "
            f"1/{MANY} of it: {pass_of(p.sampled_apart, MANY)} and {pass_of(p.sampled(), MANY)}",
        ],
        [
            "evaluating averages that lie in shards",
            "`averaged()`: copies, reshard",
            f"8B in {MANY} shards: {pass_of(FLOAT32.swapped, MANY)} ms in and out, and what was "
            f"left gathered must be gathered again, at most "
            f"{milliseconds(sharded(H200, SMALL, MANY).during_forward)} ms",
        ],
    ]
    return text_table(["situation", "use", "why"], rows)


def assumptions() -> str:
    """Everything that is no arithmetic."""
    t = SMALL
    rows = [
        ["memory of a GPU", "80 GB, 141 GB", "H100 and H200 SXM, datasheets"],
        ["its bandwidth", "3.35 TB/s, 4.8 TB/s", "datasheets"],
        [
            "reached by a step",
            f"{H200.hbm_share:.0%}",
            "assumed: what copies reach on such GPUs",
        ],
        ["NVLink, one direction", f"{H200.nvlink / GB:.0f} GB/s", "datasheets (900 both ways)"],
        ["GPUs in a node", f"{H200.a_node}", "HGX boards"],
        ["network, fast", f"{H200.network / GB:.0f} GB/s a GPU", "400 Gb/s cards, one a GPU"],
        [
            "network, slow",
            f"{SLOW.network / GB:.2f} GB/s a GPU",
            "100 Gb/s card, one for eight GPUs",
        ],
        [
            "reached by a collective",
            f"{H200.link_share:.0%}",
            "NCCL's own model: 360 of 450 GB/s on Hopper",
        ],
        [
            "latency of a message",
            f"{H200.nvlink_latency * 1e6:.1f} µs in a node, "
            f"{H200.network_latency * 1e6:.0f} µs between",
            "NCCL's tuning table, ring, Simple",
        ],
        [
            "forward and backward",
            f"6 operations a parameter and token, {H200.flops_share:.0%} of "
            f"{H200.flops / 1e12:.0f} TFLOP/s",
            "datasheet (bf16, dense); the share is assumed",
        ],
        ["tokens of a GPU and step", f"{t.tokens:,} or {FEW_TOKENS:,}", "assumed"],
        [
            "memory for all else",
            f"{H200.reserve / GB:.0f} GB",
            "assumed: activations, buckets, allocator",
        ],
        ["layers gathered one by one", "32 (8B), 80 (70B)", "as Llama 3"],
        ["a bucket of DDP", "25 MiB", "torch's default"],
        [
            "averaged weights on the wire",
            f"{t.weight} bytes",
            "float32: a mean in bf16 would drop what masters keep",
        ],
    ]
    return text_table(["what", "value", "whence"], rows)
