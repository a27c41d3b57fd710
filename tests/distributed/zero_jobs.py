"""What the ranks of test_zero.py do: training with ZeroRedundancyOptimizer."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
import torch.distributed as dist
from ddp_jobs import Driven, batch_of, buffers, images, normed
from elastic_jobs import refused
from runs import METHODS, STEPS, bits, groups
from torch import nn
from torch.distributed import optim
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import rbwa_fused as rf
from rbwa_fused.distributed import Joined, ZeroRedundancyOptimizer, averaged


def arguments(method: str) -> dict[str, Any]:
    """What METHODS builds, as the arguments of a ZeroRedundancyOptimizer."""
    rule, average = METHODS[method].rule, METHODS[method].average
    return {"optimizer_class": rule.cls, **rule.options, "average": average}


def build(
    method: str, kind: Any = ZeroRedundancyOptimizer, view: bool = False, **options: Any
) -> tuple[Driven, Any, Any]:
    model = Driven(options.pop("dtype", torch.float32))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=view)
    given = {**arguments(method), **options}
    return model, ddp, kind(groups(model), parameters_as_bucket_view=view, **given)


def train(ddp: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        ddp.zero_grad()
        ddp(batch_of(dist.get_rank(), step)).backward()
        opt.step()


def weights(model: nn.Module) -> list[str | None]:
    return [bits(p) for p in model.parameters()]


def held(saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict, comparable."""
    state = {
        key: {name: bits(value) for name, value in sorted(entries.items())}
        for key, entries in saved["state"].items()
        if entries
    }
    return {"state": state, "groups": [dict(sorted(g.items())) for g in saved["param_groups"]]}


