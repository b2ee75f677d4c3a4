"""Sparse window attention, Algorithm 1 of ALISA: tokens by what the last k queries paid them, k the local tokens."""

import torch
from torch import Tensor

from runtime.masks import listed
from runtime.selectors.base import LayerSelector, Scope, prompt_weights

_UNIT = 2.0**40  # sums are whole numbers of 1 / 2^40: what is added and later taken away leaves an exact zero


class SparseWindow(LayerSelector):
    """The weights of recent queries: the prompt's last ones over all its tokens, then each step's over what it kept."""

    needs_weights = True

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        counts, attention = scope.counts, scope.attention
        self.history = [attention.history_steps(cached) for cached in counts.cached]
        self.queries = max(self.history) + 1  # length of the ring: the query that leaves the sums is still there
        self.width = max(near + far for near, far in zip(counts.local, counts.selected, strict=True))
        self.positions = scope.zeros(self.queries, self.width, dtype=scope.padding.dtype)
        self.weights = scope.zeros(self.queries, self.width, dtype=scope.dtype)
        self.prompt: Tensor | None = None  # [lane, query, token]
        self.sums = scope.zeros(scope.positions, dtype=torch.int64)
        self.first = self.end = counts.cached[
            0
        ]  # the queries that ``sums`` holds; the one of step j is cached[0] + j - 1

    def start(self, q: Tensor, k: Tensor) -> None:
        wanted = max(self.history[:2])
        first = max(0, k.shape[1] - wanted)
        weights = prompt_weights(q, k, self.scope.padding, self.scope.scale, first)
        self.prompt = weights.to(self.scope.dtype)

    def observe(self, row: int, weights: Tensor) -> None:
        at, kept = listed(weights[:, :-1] > 0, self.width)
        slot = row % self.queries
        self.positions[:, slot] = at
        self.weights[:, slot] = weights.gather(-1, at).where(kept, 0.0).to(self.scope.dtype)

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:  # noqa: ARG002
        end = self.scope.counts.cached[0] + max(0, row - 1)
        first = max(end - self.history[row], 0)
        self._add(self.end, end, 1)
        self._add(self.first, first, -1)
        self._add(first, self.first, 1)
        self.first, self.end = first, end
        return self.sums.double() / _UNIT

    def _add(self, first: int, last: int, sign: int) -> None:
        """Add the weights of queries from ``first`` to before ``last`` to ``sums``, or take them away."""
        assert self.prompt is not None
        prompt = self.scope.counts.cached[0]
        if first < min(last, prompt):
            paid = self.prompt[:, first - prompt :][
                :, : min(last, prompt) - first
            ]  # it ends with the prompt's last query
            self.sums[:, :prompt] += sign * _whole(paid).sum(1)
        for query in range(max(first, prompt), last):
            slot = (query - prompt + 1) % self.queries
            self.sums.scatter_add_(-1, self.positions[:, slot], sign * _whole(self.weights[:, slot]))


def _whole(weights: Tensor) -> Tensor:
    return (weights.double() * _UNIT).round().long()
