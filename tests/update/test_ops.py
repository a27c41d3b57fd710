"""The operator: its schema, its checks, its answers to tables that do not fit."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import _C, rules, streams
from rbwa_fused.engine import backends, doors, memory, segments

MOMENTUM = segments.COLUMN_OF["m"]
STEP = torch.ops.rbwa_fused.step_.default


def arguments(n: int = 3, length: int = 40) -> list[Any]:
    """The operator's arguments as the optimizer makes them, in the schema's order."""
    params = [nn.Parameter(torch.randn(length)) for _ in range(n)]
    table = segments.Segments()
    memory.move(params)
    for i, p in enumerate(params):
        table.add(p, 0, i, row=0, sampling=0)
    table.attach("momentum_buffer", {i: torch.zeros(length) for i in range(n)})
    samplings = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    t = table.table(rows(rules.Kind.MOMENTUM), samplings)
    grads = [torch.randn(length) for _ in range(n)]
    return [params, grads, t.state, t.segments, t.shapes, t.ages, t.rows, t.samplings]


def rows(kind: int) -> Tensor:
    """Both rows of a group."""
    named = dict.fromkeys(rules.COLUMNS, 0.0)
    named |= {"s": 1.0, "lambda_": 0.1, "mu": 0.9, "c": 1.0, "gamma": 1.0, "eta": 0.5}
    named |= {"nu": 0.9, "q": 0.1, "epsilon": 0.1}
    numbers = [float(kind), *list(named.values())[1:]]
    return torch.tensor([numbers, numbers], dtype=torch.float64)


def direct(params: Any, grads: Any, *tables: Any) -> None:
    """The module's own door, with the operator's arguments."""
    _C.step(_C.Tables(*tables), params, grads)


def test_both_doors_take_the_same_step() -> None:
    torch.manual_seed(0)
    left = arguments()
    torch.manual_seed(0)
    right = arguments()
    before = left[0][0].detach().clone()
    STEP(*left)
    direct(*right)
    assert not torch.equal(left[0][0], before)
    for a, b in zip(left[0] + left[2], right[0] + right[2], strict=True):
        assert torch.equal(a, b)
    assert left[5].tolist() == right[5].tolist() == [1, 1, 1]  # the ages


def test_the_operator_keeps_its_schema() -> None:
    params, grads, *rest = arguments()
    with torch.no_grad():
        torch.library.opcheck(STEP, ([p.detach() for p in params], grads, *rest))


def test_python_and_cpp_agree_on_the_tables() -> None:
    assert segments.COLUMNS == _C.SEGMENT_COLUMNS
    assert rules.ROW.size == 8 * _C.ROW_COLUMNS
    assert rules.SAMPLING.size == 8 * _C.SAMPLING_COLUMNS


MISFITS: dict[str, Any] = {
    "a parameter of another dtype": lambda a: a[0].__setitem__(1, torch.randn(40).double()),
    "a parameter of another shape": lambda a: a[0].__setitem__(1, torch.randn(8, 5)),
    "a parameter of another layout": lambda a: a[0].__setitem__(1, torch.randn(80)[::2]),
    "a gradient of another dtype": lambda a: a[1].__setitem__(1, torch.randn(40).double()),
    "a gradient of another shape": lambda a: a[1].__setitem__(1, torch.randn(41)),
    "a gradient of other dimensions": lambda a: a[1].__setitem__(1, torch.randn(1, 40)),
    "a gradient of one dimension more": lambda a: a[1].__setitem__(1, torch.randn(40, 1)),
    "a gradient of another layout": lambda a: a[1].__setitem__(1, torch.randn(80)[::2]),
}


@pytest.mark.parametrize("door", [STEP, direct], ids=["dispatcher", "direct"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_is_named_and_nothing_is_written(misfit: str, door: Any) -> None:
    args = arguments()
    MISFITS[misfit](args)
    before = [t.detach().clone() for t in args[0] + args[2]]
    with pytest.raises(RuntimeError, match=r"step_: .* 1 "):
        door(*args)
    assert all(torch.equal(a, b) for a, b in zip(args[0] + args[2], before, strict=True))


def converted(args: list[Any]) -> None:
    for tensors in args[:2]:
        tensors[1] = tensors[1].detach().double()


WITHOUT_MOMENTUM: dict[str, Any] = {
    "a parameter of another dtype, with its gradient": converted,
    "a parameter without memory": lambda a: a[0].__setitem__(1, torch._efficientzerotensor(40)),
}


@pytest.mark.parametrize("misfit", WITHOUT_MOMENTUM)
def test_a_misfit_is_named_also_where_no_buffer_shows_it(misfit: str) -> None:
    args = arguments()
    args[6][:, 0] = rules.Kind.PLAIN
    WITHOUT_MOMENTUM[misfit](args)
    with pytest.raises(RuntimeError, match="parameter 1 differs"):
        direct(*args)


def edit(column: int, value: int) -> Any:
    def change(args: list[Any]) -> None:
        args[3] = args[3].clone()
        args[3][2, column] = value

    return change


LARGEST = 2**63 - 1
BROKEN: dict[str, tuple[Any, str]] = {
    "row out of range": (edit(segments.ROW, 2), "outside its tables"),
    "the row of a first step": (edit(segments.ROW, 1), "outside its tables"),
    "the row of a first step among others": (
        lambda a: (a.__setitem__(6, a[6].repeat(2, 1)), edit(segments.ROW, 1)(a)),
        "outside its tables",
    ),
    "negative row": (edit(segments.ROW, -2), "outside its tables"),
    "sampling out of range": (edit(segments.SAMPLING, 1), "outside its tables"),
    "negative sampling": (edit(segments.SAMPLING, -1), "outside its tables"),
    "negative length": (edit(segments.LENGTH, -1), "outside its tables"),
    "another length than the parameter's": (edit(segments.LENGTH, 39), "differs from what"),
    "shape out of range": (edit(segments.SHAPE, 5), "outside its tables"),
    "shape below range": (edit(segments.SHAPE, -1), "outside its tables"),
    "a shape whose end overflows": (edit(segments.SHAPE, LARGEST), "outside its tables"),
    "negative dimensions": (edit(segments.DIMS, -1), "outside its tables"),
    "dimensions whose strides overflow": (edit(segments.DIMS, 2**62), "outside its tables"),
    "state out of range": (edit(MOMENTUM, 3), "outside its state"),
    "state below range": (edit(MOMENTUM, -2), "outside its state"),
    "state far out of range": (edit(MOMENTUM, 2**50), "outside its state"),
    "state far below range": (edit(MOMENTUM, -(2**40)), "outside its state"),
    "state of another length": (
        lambda a: a[2].__setitem__(2, torch.zeros(41)),
        "outside its state",
    ),
    "no momentum buffer": (edit(MOMENTUM, -1), "lacks the stream m"),
    "half a difference": (
        lambda a: (
            a[6].__setitem__((slice(None), 0), rules.Kind.DIFFERENCE),
            edit(segments.COLUMN_OF["z"], 0)(a),
        ),
        "lacks the stream",
    ),
    "too few gradients": (lambda a: a[1].pop(), "gradients"),
    "a row of no kind": (
        lambda a: a[6].__setitem__((0, 0), float(len(rules.Kind))),
        "of no kind",
    ),
    "a row whose kind is no number": (lambda a: a[6].__setitem__((0, 0), math.nan), "of no kind"),
    "too few ages": (lambda a: a.__setitem__(5, a[5][:2]), "ages"),
    "ages of another dtype": (lambda a: a.__setitem__(5, a[5].int()), "documented dtype"),
    "rows of another dtype": (lambda a: a.__setitem__(6, a[6].float()), "documented dtype"),
    "samplings of another dtype": (lambda a: a.__setitem__(7, a[7].float()), "documented dtype"),
    "segments of another dtype": (lambda a: a.__setitem__(3, a[3].int()), "documented dtype"),
    "rows that are one row in memory": (
        lambda a: (a.__setitem__(6, a[6][:1].expand(50, -1)), edit(segments.ROW, 48)(a)),
        "contiguous",
    ),
    "rows that overlap": (
        lambda a: a.__setitem__(6, torch.zeros(40).double().as_strided((2, 2, 10), (2, 10, 1))),
        "contiguous",
    ),
    "a transposed table": (lambda a: a.__setitem__(3, a[3].t().contiguous().t()), "contiguous"),
    "a buffer that is one element in memory": (
        lambda a: a[2].__setitem__(0, torch.zeros(1).expand(40)),
        "outside its state",
    ),
    "streams of two dtypes": (
        lambda a: a[2].__setitem__(0, a[2][0].double()),
        "must have the dtype",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_table_is_refused_before_anything_is_written(broken: str) -> None:
    change, message = BROKEN[broken]
    args = arguments()
    change(args)
    before = [t.detach().clone() for t in args[0] + args[2]]
    with pytest.raises(RuntimeError, match=message):
        direct(*args)
    assert all(torch.equal(a, b) for a, b in zip(args[0] + args[2], before, strict=True))


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    _fields_ = (("counts", ctypes.c_size_t * 10),)


def heap() -> int:
    """Bytes that malloc has given out."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("mallinfo2 is glibc's")
    mallinfo2.restype = MallInfo
    return int(mallinfo2().counts[7])  # uordblks


