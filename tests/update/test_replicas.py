"""Elastic replicas: K models pulled to their mean, by the formula and on every backend."""

from __future__ import annotations

import copy
import doctest
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, params
from emulation import emulated
from test_methods import quadratic
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import _C, papers, reference
from rbwa_fused.engine import backends

PULL = torch.ops.rbwa_fused.pull_.default
COUNTS = (1, 2, 3, 5)
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 255, 257, 1023, 1025, 4097, 3 * 4096 + 5)


def drawn(dtype: torch.dtype, count: int) -> list[list[Tensor]]:
    """`count` models of every size and layout of cases.py, and of SIZES."""
    generator = torch.Generator().manual_seed(count)
    models = []
    for k in range(count):
        own = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in SIZES]
        models.append([*(p.detach() for p in params(dtype, seed=100 + k)), *own])
    return models


def dense(models: list[list[Tensor]]) -> list[list[Tensor]]:
    """What an operator takes; the others go through plain torch."""
    fits = [backends.is_dense(p) for p in models[0]]
    return [list(itertools.compress(model, fits)) for model in models]


def by_reference(models: list[list[Tensor]], alpha: float) -> None:
    for replicas in zip(*models, strict=True):
        reference.pull_(replicas, alpha)


def by_operator(models: list[list[Tensor]], alpha: float) -> None:
    PULL([p for model in models for p in model], len(models), alpha)


def by_emulated_cuda(models: list[list[Tensor]], alpha: float) -> None:
    emulated().pull([p for model in models for p in model], len(models), alpha)


