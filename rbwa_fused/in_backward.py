"""The step inside the backward pass: a parameter moves as soon as its gradient is complete.

Every parameter has a launch of its own then. A hook that autograd calls behind the gradient runs it
and frees the gradient, which on a CPU is still in cache; `step()` is left with the parameters that
had none, with hooks and counters.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from threading import RLock

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rbwa_fused.engine import checks
from rbwa_fused.engine.doors import Call, Grads
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.tables import Served
from rbwa_fused.engine.upkeep import MIDWAY

CONVERTED = f"a parameter was converted or moved {MIDWAY}"
# All hooks by their ids, to find two optimizers that step the same parameter. Not a WeakSet: one
# cannot be gone through while another thread makes an optimizer.
_living: weakref.WeakValueDictionary[int, InBackward] = weakref.WeakValueDictionary()


class InBackward:
    """The hooks of an optimizer's parameters, and how far its step has come.

    Args:
        opt: whose `param_groups` and `state` are stepped.
        engine: that steps them.
        rebuild: makes the engine's tables anew.
    """

    def __init__(
        self, opt: Optimizer, engine: Engine, rebuild: weakref.WeakMethod[Callable[[], None]]
    ) -> None:
        self._opt = weakref.ref(opt)
        self._engine = engine
        self._make_tables = rebuild
        self._launch_of: dict[Tensor, Served] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._frozen: list[Tensor] = []  # autograd takes no hook for them yet
        self._lock = RLock()  # autograd has a thread for each device
        self._replicated = False  # whether DistributedDataParallel was looked for, in vain
        _living[id(self)] = self
        weakref.finalize(self, remove, self._handles).atexit = False

    @property
    def midway(self) -> bool:
        """Whether a backward pass has begun a step that `finish` must end."""
        return self._engine.stepped is not None

    def attach(self) -> None:
        """Hooks the parameters of the engine's launches, once each; those that share memory wait
        for step(), which moves them in their order, and so does what is only averaged."""
        self._launch_of = {launch[0].params[0]: launch for launch in self._engine.tables.launches}
        stepped = {table.stepped[0] for table, _ in self._engine.tables.launches}
        hooked = self._launch_of.keys() & self._engine.tables.alone & stepped
        for p in self._handles.keys() - hooked:
            self._handles.pop(p).remove()
        self._frozen = [p for p in hooked if p not in self._handles]
        self._hook_unfrozen()

    def _hook_unfrozen(self) -> None:
        weak_self = weakref.ref(self)

        def hook(param: Tensor) -> None:
            hooks = weak_self()
            if hooks is not None and not hooks.midway and hooks.shared():
                del hooks  # its optimizer, or who shares with it, may be gone but for a cycle
                gc.collect()
                hooks = weak_self()
            if hooks is not None:
                hooks.move(param)

        for p in [p for p in self._frozen if p.requires_grad]:
            self._handles[p] = p.register_post_accumulate_grad_hook(hook)
            self._frozen = [other for other in self._frozen if other is not p]

    def move(self, param: Tensor) -> None:
        """Steps one parameter and frees its gradient."""
        with self._lock, torch.no_grad():
            stepped = self._engine.stepped
            if stepped is None:
                stepped = self._begin()
            launch = self._launch_of.get(param)
            if launch is None:
                return  # no longer the optimizer's
            if param in stepped:
                raise RuntimeError(
                    f"a second gradient of parameter {self._name(launch)} before step(): with "
                    "in_backward=True every backward pass is a step, so gradients cannot be "
                    "accumulated"
                )
            grads = [param.grad]
            calls = self._ready(launch, grads)
            calls += (setattr, param, "grad", None), (stepped.add, param)
            self._run([(launch, grads)], calls)

    def _begin(self) -> set[Tensor]:
        """What a step looks at before its launches. Returns the parameters that it has stepped."""
        engine, opt = self._engine, self._opt()
        assert opt is not None
        engine.refuse_inside_averaged("backward")
        self._look_for_others(opt)
        self._look_for_replicas()
        while not (
            engine.tables.describes(opt.param_groups, opt.state)
            and all(table.fits(0) for table, _ in engine.tables.launches)
        ):
            rebuild = self._make_tables()
            assert rebuild is not None
            rebuild()
        engine.begin()
        stepped: set[Tensor] = set()
        engine.stepped = stepped
        return stepped

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

    def finish(self) -> bool:
        """The rest of a step that has begun, if one has: parameters whose gradient, if any, no hook
        has seen, and the counters."""
        engine = self._engine
        if engine.stepped is None:
            return False
        try:
            self._finish(engine.stepped)
        except Exception:  # the next backward pass begins another step; an interrupt is none
            engine.stepped = None
            raise
        return True

    def _finish(self, stepped: set[Tensor]) -> None:
        engine = self._engine
        rest: list[tuple[Served, Grads]] = []
        calls: list[Call] = []
        for launch in engine.tables.launches:
            table = launch[0]
            p, group = table.params[0], engine.tables.plan.groups[table.groups[0]]
            if p in stepped:
                continue
            grad = table.stepped[0].grad
            moves = grad is not None or group.policy is not None
            if moves or engine.tables.plan.state_is_due:
                grads = [grad]
                own = self._ready(launch, grads)
            if moves:
                rest.append((launch, grads))
                calls += own
        plan, tables = engine.tables.plan, engine.tables
        if engine.rule.scheduled is not None:
            calls += engine.moved(
                {
                    table.groups[0]
                    for table, _ in tables.launches
                    if table.params[0] in stepped or table.stepped[0].grad is not None
                }
            )
        calls += engine.end(), (setattr, plan, "state_is_due", tables.state.lost)
        self._run(rest, [*calls, (setattr, engine, "stepped", None)])

    def _ready(self, launch: Served, grads: Grads) -> list[Call]:
        """Gives a launch's parameter the state that it comes to need. Returns what steps it."""
        engine, table = self._engine, launch[0]
        if not engine.tables.fit(table, grads):
            raise RuntimeError(CONVERTED)
        behind = engine.tables.state.give(table, grads)
        calls = engine.launch(launch, grads)
        return calls + engine.finish(table, grads, grads[0] is None) + behind

    def _run(self, gathered: list[tuple[Served, Grads]], calls: list[Call]) -> None:
        if not self._engine.run(gathered, calls):
            raise RuntimeError(CONVERTED)

    def _name(self, launch: Served) -> str:
        table = launch[0]
        return checks.name_of(
            self._engine.tables.plan.groups[table.groups[0]].group, table.index[0]
        )

    def _look_for_others(self, opt: Optimizer) -> None:
        """Raises where another optimizer's hooks would step a parameter once more. Not at
        construction: `opt = FusedSGD(…)` a second time makes the second before the first is gone.
        """
        for name, other in self.shared():
            raise RuntimeError(
                f"parameter {name} is stepped in the backward pass twice: by this "
                f"{type(opt).__name__} and by another living optimizer with in_backward=True, a "
                f"{type(other).__name__} with lr={other.param_groups[0]['lr']} (expected one of "
                "them; delete the other)"
            )

    def shared(self) -> list[tuple[str, Optimizer]]:
        """The living optimizers that step a parameter of this one in its backward pass as well,
        each with the parameter's name."""
        found = []
        for reference in _living.valuerefs():
            hooks = reference()
            if (
                hooks is None
                or hooks is self
                or hooks._launch_of.keys().isdisjoint(self._launch_of)
            ):
                continue
            opt, other = self._opt(), hooks._opt()
            if opt is not None and other is not None:
                names = [
                    checks.name_of(group, i)
                    for group in opt.param_groups
                    for i, p in enumerate(group["params"])
                    if p in hooks._launch_of
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
