"""Takes a prompt in under sparse window attention: a dozen operations a layer, which is what short prompts take longest for.

The weights are those of ``runtime.selectors.base.prompt_weights``, by the same operations of torch; what follows from them
is told by four kernels.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from runtime.graph.launch import power_of_two
from sim.attention import TokenCounts

_QUERIES, _TOKENS = 8, 128  # that a program takes at once, at most


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the prompt's end and the first step choose by, the same in every layer."""

    counts: TokenCounts
    history: tuple[int, int]  # queries that they sum

    @property
    def tokens(self) -> int:
        return self.counts.cached[0]

    @property
    def queries(self) -> int:
        return min(self.tokens, max(self.history))

    @property
    def attended(self) -> int:
        """By the first step, besides its newborn token."""
        return self.counts.local[1] - 1 + self.counts.selected[1]

    @property
    def filled(self) -> int:
        """Entries, the newborn token's among them."""
        return self.counts.cached[1] - self.counts.dead[1]

    @cached_property
    def older(self) -> tuple[int, int]:
        return self.tokens - self.counts.local[0], self.counts.cached[1] - self.counts.local[1]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Keys and values [lane, token, head, channel] of some lanes from ``first_lane`` on; ``first_row``: of the state."""

    k: Tensor
    v: Tensor
    first_lane: int
    first_row: int

    @property
    def lanes(self) -> int:
        return self.k.shape[0]


def prompt_weights(window: Window, q: Tensor, prompt: Prompt, padding: Tensor, at_once: tuple[int, int]) -> Tensor:
    """Of the last queries over all tokens, heads summed, [lane, query, token], as they are stored; NaN where padding asks.

    ``at_once``: of how many lanes, and queries of each (``sim.footprint.weighed_at_once``).
    """
    lanes, queries = at_once
    first = window.tokens - window.queries
    if lanes >= prompt.lanes and queries >= window.queries:
        return _paid(q[:, first:], prompt.k, padding, prompt.first_lane, first).to(q.dtype)
    weights = q.new_empty((prompt.lanes, window.queries, window.tokens))
    for lane in range(0, prompt.lanes, lanes):
        some = slice(lane, lane + lanes)
        for query in range(first, window.tokens, queries):
            asking = q[some, query : query + queries]
            told = weights[some, query - first : query - first + queries]
            told.copy_(_paid(asking, prompt.k[some], padding, prompt.first_lane + lane, query))
    return weights


def _paid(q: Tensor, k: Tensor, padding: Tensor, first_lane: int, first_query: int) -> Tensor:
    """By queries from ``first_query`` on, of lanes from ``first_lane`` on, heads summed in float32. No more is held than what
    softmax reads and gives: nothing else has a name here.
    """
    return _masked(q, k, padding, first_lane, first_query).softmax(-1).sum((1, 2))


def _masked(q: Tensor, k: Tensor, padding: Tensor, first_lane: int, first_query: int) -> Tensor:
    """Scores [lane, head, group, query, token] in float32, minus infinity where a query sees no token."""
    scores = torch.einsum("lqhgc,lthc->lhgqt", q, k).contiguous()
    masked = scores if scores.dtype is torch.float32 else torch.empty_like(scores, dtype=torch.float32)
    lanes, heads, group, queries, tokens = scores.shape
    grid = lanes * heads * group, -(-queries // _QUERIES), -(-tokens // _TOKENS)
    kernels().mask[grid](
        scores,
        masked,
        padding,
        first_lane,
        first_query,
        q.shape[-1] ** -0.5,
        heads * group,
        queries,
        tokens,
        QUERIES=_QUERIES,
        TOKENS=_TOKENS,
        num_warps=4,
    )
    return masked


def weigh(window: Window, weights: Tensor, prompt: Prompt, padding: Tensor) -> Tensor:
    """What the prompt's end and the first step choose by, [2, lane, token]."""
    lanes, queries, tokens = weights.shape
    keys = torch.empty((2, lanes, tokens), dtype=torch.int64, device=weights.device)
    kernels().weigh[lanes, -(-tokens // _TOKENS)](
        weights,
        keys,
        padding,
        prompt.first_lane,
        lanes,
        queries,
        tokens,
        *window.history,
        *window.older,
        QUERIES=_QUERIES,
        TOKENS=_TOKENS,
        num_warps=4,
    )
    return keys


def score_bits(heads: int, queries: int) -> int:
    """Of what ``heads`` and ``queries`` together pay a token: a head's weight is at most 2^40."""
    return 42 + (heads * queries).bit_length()


def choose(window: Window, weights: Tensor, heads: int, prompt: Prompt, padding: Tensor, state: Any) -> None:
    """Fill the entries of ``state`` but for keys, values and remembered weights; ``heads``: queries' that were summed."""
    lanes, queries, tokens = weights.shape
    keys = weigh(window, weights, prompt, padding)
    counts, width = window.counts, power_of_two(tokens)
    entries = state.position.shape[-1]
    kernels().choose_first[(lanes,)](
        keys,
        state.rank,
        state.slots,
        state.counts,
        state.position,
        state.last,
        state.place,
        padding,
        prompt.first_lane,
        prompt.first_row,
        lanes,
        tokens,
        entries,
        state.slots.shape[-1],
        *window.older,
        window.older[0] - counts.dead[0],
        counts.selected[1],
        counts.dead[1],
        window.attended,
        TOKENS=width,
        ENTRIES=power_of_two(entries),
        BITS=score_bits(heads, queries),
        num_warps=4 if width <= 2048 else 16,
    )


def remember(window: Window, weights: Tensor, prompt: Prompt, padding: Tensor, state: Any) -> None:
    """The weights of the tokens that live."""
    lanes, queries, tokens = weights.shape
    kernels().remember[lanes, -(-queries // _QUERIES), -(-window.filled // _TOKENS)](
        weights,
        state.ring,
        state.position,
        padding,
        prompt.first_lane,
        prompt.first_row,
        queries,
        tokens,
        state.ring.shape[-2],
        state.ring.shape[-1],
        window.filled,
        QUERIES=_QUERIES,
        ENTRIES=_TOKENS,
        num_warps=4,
    )


def keep(window: Window, prompt: Prompt, state: Any, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> None:
    """Keys and values of the tokens that live: ``near`` [layer, lane, head, slot, channel], ``far`` [.., slot, head, channel]."""
    k, v, (heads, slots, channels) = prompt.k, prompt.v, near[0].shape[2:]
    kernels().keep[prompt.lanes, heads, -(-window.filled // 32)](
        k,
        v,
        *near,
        *far,
        state.position,
        state.place,
        prompt.first_row,
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        window.tokens,
        state.position.shape[-1],
        window.filled,
        slots,
        far[0].shape[2],
        CHANNELS=channels,
        PADDED=power_of_two(channels),
        ENTRIES=32,
        num_warps=4,
    )


def kernels() -> ModuleType:
    """The module of kernels, imported where they first run: machines without a GPU may lack Triton."""
    from runtime.graph import window_kernels as module

    return module
