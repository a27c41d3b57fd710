"""Averages that other libraries have saved, in files that they made themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import Net, adamw, as_bits, train
from programs import through_a_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rbwa_fused as rf


class Normed(Net):
    """With statistics, which these libraries save as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))  # type: ignore[no-any-return]


def of_torch(net: nn.Module) -> tuple[Any, Callable[[], object], nn.Module]:
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return averaged, lambda: averaged.update_parameters(net), averaged.module


def of_timm(net: nn.Module) -> tuple[Any, Callable[[], object], nn.Module]:
    model_ema = pytest.importorskip("timm.utils.model_ema")
    averaged = model_ema.ModelEmaV3(net, decay=0.5)
    return averaged, lambda: averaged.update(net), averaged.module


def of_ema_pytorch(net: nn.Module) -> tuple[Any, Callable[[], object], nn.Module]:
    library = pytest.importorskip("ema_pytorch")
    averaged = library.EMA(net, beta=0.5, min_value=0.5, update_every=1, update_after_step=0)
    return averaged, averaged.update, averaged.ema_model


LIBRARIES = {"AveragedModel": of_torch, "timm": of_timm, "ema-pytorch": of_ema_pytorch}
COUNTS = {"AveragedModel": 4, "timm": 1, "ema-pytorch": 4}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_run_goes_on_with_another_librarys_averages(library: str) -> None:
    net = Normed()
    opt = adamw(net)
    theirs, update, module = LIBRARIES[library](net)
    train(net, [opt], 1, 4, lambda step: update())
    saved = through_a_file(theirs.state_dict())
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    held = averager.state[net.last.weight]["average"]
    averager.load_state_dict(saved)
    expected = dict(module.named_parameters())
    assert as_bits(averager.averages()) == as_bits(expected)
    assert averager.averages()["last.weight"] is held
    assert averager.n_averaged == COUNTS[library]
    train(net, [opt], 5, 5)
    for name, a in averager.averages().items():
        before, x = expected[name].detach(), net.get_parameter(name).detach()
        assert torch.equal(a, before + 0.5 * (x - before))


def test_statistics_are_taken_over_where_buffers_are_averaged() -> None:
    net = Normed()
    theirs, update, module = of_torch(net)
    update()
    averager = rf.Averager(net, rf.ema(0.5), buffers=True)
    averager.load_state_dict(through_a_file(theirs.state_dict()))
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    del named["norm.num_batches_tracked"]
    assert as_bits(averager.averages()) == as_bits(named)


def test_diffusers_list_goes_by_the_order_of_the_parameters() -> None:
    net = Net()
    shadow = [torch.full_like(p, float(i)) for i, p in enumerate(net.parameters())]
    saved = {"decay": 0.5, "optimization_step": 7, "shadow_params": shadow}
    averager = rf.Averager(net.parameters(), rf.ema(0.5))
    averager.load_state_dict(through_a_file(saved))
    found = [averager.state[p]["average"] for p in net.parameters()]
    assert all(map(torch.equal, found, shadow)) and averager.n_averaged == 7
    with pytest.raises(ValueError, match=r"2 averages \(expected 6\)"):
        averager.load_state_dict({"shadow_params": shadow[:2]})


