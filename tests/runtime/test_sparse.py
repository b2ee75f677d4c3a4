"""Each sparse selector under every plan is full attention with a mask."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.execute import execute
from runtime.options import Options
from runtime.recorder import Record
from runtime.selectors import Scope, layer_selector
from sim.attention import Attention, Selector, count_tokens
from sim.plan import Placement, Plan
from tests.runtime.plans import Choice, draw_choice, draw_plan
from tests.runtime.reference import Masked
from tests.runtime.test_dense import checkpoint, random_prompts
from tests.runtime.where import DRAWN, Where

SPARSE = [selector for selector in Selector if selector is not Selector.DENSE]
NAMES = ("opt", "llama_grouped", "gpt_neox")


def check_against_masks(plan: Plan, name: str, rng: random.Random, where: Where, *, per_head: bool = False) -> None:
    _, decoder = checkpoint(name, where)
    prompts = random_prompts(rng, plan)
    options = Options(record=Record(logits=True, picks=True), per_head=per_head)
    run = execute(plan, decoder, prompts, options=options)
    assert run.logits is not None
    assert run.picks is not None
    lanes = decoder.spec.kv_heads if per_head else 1
    for place, (prompt, tokens, logits) in enumerate(zip(prompts, run.completions, run.logits, strict=True)):
        picks = [[layer[place * lanes : (place + 1) * lanes] for layer in step] for step in run.picks]
        with torch.inference_mode():
            forced = None if where.exact else (tokens, picks)
            reference = Masked(plan.setting, decoder, prompt, per_head=per_head, forced=forced)
            expected_tokens, expected = reference.run()
        torch.testing.assert_close(logits, expected, atol=where.logit_tolerance, rtol=0)
        if where.exact:
            assert tokens == tuple(expected_tokens)
            assert picks == reference.picks


@pytest.mark.parametrize("selector", SPARSE)
@DRAWN
@given(seed=st.integers(0, 2**32))
def test_every_plan_gives_what_masks_give(selector: Selector, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    _, decoder = checkpoint(name, where)
    choice = draw_choice(rng, selector)
    check_against_masks(draw_plan(rng, decoder.spec, choice), name, rng, where)


@pytest.mark.parametrize("selector", SPARSE)
def test_each_key_head_may_have_its_own_selection(selector: Selector, where: Where) -> None:
    rng = random.Random(7)
    _, decoder = checkpoint("llama_grouped", where)
    choice = Choice(selector=selector, placement=Placement.RESIDENT, prompt=18, output=6)
    check_against_masks(draw_plan(rng, decoder.spec, choice), "llama_grouped", rng, where, per_head=True)


def test_a_caching_ratio_of_two_fifths_keeps_two_of_five_tokens(where: Where) -> None:
    """ALISA's example: n = 5, r = 0.4, so k = 1: the newest token, and of the others the one with the largest local sum."""
    attention = Attention(selector=Selector.SWA, sparsity=0.6)
    counts = count_tokens(attention, 4, 2, drop_dead=False)
    assert (counts.cached[1], counts.local[1], counts.selected[1]) == (5, 1, 1)
    padding = torch.zeros(1, dtype=torch.int64, device=where.device)
    scope = Scope(attention=attention, counts=counts, padding=padding, dtype=torch.float32, scale=1.0)
    swa = layer_selector(scope)
    paid = torch.tensor([0.2, 0.5, 0.1, 0.2], device=where.device)  # by the last query to tokens 0 to 3
    q = torch.ones(1, 4, 1, 1, 1, device=where.device)
    swa.start(q, paid.log().view(1, 4, 1, 1))
    older = torch.tensor([[True, True, True, True, False]], device=where.device)
    assert swa.picks(1, older, counts.selected[1]).tolist() == [[False, True, False, False, False]]
