"""DistributedDataParallel: every method steps on all ranks alike, as one process would.

Two ranks are compared bit for bit: DistributedDataParallel divides by the number of ranks before it
adds, and a sum of two does not depend on its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ddp_jobs
import pytest
import torch
from ddp_jobs import WAYS, alone, images, normed, tensors_of
from ranks import ranks
from runs import METHODS, STEPS, result

FEW = ["nesterov", "rsgdm explicit lookahead", "ema", "rbwa", "switch_ema", "scheduled"]
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has: torch's matrix products have other bits on two."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_process_to_the_last_bit(method: str) -> None:
    model, opt = alone(method, world=2)
    expected = {"result": result(opt), "tensors": tensors_of(model, opt)}
    assert expected["result"] != result(alone(method, world=1)[1])
    for answer in ranks(2).run(ddp_jobs.data_parallel, method, list(WAYS), FLOAT, {}):
        assert len(answer) == 2 * len(WAYS)
        for way, ours in answer.items():
            assert ours == expected, way


@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"flatten": False}], ids=str)
def test_two_ranks_train_bfloat16_weights_as_one_process(options: dict[str, Any]) -> None:
    expected = result(alone("ema", 2, dtype=torch.bfloat16, **options)[1])
    job = ddp_jobs.data_parallel, "ema", ["bucket view"], torch.bfloat16, options
    for answer in ranks(2).run(*job):
        for way, ours in answer.items():
            assert ours["result"] == expected, way


@pytest.mark.parametrize("method", FEW)
def test_four_ranks_agree_to_the_last_bit_and_with_one_process_but_for_a_sums_order(
    method: str,
) -> None:
    """A sum of four rounds three times and a momentum of 0.9 adds up ten sums: 30 roundings, each
    by half a unit of a number below 4, which is 2 eps."""
    model, opt = alone(method, world=4)
    others = tensors_of(*alone(method, world=3))
    answers = ranks(4).run(ddp_jobs.data_parallel, method, ["plain", "bucket view"], FLOAT, {})
    assert all(answer == answers[0] for answer in answers)
    for way, ours in answers[0].items():
        far = 0.0
        for tensor, expected, other in zip(
            ours["tensors"], tensors_of(model, opt), others, strict=True
        ):
            for a, b, c in zip(tensor, expected, other, strict=True):
                assert abs(a) < 4 and abs(a - b) <= 60 * torch.finfo(FLOAT).eps, way
                far = max(far, abs(a - c))
        assert far > 0.01, "three ranks would have passed for four"


def test_ranks_that_nothing_synchronizes_go_apart() -> None:
    """What the tests above would see without DistributedDataParallel."""
    first, second = ranks(2).run(ddp_jobs.without_synchronization, "ema")
    assert first["weights"] != second["weights"] and first["state"] != second["state"]


@pytest.mark.parametrize("method", FEW)
def test_gradients_accumulated_under_no_sync_are_those_of_one_process(method: str) -> None:
    expected = result(alone(method, world=2, batches=2)[1])
    assert expected != result(alone(method, world=2)[1])
    for answer in ranks(2).run(ddp_jobs.accumulated, method):
        assert answer == [expected, expected]


@pytest.mark.parametrize("method", FEW)
def test_a_checkpoint_of_rank_0_resumes_all_ranks_bit_for_bit(method: str) -> None:
    stop = 6
    (saved, before), (nothing, _) = ranks(2).run(ddp_jobs.go_on_from, method, None, stop)
    assert nothing is None
    expected = result(alone(method, world=2)[1])
    assert expected != before
    for _, resumed in ranks(2).run(ddp_jobs.go_on_from, method, saved, stop):
        assert resumed == expected


def test_batchnorm_and_the_averages_evaluation_are_the_same_on_all_ranks() -> None:
    """DistributedDataParallel broadcasts rank 0's buffers before each forward pass."""
    model = normed()
    opt = ddp_jobs.ema_of(model)
    params = list(model.parameters())
    for step in range(1, STEPS + 1):
        total = [torch.zeros_like(p) for p in params]
        before = [b.clone() for b in model.buffers()]
        for rank in (1, 0):  # rank 0's buffers are those that stay
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
            model.zero_grad()
            model(images(rank, step)).square().mean().backward()
            for sum_, p in zip(total, params, strict=True):
                sum_ += p.grad / 2
        for sum_, p in zip(total, params, strict=True):
            p.grad = sum_
        opt.step()
    first, second = ranks(2).run(ddp_jobs.with_batchnorm)
    assert first["result"] == second["result"] == result(opt)
    assert first["buffers"] == ddp_jobs.buffers(model) != second["buffers"]
    assert first["estimated"] == second["estimated"] != first["buffers"]
    assert first["evaluated"] == second["evaluated"]
    assert first["again"] and second["again"]


