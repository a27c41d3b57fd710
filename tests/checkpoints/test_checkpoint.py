"""Checkpoints: a run that was saved, copied or moved is, bit for bit, the run that was not."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import ALGORITHMS, OF_TORCH
from runs import (
    AVERAGED,
    EPOCH,
    IN_PLACE,
    METHODS,
    STEPS,
    Model,
    bits,
    build,
    feed,
    groups,
    result,
    scheduled,
    snapshot,
    train,
)
from safetensors.torch import load_file, save_file, save_model
from started import environment
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.several import policies_of

# Before any step; before the first sample; where averaging begins; mid epoch; at a write-back.
STOPS = [0, 2, EPOCH, EPOCH + 2, 2 * EPOCH]
DTYPES = [torch.float32, torch.bfloat16]


def through_bytes(value: Any) -> Any:
    """What another process would read of a checkpoint."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- resume ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all methods, stopped at all stops and gone on with in one new process."""
    folder = tmp_path_factory.mktemp("resume")
    for method in METHODS:
        for dtype in DTYPES:
            model, opt = build(method, dtype)
            for step in range(max(STOPS) + 1):
                if step > 0:
                    train(model, opt, step, step)
                if step in STOPS:
                    saved = {"model": model.state_dict(), "opt": opt.state_dict()}
                    name = f"{method}.{str(dtype).removeprefix('torch.')}.{step}.pt"
                    torch.save(saved, folder / name)
    code = f"import sys, pathlib, runs; runs.resume(pathlib.Path(sys.argv[1]), {STEPS})"
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=environment(Path(__file__).parents[1]),
        check=True,
        timeout=120,
    )
    return {file.stem: pickle.loads(file.read_bytes()) for file in folder.glob("*.done")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_in_a_new_process_is_the_run_that_never_stopped(
    method: str, dtype: torch.dtype, resumed: dict[str, Any]
) -> None:
    model, opt = build(method, dtype)
    train(model, opt, 1, STEPS)
    expected = result(opt)
    for stop in STOPS:
        actual = resumed[f"{method}.{str(dtype).removeprefix('torch.')}.{stop}"]
        assert actual == expected, f"stopped after step {stop}"


@pytest.mark.parametrize("method", METHODS)
def test_an_older_checkpoint_takes_a_running_optimizer_back(method: str) -> None:
    model, opt = build(method)
    train(model, opt, 1, EPOCH + 2)
    saved = through_bytes({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, EPOCH + 3, STEPS)
    expected = result(opt)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    train(model, opt, EPOCH + 3, STEPS)
    assert result(opt) == expected


@pytest.mark.parametrize("method", ["momentum", "rsgdm explicit", "ema", "lookahead", "rbwa"])
def test_resume_does_not_depend_on_flat_buffers_or_on_the_backend(method: str) -> None:
    model, opt = build(method)
    train(model, opt, 1, 6)
    saved = through_bytes({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, 7, STEPS)
    for options in ({"flatten": False}, {"backend": "reference"}):
        model2, opt2 = build(method, **options)
        model2.load_state_dict(saved["model"])
        opt2.load_state_dict(saved["opt"])
        train(model2, opt2, 7, STEPS)
        assert result(opt2) == result(opt), options


def primitive(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(primitive(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_holds_tensors_and_primitives_and_nothing_else(
    method: str, dtype: torch.dtype
) -> None:
    model, opt = build(method, dtype)
    for step in range(1, EPOCH + 3):
        train(model, opt, step, step)
        saved = opt.state_dict()
        assert list(saved) == ["state", "param_groups"]
        assert all(primitive(v) for group in saved["param_groups"] for v in group.values())
        for held in saved["state"].values():
            assert all(isinstance(v, Tensor) and v.device.type == "cpu" for v in held.values())
    assert [bool(policies_of(g["average"])) for g in opt.param_groups] == [
        method in AVERAGED,
        False,
    ]
    loaded = through_bytes(saved)
    assert loaded["param_groups"] == saved["param_groups"]
    for key, held in saved["state"].items():
        assert {k: bits(v) for k, v in loaded["state"][key].items()} == {
            k: bits(v) for k, v in held.items()
        }


def test_a_parameter_that_never_stepped_has_no_momentum_in_a_checkpoint() -> None:
    model, opt = build("momentum")
    train(model, opt, 1, 3)
    with_momentum = {
        i for i, held in opt.state_dict()["state"].items() if "momentum_buffer" in held
    }
    names = [name for name, _ in model.named_parameters() if name != "scalar"]
    assert with_momentum == {i for i, name in enumerate([*names, "scalar"]) if name != "late"}


# ---- exchange with torch.optim.SGD -------------------------------------------------------------


def one(
    cls: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Model, Any]:
    model = Model(dtype)
    return model, cls(model.parameters(), **options)


def counterpart(rule: str) -> Callable[..., Any]:
    found = OF_TORCH[rule].torchs
    assert found is not None
    return found


def assert_same_run(left: nn.Module, right: nn.Module, what: str) -> None:
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        # float64; torch may contract a product and a sum, which rounds once less
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=what)


@pytest.mark.parametrize("average", [None, rf.ema(0.5)], ids=["plain", "ema"])
@pytest.mark.parametrize("rule", OF_TORCH)
def test_torch_goes_on_with_our_checkpoint(rule: str, average: rf.Average | None) -> None:
    options = OF_TORCH[rule].options
    ours, opt = one(OF_TORCH[rule].made, {"average": average})
    theirs, sgd = one(counterpart(rule), {"lr": 1.0})
    train(ours, opt, 1, 4)
    theirs.load_state_dict(ours.state_dict())
    sgd.load_state_dict(through_bytes(opt.state_dict()))
    for key, value in options.items():
        assert sgd.param_groups[0][key] == value
    train(ours, opt, 5, STEPS)
    train(theirs, sgd, 5, STEPS)
    assert_same_run(ours, theirs, rule)


@pytest.mark.parametrize(
    "average", [None, rf.ema(0.5), rf.rswa(4, 1)], ids=["plain", "ema", "rswa"]
)
@pytest.mark.parametrize("rule", OF_TORCH)
def test_we_go_on_with_a_checkpoint_of_torch(rule: str, average: rf.Average | None) -> None:
    theirs, sgd = one(counterpart(rule), {**OF_TORCH[rule].options, "foreach": False})
    ours, opt = one(OF_TORCH[rule].cls, {"lr": 1.0, "average": average})
    train(theirs, sgd, 1, 4)
    ours.load_state_dict(theirs.state_dict())
    opt.load_state_dict(through_bytes(sgd.state_dict()), step=4)
    assert opt.param_groups[0]["average"] == average
    assert opt.n_averaged == 0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for name in OF_TORCH[rule].keeps:
            assert bits(opt.state.get(p, {}).get(name)) == bits(sgd.state[q].get(name))
    last = 4 + 7  # rswa(4, 1) takes its first sample, a copy, after step 8, the next after step 12
    train(ours, opt, 5, last)
    train(theirs, sgd, 5, last)
    assert_same_run(ours, theirs, rule)
    assert opt.n_averaged == (0 if average is None else 7 if average == rf.ema(0.5) else 1)


def test_a_checkpoint_of_torch_with_other_parameters_is_refused() -> None:
    ours, opt = one(rf.FusedSGD, {"lr": 0.1, "momentum": 0.9})
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(3)) for _ in ours.parameters()], 0.1, 0.9)
    sgd.param_groups[0]["params"][0].grad = torch.ones(3)
    sgd.step()
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 .*\(3,\).*\(5, 3\)"):
        opt.load_state_dict(sgd.state_dict())


@pytest.mark.parametrize("place", [0, 1])
def test_a_group_put_into_a_checkpoint_without_counters_counts_the_steps_of_the_others(
    place: int,
) -> None:
    """As somebody does who resumes with new layers: their group is one of torch's."""
    model, opt = one(rf.FusedSGD, {"lr": 0.1, "average": rf.mean(start=6)})
    train(model, opt, 1, 5)
    saved = opt.state_dict()
    added = nn.Parameter(torch.zeros(2))
    extra = torch.optim.SGD([added], 0.1).state_dict()["param_groups"][0]
    saved["param_groups"].insert(place, {**extra, "params": [len(list(model.parameters()))]})
    parts: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    parts.insert(place, {"params": [added]})
    longer = rf.FusedSGD(parts, lr=0.1, average=rf.mean(start=6))
    longer.load_state_dict(saved)
    assert [group["step"] for group in longer.state_dict()["param_groups"]] == [5, 5]
    for step, n_averaged in ((6, 0), (7, 1)):
        train(model, longer, step, step)
        assert longer.n_averaged == n_averaged


# ---- what loading makes of tensors -------------------------------------------------------------


def storages(opt: Any) -> set[int]:
    return {
        value.untyped_storage().data_ptr()
        for held in opt.state.values()
        for value in held.values()
        if isinstance(value, Tensor) and value.numel() > 0
    }


@pytest.mark.parametrize("method", ["momentum", "rsgdm explicit", "ema", "switch_ema"])
def test_two_optimizers_never_share_loaded_state(method: str) -> None:
    model, opt = build(method)
    train(model, opt, 1, 6)
    model2, opt2 = build(method)
    model2.load_state_dict(model.state_dict())
    saved = opt.state_dict()
    opt2.load_state_dict(saved)
    assert storages(opt).isdisjoint(storages(opt2))
    before = result(opt)
    train(model2, opt2, 7, STEPS)
    assert result(opt) == before
    train(model, opt, 7, STEPS)
    assert result(opt) == result(opt2)
    opt.load_state_dict(opt.state_dict())  # its own
    assert result(opt) == result(opt2)


def test_what_else_a_checkpoint_holds_is_copied_too() -> None:
    """A learning rate that is a tensor, and what a user keeps beside the buffers."""
    model, opt = one(rf.FusedSGD, {"lr": torch.tensor(0.25)})
    p = next(iter(model.parameters()))
    opt.state[p]["mine"] = torch.ones(3)
    saved = opt.state_dict()
    model2, opt2 = one(rf.FusedSGD, {"lr": 1.0})
    opt2.load_state_dict(saved)
    opt2.param_groups[0]["lr"].fill_(0.125)
    opt2.state[next(iter(model2.parameters()))]["mine"].zero_()
    assert opt.param_groups[0]["lr"] == 0.25 and opt.state[p]["mine"].tolist() == [1.0] * 3


def test_a_16_bit_parameters_average_comes_back_in_float32() -> None:
    model, opt = build("ema", torch.bfloat16)
    train(model, opt, 1, 8)
    model2, opt2 = build("ema", torch.bfloat16)
    opt2.load_state_dict(through_bytes(opt.state_dict()))
    narrow = []
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        if "average" in opt.state[p]:
            average, loaded = opt.state[p]["average"], opt2.state[q]["average"]
            assert average.dtype == loaded.dtype == torch.float32
            assert bits(average) == bits(loaded)
            narrow.append(torch.equal(average, average.bfloat16().float()))
        assert opt2.state[q]["momentum_buffer"].dtype == torch.bfloat16
    assert not all(narrow)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("method", ["momentum", "rsgdm explicit", "ema"])
def test_a_contiguous_buffer_saved_for_a_channels_last_parameter_is_not_misread(
    method: str, flatten: bool
) -> None:
    model, opt = build(method, flatten=flatten)
    train(model, opt, 1, 6)
    saved = copy.deepcopy(opt.state_dict())
    for held in saved["state"].values():
        for key in held:
            held[key] = held[key].contiguous()
    opt.load_state_dict(saved)
    for key, value in opt.state[model.conv].items():
        assert value.stride() == model.conv.stride(), key
        assert not value.is_contiguous()
    train(model, opt, 7, STEPS)
    unsaved, opt2 = build(method)
    train(unsaved, opt2, 1, STEPS)
    assert result(opt) == result(opt2)


def test_a_tensor_learning_rate_stays_one() -> None:
    model, opt = one(rf.FusedSGD, {"lr": torch.tensor(0.25), "momentum": 0.5})
    train(model, opt, 1, 2)
    model2, opt2 = one(rf.FusedSGD, {"lr": 1.0, "momentum": 0.5})
    model2.load_state_dict(model.state_dict())
    opt2.load_state_dict(through_bytes(opt.state_dict()))
    assert isinstance(opt2.param_groups[0]["lr"], Tensor)
    opt2.param_groups[0]["lr"].fill_(0.125)
    assert opt.param_groups[0]["lr"] == 0.25
    opt.param_groups[0]["lr"].fill_(0.125)
    train(model, opt, 3, 5)
    train(model2, opt2, 3, 5)
    assert_same_run(model, model2, "lr")


# ---- policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", AVERAGED)
def test_a_checkpoint_without_averages_starts_any_policy(method: str, dtype: torch.dtype) -> None:
    model = Model(dtype)
    plain = METHODS[method].rule.made(groups(model))
    train(model, plain, 1, 3)
    saved = through_bytes(plain.state_dict())
    model2, opt = build(method, dtype)
    model2.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)
    assert policies_of(opt.param_groups[0]["average"])
    assert opt.n_averaged == 0
    with opt.averaged():
        assert bits(model2.matrix) == bits(model.matrix)
    train(model2, opt, 4, 3 * EPOCH)
    assert opt.n_averaged > 0


CHANGED: list[tuple[str, rf.Average, rf.Average]] = [
    ("decay", rf.ema(0.9), rf.ema(0.5)),
    ("start", rf.mean(start=1), rf.mean(start=3)),
    ("every", rf.mean(every=1), rf.mean(every=2)),
    ("steps_per_epoch", rf.rswa(2, 1), rf.rswa(3, 1)),
    ("start_epoch of rbwa", rf.rbwa(2, 1), rf.rbwa(2, 2)),
    ("steps_per_epoch of algorithm2", rf.rbwa(2, 1, "algorithm2"), rf.rbwa(3, 1, "algorithm2")),
    ("beta", rf.rbwa_e(0.9, steps_per_epoch=2), rf.rbwa_e(0.8, steps_per_epoch=2)),
    ("k and alpha", rf.lookahead(2, 0.5), rf.lookahead(3, 0.25)),
    ("write_back_every", rf.switch_ema(steps_per_epoch=2), rf.switch_ema(steps_per_epoch=3)),
]


@pytest.mark.parametrize(("old", "new"), [c[1:] for c in CHANGED], ids=[c[0] for c in CHANGED])
def test_a_changed_number_warns_once_and_takes_the_codes_value(
    old: rf.Average, new: rf.Average
) -> None:
    model, opt = one(rf.FusedSGD, {"lr": 0.1, "average": old})
    train(model, opt, 1, 6)
    saved = through_bytes(opt.state_dict())
    _, opt2 = one(rf.FusedSGD, {"lr": 0.1, "average": new})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt2.load_state_dict(saved)
    assert [str(w.message) for w in seen if old.describe() in str(w.message)] == [
        str(w.message) for w in seen
    ]
    assert len(seen) == 1
    assert new.describe() in str(seen[0].message)
    assert opt2.param_groups[0]["average"] == new
    assert opt2.n_averaged == opt.n_averaged
    assert opt2.state_dict()["param_groups"][0]["average"] == new.describe()


def test_a_changed_decay_is_used_from_the_next_sample_on() -> None:
    model, opt = one(rf.FusedSGD, {"lr": 0.1, "average": rf.ema(0.9)})
    train(model, opt, 1, 3)
    model2, opt2 = one(rf.FusedSGD, {"lr": 0.1, "average": rf.ema(0.5)})
    model2.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"decay=0\.9.*decay=0\.5"):
        opt2.load_state_dict(opt.state_dict())
    before = opt2.state[model2.matrix]["average"].clone()
    train(model2, opt2, 4, 4)
    expected = 0.5 * before + 0.5 * model2.matrix.detach()
    torch.testing.assert_close(opt2.state[model2.matrix]["average"], expected)


