"""``execute`` by captured steps gives what it gives eagerly: texts, bytes moved, memory held, selections.

Without a GPU the kernels are interpreted and nothing is captured, but all else is the same.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.execute import Options, Run, execute
from runtime.graph.execute import Captures, captures
from runtime.graph.paged_run import rules_of
from runtime.graph.quantised_dense import fetched_bytes
from runtime.graph.step import CapturedStep
from runtime.graph.window import WindowSlots
from runtime.job import run_job
from runtime.models import Decoder
from runtime.options import Stretch
from runtime.prompts import Text, read_prompts
from runtime.recorder import Record
from runtime.sampling import Sampling
from runtime.tally import Tally
from runtime.wave import BudgetExceeded
from sim.admission import Scheduler
from sim.attention import Selector
from sim.cost import CostModel
from sim.counts import Column
from sim.engine import simulate
from sim.flows import flows_of, home_columns
from sim.kv import KvFormat, KvFormats, inputs_layer_bytes, kv_layer_bytes
from sim.occupancy import occupancy_of
from sim.plan import Admission, Mechanism, Placement, Plan, Preemption, Recompute, WriteBack
from sim.profile import Profile
from sim.recording import RecordedSelection, replayed_flows
from sim.spec import DType
from sim.trace import Resource, Tier
from tests.runtime.graphs import ON_GPU, decoder, draw_prompts, kernels, newest_in_hbm, recent, resident
from tests.runtime.plans import Choice, all_in_hbm, draw_plan, make_setting, with_budget
from tests.runtime.test_graph_paged import left

CAPTURED, EAGER = Options(captured=True, stop=False), Options(captured=False, stop=False)
STEPS = 40 if ON_GPU else 8


def moved(run: Run) -> dict[tuple[int, Resource, int], float]:
    """Bytes by wave, direction and step."""
    sums: Counter[tuple[int, Resource, int]] = Counter()
    for number, wave in enumerate(run.trace.waves):
        for span in wave.spans:
            sums[number, span.resource, span.step] += round(span.size_bytes)
    return {key: size for key, size in sums.items() if size}


def held(run: Run, tier: Tier) -> list[float]:
    return [level.size_bytes for wave in run.trace.waves for level in wave.levels if level.tier is tier]


def both(plan: Plan, made: Decoder, lengths: Sequence[int]) -> tuple[Run, Run]:
    prompts = draw_prompts(lengths, seed=len(lengths))
    return execute(plan, made, prompts, options=EAGER), execute(plan, made, prompts, options=CAPTURED)


def dense_plan(made: Decoder, seed: int) -> Plan:
    rng = random.Random(seed)
    choice = Choice(
        write_back=rng.choice([*WriteBack]),
        recompute=rng.choice([Recompute.NONE, Recompute.ACTIVATIONS_HOST]),
        batch=3,
        concurrency=2,
        prompt=12,
        output=STEPS,
        dtype=DType.FP32,
    )
    return draw_plan(rng, made.spec, choice)


@kernels
@pytest.mark.parametrize("seed", range(12) if ON_GPU else (0, 1, 4, 7))
def test_dense_waves_are_equal_to_the_byte(seed: int) -> None:
    """The last wave has one sequence; the lane that it leaves empty counts for nothing."""
    made = decoder("opt", DType.FP32, seed=seed)
    plan = dense_plan(made, seed)

    eager, run = both(plan, made, [12, 5, 9])

    assert run.completions == eager.completions
    assert decoded(moved(run)) == decoded(moved(eager))
    prompts = {key: size for key, size in moved(eager).items() if key not in decoded(moved(eager))}
    assert all(moved(run).get(key, 0) <= size for key, size in prompts.items())  # what leaves at once is not written
    assert held(run, Tier.HBM) == held(eager, Tier.HBM)
    assert run.kv_allocated_bytes <= max(held(eager, Tier.HBM))
    assert run.stats == eager.stats


@kernels
@pytest.mark.parametrize(
    ("seed", "on_host"), [(seed, on_host) for seed in range(6) for on_host in (False, True)][: None if ON_GPU else 4]
)
def test_a_forwarded_prefix_is_equal_to_the_byte(seed: int, on_host: bool) -> None:
    """Alone, within one graph, nothing crosses the link; what the host holds besides does. Eagerly it takes in of the prompt
    what is let go of before the first decode step, too.
    """
    made, rng = decoder("opt", DType.FP32, seed=seed), random.Random(f"prefix {seed}")
    choice = Choice(batch=3, concurrency=2, prompt=12, output=STEPS, dtype=DType.FP32, recompute=Recompute.TOKENS)
    plan = draw_plan(rng, made.spec, choice)
    if not on_host:
        homes = plan.homes
        hbm = tuple(near + far for near, far in zip(homes.hbm, homes.host_kv, strict=True))
        plan = replace(plan, homes=replace(homes, hbm=hbm, host_kv=(0,) * homes.steps))

    eager, run = both(plan, made, [12, 5, 9])

    assert any(plan.homes.dropped)
    assert any(plan.homes.host_kv) == on_host
    assert run.completions == eager.completions
    assert decoded(moved(run)) == decoded(moved(eager))
    assert bool(moved(run)) == on_host
    assert held(run, Tier.HBM) == held(eager, Tier.HBM)
    later = [at for at in range(2 * STEPS) if at % STEPS]  # than each of two waves' prefills
    assert [held(run, Tier.HOST)[at] for at in later] == [held(eager, Tier.HOST)[at] for at in later]
    assert run.kv_allocated_bytes <= max(held(eager, Tier.HBM))


def decoded(sums: dict[tuple[int, Resource, int], float]) -> dict[tuple[int, Resource, int], float]:
    """Without the prefill's, which is also what the eager runtime writes and then lets go of."""
    return {key: size for key, size in sums.items() if key[2]}


