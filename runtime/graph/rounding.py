"""A prompt's keys and values rounded to INT8 by one kernel: as ``runtime.quantise`` rounds them, of many operations."""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.graph.launch import power_of_two
from sim.kv import GROUP_TOKENS


class Rounded(NamedTuple):
    """Levels [lane, token, head, channel], those of keys 0 where their group is not whole; ranges [lane, token, head, 2]."""

    keys: Tensor
    values: Tensor
    value_ranges: Tensor


def round_prompt(k: Tensor, v: Tensor, key_ranges: Tensor, waiting: Tensor) -> Rounded:
    """Of keys and values [lane, token, head, channel]. Ranges of whole groups go to ``key_ranges`` [lane, head, group, 2,
    channel], keys of the open one to ``waiting`` [lane, head, group token, channel].
    """
    from runtime.graph import rounding_kernels  # machines without a GPU may lack Triton

    lanes, tokens, heads, channels = k.shape
    keys, values = (torch.empty(k.shape, dtype=torch.uint8, device=k.device) for _ in range(2))
    value_ranges = torch.empty((lanes, tokens, heads, 2), dtype=torch.float16, device=k.device)
    rounding_kernels.round_prompt[lanes, heads, -(-tokens // GROUP_TOKENS)](
        k,
        v,
        keys,
        values,
        value_ranges,
        key_ranges,
        waiting,
        *k.stride()[:3],
        *v.stride()[:3],
        *key_ranges.stride()[:2],
        *waiting.stride()[:2],
        heads,
        tokens,
        GROUP=GROUP_TOKENS,
        CHANNELS=channels,
        PADDED=power_of_two(channels),
        num_warps=4,
    )
    return Rounded(keys=keys, values=values, value_ranges=value_ranges)
