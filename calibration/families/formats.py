"""Keys and values rounded to integers and widened again, as the tiers do it; matrices widened, as a captured step does."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from calibration.families.base import Case, Scope, each, timed
from calibration.timer import Call
from runtime.graph.widening import widen
from runtime.models.decoder import Affine
from runtime.models.quantised import quantised
from runtime.quantise import decode_keys, decode_values, encode_keys, encode_values, key_range
from sim.kv import GROUP_TOKENS, KvFormat
from sim.recipe import model_of
from sim.spec import WeightFormat, weight_bytes_per_parameter

_LANES, _HEADS, _CHANNELS = 4, 8, 128
_BITS = 8


def cases(scope: Scope) -> Iterator[Case]:
    """Both directions, a few groups of tokens and many."""
    for groups in (1, 16) if scope.on_gpu else (1, 2):
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


def weights(scope: Scope) -> Iterator[Case]:
    """A matrix of the first model, widened as a captured step does: into room that all share."""
    model = model_of(scope.models[0])
    outputs, inputs = model.intermediate, model.hidden
    native = outputs * inputs * scope.dtype.size_bytes
    for weight_format in (WeightFormat.INT8, WeightFormat.INT4) if scope.on_gpu else ():
        stored = round(outputs * inputs * weight_bytes_per_parameter(scope.dtype, weight_format))
        words = f"format={weight_format} outputs={outputs} inputs={inputs} native={native} stored={stored}"
        prepare = partial(_widenings, scope, weight_format, outputs, inputs, scope.copies(stored, 16))
        yield timed(scope, "widen_weights", words, prepare, size_bytes=native + stored)


def _widenings(scope: Scope, weight_format: WeightFormat, outputs: int, inputs: int, copies: int) -> list[Call]:
    room = scope.normal(outputs, inputs)
    matrix = quantised(Affine(weight=room, bias=None), weight_format)
    stored = [replace(matrix, weight=matrix.weight.clone(), ranges=matrix.ranges.clone()) for _ in range(copies)]
    return each(lambda one: widen(one, room), stored)


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
