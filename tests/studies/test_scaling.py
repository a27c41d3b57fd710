"""studies/scaling/README.md: its figures, the bytes it counts, and its strategies."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")

import rbwa_fused as rf
from studies.scaling import __main__ as program
from studies.scaling import collectives as on_paper
from studies.scaling import document, predicted
from studies.scaling.strategies import (
    BFLOAT16,
    FLOAT32,
    MASTERS,
    Cost,
    Precision,
    Training,
    ddp,
    every_k,
    fewest,
    hidden_from,
    hybrid,
    pull_bytes,
    replicas,
    sharded,
    strategies,
    zero1,
)
from studies.scaling.tables import GPUS, H100, H200, LARGE, MANY, NETWORKS, SLOW, SMALL

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "studies" / "scaling" / "README.md"
TEXT = DOCUMENT.read_text()


# ---- the document ------------------------------------------------------------------------------


def measured_tables() -> dict[str, str]:
    (target,) = re.findall(r"\]\((results/\S+-scaling\.json)\)", TEXT)
    return predicted.tables(json.loads((DOCUMENT.parent / target).read_text()))


@pytest.mark.parametrize("name", document.TABLES)
def test_a_quoted_table_is_what_the_formulas_give(name: str) -> None:
    assert document.quoted(TEXT, name) == document.TABLES[name]()


def test_quoted_measurements_are_those_of_the_committed_file() -> None:
    for name, table in measured_tables().items():
        assert document.quoted(TEXT, name) == table, name


def test_no_other_figure_stands_in_the_document() -> None:
    names = re.findall(r"<!-- (\S+) -->", TEXT)
    assert sorted(names) == sorted([*document.TABLES, *measured_tables()])
    prose = TEXT
    for name in names:
        prose = prose.replace(document.quoted(TEXT, name), "").replace(f"<!-- {name} -->", "")
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`|    python .*", "", prose)
    prose = re.sub(
        r"FSDP2|ResNet-18|ZeRO-[13]|H200|bfloat16|bf16|[Ff]loat32|\(N.1\)|2·⌈|2005|2009", "", prose
    )
    prose = " ".join(prose.split())
    bytes_a_step = f"{FLOAT32.step() + int(FLOAT32.sampled())} to {FLOAT32.step()}"
    for stated in (
        f"8B on {MANY} GPUs",
        f"70B on {MANY} GPUs",
        f"{H200.memory / 1e9:.0f} GB",
        f"{SMALL.tokens:,} tokens",
        f"{pull_bytes(SMALL)} bytes a weight",
        f"{bytes_a_step} for the EMA",
        "k = 1 ",
        "decay 0.999 ",
        "whole 70B",
        "of 8B ",
    ):
        assert stated in prose, stated
        prose = prose.replace(stated, "")
    assert re.findall(r".{0,20}\d.{0,20}", prose) == []


def test_update_replaces_a_table_and_nothing_else() -> None:
    text = "a\n\n<!-- x -->\nold\nold\n\nb\n\n<!-- y -->\n\nc\n"
    once = document.updated(text, {"x": "new", "y": "1"})
    assert once == "a\n\n<!-- x -->\nnew\n\nb\n\n<!-- y -->\n1\n\nc\n"
    assert document.updated(once, {"x": "new", "y": "1"}) == once
    with pytest.raises(ValueError, match="no table z"):
        document.updated(text, {"z": ""})


def test_the_command_prints_the_tables_and_draws_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([])
    printed = capsys.readouterr().out
    assert all(
        document.quoted(printed, name) == document.quoted(TEXT, name) for name in document.TABLES
    )
    pytest.importorskip("matplotlib")
    program.main(["--picture", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


# ---- bytes of memory ---------------------------------------------------------------------------

PRECISIONS = {
    "float32": (FLOAT32, torch.float32, False),
    "bfloat16": (BFLOAT16, torch.bfloat16, False),
    "masters": (MASTERS, torch.bfloat16, True),
}


def stepped(name: str, average: Any) -> tuple[rf.FusedSGD, torch.nn.Parameter]:
    _, dtype, masters = PRECISIONS[name]
    p = torch.nn.Parameter(torch.randn(64).to(dtype))
    opt = rf.FusedSGD([p], lr=0.1, momentum=0.9, average=average, master_weights=masters)
    p.grad = torch.randn(64).to(dtype)
    opt.step()
    return opt, p


def held(opt: rf.FusedSGD, p: torch.nn.Parameter) -> dict[str, int]:
    assert p.grad is not None
    streams = {name: t.element_size() for name, t in opt.state[p].items()}
    return {"theta": p.element_size(), "g": p.grad.element_size(), **streams}


@pytest.mark.parametrize("name", PRECISIONS)
def test_bytes_are_those_of_the_optimizers_own_state(name: str) -> None:
    precision = PRECISIONS[name][0]
    without, with_ema = (held(*stepped(name, average)) for average in (None, rf.ema(0.9)))
    assert precision.held(averaged=False) == sum(without.values())
    assert precision.held(averaged=True) == sum(with_ema.values())
    assert precision.step() == 2 * sum(without.values()) - without["g"]
    assert precision.sampled() == 2 * with_ema["average"]
    rbwa = held(*stepped(name, rf.rbwa(10, start_epoch=0)))
    assert sum(rbwa.values()) - sum(without.values()) == (4 if name == "bfloat16" else 0)


class Moved(TorchDispatchMode):
    """Counts bytes that copies read and write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.total += args[-1].nbytes + result.nbytes
        return result


