"""ZeroRedundancyOptimizer: sharded state, and the bits of a run that shards nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zero_jobs
from ddp_jobs import Driven, alone, batch_of
from ranks import ranks
from runs import AVERAGED, METHODS, STEPS
from zero_jobs import held, weights

import rbwa_fused as rf

FEW = ["nesterov", "rsgdm explicit lookahead", "ema", "rbwa", "switch_ema"]
STOP = 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has: torch's matrix products have other bits on two."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def compare(answers: list[Any], model: Driven, opt: Any) -> None:
    after, saved = weights(model), held(opt.state_dict())
    with opt.averaged():
        live = weights(model)
    assert sum(answer[0]["own"] for answer in answers) == len(opt.state)
    for rank, answer in enumerate(answers):
        for ours in answer:
            assert ours["weights"] == after == ours["again"]
            assert ours["averaged"] == live
            assert ours.get("n_averaged", opt.n_averaged) == opt.n_averaged
            if rank == 1 and "n_averaged" in ours:
                assert ours["saved"] == saved


@pytest.mark.parametrize("method", METHODS)
def test_sharded_training_evaluation_and_checkpoints_are_those_of_one_process(method: str) -> None:
    model, opt = alone(method, world=2)
    answers = ranks(2).run(zero_jobs.trained, method, {})
    keeps = METHODS[method].rule.keeps or method in AVERAGED
    assert not keeps or all(0 < answer[0]["own"] < 5 for answer in answers)
    compare(answers, model, opt)


def test_masters_of_sharded_bfloat16_weights_are_those_of_one_process() -> None:
    options = {"master_weights": True, "dtype": torch.bfloat16}
    model, opt = alone("ema", world=2, **options)
    compare(ranks(2).run(zero_jobs.trained, "ema", options), model, opt)


@pytest.mark.parametrize("method", METHODS)
def test_a_consolidated_checkpoint_resumes_sharded_or_whole_bit_for_bit(method: str) -> None:
    saved, nothing = ranks(2).run(zero_jobs.saved_at, method, STOP)
    assert nothing is None
    model, opt = alone(method, world=2)
    after, state = weights(model), held(opt.state_dict())
    for rank, answer in enumerate(ranks(2).run(zero_jobs.resumed_from, method, saved, STOP)):
        for ours in answer:
            assert ours["weights"] == after
            assert rank == 1 or ours["saved"] == state
    whole, one = alone(method, world=2, resumed=torch.load(io.BytesIO(saved)), first=STOP + 1)
    assert weights(whole) == after and held(one.state_dict()) == state


def test_a_checkpoint_of_a_run_without_shards_is_gone_on_with_on_four_ranks() -> None:
    stopped, one = alone("ema", world=4, counts=[STOP] * 4)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": one.state_dict()}, file)
    saved = ranks(4).run(zero_jobs.saved_at, "ema", STOP)[0]
    ours = ranks(4).run(zero_jobs.resumed_from, "ema", file.getvalue(), STOP)
    theirs = ranks(4).run(zero_jobs.resumed_from, "ema", saved, STOP)
    groups = [answers[0][0]["saved"]["groups"] for answers in (ours, theirs)]
    assert groups[0] == groups[1] and groups[0][0]["step"] == STEPS
    assert all(answer[0]["weights"] == ours[0][0]["weights"] for answer in ours)


@pytest.mark.parametrize("method", ["ema", "rsgdm explicit lookahead"])
def test_hyperparameters_changed_on_the_outer_object_reach_the_inner_one(method: str) -> None:
    model, opt = alone(method, world=2, counts=[0, 0])
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)
    for step in range(1, STEPS + 1):
        alone_step(model, opt, step)
        schedule.step()
        if step == 5:
            opt.param_groups[0]["weight_decay"] = 0.2
    answers = ranks(2).run(zero_jobs.scheduled, method)
    before_the_last = [group["lr"] for group in opt.param_groups]
    for answer in answers:
        assert answer["weights"] == weights(model)
        assert answer["rates"] == before_the_last
    assert weights(model) != weights(alone(method, world=2)[0])


def alone_step(model: Driven, opt: Any, step: int) -> None:
    params = list(model.parameters())
    total = [torch.zeros_like(p) for p in params]
    for rank in range(2):
        model.zero_grad()
        model(batch_of(rank, step)).backward()
        for sum_, p in zip(total, params, strict=True):
            sum_ += p.grad / 2
    for sum_, p in zip(total, params, strict=True):
        p.grad = sum_
    opt.step()


def test_a_group_added_without_an_average_is_stepped_and_not_averaged() -> None:
    model = Driven()
    named = dict(model.named_parameters())
    late = [named.pop("matrix"), named.pop("late")]
    opt = rf.FusedSGD(named.values(), lr=0.05, momentum=0.9, average=rf.ema(0.8))
    for step in range(1, STEPS + 1):
        if step == 3:
            opt.add_param_group({"params": late, "average": False, "lr": 0.01})
        alone_step(model, opt, step)
    after = weights(model)
    with opt.averaged():
        live = weights(model)
    assert live != after
    assert ranks(2).run(zero_jobs.an_added_group) == [after + live] * 2


def test_ranks_without_a_parameter_of_their_own_take_part() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.mean())
    for step in range(4):
        opt.zero_grad()
        model(torch.full((1, 3), float(1 + step))).square().sum().backward()
        opt.step()
    after, saved = weights(model), held(opt.state_dict())
    with opt.averaged():
        live = weights(model)
    answers = ranks(4).run(zero_jobs.fewer_parameters_than_ranks)
    assert [answer["own"] for answer in answers] == [1, 1, 0, 0]
    assert all(a["weights"] == after and a["averaged"] == live for a in answers)
    assert answers[-1]["saved"] == saved


def test_training_weights_are_back_after_an_exception_and_batchnorm_is_re_estimated() -> None:
    first, second = ranks(2).run(zero_jobs.evaluated)
    assert first == second
    assert first["exactly"] and first["inside"] != first["before"]
    assert first["told"], "autograd was not told that the weights have changed"
    assert first["raised"] == "'during evaluation'" and first["estimated"]


def test_steps_that_one_rank_did_not_count_are_told_when_saving() -> None:
    for answer in ranks(2).run(zero_jobs.counted_apart):
        assert len(answer["warned"]) == 1 and "counted different steps" in answer["warned"][0]
        assert answer["steps"] == 3


def test_counters_of_groups_that_some_ranks_have_not_started_are_saved_without_a_warning() -> None:
    model = Driven()
    opt = rf.RSGDM(zero_jobs.in_groups(model), lr=0.05)
    zero_jobs.learn_in_groups(model, opt)
    first, second = ranks(2).run(zero_jobs.groups_of_some_ranks)
    assert (first["own"], second["own"]) == ([1, 1, 1], [1, 1, 0])
    assert first["warned"] == second["warned"] == []
    assert first["saved"] == held(opt.state_dict())


REFUSED = {
    "another policy": ("ValueError", "the checkpoint's average is Average(Ema(decay=0.8)"),
    "another number of groups": ("ValueError", "groups of [4] parameters (expected [4, 1])"),
    "another optimizer": ("TypeError", "Invalid optimizer_class: <class 'torch.optim.sgd.SGD'>"),
    "buffers": ("ValueError", "(expected an Averager with buffers=True behind it)"),
    "capturable": ("ValueError", "steps that moved other ranks' parameters alone (expected False)"),
    "no averages": ("TypeError", "Invalid opt: ZeroRedundancyOptimizer over Adam"),
    "no sharding": ("TypeError", "Invalid opt: FusedSGD over NoneType"),
    "a group inside": ("RuntimeError", "add_param_group() inside averaged()"),
    "joined": ("TypeError", "ranks differ in their state"),
    "uneven": ("RuntimeError", "with old gradients"),
    "not consolidated": ("RuntimeError", "consolidate_state_dict"),
    "overlapped": ("ValueError", "functional"),
}


def test_parameters_made_to_share_memory_inside_have_their_own_weights_again() -> None:
    for before, after in ranks(2).run(zero_jobs.made_to_share_memory_inside):
        assert after == before


def test_mistakes_are_refused_by_name_and_nothing_is_written() -> None:
    for answer in ranks(2).run(zero_jobs.refusals):
        assert answer.pop("untouched") == "True"
        assert answer.keys() == REFUSED.keys()
        for name, (error, message) in REFUSED.items():
            assert error in answer[name] and message in answer[name], name


def test_torchs_own_class_does_not_go_on_silently_without_its_counters() -> None:
    for message in ranks(2).run(zero_jobs.resumed_by_torchs_class):
        assert "ValueError: averages were assigned to an optimizer" in message
        assert "rbwa_fused.distributed.ZeroRedundancyOptimizer does" in message
