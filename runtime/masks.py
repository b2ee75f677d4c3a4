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
    return _first_of(scores.masked_fill(~mask, -torch.inf), mask, count, descending=True)


def lowest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of each set with the smallest scores, of equals the oldest."""
    return _first_of(scores.masked_fill(~mask, torch.inf), mask, count, descending=False)


def listed(mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each set as ``length`` positions [lane, length] in order, and which of them count; the others are arbitrary."""
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :length]
    return order, mask.gather(-1, order)


def _first_of(keys: Tensor, mask: Tensor, count: int, *, descending: bool) -> Tensor:
    order = keys.argsort(dim=-1, descending=descending, stable=True)[:, :count]
    return torch.zeros_like(mask).scatter_(-1, order, True) & mask
