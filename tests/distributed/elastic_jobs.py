"""What the ranks of test_elastic.py do: each has one of K models, pulled to their mean.

Every function but the helpers is a job of tests/ranks.py; what it returns can be compared.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from runs import bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import rbwa_fused as rf
from rbwa_fused.distributed import Elastic

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEPS = 9


def bytes_of(tensors: Any) -> list[bytes]:
    return [t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def drawn(rank: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights of awkward sizes and layouts, far apart between the ranks and of either sign."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(0,), (), (1,), (7,), (3, 5), (1025,), (2, 3, 4, 5)]
    tensors = [
        (torch.randn(s, generator=generator, dtype=torch.float64) * 10.0 ** (rank - 1)).to(dtype)
        for s in shapes
    ]
    tensors[-1] = tensors[-1].to(memory_format=torch.channels_last)
    tensors.append(torch.randn(9, generator=generator).to(dtype)[::2])
    return tensors


def net(rank: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)


def optimizer(model: nn.Module, **options: Any) -> rf.FusedSGD:
    return rf.FusedSGD(
        model.parameters(), lr=0.05, momentum=0.9, average=rf.ema(0.5, start=1), **options
    )


def learn(model: nn.Module, opt: rf.FusedSGD, rank: int, step: int) -> None:
    """A step on data of a rank's own."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(5, 4, generator=generator).to(next(model.parameters()).dtype)
    opt.zero_grad()
    model(x).square().mean().backward()
    opt.step()


def everything(model: nn.Module, opt: rf.FusedSGD) -> list[str | None]:
    state = [t for held in opt.state.values() for t in held.values()]
    return [bits(t) for t in (*model.state_dict().values(), *state)]


def refused(call: Callable[[], Any]) -> str:
    """The kind of error and its message, on a rank whose call must fail."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# ---- jobs ----------------------------------------------------------------------------------------


def pull_everything(alpha: float) -> dict[str, Any]:
    """The bits after a pull, the mean before it, and whether autograd was told."""
    rank = dist.get_rank()
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        weights = drawn(rank, dtype)
        elastic = Elastic(weights, alpha=alpha)
        mean = bytes_of(elastic.mean())
        versions = [t._version for t in weights]
        elastic.pull()
        told = all(t._version > v for t, v in zip(weights, versions, strict=True))
        results[str(dtype)] = {"weights": bytes_of(weights), "mean": mean, "told": told}
    return results


def pull_by_the_backend(alpha: float, overlap: bool) -> dict[str, Any]:
    """One all-reduce for each arithmetic: what it made of the weights, and their mean."""
    weights = [t for dtype in DTYPES for t in drawn(dist.get_rank(), dtype)]
    elastic = Elastic(weights, alpha=alpha, overlap=overlap, exact=False)
    mean = elastic.mean()
    with CommDebugMode() as seen:
        elastic.pull()
        elastic.wait()
    counts = {str(kind): count for kind, count in seen.get_comm_counts().items() if count}
    equal = drawn(7, torch.float32)
    Elastic(equal, alpha=0.5, exact=False).pull()
    return {"weights": weights, "mean": mean, "collectives": counts, "equal": equal}


class Peak(TorchDispatchMode):
    """The most bytes that were held at a time of the tensors that came to be inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        alive = [size for ref, size in self._held.values() if not ref.expired()]
        self.bytes = max(self.bytes, sum(alive))
        return result


def memory_of_a_pull(exact: bool) -> float:
    """In weights, whose own memory is counted, too: they are looked at."""
    weights = torch.full((1 << 16,), float(dist.get_rank()))
    elastic = Elastic([weights], alpha=0.5, exact=exact)
    with Peak() as peak:
        elastic.pull()
    assert weights[0] == (0.25 if dist.get_rank() == 0 else 0.75)
    return peak.bytes / (weights.numel() * weights.element_size())


