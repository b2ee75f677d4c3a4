"""Keys and values in 8 or 4 bits, attended to on the CPU as they are stored: nothing is written back widened.

An entry is low + step * level. Values share a range by token, so the weights take it; keys share one by channel and group,
so the query takes it, once for each group: what is left is a product with the levels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.attention import Keys, widened_product
from runtime.quantise import bits_of, levels_of
from sim.kv import KvFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerKeys:
    """``levels`` [lane, token, head, width], ``ranges`` [lane, head, group, 2, channel], ``groups`` [lane, token]."""

    levels: Tensor
    ranges: Tensor
    groups: Tensor
    kv_format: KvFormat

    def scores(self, q: Tensor) -> Tensor:
        low, step = self.ranges.unbind(-2)
        wide = q.float()
        by_group = (wide[:, :, :, None] * step[:, :, None]).flatten(2, 3)  # [lane, head, member * group, channel]
        steps = widened_product(by_group, self.levels, by_token=True, unpack=_unpack(self.kv_format))
        lows = widened_product(wide, low.transpose(1, 2), by_token=True)  # [lane, head, member, group]
        groups = self.groups[:, None, None].expand(*q.shape[:3], -1)
        steps = steps.view(*lows.shape, -1).gather(3, groups.unsqueeze(3)).squeeze(3)
        return steps.add_(lows.gather(3, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysInPart:
    """Keys that are stored, but for those from position ``start`` on: they are ``waiting``, from the first of them on."""

    stored: Keys
    waiting: Keys
    positions: Tensor
    start: int

    def scores(self, q: Tensor) -> Tensor:
        stored, waiting = self.stored.scores(q), self.waiting.scores(q)
        place = (self.positions - self.start)[:, None, None]
        at = place.clamp(min=0, max=waiting.shape[-1] - 1).expand_as(stored)
        return torch.where(place >= 0, waiting.gather(-1, at), stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerValues:
    """``levels`` [lane, token, head, width], ``ranges`` [lane, token, head, 2]."""

    levels: Tensor
    ranges: Tensor
    kv_format: KvFormat

    def mixed(self, weights: Tensor) -> Tensor:
        low, step = self.ranges.transpose(1, 2)[:, :, None].unbind(-1)  # [lane, head, 1, token]
        steps = widened_product(weights * step, self.levels, by_token=False, unpack=_unpack(self.kv_format))
        return steps.add_((weights * low).sum(-1, keepdim=True))


def _unpack(kv_format: KvFormat) -> Callable[[Tensor], Tensor] | None:
    bits = bits_of(kv_format)
    return None if bits == 8 else lambda stored: levels_of(stored, bits)
