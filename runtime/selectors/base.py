"""The interface of a selector, and what several of them share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.masks import highest
from sim.attention import Attention, TokenCounts
from sim.plan import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What one layer's selector works on; the first ``padding`` [lane] positions of a lane are no tokens."""

    attention: Attention
    counts: TokenCounts
    padding: Tensor
    dtype: torch.dtype
    scale: float

    @classmethod
    def of(cls, setting: Setting, padding: Tensor, dtype: torch.dtype) -> "Scope":
        """Lanes of a plan's setting."""
        scale = setting.model.head_dim**-0.5
        return cls(
            attention=setting.attention, counts=setting.token_counts, padding=padding.long(), dtype=dtype, scale=scale
        )

    @property
    def positions(self) -> int:
        return self.counts.cached[-1]

    @property
    def lanes(self) -> int:
        return self.padding.shape[0]

    @property
    def real(self) -> Tensor:
        """[lane, position]: no padding."""
        return torch.arange(self.positions, device=self.padding.device) >= self.padding[:, None]

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((self.lanes, *shape), dtype=dtype, device=self.padding.device)


class LayerSelector:
    """Scores the tokens of one layer; a step attends to those with the highest scores besides the newest ones.

    ``recalls``: the scores depend on the query at hand, so they are known only after it. ``needs_weights``: each step's
    attention weights are to be observed.
    """

    recalls = False
    needs_weights = False

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def start(self, q: Tensor, k: Tensor) -> None:
        """Look at the prompt's queries [lane, token, head, group, channel] and keys [lane, token, head, channel]."""

    def bear(self, row: int, k: Tensor) -> None:
        """Look at the newborn token's key [lane, 1, head, channel]."""

    def observe(self, row: int, weights: Tensor) -> None:
        """Look at the weights of this step's query, heads summed, [lane, position + 1]; 0 where it did not attend."""

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:
        """[lane, position]; ``older`` are the tokens to choose from, ``q`` [lane, head, group, channel] where it recalls."""
        raise NotImplementedError

    def picks(self, row: int, older: Tensor, count: int, q: Tensor | None = None) -> Tensor:
        """The ``count`` best of ``older``, of equals the oldest; padding is picked last."""
        scores = self.scores(row, older, q).masked_fill(~self.scope.real, -1.0)
        return highest(scores, older, count)


def prompt_weights(q: Tensor, k: Tensor, padding: Tensor, scale: float, first: int) -> Tensor:
    """Attention weights of the prompt's queries from ``first`` on, heads summed: [lane, query, token]."""
    tokens = k.shape[1]
    at = torch.arange(tokens, device=k.device)
    real = at >= padding[:, None]
    scores = torch.einsum("lqhgc,lthc->lhgqt", q[:, first:], k).float().mul_(scale)
    visible = (at[first:, None] >= at) & real[:, None, :]
    weights = scores.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1).sum((1, 2))
    return torch.where(real[:, first:, None], weights, 0.0)  # padding asks nothing (its row is NaN)