def test_one_policy_changed_for_many_groups_warns_once_where_the_user_stands() -> None:
    def make(decay: float) -> Any:
        members = [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(5)]
        return rf.FusedSGD(members, lr=0.1, average=rf.ema(decay))

    saved = make(0.9).state_dict()
    opt = make(0.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize("into", ALGORITHMS)
@pytest.mark.parametrize("source", ALGORITHMS)
def test_a_checkpoint_never_changes_its_rule(source: str, into: str) -> None:
    model, opt = build(source)
    train(model, opt, 1, 3)
    model2, opt2 = build(into)
    train(model2, opt2, 1, 2)
    saved = through_bytes(opt.state_dict())
    if source == into:
        opt2.load_state_dict(saved)
        return
    before = snapshot(opt2)
    with pytest.raises(ValueError, match=f"rule is '{ALGORITHMS[source].literal.__name__}'"):
        opt2.load_state_dict(saved)
    assert snapshot(opt2) == before


def test_torchs_checkpoint_is_not_taken_for_rsgdm() -> None:
    model, sgd = one(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    train(model, sgd, 1, 2)
    _, opt = one(rf.RSGDM, {"lr": 0.1})
    with pytest.raises(ValueError, match="rule is 'sgd'"):
        opt.load_state_dict(sgd.state_dict())


def test_implicit_rsgdm_still_refuses_another_momentum_after_resume() -> None:
    model, opt = build("rsgdm implicit")
    train(model, opt, 1, 3)
    model2, opt2 = build("rsgdm implicit")
    model2.load_state_dict(model.state_dict())
    opt2.load_state_dict(through_bytes(opt.state_dict()))
    opt2.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match="explicit"):
        train(model2, opt2, 4, 4)


@pytest.mark.parametrize("saved_after", [6, 9])
@pytest.mark.parametrize("method", [*IN_PLACE, "ema", "lookahead"])
@pytest.mark.parametrize(
    "dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_a_converted_run_can_still_be_saved_and_loaded(
    method: str, dtype: tuple[torch.dtype, torch.dtype], saved_after: int
) -> None:
    before, after = dtype
    model, opt = build(method, before)
    train(model, opt, 1, 6)
    model.to(after)
    opt.zero_grad()
    train(model, opt, 7, saved_after)
    model2, opt2 = build(method, after)
    model2.load_state_dict(model.state_dict())
    opt2.load_state_dict(through_bytes(opt.state_dict()))
    train(model, opt, saved_after + 1, STEPS)
    train(model2, opt2, saved_after + 1, STEPS)
    assert result(opt2)["weights"] == result(opt)["weights"]
    assert opt2.n_averaged == opt.n_averaged


def forget_all(opt: Any) -> None:
    opt.state.clear()


def replace_all(opt: Any) -> None:
    opt.state = defaultdict(dict)


def forget_one(opt: Any) -> None:
    del opt.state[opt.param_groups[0]["params"][0]]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("forget", [forget_all, replace_all, forget_one])
def test_momentum_that_somebody_takes_away_is_gone_as_in_torch(
    forget: Callable[[Any], None], flatten: bool
) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}
    ours, opt = one(rf.FusedSGD, {**options, "flatten": flatten})
    theirs, sgd = one(torch.optim.SGD, options)
    for model, either in ((ours, opt), (theirs, sgd)):
        train(model, either, 1, 4)
        forget(either)
        train(model, either, 5, 8)
    assert_same_run(ours, theirs, forget.__name__)


