"""Who watches a step: hooks, the profiler, torch.compile. None of them changes a bit of it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import same_bits
from rules import ALGORITHMS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import rbwa_fused as rf

KINDS = {name: partial(rule.made, average=rf.ema(0.5)) for name, rule in ALGORITHMS.items()}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def train(net: nn.Module, opt: Any, x: Tensor) -> Tensor:
    opt.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    opt.step()
    return loss.detach()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach() for p in net.parameters()]


def unwatched(kind: str, steps: int) -> list[Tensor]:
    net = network()
    opt = KINDS[kind](net.parameters())
    for step in range(steps):
        train(net, opt, batch(step))
    return weights(net)


# ---- hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_in_torchs_order_until_they_are_removed(kind: str) -> None:
    net, seen = network(), []

    def note(what: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((what, type(opt).__name__, args))

    opt = KINDS[kind](net.parameters())
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    handles = [
        register_optimizer_step_post_hook(note("global after")),
        register_optimizer_step_pre_hook(note("global before")),
    ]
    for one in (opt, other):
        handles.append(one.register_step_post_hook(note("after")))
        handles.append(one.register_step_pre_hook(note("before")))
    order = ["global before", "before", "after", "global after"]
    for step, one in enumerate((opt, other, opt)):
        if one is opt:
            train(net, opt, batch(step // 2))
        else:
            other.step()
        assert seen == [(what, type(one).__name__, (one,)) for what in order]
        seen.clear()
    for handle in handles:
        handle.remove()
    train(net, opt, batch(2))
    other.step()
    assert seen == []
    same_bits(weights(net), unwatched(kind, 3))


def test_a_hook_sees_the_closure_and_may_exchange_it() -> None:
    net = network()
    opt = rf.FusedSGD(net.parameters(), lr=0.1)
    closures = []

    def exchange(opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closures.append(args[1])
        return (args[0], lambda: "mine"), kwargs

    handle = opt.register_step_pre_hook(exchange)
    assert opt.step(len) == "mine" and closures == [len]
    handle.remove()
    opt.register_step_pre_hook(lambda opt, args, kwargs: "nothing of use")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        opt.step()


# ---- the profiler ------------------------------------------------------------------------------


class Descendant(rf.FusedSGD):
    """A user's class: a profile shows it by its own name."""


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("cls", [*{rule.cls: 0 for rule in ALGORITHMS.values()}, Descendant])
def test_a_profile_names_each_step_and_its_operator_once(cls: Any, pickled: bool) -> None:
    net = network()
    opt = cls(net.parameters(), lr=0.1)
    train(net, opt, batch(0))
    if pickled:
        net, opt = pickle.loads(pickle.dumps((net, opt)))
    with torch.profiler.profile() as profile:
        for step in range(1, 4):
            train(net, opt, batch(step))
    counts = Counter(event.name for event in profile.events())
    name = cls.__name__
    assert counts[f"Optimizer.step#{name}.step"] == 3
    assert counts[f"Optimizer.zero_grad#{name}.zero_grad"] == 3
    assert counts["rbwa_fused::step_"] == 3
    assert not [name for name in counts if name.startswith("Optimizer.step#FusedOptimizer")]
    alone = network()
    again = cls(alone.parameters(), lr=0.1)
    for step in range(4):
        train(alone, again, batch(step))
    same_bits(weights(net), weights(alone))


def test_a_memory_profile_finds_parameters_gradients_and_state() -> None:
    net = network()
    opt = rf.FusedSGD(net.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.5))
    train(net, opt, batch(0))
    with torch.profiler.profile(with_stack=True, profile_memory=True, record_shapes=True) as p:
        train(net, opt, batch(1))
    nodes = list(p.profiler.kineto_results.experimental_event_tree())
    found: list[Any] = []
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        optimizer = getattr(node.extra_fields, "optimizer", None)
        if optimizer is not None:
            found.append(optimizer)
    assert len(found) == 1
    live = {p.data_ptr(): p for p in net.parameters()}
    assert {param.storage_data_ptr for param, _, _ in found[0].parameters} == set(live)
    for param, grad, state in found[0].parameters:
        p = live[param.storage_data_ptr]
        assert grad.storage_data_ptr == p.grad.data_ptr()
        expected = {name: value.data_ptr() for name, value in opt.state[p].items()}
        assert {name: value.storage_data_ptr for name, value in state} == expected


