"""Attention over tokens that lie in several places, and over a whole prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Protocol

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as fn
from torch.nn.attention.bias import causal_lower_right

_ENTRIES_AT_ONCE = 2**18  # that a thread widens before it multiplies them: in float32 what its core's cache holds


class Keys(Protocol):
    """Keys of some tokens, however they are stored."""

    def scores(self, q: Tensor) -> Tensor:
        """Products with q [lane, kv_head, group, channel]: [lane, kv_head, group, token] in float32."""


class Values(Protocol):
    """Values of some tokens, however they are stored."""

    def mixed(self, weights: Tensor) -> Tensor:
        """Sums by ``weights`` [lane, kv_head, group, token] in float32: [lane, kv_head, group, channel]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Entries [lane, token, kv_head, channel] as floating-point numbers. Where they lie on the CPU, the CPU computes."""

    entries: Tensor

    def scores(self, q: Tensor) -> Tensor:
        if self.entries.device.type != "cpu":
            return torch.einsum("lhgc,lthc->lhgt", q, self.entries).float()
        return widened_product(q.cpu().float(), self.entries, by_token=True).to(q.device)

    def mixed(self, weights: Tensor) -> Tensor:
        if self.entries.device.type != "cpu":
            return torch.einsum("lhgt,lthc->lhgc", weights.to(self.entries.dtype), self.entries)
        return widened_product(weights.cpu(), self.entries, by_token=False).to(weights.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens in one place: positions and ``attended`` [lane, token], keys and values."""

    positions: Tensor
    attended: Tensor
    keys: Keys
    values: Values

    @classmethod
    def of(cls, k: Tensor, v: Tensor, positions: Tensor, attended: Tensor) -> "Part":
        """Keys and values that are there as they are."""
        return cls(positions=positions, attended=attended, keys=Plain(entries=k), values=Plain(entries=v))


def attend(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """One query a lane, [lane, kv_head, group, channel], over all ``parts`` together, each where it lies.

    Gives the result, and the weights [lane, kv_head, group, token] over the parts' tokens in order, in float32.
    """
    hidden = torch.cat([~part.attended for part in parts], dim=-1)
    scores = torch.cat([part.keys.scores(q) for part in parts], dim=-1).mul_(scale)
    weights = scores.masked_fill_(hidden[:, None, None], -torch.inf).softmax(-1)
    shares = torch.split(weights, [part.positions.shape[1] for part in parts], dim=-1)
    mixed = [part.values.mixed(share) for share, part in zip(shares, parts, strict=True)]
    return reduce(torch.add, mixed).to(q.dtype), weights


def widened_product(
    left: Tensor, stored: Tensor, *, by_token: bool, unpack: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``left`` [lane, head, row, channel or token] in float32 times ``stored`` [lane, token, head, channel], on the CPU.

    What is stored becomes float32, after ``unpack`` where entries share a byte, for as many heads at a time as the caches
    hold. ``by_token``: the result is [lane, head, row, token], else [lane, head, row, channel].
    """
    heads, rows = stored.transpose(1, 2).flatten(0, 1), left.flatten(0, 1)
    if heads.dtype is torch.float32:
        product = torch.bmm(rows, heads.transpose(1, 2) if by_token else heads)
        return product.view(*left.shape[:3], product.shape[-1])
    count, tokens, width = heads.shape[0], heads.shape[1], heads.shape[2] * (2 if unpack else 1)
    size = min(count, max(1, torch.get_num_threads() * _ENTRIES_AT_ONCE // max(1, tokens * width)))
    wide, product = left.new_empty(size, tokens, width), left.new_empty(*rows.shape[:2], tokens if by_token else width)
    for some, row, out in zip(*(torch.split(part, size) for part in (heads, rows, product)), strict=True):
        wide = wide[: len(some)].copy_(unpack(some) if unpack else some)
        torch.bmm(row, wide.transpose(1, 2) if by_token else wide, out=out)
    return product.view(*left.shape[:3], product.shape[-1])


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, scale: float) -> Tensor:
    """Causal attention, q [sequence, token, head, channel] and k, v with fewer heads; the first ``padding`` are no tokens.

    None where every prompt is whole: then no mask of tokens by tokens is made, and the queries may be the last ones only.
    """
    group = q.shape[2] // k.shape[2]
    if padding is None:
        return _attend_whole(q, k, v, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    mask = prompt_mask(q.shape[2], padding)[:, None]
    return fn.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _attend_whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A group's queries by one kernel where it takes them all, else each in turn: keys and values are not copied for them."""
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    last = causal_lower_right(q.shape[1], k.shape[1]) if q.shape[1] < k.shape[1] else None
    attend_to = partial(fn.scaled_dot_product_attention, attn_mask=last, is_causal=last is None, scale=scale)
    if group == 1 or _takes_groups(queries, keys, values):
        return attend_to(queries, keys, values, enable_gqa=group > 1).transpose(1, 2)
    mixed = torch.empty_like(q)
    for member in range(group):
        mixed[:, :, member::group] = attend_to(queries[:, member::group], keys, values).transpose(1, 2)
    return mixed


def _takes_groups(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether flash attention takes them: what torch has besides holds the scores of a group's queries, tokens by tokens."""
    return queries.is_cuda and can_use_flash_attention(SDPAParams(queries, keys, values, None, 0.0, False, True))


def prompt_mask(tokens: int, padding: Tensor) -> Tensor:
    """What each token of a prompt attends to, [sequence, query, key]; padding attends to itself, so that nothing is NaN."""
    at = torch.arange(tokens, device=padding.device)
    causal = at[:, None] >= at
    real = at >= padding[:, None]
    return (causal & real[:, None, :]) | (at[:, None] == at)
