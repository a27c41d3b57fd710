"""The averages in the place of the weights: all or nothing, and how the weights come back.

The training weights are set aside and the averages copied over them. The averages themselves are
only read, so whatever is written to the weights meanwhile never reaches them; and bringing the
training weights back may be tried again and again, as it is where something stood in the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rbwa_fused.engine import checks
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.rows import GroupPlan
from rbwa_fused.engine.sharded import beside, is_sharded, local, reshard, shard_of
from rbwa_fused.several import Which, number_of
from rbwa_fused.streams import AVERAGE, AVERAGES, DTYPES, MASTER

MEND = (
    "once every parameter has its shape, a floating dtype and memory of its own again, enter and "
    "leave averaged() once more; or load a checkpoint of model and optimizer"
)


class Averaging(Protocol):
    """Who has averages: an engine, and the groups and the state that it works on."""

    engine: Engine
    param_groups: list[dict[str, Any]]
    state: Any


@dataclass(frozen=True)
class Derived:
    """An optimizer whose averages are not kept but follow from what is: schedule-free's x.

    Attributes:
        opt: the optimizer.
        of: the average of a parameter's shard, or None where it is the weights themselves.
    """

    opt: Averaging
    of: Callable[[GroupPlan, Tensor], Tensor | None]

    @property
    def engine(self) -> Engine:
        return self.opt.engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    @property
    def state(self) -> Any:
        return self.opt.state


class Saved(NamedTuple):
    """What a parameter was, and its training weights."""

    name: str
    address: int
    inference: bool
    weights: Tensor


class Swap:
    """The training weights of an optimizer, from the moment that averages take their place.

    Attributes:
        left: the context has been left, or dropped.
        over: nobody is inside; if the optimizer still has this, weights are missing.

    Args:
        context: who enters and leaves. Where it is gone without having left, nobody is inside.
        model: whose gathered weights are freed when the weights come back, if FSDP has any.
        blend: how much of the average is live, the rest being the weights (their masters where
            there are any).
        which: of several averages.

    Raises:
        RuntimeError: for a parameter that its average does not fit, or that cannot be written.
            Nothing has been changed then, nor if memory runs out.
    """

    # A compiled function that evaluates would compile these for each parameter's shape.
    @torch._disable_dynamo
    def __init__(
        self,
        opt: Averaging,
        context: object,
        model: nn.Module | None,
        blend: float = 1.0,
        which: Which = 0,
    ) -> None:
        self._context = weakref.ref(context)
        self.left = False
        self._missing: str | None = None  # what the exit could not bring back
        self._owner = opt
        self._model = model
        with _plain():
            fitting = list(_fitting(opt, which))
            live = {p: blended(opt, p, average, blend) for _, p, average in fitting}
            self._averages = live
            self._saved = {
                p: Saved(name, local(p).data_ptr(), p.is_inference(), local(p).detach().clone())
                for name, p, _ in fitting
            }
        addresses = [average.data_ptr() for average in self._averages.values()]
        self._taken = {*addresses, *(saved.address for saved in self._saved.values())}
        _open[id(self)] = self

    @property
    def over(self) -> bool:
        return self.left or self._context() is None

    @torch._disable_dynamo
    def put(self) -> None:
        """Copies the averages over the weights."""
        with _plain():
            for p, average in self._averages.items():
                _write(local(p), average)
            _announce(self._averages)

    @torch._disable_dynamo
    def restore(self) -> RuntimeError | None:
        """Brings back all training weights that can be, wherever the parameters are by now.

        Returns None where nothing is left to be done; otherwise the error that says what is, which
        another call tries again.
        """
        self.left = True
        wrong: dict[str, Exception] = {}
        heirs: dict[Tensor, Tensor] = {}
        try:
            reshard(self._model)
            heirs = heirs_of(self._owner)
        except Exception as error:
            wrong["FSDP could not free what it has gathered"] = error
        groups = [*self._owner.param_groups]
        if self._owner.engine.beside is not None:
            groups.append(self._owner.engine.beside.group)
        now = {p: heirs.get(p, p) for group in groups for p in group["params"]}
        with _plain():
            for p, saved in list(self._saved.items()):
                try:
                    if p in now:  # or nobody will train it
                        inference = saved.inference or now[p] is not p
                        _bring_back(now[p], saved._replace(inference=inference), self._taken)
                    del self._saved[p]
                except Exception as error:
                    wrong[f"parameter {saved.name}"] = error
            _announce([now.get(p, p) for p in self._averages])
        if not wrong:
            self._owner.engine.swapped = None
            _open.pop(id(self), None)
            return None
        self._missing = "; ".join(f"{where}: {error}" for where, error in wrong.items())
        failure = RuntimeError(f"averaged() could not bring back all weights: {self}")
        failure.__cause__ = next(iter(wrong.values()))
        return failure

    def set_aside(self, param: Tensor) -> Tensor | None:
        """The training weights of a parameter's shard, where something else is in their place."""
        saved = self._saved.get(param)
        return None if saved is None else saved.weights

    def __str__(self) -> str:
        return f"{self._missing} ({MEND})"

    def refuse(self, what: str) -> None:
        """Raises inside the context, and after it for as long as weights are missing that its exit
        could not bring back. What interrupts have left undone is done now."""
        if not self.over:
            raise RuntimeError(f"{what}() inside averaged(), where the averaged weights are live")
        if self._missing is not None or self.restore() is not None:
            raise RuntimeError(f"{what}() with averaged weights for training weights: {self}")


# All that are in the place of weights, in the order in which they came there.
_open: weakref.WeakValueDictionary[int, Swap] = weakref.WeakValueDictionary()


