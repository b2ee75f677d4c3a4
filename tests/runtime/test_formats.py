"""Stored formats: how far a key or value may come back from what it was, whatever the keys do."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.attention import attend
from runtime.execute import execute
from runtime.lanes import Lanes
from runtime.memory import device_zeros
from runtime.options import Options
from runtime.quantise import decode_values, encode_values
from runtime.recorder import Record
from runtime.tier import KeyFreezer, KvShape, OpenKeys, Tier
from sim.attention import Selector
from sim.kv import GROUP_TOKENS, KvFormat, KvFormats
from tests.runtime.plans import Choice, draw_choice, draw_plan
from tests.runtime.test_dense import checkpoint, random_prompts, true_logits
from tests.runtime.where import DRAWN, Where

STORED = [KvFormat.INT8, KvFormat.INT4, KvFormat.FP8]


def drifting_keys(kind: str, tokens: int, where: Where) -> torch.Tensor:
    """[lane, token, head, channel]: at random, or with a mean and a spread that grow from group to group."""
    keys = torch.randn(2, tokens, 3, 8, generator=torch.Generator().manual_seed(3))
    if kind == "drifting":
        at = torch.arange(tokens)[None, :, None, None]
        keys = keys * (1 + at / 40) + at / 10
    if kind == "spiked":
        keys[:, ::37] *= 30
    return keys.to(where.device, where.dtype)


def bound(keys: torch.Tensor, kv_format: KvFormat, group: slice) -> torch.Tensor:
    """Half a step and the rounding of its 16-bit range, by channel of one group; FP8: a sixteenth of the entry."""
    inside = keys[:, group].float()
    if kv_format is KvFormat.FP8:
        return inside.abs() / 16 + 2**-9
    low, high = inside.amin(1, keepdim=True), inside.amax(1, keepdim=True)
    step = (high - low) / (2 ** (8 if kv_format is KvFormat.INT8 else 4) - 1)
    rounding = torch.finfo(keys.dtype).eps if keys.dtype != torch.float32 else 0.0
    return (step / 2 + (low.abs() + high - low) * (2**-10 + rounding) + high.abs() * rounding).expand_as(inside)


@pytest.mark.parametrize("kind", ["random", "drifting", "spiked"])
@pytest.mark.parametrize("kv_format", STORED)
def test_keys_come_back_within_half_a_step_of_their_own_group(kv_format: KvFormat, kind: str, where: Where) -> None:
    tokens, prompt = 200, 70
    shape = KvShape(layers=1, lanes=2, heads=3, head_dim=8, positions=tokens, dtype=where.dtype)
    allocate = lambda size, dtype: device_zeros(where.device, size, dtype)  # noqa: E731
    open_keys = OpenKeys(shape, GROUP_TOKENS, allocate)
    tier = Tier(kv_format, shape, tokens, allocate, open_keys, device=where.device)
    freezer = KeyFreezer(open_keys, (tier,))
    keys = drifting_keys(kind, tokens, where)
    at = torch.arange(tokens, device=where.device).expand(2, -1)
    freezer.start(0, keys[:, :prompt])
    tier.put(0, at[:, :prompt], at[:, :prompt] >= 0, keys[:, :prompt], keys[:, :prompt])
    for token in range(prompt, tokens):
        one = slice(token, token + 1)
        tier.put(0, at[:, one], at[:, one] >= 0, keys[:, one], keys[:, one])
        freezer.bear(0, token, keys[:, one])
    back, _ = tier.take(0, at)
    for first in range(0, tokens, GROUP_TOKENS):
        group = slice(first, min(first + GROUP_TOKENS, tokens))
        frozen = group.stop - group.start == GROUP_TOKENS or kv_format is KvFormat.FP8
        error = (back[:, group].float() - keys[:, group].float()).abs()
        assert bool((error <= (bound(keys, kv_format, group) if frozen else 0.0 * error)).all())


@pytest.mark.parametrize("kv_format", STORED)
def test_values_come_back_within_half_a_step_of_their_own_head(kv_format: KvFormat, where: Where) -> None:
    values = drifting_keys("drifting", 100, where)
    back = decode_values(encode_values(values, kv_format), kv_format, where.dtype).float()
    turned = values.permute(0, 3, 1, 2)  # bound() takes the range over dimension 1: here a token's head's channels
    assert bool(((back.permute(0, 3, 1, 2) - turned.float()).abs() <= bound(turned, kv_format, slice(None))).all())


@DRAWN
@given(seed=st.integers(0, 2**32))
def test_any_plan_in_int8_stays_near_the_native_logits(where: Where, seed: int) -> None:
    """No bound follows for logits; what is held is that errors stay as small as the entries' (they were below 0.1)."""
    rng = random.Random(seed)
    truth, decoder = checkpoint("llama_grouped", where)
    formats = KvFormats(gpu=rng.choice([KvFormat.INT8, KvFormat.NATIVE]), host=KvFormat.INT8)
    choice = replace(draw_choice(rng, Selector.DENSE), kv_format=formats, prompt=60, output=10, host_attention=False)
    plan = draw_plan(rng, decoder.spec, choice)
    prompts = random_prompts(rng, plan)
    run = execute(plan, decoder, prompts, options=Options(record=Record(logits=True)))
    assert run.logits is not None
    for prompt, tokens, logits in zip(prompts, run.completions, run.logits.cpu(), strict=True):
        torch.testing.assert_close(logits, true_logits(truth, prompt, tokens), atol=0.1 + where.logit_tolerance, rtol=0)


@pytest.mark.parametrize("kv_format", STORED)
def test_published_ranges_clip_and_never_move(kv_format: KvFormat, where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    choice = Choice(kv_format=KvFormats(gpu=kv_format, host=kv_format))
    plan = draw_plan(random.Random(1), decoder.spec, choice)
    run = execute(plan, decoder, random_prompts(random.Random(2), plan), options=Options(published_ranges=True))
    assert all(len(tokens) == choice.output for tokens in run.completions)


def test_attention_over_parts_is_attention_over_all(where: Where) -> None:
    from runtime.attention import Part

    torch.manual_seed(0)
    q = torch.randn(2, 3, 2, 8).to(where.device, where.dtype)
    k, v = (torch.randn(2, 9, 3, 8).to(where.device, where.dtype) for _ in range(2))
    at = torch.arange(9, device=where.device).expand(2, -1)
    parts = [Part.of(k[:, a:b], v[:, a:b], at[:, a:b], at[:, a:b] != 4) for a, b in ((0, 4), (4, 9))]
    got, weights = attend(q, parts, 0.3)
    scores = torch.einsum("lhgc,lthc->lhgt", q, k).float() * 0.3
    scores[..., 4] = -torch.inf
    expected = torch.einsum("lhgt,lthc->lhgc", scores.softmax(-1).to(v.dtype), v)
    torch.testing.assert_close(got, expected, atol=where.logit_tolerance, rtol=0)
    torch.testing.assert_close(weights, scores.softmax(-1), atol=where.logit_tolerance, rtol=0)


def test_lanes_of_heads_hold_the_same_numbers(where: Where) -> None:
    _, decoder = checkpoint("llama_grouped", where)
    k = torch.arange(2 * 5 * 2 * 8, device=where.device).view(2, 5, 2, 8)
    lanes = Lanes.of(decoder.spec, 2, per_head=True).keys(k)
    assert lanes.shape == (4, 5, 1, 8)
    assert torch.equal(lanes[3, :, 0], k[1, :, 1])