def assert_same_bits(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert torch.equal(a, b) and torch.equal(whole(a), whole(b))


def whole(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's storage: what lies between its elements too."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pull_is_its_formula(dtype: torch.dtype, count: int) -> None:
    """In units of the largest replica's weight: the sum rounds each of K distances of up to twice
    that weight, and the mean and the pull some four times; 16 bits round once more, by half a
    unit (by a whole one of the smallest numbers, below the normal ones)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for alpha in (0.25, 0.7, 1.0):
        models = drawn(dtype, count)
        before = [[p.double().clone() for p in model] for model in models]
        rf.pull_(models, alpha)
        for after, old in zip(zip(*models, strict=True), zip(*before, strict=True), strict=True):
            mean = sum(old) / count
            largest = torch.stack(old).abs().amax(0)
            error = (2 * count + 4) * torch.finfo(wide).eps * largest
            if dtype != wide:
                error = error + torch.finfo(dtype).eps / 2 * largest
                error = error + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            for theta, start in zip(after, old, strict=True):
                assert ((theta.double() - (start + alpha * (mean - start))).abs() <= error).all()


@pytest.mark.parametrize("count", [*COUNTS, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_has_the_bits_of_the_reference(dtype: torch.dtype, count: int) -> None:
    chosen = _C.cpu_capability()
    for alpha in (0.3, 1.0):
        expected = dense(drawn(dtype, count))
        by_reference(expected, alpha)
        ways = [("cuda", by_emulated_cuda)]
        ways += [(name, by_operator) for name in ("baseline", "avx2", "avx512")]
        for name, way in ways:
            models = dense(drawn(dtype, count))
            try:
                if name == "cuda" or _C.set_cpu_capability(name):
                    way(models, alpha)
                    assert_same_bits(models, expected)
            finally:
                _C.set_cpu_capability(chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_with_gaps_and_other_layouts_are_pulled_and_nothing_between_them(
    dtype: torch.dtype,
) -> None:
    models = drawn(dtype, 3)
    for k, model in enumerate(models):  # a format of its own in one model
        plain = torch.linspace(-k, k + 1, 120).reshape(2, 3, 4, 5).to(dtype)
        model.append(plain.contiguous(memory_format=torch.channels_last) if k == 1 else plain)
    expected = copy.deepcopy(models)
    by_reference(expected, 0.6)
    rf.pull_(models, 0.6)
    assert_same_bits(models, expected)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    ends = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            models = [
                [torch.sin(torch.arange(70_001.0) * (k + 1)), torch.linspace(-k, k, 40_000)]
                for k in range(3)
            ]
            rf.pull_(models, 0.4)
        finally:
            torch.set_num_threads(2)
        ends.append(models)
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_1_makes_all_models_their_mean_and_alpha_0_changes_nothing(
    dtype: torch.dtype,
) -> None:
    models = drawn(dtype, 3)
    models[1][-1][:2] = torch.tensor([torch.nan, torch.inf])
    before, versions = copy.deepcopy(models), [p._version for p in models[0]]
    rf.pull_(models, 0.0)
    for a, b in zip(itertools.chain(*models), itertools.chain(*before), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert versions == [p._version for p in models[0]]
    models = drawn(dtype, 3)
    mean = rf.Elastic(models, alpha=1.0).mean()
    rf.pull_(models, 1.0)
    for model in models:
        assert all(map(torch.equal, model, mean))


@pytest.mark.parametrize("count", COUNTS)
def test_weights_that_are_equal_already_stay_as_they_are(count: int) -> None:
    """A plain (1/K) sum would move frozen layers by a unit: 3 x is not exact."""
    start = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for alpha in (0.3, 1.0):
        models = [[start.clone()] for _ in range(count)]
        rf.pull_(models, alpha)
        assert all(torch.equal(model[0], start) for model in models)


def test_one_model_alone_is_its_own_mean_even_where_it_is_infinite() -> None:
    p = torch.tensor([1.0, torch.inf])
    rf.pull_([[p]], 0.5)
    assert p.tolist() == [1.0, torch.inf]


def test_autograd_notices_that_weights_were_pulled() -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    loss = models[1](torch.ones(1, 3, requires_grad=True)).square().sum()
    versions = [p._version for model in models for p in model.parameters()]
    rf.pull_(models, 0.5)
    now = [p._version for model in models for p in model.parameters()]
    assert all(a > b for a, b in zip(now, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_made_in_inference_mode_are_pulled() -> None:
    with torch.inference_mode():
        models = [[torch.full((3,), value)] for value in (1.0, 3.0)]
    rf.pull_(models, 1.0)
    assert models[0][0].tolist() == [2.0] * 3


def test_a_default_device_of_ones_own_does_not_matter() -> None:
    models = [[torch.full((4,), value), torch.full((9,), value)[::3]] for value in (1.0, 3.0)]
    with torch.device("meta"):
        rf.pull_(models, 0.5)
    assert [p.tolist()[0] for model in models for p in model] == [1.5, 1.5, 2.5, 2.5]


def test_without_the_compiled_kernels_the_bits_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, others = drawn(torch.float32, 3), drawn(torch.float32, 3)
    rf.pull_(models, 0.3)
    monkeypatch.setattr(backends, "_C", None)
    rf.pull_(others, 0.3)
    assert_same_bits(models, others)


# ---- replicas that train -------------------------------------------------------------------------

EPOCHS, BATCHES, LR = 4, 3, 0.05


def own_batches(k: int) -> Callable[[Tensor, int], Tensor]:
    return lambda w, t: quadratic(w, 1000 * k + t)


def starts(count: int) -> list[Tensor]:
    return [
        torch.randn(37, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k in range(count)
    ]


@pytest.mark.parametrize("every", [1, 2, BATCHES])
@pytest.mark.parametrize("count", COUNTS)
def test_elastic_training_follows_its_literal_loop(count: int, every: int) -> None:
    """Float64; the two sum in another order, and a run of 12 steps carries that on: 1e-12."""
    gradients = [own_batches(k) for k in range(count)]
    path = papers.elastic(starts(count), gradients, LR, EPOCHS, BATCHES, every)
    models = [[nn.Parameter(w)] for w in starts(count)]
    optimizers = [rf.FusedSGD(model, lr=LR) for model in models]
    elastic = rf.Elastic(models, epochs=EPOCHS)
    for t, expected in enumerate(path, start=1):
        for (p,), opt, gradient in zip(models, optimizers, gradients, strict=True):
            p.grad = gradient(p.detach(), t)
            opt.step()
        if t % every == 0:
            elastic.pull(t // BATCHES)
        for (p,), w in zip(models, expected, strict=True):
            assert torch.allclose(p, w, rtol=0, atol=1e-12)


def net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)


def train(model: nn.Module, opt: rf.FusedSGD, steps: range, seed: int) -> None:
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * seed + step))
        opt.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        opt.step()


def optimizer(model: nn.Module, **options: Any) -> rf.FusedSGD:
    return rf.FusedSGD(
        model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.5, start=1), **options
    )


def test_momentum_averages_and_batchnorm_statistics_are_not_pulled() -> None:
    models = [net(k) for k in range(3)]
    optimizers = [optimizer(model) for model in models]
    for k, (model, opt) in enumerate(zip(models, optimizers, strict=True)):
        train(model, opt, range(3), k)
    kept = copy.deepcopy(
        [[opt.state_dict() for opt in optimizers], [[*m.buffers()] for m in models]]
    )
    rf.pull_(models, 1.0)
    now = [[opt.state_dict() for opt in optimizers], [[*m.buffers()] for m in models]]
    assert repr(now) == repr(kept)
    for p, q in zip(models[0].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_every_replica_resumes_bit_for_bit() -> None:
    ends = []
    for interrupted in (False, True):
        models = [net(k) for k in range(2)]
        optimizers = [optimizer(model) for model in models]
        for epoch in range(4):
            for k in range(2):
                train(models[k], optimizers[k], range(3 * epoch, 3 * epoch + 3), k)
            rf.Elastic(models, epochs=4).pull(epoch + 1)
            if interrupted and epoch == 1:
                saved = [
                    (m.state_dict(), o.state_dict())
                    for m, o in zip(models, optimizers, strict=True)
                ]
                models = [net(10 + k) for k in range(2)]
                optimizers = [optimizer(model) for model in models]
                for model, opt, (weights, state) in zip(
                    models, optimizers, copy.deepcopy(saved), strict=True
                ):
                    model.load_state_dict(weights)
                    opt.load_state_dict(state)
        ends.append(
            [
                [*m.state_dict().values(), *averages(o)]
                for m, o in zip(models, optimizers, strict=True)
            ]
        )
    assert_same_bits(*ends)


def averages(opt: rf.FusedSGD) -> list[Tensor]:
    return [held["average"] for held in opt.state.values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_masters_follow_the_pulled_weights(dtype: torch.dtype) -> None:
    models = [[nn.Parameter(torch.full((9,), v, dtype=dtype))] for v in (1.0, 2.0)]
    optimizers = [rf.FusedSGD(m, lr=0.25, master_weights=True) for m in models]
    for step in range(2):
        for (p,), opt in zip(models, optimizers, strict=True):
            p.grad = torch.ones_like(p)
            opt.step()
        if step == 0:
            rf.pull_(models, 1.0)
            assert models[0][0].tolist() == models[1][0].tolist() == [1.25] * 9
    for (p,), opt in zip(models, optimizers, strict=True):
        assert opt.state[p]["master_param"].tolist() == p.tolist() == [1.0] * 9


def test_the_mean_is_evaluated_in_a_model_of_its_own() -> None:
    models = [net(k) for k in range(3)]
    elastic = rf.Elastic(models, epochs=2)
    averaged = elastic.averaged_state_dict(models[1])
    held = {t.data_ptr() for m in models for t in m.state_dict().values()}
    assert not held & {t.data_ptr() for t in averaged.values()}
    other = net(9)
    other.load_state_dict(averaged)
    assert torch.equal(other[1].running_mean, models[1][1].running_mean)
    elastic.pull(0)
    assert_same_bits([list(other.parameters())], [list(models[0].parameters())])
    with pytest.raises(ValueError, match="none of the parameters of Linear"):
        elastic.averaged_state_dict(nn.Linear(2, 2))


def test_parameters_that_were_replaced_are_pulled_where_they_are_now() -> None:
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    elastic = rf.Elastic(models, alpha=1.0)
    for value, model in enumerate(models):
        model.weight = nn.Parameter(torch.full((1, 2), float(value)))
    elastic.pull()
    assert models[0].weight.tolist() == models[1].weight.tolist() == [[0.5, 0.5]]


def test_the_example_of_the_docstring_runs() -> None:
    models = [net(k) for k in range(2)]
    loader = [torch.randn(5, 4) for _ in range(3)]
    names: dict[str, Any] = {
        "rbwa_fused": rf,
        "torch": torch,
        "models": models,
        "copy": copy,
        "optimizers": [optimizer(model) for model in models],
        "loaders": [loader, loader],
        "train_an_epoch": lambda model, opt, loader: train(model, opt, range(3), 0),
    }
    for example in doctest.DocTestParser().get_examples(rf.Elastic.__doc__ or ""):
        exec(example.source, names)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)  # the last alpha is 0
    for p, mean in zip(names["averaged"].parameters(), names["elastic"].mean(), strict=True):
        assert torch.equal(p, mean)


# ---- the schedule --------------------------------------------------------------------------------


def test_alpha_falls_from_1_to_0_over_the_epochs_unless_given() -> None:
    models = [[torch.zeros(1)], [torch.ones(1)]]
    by_epochs = rf.Elastic(models, epochs=4)
    assert [by_epochs.alpha(t) for t in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rf.Elastic(models, alpha=0.25).alpha() == 0.25
    assert rf.Elastic(models, alpha=lambda t: 1 / (t + 1)).alpha(3) == 0.25
    by_epochs.pull(3)
    assert [p.item() for (p,) in models] == [0.125, 0.875]


SCHEDULES: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    "neither": ({}, 0, ValueError, "expected one of epochs and alpha"),
    "both": ({"epochs": 2, "alpha": 0.5}, 0, ValueError, "expected one of epochs and alpha"),
    "no epochs": ({"epochs": 0}, 0, ValueError, r"Invalid epochs: 0"),
    "half epochs": ({"epochs": 2.5}, 0, TypeError, r"Invalid epochs: 2.5"),
    "alpha above 1": ({"alpha": 1.5}, 0, ValueError, r"Invalid alpha: 1.5"),
    "alpha below 0": ({"alpha": -0.5}, 0, ValueError, r"Invalid alpha: -0.5"),
    "alpha is NaN": ({"alpha": float("nan")}, 0, ValueError, "Invalid alpha: nan"),
    "alpha is no number": ({"alpha": "half"}, 0, TypeError, "Invalid alpha: 'half'"),
    "a function out of range": ({"alpha": lambda t: 2.0}, 0, ValueError, r"Invalid alpha: 2.0"),
    "too many epochs": ({"epochs": 2}, 3, ValueError, "Invalid finished_epochs: 3"),
    "negative epochs": ({"epochs": 2}, -1, ValueError, "Invalid finished_epochs: -1"),
    "no count": ({"epochs": 2}, None, TypeError, "finished_epochs"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_out_of_range_is_refused_by_name(name: str) -> None:
    options, finished, error, message = SCHEDULES[name]
    models = [[torch.zeros(1)], [torch.ones(1)]]
    with pytest.raises(error, match=message):
        rf.Elastic(models, **options).pull(finished)
    assert [p.item() for (p,) in models] == [0.0, 1.0]


# ---- what is refused -----------------------------------------------------------------------------


def tied() -> list[Any]:
    shared = torch.ones(4)
    return [[shared], [torch.ones(4)], [shared[:]]]


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no replicas": (lambda: [], ValueError, "none"),
    "one module": (lambda: nn.Linear(2, 2), TypeError, "one Linear"),
    "one tensor": (lambda: torch.ones(2), TypeError, "one Tensor"),
    "tensors in place of replicas": (
        lambda: [torch.ones(2), torch.ones(2)],
        TypeError,
        "replica 0 is a Tensor",
    ),
    "numbers": (lambda: [[1.0], [2.0]], TypeError, "replica 0: 1.0 among its tensors"),
    "another count": (
        lambda: [[torch.ones(2)], [torch.ones(2), torch.ones(2)]],
        ValueError,
        "replica 1 has 2 parameters",
    ),
    "another shape": (
        lambda: [nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4)],
        ValueError,
        r"replica 2: parameter 0 \('weight'\) has shape \(4, 2\) \(expected \(3, 2\)",
    ),
    "another dtype": (
        lambda: [[torch.ones(2)], [torch.ones(2).double()]],
        TypeError,
        "replica 1: parameter 0 has dtype torch.float64",
    ),
    "no floats": (lambda: [[torch.ones(2).int()]] * 2, TypeError, "replica 0: .* torch.int32"),
    "another device": (
        lambda: [[torch.ones(2)], [torch.ones(2, device="meta")]],
        ValueError,
        "replica 1: .* meta",
    ),
    "sparse": (
        lambda: [[torch.ones(2)], [torch.ones(2).to_sparse()]],
        TypeError,
        "replica 1: .* layout",
    ),
    "expanded": (
        lambda: [[torch.ones(2)], [torch.ones(1).expand(2)]],
        ValueError,
        "replica 1: .* expanded",
    ),
    "the same model twice": (lambda: [nn.Linear(2, 2)] * 2, ValueError, "shares memory"),
    "tied across replicas": (tied, ValueError, "replica 0: parameter 0 shares memory"),
    "the same tensor twice in one": (
        lambda: [[torch.ones(3)] * 2, [torch.ones(3), torch.ones(3)]],
        ValueError,
        "replica 0: parameter 0 shares memory",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_replicas_that_do_not_match_are_refused_by_name_and_nothing_is_written(name: str) -> None:
    make, error, message = BAD[name]
    for refuse in (lambda bad: rf.pull_(bad, 0.5), lambda bad: rf.Elastic(bad, alpha=0.5)):
        bad = make()
        lists = [model for model in bad if isinstance(model, list)] if type(bad) is list else []
        tensors = [t for model in lists for t in model if isinstance(t, Tensor)]
        versions = [t._version for t in tensors]
        with pytest.raises(error, match=message):
            refuse(bad)
        assert versions == [t._version for t in tensors]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_pulling_beyond_the_mean_or_away_from_it_is_refused(alpha: float) -> None:
    models = [[torch.zeros(1)], [torch.ones(1)]]
    with pytest.raises(ValueError, match="Invalid alpha"):
        rf.pull_(models, alpha)
    with pytest.raises(RuntimeError, match="alpha is"):
        by_operator(models, alpha)
    assert [p.item() for (p,) in models] == [0.0, 1.0]


# ---- the operator --------------------------------------------------------------------------------


def test_the_operator_keeps_its_schema() -> None:
    torch.library.opcheck(PULL, ([torch.randn(5), torch.randn(2, 3)] * 2, 2, 0.5))


def gaps() -> Tensor:
    return torch.ones(9)[::3]


MISFITS: dict[str, tuple[Tensor, Tensor, str]] = {
    "dtype": (torch.ones(3), torch.ones(3).double(), "parameter 1 of replica 1"),
    "shape": (torch.ones(3), torch.ones(4), "parameter 1 of replica 1"),
    "dimensions": (torch.ones(3), torch.ones(3, 1), "parameter 1 of replica 1"),
    "layout": (torch.ones(3), gaps(), "parameter 1 of replica 1"),
    "gaps": (gaps(), gaps(), "parameter 1 of replica 0"),
    "integers": (torch.ones(3).int(), torch.ones(3).int(), "parameters must be"),
}


@pytest.mark.parametrize("pull", [by_operator, by_emulated_cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_the_operator_refuses_what_does_not_fit_and_writes_nothing(
    misfit: str, pull: Callable[[list[list[Tensor]], float], None]
) -> None:
    *seconds, message = MISFITS[misfit]
    firsts = torch.zeros(2), torch.ones(2)
    with pytest.raises(RuntimeError, match=message):
        pull([[a, b] for a, b in zip(firsts, seconds, strict=True)], 0.5)
    assert [t.sum().item() for t in firsts] == [0, 2]


def test_the_operator_refuses_a_count_that_does_not_divide() -> None:
    for count in (0, -1, 2):
        with pytest.raises(RuntimeError, match=f"of {count} replicas"):
            PULL([torch.ones(1)] * 3, count, 0.5)


def test_more_parameters_than_fit_are_as_few_launches_as_fit() -> None:
    models = [[torch.full((3,), float(i * k)) for i in range(1000)] for k in range(3)]
    emulated().launches()
    by_emulated_cuda(models, 1.0)
    assert emulated().launches() == 2  # 24 bytes a parameter and 8 an address, 32,728 fit
    assert all(torch.equal(p, torch.full((3,), float(i))) for i, p in enumerate(models[2]))


def test_dtypes_are_a_launch_each_and_empty_ones_none() -> None:
    models = [[torch.ones(9, dtype=dtype) for dtype in DTYPES * 2] for _ in range(2)]
    emulated().launches()
    by_emulated_cuda(models, 0.5)
    assert emulated().launches() == len(DTYPES)
    by_emulated_cuda([[torch.ones(0)], [torch.ones(0)]], 0.5)
    assert emulated().launches() == 0
