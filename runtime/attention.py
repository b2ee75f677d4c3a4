"""Attention over tokens that lie in several places, and over a whole prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn
from torch.nn.attention.bias import causal_lower_right

Read = Callable[[slice], tuple[Tensor, Tensor]]
_ENTRIES_AT_ONCE = 2**19  # of keys that are widened for a product on the CPU: what its caches hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens in one place: positions and ``attended`` [lane, token].

    ``read`` gives some lanes' keys and values [lane, token, kv_head, channel]; ``at_once`` says of how many lanes it
    should, None: all.
    """

    positions: Tensor
    attended: Tensor
    read: Read
    at_once: int | None = None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, positions: Tensor, attended: Tensor) -> "Part":
        """Keys and values that are there as they are."""
        return cls(positions=positions, attended=attended, read=lambda lanes: (k[lanes], v[lanes]))


def attend(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """One query a lane, [lane, kv_head, group, channel], over all ``parts`` together, each where it lies.

    Gives the result, and the weights [lane, kv_head, group, token] over the parts' tokens in order, in float32.
    """
    size = min((part.at_once for part in parts if part.at_once), default=q.shape[0])
    some = [_attend(q, parts, slice(at, at + size), scale) for at in range(0, q.shape[0], size)]
    if len(some) == 1:
        return some[0]
    attended, weights = zip(*some, strict=True)
    return torch.cat(attended), torch.cat(weights)


def lanes_at_once(device: torch.device, entries: int) -> int | None:
    """Of how many lanes the keys of ``entries`` each should be widened together: all of them on a GPU."""
    return max(1, _ENTRIES_AT_ONCE // max(1, entries)) if device.type == "cpu" else None


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


def _attend(q: Tensor, parts: Sequence[Part], lanes: slice, scale: float) -> tuple[Tensor, Tensor]:
    kv = [part.read(lanes) for part in parts]
    hidden = torch.cat([~part.attended[lanes] for part in parts], dim=-1)
    scores = torch.cat([_scores(q[lanes], k) for k, _ in kv], dim=-1).float() * scale
    weights = scores.masked_fill_(hidden[:, None, None], -torch.inf).softmax(-1)
    shares = torch.split(weights, [k.shape[1] for k, _ in kv], dim=-1)
    mixed = [_mixed(share, v, q) for share, (_, v) in zip(shares, kv, strict=True)]
    return torch.stack(mixed).sum(0) if len(mixed) > 1 else mixed[0], weights


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Where keys lie on the CPU and the query does not, the CPU computes."""
    return torch.einsum("lhgc,lthc->lhgt", q.to(k.device), k).to(q.device)


def _mixed(weights: Tensor, v: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("lhgt,lthc->lhgc", weights.to(v.device, v.dtype), v).to(q.device)
