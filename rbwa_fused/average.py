"""Averaging policies: which weight a sample gets, when it is taken, whether it is written back.

Pure Python on ints and floats, no tensors. Steps are counted from 1 and only when taken. ``start =
s`` means that the first s steps are not averaged. weights.py has the weights, policies.py names the
usual policies.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any, ClassVar, Literal, cast, get_args

import torch

from rbwa_fused.fingerprint import alike, fingerprint, where
from rbwa_fused.numbers import integer, number
from rbwa_fused.ramp import Ramp
from rbwa_fused.streams import DTYPES, NARROW
from rbwa_fused.weights import Algorithm2, Ema, Mean, Named, Weight

Initial = Literal["first_sample", "current", "now"]


@dataclass(frozen=True, repr=False)
class Average:
    """One averaging policy; frozen, printable, picklable. policies.py names the usual ones.

    Args:
        weight: one of weights.py (:class:`Mean`, :class:`Ema`, …), or a function
            ``weight(n, step) -> float`` in [0, 1] of the samples so far (n >= 1) and the step,
            called on the host, which under AMP on a GPU waits for the device then; it must depend
            on these two alone, as it may be asked again for the same step. The first sample is
            always a copy. Pickling, as of a whole optimizer, needs one with a name at the top level
            of a module; a state dict does not.
        start (int, steps, >= 0): the first ``start`` steps are not averaged (default: 0).
        every (int, steps, >= 1): samples are taken after steps start + every, start + 2 every, …
            (default: 1).
        write_back_every (int, steps): 0 for never, or a multiple of ``every``: at every so many
            samples the average replaces the live weights; momentum is kept (default: 0).
        initial (str): what the average starts with: ``"first_sample"``; ``"current"``, the weights
            just before step start + 1; or ``"now"``, those before the first step, so that there is
            an average before ``start``, too. The latter two are a first sample (default:
            ``"first_sample"``).
        offset (int, steps, 0 to ``every``): if not 0, samples are taken after steps start + offset,
            start + offset + every, … (default: 0).
        stop (int, steps, optional): no sample is taken after later steps, and the average stays
            what it is then; not where it is written back. None is never (default: None).
        dtype (torch.dtype, optional): of the average; None is the parameter's own for float32 and
            float64 and float32 for bfloat16 and float16 (default: None).
        name (str, optional): of the function, by which a checkpoint knows it again wherever it is
            defined; without ``,()=``. None is where it is defined, as in ``module.function``, which
            all lambdas of a module have in common (default: None). Of two functions of one name
            loading warns, as of a changed decay (fingerprint.py).

    Raises:
        ValueError, TypeError: naming the argument and the value received.

    Example:
        >>> Average(lambda n, step: 10 / (step + 10), start=100, name="ramp")
    """

    weight: Weight
    start: int = 0
    every: int = 1
    write_back_every: int = 0
    initial: Initial = "first_sample"
    dtype: torch.dtype | None = None
    name: str | None = None
    offset: int = 0
    stop: int | None = None
    _written: ClassVar[str | None] = None  # of an instance, by the function that made it

    def __init__(
        self,
        weight: Weight,
        *,
        start: int = 0,
        every: int = 1,
        write_back_every: int = 0,
        initial: Initial = "first_sample",
        dtype: torch.dtype | None = None,
        name: str | None = None,
        offset: int = 0,
        stop: int | None = None,
    ) -> None:
        named = isinstance(weight, Named)
        if isinstance(weight, type) or not (named or callable(weight)):
            raise TypeError(
                f"Invalid weight: {weight!r} (expected a policy's weight or a function)"
            )
        every = integer("every", every, least=1)
        write_back_every = integer("write_back_every", write_back_every, least=0)
        if write_back_every % every != 0:
            raise ValueError(
                f"Invalid write_back_every: {write_back_every} (expected 0 or a multiple of "
                f"every={every})"
            )
        if initial not in get_args(Initial):
            raise ValueError(
                f"Invalid initial: {initial!r} (expected 'first_sample', 'current' or 'now')"
            )
        offset = integer("offset", offset, least=0)
        if offset > every:
            raise ValueError(
                f"Invalid offset: {offset} (expected at most every={every}; start= is what delays)"
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"Invalid dtype: {dtype!r} (expected a torch.dtype or None)")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"Invalid dtype: {dtype} (expected one of {DTYPES})")
        start = integer("start", start, least=0)
        if initial == "now" and start > 0 and write_back_every == 1:
            raise ValueError(
                "Invalid initial: 'now' (expected 'current' where the average is written back at "
                "each step after start: it is the parameter itself)"
            )
        if stop is not None:
            stop, first = integer("stop", stop, least=0), start + (offset or every)
            if stop < first:
                raise ValueError(
                    f"Invalid stop: {stop} (expected at least {first}, that of the first sample)"
                )
            if write_back_every > 0:
                raise ValueError(f"Invalid stop: {stop} (expected None where it is written back)")
        if isinstance(weight, Algorithm2) and start < weight.steps_per_epoch * weight.start_epoch:
            raise ValueError(f"Invalid start: {start} (expected no sample before {weight} starts)")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"Invalid name: {name!r} (expected a text or None)")
        if name is not None and not re.fullmatch(r"[^,()=\n]+", name):
            raise ValueError(f"Invalid name: {name!r} (expected a text without ',()=')")
        if name is not None and named:
            raise ValueError(f"Invalid name: {name!r} (expected None: {weight} names itself)")
        values: dict[str, Any] = {
            "weight": weight,
            "start": start,
            "every": every,
            "write_back_every": write_back_every,
            "initial": initial,
            "dtype": dtype,
            "name": name,
            "offset": offset,
            "stop": stop,
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)

    @property
    def custom(self) -> bool:
        """Whether the weight is a function of the user's."""
        return not isinstance(self.weight, Named)

    @property
    def by_step(self) -> bool:
        """Whether it makes a difference after which step a sample is taken, and not only how many
        there were before."""
        every = self.start == 0 and self.every == 1 and self.write_back_every <= 1
        named = isinstance(self.weight, Named) and not self.weight.by_step
        return not (every and named and self.stop is None)

    def weight_of(self, n: int, step: int) -> float:
        """Weight of the sample taken after ``step`` when ``n`` samples are averaged already.

        The first sample has weight 1, whatever the policy: an average starts as a copy.
        """
        if n == 0:
            return 1.0
        weight = self.weight
        if isinstance(weight, Named):
            return weight.of(n, step, self)
        value = number(f"weight(n={n}, step={step})", weight(n, step))
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"Invalid weight(n={n}, step={step}): {value} (expected 0 <= weight <= 1)"
            )
        return value

    def __repr__(self) -> str:
        """As it is written: by a function of policies.py, or with what is not the default."""
        if self._written is not None:
            return self._written
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight"}
        defaults = {f.name: f.default for f in fields(self)}
        options = [f", {k}={v!r}" for k, v in given.items() if v != defaults[k]]
        return f"Average({self._weight_text(named=False)}{''.join(options)})"

    def describe(self) -> str:
        """The text by which a checkpoint remembers it: all that it says, in one order."""
        code = ""
        if self.custom:
            digest = fingerprint(cast(Callable[..., Any], self.weight))
            code = f", code={digest}" if digest else ""
        offset = f", offset={self.offset}" if self.offset else ""  # older checkpoints have none
        stop = "" if self.stop is None else f", stop={self.stop}"
        return (
            f"Average({self._weight_text(named=True)}, start={self.start}, every={self.every}, "
            f"write_back_every={self.write_back_every}, initial={self.initial!r}, "
            f"dtype={self.dtype}{offset}{stop}{code})"
        )

    def _weight_text(self, named: bool) -> str:
        if not self.custom:
            return repr(self.weight)
        function = cast(Callable[..., Any], self.weight)
        return f"<{(self.name if named else None) or where(function)}>"

    def written(self, text: str | None) -> Average:
        """Itself, which prints as ``text`` from now on, the call that has made it."""
        if text is not None:
            object.__setattr__(self, "_written", text)
        return self

    def __copy__(self) -> Average:
        return self  # frozen

    def __deepcopy__(self, memo: dict[int, Any]) -> Average:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["weight"] = deepcopy(self.weight, memo)
        return Average(**values).written(self._written)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object's, after a look at a function of the user's: pickle finds it by its name.

        Raises:
            pickle.PicklingError: for a function that no module has at its top level.
        """
        if self.custom and not _by_value():
            try:
                pickle.dumps(self.weight)
            except Exception as error:
                raise pickle.PicklingError(
                    f"{self!r} cannot be pickled: pickle finds a function by its name; define "
                    "the weight at the top level of a module, or as an object of a class that is "
                    f"({error})"
                ) from error
        return super().__reduce_ex__(protocol)

    @property
    def origin(self) -> int:
        """The step that samples are counted from: they are taken ``every`` steps after it, and so
        on. No later than ``start``, and perhaps negative."""
        return self.start + (self.offset - self.every if self.offset else 0)

    @property
    def begins(self) -> float:
        """The step whose weights are the first sample, or infinity where a sample is to come."""
        if self.initial == "first_sample":
            return math.inf
        return 0 if self.initial == "now" else self.start

    def due(self, step: int) -> bool:
        """Whether a sample is taken after this step."""
        past = step - self.origin
        return past > 0 and past % self.every == 0 and (self.stop is None or step <= self.stop)

    def written_back(self, step: int) -> bool:
        """Whether the live weights become the average after this step."""
        return self.write_back_every > 0 and (step - self.origin) % self.write_back_every == 0

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the average of a parameter of ``dtype``.

        Raises:
            ValueError: where the kernels have no such pair. They have the parameter's own dtype,
                and float32 for bfloat16 and float16.
        """
        narrow = dtype in NARROW
        if self.dtype is None:
            return torch.float32 if narrow else dtype
        if self.dtype != dtype and not (narrow and self.dtype == torch.float32):
            raise ValueError(
                f"Invalid dtype: {self.dtype} for the average of a {dtype} parameter (expected "
                f"{dtype}{' or torch.float32' if narrow else ''})"
            )
        return self.dtype

    def elided_for(self, dtype: torch.dtype) -> bool:
        """Whether the average *is* the parameter: sampled and written back at every step, in the
        parameter's own dtype. It then needs no buffer; see docs/equivalences.md."""
        return self.write_back_every == 1 and self.dtype_for(dtype) == dtype


