"""Averages that other libraries have saved, in files that they made themselves."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import Net, adamw, as_bits, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rbwa_fused as rf


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
    averaged = library.EMA(net, beta=0.5, update_every=1, update_after_step=0)
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
