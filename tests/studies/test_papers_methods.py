"""The papers' systems do what their papers say, and a control is what it is a control of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

from torch import Tensor, nn

import rbwa_fused as rf
from studies.papers import flatness, networks, published, schedules, statistics
from studies.papers.datasets import (
    Data,
    Images,
    Source,
    batches,
    crop_flip,
    load,
    training_images,
)
from studies.papers.plan import Plan, best
from studies.papers.settings import Setting
from studies.papers.store import Key, Store
from studies.papers.systems import SYSTEMS, is_control
from studies.papers.training import Curves, Learner, scores, train

DIGITS = Source("digits")
EPOCHS, START = 5, 1


def setting(**changed: object) -> Setting:
    """A few steps of the small network, in float64."""
    values: dict[str, object] = {
        "data": "digits",
        "hard": False,
        "model": "small",
        "stem": "small",
        "augment": "none",
        "dtype": "float64",
        "batch_size": 64,
        "epochs": EPOCHS,
        "start_epoch": START,
        "halve_epochs": 0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    return Setting(**(values | changed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> Data:
    """A third of the digits, so that an epoch has seven steps."""
    whole = load(DIGITS, "final", "float64", 0, "cpu")
    return whole._replace(train=whole.train.at(torch.arange(480)))


def learner(system: str, data: Data, **changed: object) -> Learner:
    return Learner(SYSTEMS[system], setting(**changed), 0.3, 0, data)


def weights(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def largest_difference(values: list[float], others: list[float]) -> float:
    return max(abs(value - other) / abs(other) for value, other in zip(values, others, strict=True))


@pytest.fixture(scope="module")
def curves(data: Data) -> Callable[[str], Curves]:
    """A system's curves with a rate that is halved after each second epoch, trained once."""
    return cache(
        lambda name: train(SYSTEMS[name], setting(halve_epochs=2), 0.3, 0, data, lambda: None)
    )


@pytest.mark.parametrize("name", ["swa", "fge", "replicas"])
def test_who_is_tested_at_the_end_alone_trains_alike(name, data, curves):
    last = train(SYSTEMS[name], setting(halve_epochs=2), 0.3, 0, data, lambda: None, "at the end")
    assert last == {curve: values[-1:] for curve, values in curves(name).items()}


# What is the same in two forms differs by rounding, 1e-16 a step, which training multiplies.
ROUNDING = 1e-10


@pytest.mark.parametrize("control", [name for name in SYSTEMS if is_control(name)])
def test_a_system_is_torch_sgd_with_the_matched_hyperparameters(control, curves):
    ours, matched, plain = map(curves, (control.removesuffix("-control"), control, "momentum"))
    for curve in ("train_loss", "test_loss"):
        assert largest_difference(ours[curve], matched[curve]) < ROUNDING
        assert largest_difference(ours[curve], plain[curve]) > 1e-3
    assert ours["test_accuracy"] == matched["test_accuracy"]


def test_nesterov_without_the_corrected_start_is_not_rsgdm(curves):
    rsgdm, nesterov = curves("rsgdm")["test_loss"], curves("nesterov")["test_loss"]
    assert largest_difference(rsgdm, nesterov) > 1e-6
    assert nesterov == pytest.approx(rsgdm, rel=0.5)


def test_sgd_with_momentum_in_pytorchs_form_is_that_of_the_rsgdm_paper(curves):
    """PyTorch's buffer is 1/(1 - beta) times the paper's from its first step on."""
    ours, theirs = curves("momentum")["test_loss"], curves("sgdm")["test_loss"]
    assert largest_difference(ours, theirs) < ROUNDING


def test_the_cyclical_rate_is_izmailovs():
    """alpha(i) = (1 - t) alpha1 + t alpha2, t = (mod(i - 1, c) + 1) / c."""
    rates = [schedules.cyclical(i, 4, 0.05, 0.01) for i in range(1, 9)]
    assert rates == pytest.approx([0.04, 0.03, 0.02, 0.01] * 2, rel=1e-12)


