"""Lightning trains and validates bit for bit as the loop written by hand does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    BATCHES,
    EPOCHS,
    FITS,
    QUIET,
    Configure,
    ModelCheckpoint,
    Net,
    by_hand,
    clip_norm,
    ema,
    fit,
    loader,
    pl,
    trainer,
)
from networks import digests, held
from runs import result
from torch import nn

import rbwa_fused as rf
from rbwa_fused.integrations.lightning import AveragedEvaluation

pytestmark = QUIET


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_the_loop_written_by_hand_and_validates_its_averages(
    name: str, tmp_path: Path
) -> None:
    configure, options, ours = FITS[name]
    expected, opt = by_hand(configure, **ours)
    model, run = fit(tmp_path, AveragedEvaluation(), configure=configure, **options)
    assert result(run.optimizers[0]) == result(opt)
    assert held(model) == held(expected)
    assert model.seen == expected.seen
    assert opt.n_averaged > 0


# ---- clipping under mixed precision ------------------------------------------------------------


def scaled() -> dict[str, Any]:
    """What Lightning has under precision="16-mixed" on a GPU; on a CPU it takes bfloat16."""
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    return {"plugins": [plugin]}


def without_unscaling(model: nn.Module) -> Any:
    opt = ema(model)
    opt._step_supports_amp_scaling = False  # as README says
    return opt


def test_gradients_are_clipped_under_bf16_mixed(tmp_path: Path) -> None:
    expected, opt = by_hand(ema, autocast=torch.bfloat16, clip=clip_norm)
    for callbacks in ([], [AveragedEvaluation()]):
        _, run = fit(tmp_path, *callbacks, precision="bf16-mixed", gradient_clip_val=0.2)
        assert result(run.optimizers[0]) == result(opt)
    assert held(expected) != held(by_hand(ema, autocast=torch.bfloat16)[0])


@pytest.mark.parametrize(
    ("configure", "callbacks"), [(ema, [AveragedEvaluation()]), (without_unscaling, [])]
)
def test_gradients_are_clipped_under_16_mixed(
    configure: Configure, callbacks: list[Any], tmp_path: Path
) -> None:
    _, opt = by_hand(ema, autocast=torch.float16, clip=clip_norm, scaled=True)
    _, run = fit(tmp_path, *callbacks, configure=configure, gradient_clip_val=0.2, **scaled())
    assert result(run.optimizers[0]) == result(opt)


class ClippedInTheStep(Net):
    """As README says."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        rf.clip_grad_norm_(optimizer, gradient_clip_val)


