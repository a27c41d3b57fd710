"""Weights that are tied, saved by safetensors, assigned or swapped are the optimizer's, or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import FLAT, WAYS, digests, evaluated, held, network, take
from runs import bits, result
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import rbwa_fused as rf

# ---- one parameter in two places ---------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is the output projection too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.abs().mul(3).long().clamp(max=6)
        return self.output(torch.tanh(self.hidden(self.embedding(tokens))))


def test_tied_weights_are_stepped_and_averaged_once() -> None:
    model, plain = Tied(), Tied()
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    alone = rf.FusedSGD(plain.parameters(), **WAYS["reference"])
    take(model, opt, 1, 6)
    take(plain, alone, 1, 6)
    assert len(opt.state) == 3  # the tied weight, the hidden layer's weight and bias
    assert model.output.weight is model.embedding.weight
    assert result(opt) == result(alone)
    assert evaluated(model, opt) == evaluated(plain, alone)
    averaged = opt.averaged_state_dict(model)
    assert bits(averaged["output.weight"]) == bits(averaged["embedding.weight"])


@pytest.mark.parametrize("make", [network, Tied])
def test_safetensors_gives_a_model_back_that_trains_on(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    take(model, opt, 1, 4)
    save_model(model, str(tmp_path / "model"))
    saved = opt.state_dict()
    again = make()
    loaded = rf.FusedSGD(again.parameters(), **FLAT)
    addresses = [p.data_ptr() for p in again.parameters()]
    assert load_model(again, str(tmp_path / "model")) == (set(), [])
    loaded.load_state_dict(saved)
    assert addresses == [p.data_ptr() for p in again.parameters()]
    take(model, opt, 5, 8)
    take(again, loaded, 5, 8)
    assert held(again) == held(model)
    assert result(loaded) == result(opt)


def test_safetensors_takes_averages_and_live_weights_as_they_are(tmp_path: Path) -> None:
    model, again = network(), network()
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    take(model, opt, 1, 4)
    save_file(model.state_dict(), tmp_path / "live")
    save_file(opt.averaged_state_dict(model), tmp_path / "averaged")
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size < (tmp_path / "live").stat().st_size < size + 1024
    assert digests(load_file(tmp_path / "live")) == held(model)
    again.load_state_dict(load_file(tmp_path / "averaged"))
    with opt.averaged():
        save_model(model, str(tmp_path / "inside"))
        assert held(model) == held(again)
    assert digests(load_file(tmp_path / "inside")) == held(again)


# ---- loading by assignment and by swapping -----------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_assigned_parameters_are_trained_and_their_source_is_not(
    mmap: bool, tmp_path: Path
) -> None:
    model, plain = network(), network()
    torch.save(model.state_dict(), tmp_path / "saved")
    source = torch.load(tmp_path / "saved", mmap=mmap)
    before = digests(source)
    with torch.device("meta"):
        empty = network()
    empty.load_state_dict(source, assign=True)
    opt, alone = (rf.FusedSGD(m.parameters(), **FLAT) for m in (empty, plain))
    take(empty, opt, 1, 6)
    take(plain, alone, 1, 6)
    assert held(empty) == held(plain)
    assert result(opt) == result(alone)
    assert digests(source) == before == digests(torch.load(tmp_path / "saved"))


def test_parameters_assigned_to_a_flat_model_are_no_more_the_optimizers_as_in_torch() -> None:
    for make in (rf.FusedSGD, torch.optim.SGD):
        model = network()
        opt = make(model.parameters(), lr=0.1, momentum=0.9)
        take(model, opt, 1, 2)
        source = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(source, assign=True)
        before, steps = held(model), result(opt) if make is rf.FusedSGD else None
        take(model, opt, 3, 4)
        assert held(model) == before
        assert steps is None or result(opt) == steps  # nobody gave a gradient, so nothing counts


@pytest.fixture
def _swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("assign", [False, True])
def test_parameters_that_are_swapped_stay_the_optimizers(assign: bool) -> None:
    model, plain = network(), network()
    opt, alone = (rf.FusedSGD(m.parameters(), **FLAT) for m in (model, plain))
    take(model, opt, 1, 3)
    take(plain, alone, 1, 3)
    halved = {name: value * 0.5 for name, value in model.state_dict().items()}
    params = list(model.parameters())
    model.load_state_dict(copy.deepcopy(halved), assign=assign)
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(halved[name])
    take(model, opt, 4, 6)
    take(plain, alone, 4, 6)
    assert held(model) == held(plain)
    assert evaluated(model, opt) == evaluated(plain, alone)
    model.double()
    opt.zero_grad()
    assert all(
        p is q and p.dtype == torch.float64 for p, q in zip(params, model.parameters(), strict=True)
    )
    before = held(model)
    model(torch.ones(2, 4).double()).sum().backward()
    opt.step()
    assert held(model) != before
    assert opt.n_averaged == alone.n_averaged + 1