@kernels
def test_what_is_read_where_it_lies_is_counted() -> None:
    """One token less than the plan fetches, for the newborn one takes no slot from another."""
    made = decoder("opt", DType.FP32, seed=1)
    plan = all_in_hbm(made.spec, Choice(batch=2, concurrency=2, prompt=12, output=STEPS, dtype=DType.FP32))
    plan = newest_in_hbm(replace(plan, setting=replace(plan.setting, fetch_by=Mechanism.GATHER_KERNEL)), 10)

    eager, run = both(plan, made, [12, 7])

    assert run.completions == eager.completions
    token = 2 * made.spec.layers * kv_layer_bytes(made.spec, DType.FP32, plan.setting.kv_format.host)
    h2d, d2h = Resource.H2D, Resource.D2H
    for row in range(1, STEPS):
        assert moved(run)[0, h2d, row] == (plan.homes.host_kv[row] - 1) * token == moved(eager)[0, h2d, row] - token
        assert moved(run)[0, d2h, row] == token
    assert moved(run)[0, d2h, 0] == 2 * token


@kernels
@pytest.mark.parametrize("family", ["opt", "grouped llama"])
@pytest.mark.parametrize("slots, prompt", [(20, 66), (9, 76)])
def test_eight_bit_waves_give_the_same_texts_and_count_what_crosses(family: str, slots: int, prompt: int) -> None:
    """As much as is predicted: with fewer tokens on the host than a group has, and with more."""
    made, levels = decoder(family, DType.FP32, seed=1), KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    choice = Choice(batch=2, concurrency=2, prompt=prompt, output=STEPS, dtype=DType.FP32, kv_format=levels)
    plan = newest_in_hbm(all_in_hbm(made.spec, choice), slots)

    eager, run = both(plan, made, [prompt, 50])

    assert run.completions == eager.completions
    assert run.kv_allocated_bytes <= plan.setting.kv_budget_bytes
    cached = plan.setting.token_counts.cached
    for row in range(1, STEPS):
        crossed = moved(run)[0, Resource.H2D, row]
        assert crossed == fetched_bytes(plan.setting, slots, cached[row]) < moved(eager)[0, Resource.H2D, row]
    flows = flows_of(plan, home_columns(plan.homes))
    assert by_row(run, Resource.H2D) == pytest.approx(crossing(plan, flows.fetched_kv, flows.fetched_inputs))