# ---- copies and files --------------------------------------------------------------------------


def saved_whole(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved_whole,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_copied_run_goes_on_bit_for_bit_and_alone(method: str, how: str) -> None:
    model, opt = build(method)
    train(model, opt, 1, 6)
    model2, opt2 = COPIES[how]((model, opt))
    assert result(opt2) == result(opt)
    assert opt2.param_groups[0]["params"][0] is model2.matrix
    assert opt2.param_groups[0]["average"] == opt.param_groups[0]["average"]
    before = result(opt)
    train(model2, opt2, 7, STEPS)
    assert result(opt) == before
    train(model, opt, 7, STEPS)
    assert result(opt) == result(opt2)


def test_a_deepcopied_scheduler_drives_its_own_optimizer() -> None:
    model, opt = build("ema")
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=4)
    train(model, opt, 1, 1)
    scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's scheduler says that `step` was replaced
        _, opt2, scheduler2 = copy.deepcopy((model, opt, scheduler))
        scheduler2.step()
    assert scheduler2.optimizer is opt2
    assert opt2.param_groups[0]["lr"] < opt.param_groups[0]["lr"]


def test_saving_one_parameter_writes_its_bytes_and_not_the_buffer(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema())
    train(model, opt, 1, 2)
    small = model[1].bias
    one_of_all = [small, *opt.state[small].values(), model[1].state_dict(), copy.deepcopy(small)]
    assert len(opt.state[small]) == 2
    for i, value in enumerate(one_of_all):
        torch.save(value, tmp_path / str(i))
        assert (tmp_path / str(i)).stat().st_size < 8192, i
        assert len(pickle.dumps(value)) < 8192, i
    whole = sum(p.numel() for p in model.parameters()) * 4
    torch.save(model.state_dict(), tmp_path / "model")
    assert (tmp_path / "model").stat().st_size < whole + 8192
    torch.save(opt.state_dict(), tmp_path / "opt")
    assert (tmp_path / "opt").stat().st_size < 2 * whole + 16384


