"""One pull of K models in processes of their own: snapshot, mean, and what is written when."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rbwa_fused import reference
from rbwa_fused.distributed.exchange import BackendMean, Group, GroupMean


class Pull:
    """A pull under way: the weights that it started from, and their mean once it has come.

    Args:
        params: what is pulled, in each of the K processes of the group.
        alpha: how far, 0 < alpha <= 1.
        group: the processes, at least two.
        exact: the mean has the bits of `reference.mean`; else those of the backend's all-reduce.
    """

    def __init__(self, params: list[Tensor], alpha: float, group: Group, exact: bool) -> None:
        self._alpha = alpha
        world = dist.get_world_size(group)
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, p in enumerate(params):
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            members.setdefault((p.device, wide), []).append(i)
        self._shapes = [p.shape for p in params]
        self._members = list(members.values())
        self._starts: list[Tensor] = []
        for (device, wide), indices in members.items():
            length = sum(params[i].numel() for i in indices)
            padded = -(-max(length, 1) // world) * world
            flat = torch.empty(padded, dtype=wide, device=device)
            flat[length:] = 0.0
            self._starts.append(flat)
        with torch.no_grad():
            for start, p in zip(self._apart(self._starts), params, strict=True):
                start.copy_(p)
        kind = GroupMean if exact else BackendMean
        self._means = [kind(flat, group) for flat in self._starts]

    def turn(self) -> None:
        """Starts the second half of the exchange."""
        for mean in self._means:
            mean.turn()

    def means(self) -> list[Tensor]:
        """The mean of each parameter, in its shape and the arithmetic's dtype."""
        return self._apart(self._results())

    @torch.no_grad()
    def finish(self, params: list[Tensor]) -> None:
        """Pulls weights that are what they were at the start."""
        pulled = self._results()  # all of them before any weight is written
        for mean, start in zip(pulled, self._starts, strict=True):
            reference.pulled_(mean, start, self._alpha)
        for p, weights in zip(params, self._apart(pulled), strict=True):
            p.detach().copy_(weights)

    @torch.no_grad()
    def correct(self, params: list[Tensor]) -> None:
        """Adds to weights that have moved on what the pull would have added at the start."""
        corrections = self._results()
        for mean, start in zip(corrections, self._starts, strict=True):
            reference.correction_(mean, start, self._alpha)
        for p, correction in zip(params, self._apart(corrections), strict=True):
            p.detach().add_(correction)  # 16-bit weights: in float32, rounded once

    def _results(self) -> list[Tensor]:
        self.turn()
        return [mean.result() for mean in self._means]

    def _apart(self, flats: list[Tensor]) -> list[Tensor]:
        """Views of flat tensors in the parameters' shapes and order."""
        views: dict[int, Tensor] = {}
        for flat, indices in zip(flats, self._members, strict=True):
            sizes = [self._shapes[i].numel() for i in indices]
            for i, piece in zip(indices, flat[: sum(sizes)].split(sizes), strict=True):
                views[i] = piece.view(self._shapes[i])
        return [views[i] for i in range(len(self._shapes))]
