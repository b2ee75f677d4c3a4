"""Limits are kept and refusals are one line: budgets, slots, plans and prompts that do not fit."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.cache import TieredCache
from runtime.execute import execute
from runtime.options import Options
from runtime.pool import SlotPool
from runtime.recorder import Record
from runtime.sampling import Sampler, Sampling
from runtime.wave import BudgetExceeded
from sim.attention import Selector
from sim.flows import flows_of, home_columns
from sim.occupancy import occupancy_of
from sim.plan import Placement, Setting
from sim.slots import hbm_slots
from sim.trace import Resource
from tests.runtime.plans import Choice, all_in_hbm, draw_choice, draw_plan, with_budget
from tests.runtime.test_dense import checkpoint, random_prompts
from tests.runtime.where import DRAWN, Where

PROMPTS = [[1, 2, 3], [4, 5], [6]]
EAGER = Options(captured=False)  # what is compared in every bit must not be replayed here and launched there


@pytest.mark.parametrize("selector", Selector)
@DRAWN
@given(seed=st.integers(0, 2**32))
def test_no_row_holds_more_slots_than_the_plan_gives_it(selector: Selector, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint("llama_grouped", where)
    plan = draw_plan(rng, decoder.spec, draw_choice(rng, selector))
    held: list[tuple[int, int]] = []
    bear, parts, rows = TieredCache.bear, TieredCache.parts, [0]

    def spy_bear(cache: TieredCache, row: int, *rest: Any) -> None:
        rows[0] = row
        bear(cache, row, *rest)

    def spy_parts(cache: TieredCache, row: int, layer: int, staged: Any) -> Any:
        held.append((rows[0], int(cache.hbm.pool.held()[layer].max())))
        return parts(cache, row, layer, staged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TieredCache, "bear", spy_bear)
        patch.setattr(TieredCache, "parts", spy_parts)
        execute(plan, decoder, random_prompts(rng, plan), options=EAGER)
    for row, slots in held:
        assert slots <= plan.homes.hbm[row] + plan.homes.copies[row]
        if selector is Selector.DENSE:
            assert slots == plan.homes.hbm[row]
    assert hbm_slots(plan) >= max((slots for _, slots in held), default=0)


def test_a_budget_one_byte_short_is_refused_and_the_exact_one_is_enough(where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    plan = all_in_hbm(decoder.spec, Choice())
    homes = home_columns(plan.homes)
    needed = round(plan.setting.concurrency * occupancy_of(plan, homes, flows_of(plan, homes)).hbm.max())
    execute(with_budget(plan, needed), decoder, PROMPTS)
    with pytest.raises(BudgetExceeded, match="the plan's budget is"):
        execute(with_budget(plan, needed - 1), decoder, PROMPTS)


def test_a_full_pool_says_so_instead_of_growing(where: Where) -> None:
    device = where.device
    pool = SlotPool(
        {"k": ((1, 1), torch.float32)},
        layers=1,
        lanes=1,
        slots=2,
        positions=9,
        device=device,
        allocate=lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=device),
    )
    at = torch.tensor([[3, 5, 7]], device=device)
    pool.put(0, at, torch.tensor([[True, False, True]], device=device), {"k": at[..., None, None].float()})
    assert not bool(pool.overflowed.any())
    assert pool.take(0, torch.tensor([[7, 3]], device=device))["k"].flatten().tolist() == [7.0, 3.0]
    pool.put(0, at[:, 1:2], at[:, 1:2] > 0, {"k": at[:, 1:2, None, None].float()})
    assert bool(pool.overflowed.any())


def _plan_for_another_model(setting: Setting) -> Setting:
    return replace(setting, model=replace(setting.model, intermediate=64))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_plan_for_another_model, "has intermediate=48, the plan's"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(change: object, says: str, where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    plan = all_in_hbm(decoder.spec, Choice())
    assert callable(change)
    with pytest.raises(ValueError, match=says):
        execute(replace(plan, setting=change(plan.setting)), decoder, PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "there are none"),
        ([[1], []], "prompt 1, 0 tokens, must have 1 to the plan's 9"),
        ([[1] * 10], "prompt 0, 10 tokens"),
        ([[96, 97]], r"prompt 0, token 97, must lie in \[0, 97\)"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: list[list[int]], says: str, where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    with pytest.raises(ValueError, match=says):
        execute(all_in_hbm(decoder.spec, Choice()), decoder, prompts)


def test_draws_depend_on_seed_and_place_alone(where: Where) -> None:
    _, decoder = checkpoint("llama", where)
    plan = all_in_hbm(decoder.spec, Choice(output=12))
    sampling = Sampling(temperature=20.0, top_p=0.9, seed=3)
    whole = execute(plan, decoder, PROMPTS, options=Options(sampling=sampling)).completions
    last = execute(plan, decoder, PROMPTS[2:], options=Options(sampling=sampling, places=(2,))).completions
    other = execute(plan, decoder, PROMPTS, options=Options(sampling=replace(sampling, seed=4))).completions
    assert whole[2:] == last
    assert whole != other


def test_a_small_top_p_is_greedy(where: Where) -> None:
    _, decoder = checkpoint("llama", where)
    plan = all_in_hbm(decoder.spec, Choice())
    greedy = execute(plan, decoder, PROMPTS, options=EAGER).completions
    nucleus = Options(sampling=Sampling(temperature=1.0, top_p=0.0))
    assert execute(plan, decoder, PROMPTS, options=nucleus).completions == greedy


def test_a_small_top_p_takes_the_first_of_the_likeliest_however_flat_the_shares(where: Where) -> None:
    sampler = Sampler(Sampling(temperature=1000.0, top_p=0.0), (0,), 1, where.device)
    logits = torch.tensor([[0.0, 1.0, 1.0 + 2**-20, 1.0 + 2**-20]], device=where.device)
    assert sampler.choose(logits, 0).tolist() == [2]


def test_a_text_ends_at_a_stop_token_and_the_wave_with_the_last_text(where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    plan = all_in_hbm(decoder.spec, Choice(concurrency=1, batch=1))
    tokens = execute(plan, decoder, PROMPTS[:1], options=EAGER).completions[0]
    stopping = type(decoder)(replace(decoder.config, stop_tokens=(tokens[2],)), decoder.weights)
    run = execute(plan, stopping, PROMPTS[:1], options=EAGER)
    first = tokens.index(tokens[2])
    assert run.completions[0] == tokens[: first + 1]
    assert len(run.trace.waves[0].step_end_s) == first + 1
    assert execute(plan, stopping, PROMPTS[:1], options=replace(EAGER, stop=False)).completions[0] == tokens


def test_layers_are_recorded_on_request_and_do_not_overlap(where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    plan = all_in_hbm(decoder.spec, Choice(selector=Selector.SWA, placement=Placement.RESIDENT))
    run = execute(plan, decoder, PROMPTS, options=Options(record=Record(layers=True)))
    for wave in run.trace.waves:
        spans = [span for span in wave.spans if span.resource is Resource.GPU]
        assert [(span.step, span.layer) for span in spans] == [
            (step, layer) for step in range(plan.homes.steps) for layer in range(decoder.spec.layers)
        ]
        assert all(a.end_s <= b.start_s + 1e-6 for a, b in pairwise(spans))
        assert spans[-1].end_s <= wave.step_end_s[-1]
    assert run.trace.outcome.tokens_per_s > 0
    assert len(run.stats[0]) == plan.homes.steps - 1


@pytest.mark.parametrize("placement", Placement)
def test_the_attention_that_a_selection_keeps_is_a_share_of_all(placement: Placement, where: Where) -> None:
    _, decoder = checkpoint("llama_grouped", where)
    options, masses = Options(record=Record(mass=True)), {}
    prompts = [[(7 * token) % 97 for token in range(start, start + 30)] for start in (0, 31, 62)]
    for selector in (Selector.TOPK, Selector.LOCAL):
        choice = Choice(selector=selector, sparsity=0.6, placement=placement, drop_dead=False, prompt=30, output=3)
        run = execute(draw_plan(random.Random(5), decoder.spec, choice), decoder, prompts, options=options)
        masses[selector] = run.stats[0][0].mass or 0.0
    assert 0.1 < masses[Selector.LOCAL] < masses[Selector.TOPK] < 1
    everything = Choice(selector=Selector.TOPK, sparsity=0.0, placement=placement)
    run = execute(all_in_hbm(decoder.spec, everything), decoder, PROMPTS, options=options)
    assert [step.mass for step in run.stats[0]] == pytest.approx([1.0] * len(run.stats[0]), abs=1e-4)


def test_guesses_are_refused_rather_than_left_out(where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    plan = all_in_hbm(decoder.spec, Choice(selector=Selector.TOPK))
    with pytest.raises(ValueError, match="the runtime fetches once the query is known"):
        execute(replace(plan, setting=replace(plan.setting, guess_hits=0.9)), decoder, PROMPTS)