@pytest.mark.parametrize("flatten", [True, False])
def test_safetensors_saves_models_and_averages(tmp_path: Path, flatten: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    model[2].weight = model[0].weight  # tied
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(), flatten=flatten)
    train(model, opt, 1, 2)
    save_model(model, str(tmp_path / "model"))
    assert bits(load_file(tmp_path / "model")["0.weight"]) == bits(model[0].weight)
    averaged = opt.averaged_state_dict(model)
    save_file(averaged, tmp_path / "averaged")
    assert bits(load_file(tmp_path / "averaged")["0.bias"]) == bits(averaged["0.bias"])
    untied = {k: v for k, v in model.state_dict().items() if k != "2.weight"}
    save_file(untied, tmp_path / "plain")
    assert bits(load_file(tmp_path / "plain")["2.bias"]) == bits(model[2].bias)
    state = {
        f"{i}.{k}": v for i, held in opt.state_dict()["state"].items() for k, v in held.items()
    }
    save_file(state, tmp_path / "state")
    for key, value in load_file(tmp_path / "state").items():
        assert bits(value) == bits(state[key])


@pytest.mark.parametrize("method", ["momentum", "ema", "lookahead"])
def test_the_step_follows_a_submodule_that_was_shared(method: str) -> None:
    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        return model, METHODS[method](model.parameters())

    model, opt = make()
    train(model, opt, 1, 5)
    others = [p.data_ptr() for p in model[0].parameters()]
    model[1].share_memory()
    assert model[1].weight.is_shared() and not model[0].weight.is_shared()
    train(model, opt, 6, STEPS)
    assert model[1].weight.is_shared()
    assert [p.data_ptr() for p in model[0].parameters()] == others
    unshared, opt2 = make()
    train(unshared, opt2, 1, STEPS)
    assert result(opt) == result(opt2)