# ---- uneven inputs, and state taken over ---------------------------------------------------------


@pytest.mark.parametrize("counts", [[5, 9], [9, 4]])
@pytest.mark.parametrize("method", FEW)
def test_ranks_with_fewer_batches_end_with_the_state_of_those_with_more(
    method: str, counts: list[int]
) -> None:
    answers = ranks(2).run(ddp_jobs.uneven, method, counts, True)
    model, opt = ddp_jobs.build(method)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    params = list(model.parameters())
    for step in [*range(1, max(counts) + 1), 40, 41]:
        if step == 40:
            at_the_end = result(opt), schedule.last_epoch
        total = [torch.zeros_like(p) for p in params]
        for rank in range(2):
            if step <= counts[rank] or step >= 40:
                model.zero_grad()
                model(ddp_jobs.batch_of(rank, step)).backward()
                for sum_, p in zip(total, params, strict=True):
                    sum_ += p.grad / 2
        for sum_, p in zip(total, params, strict=True):
            p.grad = sum_
        opt.step()
        schedule.step()
    for answer in answers:
        assert answer == {"joined": at_the_end, "later": result(opt)}


def test_without_joined_momentum_and_averages_lag_behind_and_weights_go_apart() -> None:
    """What the test above would see: the model is all that DistributedDataParallel broadcasts."""
    short, long = ranks(2).run(ddp_jobs.uneven, "ema", [5, 9], False)
    assert short["joined"][0]["weights"] == long["joined"][0]["weights"]
    assert short["joined"][0]["state"] != long["joined"][0]["state"]
    assert short["later"]["weights"] != long["later"]["weights"]


def test_of_several_ranks_that_join_last_the_largest_is_followed() -> None:
    answers = ranks(4).run(ddp_jobs.uneven, "ema", [6, 3, 6, 2], True)
    assert all(answer == answers[2] for answer in answers)


def test_an_optimizer_before_its_model_is_refused_instead_of_waiting_for_ever() -> None:
    for message in ranks(2).run(ddp_jobs.joined_first):
        assert "expected the model there" in message


@pytest.mark.parametrize("steps", [[5, 0], [0, 5], [7, 4]], ids=str)
@pytest.mark.parametrize("method", FEW)
def test_all_state_of_one_rank_can_be_taken_over_also_none(method: str, steps: list[int]) -> None:
    answers = ranks(2).run(ddp_jobs.taken_over, method, steps, 0)
    leader = answers[0]["before"]
    assert answers[1]["before"]["groups"] != leader["groups"]
    for answer in answers:
        assert answer["weights kept"]
        for what in ("state", "groups", "n_averaged"):
            assert answer["after"][what] == leader[what]


def test_masters_a_tensor_lr_other_optimizers_and_schedulers_are_taken_over_in_a_group() -> None:
    first, second = ranks(2).run(ddp_jobs.taken_over_elsewhere)
    assert first == second
    for state, lr, steps in first.values():
        assert state and lr > 0 and steps == 4


def test_a_schedulers_state_keeps_its_class() -> None:
    first, second = ranks(2).run(ddp_jobs.milestones_taken_over)
    assert first == second and type(first[0]) is type(second[0])


def test_state_that_no_one_rank_has_is_not_taken_over() -> None:
    first, second = ranks(2).run(ddp_jobs.refused_to_take_over)
    for answer in (first, second):
        for name in ("shards", "joined shards"):
            assert answer[name].startswith("TypeError: Invalid opt: it has DTensor parameters")
    assert first["outside"] == "nothing was raised"
    assert second["outside"] == "ValueError: this process is not in the group"
