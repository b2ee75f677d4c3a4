"""Dense attention under every plan is what transformers computes."""

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.execute import execute
from runtime.models import Decoder, load_decoder
from runtime.options import Options
from runtime.recorder import Record
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.plan import Plan
from sim.profile import Profile
from sim.trace import Resource, Tier, Trace
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.plans import draw_choice, draw_plan
from tests.runtime.where import DRAWN, Where


@cache
def checkpoint(name: str, where: Where) -> tuple[Any, Decoder]:
    """Transformers' model in float32 on the CPU, its weights those that ours has where the tests run: rounded to 16 bit there.

    How far rounding weights moves logits depends on the text alone, and is not the runtime's doing.
    """
    folder = Path(mkdtemp())
    truth = save_checkpoint(name, folder)
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.copy_(parameter.to(where.dtype))
    return truth, load_decoder(folder, device=where.device, dtype=where.dtype)


def random_prompts(rng: random.Random, plan: Plan) -> list[list[int]]:
    longest = plan.setting.workload.prompt_tokens
    lengths = [longest] + [rng.randint(1, longest) for _ in range(plan.setting.workload.batch - 1)]
    return [[rng.randrange(97) for _ in range(length)] for length in lengths]


def true_logits(truth: Any, prompt: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
    """[step, vocab] of the tokens that were generated, teacher-forced."""
    with torch.no_grad():
        logits = truth(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0]
    return logits[len(prompt) - 1 :].float()


def check_against_transformers(name: str, plan: Plan, rng: random.Random, where: Where) -> None:
    truth, decoder = checkpoint(name, where)
    prompts = random_prompts(rng, plan)
    run = execute(plan, decoder, prompts, options=Options(record=Record(logits=True)))
    assert run.logits is not None
    for prompt, tokens, logits in zip(prompts, run.completions, run.logits.cpu(), strict=True):
        expected = true_logits(truth, prompt, tokens)
        torch.testing.assert_close(logits, expected, atol=where.logit_tolerance, rtol=0)
        if where.exact:
            assert tokens == tuple(expected.argmax(-1).tolist())
    check_bytes(plan, run.trace)


def check_bytes(plan: Plan, measured: Trace) -> None:
    """Dense traffic is known beforehand: every step moves and holds what the simulator says."""
    machine = plan.setting.machine
    simulated = simulate(plan, CostModel(machine=machine, profile=Profile.nominal(machine)))
    for resource in (Resource.H2D, Resource.D2H):
        assert moved_by_step(measured, resource) == pytest.approx(moved_by_step(simulated, resource)), resource
    for tier in Tier:
        assert held_by_step(measured, tier) == pytest.approx(held_by_step(simulated, tier)), tier


def moved_by_step(trace: Trace, resource: Resource) -> list[float]:
    """Bytes of every step, all waves together."""
    moved = [0.0] * len(trace.waves[0].step_end_s)
    for wave in trace.waves:
        for span in wave.spans:
            if span.resource is resource:
                moved[span.step] += wave.repeats * span.size_bytes
    return moved


def held_by_step(trace: Trace, tier: Tier) -> list[float]:
    """Bytes during every step, all waves together."""
    held = [0.0] * len(trace.waves[0].step_end_s)
    for wave in trace.waves:
        for level in wave.levels:
            if level.tier is tier:
                held[level.step] += wave.repeats * level.size_bytes
    return held


@pytest.mark.parametrize("name", ["opt", "opt_post_norm", "llama", "llama_grouped", "qwen3", "gpt_neox"])
@DRAWN
@given(seed=st.integers(0, 2**32))
def test_every_plan_gives_what_transformers_gives(name: str, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint(name, where)
    plan = draw_plan(rng, decoder.spec, draw_choice(rng, Selector.DENSE))
    check_against_transformers(name, plan, rng, where)
