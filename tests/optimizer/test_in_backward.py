"""in_backward=True: the same bits as step() after backward, and no gradient that outlives it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import EPOCH, METHODS, STEPS, bits, build, feed, result, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rbwa_fused as rf
from rbwa_fused.engine.state import ParameterState

DTYPES = [torch.float32, torch.bfloat16]
WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "where they were": {"flatten": False},
    "reference": {"backend": "reference"},
    "masters": {"master_weights": True},
}


def backward(model: nn.Module, step: int) -> None:
    """A backward pass with the gradients that `feed` gives for a step."""
    feed(model, step)
    wanted = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()
    sum((p * g).sum() for p, g in wanted if g is not None).backward()


def train_in_backward(model: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        backward(model, step)
        assert all(p.grad is None for p in model.parameters())
        opt.step()


# ---- the same run ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_inside_the_backward_pass_has_the_bits_of_one_after_it(
    method: str, dtype: torch.dtype, way: str
) -> None:
    model, opt = build(method, dtype, **WAYS[way])
    train(model, opt, 1, STEPS)
    early_model, early = build(method, dtype, **WAYS[way], in_backward=True)
    train_in_backward(early_model, early, 1, STEPS)
    assert result(early) == result(opt)


class Net(nn.Module):
    """Convolution, BatchNorm, and one matrix that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.twice(self.twice(x).relu()))


def trained(in_backward: bool, steps: int = 6, **options: Any) -> tuple[Net, Any]:
    net = Net()
    opt = rf.FusedSGD(net.parameters(), 0.1, 0.9, in_backward=in_backward, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2)
    for step in range(steps):
        learn(net, opt, step)
        scheduler.step()
    return net, opt


def learn(net: nn.Module, opt: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 1, 6, 6, generator=generator)
    cross_entropy(net(x), torch.arange(5) % 3).backward()
    opt.step()
    opt.zero_grad()


def test_a_network_trains_as_without_it() -> None:
    (net, opt), (early_net, early) = trained(False), trained(True)
    assert result(early) == result(opt)
    for a, b in zip(net.state_dict().values(), early_net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_is_gone_before_the_next_one_is_computed() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    opt = rf.FusedSGD(net.parameters(), 0.1, in_backward=True)
    alive: list[int] = []

    def count(g: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in net.parameters()))

    for p in net.parameters():
        p.register_hook(count)
    before = [bits(p) for p in net.parameters()]
    net(torch.ones(2, 3)).sum().backward()
    assert len(alive) == 8 and max(alive) == 0
    assert all(p.grad is None for p in net.parameters())
    assert all(bits(p) != old for p, old in zip(net.parameters(), before, strict=True))
    opt.step()


def test_hooks_of_step_run_once_a_step_and_after_the_parameters_have_moved() -> None:
    net = Net()
    opt = rf.FusedSGD(net.parameters(), 0.1, in_backward=True)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    learn(net, opt, 0)
    learn(net, opt, 1)
    assert seen == ["before", "after"] * 2


def test_gradients_that_somebody_assigns_are_stepped_by_step() -> None:
    model, opt = build("ema")
    train(model, opt, 1, STEPS)
    early_model, early = build("ema", in_backward=True)
    train_in_backward(early_model, early, 1, 4)
    train(early_model, early, 5, 8)
    early.zero_grad()
    train_in_backward(early_model, early, 9, STEPS)
    assert result(early) == result(opt)


def test_a_parameter_unfrozen_later_is_stepped_and_then_hooked() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    opt = rf.FusedSGD([first, second], 0.25, in_backward=True)
    for step in range(3):
        (first * 1.0 + second * 1.0).sum().backward()
        assert first.grad is None
        assert (second.grad is None) == (step != 1)
        opt.step()
        opt.zero_grad()
        second.requires_grad_(True)
    assert first.tolist() == [0.25] * 2
    assert second.tolist() == [0.5] * 2