@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_average_of_a_dtype_that_no_kernel_has_is_refused(average: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(40, dtype=torch.float64))
    table = segments.Segments()
    table.add(param, 0, 0, row=0, sampling=0)
    table.attach("average", {0: torch.zeros(40, dtype=average)})
    samplings = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    t = table.table(rows(rules.Kind.PLAIN), samplings)
    with pytest.raises(RuntimeError, match="average of segment 0 must have"):
        doors.in_turn([backends.CPU.call([param], [param.detach()], t)])


@pytest.mark.parametrize(
    ("param", "master"),
    [
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_a_master_of_a_dtype_that_no_kernel_has_is_refused(
    param: torch.dtype, master: torch.dtype
) -> None:
    p = nn.Parameter(torch.ones(40, dtype=param))
    table = segments.Segments()
    table.add(p, 0, 0, row=0, sampling=0)
    table.attach("master_param", {0: torch.zeros(40, dtype=master)})
    t = table.table(rows(rules.Kind.PLAIN), torch.zeros((1, 5), dtype=torch.float64))
    with pytest.raises(RuntimeError, match="master of segment 0 must be float32, of a 16-bit"):
        doors.in_turn([backends.CPU.call([p], [p.detach()], t)])


@pytest.mark.parametrize("door", [STEP, direct], ids=["dispatcher", "direct"])
def test_neither_steps_nor_refusals_keep_memory(door: Any) -> None:
    def call(args: list[Any], refused: bool) -> None:
        try:
            door(*args)
        except RuntimeError:
            assert refused

    good, bad = arguments(), arguments()
    MISFITS["a gradient of another shape"](bad)
    with torch.no_grad():
        for _ in range(20):
            call(good, False), call(bad, True)
        before = heap()
        for _ in range(1000):
            call(good, False), call(bad, True)
    assert heap() - before < 1000 * 8  # the smallest piece that malloc gives out is 24 bytes


def narrowed(wanted: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """float32 values as every instruction set stores them in 16 bits.

    theta <- narrow(a), with a float32 average that holds the values: w = 0.
    """
    chosen = _C.cpu_capability()
    try:
        for name in ("baseline", "avx2", "avx512"):
            if not _C.set_cpu_capability(name):
                continue
            p = nn.Parameter(torch.ones(wanted.shape, dtype=dtype))
            policy = rf.Average(lambda n, step: 0.0, write_back_every=1)
            opt = rf.FusedSGD([p], lr=0.0, average=policy)
            p.grad = torch.zeros_like(p)
            opt.step()
            opt.state[p]["average"].copy_(wanted)
            p.data.fill_(1.0)
            opt.step()
            yield p.detach()
    finally:
        _C.set_cpu_capability(chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_to_nearest_even_everywhere(dtype: torch.dtype) -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = everything[everything.isfinite()]
    below = finite.float().nextafter(torch.tensor(-torch.inf))
    halves = ((finite[:-1].double() + finite[1:].double()) / 2).float()
    wanted = torch.cat([finite.float(), below, halves, torch.tensor([7e4, 1e-9])])
    for stored in narrowed(wanted, dtype):
        assert torch.equal(stored, wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_is_stored_as_one_in_sixteen_bits_whatever_its_payload(dtype: torch.dtype) -> None:
    payloads = torch.tensor([0x7F800001, 0x7FBFFFFF, 0x7FFFFFFF, 0x7FC00000] * 3)
    nans = torch.cat([payloads, payloads - 2**31]).to(torch.int32).view(torch.float32)
    for stored in narrowed(nans, dtype):
        assert stored.isnan().all()


def test_a_backend_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "CPU_MISSING", "with a C++ compiler at hand run this")
    with pytest.raises(RuntimeError, match=r"C.. compiler"):
        rf.FusedSGD([nn.Parameter(torch.ones(2))], backend="cpu")
    with pytest.warns(UserWarning, match=r"C.. compiler") as caught:
        opt = rf.FusedSGD([nn.Parameter(torch.ones(2))])
    assert len(caught) == 1 and opt.backend == "reference"


@pytest.mark.parametrize("kind", [k for k in rules.Kind if rules.KEPT_BY[k]], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_beside_16_bit_weights_has_a_dtype_that_its_kind_has_kernels_for(
    kind: rules.Kind, state_dtype: torch.dtype
) -> None:
    """A GPU's kernel would read float32 as twice as many 16-bit numbers."""
    table = segments.Segments()
    p = torch.ones(40, dtype=torch.bfloat16)
    table.add(p, 0, 0, row=0, sampling=0)
    keys = {slot: key for key, slot in streams.KEYS.items()}
    for slot in rules.KEPT_BY[kind]:
        table.attach(keys[slot], {0: torch.zeros(40, dtype=state_dtype)})
    t = table.table(rows(kind), torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    args = [[p], [torch.ones_like(p)], t.state, t.segments, t.shapes, t.ages, t.rows, t.samplings]
    wide = state_dtype == torch.float32
    refused = kind == (rules.Kind.DIFFERENCE if wide else rules.Kind.SCHEDULE_FREE)
    if not refused:
        return direct(*args)
    with pytest.raises(RuntimeError, match="must have the dtype of its weights"):
        direct(*args)
    assert bool((p == 1).all())