def test_the_triangular_rate_is_garipovs():
    """Down to alpha2 at t = 1/2, back at alpha1 at t = 1."""
    rates = [schedules.triangular(i, 4, 0.05, 0.01) for i in range(1, 9)]
    assert rates == pytest.approx([0.03, 0.01, 0.03, 0.05] * 2, rel=1e-12)
    assert [i for i in range(1, 9) if schedules.lowest_of_triangle(i, 4)] == [2, 6]


def test_other_schedules_by_hand():
    assert [schedules.halved(step, 3) for step in range(1, 8)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    assert [schedules.cosine(step, 4) for step in (1, 3)] == pytest.approx([1.0, 0.5])
    assert [schedules.rbwa(step, 2) for step in range(1, 6)] == [1, 1, 1, 1 / 2, 1 / 3]
    assert [schedules.rbwa_e(step, 2, 0.75) for step in range(1, 6)] == [1, 1, 1, 0.25, 0.25]
    # Epochs of 3 steps, averaged after the first: (e - c) j = 0 1 2, then 0 2 4.
    algorithm2 = [schedules.rbwa_algorithm2(step, 3, 1) for step in range(1, 10)]
    assert algorithm2 == [1, 1, 1, 1, 1 / 2, 1 / 3, 1, 1 / 3, 1 / 5]


def test_swa_averages_the_ends_of_falling_cycles(data):
    """With the weights at its start, as Izmailov et al. begin, and BatchNorm of the average."""
    run = learner("swa-cyclical", data)
    ends = []
    for epoch in range(1, EPOCHS + 1):
        run.epoch()
        rate = run.optimizers[0].param_groups[0]["lr"] / run.rates[0]
        assert rate == pytest.approx(1.0 if epoch <= START else schedules.LOWEST, rel=1e-12)
        if epoch >= START:
            ends.append(weights(run.networks[0]))
    live = weights(run.networks[0])
    statistics_of_training = run.networks[0][1].running_mean.clone()
    with run.tested() as network:
        averaged = weights(network)
        assert not torch.equal(network[1].running_mean, statistics_of_training)
    torch.testing.assert_close(averaged, torch.stack(ends).mean(0), rtol=0.0, atol=1e-14)
    assert torch.equal(weights(run.networks[0]), live)
    assert torch.equal(run.networks[0][1].running_mean, statistics_of_training)


def test_fge_averages_what_its_snapshots_in_the_middle_of_a_cycle_predict(data):
    """Cycles of two epochs after the first epoch: at the lowest rate after epochs 2 and 4."""
    run = learner("fge", data)
    predictions = []
    for epoch in range(1, EPOCHS + 1):
        run.epoch()
        rate = run.optimizers[0].param_groups[0]["lr"] / run.rates[0]
        if epoch in (2, 4):
            assert rate == pytest.approx(schedules.LOWEST, rel=1e-12)
            predictions.append(scores(run.networks[0], data.test.images).softmax(1))
        else:
            assert rate == pytest.approx(1.0, rel=1e-12)
        assert len(run.votes) == len(predictions)
    ensemble = (predictions[0] + predictions[1]) / 2.0
    chosen = ensemble[torch.arange(len(ensemble)), data.test.labels]
    _, test = run.evaluate()
    assert test.loss == pytest.approx(-chosen.log().mean().item(), rel=1e-12)
    right = (ensemble.argmax(1) == data.test.labels).double().mean().item()
    assert test.accuracy == pytest.approx(100.0 * right, rel=1e-12)


def test_replicas_are_drawn_to_their_mean_less_and_less_and_the_mean_is_tested(data, monkeypatch):
    pull, strengths = rf.Elastic.pull, []

    def recorded(elastic: rf.Elastic, finished: int) -> None:
        strengths.append(elastic.alpha(finished))
        pull(elastic, finished)

    monkeypatch.setattr(rf.Elastic, "pull", recorded)
    run = learner("replicas", data)
    spreads = []
    for _ in range(EPOCHS):
        run.epoch()
        all_weights = torch.stack([weights(network) for network in run.networks])
        spreads.append((all_weights - all_weights.mean(0)).norm().item())
    assert strengths == [1.0 - finished / EPOCHS for finished in range(1, EPOCHS + 1)]
    assert spreads[0] > 0.0 and spreads == sorted(spreads)
    with run.tested() as network:
        torch.testing.assert_close(weights(network), all_weights.mean(0), rtol=0.0, atol=1e-15)
    assert torch.equal(torch.stack([weights(n) for n in run.networks]), all_weights)
    assert run.system.replicas == 3


def test_the_sweep_sees_no_test_image_and_no_image_twice():
    def rows(images: Images) -> set[bytes]:
        return {image.numpy().tobytes() for image in images.images}

    final = load(DIGITS, "final", "float64", 0, "cpu")
    for hard in (False, True):
        part = load(DIGITS._replace(hard=hard), "sweep", "float64", 0, "cpu")
        train_rows, validation = rows(part.train), rows(part.test)
        assert not validation & rows(final.test)
        assert not train_rows & rows(final.test)
        assert not validation & train_rows
        assert train_rows | validation == rows(final.train)
        count = training_images(DIGITS._replace(hard=hard), "sweep", len(final.train.labels))
        assert len(part.train.labels) == count == (300 if hard else 1150)


def test_the_hard_labels_are_wrong_for_a_fifth_and_the_same_in_every_process():
    clean = load(DIGITS, "final", "float64", 0, "cpu").train
    answers = {
        image.numpy().tobytes(): label.item()
        for image, label in zip(clean.images, clean.labels, strict=True)
    }
    labels = []
    for part in ("final", "sweep", "final"):  # a cache of one: each is loaded anew
        hard = load(Source("digits", True), part, "float64", 0, "cpu").train
        labels.append(hard.labels)
        wrong = [
            answers[image.numpy().tobytes()] != label.item()
            for image, label in zip(hard.images, hard.labels, strict=True)
        ]
        assert sum(wrong) == 60 and len(wrong) == 300
    assert torch.equal(labels[0], labels[1]) and torch.equal(labels[0], labels[2])


@pytest.mark.parametrize("flips", [False, True])
def test_an_augmented_image_is_a_window_of_the_padded_one_mirrored_or_not(flips):
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1.0
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    mirrored, shifts = 0, set()
    for image, whole in zip(
        crop_flip(images, flips, torch.Generator().manual_seed(0)), padded, strict=True
    ):
        matches = [
            (down, right, flip)
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
            for window in [whole[:, down : down + 16, right : right + 16]]
            if torch.equal(image, window.flip(2) if flip else window)
        ]
        assert len(matches) == 1
        mirrored += matches[0][2]
        shifts.add(matches[0][:2])
    assert (0 < mirrored < 40) if flips else mirrored == 0
    assert len(shifts) > 10


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(data):
    def first(seed: int) -> Tensor:
        return next(batches(data, 32, False, torch.Generator().manual_seed(seed)))[1]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize(
    ("model", "channels", "side", "classes"),
    [("resnet18", 1, 8, 10), ("resnet50", 3, 32, 100), ("vgg16", 1, 32, 10), ("small", 3, 32, 100)],
)
def test_every_network_takes_small_images_with_either_stem(model, channels, side, classes, stem):
    network = networks.build(model, channels, classes, stem, 0).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, channels, side, side)).shape == (2, classes)


