"""Elastic replicas in processes of their own: the bits of `rbwa_fused.pull_`, also overlapped.

The expected values are made in this process, from the same models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import elastic_jobs
import pytest
import torch
from elastic_jobs import DTYPES, STEPS, bytes_of, drawn, everything, learn, net, optimizer
from ranks import ranks
from torch import Tensor

import rbwa_fused as rf


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has: torch's matrix products have other bits on two."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1 - 1e-9])  # the last is 1 in float32
@pytest.mark.parametrize("world", [2, 4])
def test_a_pull_has_the_bits_of_the_pull_in_one_process(world: int, alpha: float) -> None:
    answers = ranks(world).run(elastic_jobs.pull_everything, alpha)
    for dtype in DTYPES:
        models = [drawn(rank, dtype) for rank in range(world)]
        before = [bytes_of(model) for model in models]
        mean = bytes_of(rf.Elastic(models, alpha=alpha).mean())
        rf.pull_(models, alpha)
        for rank, answer in enumerate(answers):
            ours = answer[str(dtype)]
            assert ours["weights"] == bytes_of(models[rank]) != before[rank]
            assert ours["mean"] == mean
            assert ours["told"], "autograd was not told that the weights have changed"
        if alpha == 1:
            assert all(a[str(dtype)]["weights"] == mean for a in answers)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("world", [2, 4])
def test_one_all_reduce_of_the_backend_pulls_to_rounding(
    world: int, alpha: float, overlap: bool
) -> None:
    answers = ranks(world).run(elastic_jobs.pull_by_the_backend, alpha, overlap)
    models = [[t for dtype in DTYPES for t in drawn(rank, dtype)] for rank in range(world)]
    rf.pull_(models, alpha)
    for model, answer in zip(models, answers, strict=True):
        (count,) = answer["collectives"].values()
        assert count == 2  # float32 and 16-bit weights in one, float64 in another
        for ours, theirs, mean in zip(answer["weights"], model, answer["mean"], strict=True):
            # K sums, differences and products of weights below 500; then stored with one rounding,
            # whose results are neighbours at most.
            wide = torch.float64 if theirs.dtype == torch.float64 else torch.float32
            error = world * 500 * torch.finfo(wide).eps
            unit = torch.finfo(theirs.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=unit, atol=error)
            if alpha == 1 and not overlap:
                assert torch.equal(ours, mean)
        torch.testing.assert_close(answer["equal"], drawn(7, torch.float32), rtol=2e-7, atol=0)
    if alpha == 1 and not overlap:
        first, *others = (bytes_of(answer["weights"]) for answer in answers)
        assert all(other == first for other in others)


@pytest.mark.parametrize("exact", [True, False])
def test_a_pull_takes_twice_the_weights_beside_them(exact: bool) -> None:
    for held in ranks(2).run(elastic_jobs.memory_of_a_pull, exact):
        piece = 0.5 if exact else 0  # the mean of this rank's piece, sent to all
        assert 3 <= held <= 3 + piece


def test_replicas_that_are_sharded_pull_their_shards() -> None:
    steps = 4
    answers = ranks(4).run(elastic_jobs.pull_of_shards, steps)
    models = [net(replica) for replica in range(2)]
    optimizers = [optimizer(model) for model in models]
    for step in range(1, steps + 1):
        for replica, (model, opt) in enumerate(zip(models, optimizers, strict=True)):
            for p in model.parameters():
                generator = torch.Generator().manual_seed(10 * step + replica)
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        if step % 2 == 0:
            rf.pull_(models, 0.5)
    expected = [[elastic_jobs.bits(p) for p in model.parameters()] for model in models]
    assert expected[0] != expected[1]
    assert answers == [expected[0], expected[0], expected[1], expected[1]]


def test_a_model_of_several_dtypes_is_pulled_whole() -> None:
    models = [[t for dtype in DTYPES for t in drawn(rank, dtype)[4:6]] for rank in range(2)]
    rf.pull_(models, 0.3)
    assert ranks(2).run(elastic_jobs.pull_of_mixed_dtypes) == [bytes_of(model) for model in models]


def test_three_of_four_processes_pull_and_what_is_equal_stays_as_it_is() -> None:
    """A sum of three, divided by three, would move frozen layers by a unit."""
    members = [0, 1, 3]
    models = [drawn(rank, torch.float32) for rank in members]
    rf.pull_(models, 0.3)
    answers = ranks(4).run(elastic_jobs.pull_in_a_group, members)
    assert "ValueError: this process is not in the group" in answers.pop(2)
    for model, (weights, equal) in zip(models, answers, strict=True):
        assert weights == bytes_of(model)
        assert equal == bytes_of(drawn(7, torch.float32))


def in_one_process(
    world: int, pull: Any, dtype: torch.dtype = torch.float32, masters: bool = False
) -> list[list[str | None]]:
    """K models, trained one after the other, with `pull(models, steps taken)` after each step."""
    models = [net(rank, dtype) for rank in range(world)]
    optimizers = [optimizer(model, master_weights=masters) for model in models]
    for step in range(1, STEPS + 1):
        for rank in range(world):
            learn(models[rank], optimizers[rank], rank, step)
        pull(models, step)
    return [everything(m, o) for m, o in zip(models, optimizers, strict=True)]


@pytest.mark.parametrize(("world", "every", "alpha"), [(2, 1, 0.4), (2, 3, 1.0), (4, 2, 1.0)])
def test_local_sgd_is_the_loop_in_one_process(world: int, every: int, alpha: float) -> None:
    def pull(models: Any, step: int) -> None:
        if step % every == 0:
            rf.pull_(models, alpha)

    expected = in_one_process(world, pull)
    assert ranks(world).run(elastic_jobs.local_sgd, every, alpha) == expected
    assert expected != in_one_process(world, lambda models, step: None)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_checkpoint_between_two_pulls_resumes_bit_for_bit(stop: int) -> None:
    every = 3
    resumed = ranks(2).run(elastic_jobs.local_sgd, every, 0.6, stop)
    assert resumed == ranks(2).run(elastic_jobs.local_sgd, every, 0.6)


@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "bfloat16 with masters"],
)
def test_the_schedule_and_float32_masters_are_those_of_the_replicas_in_one_process(
    dtype: torch.dtype, masters: bool
) -> None:
    epochs = 4
    models = [net(rank, dtype) for rank in range(2)]
    optimizers = [optimizer(model, master_weights=masters) for model in models]
    elastic = rf.Elastic(models, epochs=epochs)
    for epoch in range(epochs):
        for rank in range(2):
            for batch in range(2):
                learn(models[rank], optimizers[rank], rank, 2 * epoch + batch)
        elastic.pull(epoch + 1)
    expected = [everything(m, o) for m, o in zip(models, optimizers, strict=True)]
    assert ranks(2).run(elastic_jobs.scheduled_training, epochs, dtype, masters) == expected


@pytest.mark.parametrize("by_step", [True, False], ids=["step", "pull"])
@pytest.mark.parametrize(
    ("world", "every", "alpha", "dtype"),
    [(2, 1, 1.0, torch.float32), (2, 3, 0.4, torch.bfloat16), (4, 4, 1.0, torch.float32)],
)
def test_an_overlapped_pull_adds_the_correction_of_its_snapshot_and_nothing_before(
    world: int, every: int, alpha: float, dtype: torch.dtype, by_step: bool
) -> None:
    models = [net(rank, dtype) for rank in range(world)]
    optimizers = [optimizer(model) for model in models]
    corrections: list[list[Tensor]] = []

    def correct() -> None:
        for model, own in zip(models, corrections, strict=False):
            for p, correction in zip(model.parameters(), own, strict=True):
                p.data.copy_(p.data.float() + correction)

    path: list[list[list[bytes]]] = [[] for _ in range(world)]
    for step in range(1, STEPS + 1):
        for rank in range(world):
            learn(models[rank], optimizers[rank], rank, step)
        if step % every == 0:
            correct()
            starts = [[p.detach().float() for p in model.parameters()] for model in models]
            means = rf.Elastic(starts, alpha=1.0).mean()
            corrections = [
                [torch.tensor(alpha) * (m - s) for s, m in zip(start, means, strict=True)]
                for start in starts
            ]
        for rank in range(world):
            path[rank].append(bytes_of(models[rank].parameters()))
    correct()
    for rank, answer in enumerate(
        ranks(world).run(elastic_jobs.overlapped, every, alpha, dtype, by_step)
    ):
        assert answer["path"] == [*path[rank], bytes_of(models[rank].parameters())]
        assert all("RuntimeError" in r and "call wait()" in r for r in answer["refusals"])
        assert answer["saved"] == {"steps": STEPS if by_step else 0}
        assert path[rank][-1] != answer["path"][-1]
        assert answer["halfway"] == [
            by_step and every > 1 and step > every and step % every >= every // 2
            for step in range(1, STEPS + 1)
        ], "the second half was not exchanged while the training went on"


def test_the_mean_is_evaluated_with_each_models_own_buffers() -> None:
    answers = ranks(2).run(elastic_jobs.evaluate_the_mean)
    for answer in answers:
        assert not answer["moved"]
        assert "ValueError" in answer["foreign"] and "is pulled" in answer["foreign"]
        for name, value in answer["averaged"].items():
            own = answer["own"][name]
            if "running" in name or "num_batches" in name:
                assert value == own
            else:
                others = [torch.tensor(a["own"][name]) for a in answers]
                mean = (others[0].double() + others[1].double()) / 2
                assert torch.allclose(torch.tensor(value).double(), mean, rtol=0, atol=1e-7)
                assert name == "1.weight" or name == "1.bias" or value != own


DIFFERENT = {
    "shape": r"parameter 0 = torch.float32 of shape \(3,\) on cpu \(expected .*\(2,\)",
    "dtype": r"parameter 0 = torch.float64 of shape",
    "count": r"parameters = 2 \(expected 1, as rank 0\)",
    "every": r"every = 2 \(expected 1",
    "alpha": r"alpha = 0.25 \(expected 0.5",
    "epochs": r"epochs = 3 \(expected 4",
    "schedule": r"alpha = a function \(expected 0.5",
    "overlap": r"overlap = True \(expected False",
    "no floats": "torch.int32",
    "tied": "parameter 0 shares memory with another one",
    "no model": "Invalid model: a Tensor",
    "alpha too large": "Invalid alpha: 1.5",
    "no steps": "Invalid every: 0",
}


def test_ranks_that_do_not_fit_together_are_refused_on_all_of_them_by_name() -> None:
    first, second = ranks(2).run(elastic_jobs.arguments_that_differ)
    assert first.keys() == second.keys() == DIFFERENT.keys()
    for name, message in DIFFERENT.items():
        with pytest.raises(AssertionError, match=f"(ValueError|TypeError): rank 1.*{message}"):
            raise AssertionError(first[name])
        with pytest.raises(AssertionError, match=f"(ValueError|TypeError): .*{message}"):
            raise AssertionError(second[name])


def test_mistakes_are_named_and_nothing_is_written() -> None:
    for answer in ranks(2).run(elastic_jobs.use_out_of_range):
        assert answer.pop("kept")
        assert "TypeError: finished_epochs is missing" in answer["no count"]
        assert "TypeError: finished_epochs is missing" in answer["no count in step"]
        assert "ValueError: Invalid finished_epochs: 3" in answer["too many"]
        assert "ValueError: Invalid state_dict" in answer["a strange checkpoint"]
        assert "ValueError: Invalid steps: -1" in answer["a strange count"]
        assert "shape (3, 1) on cpu (it was torch.float32" in answer["another shape"]
        assert "the model has 3 parameters (it had 2)" in answer["another count"]
