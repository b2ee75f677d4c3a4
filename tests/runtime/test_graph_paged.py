"""Continuous admission by pages gives each sequence the tokens that it has when it decodes alone, whoever steps back."""

import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from runtime.execute import Options, _padded, execute
from runtime.models.decoder import Decoder
from sim import catalogue
from sim.access import measured_access
from sim.admission import Scheduler
from sim.attention import PAGE_TOKENS, Attention, Selector
from sim.flows import flows_of, home_columns, occupancy_of
from sim.kv import KvFormat, KvFormats, kv_layer_bytes
from sim.plan import Admission, Placement, Plan, Preemption, Setting
from sim.scheduled import page_rules
from sim.spec import DType, MachineSpec
from sim.units import GIB
from sim.workload import Workload
from tests.runtime.plans import Choice, all_in_hbm
from tests.runtime.test_graph import DEVICE, ON_GPU, decoder

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="runs Triton's kernels")


def paged(plan: Plan, *, pages: int, concurrency: int, preemption: Preemption) -> Plan:
    """The plan under continuous admission, with room for so many pages."""
    setting = plan.setting
    page_bytes = PAGE_TOKENS * setting.model.layers * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.gpu)
    return replace(
        plan,
        setting=replace(
            setting,
            admission=Admission.CONTINUOUS,
            preemption=preemption,
            concurrency=concurrency,
            kv_budget_bytes=pages * page_bytes,
        ),
    )


def drawn(seed: int, made: Decoder, kv_format: KvFormat, *, batch: int, output: int) -> tuple[Plan, list[list[int]]]:
    rng = random.Random(seed)
    prompt = rng.randint(10, 40)
    formats = KvFormats(gpu=kv_format, host=kv_format)
    choice = Choice(batch=batch, concurrency=batch, prompt=prompt, output=output, dtype=DType.FP32, kv_format=formats)
    lengths = [prompt if rng.random() < 0.5 else rng.randint(1, prompt) for _ in range(batch)]
    return all_in_hbm(made.spec, choice), [[rng.randrange(97) for _ in range(length)] for length in lengths]


def left(plan: Plan) -> int:
    """How often a sequence steps back."""
    from runtime.graph.paged_run import PagedWave

    scheduler, many = Scheduler(PagedWave(plan, decoder("opt", DType.FP32, seed=1)).rules), 0
    while turn := scheduler.step():
        many += len(turn.left)
    return many


@pytest.mark.parametrize("preemption", [*Preemption])
@pytest.mark.parametrize("seed", range(4 if ON_GPU else 2))
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_whoever_steps_back_every_sequence_has_its_own_tokens(family: str, seed: int, preemption: Preemption) -> None:
    from runtime.graph.paged_run import PagedWave

    made = decoder(family, DType.FP32, seed=1)
    plan, prompts = drawn(seed, made, KvFormat.NATIVE, batch=5, output=40 if ON_GPU else 18)
    needed = -(-plan.setting.workload.cached_tokens // PAGE_TOKENS)
    tight = paged(plan, pages=2 * needed + 1, concurrency=4, preemption=preemption)
    assert left(tight) > 0
    eager = execute(plan, made, prompts, options=Options(stop=False))
    wave = PagedWave(tight, made)
    padded = _padded(prompts, plan.setting.workload.prompt_tokens, made.device)
    for _ in range(2 if ON_GPU else 1):  # the second run finds the pages as the first one left them
        run = wave.run(padded)
        assert [tuple(row) for row in run.tokens.tolist()] == list(eager.completions)
    assert wave.slots.kv_bytes <= tight.setting.kv_budget_bytes