# ---- hooks and names ---------------------------------------------------------------------------


def watched(opt: Any) -> list[Any]:
    """Registers two hooks of every kind, the second of them first in line."""
    calls: list[Any] = []

    def note(what: str, give_back: bool) -> Callable[..., Any]:
        def hook(opt: Any, *rest: Any) -> Any:
            counts = [sorted(map(str, d)) for d in rest]
            calls.append((what, len(opt.state), opt.param_groups[0]["lr"], counts))
            return dict(rest[0]) if give_back and rest else None

        return hook

    for i in (0, 1):
        first = bool(i)
        opt.register_state_dict_pre_hook(note(f"save before {i}", False), prepend=first)
        opt.register_state_dict_post_hook(note(f"save after {i}", first), prepend=first)
        opt.register_load_state_dict_pre_hook(note(f"load before {i}", first), prepend=first)
        opt.register_load_state_dict_post_hook(note(f"load after {i}", False), prepend=first)
    return calls


def test_state_dict_hooks_run_in_torchs_order_and_see_what_torchs_see() -> None:
    seen = []
    for cls in (torch.optim.SGD, rf.FusedSGD):
        model, opt = one(cls, {"lr": 0.1, "momentum": 0.9})
        train(model, opt, 1, 1)
        saved = copy.deepcopy(opt.state_dict())
        _, opt2 = one(cls, {"lr": 0.5, "momentum": 0.9})
        calls = watched(opt2)
        opt2.state_dict()
        opt2.load_state_dict(saved)
        opt2.state_dict()
        seen.append(calls)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 12