@pytest.mark.parametrize("name", PRECISIONS)
def test_bytes_of_averaged_are_those_of_its_copies(name: str) -> None:
    opt, p = stepped(name, rf.ema(0.9))
    with Moved() as moved, opt.averaged():
        pass
    assert moved.total == PRECISIONS[name][0].swapped * p.numel()


# ---- the strategies ----------------------------------------------------------------------------

EMA = replace(SMALL, averaged=True)


@pytest.mark.parametrize("name", strategies(8, 16))
def test_one_gpu_sends_nothing_and_every_strategy_is_the_same(name: str) -> None:
    cost = strategies(8, 16)[name](H200, EMA, 1)
    assert cost == ddp(H200, EMA, 1)
    assert cost.collectives == 0
    alone = cost.compute + cost.step + cost.average
    assert (cost.seconds, cost.one_by_one) == pytest.approx((alone, alone))
    assert cost.step == pytest.approx(22 * 8e9 / (0.9 * 4.8e12))
    assert cost.average == pytest.approx(8 * 8e9 / (0.9 * 4.8e12))
    assert cost.held == 16 * 8e9


@pytest.mark.parametrize("n", GPUS[1:])
@pytest.mark.parametrize("machine", NETWORKS.values(), ids=NETWORKS)
def test_strategies_fit_together(machine: Any, n: int) -> None:
    whole, shard, one = (s(machine, EMA, n) for s in (ddp, sharded, zero1))
    assert shard.average * n == pytest.approx(whole.average)
    assert shard.step == one.step
    assert 2 * one.during_backward == pytest.approx(whole.during_backward)
    assert shard.during_backward == pytest.approx(2 * shard.during_forward)
    for cost in (strategy(machine, EMA, n) for strategy in strategies(8, 16).values()):
        alone = cost.compute + cost.step + cost.average
        assert alone + cost.after <= cost.seconds <= cost.one_by_one * (1 + 1e-12)
        assert whole.held >= cost.held >= shard.held
    assert hybrid(machine, EMA, n, group=n).held == shard.held
    if n == 8:
        assert hybrid(machine, EMA, n, group=8) == shard == replicas(machine, EMA, n, k=4, group=8)


def test_memory_is_shared_as_each_strategy_says() -> None:
    layers = 6 * 8e9 / 32  # two layers' weights and one layer's gradients, two bytes each
    for n in (8, 64):
        assert zero1(H200, EMA, n).held == pytest.approx((4 + 12 / n) * 8e9)
        assert sharded(H200, EMA, n).held == pytest.approx(16 / n * 8e9 + layers)
        for strategy in (hybrid, replicas):
            held = strategies(8, 16)[strategy.__name__](H200, EMA, n).held
            assert held == pytest.approx(16 / 8 * 8e9 + layers)
        assert every_k(H200, EMA, n, k=16).held == ddp(H200, EMA, n).held == 16 * 8e9


