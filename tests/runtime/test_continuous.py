"""Continuous admission: what comes out is what each sequence alone gives, and the machine does what the schedule says."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.continuous import plan_from
from runtime.execute import execute
from runtime.models import Decoder
from runtime.options import Options, Run
from runtime.recorder import Record
from runtime.wave import BudgetExceeded
from sim.admission import Scheduler
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.flows import flows_of, home_columns
from sim.occupancy import occupancy_of
from sim.plan import Admission, Plan, Preemption
from sim.profile import Profile
from sim.scheduled import page_rules
from sim.spec import WeightFormat
from tests.runtime.graphs import ON_GPU
from tests.runtime.plans import Choice, all_in_hbm, draw_continuous, with_budget
from tests.runtime.reference import Masked
from tests.runtime.test_dense import check_bytes, checkpoint, random_prompts
from tests.runtime.test_weights import NAMES, widened_once
from tests.runtime.where import DRAWN, Where

EAGER = Options(captured=False)  # captured steps, a GPU's way, are held against these: tests/runtime/test_captured.py


def scheduler(plan: Plan) -> Scheduler:
    homes = home_columns(plan.homes)
    return Scheduler(page_rules(plan.setting, occupancy_of(plan, homes, flows_of(plan, homes))))


def starts(plan: Plan) -> list[list[int]]:
    """How many tokens each sequence had whenever it was prefilled."""
    had: list[list[int]] = [[] for _ in range(plan.setting.workload.batch)]
    for turn in iter(scheduler(plan).step, None):
        for change in turn.entered:
            if not change.swapped:
                had[change.number].append(change.done)
    return had


def check_schedule(plan: Plan, run: Run) -> None:
    machine = plan.setting.machine
    simulated = simulate(plan, CostModel(machine=machine, profile=Profile.nominal(machine)))
    (wave,), (expected,) = run.trace.waves, simulated.waves
    assert wave.served == expected.served
    assert len(wave.step_end_s) == len(expected.step_end_s)
    check_bytes(plan, run.trace)
    assert run.trace.outcome.tokens_per_s > 0


def check_against_masks(plan: Plan, decoder: Decoder, rng: random.Random, where: Where) -> Run:
    """From one prefill to the next a sequence goes on as its prompt and tokens so far, prefilled, would."""
    prompts = random_prompts(rng, plan)
    run = execute(plan, decoder, prompts, options=Options(record=Record(logits=True, picks=True)))
    assert run.logits is not None
    reference = decoder
    if plan.setting.weight_format is not WeightFormat.NATIVE:
        reference = widened_once(decoder, plan.setting.weight_format)
    assert [[stretch.first for stretch in stretches] for stretches in run.stretches] == starts(plan)
    for prompt, tokens, logits, stretches in zip(prompts, run.completions, run.logits, run.stretches, strict=True):
        ends = [*(stretch.first for stretch in stretches[1:]), len(tokens)]
        for stretch, last in zip(stretches, ends, strict=True):
            first, steps = stretch.first, slice(stretch.first, last)
            assert stretch.picks is not None
            forced = None if where.exact else (tokens[steps], stretch.picks)
            with torch.inference_mode():
                setting, so_far = plan_from(plan, first).setting, [*prompt, *tokens[:first]]
                masked = Masked(setting, reference, so_far, forced=forced, steps=last - first)
                expected_tokens, expected = masked.run()
            torch.testing.assert_close(logits[steps], expected, atol=where.logit_tolerance, rtol=0)
            if where.exact:
                assert list(tokens[steps]) == expected_tokens
                assert plan.setting.attention.is_dense or stretch.picks == masked.picks
    return run


@pytest.mark.parametrize("selector", [Selector.DENSE, Selector.SWA, Selector.H2O, Selector.STRIDED, Selector.TOPK])
@settings(DRAWN, max_examples=5 if ON_GPU else 16)  # a GPU takes ten times as long for as many small operations
@given(seed=st.integers(0, 2**32))
def test_every_schedule_gives_what_each_sequence_alone_gives(selector: Selector, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint(rng.choice(NAMES), where)
    plan = draw_continuous(rng, decoder.spec, selector)
    check_schedule(plan, check_against_masks(plan, decoder, rng, where))


@pytest.mark.parametrize("preemption", Preemption)
def test_sequences_that_step_back_lose_nothing(preemption: Preemption, where: Where) -> None:
    """Three sequences, room for two and a half: one must step back, whatever becomes of its KV."""
    _, decoder = checkpoint("llama_grouped", where)
    choice = Choice(batch=3, concurrency=3, prompt=16, output=40, admission=Admission.CONTINUOUS, preemption=preemption)
    roomy = all_in_hbm(decoder.spec, choice)
    tight = with_budget(roomy, round(2.5 * max(scheduler(roomy).rules.held_bytes)))
    prompts = random_prompts(random.Random(3), roomy)
    everyone, some = (execute(plan, decoder, prompts, options=EAGER) for plan in (roomy, tight))
    assert all(stretch.picks is None for stretches in some.stretches for stretch in stretches)
    assert sum(len(stretches) for stretches in some.stretches) == (3 if preemption is Preemption.SWAP else 4)
    assert (some.trace.outcome.h2d_bytes > 0) == (preemption is Preemption.SWAP)
    if where.exact:
        assert some.completions == everyone.completions


def test_memory_follows_the_pages_that_are_held(where: Where) -> None:
    """Pools take whole pages as tokens come; besides those only a spare slot of each sequence and layer."""
    _, decoder = checkpoint("llama_grouped", where)
    choice = Choice(batch=6, concurrency=6, prompt=10, output=60, admission=Admission.CONTINUOUS)
    plan = all_in_hbm(decoder.spec, choice)
    plan = with_budget(plan, round(3.3 * max(scheduler(plan).rules.held_bytes)))
    run = execute(plan, decoder, random_prompts(random.Random(3), plan), options=EAGER)
    spec, dtype = decoder.spec, plan.setting.dtype
    spare_bytes = 6 * spec.layers * 2 * spec.kv_dim * dtype.size_bytes
    assert run.kv_allocated_bytes <= plan.setting.kv_budget_bytes + spare_bytes
    assert run.kv_allocated_bytes > 0.7 * plan.setting.kv_budget_bytes


def test_a_text_that_ends_early_makes_room(where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    choice = Choice(batch=5, concurrency=2, prompt=9, output=24, admission=Admission.CONTINUOUS)
    plan = all_in_hbm(decoder.spec, choice)
    prompts = random_prompts(random.Random(8), plan)
    whole = execute(plan, decoder, prompts, options=EAGER)
    stop = whole.completions[0][2]
    stopping = Decoder(replace(decoder.config, stop_tokens=(stop,)), decoder.weights)
    run = execute(plan, stopping, prompts, options=EAGER)
    for tokens, full in zip(run.completions, whole.completions, strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert not where.exact or tokens == full[:end]
    assert len(run.trace.waves[0].step_end_s) < len(whole.trace.waves[0].step_end_s)


def test_a_budget_below_one_sequence_is_refused(where: Where) -> None:
    _, decoder = checkpoint("opt", where)
    plan = with_budget(all_in_hbm(decoder.spec, Choice(admission=Admission.CONTINUOUS)), 1000)
    with pytest.raises(BudgetExceeded, match="is planned for one sequence, the plan's budget is"):
        execute(plan, decoder, [[1, 2, 3]])
