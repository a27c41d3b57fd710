"""transformers' Trainer evaluates, predicts and ends with averages; training stays what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import digests, held
from safetensors.torch import load_file
from torch import nn
from trainers import (
    BATCHES,
    QUIET,
    STEPS,
    AveragedWeights,
    Net,
    Noting,
    averager_of,
    data,
    literal,
    replayed,
    trainer,
    transformers,
)

import rbwa_fused as rf

pytestmark = QUIET

START = BATCHES + 2
POLICIES: dict[str, Any] = {
    "ema": (rf.ema(0.75, start=START), lambda step: step > START, lambda n: 0.25),
    "mean": (
        rf.mean(start=2, every=3),
        lambda step: step > 2 and (step - 2) % 3 == 0,
        lambda n: 1 / (n + 1),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 4},  # the last of an epoch has two batches
    "clipped and scheduled": {
        "max_grad_norm": 0.2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
    },
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_averages_are_those_of_a_loop_and_training_is_what_it_is_without(
    name: str, options: str, tmp_path: Path
) -> None:
    policy, sampled, weight = POLICIES[name]
    averaging, noting, alone = AveragedWeights(policy, buffers=True), Noting(), Noting()
    often = {"eval_strategy": "steps", "eval_steps": 2, **OPTIONS[options]}
    trainer(tmp_path, averaging, noting, **often).train()
    trainer(tmp_path, alone, **often).train()
    assert [*map(digests, noting.weights)] == [*map(digests, alone.weights)]
    steps = len(noting.weights)
    assert steps == (6 if "accumulation" in str(OPTIONS[options]) else STEPS)
    expected = literal(noting.weights, sampled, weight)
    found = averager_of(averaging).averages()
    assert averager_of(averaging).n_averaged == sum(map(sampled, range(1, steps + 1)))
    assert found.keys() == {key for key in expected if "tracked" not in key}
    for name, average in found.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_evaluations_see_the_averages_of_their_step_and_nobody_else_does(tmp_path: Path) -> None:
    policy = rf.ema(0.75, start=3)
    averaging, noting = AveragedWeights(policy), Noting()
    behind: list[bool] = []

    class Behind(transformers.TrainerCallback):  # type: ignore[misc]
        """After our callback, in each of which the training weights are back."""

        def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            now = [*noting.began, *noting.weights][-1]
            behind.append(held(others["model"]) == digests(now))

        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 9:
                run.predict(data(8))
                self.on_evaluate(args, state, control, **others)

    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    run = trainer(tmp_path, averaging, noting, Behind(), **options)
    run.train()
    seen = [weights for weights, _ in run.model.seen]
    averaged = replayed(noting.weights, policy)
    assert seen[0] == held(Net())
    assert seen[1] == averaged[1] == digests(noting.weights[1])  # no sample so far
    steps = [2, 4, 6, 8, 9, *range(10, STEPS + 1, 2)]
    assert seen[1:] == [averaged[step - 1] for step in steps]
    assert behind == [True] * len(seen)
    assert averaged[-1] != digests(noting.weights[-1])


def test_of_several_averages_evaluations_see_the_one_that_is_asked_for(tmp_path: Path) -> None:
    policy = rf.ema(0.75, start=3)
    averaging, noting = AveragedWeights([rf.ema(0.3), policy], which=1), Noting()
    run = trainer(tmp_path, averaging, noting, eval_strategy="steps", eval_steps=2)
    run.train()
    averaged = replayed(noting.weights, policy)
    assert [weights for weights, _ in run.model.seen] == averaged[1::2]
    assert held(run.model) == averaged[-1] != digests(noting.weights[-1])


def test_after_training_the_model_has_the_averages_until_they_are_taken_back(
    tmp_path: Path,
) -> None:
    policy = rf.ema(0.75, start=3)
    averaging, noting = AveragedWeights(policy), Noting()
    run = trainer(tmp_path, averaging, noting)
    run.train()
    averaged = replayed(noting.weights, policy)[-1]
    assert held(run.model) == averaged
    run.evaluate()
    run.predict(data(8))
    assert held(run.model) == averaged
    assert [weights for weights, _ in run.model.seen] == [averaged] * 2
    run.save_model(str(tmp_path / "saved"))
    assert digests(load_file(tmp_path / "saved" / "model.safetensors")) == averaged
    averaging.restore()
    assert held(run.model) == digests(noting.weights[-1]) != averaged
    run.evaluate()
    assert held(run.model) == digests(noting.weights[-1]) == run.model.seen[-1][0]


def test_a_second_train_goes_on_with_the_training_weights_and_averages_anew(
    tmp_path: Path,
) -> None:
    averaging, noting, alone = AveragedWeights(rf.mean()), Noting(), Noting()
    run = trainer(tmp_path, averaging, noting, num_train_epochs=1)
    run.train()
    first = averager_of(averaging)
    run.train()
    assert averager_of(averaging) is not first
    assert first.n_averaged == averager_of(averaging).n_averaged == BATCHES
    assert held(run.model) == replayed(noting.weights[BATCHES:], rf.mean())[-1]
    plain = trainer(tmp_path, alone, num_train_epochs=1)
    plain.train()
    plain.train()
    assert [*map(digests, noting.weights)] == [*map(digests, alone.weights)]


def test_a_trained_model_keeps_its_averages_where_another_is_trained(tmp_path: Path) -> None:
    """As with one callback for all folds of a cross validation."""
    averaging, noting = AveragedWeights(rf.mean()), Noting()
    first = trainer(tmp_path, averaging, noting, num_train_epochs=1)
    first.train()
    expected = replayed(noting.weights, rf.mean())[-1]
    second = trainer(tmp_path, averaging, num_train_epochs=1)
    second.train()
    averaging.restore()
    assert held(first.model) == expected
    assert held(second.model) == digests(noting.weights[-1])


def test_weights_that_were_written_after_training_are_those_of_the_next(tmp_path: Path) -> None:
    averaging, noting = AveragedWeights(rf.mean()), Noting()
    run = trainer(tmp_path, averaging, noting, num_train_epochs=1)
    run.train()
    run.model.load_state_dict(Net().state_dict())
    run.train()
    assert digests(noting.began[-1]) == held(Net()) != digests(noting.weights[BATCHES - 1])


class Failing(transformers.TrainerCallback):  # type: ignore[misc]
    """Evaluates in vain between the steps."""

    run: Any
    failed = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        raise ArithmeticError

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % 2:
            with pytest.raises(ArithmeticError):
                self.run.evaluate()
            self.failed += 1


def test_what_has_raised_in_an_evaluation_leaves_training_as_it_was(tmp_path: Path) -> None:
    weights = []
    for averaging in ([AveragedWeights(rf.ema(0.75))], []):
        noting, failing = Noting(), Failing()
        failing.run = trainer(tmp_path, *averaging, noting, failing)
        failing.run.train()
        assert failing.failed == STEPS // 2
        weights.append([*map(digests, noting.weights)])
    assert weights[0] == weights[1]


def test_a_model_of_transformers_with_tied_weights_is_saved_averaged(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(16, (8, 5), generator=torch.Generator().manual_seed(2))
    averaging, noting = AveragedWeights(rf.ema(0.5)), Noting()
    run = trainer(
        tmp_path, averaging, noting, model=model, save_strategy="epoch", eval_strategy="epoch"
    )
    run.train_dataset = run.eval_dataset = [{"input_ids": row, "labels": row} for row in ids]
    run.train()
    expected = literal(noting.weights, lambda step: True, lambda n: 0.5)
    folder = tmp_path / f"checkpoint-{run.state.global_step}"
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert held(loaded) == held(model) != digests(noting.weights[-1])
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [None, rf.ema(0.75)], ids=["its own", "an averager's"])
def test_an_optimizer_of_ours_averages_alike_by_itself(
    average: rf.Average | None, tmp_path: Path
) -> None:
    averaging, noting = AveragedWeights(average), Noting()

    def optimizer(model: nn.Module) -> Any:
        own = rf.ema(0.75) if average is None else None
        return rf.FusedSGD(model.parameters(), lr=0.05, momentum=0.9, average=own)

    run = trainer(tmp_path, averaging, noting, optimizer=optimizer, eval_strategy="epoch")
    run.train()
    averaged = replayed(noting.weights, rf.ema(0.75))
    assert [weights for weights, _ in run.model.seen] == averaged[BATCHES - 1 :: BATCHES]
    assert held(run.model) == averaged[-1]


def test_an_optimizer_that_knows_evaluation_is_told_of_it_as_before(tmp_path: Path) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    def optimizer(model: nn.Module) -> Any:
        return schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)

    averaging, noting, alone = AveragedWeights(rf.ema(0.75)), Noting(), Noting()
    options: dict[str, Any] = {"optimizer": optimizer, "lr_scheduler_type": "constant"}
    run = trainer(tmp_path, averaging, noting, **options, eval_strategy="epoch")
    run.train()
    trainer(tmp_path, alone, **options, eval_strategy="epoch").train()
    assert [*map(digests, noting.weights)] == [*map(digests, alone.weights)]


# ---- what cannot be is one clear line ------------------------------------------------------------


class Unaware(transformers.Trainer):  # type: ignore[misc]
    """With an evaluation loop that tells the optimizer nothing, from its second turn on."""

    turns = 0

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        self.turns += 1
        optimizer = self.optimizer
        if self.turns > 1:
            self.optimizer = None
        try:
            return super().evaluation_loop(*args, **options)
        finally:
            self.optimizer = optimizer


def test_an_evaluation_loop_that_would_see_the_training_weights_is_an_error(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path, AveragedWeights(rf.ema(0.75)), kind=Unaware, eval_strategy="epoch")
    with pytest.raises(RuntimeError, match=r"does not call optimizer\.eval\(\)"):
        run.train()
    assert run.turns == 2


def test_what_averages_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AdamW \(expected one of rbwa_fused's, or average="):
        trainer(tmp_path, AveragedWeights()).train()
    with pytest.raises(ValueError, match="buffers=True needs an average"):
        AveragedWeights(buffers=True)
    with pytest.raises(ValueError, match=r"exclude=\['\*'\] needs an average"):
        AveragedWeights(exclude=["*"])
    with pytest.raises(TypeError, match=r"Invalid average: 0\.999"):
        AveragedWeights(0.999)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'nowhere' fits no name"):
        trainer(tmp_path, AveragedWeights(rf.ema(), exclude=["nowhere"])).train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deepspeed_plugin": object()}, "under DeepSpeed"),
        ({"enable_jit_checkpoint": True}, "with enable_jit_checkpoint"),
    ],
)
def test_runs_whose_weights_or_checkpoints_are_out_of_reach_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, AveragedWeights(rf.ema(0.75)))
    for name, value in options.items():
        setattr(run.args, name, value)
    with pytest.raises(ValueError, match=f"AveragedWeights does not work {words}"):
        run.train()
    assert held(run.model) == held(Net())


def test_a_search_may_average_if_it_saves_nothing(tmp_path: Path) -> None:
    state = SimpleNamespace(is_hyper_param_search=True, global_step=0, stateful_callbacks={})
    run = trainer(tmp_path, AveragedWeights(rf.ema(0.75)))
    others = {"model": run.model, "optimizer": run.create_optimizer()}
    averaging = AveragedWeights(rf.ema(0.75))
    averaging.on_train_begin(run.args, state, run.control, **others)
    run.args.save_strategy = "epoch"
    with pytest.raises(ValueError, match="checkpoints of hyperparameter_search"):
        averaging.on_train_begin(run.args, state, run.control, **others)


def test_only_this_module_imports_transformers() -> None:
    code = "import sys, rbwa_fused, rbwa_fused.integrations; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_without_transformers_its_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import rbwa_fused.integrations.transformers"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = ran.stderr.splitlines()[-1]
    assert line.startswith("ImportError: rbwa_fused.integrations.transformers needs")
    assert line.endswith("pip install transformers accelerate")
