"""What stands in opt.state at the time of a step is what the step reads and writes, as in torch.

All numbers are small sums of powers of 2, so that nothing is rounded here or there.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import held

STREAM = "momentum_buffer"


def params(count: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(-3.0, 4.0 + i) / 8) for i in range(count)]


def train(opt: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for group in opt.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = torch.full_like(p, 0.5 + i + step)
        opt.step()


def pair(**options: Any) -> tuple[Any, Any]:
    """Ours and torch's, after two steps that were the same."""
    ours = rf.FusedSGD(params(), lr=0.125, momentum=0.75, **options)
    theirs = torch.optim.SGD(params(), lr=0.125, momentum=0.75)
    for opt in (ours, theirs):
        train(opt, 1, 2)
    return ours, theirs


def first(opt: Any) -> nn.Parameter:
    param: nn.Parameter = opt.param_groups[0]["params"][0]
    return param


def assign(opt: Any) -> Tensor:
    tensor = torch.full((7,), 0.25)
    opt.state[first(opt)][STREAM] = tensor
    return tensor


def data(opt: Any) -> Tensor:
    opt.state[first(opt)][STREAM].data = torch.full((7,), 0.25)
    return opt.state[first(opt)][STREAM]  # type: ignore[no-any-return]


def set_(opt: Any) -> Tensor:
    with torch.no_grad():
        opt.state[first(opt)][STREAM].set_(torch.full((7,), 0.25))
    return opt.state[first(opt)][STREAM]  # type: ignore[no-any-return]


def shared(opt: Any) -> Tensor:
    return opt.state[first(opt)][STREAM].share_memory_()  # type: ignore[no-any-return]


def new_dict(opt: Any) -> Tensor:
    tensor = torch.full((7,), 0.25)
    opt.state[first(opt)] = {STREAM: tensor}
    return tensor


def new_state(opt: Any) -> Tensor:
    opt.state = defaultdict(dict, {p: dict(value) for p, value in opt.state.items()})
    return opt.state[first(opt)][STREAM]  # type: ignore[no-any-return]


def behind_the_dicts_back(opt: Any) -> Tensor:
    tensor = torch.full((7,), 0.25)
    dict.update(opt.state[first(opt)], {STREAM: tensor})
    return tensor


ADOPTED = [assign, data, set_, shared, new_dict, new_state, behind_the_dicts_back]


