"""Continuous admission by pages gives each sequence the tokens that it has when it decodes alone, whoever steps back."""

import random
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from torch import Tensor

from runtime.execute import execute
from runtime.graph import paged_run
from runtime.graph.paged import PageSize
from runtime.graph.paged_run import PagedRun, PagedWave, rules_of
from runtime.models.decoder import Decoder
from runtime.options import Options
from runtime.prefill import Alike, unlike_layer
from runtime.wave import padded
from sim import catalogue
from sim.access import measured_access
from sim.admission import Scheduler
from sim.attention import PAGE_TOKENS, Attention, Selector
from sim.flows import flows_of, home_columns
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats, kv_layer_bytes
from sim.occupancy import occupancy_of
from sim.plan import Admission, Plan, Preemption, Setting
from sim.scheduled import page_rules
from sim.spec import DType, MachineSpec
from sim.trace import Tier
from sim.units import GIB
from sim.workload import Workload
from tests.runtime.graphs import ON_GPU, decoder
from tests.runtime.plans import Choice, all_in_hbm

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="runs Triton's kernels")
kv_formats = pytest.mark.parametrize("kv_format", [KvFormat.NATIVE, KvFormat.FP8, KvFormat.INT8])


def paged(plan: Plan, *, pages: int, concurrency: int, preemption: Preemption) -> Plan:
    """The plan under continuous admission, with room for so many pages."""
    setting = plan.setting
    page_bytes = (
        PAGE_TOKENS * setting.model.layers * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.gpu)
    )
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


def drawn(
    seed: int, made: Decoder, kv_format: KvFormat, *, batch: int, prompt: int, output: int
) -> tuple[Plan, list[list[int]]]:
    """A plan that has room for all, and prompts of unequal lengths."""
    rng, formats = random.Random(seed), KvFormats(gpu=kv_format, host=kv_format)
    choice = Choice(batch=batch, concurrency=batch, prompt=prompt, output=output, dtype=DType.FP32, kv_format=formats)
    lengths = [prompt if rng.random() < 0.5 else rng.randint(1, prompt) for _ in range(batch)]
    return all_in_hbm(made.spec, choice), [[rng.randrange(97) for _ in range(length)] for length in lengths]


def left(plan: Plan) -> int:
    """How often a sequence steps back."""
    scheduler, many = Scheduler(rules_of(plan)), 0
    while turn := scheduler.step():
        many += len(turn.left)
    return many


