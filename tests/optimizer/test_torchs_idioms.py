"""What programs do to torch's SGD beside its methods, done to ours: the same comes of it."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import rbwa_fused as rf

OPTIONS = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25}  # sums of these are exact


def make(cls: Any, **options: Any) -> Any:
    params = [nn.Parameter(torch.full((n,), float(n))) for n in (1, 2, 3)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.25}]
    return cls(groups, **{**OPTIONS, **options})


def params(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def train(opt: Any, steps: int = 2) -> Any:
    for step in range(steps):
        for p in params(opt):
            p.grad = torch.full_like(p, 1.0 + step)
        opt.step()
    return opt


def alike(ours: Any, theirs: Any) -> None:
    for p, q in zip(params(ours), params(theirs), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
    keys = ("lr", "momentum", "weight_decay", "nesterov", "dampening", "maximize", "note")
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [group.get(key) for key in keys] == [other.get(key) for key in keys]


# ---- what is done ------------------------------------------------------------------------------


def set_all(opt: Any) -> Any:
    opt.__setstate__({"state": opt.state, "param_groups": opt.param_groups})
    return opt


def set_state(opt: Any) -> Any:
    opt.__setstate__({"state": defaultdict(dict)})
    return opt


def set_groups(opt: Any) -> Any:
    groups = [{**group, "lr": 0.125, "note": i} for i, group in enumerate(opt.param_groups)]
    opt.__setstate__({"param_groups": groups})
    assert opt.param_groups is groups
    return opt


def set_older_groups(opt: Any) -> Any:
    """Without keys that later versions of torch added."""
    later = ("nesterov", "maximize", "foreach", "differentiable", "fused")
    groups = [{k: v for k, v in g.items() if k not in later} for g in opt.param_groups]
    opt.__setstate__({"state": opt.state, "param_groups": groups})
    return opt


def of_the_base(opt: Any) -> Any:
    """What torch.optim.Optimizer alone would pickle."""
    new = type(opt).__new__(type(opt))
    new.__setstate__(copy.deepcopy(Optimizer.__getstate__(opt)))
    return new


def of_another(opt: Any) -> Any:
    other = make(type(opt))
    other.__setstate__(copy.deepcopy(opt.__getstate__()))
    return other


def load_by_the_class(opt: Any) -> Any:
    other = make(type(opt))
    for p, q in zip(params(other), params(opt), strict=True):
        p.data.copy_(q)
    Optimizer.load_state_dict(other, opt.state_dict())
    return other


def torchs_by_the_class(opt: Any) -> Any:
    other = make(type(opt))
    for p, q in zip(params(other), params(opt), strict=True):
        p.data.copy_(q)
    Optimizer.load_state_dict(other, train(make(torch.optim.SGD)).state_dict())
    return other


def update_dict(opt: Any) -> Any:
    opt.__dict__.update(param_groups=[{**group, "lr": 1.0} for group in opt.param_groups])
    return opt


def add_by_the_class(opt: Any) -> Any:
    Optimizer.add_param_group(opt, {"params": [nn.Parameter(torch.ones(4))]})
    return opt


def changed_defaults(opt: Any) -> Any:
    opt.defaults["lr"] = 2.0
    opt.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
    return opt


def torchs_groups(opt: Any) -> Any:
    other = torch.optim.SGD([{"params": g["params"]} for g in opt.param_groups], lr=0.125)
    opt.param_groups = other.param_groups
    return opt


def fewer_params(opt: Any) -> Any:
    opt.param_groups[0]["params"] = opt.param_groups[0]["params"][1:]
    return opt


def shallow(opt: Any) -> Any:
    return copy.copy(opt)


IDIOMS = [
    set_all,
    set_state,
    set_groups,
    set_older_groups,
    of_the_base,
    of_another,
    load_by_the_class,
    torchs_by_the_class,
    update_dict,
    add_by_the_class,
    changed_defaults,
    torchs_groups,
    fewer_params,
    shallow,
]


@pytest.mark.parametrize("idiom", IDIOMS)
def test_an_idiom_of_torchs_users_leads_where_it_leads_with_torchs_sgd(idiom: Any) -> None:
    ours, theirs = (train(idiom(train(make(cls)))) for cls in (rf.FusedSGD, torch.optim.SGD))
    alike(ours, theirs)


@pytest.mark.parametrize("cls", [rf.FusedSGD, torch.optim.SGD])
def test_a_shallow_copy_shares_groups_and_state(cls: Any) -> None:
    opt = train(make(cls))
    other = copy.copy(opt)
    assert other.param_groups is opt.param_groups
    for one in (other, opt, other):
        train(one, 1)
    expected = train(make(torch.optim.SGD))
    for _ in range(3):
        train(expected, 1)
    alike(opt, expected)
    alike(other, expected)


# ---- averages ----------------------------------------------------------------------------------


def averaged(opt: Any) -> list[Tensor]:
    with opt.averaged():
        return [p.detach().clone() for p in params(opt)]


def going_on(idiom: Callable[[Any], Any], average: Any, cls: Any = rf.FusedSGD) -> Any:
    return train(idiom(train(make(cls, average=average))))


def load_with_averages(opt: Any) -> Any:
    other = make(type(opt), average=opt.param_groups[0]["average"])
    for p, q in zip(params(other), params(opt), strict=True):
        p.data.copy_(q)
    Optimizer.load_state_dict(other, opt.state_dict())
    assert other.param_groups[0]["average"] is opt.param_groups[0]["average"]
    return other


POLICIES = [rf.ema(0.5), rf.mean(start=1), rf.rbwa(steps_per_epoch=1, start_epoch=1)]


@pytest.mark.parametrize("idiom", [set_all, set_groups, of_another, load_with_averages, shallow])
@pytest.mark.parametrize("policy", POLICIES)
def test_averages_and_their_counters_go_on(idiom: Any, policy: rf.Average) -> None:
    def undisturbed(opt: Any) -> Any:
        if idiom is set_groups:
            for group in opt.param_groups:
                group["lr"] = 0.125
        return opt

    opt, expected = going_on(idiom, policy), going_on(undisturbed, policy)
    assert opt.n_averaged == expected.n_averaged > 0
    assert opt.state_dict()["param_groups"][0]["step"] == 4
    for a, b in zip(averaged(opt), averaged(expected), strict=True):
        assert torch.equal(a, b)
    assert set(opt.state_dict()["param_groups"][0]) >= set(expected.param_groups[0])


@pytest.mark.parametrize("difference", ["implicit", "explicit", None])
def test_rsgdm_is_loaded_by_the_class_too(difference: Any) -> None:
    ours = {"cls": rf.RSGDM, "difference": difference, "average": rf.ema(0.5)}
    opt = train(make(**ours))
    other = make(**ours)
    for p, q in zip(params(other), params(opt), strict=True):
        p.data.copy_(q)
    saved = copy.deepcopy(opt.state_dict())  # torch's takes over the tensors themselves
    Optimizer.load_state_dict(other, saved)
    for a, b in zip(averaged(train(opt)), averaged(train(other)), strict=True):
        assert torch.equal(a, b)
    set_all(other)
    with pytest.raises(ValueError, match="rule is 'sgd'"):
        Optimizer.load_state_dict(other, train(make(torch.optim.SGD)).state_dict())
    with pytest.raises(ValueError, match="rule is 'sgd'"):
        other.__setstate__({"param_groups": torch.optim.SGD(params(other), lr=0.5).param_groups})
    with pytest.raises(ValueError, match="rule is"):
        Optimizer.load_state_dict(make(rf.FusedSGD), opt.state_dict())


def test_averages_that_torch_has_cast_to_16_bits_are_refused_and_cost_nothing() -> None:
    def narrow(**options: Any) -> Any:
        p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        return train(rf.FusedSGD([p], lr=0.1, momentum=0.5, **options))

    for options in ({"average": rf.ema(0.5)}, {"master_weights": True}):
        opt, saved = narrow(**options), narrow(**options).state_dict()
        before = pickle.dumps(opt.state_dict())
        with pytest.raises(ValueError, match=r"bfloat16.*float32.*use opt\.load_state_dict"):
            Optimizer.load_state_dict(opt, saved)
        assert pickle.dumps(opt.state_dict()) == before
        opt.load_state_dict(saved)


def test_a_policy_of_another_kind_is_refused_by_the_class_too() -> None:
    opt = train(make(rf.FusedSGD, average=rf.ema(0.5)))
    with pytest.raises(ValueError, match="the checkpoint's average is"):
        Optimizer.load_state_dict(make(rf.FusedSGD, average=rf.mean()), opt.state_dict())
    with opt.averaged(), pytest.raises(RuntimeError, match="inside averaged"):
        Optimizer.load_state_dict(opt, opt.state_dict())


def test_averages_without_a_count_are_refused() -> None:
    opt = train(make(rf.FusedSGD, average=rf.ema(0.5)))
    new = rf.FusedSGD.__new__(rf.FusedSGD)
    with pytest.raises(ValueError, match="counted no step"):
        new.__setstate__(copy.deepcopy(Optimizer.__getstate__(opt)))


def test_state_set_anew_is_saved_once_and_steps_in_the_backward_pass() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=0.5, average=rf.ema(0.5), in_backward=True)
    set_all(opt)
    opt.__setstate__(opt.__getstate__())
    p.sum().backward()
    opt.step()
    assert torch.equal(p, torch.full((3,), 0.5))
    assert opt.state_dict()["param_groups"][0]["average"] == rf.ema(0.5).describe()


def test_bad_groups_are_refused_and_cost_nothing() -> None:
    opt = train(make(rf.FusedSGD))
    before = pickle.dumps(opt.state_dict())
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        opt.__setstate__({"param_groups": [{**group, "lr": -1} for group in opt.param_groups]})
    assert pickle.dumps(opt.state_dict()) == before
    assert opt.param_groups[0]["lr"] == 0.5


def test_averages_start_again_where_the_state_is_cleared() -> None:
    opt = train(set_state(train(make(rf.FusedSGD, average=rf.mean()), 3)))
    assert opt.n_averaged == 2


def test_the_momentum_that_implicit_rsgdm_began_with_is_remembered() -> None:
    opt = set_all(train(make(rf.RSGDM)))
    opt.param_groups[0]["momentum"] = 0.75
    with pytest.raises(ValueError, match=r"started with 0\.5"):
        train(opt)


def test_momentum_that_an_older_torch_kept_as_none_starts_at_the_next_step() -> None:
    ours, theirs = make(rf.FusedSGD), make(torch.optim.SGD)
    for opt in (ours, theirs):
        none = {p: {"momentum_buffer": None} for p in params(opt)}
        opt.__setstate__({"state": defaultdict(dict, none)})
    alike(train(ours), train(theirs))


def test_parameters_stay_where_they_are() -> None:
    opt = train(make(rf.FusedSGD))
    addresses = [p.data_ptr() for p in params(opt)]
    assert [p.data_ptr() for p in params(set_all(opt))] == addresses


# ---- keys of a user's own ----------------------------------------------------------------------

OWN = {"step": 3, "rule": "mine", "n_averaged": 0.5, "implicit_momentum": [1], "name": "head"}


def saved_and_loaded(opt: Any, saved: Any, by_the_class: bool) -> Any:
    load = partial_load if by_the_class else type(opt).load_state_dict
    load(opt, pickle.loads(pickle.dumps(saved)))
    return opt


def partial_load(opt: Any, saved: Any) -> None:
    Optimizer.load_state_dict(opt, saved)


@pytest.mark.parametrize("by_the_class", [False, True])
@pytest.mark.parametrize("given", ["at once", "later"])
@pytest.mark.parametrize("keys", [OWN, {"step": 0}])
def test_a_users_keys_named_like_ours_come_back_from_a_checkpoint(
    keys: Any, given: str, by_the_class: bool
) -> None:
    def with_keys(values: dict[str, Any]) -> Any:
        opt = make(rf.FusedSGD, average=rf.ema(0.5))
        extra = {"params": [nn.Parameter(torch.ones(2))], **(values if given == "at once" else {})}
        opt.add_param_group(extra)
        opt.param_groups[-1].update(values)
        return opt

    opt = train(with_keys(keys))
    saved = opt.state_dict()
    assert saved["param_groups"][-1]["step"] == 2 and saved["param_groups"][-1]["n_averaged"] == 2
    assert saved["param_groups"][-1]["rule"] == "sgd"
    for other in (with_keys({}), with_keys(dict.fromkeys(keys, "stale"))):
        saved_and_loaded(other, saved, by_the_class)
        group = other.param_groups[-1]
        assert {key: group[key] for key in keys} == keys
        assert not by_the_class or "own:step" not in group
        assert other.n_averaged == 2 and other.state_dict().keys() == saved.keys()
        assert other.state_dict()["param_groups"][-1] == saved["param_groups"][-1]
        train(other)
        assert {key: group[key] for key in keys} == keys


def test_an_older_checkpoint_leaves_a_users_keys_alone() -> None:
    opt = make(rf.FusedSGD)
    saved = train(make(rf.FusedSGD)).state_dict()
    opt.param_groups[0]["step"] = 7
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["step"] == 7
    assert opt.state_dict()["param_groups"][0]["step"] == 2
