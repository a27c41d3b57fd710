"""One training run on both sides: what an event does to an optimizer and to its twin.

After every event all that can be seen is compared, and then the twin takes over the optimizer's
numbers (not its counters, nor which state there is), so that each bound is that of one event.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import compare
from bounds import F64
from evaluation import Evaluation
from program import (
    CANARY,
    AddGroup,
    Averaged,
    Case,
    Change,
    Clear,
    Convert,
    Copy,
    Event,
    Freeze,
    Load,
    Mode,
    Move,
    Step,
    Unfreeze,
    Write,
    admits,
    laid_out,
    numbers,
    within,
)
from side_by_side import equal, own
from torch import Tensor, nn
from twin import MASTER, unscaled

import rbwa_fused as rf


def spoil(model: nn.ParameterList, opt: Any) -> None:
    """Writes over a model and an optimizer that were left, so that memory still shared shows."""
    for p in model:
        p.data.fill_(CANARY)
        for value in opt.state.get(p, {}).values():
            value.fill_(CANARY)


class Training(Evaluation):
    """Goes through a case.

    Attributes:
        frozen: parameters that have no gradients for now.
        abandoned: memory that was left behind, with what it held.
        cleared: whether `opt.state` was cleared since the optimizer last saw it.
    """

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__(case, backend)
        self.frozen: set[int] = set()
        self.cleared = False
        self.converted = False  # or moved, since the last step
        self.abandoned: list[tuple[Tensor, Tensor]] = []
        for event in case.events:
            self.tried.add(type(event).__name__)
            if not self.twin.trains:
                self.tried.add(f"{type(event).__name__} in eval mode")
            self.happen(event)
            self.check()
        self.finish()

    def happen(self, event: Event) -> None:
        shared = len(self.shares) > 0
        match event:
            case Step():
                self.step(event)
            case Freeze():
                self.frozen.update(self.chosen(event.chosen))
                self.freeze()
            case Unfreeze():
                self.frozen.clear()
                self.freeze()
            case Averaged():
                self.averaged(event)
            case Mode():
                for trains in (event.trains, not event.trains, event.trains)[:: 2 - event.again]:
                    self.switch(trains)
                    self.check()
            case Write():
                self.write(event)
            case Load():
                self.load(event)
            case AddGroup():
                if self.opt.engine.device_counters is not None:
                    self.twin.follow()  # counters come back from the device, and all is made anew
                    self.twin.forget_skipped()
                self.opt.add_param_group(self.group(event.group))
            case Change():
                self.change(event)
            case Convert() if not self.cleared:
                self.put(self.chosen(event.chosen), event.dtype, "contiguous")
            case Move():
                self.put(self.chosen(event.chosen), None, event.layout)
            case Copy():
                self.copy(event)
            case Clear():
                if self.opt.state:
                    self.twin.clear()
                self.opt.state.clear()
        if isinstance(event, Write | Convert | Clear) or (
            isinstance(event, Move | Copy) and shared
        ):
            self.aside = None
        # Which averages start again shows in the dtypes that parameters have when it is seen.
        self.cleared = isinstance(event, Clear) or (
            self.cleared
            and isinstance(event, Freeze | Unfreeze | Averaged | Change | Convert | Move)
        )

    def chosen(self, mask: int) -> list[int]:
        return [i for i in range(len(self.model)) if mask >> i % 16 & 1]

    def freeze(self) -> None:
        for i, p in enumerate(self.model):
            p.requires_grad_(i not in self.frozen)

    def gradients(self, event: Step) -> None:
        missing = self.frozen.union(self.chosen(event.absent))
        for i, p in enumerate(self.model):
            if i in missing:
                p.grad = None
                continue
            g = numbers(p.shape, event.seed + i) * (event.scale or 1.0)
            if event.layout == "expanded" and p.dim():
                p.grad = g[:1].to(p.dtype).expand(p.shape) if len(g) else g.to(p.dtype)
            elif event.layout == "like":
                p.grad = torch.empty_like(p).copy_(g)
            else:
                p.grad = laid_out(g, p.dtype, event.layout)

    def backward(self) -> None:
        """Parameters step in a backward pass that gives the gradients there are; what is left are
        those that no hook may step."""
        pairs = [(p, p.grad) for p in self.model if p.grad is not None]
        self.model.zero_grad()
        if pairs:
            torch.stack([(p * g).sum().to(F64) for p, g in pairs]).sum().backward()
        self.tried.add("in the backward pass")

    def step(self, event: Step) -> None:
        if not self.twin.trains:
            self.refuse_in_eval_mode(event)
            if event.seed % 2:
                return
            self.switch(True)
            self.check()
        if self.case.in_backward and event.found_inf is not None:
            event = replace(event, scale=None, found_inf=None)  # GradScaler is refused
        self.gradients(event)
        kept = [p.grad for p in self.model]
        present = any(g is not None for g in kept)
        overflow = bool(event.found_inf)
        if overflow and present:
            next(g for g in kept if g is not None).fill_(math.inf)
        before = [None if g is None else g.clone() for g in kept]
        counted = self.opt.engine.device_counters is not None  # by the device, so far
        if event.found_inf is not None:  # as torch.amp.GradScaler does
            scale = None if event.scale is None else torch.tensor(event.scale)
            self.opt.grad_scale, self.opt.found_inf = scale, torch.tensor(event.found_inf)
        if self.case.in_backward:
            self.backward()
        self.opt.step()
        if event.found_inf is not None:
            del self.opt.grad_scale, self.opt.found_inf
        scaled = event.scale or 1.0
        if present and self.converted and counted:
            self.twin.forget_skipped()  # all was made anew
        self.converted = self.converted and not present
        if not present:
            self.tried.add("no gradient")
        elif not overflow:
            self.twin.step(before, scaled)
            self.tell(event, before)
        else:
            self.tried.add("overflow")
            if self.backend == "cuda" and not any(
                g.policy and g.policy.custom for g in self.twin.groups
            ):
                self.twin.follow()  # the device counts, and the host sees to everything else first
                self.twin.start(before)
        for i, (p, g) in enumerate(zip(self.model, before, strict=True)):
            if self.case.in_backward:
                continue  # freed, but of parameters that no hook may step
            assert p.grad is kept[i], f"gradient {i}"
            if g is not None and (overflow or scaled == 1.0):
                assert torch.equal(p.grad, g), f"gradient {i}"
            elif g is not None:
                expected = unscaled(g, scaled)
                assert p.grad is not None
                compare(f"gradient {i}", p.grad, expected, p.dtype)

    def tell(self, event: Step, grads: list[Tensor | None]) -> None:
        """Notes what a step has tried."""
        tried = self.tried
        tried.add("step")
        tried.update(f"{p.dtype}" for p, g in zip(self.model, grads, strict=True) if g is not None)
        tried.add(f"rule {self.case.rule}")
        if any(MASTER in member.state for member in self.twin.members):
            tried.add("masters")
        tried.add(f"gradients {event.layout}")
        tried.add("some gradients missing" if None in grads else "all gradients")
        if event.found_inf is not None:
            tried.add("unscaled already" if event.scale is None else "unscaled")
        if len(grads) >= 40:
            tried.add("40 tensors")
        if sum(g.numel() for g in grads if g is not None) >= 2**15:
            tried.add("two threads")
        for group in self.twin.groups:
            policy = group.policy
            if policy is None or group.averaged == 0:
                continue
            kind = "function" if policy.custom else type(policy.weight).__name__
            tried.add(f"average {kind}")
            tried.add(f"average starts at the {policy.initial}")
            back = policy.write_back_every
            tried.add(
                "average written back never"
                if back == 0
                else "average written back at every step"
                if back == 1
                else "average written back at each sample"
                if back == policy.every
                else "average written back rarely"
            )
            if policy.dtype is not None:
                tried.add("average of a dtype of its own")

    def refuse_in_eval_mode(self, event: Step) -> None:
        self.gradients(event)
        before = self.held()
        if self.case.in_backward:
            with suppress(RuntimeError):  # of a parameter that a hook would step
                self.backward()
        with pytest.raises(RuntimeError, match=r"step\(\) in eval mode"):
            self.opt.step()
        assert equal(self.held(), before)
        self.tried.add("refused step in eval mode")

    def write(self, event: Write) -> None:
        for i in self.chosen(event.chosen):
            p, member = self.model[i], self.twin.members[i]
            value = numbers(p.shape, event.seed + i).to(p.dtype)
            with torch.no_grad():
                p.copy_(value)
            member.theta.v.copy_(value)

    def change(self, event: Change) -> None:
        which = event.group % len(self.twin.groups)
        group, ours = self.opt.param_groups[which], self.twin.groups[which]
        options = own(event.options)
        if ours.beta is not None:
            if self.twin.trains:
                self.refuse(group, self.rule.beta(options))
            options = self.rule.with_beta(options, ours.beta)
        if isinstance(group["lr"], Tensor) and isinstance(options["lr"], Tensor):
            options["lr"] = group["lr"].copy_(options["lr"])  # the tensor stays, its value changes
        group.update(options)
        ours.options = own(options)

    def refuse(self, group: dict[str, Any], beta: float | None) -> None:
        """Another beta for a group that must go on with the one it has, and back again."""
        before, old = self.held(), dict(group)
        assert beta is not None
        self.gradients(Step())
        group.update(self.rule.with_beta({k: group[k] for k in self.rule.domain}, beta))
        if beta != self.rule.beta(old) and any(p.grad is not None for p in self.model):
            with pytest.raises(ValueError, match=r"Invalid (momentum|betas\[0\])"):
                self.opt.step()
            self.tried.add("refused momentum")
        group.update(old)
        assert equal(self.held(), before)

    @property
    def policies(self) -> list[rf.Average | None]:
        """Of each parameter."""
        return [group.policy for group in self.twin.groups for _ in group.members]

    def put(self, indices: list[int], dtype: torch.dtype | None, layout: str) -> None:
        for i, policy in enumerate(self.policies):
            p, member = self.model[i], self.twin.members[i]
            wanted = dtype or p.dtype
            if i not in indices or not admits(policy, wanted, self.case.master_weights):
                continue
            p.grad = None
            if i not in self.shares:
                self.abandoned.append((p.detach(), p.detach().clone()))
            p.data = laid_out(p, wanted, layout)
            member.put_elsewhere(wanted)
            self.shares.pop(i, None)
            self.converted = True

    def copy(self, event: Copy) -> None:
        self.opt.zero_grad()
        old = self.model, self.opt
        if event.pickled:
            self.model, self.opt = pickle.loads(pickle.dumps(old))
        else:
            self.model, self.opt = copy.deepcopy(old)
        spoil(*old)
        for i in self.shares:  # torch copies each parameter by itself; pickle brings all the memory
            self.model[i].data = self.model[i].data.clone()
        self.twin.follow()
        for member in self.twin.members:
            member.put_elsewhere(member.dtype)
        for shared in (self.shares, self.bases, self.twin_bases):
            shared.clear()

    def load(self, event: Load) -> None:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "opt": self.opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, groups = nn.ParameterList(), []
        bases = {key: base.clone() for key, base in self.bases.items()}
        for i, p in enumerate(self.model):
            spec = self.shares.get(i)
            if spec is not None:
                fresh = within(bases[spec.base, spec.dtype], spec).fill_(1.0)
            else:
                fresh = laid_out(torch.ones(p.shape), p.dtype, event.layout)
            model.append(nn.Parameter(fresh))
        params = iter(model)
        for group in self.twin.groups:
            members = [next(params) for _ in group.members]
            groups.append({"params": members, "average": group.policy or False})
        opt = self.optimizer(groups, event.flatten)
        model.load_state_dict(saved["model"])
        if self.twin.outdated():
            with pytest.raises(ValueError, match=r"average of .* has dtype"):
                opt.load_state_dict(saved["opt"])
            self.tried.add("refused load")
            return
        opt.load_state_dict(saved["opt"])
        spoil(self.model, self.opt)
        self.model, self.opt, self.bases = model, opt, bases
        self.twin.follow()
        self.freeze()

    def finish(self) -> None:
        """What a run leaves: averages to save, and memory as it was when it was left."""
        self.averaged(Averaged(nested=True, raises=False))
        self.save(False)
        if self.rule.modes:
            self.switch(True)
            self.check()
            self.save(True)
        for theirs, ours in zip(self.opt.param_groups, self.twin.groups, strict=True):
            if ours.beta is not None:
                self.refuse(theirs, ours.beta / 2)
        for memory, held in self.abandoned:
            assert torch.equal(memory, held), "written where a parameter was"