def pull_of_shards(steps: int) -> list[str | None]:
    """Two replicas of two ranks each: a rank pulls its shards with their peer in the other one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    rank, replica = dist.get_rank(), mesh["replicas"].get_local_rank()
    model = net(replica)
    fully_shard(model, mesh=mesh["shards"])
    opt = optimizer(model)
    peers = mesh["replicas"].get_group()
    own = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
    elastic = Elastic(own, alpha=0.5, every=2, group=peers)
    for step in range(1, steps + 1):
        for p in model.parameters():
            generator = torch.Generator().manual_seed(10 * step + replica)
            g = torch.randn(p.shape, generator=generator)
            p.grad = distribute_tensor(g, mesh["shards"], [Shard(0)], src_data_rank=None)
        opt.step()
        elastic.step()
    assert rank == 2 * replica + mesh["shards"].get_local_rank()
    return [bits(p.full_tensor()) for p in model.parameters()]  # type: ignore[attr-defined]


def pull_of_mixed_dtypes() -> list[bytes]:
    weights = [t for dtype in DTYPES for t in drawn(dist.get_rank(), dtype)[4:6]]
    Elastic(weights, alpha=0.3).pull()
    return bytes_of(weights)


def pull_in_a_group(ranks: list[int]) -> tuple[list[bytes], list[bytes]] | str:
    """In a part of the processes: weights that differ, and weights that are equal already."""
    group = dist.new_group(ranks)
    if dist.get_rank() not in ranks:
        return refused(lambda: Elastic([torch.ones(2)], alpha=1.0, group=group))
    weights, equal = drawn(dist.get_rank(), torch.float32), drawn(7, torch.float32)
    Elastic(weights, alpha=0.3, group=group).pull()
    for alpha in (0.3, 1.0):
        Elastic(equal, alpha=alpha, group=group).pull()
    return bytes_of(weights), bytes_of(equal)


def local_sgd(every: int, alpha: float, stop: int = 0) -> list[str | None]:
    """Pulls after every so many steps; saved, and gone on with by other objects, at `stop`."""
    rank = dist.get_rank()
    model = net(rank)
    opt = optimizer(model)
    elastic = Elastic(model, alpha=alpha, every=every)
    for step in range(1, STEPS + 1):
        learn(model, opt, rank, step)
        elastic.step()
        if step == stop:
            file = io.BytesIO()
            torch.save([model.state_dict(), opt.state_dict(), elastic.state_dict()], file)
            file.seek(0)
            weights, state, steps = torch.load(file, weights_only=True)
            model = net(10 + rank)
            opt = optimizer(model)
            elastic = Elastic(model, alpha=alpha, every=every)
            model.load_state_dict(weights)
            opt.load_state_dict(state)
            elastic.load_state_dict(steps)
    return everything(model, opt)


def scheduled_training(epochs: int, dtype: torch.dtype, masters: bool) -> list[str | None]:
    rank = dist.get_rank()
    model = net(rank, dtype)
    opt = optimizer(model, master_weights=masters)
    elastic = Elastic(model, epochs=epochs)
    for epoch in range(epochs):
        for batch in range(2):
            learn(model, opt, rank, 2 * epoch + batch)
        elastic.pull(epoch + 1)
    return everything(model, opt)


def overlapped(every: int, alpha: float, dtype: torch.dtype, by_step: bool) -> dict[str, Any]:
    rank = dist.get_rank()
    model = net(rank, dtype)
    opt = optimizer(model)
    elastic = Elastic(model, alpha=alpha, every=every if by_step else 1, overlap=True)
    path, halfway = [], []
    for step in range(1, STEPS + 1):
        learn(model, opt, rank, step)
        if by_step:
            elastic.step()
        elif step % every == 0:
            elastic.pull()
        path.append(bytes_of(model.parameters()))
        under_way = elastic._under_way
        halfway.append(under_way is not None and under_way._means[0]._piece is not None)
    refusals = [refused(elastic.state_dict), refused(lambda: elastic.load_state_dict({"steps": 1}))]
    elastic.wait()
    elastic.wait()
    return {
        "path": [*path, bytes_of(model.parameters())],
        "halfway": halfway,
        "refusals": refusals,
        "saved": elastic.state_dict(),
    }


def evaluate_the_mean() -> dict[str, Any]:
    rank = dist.get_rank()
    model = net(rank)
    learn(model, optimizer(model), rank, 1)
    elastic = Elastic(model, epochs=2)
    kept = copy.deepcopy(model.state_dict())
    averaged = elastic.averaged_state_dict(model)
    return {
        "averaged": {k: v.tolist() for k, v in averaged.items()},
        "own": {k: v.tolist() for k, v in kept.items()},
        "moved": any(not torch.equal(v, kept[k]) for k, v in model.state_dict().items()),
        "foreign": refused(lambda: elastic.averaged_state_dict(nn.Linear(2, 2))),
    }


def arguments_that_differ() -> dict[str, str]:
    """One argument of the last rank is another; all must be told, and nothing may hang."""
    last = dist.get_rank() == dist.get_world_size() - 1
    two = torch.ones(2)
    cases: dict[str, Callable[[], Any]] = {
        "shape": lambda: Elastic([torch.ones(3 if last else 2)], alpha=1.0),
        "dtype": lambda: Elastic([two.double() if last else two], alpha=1.0),
        "count": lambda: Elastic([two, torch.ones(1)] if last else [two], alpha=1.0),
        "every": lambda: Elastic([two], alpha=1.0, every=2 if last else 1),
        "alpha": lambda: Elastic([two], alpha=0.25 if last else 0.5),
        "epochs": lambda: Elastic([two], epochs=3 if last else 4),
        "schedule": lambda: Elastic([two], alpha=(lambda t: 0.5) if last else 0.5),
        "overlap": lambda: Elastic([two], alpha=1.0, overlap=last),
        "no floats": lambda: Elastic([two.int() if last else two], alpha=1.0),
        "tied": lambda: Elastic([two, two[:]] if last else [two, two.clone()], alpha=1.0),
        "no model": lambda: Elastic(two if last else [two], alpha=1.0),
        "alpha too large": lambda: Elastic([two], alpha=1.5 if last else 1.0),
        "no steps": lambda: Elastic([two], alpha=1.0, every=0 if last else 1),
    }
    return {name: refused(case) for name, case in cases.items()}


def use_out_of_range() -> dict[str, Any]:
    """Mistakes that all ranks make: nothing is exchanged, nothing is written."""
    model = nn.Linear(2, 1)
    kept = bytes_of(model.parameters())
    elastic = Elastic(model, epochs=2, every=2)
    answers: dict[str, Any] = {
        "no count": refused(elastic.pull),
        "no count in step": refused(elastic.step),
        "too many": refused(lambda: elastic.pull(3)),
        "a strange checkpoint": refused(lambda: elastic.load_state_dict({"step": 1})),
        "a strange count": refused(lambda: elastic.load_state_dict({"steps": -1})),
    }
    elastic.pull(2)  # alpha is 0
    answers["kept"] = bytes_of(model.parameters()) == kept
    model.weight = nn.Parameter(torch.ones(3, 1))
    answers["another shape"] = refused(lambda: elastic.pull(0))
    model.extra = nn.Parameter(torch.ones(1))
    answers["another count"] = refused(elastic.mean)
    return answers