@kernels
@pytest.mark.parametrize("seed", [0, 1])
def test_pages_move_what_the_replay_of_their_picks_moves(seed: int) -> None:
    made = decoder("grouped llama", DType.FP32, seed=seed)
    choice = Choice(selector=Selector.PAGES, sparsity=0.6, placement=Placement.RESIDENT, batch=2, concurrency=2)
    choice = replace(choice, prompt=40, output=STEPS, dtype=DType.FP32, write_back=[*WriteBack][seed])
    plan = resident(Plan(setting=make_setting(made.spec, choice), homes=all_in_hbm(made.spec, choice).homes), 34)
    prompts = draw_prompts([40, 31], seed=9)
    eager = execute(plan, made, prompts, options=replace(EAGER, record=Record(picks=True)))
    assert eager.picks is not None
    picks = tuple(tuple(tuple(layer) for layer in step) for step in eager.picks)

    run = execute(plan, made, prompts, options=CAPTURED)

    assert run.completions == eager.completions
    flows = replayed_flows(plan, RecordedSelection(selector=Selector.PAGES, picks=picks))
    assert by_row(run, Resource.H2D) == pytest.approx(crossing(plan, flows.fetched_kv, flows.fetched_inputs))
    assert any(by_row(run, Resource.H2D))
    assert by_row(run, Resource.D2H) == pytest.approx(crossing(plan, flows.written_kv, flows.written_inputs))
    assert held(run, Tier.HBM) == pytest.approx(2 * occupancy_of(plan, home_columns(plan.homes), flows).hbm)
    assert run.stats == ((),)


def by_row(run: Run, resource: Resource) -> list[float]:
    return [moved(run).get((0, resource, row), 0.0) for row in range(STEPS)]


def crossing(plan: Plan, kv: Column, inputs: Column) -> list[float]:
    model, dtype = plan.setting.model, plan.setting.dtype
    sizes = kv_layer_bytes(model, dtype, plan.setting.kv_format.host), inputs_layer_bytes(model, dtype)
    return list(2 * model.layers * (sizes[0] * kv + sizes[1] * inputs))