def _by_value() -> bool:
    """Whether the pickler at work takes functions by their code: cloudpickle, under whatever name
    others ship it, or dill."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if {"cloudpickle", "dill"} & set(frame.f_globals.get("__name__", "").split(".")):
            return True
        frame = frame.f_back
    return False


def structure(policy: str | None) -> tuple[str | None, ...]:
    """What must agree between the ``repr`` of a checkpoint's policy and the code's: the kind of
    weight, when it is written back, ``initial`` and ``dtype``. Numbers may differ."""
    if policy is None:
        return (None,)
    kind = re.match(r"Average\((<.*?>(?=, start=)|\w+)", policy)
    fields = dict(re.findall(r"(\w+)=([^,()]+)", policy))
    if kind is None or not {"every", "write_back_every", "initial", "dtype"} <= fields.keys():
        raise ValueError(f"Invalid average in the checkpoint: {policy!r}")
    written_back = fields["write_back_every"]
    when = "never" if written_back == "0" else "rarely"
    if written_back == fields["every"]:
        when = "at each sample"
    return kind.group(1), when, fields["initial"], fields["dtype"]


def same(saved: str, policy: str) -> bool:
    """Whether the ``repr`` of a checkpoint's policy is that of the code's, as far as one can tell:
    older ones do not say what a function is made of."""
    parts = [text.removesuffix(")").partition(", code=") for text in (saved, policy)]
    return parts[0][0] == parts[1][0] and alike(parts[0][2], parts[1][2])


# Frozen numbers and names: torch.load(weights_only=True) may make them, as where a trainer saves a
# policy among its hyperparameters.
torch.serialization.add_safe_globals([Average, *get_args(Named), *get_args(Ramp)])
# Older ones name them by this module.
OLDER = (Mean, Ema, Algorithm2)
torch.serialization.add_safe_globals([(kind, f"{__name__}.{kind.__name__}") for kind in OLDER])
