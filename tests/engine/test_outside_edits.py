"""What others do to param groups, state and memory between two steps: torch follows, so do we."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import memory

Edit = Callable[[torch.optim.Optimizer], None]


def params(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, n) + i) for i, n in enumerate(sizes)]


def copy_groups(opt: torch.optim.Optimizer) -> None:
    opt.param_groups = [dict(group) for group in opt.param_groups]
    opt.param_groups[0]["lr"] = 0.01


def replace_parameter(opt: torch.optim.Optimizer) -> None:
    old = opt.param_groups[0]["params"][0]
    new = nn.Parameter(old.detach() + 1)
    opt.param_groups[0]["params"][0] = new
    opt.state[new] = opt.state.pop(old)


def replace_by_an_equal_scalar(opt: torch.optim.Optimizer) -> None:
    old = opt.param_groups[1]["params"][-1]
    opt.param_groups[1]["params"][-1] = nn.Parameter(old.detach().clone())


def append_parameter(opt: torch.optim.Optimizer) -> None:
    opt.param_groups[0]["params"].append(nn.Parameter(torch.full((3,), 2.0)))


def drop_group(opt: torch.optim.Optimizer) -> None:
    del opt.param_groups[0]


def start_again(opt: torch.optim.Optimizer) -> None:
    kept = opt.param_groups[0]["params"]
    opt.param_groups.clear()
    opt.state.clear()
    opt.add_param_group({"params": kept})


def tuple_of_parameters(opt: torch.optim.Optimizer) -> None:
    opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])


def clear_one_state(opt: torch.optim.Optimizer) -> None:
    del opt.state[opt.param_groups[0]["params"][0]]


EDITS: list[Edit] = [
    copy_groups,
    replace_parameter,
    replace_by_an_equal_scalar,
    append_parameter,
    drop_group,
    start_again,
    tuple_of_parameters,
    clear_one_state,
]


def train(opt: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        for group in opt.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = torch.full_like(p, 0.1 * step + i)
        opt.step()
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edited_groups_and_state_are_followed_as_by_torch(edit: Edit) -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        first, second = params(4, 5), params(6, 1)
        opt: Any = make([{"params": first}, {"params": second, "lr": 0.3}], lr=0.1, momentum=0.9)
        train(opt, range(1, 4))
        edit(opt)
        ends.append(train(opt, range(4, 8)))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


def share_state(opt: torch.optim.Optimizer) -> None:
    for held in opt.state.values():
        for value in held.values():
            value.share_memory_()


SHARINGS: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "state": share_state,
    "optimizer sent to a process": ForkingPickler.dumps,
    "state dict sent to a process": lambda opt: ForkingPickler.dumps(opt.state_dict()),
}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_state_is_the_trainings_also_after_it_was_shared_with_a_process(sharing: str) -> None:
    """Sharing moves a tensor's memory elsewhere, under the hands of those who hold it."""
    ends = []
    for share in (SHARINGS[sharing], lambda opt: None):
        opt = rf.FusedSGD(params(4, 5, 6), lr=0.1, momentum=0.9, average=rf.ema(0.5))
        train(opt, range(1, 4))
        share(opt)
        with opt.averaged():
            first = [p.detach().clone() for p in opt.state]
        weights = train(opt, range(4, 8))
        with opt.averaged():
            last = [p.detach().clone() for p in opt.state]
        state = [value for held in opt.state.values() for value in held.values()]
        ends.append([*weights, *first, *last, *state])
    for shared, alone in zip(*ends, strict=True):
        assert torch.equal(shared, alone)


def test_a_group_keeps_its_count_when_others_go() -> None:
    first, second = params(4), params(5)
    opt = rf.FusedSGD([{"params": first}], lr=0.1, average=rf.mean())
    train(opt, range(1, 4))
    opt.add_param_group({"params": second})
    train(opt, range(4, 6))
    del opt.param_groups[0], opt.state[first[0]]
    train(opt, range(6, 7))
    assert opt.n_averaged == 3
    assert len(opt.state_dict()["param_groups"]) == 1


