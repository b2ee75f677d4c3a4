"""Sparse window attention, Algorithm 1 of ALISA: tokens by what the last k queries paid them, k the local tokens."""

from torch import Tensor

from runtime.masks import listed
from runtime.selectors.base import LayerSelector, Scope, prompt_weights


class SparseWindow(LayerSelector):
    """The weights of recent queries: the prompt's last ones over all its tokens, then each step's over what it kept.

    Sums are taken anew at every step: adding and subtracting in turn would leave rounding where exact zeros belong.
    """

    needs_weights = True

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        counts, attention = scope.counts, scope.attention
        self.history = [attention.history_steps(cached) for cached in counts.cached]
        self.queries = max(self.history)  # length of the ring
        self.width = max(near + far for near, far in zip(counts.local, counts.selected, strict=True))
        self.positions = scope.zeros(self.queries, self.width, dtype=scope.padding.dtype)
        self.weights = scope.zeros(self.queries, self.width, dtype=scope.dtype)
        self.prompt: Tensor | None = None  # [lane, query, token]

    def start(self, q: Tensor, k: Tensor) -> None:
        wanted = max(self.history[:2])
        first = max(0, k.shape[1] - wanted)
        weights = prompt_weights(q, k, self.scope.padding, self.scope.scale, first)
        self.prompt = weights.to(self.scope.dtype)

    def observe(self, row: int, weights: Tensor) -> None:
        at, kept = listed(weights[:, :-1] > 0, self.width)
        slot = row % self.queries
        self.positions[:, slot, : at.shape[1]] = at
        self.weights[:, slot, : at.shape[1]] = weights.gather(-1, at).where(kept, 0.0).to(self.scope.dtype)

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:  # noqa: ARG002
        assert self.prompt is not None
        sums = self.scope.zeros(self.scope.positions)
        steps = max(0, row - 1)  # queries since the prompt
        recent = min(steps, self.history[row])
        if recent:
            slots = [(row - 1 - back) % self.queries for back in range(recent)]
            at, weights = self.positions[:, slots].flatten(1), self.weights[:, slots].flatten(1).float()
            sums.scatter_add_(-1, at, weights)
        rest = min(self.history[row] - recent, self.prompt.shape[1])
        if rest:
            sums[:, : self.prompt.shape[2]] += self.prompt[:, -rest:].float().sum(1)
        return sums