def test_parameters_that_share_memory_are_stepped_in_their_order() -> None:
    def run(in_backward: bool) -> list[str | None]:
        base = torch.linspace(1, 2, 20)
        params = [nn.Parameter(base[:12]), nn.Parameter(base[6:]), nn.Parameter(torch.ones(3))]
        opt = rf.FusedSGD(params, 0.1, 0.9, weight_decay=0.1, in_backward=in_backward)
        for _ in range(3):
            sum((p * p.detach()).sum() for p in params).backward()
            opt.step()
            opt.zero_grad()
        return [bits(base), bits(params[2])]

    assert run(True) == run(False)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gradient_assigned_midway_may_have_another_layout(backend: str) -> None:
    def run(in_backward: bool) -> list[Any]:
        first = nn.Parameter(torch.ones(3))
        second = nn.Parameter(torch.ones(2, 3).t(), requires_grad=False)
        opt = rf.FusedSGD([first, second], 0.1, backend=backend, in_backward=in_backward)
        (first * 2.0).sum().backward()
        second.grad = torch.arange(6.0).reshape(3, 2)
        opt.step()
        return [first.tolist(), second.tolist()]

    assert run(True) == run(False)


def test_a_parameter_that_is_not_written_keeps_its_version() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([first, second], 0.1, average=rf.ema(0.5), in_backward=True)
    versions = first._version, second._version
    first.sum().backward()
    opt.step()  # samples the second one where it is
    assert opt.n_averaged == 1
    assert first._version > versions[0] and second._version == versions[1]


def test_groups_that_somebody_edits_are_followed() -> None:
    def run(make: Any) -> list[Any]:
        first, second, third = (nn.Parameter(torch.ones(3) * k) for k in (1, 2, 3))
        opt = make([first, second])
        for step in range(4):
            if step == 1:
                opt.param_groups[0]["params"].append(third)
            if step == 2:
                del opt.param_groups[0]["params"][0]
            sum(p * p.detach() for p in (first, second, third)).sum().backward()
            opt.step()
            if step > 1 and isinstance(opt, rf.FusedSGD):
                assert first.grad is not None and not first._post_accumulate_grad_hooks
            first.grad = second.grad = third.grad = None
        return [p.tolist() for p in (first, second, third)]

    theirs = run(lambda params: torch.optim.SGD(params, 0.1, 0.9))
    assert run(lambda params: rf.FusedSGD(params, 0.1, 0.9, in_backward=True)) == theirs


def test_a_parameter_whose_memory_another_comes_to_share_waits_for_its_turn() -> None:
    def run(in_backward: bool) -> list[str | None]:
        base = torch.linspace(1, 2, 20)
        first, second = nn.Parameter(base[:12]), nn.Parameter(base[6:])
        opt = rf.FusedSGD([second], 0.1, 0.9, average=rf.ema(0.5, every=2), in_backward=in_backward)
        (second * second.detach()).sum().backward()
        opt.step()
        opt.zero_grad()
        opt.add_param_group({"params": [first]})
        for _ in range(3):
            sum((p * p.detach()).sum() for p in (first, second)).backward()
            opt.step()
            opt.zero_grad()
        return [bits(base), *(bits(opt.state[p]["average"]) for p in (first, second))]

    assert run(True) == run(False)


def test_a_converted_parameter_without_a_gradient_gets_its_master_in_the_same_step() -> None:
    def run(in_backward: bool) -> dict[str, Any]:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
        opt = rf.FusedSGD(params, 0.1, 0.9, master_weights=True, in_backward=in_backward)
        for step in range(3):
            sum((p * 1.5).sum() for p in params[step == 1 :]).backward()
            opt.step()
            opt.zero_grad()
            for p in params if step == 0 else ():
                p.data = p.data.bfloat16()
            if step == 1:
                assert "master_param" in opt.state[params[0]]
        return result(opt)

    assert run(True) == run(False)


def test_a_parameter_at_rest_is_not_looked_at_again_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moving, resting = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    opt = rf.FusedSGD([moving, resting], 0.1, 0.9, in_backward=True)
    looked_at, give = [], ParameterState.give
    monkeypatch.setattr(
        ParameterState,
        "give",
        lambda state, table, grads: looked_at.extend(table.params) or give(state, table, grads),
    )
    for _ in range(3):
        looked_at.clear()
        moving.sum().backward()
        opt.step()
    assert len(looked_at) == 1 and looked_at[0] is moving


def test_a_step_without_any_gradient_counts_nothing() -> None:
    model, opt = build("ema", in_backward=True)
    train_in_backward(model, opt, 1, EPOCH + 2)
    before = result(opt)
    opt.step()
    assert result(opt) == before


# ---- converted, copied, saved ------------------------------------------------------------------