@kernels
def test_a_window_moves_no_more_than_eagerly_and_counts_each_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves HBM is chosen by use, not age: the texts are the same, the traffic is less."""
    made, seen, steps = decoder("opt", DType.FP32, seed=2), Counter[tuple[Resource, int]](), 8
    choice = Choice(selector=Selector.SWA, sparsity=0.8, batch=3, concurrency=3, prompt=40, output=steps)
    plan = resident(all_in_hbm(made.spec, replace(choice, dtype=DType.FP32)), 11)
    token = kv_layer_bytes(made.spec, DType.FP32, plan.setting.kv_format.host)
    record = WindowSlots.record

    def spy(slots: WindowSlots, row: int, tally: Tally, lanes: int) -> None:
        if 0 < row < steps - 1:
            counts, moves = slots.state.move_counts.tolist(), slots.state.moves.tolist()
            for layer, of_lanes in enumerate(counts):
                for lane, count in enumerate(of_lanes):
                    for _, _, reads, writes in moves[layer][lane][:count]:
                        seen[Resource.H2D, row + 1] += reads * token
                        seen[Resource.D2H, row] += writes * token
        record(slots, row, tally, lanes)

    monkeypatch.setattr(WindowSlots, "record", spy)
    eager, run = both(plan, made, [40, 37, 12])

    assert run.completions == eager.completions
    assert {key[1:]: size for key, size in decoded(moved(run)).items()} == {key: n for key, n in seen.items() if n}
    assert any(which is Resource.H2D for which, _ in seen)
    for which in (Resource.H2D, Resource.D2H):
        totals = [sum(size for key, size in moved(one).items() if key[1] is which) for one in (run, eager)]
        assert 0 < totals[0] <= totals[1]
    for got, want in zip(run.stats[0], eager.stats[0], strict=True):
        assert (got.picked, got.turnover) == (want.picked, want.turnover)
        assert got.age == pytest.approx(want.age, abs=1e-5)


@kernels
@pytest.mark.parametrize(
    ("sparsity", "slots", "steps", "early"), [(0.3, 40, 10, 0), (0.8, 16, 24, 0), (0.8, 11, 10, 4)]
)
def test_a_window_writes_what_the_simulator_says(sparsity: float, slots: int, steps: int, early: int) -> None:
    """As many as outside HBM become more, those that what returns changes places with, and another for each of the dead there.

    What a prompt leaves outside are the newest of those that nobody attends to: in its ``early`` steps others die.
    """
    made = decoder("opt", DType.FP32, seed=2)
    choice = Choice(selector=Selector.SWA, sparsity=sparsity, batch=2, concurrency=2, prompt=40, output=steps)
    plan = resident(all_in_hbm(made.spec, replace(choice, dtype=DType.FP32)), slots)
    plan = replace(plan, setting=replace(plan.setting, access=replace(plan.setting.access, returned_share=0.0)))
    expected = flows_of(plan, home_columns(plan.homes))

    run = execute(plan, made, draw_prompts([40, 40], seed=1), options=CAPTURED)

    rows = [[moved(run).get((0, which, row), 0.0) for row in range(steps)] for which in (Resource.H2D, Resource.D2H)]
    left = [written - returned for written, returned in zip(rows[1], [*rows[0][1:], 0.0], strict=True)]
    simulated = crossing(plan, expected.written_kv, expected.written_inputs)
    assert sum(left) > 0
    assert left[early:] == pytest.approx(simulated[early:])
    assert all(less <= most for less, most in zip(left[:early], simulated[:early], strict=True))
    if not any(plan.setting.token_counts.dead):
        assert expected.written_kv.sum() == plan.setting.token_counts.cached[-1] - slots


@kernels
@pytest.mark.parametrize(
    ("family", "slots", "drop_dead"), [("opt", [9], True), ("grouped llama", [18, 18, 18, 15, 13], False)]
)
def test_a_window_that_keeps_recent_tokens_in_hbm_is_equal_to_the_byte(
    family: str, slots: list[int], drop_dead: bool
) -> None:
    """Where tokens die, those that die at once need not be written. The last wave leaves a lane empty."""
    made = decoder(family, DType.FP32, seed=2)
    choice = Choice(selector=Selector.SWA, sparsity=0.7, batch=3, concurrency=2, prompt=30, output=STEPS)
    plan = recent(all_in_hbm(made.spec, replace(choice, dtype=DType.FP32, drop_dead=drop_dead)), slots)

    eager, run = both(plan, made, [30, 12, 25])

    assert run.completions == eager.completions
    assert decoded(moved(run)) == decoded(moved(eager))
    assert {key[1] for key in decoded(moved(run))} == {Resource.H2D, Resource.D2H}
    prompts = {key: size for key, size in moved(eager).items() if key not in decoded(moved(eager))}
    assert all(0 < moved(run)[key] <= size for key, size in prompts.items())
    assert drop_dead or prompts == {key: moved(run)[key] for key in prompts}
    assert held(run, Tier.HBM) == held(eager, Tier.HBM)
    assert max(held(run, Tier.HBM)) <= plan.setting.kv_budget_bytes
    for got, want in zip(run.stats[0], eager.stats[0], strict=True):
        assert (got.picked, got.turnover) == (want.picked, want.turnover)
        assert got.age == pytest.approx(want.age, abs=1e-5)


@kernels
@pytest.mark.parametrize("admission", Admission)
def test_one_capture_serves_all_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, admission: Admission) -> None:
    made, captured, capture = decoder("llama", DType.FP32, seed=3), list[int](), CapturedStep.capture
    choice = Choice(batch=2, concurrency=2, prompt=9, output=4, dtype=DType.FP32, admission=admission)
    plan = all_in_hbm(made.spec, choice)
    prompts = draw_prompts([9, 3, 5, 8, 1], seed=4)
    lines = [f'{{"id": {number}, "tokens": {tokens}}}\n' for number, tokens in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    texts, wanted = dict[int, tuple[int, ...]](), read_prompts(tmp_path / "in.jsonl", Text(None))

    def spy(step: CapturedStep) -> None:
        captured.append(step.attended.shape[0])
        capture(step)

    def keep(done: int, run: Run) -> None:
        texts.update(enumerate(run.completions, start=done - len(run.completions)))

    monkeypatch.setattr(CapturedStep, "capture", spy)
    run_job(plan, made, wanted, tmp_path / "out.jsonl", Text(None), options=CAPTURED, on_wave=keep)

    assert captured == [2]
    assert [texts[at] for at in range(5)] == [
        execute(plan, made, [tokens], options=EAGER).completions[0] for tokens in prompts
    ]


@kernels
def test_a_larger_wave_another_plan_or_decoder_is_captured_anew() -> None:
    made, other = decoder("opt", DType.FP32, seed=3), decoder("opt", DType.FP32, seed=4)
    plan = all_in_hbm(made.spec, Choice(batch=3, concurrency=3, prompt=4, output=3, dtype=DType.FP32))
    longer = all_in_hbm(made.spec, Choice(batch=3, concurrency=3, prompt=4, output=4, dtype=DType.FP32))
    kept = Captures()
    first = kept.wave(plan, made, 2)

    assert kept.wave(plan, made, 1) is first
    assert kept.wave(plan, made, 3) is not first
    third = kept.wave(longer, made, 3)
    assert third.plan is longer
    assert kept.wave(longer, other, 3).decoder is other
    continuous = replace(plan, setting=replace(plan.setting, admission=Admission.CONTINUOUS))
    paged = kept.paged(continuous, made, 2)
    assert kept.paged(continuous, made, 3) is paged
    assert kept.paged(continuous, made, 4) is not paged


@kernels
def test_texts_end_at_stop_tokens_and_the_wave_some_steps_after_the_last() -> None:
    made = decoder("opt", DType.FP32, seed=5)
    plan = all_in_hbm(made.spec, Choice(batch=1, concurrency=1, prompt=4, output=60, dtype=DType.FP32))
    prompts, told = draw_prompts([4], seed=6), list[int]()
    whole = execute(plan, made, prompts, options=EAGER).completions[0]
    stopping = Decoder(replace(made.config, stop_tokens=(whole[2],)), made.weights)
    end = whole.index(whole[2]) + 1

    run = execute(plan, stopping, prompts, options=Options(captured=True), on_tokens=told.append)

    steps = len(run.trace.waves[0].step_end_s)
    assert run.completions[0] == whole[:end]
    assert end < steps <= end + 32
    assert told == list(range(1, steps + 1))
    assert len(execute(plan, stopping, prompts, options=CAPTURED).completions[0]) == 60


def tight(made: Decoder, kv_format: KvFormat, preemption: Preemption, *, output: int) -> Plan:
    """Four sequences, three at once, pages for less than two whole ones."""
    formats = KvFormats(gpu=kv_format, host=kv_format)
    choice = Choice(batch=4, concurrency=3, prompt=13, output=output, dtype=DType.FP32, kv_format=formats)
    plan = all_in_hbm(made.spec, replace(choice, admission=Admission.CONTINUOUS, preemption=preemption))
    return with_budget(plan, round(1.99 * max(rules_of(plan).held_bytes)))


@kernels
@pytest.mark.parametrize(
    ("family", "kv_format", "preemption"),
    [
        ("llama", KvFormat.NATIVE, Preemption.RECOMPUTE),
        ("grouped llama", KvFormat.NATIVE, Preemption.SWAP),
        ("grouped qwen3", KvFormat.FP8, Preemption.RECOMPUTE),
    ],
)
def test_continuous_admission_is_equal_to_the_byte(family: str, kv_format: KvFormat, preemption: Preemption) -> None:
    made, steps = decoder(family, DType.FP32, seed=4), STEPS if kv_format is KvFormat.NATIVE else 8
    plan, told = tight(made, kv_format, preemption, output=steps), list[int]()
    prompts = draw_prompts([13, 4, 13, 9], seed=6)
    cost = CostModel(machine=plan.setting.machine, profile=Profile.nominal(plan.setting.machine))
    eager, simulated = execute(plan, made, prompts, options=EAGER), simulate(plan, cost)

    run = execute(plan, made, prompts, options=CAPTURED, on_tokens=told.append)

    (wave,), (expected,) = run.trace.waves, eager.trace.waves
    assert run.completions == eager.completions
    assert moved(run) == moved(eager)
    assert left(plan) > 0
    assert bool(moved(run)) == (preemption is Preemption.SWAP)
    assert held(run, Tier.HBM) == held(eager, Tier.HBM)
    assert held(run, Tier.HOST) == held(eager, Tier.HOST)
    assert wave.served == expected.served == simulated.waves[0].served
    assert run.trace.outcome.h2d_bytes == simulated.outcome.h2d_bytes
    assert run.trace.outcome.peak_hbm_bytes == simulated.outcome.peak_hbm_bytes
    assert run.stretches == eager.stretches
    assert [span[:4] for span in wave.spans] == [span[:4] for span in expected.spans]
    assert [level[:2] for level in wave.levels] == [level[:2] for level in expected.levels]
    assert max(held(run, Tier.HBM)) <= run.kv_allocated_bytes <= plan.setting.kv_budget_bytes
    assert (len(told), told[-1]) == (len(wave.step_end_s), 4 * steps)
    assert told == sorted(told)


@kernels
def test_pages_are_used_again_by_more_sequences_and_by_fewer() -> None:
    made, captured = decoder("llama", DType.FP32, seed=4), Captures()
    plan = tight(made, KvFormat.NATIVE, Preemption.SWAP, output=5)
    for lengths in ([13, 2, 6, 11, 8], [5, 13]):
        prompts = draw_prompts(lengths, seed=6)
        run = execute(plan, made, prompts, options=CAPTURED, captured=captured)
        assert run.completions == execute(plan, made, prompts, options=EAGER).completions
        assert run.trace.waves[0].sequences == len(prompts)


@kernels
@pytest.mark.parametrize("family", ["llama", "grouped llama"])
def test_eight_bit_pages_give_the_same_texts(family: str) -> None:
    """Past the end of a group; copied out and in as levels, with the open group's keys."""
    made, levels = decoder(family, DType.FP32, seed=4), KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    choice = Choice(batch=2, concurrency=2, prompt=61, output=6, dtype=DType.FP32, kv_format=levels)
    plan = all_in_hbm(made.spec, replace(choice, admission=Admission.CONTINUOUS, preemption=Preemption.SWAP))
    plan = with_budget(plan, 2 * round(rules_of(plan).held_bytes[2]))

    eager, run = both(plan, made, [61, 50])

    assert run.completions == eager.completions
    assert run.trace.outcome.d2h_bytes == run.trace.outcome.h2d_bytes > 0
    assert max(held(run, Tier.HBM)) <= run.kv_allocated_bytes <= plan.setting.kv_budget_bytes