@pytest.mark.parametrize("preemption", [*Preemption])
@pytest.mark.parametrize("family, prompt", [("opt", 13), ("llama", 30)])
def test_whoever_steps_back_every_sequence_has_its_own_tokens(family: str, prompt: int, preemption: Preemption) -> None:
    made = decoder(family, DType.FP32, seed=1)
    plan, prompts = drawn(prompt, made, KvFormat.NATIVE, batch=4, prompt=prompt, output=40 if ON_GPU else 8)
    needed = -(-plan.setting.workload.cached_tokens // PAGE_TOKENS)
    tight = paged(plan, pages=2 * needed - 1, concurrency=3, preemption=preemption)
    assert left(tight) > 0
    eager = execute(plan, made, prompts, options=Options(stop=False))
    wave = PagedWave(tight, made)
    rows = padded(prompts, prompt, made.device)
    for _ in range(2 if ON_GPU else 1):  # the second run finds the pages as the first one left them
        run = wave.run(rows)
        assert [tuple(row) for row in run.tokens.tolist()] == list(eager.completions)
    assert wave.slots.kv_bytes <= tight.setting.kv_budget_bytes


@kv_formats
def test_newcomers_of_different_lengths_are_one_pass(kv_format: KvFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """New prompts and those of who stepped back; each sequence has the tokens that it has in room for all."""
    made = decoder("llama", DType.FP32, seed=1)
    plan, prompts = drawn(30, made, kv_format, batch=6, prompt=30, output=20)
    rows, kinds = padded(prompts, 30, made.device), list[int]()
    roomy = paged(plan, pages=99, concurrency=4, preemption=Preemption.RECOMPUTE)
    room_bytes = 11 * max(rules_of(roomy).held_bytes) // 4  # for two sequences and most of a third
    tight = replace(roomy, setting=replace(roomy.setting, kv_budget_bytes=int(room_bytes)))

    def noted(decoder: Decoder, layer: int, x: Tensor, positions: Tensor, some: Sequence[Alike]) -> Any:
        kinds.extend([len(some)] * (layer == 0))
        return unlike_layer(decoder, layer, x, positions, some)

    monkeypatch.setattr(paged_run, "unlike_layer", noted)
    wave = PagedWave(tight, made)
    run = wave.run(rows)

    scheduler, lengths = Scheduler(wave.rules), list[int]()
    while turn := scheduler.step():
        lengths.append(len({change.done for change in turn.entered}))
    assert kinds == [many for many in lengths if many]
    assert max(kinds) > 1
    assert run.completions == PagedWave(roomy, made).run(rows).completions


def test_an_ended_text_makes_room_for_the_next_one() -> None:
    made = decoder("opt", DType.FP32, seed=1)
    plan, prompts = drawn(7, made, KvFormat.NATIVE, batch=4, prompt=12, output=9)
    eager = execute(plan, made, prompts, options=Options(stop=False)).completions
    stops = {row[2] for row in eager[:2]}
    wave = PagedWave(paged(plan, pages=4, concurrency=2, preemption=Preemption.RECOMPUTE), made)
    run = wave.run(padded(prompts, 12, made.device), tuple(stops))
    ends = [next((at + 1 for at, token in enumerate(row) if token in stops), len(row)) for row in eager]
    assert run.completions == tuple(row[:end] for row, end in zip(eager, ends, strict=True))
    assert run.machine_steps < wave.run(padded(prompts, 12, made.device)).machine_steps


def test_swapped_texts_that_end_leave_the_host_to_others() -> None:
    """Which has room for what is swapped out at once."""
    plan, made, prompts, texts = swapping()
    stop = texts[2][3]  # the third has stepped back before that is known
    wave = PagedWave(plan, made)
    run = wave.run(padded(prompts, 13, made.device), (stop,))
    outcome = run.trace.outcome
    assert run.completions == tuple(row[: row.index(stop) + 1] if stop in row else row for row in texts)
    assert outcome.d2h_bytes > max(outcome.h2d_bytes, wave.rules.host_bytes)
    assert wave.rules.host_bytes == wave.host.pages * wave.slots.size.page_bytes == host_bytes(run)


def test_who_finds_no_room_on_the_host_is_prefilled_again() -> None:
    plan, made, prompts, texts = swapping()
    page_bytes = PageSize.of(plan.setting).page_bytes
    host = replace(plan.setting.machine.host, dram_bytes=page_bytes, usable_share=1.0)
    plan = replace(plan, setting=replace(plan.setting, machine=replace(plan.setting.machine, host=host)))
    run = PagedWave(plan, made).run(padded(prompts, 13, made.device))
    assert run.completions == tuple(texts)
    assert run.trace.outcome.d2h_bytes == run.trace.outcome.h2d_bytes > 0
    assert host_bytes(run) == page_bytes
    assert any(len(starts) > 1 for starts in run.starts)


def swapping() -> tuple[Plan, Decoder, list[list[int]], Sequence[tuple[int, ...]]]:
    """Six sequences in five pages, and their texts."""
    made = decoder("llama", DType.FP32, seed=1)
    plan, prompts = drawn(5, made, KvFormat.NATIVE, batch=6, prompt=13, output=20)
    plan = paged(plan, pages=5, concurrency=4, preemption=Preemption.SWAP)
    return plan, made, prompts, execute(plan, made, prompts, options=Options(stop=False, captured=False)).completions


def host_bytes(run: PagedRun) -> float:
    """The most that the host held."""
    return max(level.size_bytes for level in run.trace.waves[0].levels if level.tier is Tier.HOST)


@kv_formats
def test_pages_take_what_the_simulator_counts(kv_format: KvFormat) -> None:
    """For a shape of real size in 16 bit, byte for byte."""
    selector = Selector.DENSE
    setting = Setting(
        machine=MachineSpec(name="test", gpu=catalogue.gpu("H100 SXM"), host=catalogue.host()),
        model=catalogue.model("OPT-6.7B"),
        workload=Workload(batch=64, prompt_tokens=128, output_tokens=512),
        dtype=DType.FP16,
        concurrency=40,
        admission=Admission.CONTINUOUS,
        attention=Attention(selector=selector),
        access=measured_access(selector),
        kv_format=KvFormats(gpu=kv_format),
        kv_budget_bytes=int(4.5 * GIB),
    )
    cached = setting.token_counts.cached
    none = (0,) * len(cached)
    plan = Plan(
        setting=setting, homes=TokenHomes(hbm=cached, host_kv=none, activations=none, dropped=none, copies=none)
    )
    homes = home_columns(plan.homes)
    assert rules_of(plan) == page_rules(setting, occupancy_of(plan, homes, flows_of(plan, homes)))
