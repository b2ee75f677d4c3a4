"""Exact top-k with recall: the tokens that get most of this very query's attention, heads summed."""

import torch
from torch import Tensor

from runtime.selectors.base import LayerSelector, Scope


class TopK(LayerSelector):
    """Every token's key stays on the GPU, to be scored."""

    recalls = True

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.keys: Tensor | None = None  # [lane, position, head, channel]

    def start(self, q: Tensor, k: Tensor) -> None:  # noqa: ARG002
        self.keys = self.scope.zeros(self.scope.positions, *k.shape[2:], dtype=k.dtype)
        self.keys[:, : k.shape[1]] = k

    def bear(self, row: int, k: Tensor) -> None:
        assert self.keys is not None
        self.keys[:, self.scope.counts.cached[row] - 1] = k[:, 0]

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:  # noqa: ARG002
        assert self.keys is not None
        assert q is not None
        cached = self.scope.counts.cached[row]
        scores = torch.einsum("lhgc,lthc->lhgt", q, self.keys[:, :cached]).float() * self.scope.scale
        scores = scores.masked_fill(~self.scope.real[:, None, None, :cached], -torch.inf)
        return torch.nn.functional.pad(scores.softmax(-1).sum((1, 2)), (0, self.scope.positions - cached))