@kernels
@pytest.mark.parametrize("preemption", Preemption)
def test_texts_that_end_make_room_some_steps_later(preemption: Preemption, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two that end one has stepped back before that is known: it does not return."""
    made, told, waited = decoder("llama", DType.FP32, seed=4), list[int](), list[int]()
    plan, prompts = tight(made, KvFormat.NATIVE, preemption, output=8), draw_prompts([13, 4, 13, 9], seed=6)
    whole, retire = execute(plan, made, prompts, options=EAGER), Scheduler.retire
    stops = whole.completions[0][5], whole.completions[1][3]
    stopping = Decoder(replace(made.config, stop_tokens=stops), made.weights)
    eager = execute(plan, stopping, prompts, options=Options(captured=False))

    def spy(scheduler: Scheduler, number: int) -> None:
        waited.extend(one.number for one in scheduler.waiting if one.number == number)
        retire(scheduler, number)

    monkeypatch.setattr(Scheduler, "retire", spy)
    run = execute(plan, stopping, prompts, options=Options(captured=True), on_tokens=told.append)

    steps = [len(one.trace.waves[0].step_end_s) for one in (eager, run, whole)]
    assert waited == [1]
    assert run.completions == eager.completions
    assert [len(text) for text in run.completions] == [6, 4, 8, 8]
    assert run.stretches[1] == (Stretch(first=0, picks=None),)
    assert steps[0] <= steps[1] < steps[2]
    assert (len(told), told[-1]) == (steps[1], 6 + 4 + 8 + 8)
    assert {served.last_step for served in run.trace.waves[0].served} >= {3, steps[1] - 1}
    assert held(run, Tier.HOST)[-1] == 0.0


@kernels
def test_a_budget_below_one_sequence_is_refused() -> None:
    made = decoder("opt", DType.FP32, seed=1)
    plan = with_budget(tight(made, KvFormat.NATIVE, Preemption.RECOMPUTE, output=8), 1000)

    with pytest.raises(BudgetExceeded, match="is planned for one sequence, the plan's budget is 1000 B"):
        execute(plan, made, [[1, 2]], options=CAPTURED)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(captured=True, sampling=Sampling(temperature=1.0)), r"sampling\.temperature"),
        (Options(captured=True, per_head=True), "per_head"),
        (Options(captured=True, published_ranges=True), "published_ranges"),
        (Options(captured=True, overlap=False), "overlap=False"),
        (Options(captured=True, record=Record(picks=True)), r"record\.picks"),
        (Options(captured=True, record=Record(logits=True)), r"record\.logits"),
        (Options(captured=True, record=Record(layers=True)), r"record\.layers"),
    ],
)
@kernels
@pytest.mark.parametrize("admission", Admission)
def test_what_a_captured_step_lacks_is_refused_where_it_is_asked_for(
    options: Options, says: str, admission: Admission
) -> None:
    made = decoder("opt", DType.FP32, seed=5)
    plan = all_in_hbm(made.spec, Choice(dtype=DType.FP32, admission=admission))

    with pytest.raises(ValueError, match=says):
        captures(plan, made, options)
    assert not captures(plan, made, replace(options, captured=None))
    assert captures(plan, made, Options(captured=True))
    assert not captures(plan, made, Options(captured=False))


@kernels
@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (Choice(output=1), "output=1"),
        (Choice(selector=Selector.H2O, placement=Placement.RESIDENT), "attention.selector=h2o"),
        (Choice(selector=Selector.SWA, placement=Placement.RESIDENT, write_back=WriteBack.AT_BIRTH), "at_birth"),
        (Choice(selector=Selector.SWA, write_back=WriteBack.AT_BIRTH), "keeps recent tokens writes at eviction"),
        (Choice(selector=Selector.SWA, admission=Admission.CONTINUOUS), "continuous admission needs dense"),
        (Choice(kv_format=KvFormats(gpu=KvFormat.INT4), admission=Admission.CONTINUOUS), "kv_format=int4"),
    ],
)
def test_a_plan_beyond_captured_steps_runs_eagerly_or_says_why(choice: Choice, says: str) -> None:
    made = decoder("opt", DType.FP32, seed=5)
    plan = all_in_hbm(made.spec, replace(choice, dtype=DType.FP32))

    with pytest.raises(ValueError, match=says):
        captures(plan, made, Options(captured=True))
    assert not captures(plan, made, Options())


@pytest.mark.skipif(not ON_GPU, reason="captures by itself on a GPU only")
@pytest.mark.parametrize("admission", Admission)
def test_a_gpu_captures_unasked(admission: Admission) -> None:
    made = decoder("opt", DType.FP32, seed=5)
    assert captures(all_in_hbm(made.spec, Choice(dtype=DType.FP32, admission=admission)), made, Options())


def test_on_a_cpu_nothing_is_captured_unasked() -> None:
    made = decoder("opt", DType.FP32, seed=5)
    if made.device == torch.device("cpu"):
        assert not captures(all_in_hbm(made.spec, Choice(dtype=DType.FP32)), made, Options())
