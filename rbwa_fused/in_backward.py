"""The step inside the backward pass: a parameter moves as soon as its gradient is complete.

Every parameter has a table of its own then (layout.py). A hook that autograd calls behind the
gradient launches that table and frees the gradient, which on a CPU is still in cache; `step()` is
left with the parameters that had none, with hooks and counters. `InBackward` is the part of
FusedOptimizer that knows of this.
"""

from __future__ import annotations

import gc
import weakref
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rbwa_fused.engine import backends, checks, segments
from rbwa_fused.engine.rows import Plan

if TYPE_CHECKING:
    from rbwa_fused.fused import FusedOptimizer
    from rbwa_fused.layout import LaidOut

Launch = tuple[segments.Segments, backends.Backend]
MIDWAY = "between a backward pass and the step() that ends it (in_backward=True)"
# The optimizers with hooks by their ids, to find two that step the same parameter. Not a WeakSet:
# one cannot be gone through while another thread makes an optimizer.
_living: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
CONVERTED = f"a parameter was converted or moved {MIDWAY}"


class InBackward:
    """The hooks of an optimizer's parameters, and how far its step has come.

    Attributes:
        stepped: parameters that the step under way has moved; None outside of one.
    """

    def __init__(self, opt: LaidOut) -> None:
        self.stepped: set[Tensor] | None = None
        self._opt: weakref.ref[Any] = weakref.ref(opt)
        self._launch_of: dict[Tensor, Launch] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._frozen: list[Tensor] = []  # autograd takes no hook for them yet
        self._lock = RLock()  # autograd has a thread for each device
        self._replicated = False  # whether DistributedDataParallel was looked for, in vain
        _living[id(opt)] = opt
        weakref.finalize(opt, remove, self._handles).atexit = False

    def attach(self, launches: list[Launch], alone: set[Tensor]) -> None:
        """Hooks the parameters of the tables, once each; those that share memory wait for step(),
        which moves them in their order."""
        self._launch_of = {launch[0].params[0]: launch for launch in launches}
        hooked = self._launch_of.keys() & alone
        for p in self._handles.keys() - hooked:
            self._handles.pop(p).remove()
        self._frozen = [p for p in hooked if p not in self._handles]
        self._hook_unfrozen()

    def detach(self) -> None:
        """Takes the hooks away, of an optimizer that gets others."""
        remove(self._handles)
        self._handles.clear()

    def _hook_unfrozen(self) -> None:
        opt_of = self._opt

        def hook(param: Tensor) -> None:
            opt = opt_of()
            if opt is not None and opt._early.stepped is None and opt._early.shared(opt):
                del opt  # it, or who shares with it, may be gone but for a reference cycle
                gc.collect()
                opt = opt_of()
            if opt is not None:
                opt._early.move(opt, param)

        for p in [p for p in self._frozen if p.requires_grad]:
            self._handles[p] = p.register_post_accumulate_grad_hook(hook)
            self._frozen = [other for other in self._frozen if other is not p]

    def move(self, opt: FusedOptimizer, param: Tensor) -> None:
        """Steps one parameter and frees its gradient."""
        with self._lock, torch.no_grad():
            if self.stepped is None:
                self._begin(opt)
            assert self.stepped is not None and opt._plan is not None
            if param not in self._launch_of:
                return  # no longer the optimizer's
            if param in self.stepped:
                table = self._launch_of[param][0]
                name = checks.name_of(opt.param_groups[table.groups[0]], table.index[0])
                raise RuntimeError(
                    f"a second gradient of parameter {name} before step(): with in_backward=True "
                    "every backward pass is a step, so gradients cannot be accumulated"
                )
            launch = self._launch_of[param]
            self._launch(opt, opt._plan, launch, self._start(opt, opt._plan, launch[0]))
            param.grad = None
            self.stepped.add(param)

    def _begin(self, opt: FusedOptimizer) -> None:
        """What `FusedOptimizer._update` looks at before its launch."""
        opt._refuse_inside_averaged("backward")
        self._look_for_others(opt)
        self._look_for_replicas()
        while True:
            plan = opt._plan
            assert plan is not None
            if opt._up_to_date(plan) and all(table.fits(0) for table, _ in opt._launches):
                break
            opt._rebuild()
        plan.sample(opt._steps + 1)
        plan.update(1.0)
        self.stepped = set()

    def check(self, closure: object, found_inf: Tensor | None) -> None:
        """Looks after the hooks at a step(), and raises for what comes too late."""
        if closure is not None:
            raise RuntimeError("step(closure) with in_backward=True: the closure's backward steps")
        if found_inf is not None:
            raise RuntimeError(
                "GradScaler with in_backward=True: parameters have stepped in the backward pass "
                "with gradients that were still scaled"
            )
        if self._frozen:
            self._hook_unfrozen()

    def finish(self, opt: FusedOptimizer, plan: Plan) -> None:
        """The rest of a step that has begun: parameters whose gradient, if any, no hook has seen,
        and the counters."""
        stepped, self.stepped = self.stepped, None
        assert stepped is not None
        rest = []
        for launch in opt._launches:
            p, group = launch[0].params[0], plan.groups[launch[0].groups[0]]
            if p in stepped:
                continue
            moves = p.grad is not None or group.policy is not None
            if moves or plan.starting:
                grads = self._start(opt, plan, launch[0])
            if moves:
                rest.append((launch, grads))
        for launch, grads in rest:
            self._launch(opt, plan, launch, grads)
        plan.starting = False
        opt._steps += 1
        plan.commit()

    def _start(
        self, opt: FusedOptimizer, plan: Plan, table: segments.Segments
    ) -> list[Tensor | None]:
        """The gradient of a table's parameter, which is given the state that it comes to need."""
        grads = [table.params[0].grad]
        if not checks.fit(table, grads, opt.param_groups):
            raise RuntimeError(CONVERTED)
        opt._start(plan, table, grads)
        return grads

    def _launch(
        self, opt: FusedOptimizer, plan: Plan, launch: Launch, grads: list[Tensor | None]
    ) -> None:
        table, backend = launch
        if not opt._launch(plan, table, backend.step, grads):
            raise RuntimeError(CONVERTED)
        opt._finish(plan, table, grads, grads[0] is None, 1.0)

    def _look_for_others(self, opt: FusedOptimizer) -> None:
        """Raises where another optimizer's hooks would step a parameter once more. Not at
        construction: `opt = FusedSGD(…)` a second time makes the second before the first is gone.
        """
        for name, other in self.shared(opt):
            raise RuntimeError(
                f"parameter {name} is stepped in the backward pass twice: by this "
                f"{type(opt).__name__} and by another living optimizer with in_backward=True, a "
                f"{type(other).__name__} with lr={other.param_groups[0]['lr']} (expected one of "
                "them; delete the other)"
            )

    def shared(self, opt: FusedOptimizer) -> list[tuple[str, Any]]:
        """The living optimizers that step a parameter of this one in its backward pass as well,
        each with the parameter's name."""
        found = []
        for reference in _living.valuerefs():
            other = reference()
            early = other._early if other is not None and other is not opt else None
            if early is None or early._launch_of.keys().isdisjoint(self._launch_of):
                continue
            theirs = early._launch_of.keys()
            names = [
                checks.name_of(group, i)
                for group in opt.param_groups
                for i, p in enumerate(group["params"])
                if p in theirs
            ]
            found += [(name, other) for name in names[:1]]
        return found

    def _look_for_replicas(self) -> None:
        """Raises for DistributedDataParallel, whose gradients are not yet averaged here. It tells
        nobody which parameters it has, so it is looked for among all objects, once."""
        if self._replicated or not (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            return
        replicated = torch.nn.parallel.DistributedDataParallel
        for thing in gc.get_objects():
            # isinstance would ask lazy objects for their class, and wake them.
            if replicated in type(thing).__mro__ and any(
                p in self._launch_of for p in thing.parameters()
            ):
                raise RuntimeError(
                    "in_backward=True under DistributedDataParallel: a parameter would step before "
                    "its gradient is averaged over the processes"
                )
        self._replicated = True


def remove(handles: dict[Tensor, RemovableHandle]) -> None:
    """Takes the hooks away, so that a parameter without its optimizer keeps its gradients."""
    for handle in handles.values():
        handle.remove()