@pytest.fixture(params=["compiled", "python"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at the state."""
    if request.param == "python":
        monkeypatch.setattr(held, "_C", None)


@pytest.mark.parametrize("edit", ADOPTED)
def test_a_tensor_of_a_users_is_stepped_where_it_lies(
    edit: Callable[[Any], Tensor], asked: None
) -> None:
    ours, theirs = pair()
    tensor, other = edit(ours), edit(theirs)
    others = [ours.state[p][STREAM] for p in ours.param_groups[0]["params"][1:]]
    address = tensor.data_ptr()
    for opt in (ours, theirs):
        train(opt, 3, 5)
    assert torch.equal(tensor, other)
    assert ours.state[first(ours)][STREAM] is tensor and tensor.data_ptr() == address
    for p, kept in zip(ours.param_groups[0]["params"][1:], others, strict=True):
        assert ours.state[p][STREAM] is kept  # nobody else's was replaced
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def empty(opt: Any) -> None:
    opt.state[first(opt)] = {}


def pop(opt: Any) -> None:
    opt.state.pop(first(opt))


def clear(opt: Any) -> None:
    opt.state.clear()


def none(opt: Any) -> None:
    opt.state[first(opt)][STREAM] = None


def popped(opt: Any) -> None:
    opt.state[first(opt)].pop(STREAM)


@pytest.mark.parametrize("edit", [empty, pop, clear, popped])
def test_state_that_is_taken_away_starts_again_as_in_torch(
    edit: Callable[[Any], None], asked: None
) -> None:
    ours, theirs = pair()
    kept = [ours.state[p][STREAM] for p in ours.param_groups[0]["params"][1:]]
    for opt in (ours, theirs):
        edit(opt)
        train(opt, 3, 5)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q) and torch.equal(ours.state[p][STREAM], theirs.state[q][STREAM])
    if edit is not clear:
        for p, tensor in zip(ours.param_groups[0]["params"][1:], kept, strict=True):
            assert ours.state[p][STREAM] is tensor


MANY = [
    (lambda ps: rf.FusedAdamW(ps, lr=0.125), ("step", "exp_avg", "exp_avg_sq")),
    (lambda ps: rf.AdamWScheduleFree(ps, lr=0.125), ("step", "z", "exp_avg_sq")),
    (
        lambda ps: rf.RSGDM(ps, lr=0.125, difference="explicit"),
        ("momentum_buffer", "difference_buffer", "previous_gradient"),
    ),
]


@pytest.mark.parametrize("value", ["gone", None])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(("made", "keys"), MANY, ids=["adamw", "schedule-free", "rsgdm"])
def test_a_part_of_a_state_that_is_taken_away_raises_and_the_rest_is_kept(
    made: Callable[..., Any], keys: tuple[str, ...], index: int, value: str | None, asked: None
) -> None:
    opt = made(params())
    if isinstance(opt, rf.AdamWScheduleFree):
        opt.train()
    train(opt, 1, 2)
    weights, own = first(opt).detach().clone(), opt.state[first(opt)]
    whole = {key: tensor.clone() for key, tensor in own.items()}
    taken = own.pop(keys[index])
    if value is None:
        own[keys[index]] = None
    others = tuple(key for key in keys if key != keys[index])
    with pytest.raises(ValueError, match=re.escape(f"parameter 0 has {others}, not all of {keys}")):
        train(opt, 3, 3)
    assert torch.equal(first(opt), weights)
    assert all(torch.equal(own[key], whole[key]) for key in others)
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        with pytest.raises(ValueError, match="parameter 0 has "):
            copied(opt)
    own[keys[index]] = taken
    train(opt, 3, 3)
    added = nn.Parameter(torch.ones(7))
    opt.state[added] = {keys[1]: torch.zeros(7)}
    with pytest.raises(ValueError, match="parameter 0 has "):
        opt.add_param_group({"params": [added]})
    del opt.state[added]
    train(opt, 3, 3)
    own.clear()
    train(opt, 4, 4)
    assert opt.state[first(opt)].keys() == whole.keys()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, r"Invalid momentum_buffer of parameter 0: 0\.5 \(expected a tensor\)"),
        (torch.ones(7).to_sparse(), r"torch\.sparse_coo on cpu \(expected a dense real one\)"),
        (torch.ones(7, device="meta"), r"torch\.strided on meta \(expected a dense real one\)"),
        (
            torch.ones(7) * 1j,
            r"torch\.complex64, torch\.strided on cpu \(expected a dense",
        ),
    ],
    ids=["number", "sparse", "meta", "complex"],
)
def test_state_that_no_step_can_go_on_with_is_named(value: Any, said: str, asked: None) -> None:
    opt, _ = pair()
    weights = first(opt).detach().clone()
    opt.state[first(opt)][STREAM] = value
    with pytest.raises(TypeError, match=said):
        train(opt, 3, 3)
    assert torch.equal(first(opt), weights)


@pytest.mark.parametrize("value", [[5], 10**400, torch.ones(2), 1j], ids=str)
def test_a_step_that_is_no_number_is_named(value: Any) -> None:
    opt = rf.FusedAdam(params())
    train(opt, 1, 1)
    opt.state[first(opt)]["step"] = value
    with pytest.raises(TypeError, match=r"Invalid step of parameter 0: .* \(expected a number\)"):
        train(opt, 2, 2)


def all_none(opt: Any) -> None:
    opt.state[first(opt)] = None


@pytest.mark.parametrize("edit", [none, all_none])
def test_none_is_state_that_is_not_there(edit: Callable[[Any], None], asked: None) -> None:
    ours, _ = pair()
    theirs, _ = pair()
    edit(ours), popped(theirs)
    for opt in (ours, theirs):
        train(opt, 3, 4)
    assert torch.equal(ours.state[first(ours)][STREAM], theirs.state[first(theirs)][STREAM])


@pytest.mark.parametrize("average", [None, rf.ema(0.5)], ids=["no average", "ema"])
def test_a_reference_to_a_buffer_stays_live_across_loading_and_new_groups(average: Any) -> None:
    opt = rf.FusedSGD(params(), lr=0.125, momentum=0.75, average=average)
    train(opt, 1, 2)
    held_by_user = [value for p in opt.state for value in opt.state[p].values()]
    saved = copy.deepcopy(opt.state_dict())
    train(opt, 3, 3)
    opt.load_state_dict(saved)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    train(opt, 3, 4)
    now = [value for p in list(opt.state)[:3] for value in opt.state[p].values()]
    assert all(a is b for a, b in zip(held_by_user, now, strict=True))


def test_one_tensor_for_two_parameters_is_not_stepped_twice() -> None:
    opt = rf.FusedSGD([nn.Parameter(torch.ones(5)) for _ in range(2)], lr=0.125, momentum=0.75)
    train(opt, 1, 1)
    one, other = opt.param_groups[0]["params"]
    opt.state[other][STREAM] = opt.state[one][STREAM]
    train(opt, 2, 2)
    assert opt.state[one][STREAM].data_ptr() != opt.state[other][STREAM].data_ptr()


def test_a_tensor_that_no_kernel_can_step_is_replaced_by_one_that_can_be() -> None:
    ours, _ = pair()
    wide = torch.arange(14.0)[::2]
    ours.state[first(ours)][STREAM] = wide
    train(ours, 3, 3)
    assert wide.tolist() == list(range(0, 14, 2))
    assert ours.state[first(ours)][STREAM].is_contiguous()


def test_a_buffer_made_smaller_is_refused_by_its_shape() -> None:
    ours, _ = pair()
    ours.state[first(ours)][STREAM].resize_(3)
    with pytest.raises(ValueError, match=r"has shape \(7,\), its momentum_buffer \(3,\)"):
        train(ours, 3, 3)


def test_state_is_plain_containers_wherever_it_goes() -> None:
    opt, _ = pair(average=rf.ema(0.5))
    saved = opt.state_dict()
    assert type(opt.state) is defaultdict
    assert {type(value) for value in (*opt.state.values(), *saved["state"].values())} == {dict}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["state"].keys() == saved["state"].keys()


def test_loading_is_refused_before_anything_changes_where_a_parameter_cannot_be_stepped() -> None:
    opt, _ = pair()
    saved = copy.deepcopy(opt.state_dict())
    train(opt, 3, 3)
    before = {p: opt.state[p][STREAM].clone() for p in opt.state}
    opt.param_groups[0]["lr"] = 0.5
    first(opt).data = first(opt).data.to(torch.complex64)
    with pytest.raises(TypeError, match=r"parameter 0 has dtype torch\.complex64"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.5
    assert all(torch.equal(opt.state[p][STREAM], value) for p, value in before.items())


def unaveraged(opt: Any) -> None:
    opt.state[first(opt)].pop("average")


@pytest.mark.parametrize("edit", [all_none, empty, unaveraged])
def test_an_average_that_is_taken_away_is_a_copy_at_its_next_sample(
    edit: Callable[[Any], None], asked: None
) -> None:
    opt, _ = pair(average=rf.ema(0.5, every=2))
    train(opt, 3, 4)
    edit(opt)
    train(opt, 5, 5)  # takes no sample
    assert "average" not in opt.state[first(opt)] and opt.n_averaged == 2
    train(opt, 6, 6)
    copy_ = first(opt).detach().clone()
    assert torch.equal(opt.state[first(opt)]["average"], copy_) and opt.n_averaged == 3
    train(opt, 7, 8)
    expected = copy_ + 0.5 * (first(opt).detach() - copy_)
    assert torch.equal(opt.state[first(opt)]["average"], expected)


@pytest.mark.parametrize("edit", [all_none, empty, unaveraged])
def test_an_average_that_is_taken_away_is_a_copy_at_once_where_a_sample_is_due(
    edit: Callable[[Any], None], asked: None
) -> None:
    opt, _ = pair(average=rf.ema(0.5))
    edit(opt)
    train(opt, 3, 3)
    assert torch.equal(opt.state[first(opt)]["average"], first(opt).detach())


def test_a_tensor_that_requires_gradients_becomes_state_that_does_not(asked: None) -> None:
    opt, _ = pair()
    opt.state[first(opt)][STREAM] = torch.ones(7, requires_grad=True)
    train(opt, 3, 4)
    assert not opt.state[first(opt)][STREAM].requires_grad


def test_state_assigned_before_the_first_step_is_its_users(asked: None) -> None:
    """It is saved though no step has followed it; an average without a count is refused."""
    opt = rf.FusedSGD(params(), lr=0.125, momentum=0.75, average=rf.ema(0.5))
    buffer, average = torch.ones(7), torch.ones(7)
    opt.state[first(opt)][STREAM] = buffer
    assert opt.state_dict()["state"][0][STREAM] is buffer
    opt.state[first(opt)]["average"] = average
    with pytest.raises(ValueError, match="counted no step"):
        train(opt, 1, 1)
    assert opt.state[first(opt)]["average"] is average
    del opt.state[first(opt)]["average"]
    train(opt, 1, 1)
    assert opt.state[first(opt)][STREAM] is buffer


def test_a_shallow_copy_of_the_whole_state_is_the_state_from_then_on(asked: None) -> None:
    """All dicts in it are the old ones; what a parameter comes to need must go into the new one."""
    opt, _ = pair()
    late = nn.Parameter(torch.zeros(7))
    opt.add_param_group({"params": [late]})
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.state = defaultdict(dict, opt.state)
    train(opt, 3, 3)
    assert STREAM in opt.state[late]


def test_two_parameters_whose_state_was_exchanged_step_with_each_others(asked: None) -> None:
    """By their keys alone: the dicts stand where they stood, in their order."""
    ends = []
    for cls in (rf.FusedSGD, torch.optim.SGD):
        p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        opt: Any = cls([p, q], lr=0.125, momentum=0.75)
        train(opt, 1, 2)
        of_p, of_q = opt.state[p], opt.state[q]
        opt.state.clear()
        opt.state[q] = of_p
        opt.state[p] = of_q
        train(opt, 3, 3)
        ends.append((p.tolist(), q.tolist()))
    assert ends[0] == ends[1]


def test_a_buffer_under_another_name_is_none(asked: None) -> None:
    ours, theirs = pair()
    for opt in (ours, theirs):
        held = opt.state[first(opt)]
        held["mine"] = held.pop(STREAM)
        train(opt, 3, 3)
    assert torch.equal(first(ours), first(theirs))
    assert torch.equal(ours.state[first(ours)]["mine"], theirs.state[first(theirs)]["mine"])


def test_a_buffer_seen_the_other_way_round_is_another(asked: None) -> None:
    """At the same address."""
    ends = []
    for cls in (rf.FusedSGD, torch.optim.SGD):
        p = nn.Parameter(torch.zeros(2, 2))
        opt: Any = cls([p], lr=0.125, momentum=0.75)
        for _ in range(2):
            p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            opt.step()
            opt.state[p][STREAM] = opt.state[p][STREAM].t()
        opt.step()
        ends.append(p.tolist())
    assert ends[0] == ends[1]