def test_state_that_was_cleared_before_a_group_is_added_starts_again() -> None:
    first, second = params(4), params(5)
    opt = rf.FusedSGD([{"params": first}], lr=0.1, momentum=0.5, average=rf.mean())
    train(opt, range(1, 4))
    opt.state.clear()
    opt.add_param_group({"params": second})
    train(opt, range(4, 5))
    assert opt.n_averaged == 1
    for p in (*first, *second):
        assert torch.equal(opt.state[p]["average"], p)


def test_clearing_the_state_keeps_the_count_of_an_average_that_is_the_weights() -> None:
    (p,) = params(4)
    opt = rf.FusedSGD([p], lr=0.1, momentum=0.5, average=rf.rbwa(1, start_epoch=0))
    train(opt, range(1, 4))
    opt.state.clear()
    train(opt, range(4, 5))
    assert opt.n_averaged == 4


def test_a_buffer_that_somebody_assigns_is_followed_as_by_torch() -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        (p,) = params(4)
        opt = make([p], lr=0.1, momentum=0.5)
        train(opt, range(1, 3))
        opt.state[p]["momentum_buffer"] = torch.full((4,), 10.0)
        train(opt, range(3, 5))
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_state_that_somebody_replaces_is_followed_also_while_the_old_one_is_kept() -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        (p,) = params(4)
        opt = make([p], lr=0.1, momentum=0.5)
        train(opt, range(1, 3))
        old = opt.state
        opt.state = copy.copy(old)
        opt.state[p] = {"momentum_buffer": torch.full((4,), 10.0)}
        train(opt, range(3, 5))
        assert old[p]["momentum_buffer"].max() < 10.0
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_cleared_state_starts_again_also_while_its_tensors_are_kept() -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        first, second = params(4, 5)
        opt = make([first, second], lr=0.1, momentum=0.5)
        train(opt, range(1, 3))
        kept = [dict(held) for held in opt.state.values()]
        opt.state.clear()
        train(opt, range(3, 5))
        assert all(held["momentum_buffer"].max() > 0.0 for held in kept)
        ends.append([first.detach(), second.detach()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_average_that_somebody_deletes_starts_again_from_the_weights_and_not_from_0() -> None:
    ps = params(3, 3)
    opt = rf.FusedSGD(ps, lr=0.5, average=rf.ema(0.5))
    for step in range(3):
        for p in ps:
            p.grad = torch.ones(3) if step < 2 else torch.zeros(3)
        if step == 2:
            del opt.state[ps[0]]["average"]
        opt.step()
    assert opt.n_averaged == 3
    assert torch.equal(opt.state[ps[0]]["average"], ps[0].detach())
    assert not torch.equal(opt.state[ps[1]]["average"], ps[1].detach())


def test_implicit_rsgdm_may_start_again_with_another_momentum() -> None:
    (p,) = params(4)
    opt = rf.RSGDM([p], lr=0.1, momentum=0.5)
    train(opt, range(1, 3))
    opt.state.clear()
    opt.param_groups[0]["momentum"] = 0.8
    train(opt, range(3, 5))
    assert opt.state_dict()["param_groups"][0]["implicit_momentum"] == 0.8


def test_neighbours_in_one_storage_share_no_memory() -> None:
    base = torch.zeros(8)
    assert memory.launch_order([base[:4], base[4:]]) == ([0, 0], [True, True])
    assert memory.launch_order([base[:5], base[4:]]) == ([0, 1], [False, False])


def test_a_momentum_switched_on_elsewhere_brings_no_stale_learning_rate() -> None:
    (a,), (b,) = params(4), params(4)
    opt = rf.FusedSGD([{"params": [a]}, {"params": [b], "momentum": 0.0}], lr=1.0, momentum=0.9)
    train(opt, range(1, 2))
    opt.param_groups[0]["lr"] = 0.001
    train(opt, range(2, 3))
    del opt.state[a]
    opt.param_groups[1]["momentum"] = 0.5
    before = a.detach().clone()
    train(opt, range(3, 4))
    torch.testing.assert_close(a.detach(), before - 0.001 * 0.3)


def wrapped(*sizes: int) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(*sizes), torch.ones(*sizes))


def test_tensors_without_memory_of_their_own_are_refused_and_not_passed_over() -> None:
    with pytest.raises(TypeError, match="parameter 0 is a TwoTensor"):
        rf.FusedSGD([nn.Parameter(wrapped(4))], lr=1.0)
    (p,) = params(4)
    opt = rf.FusedSGD([p], lr=1.0, momentum=0.5)
    for steps in (0, 2):  # refused at the first step, and after others
        train(opt, range(1, 1 + steps))
        before = p.detach().clone()
        p.grad = None
        p.grad = wrapped(4)
        with pytest.raises(TypeError, match="gradient of parameter 0 is a TwoTensor"):
            opt.step()
        assert torch.equal(p, before)
        p.grad = None


def test_a_gradient_of_zeros_without_memory_decays_the_momentum_as_in_torch() -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        (p,) = params(4)
        opt = make([p], lr=0.1, momentum=0.5)
        train(opt, range(1, 3))
        p.grad = torch._efficientzerotensor(4)
        opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_distributed_checkpoint_reads_the_state_without_taking_steps() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(2, 2)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.rbwa(1, start_epoch=0))
    train(opt, range(1, 3))
    opt.zero_grad()
    for _ in range(3):
        get_optimizer_state_dict(model, opt)
    assert opt.n_averaged == 2
    assert opt.state_dict()["param_groups"][0]["step"] == 2


