"""Sets of tokens as masks [lane, position], and lists of them of a length that is known without asking the device.

A lane is what shares one selection: a sequence, or one key head of a sequence.
"""

import torch
from torch import Tensor


def oldest(mask: Tensor, counts: Tensor) -> Tensor:
    """The first ``counts`` [lane] tokens of each lane's set."""
    return mask & (mask.cumsum(-1) <= counts[:, None])


def newest(mask: Tensor, counts: Tensor) -> Tensor:
    """The last ``counts`` [lane] tokens of each lane's set."""
    following = mask.sum(-1, keepdim=True) - mask.cumsum(-1)  # members after this one
    return mask & (following < counts[:, None])


def highest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of each set with the largest scores, of equals the oldest."""
    if count == 0:
        return torch.zeros_like(mask)
    scores = scores.masked_fill(~mask, -torch.inf)
    last = scores.topk(min(count, scores.shape[-1])).values[:, -1:]
    above = mask & (scores > last)
    return above | oldest(mask & (scores == last), count - above.sum(-1))


def lowest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of each set with the smallest scores, of equals the oldest."""
    return highest(-scores, mask, count)


def listed(mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each set as ``length`` positions [lane, length] in order, and which of them count; the others are arbitrary."""
    if length == 1:
        first = mask.max(-1, keepdim=True)
        return first.indices, first.values
    rank = mask.cumsum(-1)  # 1 at a set's first member
    place = (rank * mask).clamp_(max=length + 1)  # the first and the last place are no one's
    position = torch.arange(mask.shape[-1], device=mask.device).expand_as(rank)
    order = rank.new_zeros(mask.shape[0], length + 2).scatter_(-1, place, position)
    return order[:, 1:-1], torch.arange(length, device=mask.device) < rank[:, -1:]