def test_a_hooks_replacement_is_what_is_loaded_and_what_is_returned() -> None:
    model, opt = one(rf.FusedSGD, {"lr": 0.1, "momentum": 0.9, "average": rf.ema()})
    train(model, opt, 1, 2)
    saved = opt.state_dict()

    def other_lr(opt: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        first, *rest = loaded["param_groups"]
        return {**loaded, "param_groups": [{**first, "lr": 0.75}, *rest]}

    opt.register_load_state_dict_pre_hook(other_lr)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.75
    assert saved["param_groups"][0]["lr"] == 0.1
    opt.register_state_dict_post_hook(lambda opt, saved: {**saved, "mine": 1})
    assert opt.state_dict()["mine"] == 1


def test_a_hook_that_raises_leaves_the_policy_in_place() -> None:
    def refuse(*args: Any) -> None:
        raise KeyError("mine")

    for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre"):
        model, opt = build("ema")
        train(model, opt, 1, 6)
        saved = copy.deepcopy(opt.state_dict())
        before = snapshot(opt)
        hook = getattr(opt, f"register_{kind}_hook")(refuse)
        with pytest.raises(KeyError, match="mine"):
            opt.load_state_dict(saved) if kind.startswith("load") else opt.state_dict()
        hook.remove()
        assert snapshot(opt) == before


def test_a_hook_of_state_dict_finds_live_policies_in_the_groups() -> None:
    _, opt = build("ema")
    seen = []
    opt.register_state_dict_pre_hook(lambda opt: seen.append(opt.param_groups[0]["average"]))
    opt.state_dict()
    assert seen == [opt.param_groups[0]["average"]]


def test_parameter_names_survive() -> None:
    model = Model()
    opt = rf.FusedSGD(model.named_parameters(), lr=0.1, momentum=0.9, average=rf.ema())
    train(model, opt, 1, 2)
    names = [name for name, _ in model.named_parameters()]
    saved = through_bytes(opt.state_dict())
    assert saved["param_groups"][0]["param_names"] == names
    fresh = Model()
    named = rf.FusedSGD(fresh.named_parameters(), lr=0.1, momentum=0.9, average=rf.ema())
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == names
    del saved["param_groups"][0]["param_names"]
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == names
    copied = copy.deepcopy(named)
    assert copied.state_dict()["param_groups"][0]["param_names"] == names


# ---- whatever happens between two steps --------------------------------------------------------


def _reload(model: Any, opt: Any) -> tuple[Any, Any]:
    opt.load_state_dict(through_bytes(opt.state_dict()))
    return model, opt


def _save_while_evaluating(model: Any, opt: Any) -> tuple[Any, Any]:
    with opt.averaged():
        saved = through_bytes(opt.state_dict())
    opt.load_state_dict(saved)
    return model, opt


def _evaluate(model: Any, opt: Any) -> tuple[Any, Any]:
    with opt.averaged(), opt.averaged():
        opt.averaged_state_dict(model)
    return model, opt


def _repoint(model: Any, opt: Any) -> tuple[Any, Any]:
    for p in model.parameters():
        p.data = p.data.clone()
    return model, opt


def _share(model: Any, opt: Any) -> tuple[Any, Any]:
    return model.share_memory(), opt


def _refuse(model: Any, opt: Any) -> tuple[Any, Any]:
    for p in model.parameters():
        p.grad = torch.ones(p.shape).to(p.dtype).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    return model, opt


def _resume(model: Any, opt: Any) -> tuple[Any, Any]:
    fresh = Model(model.matrix.dtype)
    fresh.load_state_dict(model.state_dict())
    policies = [group["average"] for group in opt.param_groups]
    members = groups(fresh)
    members[0]["average"] = policies[0]
    saved = opt.state_dict()
    rules = {"rsgdm_implicit": "implicit", "rsgdm_explicit": "explicit", "sgdm": None}
    rule = saved["param_groups"][0]["rule"]
    options = {"difference": rules[rule]} if rule in rules else {}
    if rule == "adam":
        options["state_dtype"] = opt.engine.options.state_dtype
    new = type(opt)(members, **options)
    new.load_state_dict(saved)
    return fresh, new


EVENTS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "reload": _reload,
    "save while evaluating": _save_while_evaluating,
    "evaluate": _evaluate,
    "re-point": _repoint,
    "share": _share,
    "refuse": _refuse,
    "resume": _resume,
    "deepcopy": lambda model, opt: copy.deepcopy((model, opt)),
    "pickle": lambda model, opt: pickle.loads(pickle.dumps((model, opt))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("event", EVENTS)
def test_no_single_event_between_steps_changes_a_bit_of_the_run(
    event: str, dtype: torch.dtype
) -> None:
    for method in METHODS:
        expected, plain = build(method, dtype)
        train(expected, plain, 1, STEPS)
        for stop in STOPS:
            model, opt = build(method, dtype)
            train(model, opt, 1, stop)
            model, opt = EVENTS[event](model, opt)
            train(model, opt, stop + 1, STEPS)
            assert result(opt) == result(plain), (method, stop)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from(DTYPES),
    events=st.dictionaries(st.integers(0, 10), st.sampled_from(list(EVENTS)), max_size=5),
)
def test_no_sequence_of_events_between_steps_changes_a_bit_of_the_run(
    method: str, dtype: torch.dtype, events: dict[int, str]
) -> None:
    model, opt = build(method, dtype)
    expected, plain = build(method, dtype)
    for step in range(11):
        if step in events:
            model, opt = EVENTS[events[step]](model, opt)
        train(model, opt, step + 1, step + 1)
    train(expected, plain, 1, 11)
    assert result(opt) == result(plain)


def test_a_custom_weight_is_known_again_by_its_name() -> None:
    model, opt = one(rf.FusedSGD, {"lr": 0.1, "average": rf.Average(scheduled)})
    train(model, opt, 1, 2)
    saved = through_bytes(opt.state_dict())
    _, opt2 = one(rf.FusedSGD, {"lr": 0.1, "average": rf.Average(lambda n, step: 0.5)})
    with pytest.raises(ValueError, match="scheduled"):
        opt2.load_state_dict(saved)
    feed(model, 3)


# ---- averages that are left out ------------------------------------------------------------------


@pytest.mark.parametrize("into", [None, rf.mean(start=3), rf.rbwa(2, 1)], ids=repr)
@pytest.mark.parametrize("method", ["ema", "lookahead", "rbwa", "momentum"])
def test_a_checkpoint_loads_without_its_averages_where_they_are_dropped(
    method: str, into: rf.Average | None
) -> None:
    """Weights, momentum and the count of steps go on; averages start as they would there."""
    model, opt = build(method)
    train(model, opt, 1, 5)
    saved = copy.deepcopy(opt.state_dict())
    rule = METHODS[method].rule
    fresh = rule.made(groups(model), average=into)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(saved, averages="drop")
    assert fresh.n_averaged == 0 and fresh.engine.steps == 5
    for key, held in fresh.state_dict()["state"].items():
        before = {k: v for k, v in saved["state"][key].items() if k != "average"}
        assert held.keys() == before.keys()
        assert all(torch.equal(held[k], before[k]) for k in held)
    train(model, fresh, 6, 6)
    assert fresh.n_averaged == int(into is not None)


def test_what_is_to_become_of_averages_is_one_of_two_words() -> None:
    model, opt = build("ema")
    train(model, opt, 1, 2)
    with pytest.raises(ValueError, match=r"Invalid averages: 'keep' .*'load' or 'drop'"):
        opt.load_state_dict(opt.state_dict(), averages="keep")
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first = rf.FusedSGD(net.parameters(), average=rf.ema(0.5), buffers=net)
    net(torch.ones(3, 2)).sum().backward()
    first.step()
    other = rf.FusedSGD(net.parameters(), average=rf.mean(), buffers=net)
    other.load_state_dict(first.state_dict(), averages="drop")
    assert other.state_dict()["buffers"] == {
        "average": rf.mean().describe(),
        "n_averaged": 0,
        "averages": {},
    }
