"""Keys and values in 8 or 4 bits, attended to on the CPU as they are stored: nothing is written back widened.

An entry is low + step * level. Values share a range by token, so the weights take it; keys share one by channel and group,
so the query takes it, once for each group: what is left is a product with the levels.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from runtime.attention import widened_product
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
        low, step = self.ranges.float().unbind(-2)
        wide = q.float()[:, :, :, None]  # [lane, head, member, 1, channel]
        by_group = (wide * step[:, :, None]).flatten(2, 3)
        scores = widened_product(by_group, self.levels, by_token=True, unpack=_unpack(self.kv_format))
        scores = scores.view(*wide.shape[:3], step.shape[2], -1).add_((wide * low[:, :, None]).sum(-1, keepdim=True))
        groups = self.groups[:, None, None, None].expand(*scores.shape[:3], 1, -1)
        return scores.gather(3, groups).squeeze(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerValues:
    """``levels`` [lane, token, head, width], ``ranges`` [lane, token, head, 2]."""

    levels: Tensor
    ranges: Tensor
    kv_format: KvFormat

    def mixed(self, weights: Tensor) -> Tensor:
        low, step = self.ranges.float().transpose(1, 2)[:, :, None].unbind(-1)  # [lane, head, 1, token]
        mixed = widened_product(weights * step, self.levels, by_token=False, unpack=_unpack(self.kv_format))
        return mixed.add_((weights * low).sum(-1, keepdim=True))


def _unpack(kv_format: KvFormat) -> Callable[[Tensor], Tensor] | None:
    bits = bits_of(kv_format)
    return None if bits == 8 else lambda stored: levels_of(stored, bits)
