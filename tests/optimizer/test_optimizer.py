"""What a user expects of any torch optimizer: AMP, frozen layers, moves, memory, threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from rules import ALGORITHMS
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import rbwa_fused as rf
from rbwa_fused.engine import memory

KINDS = {name: rule.made for name, rule in ALGORITHMS.items()}


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(net: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    p = next(net.parameters())
    x = torch.randn(5, 6, generator=generator).to(p.dtype)
    net.zero_grad()
    loss = net(x).square().mean()
    (loss * scale).backward()
    return loss


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook]
)
def test_a_hook_for_all_optimizers_needs_no_other_hook(register: Any) -> None:
    net, seen = model(), []
    opt = rf.FusedSGD(net.parameters(), lr=0.1)
    backward(net, 0)
    handle = register(lambda *told: seen.append(told[0]))
    opt.step()
    handle.remove()
    assert seen == [opt]


def test_a_closure_may_differentiate_inside_no_grad() -> None:
    net = model()
    opt = rf.FusedSGD(net.parameters(), lr=0.1)
    before = weights(net)
    with torch.no_grad():
        assert opt.step(lambda: backward(net, 0)) is not None
    assert not equal(before, weights(net))


def test_a_step_leaves_the_grad_mode_as_it_was() -> None:
    net = model()
    opt = rf.FusedSGD(net.parameters(), lr=0.1)
    backward(net, 0)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            opt.step()
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)


def test_momentum_may_be_switched_on_and_off_as_in_torch() -> None:
    nets = model(), model()
    opts = (
        rf.FusedSGD(nets[0].parameters(), lr=0.1),
        torch.optim.SGD(nets[1].parameters(), lr=0.1, foreach=False),
    )
    for step, momentum in enumerate([0, 0.9, 0.9, 0, 0, 0.5, 0.5]):
        for net, opt in zip(nets, opts, strict=True):
            opt.param_groups[0]["momentum"] = momentum
            backward(net, step)
            opt.step()
    for a, b in zip(*map(weights, nets), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_frozen_and_unfrozen_takes_its_first_step_late(kind: str) -> None:
    late, alone = model(), model()
    # A group each, as schedule-free rules count a group's steps.
    opt = KINDS[kind]([{"params": [*layer.parameters()]} for layer in (late[0], late[2])])
    opt_alone = KINDS[kind](alone[2].parameters())
    for step in range(6):
        backward(late, step)
        if step < 3:
            saved = [p.grad for p in late[2].parameters()]
            for p in late[2].parameters():
                p.grad = None
            assert saved[0] is not None
        opt.step()
        if step >= 3:
            for p, q in zip(alone[2].parameters(), late[2].parameters(), strict=True):
                p.grad = q.grad.clone()
            opt_alone.step()
    assert equal(weights(late[2]), weights(alone[2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [None, rf.ema(0.5), rf.rbwa(2, 0), rf.lookahead(2)], ids=str)
def test_an_overflow_skips_step_average_counters_and_first_step_together(
    kind: str, average: rf.Average | None
) -> None:
    """Two runs, one of which meets an overflow before its first and before its third step."""
    if not ALGORITHMS[kind].takes(average):
        pytest.skip("it cannot be written back")
    nets = model(), model()
    opts = [KINDS[kind](net.parameters(), average=average) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    for step in range(5):
        if step in (0, 2):  # `found_inf` is a sum over devices: 2 is an overflow too
            before = weights(nets[1]), str(opts[1].state_dict())
            backward(nets[1], step)
            opts[1].grad_scale, opts[1].found_inf = torch.tensor(4.0), torch.tensor(2.0)
            opts[1].step()
            del opts[1].grad_scale, opts[1].found_inf
            assert equal(before[0], weights(nets[1]))
            assert before[1] == str(opts[1].state_dict())
        backward(nets[0], step)
        opts[0].step()
        backward(nets[1], step, float(scaler.scale(torch.ones(()))))
        scaler.step(opts[1])
        scaler.update()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # unscaled in place, as torch's contract asks
    assert equal(*map(weights, nets))  # a power of two scales exactly
    assert opts[0].n_averaged == opts[1].n_averaged


def test_sixteen_bit_gradients_are_unscaled_before_they_are_rounded() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    opt = rf.FusedSGD([p], lr=2.0**20)
    p.grad = torch.full_like(p, 2.0**-8)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**20), torch.tensor(0.0)
    opt.step()
    assert p.tolist() == [-(2.0**-8)] * 3  # 2^-28 is 0 in float16


@pytest.mark.parametrize("shape", [(), (1,), (40,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1000.0, 2.0**26])
def test_gradients_are_left_unscaled_to_the_last_bit(
    scale: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    opt = rf.FusedSGD([p], lr=1.0)
    p.grad = torch.full_like(p, 1542.0)
    expected = (p.grad.to(wide) * torch.tensor(1.0 / scale, dtype=wide)).to(dtype)
    opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
    opt.step()
    assert torch.equal(p.grad, expected)  # 2^-26 is 0 in float16, 2^-26 * 1542 is not


@pytest.mark.parametrize("average", [None, rf.ema(0.5), rf.rbwa(1, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_put_elsewhere_are_reached_there(kind: str, average: rf.Average | None) -> None:
    if not ALGORITHMS[kind].takes(average):
        pytest.skip("it cannot be written back")
    net, still = model(), model()
    opt, opt_still = (KINDS[kind](n.parameters(), average=average) for n in (net, still))
    old = [p.data for p in net.parameters()]
    for step in range(6):
        if step == 2:
            for p in net.parameters():
                p.data = p.data.clone()
            old_values = [t.clone() for t in old]
        if step == 4:
            net[0].weight.data = net[0].weight.data.t().contiguous().t()  # another layout
        for n, o in ((net, opt), (still, opt_still)):
            backward(n, step)
            o.step()
    for a, b in zip(weights(net), weights(still), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)  # a matrix product rounds by layout
    assert equal(old, old_values)  # nothing was written at the stale address


@pytest.mark.parametrize("average", [None, rf.ema(0.5), rf.rbwa(1, 0)], ids=str)
def test_a_model_converted_to_float64_trains_on_with_its_state(average: rf.Average | None) -> None:
    net = model()
    opt = KINDS["momentum"](net.parameters(), average=average)
    for step in range(4):
        if step == 2:
            before = [s["momentum_buffer"].clone() for s in opt.state.values()]
            net.double()
        backward(net, step)
        opt.step()
        if step == 2:
            for p, m in zip(net.parameters(), before, strict=True):
                expected = 0.8 * m.double() + p.grad
                assert opt.state[p]["momentum_buffer"].dtype == torch.float64
                gap = opt.state[p]["momentum_buffer"] - expected
                assert gap.abs().max() < 0.05 * 2  # weight decay adds 0.05 theta
    assert average is None or opt.n_averaged == 4


def test_a_frozen_slice_that_was_converted_is_not_rounded_to_its_old_dtype() -> None:
    p, q = nn.Parameter(torch.zeros(4, 2)[:, 0]), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = rf.FusedSGD([p, q], lr=0.1, average=rf.ema(0.5))
    for step in range(3):
        if step == 1:
            p.data = torch.full((4, 2), 1 / 3, dtype=torch.float64)[:, 0]
            p.grad = None
        else:
            p.grad = torch.zeros_like(p)
        q.grad = torch.ones_like(q)
        opt.step()
        if step == 1:
            assert p.tolist() == [1 / 3] * 4
            assert opt.state[p]["average"].dtype == torch.float64


def test_strides_that_mean_nothing_make_no_gradient_a_misfit() -> None:
    one, none = nn.Parameter(torch.ones(1, 5)), nn.Parameter(torch.ones(3, 0))
    opt = rf.FusedSGD([one, none], lr=0.5)
    one.grad = torch.ones(10).as_strided((1, 5), (7, 1))
    none.grad = torch.empty(0, 3).t()
    opt.step()
    assert one.tolist() == [[0.5] * 5]


def test_strides_that_mean_nothing_cost_no_copy_of_a_gradient() -> None:
    one, none = torch.ones(10).as_strided((1, 5), (7, 1)), torch.empty(0, 3).t()
    assert memory.same_layout(one, torch.ones(1, 5)) and memory.same_layout(none, torch.empty(3, 0))
    assert not memory.same_layout(torch.ones(10)[::2], torch.ones(5))


def test_state_that_a_user_clears_starts_again() -> None:
    runs = []
    for clear in (lambda o: o.state.clear(), lambda o: setattr(o, "state", type(o.state)(dict))):
        net = model()
        opt = KINDS["momentum"](net.parameters(), average=rf.ema(0.5))
        for step in range(4):
            if step == 2:
                clear(opt)
                middle = weights(net)
            backward(net, step)
            opt.step()
        fresh = model()
        for p, w in zip(fresh.parameters(), middle, strict=True):
            p.data.copy_(w)
        again = KINDS["momentum"](fresh.parameters(), average=rf.ema(0.5))
        for step in (2, 3):
            backward(fresh, step)
            again.step()
        assert equal(weights(net), weights(fresh))
        assert opt.n_averaged == again.n_averaged == 2
        runs.append(weights(net))
    assert equal(*runs)


def test_every_parameter_and_state_tensor_has_a_storage_of_its_own() -> None:
    net = nn.Linear(100, 50)
    opt = rf.RSGDM(net.parameters(), average=rf.ema())
    net(torch.randn(2, 100)).sum().backward()
    opt.step()
    tensors = [*net.parameters(), *itertools.chain(*(s.values() for s in opt.state.values()))]
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    for p in net.parameters():
        assert p.data_ptr() % memory.ALIGNMENT == 0


def test_flat_parameters_lie_one_behind_the_other_and_large_ones_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (5, 32, 33, 1)]
    rf.FusedSGD(params)
    starts = [p.data_ptr() - params[0].data_ptr() for p in params]
    assert starts == [0, 128, 256, 512]
    monkeypatch.setattr(memory, "LARGEST_BUFFER", 256)
    limited = [torch.ones(n) for n in (5, 32, 100, 1)]
    sizes = [
        sorted(offsets.values())
        for _, offsets in memory.allocate(enumerate(limited), torch.float32, torch.device("cpu"))
    ]
    assert sizes == [[0, 32], [0], [0]]


def test_flatten_false_leaves_parameters_where_they_are() -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (5, 6)]
    before = [p.data_ptr() for p in params]
    rf.FusedSGD(params, flatten=False)
    assert [p.data_ptr() for p in params] == before


def test_memory_that_somebody_else_holds_is_left_where_it_is() -> None:
    base = torch.ones(20)
    shared = nn.Parameter(torch.ones(4).share_memory_())
    params = [nn.Parameter(base[:8]), shared, nn.Parameter(torch.ones(3))]
    before = [p.data_ptr() for p in params]
    opt = rf.FusedSGD(params, lr=1.0)
    assert [p.data_ptr() for p in params][:2] == before[:2]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert base.tolist() == [0.0] * 8 + [1.0] * 12


def test_parameters_on_a_gpu_are_left_where_they_are() -> None:
    """The device without memory stands for a GPU; whatever `is_shared` says there."""
    here, there = (nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "meta"))
    assert memory.may_move(here) and not memory.may_move(there)


def test_state_is_made_on_a_gpu_that_is_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Tensor, **told: Any) -> None:
        raise BufferError("Can't export tensors on a different CUDA device index.")

    monkeypatch.setattr(Tensor, "__dlpack__", refuse)  # as it does for such a GPU's tensors
    p = nn.Parameter(torch.ones(3, 2).t())
    opt = rf.FusedSGD([p], lr=0.5, momentum=0.5, average=rf.ema(0.5))
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert opt.state[p]["momentum_buffer"].tolist() == [[1.5] * 3] * 2
    assert opt.state[p]["average"].stride() == p.stride() == (1, 2)
    assert p.tolist() == [[-0.25] * 3] * 2


def test_adding_a_group_moves_nothing_that_is_placed() -> None:
    net, other = model(), model(1)
    opt = KINDS["momentum"](net.parameters(), average=rf.ema())
    backward(net, 0)
    opt.step()
    pointers = [t.data_ptr() for p in net.parameters() for t in (p, *opt.state[p].values())]
    opt.add_param_group({"params": other.parameters(), "lr": 0.5, "momentum": 0})
    backward(net, 1)
    backward(other, 1)
    opt.step()
    assert pointers == [t.data_ptr() for p in net.parameters() for t in (p, *opt.state[p].values())]
    assert all("momentum_buffer" not in opt.state[p] for p in other.parameters())


def test_a_backward_through_stepped_weights_is_an_error_and_not_a_wrong_gradient() -> None:
    net = model()
    opt = rf.FusedSGD(net.parameters(), lr=0.1)
    loss = backward(net, 0) * 0 + net(torch.randn(2, 6)).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_frozen_weight_may_be_differentiated_through_after_the_step() -> None:
    net = model()
    opt = rf.FusedSGD(net.parameters(), lr=0.1)
    backward(net, 0)
    y = net[2](torch.randn(2, 8, requires_grad=True)).sum()
    for p in net[2].parameters():
        p.grad = None
    opt.step()
    y.backward()