def test_a_checkpoint_loads_into_groups_that_somebody_has_put_in_place() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "average": rf.ema(0.5)}
    ours, theirs = params(4, 5, 6, 1), params(4, 5, 6, 1)
    opt = rf.FusedSGD([{"params": ours[:2]}, {"params": ours[2:]}], **options)
    weights = train(opt, range(1, 4))
    other = rf.FusedSGD([{"params": theirs[2:]}], **options)
    group = other.param_groups[0]
    other.param_groups = [{**group, "params": theirs[:2]}, {**group, "params": theirs[2:]}]
    for p, value in zip(theirs, weights, strict=True):
        p.data.copy_(value)
    other.load_state_dict(opt.state_dict())
    assert all(map(torch.equal, train(opt, range(4, 7)), train(other, range(4, 7))))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(opt.state[p]["average"], other.state[q]["average"])
    assert opt.n_averaged == other.n_averaged == 6


def overlapping() -> list[nn.Parameter]:
    base = torch.arange(16.0).reshape(4, 4)
    return [nn.Parameter(base[:, :2]), nn.Parameter(base)]  # the first one is not dense


def test_overlapping_parameters_that_are_not_dense_are_stepped_in_turn() -> None:
    ours, theirs = overlapping(), overlapping()
    train(rf.FusedSGD(ours, lr=1.0), range(1, 3))
    train(torch.optim.SGD(theirs, lr=1.0, foreach=False), range(1, 3))
    torch.testing.assert_close(ours[1].detach(), theirs[1].detach())


def test_a_group_added_over_parameters_that_overlapped_before_is_stepped_after_them() -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        base = torch.arange(16.0).reshape(4, 4)
        ps = [nn.Parameter(base[:2]), nn.Parameter(base), nn.Parameter(base[:, :2])]
        opt: Any = make(ps[:2], lr=1.0)
        ps[0].data = ps[0].data.clone()  # the second is alone now, and keeps its turn
        opt.add_param_group({"params": ps[2:], "weight_decay": 0.5})
        train(opt, range(1, 3))
        ends.append(base)
    torch.testing.assert_close(*ends)