def test_what_crosses_a_slow_network_is_each_strategys_share() -> None:
    seconds_a_byte = 63 / 64 / (0.8 * 12.5e9 / 8)  # between 64 nodes
    shard = 8e9 / 8
    gathered = 2 * shard * seconds_a_byte
    averaged = 2 * 4 * shard * seconds_a_byte
    for cost, during, after in (
        (ddp(SLOW, SMALL, MANY), 2 * gathered, 0.0),
        (zero1(SLOW, SMALL, MANY), gathered, gathered),
        (sharded(SLOW, SMALL, MANY), 3 * gathered, 0.0),
        (hybrid(SLOW, SMALL, MANY, group=8), 2 * gathered, 0.0),
        (every_k(SLOW, SMALL, MANY, k=1), 0.0, averaged),
        (replicas(SLOW, SMALL, MANY, k=1, group=8), 0.0, averaged),
    ):
        own = cost.during_forward + cost.during_backward
        assert during <= own < during + 0.3  # what is sent within nodes, latencies
        assert after <= cost.after < after + 0.3


def test_a_longer_period_divides_what_is_sent() -> None:
    for strategy in (every_k, replicas):
        group = {"group": 8} if strategy is replicas else {}
        often, rarely = (strategy(SLOW, SMALL, 64, k=k, **group) for k in (1, 16))  # type: ignore[operator]
        assert often.after > 0
        assert rarely.after == pytest.approx(often.after / 16)
        assert replace(often, after=0) == replace(rarely, after=0)


def test_a_hybrid_that_outgrows_its_node_shares_the_network_with_its_groups() -> None:
    inside, apart = sharded(SLOW, LARGE, 16), hybrid(SLOW, LARGE, 64, group=16)
    shard = MASTERS.gradient * LARGE.parameters / 16
    between = LARGE.layers * on_paper.all_reduce(4, shard / LARGE.layers, SLOW.levels.outer)
    assert apart.during_backward == pytest.approx(inside.during_backward + between)
    node, own = hybrid(SLOW, LARGE, 64, group=8), sharded(SLOW, LARGE, 8).during_backward
    shard = MASTERS.gradient * LARGE.parameters / 8
    between = LARGE.layers * on_paper.all_reduce(8, shard / LARGE.layers, SLOW.levels.outer)
    assert node.during_backward == max(own, between) == between


@pytest.mark.parametrize(("averaged", "count"), [(False, 16), (True, 24)])
def test_the_fewest_gpus_are_whole_nodes_with_room(averaged: bool, count: int) -> None:
    t = replace(LARGE, averaged=averaged)
    needed = (16 if averaged else 12) * 70e9 / (80e9 - 16e9 - 6 * 70e9 / 80)
    assert count == 8 * math.ceil(needed / 8) == fewest(sharded, H100, t)
    assert sharded(H100, t, count).fits(H100) and not sharded(H100, t, count - 8).fits(H100)
    assert fewest(ddp, H100, t) is None


@pytest.mark.parametrize("n", GPUS[1:])
def test_from_the_tokens_said_collectives_hide_and_not_before(n: int) -> None:
    tokens = hidden_from(sharded, H200, SMALL, n)

    def hides(count: int) -> bool:
        cost: Cost = sharded(H200, replace(SMALL, tokens=count), n)
        return cost.seconds == pytest.approx(cost.compute + cost.step + cost.average, rel=1e-12)

    assert hides(tokens) and not hides(tokens - 1)


def test_float32_weights_are_sent_in_full() -> None:
    both: list[tuple[Precision, Training]] = [
        (p, replace(SMALL, precision=p)) for p in (MASTERS, FLOAT32)
    ]
    half, full = (sharded(SLOW, t, MANY).during_forward for _, t in both)
    assert 1.99 < full / half < 2.0
