"""State dicts: what goes into one, and what must be true of one before it is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rbwa_fused import form, renumbered
from rbwa_fused.average import Average, same, structure
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.memory import lies_as
from rbwa_fused.engine.rows import GroupPlan
from rbwa_fused.engine.tables import Counts
from rbwa_fused.numbers import integer, number
from rbwa_fused.rules import ADAM, MEMORY, Rule
from rbwa_fused.several import Averaging, policies_of
from rbwa_fused.streams import AVERAGE, AVERAGES, DTYPES, STEP, STREAMS

Group = dict[str, Any]

# What `export` adds to a group. A checkpoint of torch's has none of them. Live groups have
# the keys too, with None for a value: torch.distributed.checkpoint, taking a flattened state dict
# apart, looks for the keys of live groups and no others.
OURS = ("rule", "step", "n_averaged", *MEMORY)
# What torch's classes have in the groups of their checkpoints, and ours never have: they mean
# nothing here. torch keeps what it does not know, so a checkpoint with these and with ours is one
# of ours that torch went on with.
TORCHS = ("foreach", "differentiable", "fused", "capturable")
# A live group's value for one of these keys is its user's, and saved under this prefix and the key.
OWN = "own:"


Averages = Literal["load", "drop"]  # what becomes of those in a checkpoint


class Loaded(NamedTuple):
    """What a checkpoint says, all of it checked: an optimizer takes it over as it is.

    Attributes:
        groups: each param group's keys and values.
        state: of each parameter, in copies of the checkpoint's tensors.
        steps: taken so far.
        counts: of each group.
        notes: what the user should know.
    """

    groups: list[dict[str, Any]]
    state: defaultdict[Any, Any]
    steps: int
    counts: list[Counts]
    notes: list[str]


def export(engine: Engine, live_groups: Sequence[Group], state: Any, saved: Group) -> None:
    """Adds counters, rule and the policy's repr to the groups of a state dict, without torch's own
    keys."""
    waiting = engine.waiting()
    groups = saved["param_groups"]
    counts = engine.counts(live_groups, state)
    for live, group, (n_averaged, memory, further) in zip(live_groups, groups, counts, strict=True):
        for key in OURS:
            if group.get(key) is not None:
                live.setdefault(OWN + key, None)  # where torch.distributed.checkpoint looks for it
                group[OWN + key] = group[key]
        left = map((memory or {}).get, MEMORY)
        group.update(zip(OURS, (engine.rule.name, engine.steps, n_averaged, *left), strict=True))
        if policies_of(group["average"]):
            more = (0,) * (len(policies_of(group["average"])) - 1 - len(further))
            group.update(renumbered.described(group["average"], (n_averaged, *further, *more)))
        for key in TORCHS:
            group.pop(key, None)
    for live, group in zip(live_groups, groups, strict=True):
        for key, p in zip(group["params"], live["params"], strict=True):
            held = saved["state"].get(key, {})
            if p in waiting:
                held = {k: v for k, v in held.items() if k not in waiting[p]}
            if engine.rule.name == ADAM.name and held:
                held = {**awaited(engine.rule, live, p, held), **held}
            if key in saved["state"]:
                saved["state"][key] = held


def awaited(rule: Rule, group: Group, param: Tensor, held: Mapping[str, Any]) -> dict[str, Tensor]:
    """What torch.optim.Adam looks for in the state of a parameter that has any, and the next step
    would make: zeros, of all before the first step, such as beside an average, and of the largest v
    where amsgrad is new. One that is frozen is not stepped, and takes no more memory."""
    unstepped = STEP not in held
    streams = rule.streams_of(rule.coefficients(group, True).kind)
    missing = [stream for stream in streams if unstepped or stream in set(rule.late) - held.keys()]
    zeros = {stream: torch.zeros_like(param.detach()) for stream in missing if param.requires_grad}
    step = {STEP: torch.zeros((), dtype=torch.float32, device="cpu")} if unstepped else {}
    return {**step, **zeros}


def unstepped(rule: Rule, held: Mapping[str, Any]) -> frozenset[str]:
    """The keys that `awaited` has given a parameter before its first step: it begins without."""
    count = held.get(STEP)
    if isinstance(count, Tensor):
        count = count.item() if count.numel() == 1 else None
    return frozenset((STEP, *rule.streams) if rule.name == ADAM.name and count == 0 else ())


def read(
    engine: Engine,
    groups: Sequence[Group],
    state_dict: Any,
    step: int | None,
    averages: Averages = "load",
) -> Loaded:
    """What a state dict says to the engine of these groups; nothing is changed.

    Raises:
        ValueError, TypeError: see FusedOptimizer.load_state_dict.
    """
    step = None if step is None else integer("step", step, least=0)
    if averages not in get_args(Averages):
        raise ValueError(f"Invalid averages: {averages!r} (expected 'load' or 'drop')")
    form.check(state_dict, engine.rule)
    saved_groups = [_users_own(saved) for saved in deepcopy(state_dict["param_groups"])]
    if len(groups) != len(saved_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    lengths = [len(group["params"]) for group in groups]
    if lengths != [len(saved["params"]) for saved in saved_groups]:
        raise ValueError(
            "loaded state dict contains a parameter group "
            "that doesn't match the size of optimizer's group"
        )
    merged = []
    notes: dict[str, None] = {}
    for saved in saved_groups:
        check_counters(engine.rule, saved)
    outdated = leave_out_outdated(engine.rule, saved_groups, notes)
    left_out = set(outdated)
    if averages == "drop":
        for saved in saved_groups:
            left_out.update(saved["params"])
            renumbered.forget(saved)
    moved: dict[Any, dict[str, str | None]] = {}  # of each parameter, its averages' keys
    for group, saved in zip(groups, saved_groups, strict=True):
        moved.update(dict.fromkeys(saved["params"], check_averages(group["average"], saved, notes)))
        new = {**group, **live_keys(saved)}
        engine.rule.check(new)
        merged.append(new)
    policies = list(chain.from_iterable(policies_of(group["average"]) for group in groups))
    taken = steps_taken(policies, saved_groups, step, not outdated, notes)

    ids = chain.from_iterable(saved["params"] for saved in saved_groups)
    params = chain.from_iterable(group["params"] for group in groups)
    param_of = dict(zip(ids, params, strict=True))
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, held in state_dict["state"].items():
        if key in param_of:
            gone = unstepped(engine.rule, held)
            state[param_of[key]] = {
                name: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
                for name, value in renumbered.state_of(held, moved[key]).items()
                if not (name in (STEP, *STREAMS, *engine.rule.aside) and _absent(value))
                and not (name in AVERAGES and key in left_out)
                and name not in gone
            }
        else:
            state[key] = held
    counts = [counted(saved) for saved in saved_groups]
    plans = zip(engine.tables.of_groups, counts, strict=True)
    for index, (plan, own) in enumerate(plans):
        for i, p in enumerate(plan.group["params"]):
            name = f"parameter {i} of group {index}"
            check_state(name, p, state.get(p, {}), plan, own)
    return Loaded(merged, state, taken, counts, list(notes))


@torch.no_grad()
def keep_tensors(loaded: Mapping[Any, Any], before: Mapping[Any, Any]) -> None:
    """Brings loaded state into the tensors that held it before, where they can hold it: whoever
    has one of them sees it go on."""
    for param, held in loaded.items():
        old = before.get(param)
        if not isinstance(old, Mapping) or not isinstance(held, dict):
            continue
        for stream in held.keys() & old.keys() & {STEP, *STREAMS}:
            kept, value = old[stream], held[stream]
            both = type(kept) is Tensor and type(value) is Tensor
            if both and kept.dtype == value.dtype and lies_as(kept, value):
                held[stream] = kept.copy_(value)


def counted(saved: Mapping[str, Any]) -> Counts:
    """What a saved group says of its counters; torch's say nothing."""
    left = {key: saved[key] for key in MEMORY if saved.get(key) is not None}
    return Counts(saved.get("n_averaged") or 0, left, renumbered.further_samples(saved))