def test_a_group_that_is_added_to_one_launch_leaves_the_others_their_learning_rates() -> None:
    base, alone = torch.arange(12.0), nn.Parameter(torch.ones(3))
    ps = [nn.Parameter(base[:8]), nn.Parameter(base[4:])]  # two launches
    opt = rf.FusedSGD(ps, lr=1.0)
    train(opt, range(1, 3))
    opt.add_param_group({"params": [alone]})
    opt.param_groups[0]["lr"] = 0.0
    before = base.clone()
    train(opt, range(3, 5))
    assert torch.equal(base, before) and not torch.equal(alone, torch.ones(3))


def test_a_gradient_that_does_not_fit_is_found_before_any_of_several_launches() -> None:
    base = torch.arange(12.0)
    opt = rf.FusedSGD([nn.Parameter(base[:8]), nn.Parameter(base[4:])], lr=0.1, momentum=0.9)
    train(opt, range(1, 4))
    before = base.clone()
    opt.param_groups[0]["params"][1].grad = torch.ones(8).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(base, before)


def test_overlapping_parameters_come_back_from_averaged() -> None:
    ps = overlapping()
    opt = rf.FusedSGD(ps, lr=1.0, average=rf.ema(0.5))
    train(opt, range(1, 4))
    tensors = [t for p in ps for t in (p.detach(), opt.state[p]["average"])]
    before = [t.clone() for t in tensors]
    with opt.averaged():
        pass
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_checkpoint_inside_averaged_holds_the_averages_of_overlapping_parameters() -> None:
    ps = overlapping()
    opt = rf.FusedSGD(ps, lr=1.0, average=rf.ema(0.5))
    train(opt, range(1, 4))
    expected = [opt.state[p]["average"].clone() for p in ps]
    with opt.averaged():
        saved = opt.state_dict()["state"]
    assert all(torch.equal(saved[i]["average"], a) for i, a in enumerate(expected))


def test_averages_of_two_dtypes_in_the_same_memory_come_back_from_averaged() -> None:
    base = torch.arange(16.0).bfloat16()
    ps = [nn.Parameter(base[:10]), nn.Parameter(base[6:])]
    same = rf.Average(rf.Ema(0.5), dtype=torch.bfloat16)
    groups = [{"params": ps[:1]}, {"params": ps[1:], "average": same}]
    opt = rf.FusedSGD(groups, lr=1.0, average=rf.ema(0.5))
    train(opt, range(1, 4))
    tensors = [t for p in ps for t in (p.detach(), opt.state[p]["average"])]
    before = [t.clone() for t in tensors]
    with opt.averaged():
        pass
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_an_empty_parameter_with_other_strides_does_not_keep_averages_away() -> None:
    p, q = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p, q], lr=1.0, average=rf.ema(0.5))
    train(opt, range(1, 4))
    p.data = torch.zeros(3, 0).t()
    with opt.averaged():
        assert torch.equal(q, opt.state_dict()["state"][1]["average"])


def test_an_optimizer_is_freed_when_its_last_name_is_gone() -> None:
    (p,) = params(4)
    opt = rf.FusedSGD([p], lr=1.0, momentum=0.9, average=rf.ema(0.5))
    train(opt, range(1, 3))
    gone = weakref.ref(opt), weakref.ref(p)
    gc.disable()
    try:
        del opt, p
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_an_unwritten_parameter_may_still_be_differentiated_through() -> None:
    w, other = params(3, 3)
    opt = rf.FusedSGD([w, other], lr=0.1, average=rf.rbwa(1, start_epoch=0))
    other.grad = torch.ones(3)
    loss = (w**2).sum()
    opt.step()
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_functions_of_the_same_outer_name_are_different_policies() -> None:
    def policy(kind: str) -> rf.Average:
        def a(n: int, step: int) -> float:
            return 0.5

        def b(n: int, step: int) -> float:
            return 0.5

        return rf.Average(a if kind == "a" else b)

    opts = [rf.FusedSGD(params(3), lr=0.1, average=policy(kind)) for kind in "ab"]
    with pytest.raises(ValueError, match=r"average is.*<locals>\.a"):
        opts[1].load_state_dict(opts[0].state_dict())