# ---- torch.compile -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_inside_a_compiled_function_is_one_graph_break(kind: str) -> None:
    net = network()
    opt = KINDS[kind](net.parameters())
    train(net, opt, batch(0))

    def around(x: Tensor) -> Tensor:
        y = x.sin()
        opt.step()
        return y.cos()

    explained = torch._dynamo.explain(around)(batch(1))
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    calls = [node.target for graph in explained.graphs for node in graph.graph.nodes]
    assert [target for target in calls if target in ("sin", "cos")] == ["sin", "cos"]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_training_step_is_compiled_once_and_follows_its_scheduler(
    kind: str, tensor_lr: bool
) -> None:
    ends, compiled = [], CompileCounter()
    for function in (train, torch.compile(train, backend=compiled)):
        net = network()
        opt = KINDS[kind](net.parameters())
        if tensor_lr:
            opt.param_groups[0]["lr"] = torch.tensor(0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        counts = []
        for step in range(4):
            function(net, opt, batch(step))
            scheduler.step()
            counts.append(compiled.frame_count)
        ends.append(weights(net))
    same_bits(*ends)
    assert counts == counts[:1] * 4 and counts[0] > 0


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_run_builds_its_optimizer_and_sees_gradients_come_and_go() -> None:
    def run() -> list[Any]:
        net = network()
        opt = rf.FusedSGD(net.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.5))
        counts = []
        for step in range(6):
            opt.zero_grad()
            if step != 3:  # a step without gradients is none
                net(batch(step)).square().mean().backward()
            opt.step()
            counts.append(opt.n_averaged)
        opt.load_state_dict(opt.state_dict())
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        with opt.averaged():
            shown = [p.detach().clone() for p in net.parameters()]
        return [weights(net), counts, shown]

    eager = run()
    assert eager[1] == [1, 2, 3, 3, 4, 5]
    same_bits(torch.compile(run, backend="eager")(), eager)


def test_a_compiled_evaluation_compiles_nothing_for_each_parameter() -> None:
    net = network()
    opt = rf.FusedSGD(net.parameters(), lr=0.1, average=rf.ema(0.5))
    for i in range(3):
        net(batch(i)).square().mean().backward()
        opt.step()
    before = weights(net)
    nodes: list[str] = []

    def noted(graph: Any, inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        with opt.averaged():
            return net(x)

    expected = evaluate(batch(0))
    torch._dynamo.reset()
    same_bits([torch.compile(evaluate, backend=noted)(batch(0))], [expected])
    same_bits(weights(net), before)
    assert not [node for node in nodes if "copy_" in node or "size" in node]


def test_a_closure_in_a_compiled_function_returns_its_loss() -> None:
    ends = []
    for compiling in (False, True):
        net = network()
        opt = rf.FusedSGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(x: Tensor, net: Any = net, opt: Any = opt) -> Any:
            def closure() -> Tensor:
                opt.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                return loss.detach()

            return opt.step(closure)

        function = torch.compile(step, backend="eager") if compiling else step
        losses = [function(batch(i)) for i in range(3)]
        ends.append([losses, weights(net)])
    same_bits(*ends)


def test_a_whole_graph_is_refused_by_name() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = rf.FusedSGD([p], lr=0.5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"FusedOptimizer\._step"):
        torch.compile(lambda: opt.step(), backend="eager", fullgraph=True)()
    assert p.tolist() == [1.0] * 3
    opt.step()
    assert p.tolist() == [0.5] * 3
