"""clip_grad_norm_ in the step's own pass: what torch's clipping in place does, or an error."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import AVERAGES, DTYPES, policy_for, products
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import RULES
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.total_norm import total_norm

CHANGED = "gradients were changed after clip_grad_norm_; call it last, or use"
LIMIT = 1.0

Clip = Callable[..., Tensor]


class Problem:
    """Two matrices, float64: the norms of ours and torch's clipping differ by some 1e-16 there."""

    def __init__(self, cls: Any, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(5, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        self.opt = cls(self.model.parameters(), lr=0.05, momentum=0.9, **options)
        self.generator = generator
        self.ours = cls is rf.FusedSGD
        self.noise = torch.Generator().manual_seed(1)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def backward(self) -> Tensor:
        x = torch.randn(8, 5, generator=self.generator, dtype=torch.float64)
        loss = (self.model(x) - 7).square().mean() * float(x[0, 0].abs())
        loss.backward()
        return loss

    def clip(self, limit: float = LIMIT, **options: Any) -> Tensor:
        if self.ours:
            return self.opt.clip_grad_norm_(limit, **options)
        options.pop("in_place", None)
        return nn.utils.clip_grad_norm_(self.params, limit, **options)

    def perturb(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.grad += torch.randn(p.shape, generator=self.noise, dtype=p.dtype)


# ---- the loops that programs have ----------------------------------------------------------------


def plain(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.opt.step()
    run.opt.zero_grad()


def left_out_where_the_norm_is_large(run: Problem, step: int) -> None:
    run.backward()
    if run.clip() < 8:
        run.opt.step()
    run.opt.zero_grad()


def gradients_read_behind_it(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    assert all(bool(p.grad.isfinite().all()) for p in run.params if p.grad is not None)
    run.opt.step()
    run.opt.zero_grad()


def clipped_now_and_then(run: Problem, step: int) -> None:
    """The step behind the clipping is left out, and the next one is not clipped."""
    run.backward()
    if step % 3 == 0:
        run.clip()
    if step % 6 != 0:
        run.opt.step()
    run.model.zero_grad()


def first_micro_batch_clipped(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.backward()
    run.opt.step()
    run.opt.zero_grad()


def every_micro_batch_clipped(run: Problem, step: int) -> None:
    for _ in range(2):
        run.backward()
        run.clip()
    run.opt.step()
    run.opt.zero_grad()


def before_a_closure(run: Problem, step: int) -> None:
    def closure() -> Tensor:
        run.opt.zero_grad()
        return run.backward()

    run.backward()
    run.clip()
    run.opt.step(closure)


def before_a_closure_that_accumulates(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.opt.step(run.backward)
    run.opt.zero_grad()


def in_the_closure(run: Problem, step: int) -> None:
    def closure() -> Tensor:
        run.model.zero_grad(set_to_none=step % 2 == 0)
        loss = run.backward()
        run.clip()
        return loss

    run.opt.step(closure)


def noise_behind_it(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.perturb()
    run.opt.step()
    run.opt.zero_grad()


def torchs_behind_it(run: Problem, step: int) -> None:
    run.backward()
    run.clip(4.0)
    nn.utils.clip_grad_norm_(run.params, 0.5)
    run.opt.step()
    run.opt.zero_grad()


def clip_value_behind_it(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    nn.utils.clip_grad_value_(run.params, 0.1)
    run.opt.step()
    run.opt.zero_grad()


def left_out_and_zeroed_in_place(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.model.zero_grad(set_to_none=False)
    run.backward()
    run.opt.step()
    run.opt.zero_grad()


def zeroed_in_place_by_the_optimizer(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.opt.zero_grad(set_to_none=False)
    run.backward()
    run.opt.step()
    run.opt.zero_grad(set_to_none=False)


def zeroed_in_place_behind_the_step(run: Problem, step: int) -> None:
    run.backward()
    if step % 2 == 0:
        run.clip()
    run.opt.step()
    run.model.zero_grad(set_to_none=False)


def two_steps_with_the_same_gradients(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.opt.step()
    run.opt.step()
    run.opt.zero_grad()


def some_gradients_taken_away(run: Problem, step: int) -> None:
    run.backward()
    run.clip()
    run.params[step % 2].grad = None
    run.opt.step()
    run.opt.zero_grad()


def in_place(run: Problem, step: int) -> None:
    run.backward()
    run.clip(in_place=True)
    if step % 2 == 0:
        run.perturb()
    run.opt.step()
    run.opt.zero_grad()


def of_another_order(run: Problem, step: int) -> None:
    run.backward()
    run.clip(norm_type=math.inf)
    run.opt.step()
    run.opt.zero_grad()


EQUAL = [
    plain,
    left_out_where_the_norm_is_large,
    gradients_read_behind_it,
    clipped_now_and_then,
    before_a_closure,
    in_the_closure,
    zeroed_in_place_by_the_optimizer,
    zeroed_in_place_behind_the_step,
    two_steps_with_the_same_gradients,
    some_gradients_taken_away,
    in_place,
    of_another_order,
]
REFUSED = [
    first_micro_batch_clipped,
    every_micro_batch_clipped,
    before_a_closure_that_accumulates,
    noise_behind_it,
    torchs_behind_it,
    clip_value_behind_it,
    left_out_and_zeroed_in_place,
]


def named(loop: Any) -> str:
    return str(loop.__name__)


@pytest.mark.parametrize("loop", EQUAL, ids=named)
def test_a_loop_trains_as_with_torchs_clipping(loop: Callable[[Problem, int], None]) -> None:
    ours, theirs = Problem(rf.FusedSGD), Problem(torch.optim.SGD)
    for step in range(60):
        loop(ours, step)
        loop(theirs, step)
    for p, q in zip(ours.params, theirs.params, strict=True):
        # Each of 60 steps rounds the norm, the coefficient and the product once or twice.
        assert torch.allclose(p, q, rtol=0, atol=1e-12)
    unclipped = Problem(torch.optim.SGD)
    unclipped.clip = lambda *limit, **options: torch.zeros(())  # type: ignore[method-assign]
    for step in range(60):
        loop(unclipped, step)
    far = (unclipped.params[0] - theirs.params[0]).abs().max()
    forgotten = loop in (before_a_closure, zeroed_in_place_by_the_optimizer)
    assert (far == 0) if forgotten else (far > 1e-3), "the loop cannot tell"


@pytest.mark.parametrize("loop", REFUSED, ids=named)
def test_a_loop_that_changes_gradients_behind_it_raises_before_anything_is_written(
    loop: Callable[[Problem, int], None],
) -> None:
    run = Problem(rf.FusedSGD)
    before = [p.detach().clone() for p in run.params]
    with pytest.raises(RuntimeError, match=CHANGED):
        loop(run, 0)
    assert all(torch.equal(p, q) for p, q in zip(run.params, before, strict=True))
    assert run.opt.state_dict()["state"] == {}


class Program(Problem):
    def __init__(self, cls: Any) -> None:
        super().__init__(cls)
        self.fresh = True  # the gradients are those of the last backward pass

    def do(self, action: str) -> None:
        if action == "step":
            self.opt.step()
        elif action == "noise":
            self.perturb()
        elif action == "clip":
            self.clip()
        elif action == "clip in place":
            self.clip(in_place=True)
        elif action == "torch's clip":
            nn.utils.clip_grad_norm_(self.params, LIMIT)
        elif action == "backward":
            self.backward()
        elif action == "half a backward":
            (self.model.bias * float(self.params[0].detach()[0, 0])).sum().backward()
        elif action == "closure":
            self.opt.step(lambda: (self.opt.zero_grad(), self.backward())[1])
        elif action == "zero":
            self.opt.zero_grad()
        elif action == "zero in place":
            self.opt.zero_grad(set_to_none=False)
        else:
            self.model.zero_grad(set_to_none=action == "model: zero")


def raised(run: Program, action: str) -> bool:
    """Whether it did for gradients that were changed; any other error is the test's."""
    try:
        run.do(action)
    except RuntimeError as error:
        if CHANGED in str(error):
            return True
        raise
    return False


WRITES = ("noise", "torch's clip", "backward", "half a backward", "model: zero in place")
ACTIONS = (
    *("step", "clip", "clip in place", "closure", "zero", "zero in place", "model: zero"),
    *WRITES,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=14))
def test_no_program_is_silently_different(actions: list[str]) -> None:
    """What is written to the same gradients behind the step that was clipped is left out: that they
    still are what the step has seen clipped, nobody can tell from zeros that were added to."""
    ours, theirs = Program(rf.FusedSGD), Program(torch.optim.SGD)
    spent = False
    for action in ("backward", "clip", *actions):
        if spent and action in WRITES:
            for run in (ours, theirs):
                run.do("zero")
        spent = action == "step" or (spent and action not in ("zero", "model: zero", "closure"))
        if raised(ours, action):
            return
        theirs.do(action)
    for p, q in zip(ours.params, theirs.params, strict=True):
        # torch's second clip in a row multiplies by 1 - 1e-6, which momentum keeps.
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-4)


# ---- the norm ------------------------------------------------------------------------------------


def made(*grads: Tensor | None, cls: Any = rf.FusedSGD, **options: Any) -> Any:
    """An optimizer whose parameters are zeros and have these gradients."""
    params = [nn.Parameter(torch.zeros_like(g) if g is not None else torch.zeros(2)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return cls(params, **{"lr": 1.0, **options})


def params(opt: Any) -> list[nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("norm_type", [0, 0.5, 1, 2, 3.5, 7, math.inf, -math.inf, "inf"])
def test_every_order_is_torchs(norm_type: Any) -> None:
    grads = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 50, 7)]
    opt = made(*[g.clone() for g in grads])
    expected = nn.utils.get_total_norm(grads, norm_type)
    assert opt.clip_grad_norm_(0.25, norm_type).item() == pytest.approx(expected.item(), rel=1e-6)
    opt.step()
    nn.utils.clip_grads_with_norm_(theirs := params(made(*grads)), 0.25, expected)
    for p, q in zip(params(opt), theirs, strict=True):
        assert q.grad is not None and torch.allclose(p, -q.grad, rtol=1e-6)


@pytest.mark.parametrize("norm_type", [-2.0, -0.5, 0.0, 0.5, 2.0, math.inf, -math.inf])
def test_a_parameter_without_elements_adds_nothing_to_the_norm(norm_type: float) -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.empty(0, 2)]
    expected = made(grads[0]).clip_grad_norm_(1.0, norm_type)
    assert made(*grads).clip_grad_norm_(1.0, norm_type) == expected != 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_the_norm_of_16_bit_gradients_is_float32(dtype: torch.dtype, norm_type: float) -> None:
    """torch's of bfloat16 is bfloat16, off by up to 1 in 256."""
    grads = [torch.full((100,), 0.1, dtype=dtype), torch.full((31,), 0.3, dtype=dtype)]
    found = made(*grads).clip_grad_norm_(1.0, norm_type)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    expected = torch.linalg.vector_norm(torch.cat(grads).double(), norm_type)
    assert found.item() == pytest.approx(expected.item(), rel=3e-7)


def test_one_float64_gradient_makes_it_float64() -> None:
    opt = made(torch.ones(3), torch.ones(3, dtype=torch.float64))
    assert opt.clip_grad_norm_(1.0).dtype == torch.float64
    opt.step()
    for p in params(opt):
        assert p.tolist() == pytest.approx([-1 / math.sqrt(6)] * 3, rel=1e-6)


def test_without_gradients_it_is_0_and_nothing_is_kept() -> None:
    opt = made(None, None)
    assert opt.clip_grad_norm_(1.0).item() == 0
    assert torch.equal(opt.clip_grad_norm_(1.0), nn.utils.clip_grad_norm_(params(opt), 1.0))
    for p in params(opt):
        p.grad = torch.full((2,), 5.0)
    opt.step()
    assert params(opt)[0].tolist() == [-5.0, -5.0]


@pytest.mark.parametrize(
    ("values", "limit"),
    [([3.0, math.inf], 1.0), ([3.0, math.nan], 1.0), ([3.0, math.inf], 0.0), ([3.0, 4.0], 0.0)],
)
def test_what_is_not_finite_spreads_as_in_torch(values: list[float], limit: float) -> None:
    ours = made(torch.tensor(values), torch.ones(2))
    theirs = made(torch.tensor(values), torch.ones(2), cls=torch.optim.SGD)
    ours.clip_grad_norm_(limit)
    nn.utils.clip_grad_norm_(params(theirs), limit)
    ours.step()
    theirs.step()
    for p, q in zip(params(ours), params(theirs), strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.equal(p.nan_to_num(), q.nan_to_num())


@pytest.mark.parametrize("norm_type", [2.0, 2, 1.0, math.inf])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_error_if_nonfinite_has_torchs_words(norm_type: float, value: float) -> None:
    opt = made(torch.tensor([1.0, value]))
    with pytest.raises(RuntimeError) as theirs:
        nn.utils.clip_grad_norm_(params(opt), 1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as ours:
        opt.clip_grad_norm_(1.0, norm_type, True)
    assert str(ours.value) == str(theirs.value)
    assert opt.pending_clip is None


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_norm": -1.0}, ValueError, "Invalid max_norm: -1.0"),
    ({"max_norm": math.nan}, ValueError, "Invalid max_norm: nan"),
    ({"max_norm": "1"}, TypeError, "Invalid max_norm: '1'"),
    ({"norm_type": "fro"}, TypeError, "Invalid norm_type: 'fro'"),
    ({"norm_type": math.nan}, ValueError, "Invalid norm_type: nan"),
    ({"error_if_nonfinite": "no"}, ValueError, "Invalid error_if_nonfinite: 'no'"),
    ({"in_place": "no"}, ValueError, "Invalid in_place: 'no'"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD, ids=str)
def test_a_bad_argument_is_named(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    opt = made(torch.ones(3))
    with pytest.raises(error, match=words):
        opt.clip_grad_norm_(**{"max_norm": 1.0, **arguments})
    assert opt.pending_clip is None


# ---- the coefficient and the step ----------------------------------------------------------------


def step_clipped(
    rule: str, average: str, dtype: torch.dtype, backend: str, clip: Any, **options: Any
) -> list[Tensor]:
    """Weights and state after some steps."""
    generator = torch.Generator().manual_seed(0)
    ps = [
        nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64).to(dtype))
        for n in (3, 0, 40, 5000)
    ]
    policy = policy_for(average, rule, dtype)
    opt = RULES[rule].made(ps, average=policy, backend=backend, **options)
    for step in range(5):
        for i, p in enumerate(ps):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.grad = None if i == step else g
        clip(opt, step)
        opt.step()
    opt.state_dict()  # a device's count comes back to every `step`
    state = [v for p in ps for v in opt.state[p].values() if isinstance(v, Tensor)]
    return [*(p.detach() for p in ps), *state]


def fused_clip(opt: Any, step: int) -> None:
    if step != 2:
        opt.clip_grad_norm_(7.0)


def clip_in_place(opt: Any, step: int) -> None:
    if step != 2:
        opt.clip_grad_norm_(7.0, in_place=True)


UNMASTERED = [name for name, rule in RULES.items() if not rule.master]
IN_PLACE = products(DTYPES[:2], UNMASTERED, ["none", "ema", "rbwa", "mean-write-back"])


@pytest.mark.parametrize(("dtype", "rule", "average"), IN_PLACE, ids=str)
def test_the_step_has_the_bits_of_clipping_in_place(
    rule: str, average: str, dtype: torch.dtype
) -> None:
    """A gradient is multiplied once, whoever does it; 16-bit ones are rounded in between there."""
    expected = step_clipped(rule, average, dtype, "cpu", clip_in_place)
    found = step_clipped(rule, average, dtype, "cpu", fused_clip)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), i
    unclipped = step_clipped(rule, average, dtype, "cpu", lambda opt, step: None)
    assert not torch.equal(unclipped[3], expected[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [name for name in AVERAGES if name != "custom"])
def test_every_backend_takes_the_same_clipped_step(
    average: str, dtype: torch.dtype, emulated_cuda: Any
) -> None:
    for _, rule, _ in products([dtype], RULES, [average]):
        expected = step_clipped(rule, average, dtype, "cpu", fused_clip)
        ends = [
            step_clipped(rule, average, dtype, "reference", fused_clip),
            step_clipped(rule, average, dtype, "cpu", fused_clip, flatten=False),
            step_clipped(rule, average, dtype, "cuda", fused_clip),
            step_clipped(rule, average, dtype, "cuda", fused_clip, capturable=True),
        ]
        for which, end in enumerate(ends):
            for i, (a, b) in enumerate(zip(end, expected, strict=True)):
                assert torch.equal(a, b), (rule, which, i)


def test_the_gradients_stay_as_they_are() -> None:
    opt = made(torch.tensor([3.0, 4.0]))
    grad = params(opt)[0].grad
    assert grad is not None
    version = grad._version
    assert opt.clip_grad_norm_(1.0).item() == 5.0
    opt.step()
    assert grad.tolist() == [3.0, 4.0] and grad._version == version
    assert params(opt)[0].tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)


def test_in_place_has_torchs_bits_in_every_dtype() -> None:
    for dtype in DTYPES:
        grads = [torch.full((n,), 0.7, dtype=dtype) for n in (9, 16)]
        ours, theirs = made(*[g.clone() for g in grads]), made(*[g.clone() for g in grads])
        norm = ours.clip_grad_norm_(1.0, in_place=True)
        nn.utils.clip_grads_with_norm_(params(theirs), 1.0, norm)
        for p, q in zip(params(ours), params(theirs), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_the_second_call_counts() -> None:
    opt = made(torch.tensor([3.0, 4.0]))
    opt.clip_grad_norm_(0.5)
    assert opt.clip_grad_norm_(2.5).item() == 5.0
    opt.step()
    assert params(opt)[0].tolist() == pytest.approx([-1.5, -2.0], rel=1e-6)
    opt.clip_grad_norm_(0.5)
    opt.clip_grad_norm_(0.5, in_place=True)
    opt.step()
    assert params(opt)[0].tolist() == pytest.approx([-1.8, -2.4], rel=1e-6)


def test_a_new_gradient_at_an_old_ones_address_is_a_new_one() -> None:
    shape, same = (100_000,), 0
    opt = made(torch.ones(shape))
    p = params(opt)[0]
    for _ in range(20):
        assert p.grad is not None
        opt.clip_grad_norm_(0.5)
        address = p.grad.data_ptr()
        p.grad = None
        p.grad = torch.ones(shape)
        same += p.grad.data_ptr() == address
        p.detach().zero_()
        opt.step()
        assert bool((p == -1).all())
    assert same > 0, "the test shows nothing"


def test_a_gradient_that_only_the_parameter_holds_is_still_the_same() -> None:
    """torch keeps the Python object of a tensor that C++ alone holds."""
    run = Problem(rf.FusedSGD)
    run.backward()
    run.clip(1e-3)
    gc.collect()
    before = run.params[0].detach().clone()
    run.opt.step()
    assert (run.params[0] - before).norm() < 1e-3


def test_some_new_gradients_raise_and_all_new_ones_do_not() -> None:
    for new in ((0,), (1,), (0, 1)):
        opt = made(torch.ones(2), torch.ones(2))
        opt.clip_grad_norm_(0.5)
        for i in new:
            params(opt)[i].grad = torch.ones(2)
        if len(new) == 2:
            opt.step()
            assert params(opt)[0].tolist() == [-1.0, -1.0]
        else:
            with pytest.raises(RuntimeError, match=CHANGED):
                opt.step()


def test_a_parameter_that_had_no_gradient_or_was_not_there_raises() -> None:
    opt = made(torch.ones(2), None)
    opt.clip_grad_norm_(0.5)
    params(opt)[1].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        opt.step()
    opt = made(torch.ones(2))
    opt.clip_grad_norm_(0.5)
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    opt.add_param_group({"params": [other]})
    with pytest.raises(RuntimeError, match=CHANGED):
        opt.step()


def test_a_hook_before_the_step_that_writes_to_gradients_raises() -> None:
    opt = made(torch.ones(2))

    def double(*_: Any) -> None:
        params(opt)[0].grad.mul_(2)  # type: ignore[union-attr]

    opt.register_step_pre_hook(double)
    opt.clip_grad_norm_(0.5)
    with pytest.raises(RuntimeError, match=CHANGED):
        opt.step()
    assert params(opt)[0].tolist() == [0.0, 0.0]


def test_a_call_for_changed_gradients_raises_until_they_are_forgotten() -> None:
    opt = made(torch.ones(2))
    grad = params(opt)[0].grad
    assert grad is not None
    opt.clip_grad_norm_(0.5)
    grad.add_(1)
    for options in ({}, {"in_place": True}):
        with pytest.raises(RuntimeError, match=CHANGED):
            opt.clip_grad_norm_(0.5, **options)
    assert grad.tolist() == [2.0, 2.0]
    opt.zero_grad(set_to_none=False)
    grad.add_(3)
    assert opt.clip_grad_norm_(0.5).item() == pytest.approx(math.sqrt(18))


def reload_by_class(opt: Any) -> None:
    torch.optim.Optimizer.load_state_dict(opt, opt.state_dict())


FORGETS: dict[str, Callable[[Any], Any]] = {
    "zero_grad": lambda opt: opt.zero_grad(set_to_none=False),
    "load_state_dict": lambda opt: opt.load_state_dict(opt.state_dict()),
    "torch's load_state_dict": reload_by_class,
}


@pytest.mark.parametrize("name", FORGETS)
def test_what_forgets_it(name: str) -> None:
    opt = made(torch.zeros(2))
    grad = params(opt)[0].grad
    assert grad is not None
    grad.fill_(2)
    opt.clip_grad_norm_(0.5)
    FORGETS[name](opt)
    grad.fill_(2)
    opt.step()
    assert params(opt)[0].tolist() == [-2.0, -2.0]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"]
)
def test_a_copy_has_none(copied: Any) -> None:
    opt = made(torch.full((2,), 2.0))
    opt.clip_grad_norm_(0.5)
    other = copied(opt)
    assert other.pending_clip is None and opt.pending_clip is not None
    params(other)[0].grad = torch.full((2,), 2.0)
    other.step()
    assert params(other)[0].tolist() == [-2.0, -2.0]
    assert "pending_clip" not in opt.state_dict()


def test_a_step_that_fails_leaves_it_for_the_next_attempt() -> None:
    opt = made(torch.tensor([3.0, 4.0]))
    opt.clip_grad_norm_(1.0)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="learning rate"):
        opt.step()
    opt.param_groups[0]["lr"] = 1.0
    opt.step()
    assert params(opt)[0].tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)


def test_a_parameter_that_was_converted_is_stepped_clipped() -> None:
    """The tables are made anew within the step."""
    opt = made(torch.tensor([3.0, 4.0]))
    opt.step()
    p = params(opt)[0]
    p.data = torch.zeros(2)
    opt.state.clear()
    opt.clip_grad_norm_(1.0)
    opt.step()
    assert p.tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)


def test_in_the_backward_pass_it_is_refused_with_its_reason() -> None:
    opt = made(None, in_backward=True)
    with pytest.raises(RuntimeError, match="step inside the backward pass, before the norm"):
        opt.clip_grad_norm_(1.0)


# ---- mixed precision -----------------------------------------------------------------------------


def scaled_run(opt: Any, clip: Any, *, unscale: bool = True) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    p = params(opt)[0]
    for step in range(4):
        opt.zero_grad()
        factor = math.inf if step == 1 else 1.0
        scaler.scale((p * torch.tensor([3.0, 4.0]) * factor).sum()).backward()
        if unscale:
            scaler.unscale_(opt)
        clip()
        scaler.step(opt)
        scaler.update()
    return p


def test_with_a_scaler_it_clips_what_was_unscaled_and_skips_with_the_step() -> None:
    ours, theirs = made(torch.zeros(2)), made(torch.zeros(2), cls=torch.optim.SGD)
    p = scaled_run(ours, lambda: ours.clip_grad_norm_(1.0))
    q = scaled_run(theirs, lambda: nn.utils.clip_grad_norm_(params(theirs), 1.0))
    assert torch.allclose(p, q, rtol=1e-6)
    assert p.tolist() == pytest.approx([-1.8, -2.4], rel=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
def test_gradients_that_are_still_scaled_raise_before_anything_is_written(
    backend: str, emulated_cuda: Any
) -> None:
    opt = made(torch.zeros(2), momentum=0.9, average=rf.ema(0.9), backend=backend)
    with pytest.raises(RuntimeError, match=r"saw scaled gradients; call scaler.unscale_\(opt"):
        scaled_run(opt, lambda: opt.clip_grad_norm_(1.0), unscale=False)
    p = params(opt)[0]
    assert p.tolist() == [0.0, 0.0]
    assert p.grad is not None and p.grad.tolist() == [3072.0, 4096.0]
    assert opt.state_dict()["state"] == {}


def test_a_skipped_step_drops_it_and_unscaled_gradients_never_have_it() -> None:
    opt = made(torch.tensor([3.0, 4.0]))
    p = params(opt)[0]
    opt.clip_grad_norm_(1.0)
    opt.found_inf = torch.ones(())
    opt.step()
    del opt.found_inf
    assert p.tolist() == [0.0, 0.0] and opt.pending_clip is None
    assert p.grad is not None
    p.grad.mul_(8)
    opt.grad_scale, opt.found_inf = torch.tensor([8.0]), torch.zeros(())
    opt.step()
    assert p.tolist() == [-3.0, -4.0] and p.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_device_that_counts_reads_it_from_its_memory(
    capturable: bool, emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the host never does: it would wait for the device."""
    ends = []
    for backend in ("cuda", "cpu"):
        opt = made(torch.zeros(2), backend=backend, capturable=capturable, average=rf.ema(0.5))
        p = params(opt)[0]
        for step in range(3):
            p.grad = torch.tensor([3.0, 4.0]) * (step + 1)
            if step != 1:
                opt.clip_grad_norm_(1.0)
            opt.found_inf = torch.tensor([0.0])
            with monkeypatch.context() as patch:
                if backend == "cuda":
                    patch.setattr(Tensor, "item", lambda self: pytest.fail("waits"))
                opt.step()
            del opt.found_inf
        ends.append([p.detach(), opt.state[p]["average"]])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


# ---- several optimizers --------------------------------------------------------------------------


def test_several_optimizers_share_one_norm_and_a_foreign_one_is_scaled_in_place() -> None:
    ours = made(torch.tensor([3.0, 0.0]))
    other = made(torch.tensor([4.0]), torch.zeros(3), average=rf.ema(0.5))
    foreign = made(torch.tensor([12.0]), None, cls=torch.optim.SGD)
    norm = rf.clip_grad_norm_((opt for opt in (ours, foreign, other)), 1.3)
    assert norm.item() == 13.0
    grads = [p.grad.tolist() for opt in (ours, other) for p in params(opt)]
    assert grads == [[3.0, 0.0], [4.0], [0.0] * 3]
    assert params(foreign)[0].grad.tolist() == pytest.approx([1.2])
    for opt in (ours, foreign, other):
        opt.step()
        opt.zero_grad()
    steps = [params(opt)[0].tolist()[0] for opt in (ours, foreign, other)]
    assert steps == pytest.approx([-0.3, -1.2, -0.4])


def test_a_second_call_multiplies_all_where_the_first_has_multiplied_foreign_gradients() -> None:
    ends = []
    for cls in (rf.FusedSGD, torch.optim.SGD):
        opts = [made(torch.tensor([3.0, 0.0]), cls=cls)]
        opts.append(made(torch.tensor([4.0]), cls=torch.optim.SGD))
        for limit in (math.inf, 2.0, 1.0, 3.0):
            if cls is rf.FusedSGD:
                rf.clip_grad_norm_(opts, limit)
            else:
                nn.utils.clip_grad_norm_([p for opt in opts for p in params(opt)], limit)
        for opt in opts:
            opt.step()
        ends.append([params(opt)[0].tolist()[0] for opt in opts])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
    assert ends[0] == pytest.approx([-0.6, -0.8], rel=1e-5)


def test_a_second_call_that_finds_an_infinity_leaves_what_it_has_multiplied_to_the_step() -> None:
    ours, foreign = made(torch.tensor([3.0])), made(torch.tensor([4.0]), cls=torch.optim.SGD)
    rf.clip_grad_norm_([ours, foreign], 1.0)
    params(foreign)[0].grad.fill_(math.inf)
    with pytest.raises(RuntimeError, match="is non-finite"):
        rf.clip_grad_norm_([ours, foreign], 1.0, error_if_nonfinite=True)
    ours.step()
    assert params(ours)[0].item() == pytest.approx(-0.6)


def test_foreign_optimizers_alone_are_clipped_as_torch_does() -> None:
    foreign = made(torch.tensor([3.0]), torch.tensor([4.0]), cls=torch.optim.AdamW)
    assert rf.clip_grad_norm_(foreign, 1.0).item() == 5.0
    assert [p.grad.item() for p in params(foreign)] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("first", [0, 1])
def test_all_are_looked_at_before_the_first_one_steps(first: int) -> None:
    opts = [made(torch.ones(2)), made(torch.ones(3))]
    rf.clip_grad_norm_(opts, 0.1)
    params(opts[1 - first])[0].grad.add_(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        opts[first].step()
    assert all(bool((p == 0).all()) for opt in opts for p in params(opt))


def test_each_steps_and_zeroes_its_gradients_in_turn() -> None:
    opts = [made(torch.tensor([3.0])), made(torch.tensor([4.0]))]
    rf.clip_grad_norm_(opts, 1.0)
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=False)
    assert [params(opt)[0].item() for opt in opts] == pytest.approx([-0.6, -0.8])
    rf.clip_grad_norm_(opts, 1.0)
    params(opts[0])[0].grad.add_(3)  # behind its step, of which the other knows nothing
    opts[0].zero_grad()
    opts[1].step()
    assert params(opts[1])[0].item() == pytest.approx(-0.8)


def test_one_of_them_without_a_gradient_has_nothing_to_clip() -> None:
    ours, idle = made(torch.tensor([3.0, 4.0])), made(None)
    rf.clip_grad_norm_([ours, idle], 1.0)
    idle.grad_scale, idle.found_inf = torch.tensor([8.0]), torch.zeros(())
    idle.step()
    ours.step()
    assert params(ours)[0].tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)


def test_a_parameter_in_two_of_them_and_what_is_no_optimizer_are_refused() -> None:
    opt = made(torch.ones(2))
    other = torch.optim.SGD(params(opt), lr=0.1)
    with pytest.raises(ValueError, match="a parameter is in two of them"):
        rf.clip_grad_norm_([opt, other], 1.0)
    assert params(opt)[0].grad.tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match="Invalid optimizers"):
        rf.clip_grad_norm_([opt, params(opt)], 1.0)  # type: ignore[list-item]
    assert rf.clip_grad_norm_([], 1.0).item() == 0


def test_one_of_them_that_steps_in_the_backward_pass_is_refused_before_any_is_written() -> None:
    foreign, ours = made(torch.ones(2), cls=torch.optim.SGD), made(None, in_backward=True)
    with pytest.raises(RuntimeError, match="in_backward=True"):
        rf.clip_grad_norm_([foreign, ours], 0.1)
    assert params(foreign)[0].grad.tolist() == [1.0, 1.0]


def test_a_sparse_gradient_and_one_without_memory_of_its_own_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = rf.FusedSGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.clip_grad_norm_(1.0)


def test_no_gradient_is_kept_alive() -> None:
    opt = made(torch.ones(2))
    opt.clip_grad_norm_(0.5)
    assert opt.pending_clip is not None
    kept = gc.get_referents(opt.pending_clip)
    grad = params(opt)[0].grad
    params(opt)[0].grad = None
    holders = [h for h in gc.get_referrers(grad) if h is not kept and isinstance(h, tuple)]
    assert holders == []
    assert opt.pending_clip.gradients() == "new"


def test_a_compiled_training_step_clips_without_a_word() -> None:
    torch._dynamo.reset()
    opt = made(torch.tensor([3.0, 4.0]))

    @torch.compile(backend="eager")
    def step() -> Tensor:
        norm = opt.clip_grad_norm_(1.0)
        opt.step()
        return norm

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step().item() == 5.0
    assert params(opt)[0].tolist() == pytest.approx([-0.6, -0.8])


def test_norm_and_coefficient_are_found_without_autograd() -> None:
    run = Problem(rf.FusedSGD)
    x = torch.ones(2, 5, dtype=torch.float64)
    grads = torch.autograd.grad(
        run.model(x).square().sum(), run.params, create_graph=True, materialize_grads=True
    )
    for p, g in zip(run.params, grads, strict=True):
        p.grad = g
    norm = run.clip()
    assert not norm.requires_grad
    run.opt.step()
    assert total_norm([g.detach() for g in grads]).item() == norm.item()