@pytest.mark.parametrize(("model", "expected"), [("resnet18", 11_172_810), ("vgg16", 14_727_114)])
def test_the_small_stems_are_the_usual_ones(model, expected):
    """By hand: a 3x3 convolution of one channel in ResNet-18; a head of 512 x 10 in VGG-16."""
    network = networks.build(model, 1, 10, "small", 0)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_the_small_stem_keeps_the_side_of_the_image():
    network = networks.build("resnet18", 3, 10, "small", 0)
    assert network.maxpool(network.conv1(torch.zeros(1, 3, 32, 32))).shape[-1] == 32
    network = networks.build("resnet18", 3, 10, "imagenet", 0)
    assert network.maxpool(network.conv1(torch.zeros(1, 3, 32, 32))).shape[-1] == 8


def test_a_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653."""
    found = statistics.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2.0
    half = 4.3026527 / math.sqrt(3.0)
    assert (found.low, found.high) == pytest.approx((2.0 - half, 2.0 + half), rel=1e-6)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)


def test_pairs_that_say_nothing_about_their_spread_have_no_interval_and_no_p():
    for values, others in (([1.0], [0.5]), ([98.7, 98.2], [98.2, 97.7]), ([math.nan, 1.0], [1, 1])):
        found = statistics.paired(values, others)
        assert found.mean == pytest.approx(values[0] - others[0], nan_ok=True)
        assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(found.p)
    assert statistics.summary([1.0, 3.0])[:2] == (2.0, math.sqrt(2.0))


def test_the_rate_with_the_best_mean_on_validation_images_wins_and_a_tie_goes_to_the_lower_loss(
    tmp_path: Path,
):
    found = {
        0.1: [(90.0, 0.5), (92.0, 0.5)],
        0.3: [(96.0, math.nan), (90.0, 0.1)],
        1.0: [(93.0, 0.3), (93.0, 0.3)],
        3.0: [(99.0, 0.1), (10.0, math.nan)],
    }
    plan, store = sweep_with(found, (0.1, 0.3, 1.0, 3.0), tmp_path)
    assert best(plan, plan.settings[0], "swa", store) == 1.0
    assert plan.tried(plan.settings[0], "swa", store) == (0.1, 0.3, 0.56, 1.0, 1.8, 3.0)


def test_the_quarter_decades_beside_the_best_are_tried_last(tmp_path: Path):
    found = {lr: [(90.0 - abs(lr - 0.56), 0.5)] * 2 for lr in (0.1, 0.3, 1.0, 0.18, 0.56)}
    half = {lr: found[lr] for lr in (0.1, 0.3, 1.0)}
    plan, store = sweep_with(half, (0.1, 0.3, 1.0), tmp_path / "half")
    assert plan.tried(plan.settings[0], "swa", store) == (0.1, 0.18, 0.3, 0.56, 1.0)
    plan, store = sweep_with(found, (0.1, 0.3, 1.0), tmp_path / "quarter")
    assert not [job for job in plan.sweep_jobs(store) if job.key not in store.records]
    assert best(plan, plan.settings[0], "swa", store) == 0.56


def test_a_sweep_whose_best_rate_is_an_end_goes_on_beyond_it(tmp_path: Path):
    falling = {lr: [(90.0 - lr, 0.5)] * 2 for lr in (0.1, 0.3, 1.0)}
    plan, store = sweep_with(falling, (0.1, 0.3, 1.0), tmp_path / "down")
    assert plan.tried(plan.settings[0], "swa", store) == (0.03, 0.1, 0.3, 1.0)
    assert [job.lr for job in plan.sweep_jobs(store) if job.key not in store.records] == [0.03] * 2
    rising = {lr: [(90.0 + lr, 0.5)] * 2 for lr in (0.1, 0.3, 1.0, 3.0)} | {10.0: [(9.0, 2.0)] * 2}
    plan, store = sweep_with(rising, (0.1, 0.3, 1.0), tmp_path / "up")
    assert plan.tried(plan.settings[0], "swa", store) == (0.1, 0.3, 1.0, 1.8, 3.0, 5.6, 10.0)
    assert best(plan, plan.settings[0], "swa", store) == 3.0


def test_a_control_takes_the_rate_of_its_system_and_needs_no_sweep(tmp_path: Path):
    rising = {lr: [(90.0 + lr, 0.5)] * 2 for lr in (0.1, 0.3, 0.56, 1.0)}
    rising |= {lr: [(9.0, 2.0)] * 2 for lr in (1.8, 3.0)}
    plan, store = sweep_with(rising, (0.1, 0.3, 1.0), tmp_path, "rbwa")
    plan = replace(plan, systems=("rbwa", "rbwa-control"))
    assert not [job for job in plan.sweep_jobs(store) if job.key not in store.records]
    assert {(job.system, job.lr) for job in plan.result_jobs(store)} == {
        ("rbwa", 1.0),
        ("rbwa-control", 1.0),
    }
    alone = replace(plan, systems=("rbwa-control",))
    assert {job.system for job in alone.sweep_jobs(store)} == {"rbwa-control"}


def sweep_with(
    found: dict[float, list[tuple[float, float]]],
    grid: tuple[float, ...],
    folder: Path,
    system: str = "swa",
) -> tuple[Plan, Store]:
    """A sweep of one system whose runs gave (accuracy, loss) so."""
    folder.mkdir(exist_ok=True)
    plan = Plan("table5", (setting(),), (system,), "momentum", (), grid, 2, (0,))
    store = Store(folder / "results.json", "table5", plan.settings, "cpu")
    for lr, runs in found.items():
        for k, (accuracy, loss) in enumerate(runs):
            record = {"validation_accuracy": accuracy, "validation_loss": loss}
            store.add(Key("sweep", plan.settings[0].name, system, lr, 1000 + k), record)
    return plan, store


def test_a_papers_figure_is_found_where_it_belongs_and_says_where_it_comes_from():
    figure = published.find("table1", "rbwa", "digits", "small", 32)
    assert figure is not None and figure.accuracy == 84.25 and figure.train_loss == 0.00384
    assert str(figure) == "RBWA paper: CIFAR-10, ResNet-18, batch size 32"
    figure = published.find("table2", "rbwa", "cifar100", "vgg16", 64)
    assert figure is not None and figure.accuracy == 58.95
    figure = published.find("table4", "rsgdm", "cifar100", "resnet50", 128)
    assert figure is not None and figure.accuracy == 77.27
    assert published.find("table1", "rbwa", "cifar10", "resnet18", 512) is None
    assert published.find("table1", "rbwa-control", "cifar10", "resnet18", 32) is None


def test_the_doubling_distance_of_a_quadratic():
    """f = f0 + k d^2 / 2 doubles at sqrt(2 f0 / k), in whichever direction one goes."""
    center = torch.linspace(-1.0, 1.0, 50, dtype=torch.float64)

    def losses(w: Tensor) -> tuple[float, float]:
        square = (w - center).square().sum().item()
        return 0.01 + 2.0 * square, 0.5 + 0.1 * square

    network = nn.Linear(10, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        noise = flatness.noise_like(center, generator)
        ray = flatness.direction_on_sphere(noise, center, network)
        assert ray.norm().item() == pytest.approx(1.0, rel=1e-12)
        radius = flatness.radius_of_rise(losses, center, ray)
        assert radius == 4.0  # 0.5 + 0.1 r^2 reaches 3 x 0.5 at 3.2
        distances = [radius * (k / 30) ** 2 for k in range(31)]
        train_losses, test_losses = flatness.curve(losses, center, ray, distances)
        found = flatness.doubling(distances, train_losses)
        assert found == pytest.approx(math.sqrt(0.01 / 2.0), rel=0.05)
        found = flatness.doubling(distances, test_losses)
        assert found == pytest.approx(math.sqrt(0.5 / 0.1), rel=0.01)


def test_a_loss_that_never_doubles_and_one_that_overflows():
    assert flatness.doubling([0.0, 1.0, 2.0], [1.0, 1.5, 1.9]) == math.inf
    assert flatness.doubling([0.0, 1.0, 2.0], [1.0, 3.0, 1.9]) == 0.5
    assert flatness.doubling([0.0, 1.0, 2.0], [1.0, None, None]) == 1.0


def test_a_filter_normalised_direction_is_as_long_as_each_filter_and_leaves_batchnorm_alone():
    network = networks.build("small", 1, 10, "small", 0)
    center = weights(network)
    noise = flatness.noise_like(center, torch.Generator().manual_seed(0))
    direction = flatness.direction_by_filter(noise, center, network)
    nn.utils.vector_to_parameters(direction, (own := list(network.parameters())))
    parts = {name: p.detach().clone() for name, p in network.named_parameters()}
    nn.utils.vector_to_parameters(center, own)
    for name, p in network.named_parameters():
        if p.dim() > 1:
            lengths = parts[name].flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, p.detach().flatten(1).norm(dim=1))
        else:
            assert parts[name].count_nonzero() == 0
