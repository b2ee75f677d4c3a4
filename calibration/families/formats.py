"""Keys and values rounded to integers and widened again, as the tiers do it."""

from collections.abc import Iterator
from functools import partial

import torch

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.quantise import decode_keys, decode_values, encode_keys, encode_values, key_range
from sim.kv import GROUP_TOKENS, KvFormat

_LANES, _HEADS, _CHANNELS = 4, 8, 128
_BITS = 8


def cases(scope: Scope) -> Iterator[Case]:
    """Both directions, a few groups of tokens and many."""
    for groups in scope.some((1, 4, 16)) if scope.on_gpu else (1, 2):
        values = _LANES * groups * GROUP_TOKENS * _HEADS * _CHANNELS
        native, stored = 2 * values * scope.dtype.size_bytes, 2 * values
        for way in ("quantise", "dequantise"):
            words = f"groups={groups} native={native} stored={stored}"
            yield timed(
                scope,
                way,
                words,
                partial(_calls, scope, way, groups),
                size_bytes=native + stored,
                captured=scope.on_gpu,
            )


def _calls(scope: Scope, way: str, groups: int) -> list[Call]:
    shape = (_LANES, groups * GROUP_TOKENS, _HEADS, _CHANNELS)
    pairs = [(scope.normal(*shape), scope.normal(*shape)) for _ in range(4)]
    low_step = torch.stack([key_range(part, _BITS) for part in torch.split(pairs[0][0], GROUP_TOKENS, dim=1)], dim=1)
    ranges = low_step.repeat_interleave(GROUP_TOKENS, dim=1).transpose(2, 3)  # [lane, token, head, 2, channel]
    if way == "quantise":
        return each(
            lambda pair: (encode_keys(pair[0], KvFormat.INT8, ranges), encode_values(pair[1], KvFormat.INT8)), pairs
        )
    stored = [(encode_keys(k, KvFormat.INT8, ranges), encode_values(v, KvFormat.INT8)) for k, v in pairs]
    dtype = scope.torch_dtype
    return each(
        lambda pair: (
            decode_keys(pair[0], KvFormat.INT8, ranges, dtype),
            decode_values(pair[1], KvFormat.INT8, dtype),
        ),
        stored,
    )