def in_place_of(param: Tensor) -> Swap | None:
    """What has set a parameter's training weights aside, whoever has entered it."""
    return next((one for one in list(_open.values()) if one.set_aside(param) is not None), None)


def adopt(opt: Averaging, which: Which) -> None:
    """Makes the averages the weights, and masters, for good."""
    with _plain():
        fitting = [(p, average) for _, p, average in _fitting(opt, which)]
        for p, average in fitting:
            _write(local(p), average)
            master = (opt.state.get(p) or {}).get(MASTER)
            if master is not None:
                local(master).copy_(average)
        _announce([p for p, _ in fitting])


def blended(opt: Averaging, param: Tensor, average: Tensor, blend: float) -> Tensor:
    """(1 - blend) theta + blend a, in the average's dtype; with 1 the average itself."""
    if blend == 1.0:
        return average
    master = (opt.state.get(param) or {}).get(MASTER)
    weights = local(param if master is None else master).detach().to(average.dtype)
    return weights + blend * (average - weights)


def heirs_of(opt: Averaging) -> dict[Tensor, Tensor]:
    """What has been put inside averaged() in the places of parameters and buffers that are followed
    by their names, such as the buffers of a model that was converted."""
    engine = opt.engine
    found = {} if engine.followed is None else engine.followed.heirs(opt.param_groups)
    if engine.beside is not None:
        found |= engine.beside.heirs()
    return found


def averages(opt: Averaging, which: Which) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has an average beside it, with that average, laid out as it is."""
    for plan, key in _sampled(opt, which):
        for p in plan.group["params"]:
            average = _average_of(opt, plan, key, p)
            if average is not None:
                yield p, beside(average, p)


def live(opt: Averaging, which: Which) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has samples, with the live tensor that holds its average."""
    for plan, key in _sampled(opt, which):
        for p in plan.group["params"]:
            held = _held(opt, plan, p)
            if plan.has_buffer(p, key) and held.get(key) is not None:
                yield p, held[key]
            elif key == AVERAGE and plan.is_the_weights(p):
                yield p, held.get(MASTER, p.detach())


def _sampled(opt: Averaging, which: Which) -> list[tuple[GroupPlan, str]]:
    """The groups that have such an average with at least one sample, and its key in a state."""
    opt.engine.read_back()
    if isinstance(opt, Derived):
        return [(plan, AVERAGE) for plan in opt.engine.tables.of_groups]
    if opt.engine.beside is not None and opt.engine.swapped is None:
        opt.engine.beside.follow()
    plans = opt.engine.tables.plan.groups
    numbers = [(plan, number_of(plan.average, which)) for plan in plans]
    found = [(plan, AVERAGES[number]) for plan, number in numbers if number is not None]
    return [(plan, key) for plan, key in found if plan.samples(key) > 0]


def _fitting(opt: Averaging, which: Which) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, parameter and average (its shard) of all that is to be put in place, checked."""
    of_groups = opt.engine.tables.of_groups
    for plan, key in _sampled(opt, which):
        group = plan.group
        where = f"of group {of_groups.index(plan)}" if plan in of_groups else "of the buffers"
        try:
            checks.params(group, plan.master_weights)
            checks.state(group, opt.state if plan.state is None else plan.state)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"averaged() left the weights as they are: {error}") from error
        for i, p in enumerate(group["params"]):
            average = _average_of(opt, plan, key, p)
            if average is not None and p.numel() > 0:
                yield f"{checks.name_of(group, i)} {where}", p, average


def _average_of(opt: Averaging, plan: GroupPlan, key: str, param: Tensor) -> Tensor | None:
    """The average that is not the weights themselves, of a parameter's shard."""
    if isinstance(opt, Derived):
        return opt.of(plan, param)
    average = _held(opt, plan, param).get(key)
    buffered = plan.has_buffer(param, key)
    return shard_of(average, param) if buffered and average is not None else None


def _held(opt: Averaging, plan: GroupPlan, param: Tensor) -> dict[str, Any]:
    """The streams of a parameter, or of what is averaged beside them."""
    return (opt.state if plan.state is None else plan.state).get(param) or {}


def _bring_back(param: Tensor, saved: Saved, taken: set[int]) -> None:
    """Writes a parameter's weights, wherever it is by now; not where others are."""
    shard, weights = local(param), saved.weights
    if shard.layout != torch.strided or shard.dtype not in DTYPES or shard.is_meta:
        raise ValueError(f"it is {shard.layout}, {shard.dtype} on {shard.device}")
    if shard.shape != weights.shape:
        raise ValueError(f"it has shape {tuple(shard.shape)} (expected {tuple(weights.shape)})")
    address = shard.data_ptr()
    foreign = address != saved.address and address in taken
    lost = shard.is_inference() and not saved.inference
    if (foreign or lost) and not is_sharded(param):  # `p.data = ...` inside
        # A tensor of inference mode with memory of another kind would be neither.
        with nullcontext() if lost else _as_made(shard):
            param.data = torch.empty_like(shard)
        shard = param
    _write(shard, weights)
    taken.add(shard.data_ptr())


def _write(param: Tensor, weights: Tensor) -> None:
    with _as_made(param):
        param.copy_(weights)


def _as_made(param: Tensor) -> AbstractContextManager[Any]:
    """A buffer that was made in inference mode may be written there alone."""
    return torch.inference_mode() if param.is_inference() else nullcontext()


@contextmanager
def _plain() -> Iterator[None]:
    """Neither records gradients nor makes tensors that only inference may use."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _announce(written: Iterable[Tensor]) -> None:
    """Tells those who keep what they have derived from parameters that these were written."""
    torch.autograd.graph.increment_version([p for p in written if not p.is_inference()])
    torch.clear_autocast_cache()  # of 16-bit copies, which does not look at versions
