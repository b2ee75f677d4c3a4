"""Attention over tokens that lie in several places, and over a whole prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens in one place: keys and values [lane, token, kv_head, channel], positions and ``attended`` [lane, token]."""

    k: Tensor
    v: Tensor
    positions: Tensor
    attended: Tensor


def attend(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """One query a lane, [lane, kv_head, group, channel], over all ``parts`` together, each where it lies.

    Gives the result, and the weights [lane, kv_head, group, token] over the parts' tokens in order, in float32.
    """
    scores = [_scores(q, part, scale) for part in parts]
    weights = torch.cat(scores, dim=-1).softmax(-1)
    shares = torch.split(weights, [part.k.shape[1] for part in parts], dim=-1)
    mixed = [_mixed(share, part, q) for share, part in zip(shares, parts, strict=True)]
    return torch.stack(mixed).sum(0) if len(mixed) > 1 else mixed[0], weights


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
    """Each query of a group in turn: keys and values of long prompts are not copied for them."""
    group = q.shape[2] // k.shape[2]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    last = causal_lower_right(q.shape[1], k.shape[1]) if q.shape[1] < k.shape[1] else None
    mixed = torch.empty_like(q)
    for member in range(group):
        rows = q[:, :, member::group].transpose(1, 2)
        part = fn.scaled_dot_product_attention(rows, keys, values, attn_mask=last, is_causal=last is None, scale=scale)
        mixed[:, :, member::group] = part.transpose(1, 2)
    return mixed


def prompt_mask(tokens: int, padding: Tensor) -> Tensor:
    """What each token of a prompt attends to, [sequence, query, key]; padding attends to itself, so that nothing is NaN."""
    at = torch.arange(tokens, device=padding.device)
    causal = at[:, None] >= at
    real = at >= padding[:, None]
    return (causal & real[:, None, :]) | (at[:, None] == at)


def _scores(q: Tensor, part: Part, scale: float) -> Tensor:
    """Where the part lies on the CPU and the query does not, the CPU computes."""
    scores = torch.einsum("lhgc,lthc->lhgt", q.to(part.k.device), part.k).to(q.device).float() * scale
    return scores.masked_fill(~part.attended[:, None, None], -torch.inf)


def _mixed(weights: Tensor, part: Part, q: Tensor) -> Tensor:
    mixed = torch.einsum("lhgt,lthc->lhgc", weights.to(part.v.device, part.v.dtype), part.v)
    return mixed.to(q.device)