# EMAModel's options, and the policy that says the same. Its own decay begins at (1 + n) / (10 + n),
# n >= 1 being the samples in the average.
OF_DIFFUSERS: dict[str, tuple[dict[str, Any], rf.Average]] = {
    "its own decay": (
        {"decay": 0.75},
        rf.Average(lambda n, step: 1 - min((1 + n) / (10 + n), 0.75), name="diffusers"),
    ),
    "constant": ({"decay": 0.75, "min_decay": 0.75}, rf.ema(0.75)),
    "warmup": (
        {"decay": 0.75, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.5},
        rf.Average(lambda n, step: 1 - min(1 - (1 + n / 2) ** -0.5, 0.75), name="warmup"),
    ),
    "late": ({"decay": 0.75, "min_decay": 0.75, "update_after_step": 3}, rf.ema(0.75, start=3)),
}


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", OF_DIFFUSERS)
def test_a_run_goes_on_with_what_diffusers_has_saved_to_what_it_would_come_to(
    options: str, stop: int
) -> None:
    """In float64, within two units of the last place a sample: EMAModel rounds a - (1 - d) (a - x),
    and copies as 0 a + x. Before its first sample it holds the initial weights, or copies."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    its, policy = OF_DIFFUSERS[options]
    net = Net().double()
    opt = adamw(net)
    theirs = training_utils.EMAModel(net.parameters(), **its)
    train(net, [opt], 1, stop, lambda step: theirs.step(net.parameters()))
    averager = rf.Averager(net, policy, optimizer=opt)
    averager.load_state_dict(through_a_file(theirs.state_dict()))
    late = its.get("update_after_step", 0)
    assert averager.engine.steps == stop and averager.n_averaged == max(0, stop - late)
    last = 9
    train(net, [opt], stop + 1, last, lambda step: theirs.step(net.parameters()))
    assert averager.n_averaged == last - late
    for p, shadow in zip(net.parameters(), theirs.shadow_params, strict=True):
        a = averager.state[p]["average"]
        if not p.requires_grad:
            assert torch.equal(a, shadow)
        largest = torch.maximum(shadow.abs().max(), p.detach().abs().max())
        bound = 2 * last * torch.finfo(torch.float64).eps * largest
        assert (a - shadow).abs().max() <= bound


@pytest.mark.parametrize("library", ["AveragedModel", "ema-pytorch"])
def test_a_run_goes_on_from_before_another_librarys_first_sample(library: str) -> None:
    """As of a run that was stopped before SWA starts: the weights of then are no sample."""
    net = Normed()
    opt = adamw(net)
    theirs, update, module = LIBRARIES[library](net)
    train(net, [opt], 1, 2)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    averager.load_state_dict(through_a_file(theirs.state_dict()))
    assert averager.n_averaged == 0
    train(net, [opt], 3, 4, lambda step: update())
    for name, p in module.named_parameters():
        torch.testing.assert_close(averager.averages()[name], p.detach(), rtol=1e-6, atol=1e-6)
    assert averager.n_averaged == 2


def test_ema_pytorch_before_it_is_initted_has_steps_and_no_sample() -> None:
    """As versions that copy up to update_after_step leave it."""
    net = Normed()
    theirs, update, _ = of_ema_pytorch(net)
    update()
    saved = through_a_file(theirs.state_dict())
    saved["step"].fill_(5)
    for initted, samples in ((True, 5), (False, 0)):
        saved["initted"].fill_(initted)
        averager = rf.Averager(net, rf.ema(0.5))
        averager.load_state_dict(saved)
        assert averager.engine.steps == 5 and averager.n_averaged == samples


def test_a_plain_state_dict_is_averages_too_and_step_says_where_the_run_stands() -> None:
    net, other = Net(), Net()
    averager = rf.Averager(net, rf.ema(0.5, start=10))
    averager.load_state_dict(other.state_dict(), step=20)
    assert averager.engine.steps == 20 and averager.n_averaged == 1
    assert as_bits(averager.averages()) == as_bits(dict(other.named_parameters()))


def test_names_and_shapes_that_do_not_fit_are_all_said_and_nothing_changes() -> None:
    net = Net()
    averager = rf.Averager(net, rf.ema(0.5))
    averager.update()
    before = as_bits(averager.state_dict())
    state = dict(net.state_dict())
    del state["first.bias"], state["last.weight"]
    state["head.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"no first.bias, last.weight and unknown head.weight"):
        averager.load_state_dict(state)
    with pytest.raises(ValueError, match=r"unknown head\.weight"):
        averager.load_state_dict({**net.state_dict(), "head.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'last.bias'\) has shape \(4,\)"):
        averager.load_state_dict({**net.state_dict(), "last.bias": torch.ones(4)})
    with pytest.raises(TypeError, match=r"'last\.bias'\) is int"):
        averager.load_state_dict({**net.state_dict(), "last.bias": 3})
    with pytest.raises(ValueError, match="parameters without names"):
        rf.Averager(net.parameters(), rf.ema(0.5)).load_state_dict(net.state_dict())
    assert as_bits(averager.state_dict()) == before