def live_keys(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """What of a saved group becomes part of a live one."""
    own = {OWN + key: key for key in OURS}
    left_out = (*OURS, *TORCHS, *own, *renumbered.KEYS, "params", "average")
    keys = {k: v for k, v in saved.items() if k not in left_out}
    return keys | {own[k]: v for k, v in saved.items() if k in own and v is not None}


def _users_own(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group, in which keys of torch's class that are named like ours are its user's."""
    if form.exported(saved):
        return saved
    return {OWN + k if k in OURS else k: v for k, v in saved.items() if not _absent(v)}


def _absent(value: Any) -> bool:
    """None, or what torch.distributed.checkpoint makes of a key that a flattened one lacks."""
    return value is None or (isinstance(value, dict) and not value)


def check_counters(rule: Rule, saved: dict[str, Any]) -> None:
    """Raise for a group's rule that is not the optimizer's, and for counters that are no counts."""
    theirs = saved.get("rule") or form.rule_of(saved)
    if theirs != rule.name:
        raise ValueError(f"the checkpoint's rule is {theirs!r}, the optimizer's {rule.name!r}")
    for key in ("step", *(key for key in saved if str(key).startswith("n_averaged"))):
        form.count(key, saved.get(key))


def leave_out_outdated(
    rule: Rule, saved_groups: list[dict[str, Any]], notes: dict[str, None]
) -> set[Any]:
    """Takes averages and counts of samples out of the groups that torch's class went on with: it
    has moved the weights and not the averages. Returns the parameters whose averages they are."""
    outdated: set[Any] = set()
    for saved in saved_groups:
        if saved.get("step") is None or not any(key in saved for key in TORCHS):
            continue
        outdated.update(saved["params"])
        if saved.get("n_averaged"):
            notes[
                f"{form.torchs(rule)} went on with this checkpoint: its weights have left its "
                f"average of {saved['n_averaged']} samples behind, which starts again"
            ] = None
        renumbered.forget(saved)
    return outdated


def steps_taken(
    policies: list[Average],
    saved_groups: list[dict[str, Any]],
    step: int | None,
    counted: bool,
    notes: dict[str, None],
) -> int:
    """Where the run stands: what the caller says, or the checkpoint. They must agree if the
    checkpoint's own `counted`, as torch's class did not go on with it."""
    counts = [saved["step"] for saved in saved_groups if saved.get("step") is not None]
    counted = counted and len(counts) > 0
    taken: int = max(counts, default=0)
    if counted and step not in (None, taken):
        raise ValueError(f"Invalid step: {step} (the checkpoint has counted {taken})")
    policy = next((p for p in policies if p.by_step), None)
    if step is None and not counted and policy is not None:
        notes[
            f"the checkpoint does not say how many steps were taken, and {policy} goes by them; "
            f"counting from {taken} on (load_state_dict(state_dict, step=...) says where it stands)"
        ] = None
    return taken if step is None else step


def check_averages(
    average: Averaging, saved: dict[str, Any], notes: dict[str, None]
) -> dict[str, str | None]:
    """`check_policy` of each of a group's averages, after those in the saved group were brought
    into their order. Returns the key that each goes on under; None: it is left out."""
    moved = renumbered.renumber(average, saved, notes)
    check_policy(next(iter(policies_of(average)), None), saved, notes)
    for key, policy in renumbered.policies(average)[1:]:
        check_policy(policy, {"average": saved.get(key)}, notes)
    return moved


def check_policy(policy: Average | None, saved: dict[str, Any], notes: dict[str, None]) -> None:
    """Raise for another kind of policy than ours in a saved group; note other numbers."""
    theirs = saved.get("average")
    ours = None if policy is None else policy.describe()
    if theirs is None or theirs == ours:
        return
    if not isinstance(theirs, str):
        raise TypeError(f"Invalid average in the checkpoint: {theirs!r} (expected a repr)")
    kind, own_kind = structure(theirs), structure(ours)
    if kind != own_kind:
        hint = ""
        if policy is not None and policy.custom and kind[1:] == own_kind[1:]:
            hint = f"; if the function is the same, name={str(kind[0])[1:-1]!r} says so"
        raise ValueError(f"the checkpoint's average is {theirs}, the optimizer's {ours}{hint}")
    if ours is not None and not same(theirs, ours):
        notes[f"the checkpoint's average was {theirs}; going on with the optimizer's {ours}"] = None


def check_state(
    name: str,
    param: Tensor,
    held: dict[str, Any],
    plan: GroupPlan,
    counts: Counts,
) -> None:
    """Raise for a parameter's state that does not go with its group's plan and its counts."""
    rule = plan.rule
    for stream in held.keys() & {*STREAMS, *rule.aside}:
        value = held[stream]
        if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.is_meta:
            what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"Invalid {stream} of {name} in the checkpoint: {what}")
        if value.layout != torch.strided:
            raise TypeError(f"the checkpoint's {stream} of {name} has layout {value.layout}")
        if value.shape != param.shape:
            raise ValueError(
                f"the checkpoint's {stream} of {name} has shape {tuple(value.shape)} "
                f"(expected {tuple(param.shape)})"
            )
    if "master_param" in held and not plan.master_weights:
        raise ValueError(f"the checkpoint has a master for {name} (expected master_weights=True)")
    kept, needed = rule.kept_of(held)
    if kept not in ((), needed, (STEP,)):
        raise ValueError(f"the checkpoint's state of {name} has {kept}, not all of {needed}")
    if rule.counts and STEP in held and not 0 <= number(STEP, held[STEP]) < 2**63:
        raise ValueError(f"Invalid step of {name} in the checkpoint: {held[STEP]}")
    samples = dict(zip(AVERAGES, (counts.n_averaged, *counts.further), strict=False))
    for key in AVERAGES if held.keys() & AVERAGES else plan.averages or (AVERAGE,):
        _check_average(name, param, held, plan, key, samples.get(key, 0))


def _check_average(
    name: str, param: Tensor, held: dict[str, Any], plan: GroupPlan, key: str, n_averaged: int
) -> None:
    sampler = plan.averages.get(key)
    policy = None if sampler is None else sampler.policy
    # A model converted between the steps of RBWA may bring a buffer that it needs no more, or none
    # where it needs one now: its average is the parameter in either case.
    if policy is None or policy.write_back_every != 1:
        if key in held and policy is None:
            which = "an average" if key == AVERAGE else f"an {key}"
            raise ValueError(f"the checkpoint has {which} for {name}, which keeps none")
        # FSDP1 keeps no state of a parameter of which this process holds nothing.
        if param.numel() > 0 and key not in held and policy is not None and n_averaged > 0:
            raise ValueError(f"the checkpoint counts {n_averaged} samples, but {name} has no {key}")
    if policy is not None and plan.has_buffer(param, key) and key in held:
        dtype, expected = held[key].dtype, plan.dtype_of(key, param)
        if dtype != expected:
            raise ValueError(
                f"the checkpoint's {key} of {name} has dtype {dtype} (expected {expected})"
            )