@pytest.mark.parametrize(
    ("configure", "options"),
    [(ema, dict), (ema, lambda: {"precision": "bf16-mixed"}), (without_unscaling, scaled)],
    ids=["float32", "bf16-mixed", "16-mixed"],
)
def test_a_module_clips_in_the_step_by_its_hook(
    configure: Configure,
    options: Callable[[], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = []
    for cls in (Net, ClippedInTheStep):
        model = cls(configure)
        run = trainer(tmp_path, gradient_clip_val=0.2, **options())
        with monkeypatch.context() as patch:
            if cls is not Net:
                patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: pytest.fail("in place"))
            run.fit(model, loader(), loader())
        ends.append([p.detach() for p in model.parameters()])
    for clipped, in_the_step in zip(*ends, strict=True):
        # 20 steps whose coefficient may differ in its last bit.
        assert torch.allclose(clipped, in_the_step, rtol=1e-5, atol=1e-6)


def test_what_lightning_leaves_scaled_raises_instead_of_being_clipped_wrongly(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path, gradient_clip_val=0.2, **scaled())
    with pytest.raises(RuntimeError, match="clip_grad_norm_ saw scaled gradients"):
        run.fit(ClippedInTheStep(ema), loader())


@pytest.mark.parametrize("unscaling", [True, False])
def test_a_scaler_finds_the_optimizer_after_a_closure_as_before_it(unscaling: bool) -> None:
    opt = rf.FusedSGD([nn.Parameter(torch.ones(2))], lr=0.1)
    opt._step_supports_amp_scaling = unscaling
    seen = []

    def closure() -> None:
        seen.append(opt._step_supports_amp_scaling)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        opt.step(closure)
    assert seen == [False] and opt._step_supports_amp_scaling == unscaling


# ---- manual optimization -----------------------------------------------------------------------


def two(model: Any) -> Any:
    first = rf.FusedSGD(model.net[:2].parameters(), 0.1, 0.9, average=rf.ema(0.8, start=3))
    second = rf.RSGDM(model.net[2:].parameters(), 0.05, average=rf.lookahead(3))
    return first, second


class Manual(Net):
    """Two optimizers in turn, the second at every other batch."""

    def __init__(self, configure: Configure = two) -> None:
        super().__init__(configure)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for opt in self.optimizers()[: 2 if index % 2 == 0 else 1]:
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()


def two_by_hand() -> tuple[Net, tuple[Any, Any]]:
    model = Net(two)
    first, second = two(model)
    for _ in range(EPOCHS):
        model.train()
        for index, batch in enumerate(loader()):
            for opt in (first, second)[: 2 if index % 2 == 0 else 1]:
                opt.zero_grad()
                model.loss(batch).backward()
                opt.step()
        with first.averaged(), second.averaged():
            model.eval()
            for index, batch in enumerate(loader()):
                model.validation_step(batch, index)
    return model, (first, second)


def test_manual_optimization_of_two_optimizers_is_the_loop_written_by_hand(tmp_path: Path) -> None:
    expected, opts = two_by_hand()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, resumed = Manual(), Manual()
    trainer(tmp_path, AveragedEvaluation(), saving).fit(model, loader(), loader())
    again = trainer(tmp_path, AveragedEvaluation())
    again.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    for run in (model.trainer, again):
        assert list(map(result, run.optimizers)) == list(map(result, opts))
    assert held(model) == held(resumed) == held(expected)
    assert model.seen == expected.seen
    assert resumed.seen == expected.seen[2 * BATCHES :]


# ---- wrappers ----------------------------------------------------------------------------------


def of_the_trainer(opt: Any) -> Any:
    return pl.core.optimizer.LightningOptimizer(opt)


def fabric() -> Any:
    if pl.__name__ == "lightning.pytorch":
        from lightning.fabric import Fabric
    else:
        from lightning_fabric import Fabric
    return Fabric(accelerator="cpu", devices=1)


def of_fabric(opt: Any) -> Any:
    return fabric().setup_optimizers(opt)


@pytest.mark.parametrize("wrap", [of_the_trainer, of_fabric])
def test_what_lightning_hands_out_for_the_optimizer_is_as_good_as_the_optimizer(
    wrap: Callable[[Any], Any],
) -> None:
    model = Net()
    opt = ema(model)
    wrapper = wrap(opt)
    assert isinstance(wrapper, rf.FusedSGD) and wrapper is not opt
    for batch in [*loader(), *loader()]:
        model.loss(batch).backward()
        opt.step()
        opt.zero_grad()
    averaged, before = digests(opt.averaged_state_dict(model)), held(model)
    assert wrapper.n_averaged == opt.n_averaged == BATCHES - 2
    assert digests(wrapper.averaged_state_dict(model)) == averaged != before
    expected = copy.deepcopy(opt.state_dict())
    with wrapper.averaged():
        assert held(model) == averaged
        with opt.averaged():
            assert held(model) == averaged
        for refused in (opt, wrapper):
            with pytest.raises(RuntimeError, match=r"averaged\(\)"):
                refused.load_state_dict({})
            with pytest.raises(RuntimeError, match=r"averaged\(\)"):
                refused.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(RuntimeError, match=r"averaged\(\)"):
            opt.step()
        inside = copy.deepcopy(wrapper.state_dict())
    assert held(model) == before
    for saved in (inside, wrapper.state_dict()):
        assert saved["param_groups"] == expected["param_groups"]
        for key, state in expected["state"].items():
            assert digests(saved["state"][key]) == digests(state)


@pytest.mark.parametrize("wrap", [of_the_trainer, of_fabric])
def test_loading_and_adding_through_a_wrapper_reach_the_optimizer(
    wrap: Callable[[Any], Any],
) -> None:
    model, source = Net(), Net()
    opt, saved = ema(model), ema(source)
    for batch in [*loader(), *loader()]:
        source.loss(batch).backward()
        saved.step()
        saved.zero_grad()
    model.load_state_dict(source.state_dict())
    wrap(opt).load_state_dict(saved.state_dict())
    assert result(opt) == result(saved)
    extra = nn.Parameter(torch.ones(2))
    wrap(opt).add_param_group({"params": [extra]})
    extra.grad = torch.ones(2)
    opt.step()
    assert not extra.equal(torch.ones(2))
    assert opt.n_averaged == saved.n_averaged + 1


def test_fabric_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(first: int, last: int, load: bool) -> tuple[Any, Any]:
        model = Net()
        opt = ema(model)
        f = fabric()
        state = dict(zip(("model", "opt"), f.setup(model, opt), strict=True))
        state["model"].mark_forward_method("loss")
        if load:
            f.load(tmp_path / "saved", state)
        for epoch in range(first, last):
            for batch in loader():
                f.backward(state["model"].loss(batch))
                state["opt"].step()
                state["opt"].zero_grad()
            if epoch == 1 and not load:
                with state["opt"].averaged():
                    assert held(model) == digests(opt.averaged_state_dict(model))
                f.save(tmp_path / "saved", state)
        return held(model), result(opt)

    assert run(0, 4, load=False) == run(2, 4, load=True)