def test_a_model_converted_between_steps_trains_on() -> None:
    def run(in_backward: bool) -> dict[str, Any]:
        model, opt = build("rsgdm ema", in_backward=in_backward)
        go = train_in_backward if in_backward else train
        go(model, opt, 1, 5)
        model.to(torch.bfloat16)
        go(model, opt, 6, 8)
        model.matrix.data = model.matrix.data.clone()
        go(model, opt, 9, STEPS)
        return result(opt)

    assert run(True) == run(False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_hooks_of_its_own(copied: Callable[[Any], Any]) -> None:
    model, opt = build("rswa", in_backward=True)
    train_in_backward(model, opt, 1, 5)
    other_model, other = copied((model, opt))
    train_in_backward(other_model, other, 6, STEPS)
    stopped = result(opt)
    assert stopped != result(other)
    train_in_backward(model, opt, 6, STEPS)
    assert result(opt) == result(other)


@pytest.mark.parametrize("method", ["rsgdm explicit", "ema", "rbwa"])
@pytest.mark.parametrize("early_first", [True, False])
def test_a_checkpoint_goes_both_ways(method: str, early_first: bool) -> None:
    model, opt = build(method)
    train(model, opt, 1, STEPS)
    first, saver = build(method, in_backward=early_first)
    (train_in_backward if early_first else train)(first, saver, 1, 7)
    second, loader = build(method, in_backward=not early_first)
    second.load_state_dict(first.state_dict())
    loader.load_state_dict(saver.state_dict())
    (train if early_first else train_in_backward)(second, loader, 8, STEPS)
    assert result(loader) == result(opt)


def test_an_added_group_is_hooked_too() -> None:
    model, opt = build("ema", in_backward=True)
    train_in_backward(model, opt, 1, 3)
    added = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [added], "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0})
    model.added = added
    train_in_backward(model, opt, 4, 4)
    assert added.tolist() != [1.0] * 3


def test_without_its_optimizer_a_parameter_keeps_its_gradient() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = rf.FusedSGD([p], 0.1, in_backward=True)
    del opt
    gc.collect()
    p.sum().backward()
    assert p.grad is not None and p.tolist() == [1.0, 1.0]
    assert not p._post_accumulate_grad_hooks


# ---- what it refuses ---------------------------------------------------------------------------


def test_a_second_backward_pass_before_step_is_refused() -> None:
    net, opt = trained(True, 1)
    net(torch.ones(2, 1, 6, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"second gradient of parameter .* cannot be accumul"):
        net(torch.ones(2, 1, 6, 6)).sum().backward()
    opt.step()  # ends the first one
    opt.zero_grad()
    learn(net, opt, 3)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("state_dict", lambda opt, net: opt.state_dict()),
        ("load_state_dict", lambda opt, net: opt.load_state_dict({})),
        ("averaged", lambda opt, net: opt.averaged()),
        ("averaged_state_dict", lambda opt, net: opt.averaged_state_dict(net)),
        ("add_param_group", lambda opt, net: opt.add_param_group({"params": []})),
        ("pickle or deepcopy", lambda opt, net: copy.deepcopy(opt)),
    ],
)
def test_midway_through_a_step_nothing_is_saved_or_changed(
    what: str, call: Callable[..., Any]
) -> None:
    net, opt = trained(True, 2, average=rf.ema(0.5))
    net(torch.ones(2, 1, 6, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=rf"{what}\(\) between a backward pass and the step"):
        call(opt, net)
    opt.step()
    assert opt.n_averaged == 3


def test_a_backward_pass_inside_averaged_is_refused_before_anything_moves() -> None:
    net, opt = trained(True, 2, average=rf.ema(0.5))
    before = result(opt)
    with opt.averaged(), pytest.raises(RuntimeError, match=r"backward\(\) inside averaged"):
        net(torch.ones(2, 1, 6, 6)).sum().backward()
    opt.zero_grad()
    assert result(opt) == before


def test_closures_scalers_and_graphs_are_refused() -> None:
    net, opt = trained(True, 1)
    with pytest.raises(RuntimeError, match="closure"):
        opt.step(lambda: net(torch.ones(2, 1, 6, 6)).sum())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(2, 1, 6, 6)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler with in_backward=True: .* still scaled"):
        scaler.step(opt)
    with pytest.raises(ValueError, match="capturable=True does not go with in_backward=True"):
        rf.FusedSGD(net.parameters(), in_backward=True, capturable=True)


def test_a_model_converted_midway_is_an_error() -> None:
    model, opt = build("ema", in_backward=True)
    train_in_backward(model, opt, 1, 7)
    feed(model, 8)
    gradient = model.matrix.grad
    model.zero_grad()
    (model.matrix * gradient).sum().backward()
    model.conv.data = model.conv.data.double()
    with pytest.raises(RuntimeError, match="converted or moved between a backward pass"):
        opt.step()
    opt.state_dict()  # the step is over, and the next one follows the conversion
    before = model.conv.detach().clone()
    train_in_backward(model, opt, 9, 10)
    assert not torch.equal(model.conv, before)


def test_a_parameter_with_hooks_of_two_optimizers_is_stepped_by_none_until_one_is_gone() -> None:
    net = Net()
    first = rf.RSGDM(net.named_parameters(), 0.3, in_backward=True)
    second = rf.FusedSGD(net.head.named_parameters(), 0.1, in_backward=True)
    before = [bits(p) for p in net.parameters()]
    for _ in range(2):
        match = r"'head.weight'.* twice: by this RSGDM and .* a FusedSGD with lr=0.1"
        with pytest.raises(RuntimeError, match=match):
            learn(net, first, 0)
        net.zero_grad()
    assert [bits(p) for p in net.parameters()] == before
    del second
    learn(net, first, 0)
    assert [bits(p) for p in net.parameters()] != before


def test_an_optimizer_made_again_takes_the_steps_alone() -> None:
    (_, opt), (net, early) = trained(False), trained(True)
    early.itself = early
    assert gc.isenabled()
    gc.disable()
    try:
        net.load_state_dict(Net().state_dict())
        early = rf.FusedSGD(net.parameters(), 0.1, 0.9, in_backward=True)
        scheduler = torch.optim.lr_scheduler.StepLR(early, 2)
        for step in range(6):
            learn(net, early, step)
            scheduler.step()
    finally:
        gc.enable()
    assert result(early) == result(opt)


def test_a_backward_pass_goes_on_while_another_thread_makes_an_optimizer() -> None:
    made = []

    def make() -> None:
        made.append(rf.FusedSGD([nn.Parameter(torch.ones(1))], in_backward=True))

    class MadeMeanwhile(dict[Any, Any]):
        """Parameters that, looked at, let the other thread come in between."""

        def keys(self) -> Any:
            thread = threading.Thread(target=make)
            thread.start()
            thread.join()
            return super().keys()

    make()
    made[0]._early._launch_of = MadeMeanwhile(made[0]._early._launch_of)
    (_, opt), (net, early) = trained(False), trained(True)
    assert len(made) > 6 and result(early) == result(opt)
    before = [bits(p) for p in net.parameters()]
    learn(net, early, 0)
    assert [bits(p) for p in net.parameters()] != before


def test_optimizers_of_different_parameters_step_side_by_side() -> None:
    net, plain = Net(), Net()
    params = list(net.head.parameters())
    rest = [p for p in net.parameters() if all(p is not q for q in params)]
    opts = [rf.FusedSGD(some, 0.1, 0.9, in_backward=True) for some in (params, rest)]
    alone = rf.FusedSGD(plain.parameters(), 0.1, 0.9)
    for step in range(3):
        learn(plain, alone, step)
        learn(net, opts[0], step)
        opts[1].step()
    assert [bits(p) for p in net.parameters()] == [bits(p) for p in plain.parameters()]
    moved = opts[1].param_groups[0]["params"].pop()
    opts[0].param_groups[0]["params"].append(moved)
    before = bits(moved)
    learn(net, opts[0], 3)
    opts[1].step()
    assert bits(moved) != before


def test_distributed_data_parallel_is_refused(process_group: None) -> None:
    net = Net()
    opt = rf.FusedSGD(net.parameters(), 0.1, in_backward=True)
    before = [bits(p) for p in net.parameters()]
    parallel = nn.parallel.DistributedDataParallel(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="DistributedDataParallel: a parameter would step"):
            parallel(torch.ones(2, 1, 6, 6)).sum().backward()
    assert [bits(p) for p in net.parameters()] == before
    del parallel
    opt.zero_grad()
    gc.collect()
    learn(net, opt, 0)
    assert [bits(p) for p in net.parameters()] != before


def test_other_models_than_the_replicated_one_may_step_early(process_group: None) -> None:
    other = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    (_, opt), (_, early) = trained(False), trained(True)
    assert result(early) == result(opt)
    assert isinstance(other, nn.Module)