def through_bytes(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- jobs ----------------------------------------------------------------------------------------


def trained(method: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """With torch's class and ours, in both layouts."""
    answers = []
    for kind in (optim.ZeroRedundancyOptimizer, ZeroRedundancyOptimizer):
        for view in (False, True):
            model, ddp, opt = build(method, kind, view, **options)
            train(ddp, opt, 1, STEPS)
            after = weights(model)
            with averaged(opt), averaged(opt):
                live = weights(model)
            own = len(opt.optim.state)
            answer = {"weights": after, "averaged": live, "again": weights(model), "own": own}
            if kind is ZeroRedundancyOptimizer:
                opt.consolidate_state_dict(to=1)
                answer["n_averaged"] = opt.n_averaged
                if dist.get_rank() == 1:
                    answer["saved"] = held(through_bytes(opt.state_dict()))
            answers.append(answer)
    return answers


def saved_at(method: str, stop: int) -> bytes | None:
    """Model and consolidated state of rank 0, after `stop` steps."""
    model, ddp, opt = build(method)
    train(ddp, opt, 1, stop)
    opt.consolidate_state_dict()
    if dist.get_rank() > 0:
        return None
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    return file.getvalue()


def resumed_from(method: str, saved: bytes, stop: int) -> list[dict[str, Any]]:
    """By fresh optimizers in both layouts, and by one that has gone further already."""
    answers = []
    for view, steps in ((False, 0), (True, 0), (True, 3)):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model, ddp, opt = build(method, view=view)
        train(ddp, opt, 1, steps)
        opt.param_groups[0]["lr"] = 7.0  # the checkpoint has another
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        train(ddp, opt, stop + 1, STEPS)
        opt.consolidate_state_dict()
        answer: dict[str, Any] = {"weights": weights(model)}
        if dist.get_rank() == 0:
            answer["saved"] = held(opt.state_dict())
        answers.append(answer)
    return answers


def scheduled(method: str) -> dict[str, Any]:
    """A scheduler on the outer object, a group added, and one of the hyperparameters changed."""
    model, ddp, opt = build(method)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)
    for step in range(1, STEPS + 1):
        train(ddp, opt, step, step)
        schedule.step()
        if step == 5:
            opt.param_groups[0]["weight_decay"] = 0.2
    rates = [group["lr"] for group in opt.optim.param_groups]
    return {"weights": weights(model), "rates": rates}


def an_added_group() -> list[str | None]:
    model = Driven()
    named = dict(model.named_parameters())
    late = [named.pop("matrix"), named.pop("late")]
    opt = ZeroRedundancyOptimizer(
        list(named.values()), rf.FusedSGD, lr=0.05, momentum=0.9, average=rf.ema(0.8)
    )
    ddp = DistributedDataParallel(model)
    train(ddp, opt, 1, 2)
    opt.add_param_group({"params": late, "average": False, "lr": 0.01})
    train(ddp, opt, 3, STEPS)
    with averaged(opt):
        live = weights(model)
    return weights(model) + live


def fewer_parameters_than_ranks() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = ZeroRedundancyOptimizer(
        model.parameters(), rf.FusedSGD, lr=0.1, momentum=0.9, average=rf.mean()
    )
    ddp = DistributedDataParallel(model)
    for step in range(4):
        x = torch.full((1, 3), float(1 + step))
        ddp(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    last = dist.get_world_size() - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.consolidate_state_dict(to=last)
    with averaged(opt):
        live = weights(model)
    answer = {"weights": weights(model), "averaged": live, "own": len(opt.optim.state)}
    if dist.get_rank() == last:
        answer["saved"] = held(opt.state_dict())
    return answer


def evaluated() -> dict[str, Any]:
    """An exception inside, and BatchNorm re-estimated for the averages."""
    model = normed()
    ddp = DistributedDataParallel(model)
    opt = ZeroRedundancyOptimizer(
        model.parameters(), rf.FusedSGD, lr=0.1, momentum=0.9, average=rf.ema(0.7, start=2)
    )
    for step in range(1, STEPS + 1):
        ddp(images(0, step)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    before, statistics, inside, told = weights(model), buffers(model), [], False
    try:
        versions = [p._version for p in model.parameters()]
        with averaged(opt):
            told = all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
            inside = weights(model)
            raise KeyError("during evaluation")
    except KeyError as error:
        raised = str(error)
    exactly = before == weights(model)
    with rf.averaged_model(opt, model, [images(9, step) for step in range(3)]):
        estimated = buffers(model)
    return {
        "raised": raised,
        "told": told,
        "exactly": exactly and before == weights(model) and statistics == buffers(model),
        "before": before,
        "inside": inside,
        "estimated": estimated,
    }


def counted_apart() -> dict[str, Any]:
    """One rank's parameters have no gradient at a step, the other's have."""
    model = Driven()
    opt = ZeroRedundancyOptimizer(model.parameters(), rf.FusedSGD, lr=0.05, average=rf.ema(0.8))
    own = {id(p) for group in opt.optim.param_groups for p in group["params"]}
    for step in range(1, 4):
        opt.zero_grad()
        model(step).backward()
        for p in model.parameters():
            if step == 2 and dist.get_rank() == 0 and id(p) in own:
                p.grad = None
        opt.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.consolidate_state_dict()
    steps = opt.state_dict()["param_groups"][0]["step"] if dist.get_rank() == 0 else 3
    return {"warned": [str(w.message) for w in caught], "steps": steps}


def in_groups(model: Driven) -> list[dict[str, Any]]:
    """Each of two ranks gets one of the first and of the second, and one the third alone."""
    members = [[model.conv, model.early], [model.matrix, model.late], [model.scalar]]
    return [{"params": params} for params in members]


def learn_in_groups(model: Driven, opt: Any) -> None:
    """One parameter never has a gradient."""
    for step in range(1, 4):
        opt.zero_grad()
        model(step).backward()
        model.late.grad = None
        opt.step()


def groups_of_some_ranks() -> dict[str, Any]:
    model = Driven()
    opt = ZeroRedundancyOptimizer(in_groups(model), rf.RSGDM, lr=0.05)
    learn_in_groups(model, opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.consolidate_state_dict()
    saved = held(opt.state_dict()) if dist.get_rank() == 0 else None
    own = [len(group["params"]) for group in opt.optim.param_groups]
    return {"own": own, "warned": [str(w.message) for w in caught], "saved": saved}


def made_to_share_memory_inside() -> tuple[Any, Any]:
    model, ddp, opt = build("ema")
    train(ddp, opt, 1, 6)
    before, memory = weights(model), torch.zeros(1000)
    with opt.averaged():
        for p in model.parameters():
            if p is not model.scalar:  # without an average it is live inside, too
                p.data = memory[: p.numel()].view(p.shape)
    return before, weights(model)


def refusals() -> dict[str, str]:
    _, ddp, opt = build("ema")
    train(ddp, opt, 1, 3)
    for to in range(dist.get_world_size()):
        opt.consolidate_state_dict(to)
        if to == dist.get_rank():
            saved = through_bytes(opt.state_dict())
    _, _, other = build("lookahead")
    _, _, sgd = build("momentum", optim.ZeroRedundancyOptimizer)
    adam = optim.ZeroRedundancyOptimizer(Driven().parameters(), torch.optim.Adam)
    before = held(other.optim.state_dict())
    one_group = {**saved, "param_groups": saved["param_groups"][:1]}
    answers = {
        "another policy": refused(lambda: other.load_state_dict(saved)),
        "another number of groups": refused(lambda: other.load_state_dict(one_group)),
        "another optimizer": refused(
            lambda: ZeroRedundancyOptimizer(Driven().parameters(), torch.optim.SGD, lr=0.1)
        ),
        "capturable": refused(
            lambda: ZeroRedundancyOptimizer([torch.ones(2)], rf.SGDScheduleFree, capturable=True)
        ),
        "buffers": refused(
            lambda: ZeroRedundancyOptimizer(
                [torch.ones(2)], rf.FusedSGD, average=rf.ema(0.5), buffers=torch.nn.BatchNorm1d(2)
            )
        ),
        "no averages": refused(lambda: averaged(adam).__enter__()),
        "no sharding": refused(lambda: averaged(rf.FusedSGD(Driven().parameters())).__enter__()),
        "joined": refused(lambda: Joined(sgd)),
        "uneven": refused(lambda: Join([ddp, opt])),
        "not consolidated": refused(other.state_dict),
        "overlapped": refused(
            lambda: ZeroRedundancyOptimizer(
                Driven().parameters(), rf.FusedSGD, overlap_with_ddp=True
            )
        ),
    }
    groups_before = len(opt.param_groups)
    with opt.averaged():
        group = {"params": [nn.Parameter(torch.zeros(2))]}
        answers["a group inside"] = refused(lambda: opt.add_param_group(group))
    same = before == held(other.optim.state_dict()) and len(opt.param_groups) == groups_before
    answers["untouched"] = str(same)
    return answers


def resumed_by_torchs_class() -> str:
    """Which loads the averages, and not how many samples are in them."""
    _, ddp, opt = build("ema", optim.ZeroRedundancyOptimizer)
    train(ddp, opt, 1, 9)
    saved = []
    for to in range(dist.get_world_size()):
        opt.consolidate_state_dict(to)
        if to == dist.get_rank():
            saved.append(through_bytes(opt.state_dict()))
    _, other_ddp, other = build("ema", optim.ZeroRedundancyOptimizer)
    other.load_state_dict(saved[0])
    return refused(lambda: train(other_ddp, other, 10, 10))
