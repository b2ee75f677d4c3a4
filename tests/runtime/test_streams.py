"""Streams beside the computing one change when things happen, never what comes out. On a CPU there is one way to run."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.execute import execute
from runtime.options import Options
from runtime.recorder import Record
from sim.attention import Selector
from sim.trace import Resource
from tests.runtime.plans import draw_choice, draw_plan
from tests.runtime.test_dense import checkpoint, random_prompts
from tests.runtime.where import DRAWN, Where


@pytest.mark.parametrize("selector", [Selector.DENSE, Selector.SWA, Selector.PAGES])
@DRAWN
@given(seed=st.integers(0, 2**32))
def test_overlap_changes_neither_logits_nor_bytes(selector: Selector, where: Where, seed: int) -> None:
    rng = random.Random(seed)
    _, decoder = checkpoint("qwen3", where)
    plan = draw_plan(rng, decoder.spec, draw_choice(rng, selector))
    prompts = random_prompts(rng, plan)
    beside, after = (
        execute(plan, decoder, prompts, options=Options(record=Record(logits=True), overlap=overlap))
        for overlap in (True, False)
    )
    assert beside.logits is not None
    assert after.logits is not None
    for one, other, mine, theirs in zip(
        beside.completions, after.completions, beside.logits, after.logits, strict=True
    ):
        same = next((step for step, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        assert not where.exact or same == len(one)  # in 16 bit sums in another order may turn a near tie
        torch.testing.assert_close(mine[: same + 1], theirs[: same + 1], atol=where.logit_tolerance, rtol=0)
    for resource in Resource if where.exact or selector is Selector.DENSE else ():
        moved = [[wave.moved_bytes(resource) for wave in run.trace.waves] for run in (beside, after)]
        assert moved[0] == moved[1]


def test_host_memory_is_read_and_written_in_place(where: Where) -> None:
    from runtime.memory import host_zeros

    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        memory = host_zeros(where.device, (3, 4, 2), dtype)
        at = torch.tensor([2, 0], device=where.device)
        memory[at] = torch.arange(16, device=where.device).view(2, 4, 2).to(dtype)
        assert memory.device.type == where.device.type
        assert memory[at].float().flatten().tolist() == [float(value) for value in range(16)]
        assert memory[1].float().sum() == 0
