"""Weights on the host or in integers: streaming changes no bit, quantised ones are what quantising once and widening gives."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.execute import execute
from runtime.models import Decoder, as_planned
from runtime.models.decoder import Affine, LayerWeights
from runtime.models.quantised import quantised
from runtime.models.streamed import mapped
from runtime.options import Options
from runtime.recorder import Record
from sim.attention import Selector
from sim.spec import WeightFormat
from tests.runtime.plans import Choice, all_in_hbm, draw_choice, draw_plan
from tests.runtime.test_dense import checkpoint, random_prompts
from tests.runtime.where import DRAWN, Where

NAMES = ("opt", "opt_post_norm", "llama_grouped", "qwen3", "gpt_neox")
STORED = [WeightFormat.INT8, WeightFormat.INT4]


def widened_once(decoder: Decoder, weight_format: WeightFormat) -> Decoder:
    """The decoder whose matrices are what the quantised ones are widened to."""

    def widen(affine: Affine) -> Affine:
        return Affine(weight=quantised(affine, weight_format).widened(), bias=affine.bias)

    def widen_layer(layer: LayerWeights) -> LayerWeights:
        return replace(layer, qkv=widen(layer.qkv), out=widen(layer.out), up=widen(layer.up), down=widen(layer.down))

    weights = replace(decoder.weights, layers=tuple(widen_layer(layer) for layer in decoder.weights.layers))
    return Decoder(decoder.config, weights)


def copied(decoder: Decoder) -> Decoder:
    """Tensors where an allocator puts them: some CPUs' products round otherwise where a file's lie, which are aligned to less."""
    layers = tuple(mapped(layer, Tensor.clone) for layer in decoder.weights.layers)
    return Decoder(decoder.config, replace(decoder.weights, layers=layers))


@settings(DRAWN, max_examples=16)
@given(seed=st.integers(0, 2**32))
def test_streaming_changes_no_bit(where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint(rng.choice(NAMES), where)
    decoder = copied(decoder)
    choice = replace(draw_choice(rng, rng.choice([*Selector])), weights_on_host=rng.choice([0.01, 0.5, 0.77, 1.0]))
    plan = draw_plan(rng, decoder.spec, choice)
    resident = replace(plan, setting=replace(plan.setting, weights_on_host=0.0))
    prompts, options = random_prompts(rng, plan), Options(record=Record(logits=True))
    streamed, there = (execute(one, decoder, prompts, options=options) for one in (plan, resident))
    assert streamed.logits is not None
    assert there.logits is not None
    assert torch.equal(streamed.logits, there.logits)
    assert streamed.trace.outcome.h2d_bytes > there.trace.outcome.h2d_bytes


@pytest.mark.parametrize("weight_format", STORED)
@settings(DRAWN, max_examples=16)
@given(seed=st.integers(0, 2**32))
def test_quantised_weights_are_what_widening_once_gives(weight_format: WeightFormat, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint(rng.choice(NAMES), where)
    plan = draw_plan(rng, decoder.spec, replace(draw_choice(rng, Selector.DENSE), weight_format=weight_format))
    native = replace(plan, setting=replace(plan.setting, weight_format=WeightFormat.NATIVE))
    prompts, options = random_prompts(rng, plan), Options(record=Record(logits=True))
    got = execute(plan, decoder, prompts, options=options)
    expected = execute(native, widened_once(decoder, weight_format), prompts, options=options)
    assert got.logits is not None
    assert expected.logits is not None
    assert torch.equal(got.logits, expected.logits)
    assert got.completions == expected.completions


@pytest.mark.parametrize("weight_format", STORED)
@pytest.mark.parametrize("inputs", [64, 192, 100, 3])
def test_a_weight_comes_back_within_half_a_step_of_its_group(
    weight_format: WeightFormat, inputs: int, where: Where
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(40, inputs, generator=generator).to(where.device, where.dtype)
    weight[::7] *= 50
    weight[3] = 0.25
    stored = quantised(Affine(weight=weight), weight_format)
    back, bits = stored.widened().float(), 8 if weight_format is WeightFormat.INT8 else 4
    for first in range(0, inputs, 64):
        group = weight[:, first : first + 64].float()
        low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
        size = low.abs() + high - low
        rounding = 2**-11 * size + torch.finfo(where.dtype).eps * size
        error = (back[:, first : first + 64] - group).abs()
        assert bool((error <= (high - low) / (2**bits - 1) / 2 + rounding).all())
    groups = -(-inputs // 64)
    assert stored.weight.nbytes + stored.ranges.nbytes == 40 * groups * (64 * bits // 8 + 4)


def test_what_is_tied_stays_tied_and_a_decoder_is_stored_once(where: Where) -> None:
    _, decoder = checkpoint("llama_grouped", where)
    setting = all_in_hbm(decoder.spec, Choice(weight_format=WeightFormat.INT4, weights_on_host=0.5)).setting
    stored = as_planned(decoder, setting)
    assert stored.weights.head is stored.weights.embedding
    assert as_planned(stored, setting) is stored
    with pytest.raises(ValueError, match="weights are stored as int4 with 50% on the host, the plan has int4 with 0%"):
        as_planned(stored, replace(setting, weights_on_host=0.0))
