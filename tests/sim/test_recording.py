"""Replaying recorded selections, against a simulation with plain sets."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import in_hbm, make_cost, make_homes, make_setting, newest_in_hbm, refuses
from sim.attention import Selector
from sim.codec import from_plain, to_plain
from sim.engine import simulate
from sim.flows import link_token_bytes
from sim.forecast import forecast
from sim.kv import inputs_layer_bytes
from sim.plan import Placement, Plan, Recompute, WriteBack
from sim.recording import RecordedSelection, replayed_flows
from strategies import plans, recordings_of

SPARSE = [selector for selector in Selector if selector is not Selector.DENSE]


@st.composite
def recorded_plans(draw: st.DrawFn) -> tuple[Plan, RecordedSelection]:
    plan = draw(plans(draw(st.sampled_from(SPARSE))))
    return plan, draw(recordings_of(plan))


def totals_by_sets(plan: Plan, recording: RecordedSelection) -> list[Counter[str]]:
    """What each step moves, summed over all layers and sequences: one token after the other, in plain sets."""
    moved = [Counter[str]() for _ in range(plan.homes.steps)]
    for layer in range(plan.setting.model.layers):
        for sequence in range(plan.setting.workload.batch):
            picks = [(), *(step[layer][sequence] for step in recording.picks)]
            for step, row in enumerate(lane_by_sets(plan, picks)):
                moved[step] += row
    return moved


def lane_by_sets(plan: Plan, picks_by_step: list[tuple[int, ...]]) -> list[Counter[str]]:
    homes, counts = plan.homes, plan.setting.token_counts
    rows = [Counter[str]() for _ in picks_by_step]
    alive, last = set(range(counts.cached[0])), dict.fromkeys(range(counts.cached[0]), -1)
    off_hbm: set[int] = set()
    inputs: set[int] = set()
    in_slots: set[int] = set()  # what the step before attended to
    for step, picks in enumerate(picks_by_step):
        newest = set(range(counts.cached[step] - counts.local[step], counts.cached[step]))
        alive |= newest - set(range(counts.cached[step] - 1))
        last |= dict.fromkeys(newest | set(picks), step)
        while counts.cached[step] - len(alive) < homes.dropped[step]:
            alive.remove(min(alive - newest - set(picks), key=lambda token: (last[token], token)))
        was_off, off_hbm, inputs = off_hbm, off_hbm & alive, inputs & alive
        while len(off_hbm) < homes.host_kv[step] + homes.activations[step]:
            off_hbm.add(min(alive - off_hbm))
        while len(inputs) < homes.activations[step]:
            inputs.add(min(off_hbm - inputs))
        rows[max(0, step - 1)]["written"] += len(off_hbm - was_off - inputs)
        for token in picks:
            if token in off_hbm and not (plan.setting.placement is Placement.RESIDENT and token in in_slots):
                rows[step]["reprojected" if token in inputs else "fetched"] += 1
        in_slots = newest | set(picks)
    return rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(recorded_plans())
def test_every_step_moves_what_plain_sets_say(recorded: tuple[Plan, RecordedSelection]) -> None:
    plan, recording = recorded
    setting, flows = plan.setting, replayed_flows(*recorded)
    lanes = setting.model.layers * setting.workload.batch
    moved = totals_by_sets(plan, recording)

    def totals(column: Any) -> list[int]:
        return [round(float(mean) * lanes) for mean in column]

    assert totals(flows.fetched_kv) == [row["fetched"] for row in moved]
    assert totals(flows.reprojected) == [row["reprojected"] for row in moved]
    from_host = setting.recompute is Recompute.ACTIVATIONS_HOST
    assert totals(flows.fetched_inputs) == [row["reprojected"] * from_host for row in moved]
    if setting.write_back is WriteBack.AT_EVICTION:
        assert totals(flows.written_kv) == [row["written"] for row in moved]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(recorded_plans())
def test_engine_and_fast_path_move_the_recorded_bytes_exactly(recorded: tuple[Plan, RecordedSelection]) -> None:
    plan, recording = recorded
    setting, cost = plan.setting, make_cost(plan.setting.machine)
    moved = sum(totals_by_sets(plan, recording), Counter[str]())
    from_host = setting.recompute is Recompute.ACTIVATIONS_HOST
    inputs_bytes = inputs_layer_bytes(setting.model, setting.dtype) if from_host else 0

    still = replace(plan, setting=replace(setting, weights_on_host=0.0, guess_hits=None))
    kv_bytes = link_token_bytes(still.setting)  # of what may be captured for its weights being there
    priced = forecast(still, cost, recording=recording).outcome
    run = simulate(still, cost, recording=recording).outcome

    assert priced.h2d_bytes == moved["fetched"] * kv_bytes + moved["reprojected"] * inputs_bytes
    assert (run.h2d_bytes, run.d2h_bytes) == (priced.h2d_bytes, priced.d2h_bytes)
    assert run.makespan_s == pytest.approx(priced.makespan_s, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(recorded_plans())
def test_json_round_trip_is_exact(recorded: tuple[Plan, RecordedSelection]) -> None:
    recording = recorded[1]

    assert from_plain(RecordedSelection, to_plain(recording), "recording") == recording


def topk_plan(placement: Placement = Placement.RECENT, **changes: Any) -> Plan:
    """Prompt 8, three decode steps with 9 to 11 cached; 2 or 3 newest and as many older ones kept; 3 to 5 off HBM."""
    setting = make_setting(Selector.TOPK, prompt=8, output=4, sparsity=0.5, placement=placement, **changes)
    counts = setting.token_counts
    assert (counts.local, counts.selected) == ((2, 2, 3, 3), (2, 2, 3, 3))
    homes = make_homes((6, 6, 6, 6), host_kv=(2, 3, 4, 5), copies=(2, 3, 4, 5) if placement == "resident" else ())
    return Plan(setting=setting, homes=homes)


PICKS = (  # [step][layer][sequence]; off HBM are tokens 0-2, then 0-3, then 0-4
    (((0, 5),), ((1, 2),)),
    (((0, 1, 5),), ((2, 3, 4),)),
    (((1, 4, 7),), ((0, 2, 3),)),
)


def test_recent_placement_fetches_every_pick_that_is_off_hbm() -> None:
    flows = replayed_flows(topk_plan(), RecordedSelection(selector=Selector.TOPK, picks=PICKS))

    # layer 0: {0}, {0, 1}, {1, 4}; layer 1: {1, 2}, {2, 3}, {0, 2, 3}
    assert flows.fetched_kv.tolist() == [0.0, 3 / 2, 4 / 2, 5 / 2]


def test_resident_placement_fetches_a_pick_once_while_it_stays() -> None:
    flows = replayed_flows(topk_plan(Placement.RESIDENT), RecordedSelection(selector=Selector.TOPK, picks=PICKS))

    # layer 0: {0}, {1} (0 stays), {4} (1 stays); layer 1: {1, 2}, {3} (2 stays), {0} (2 and 3 stay)
    assert flows.fetched_kv.tolist() == [0.0, 3 / 2, 2 / 2, 2 / 2]


def test_a_dropped_token_is_the_one_attended_to_the_longest_ago() -> None:
    """The first token, which every step picks, is kept; the plan drops others in its place."""
    setting = make_setting(Selector.H2O, prompt=8, output=3, sparsity=0.5)
    assert (setting.token_counts.local, setting.token_counts.dead) == ((2, 2, 3), (4, 5, 5))
    plan = newest_in_hbm(setting, 3)
    recording = RecordedSelection(selector=Selector.H2O, picks=((((0, 5),),) * 2,) * 2)

    flows = replayed_flows(plan, recording)

    # Living at step 1: 0 (on the host), 5, 7, 8. At step 2: 0, 5 (on the host), 7, 8, 9.
    assert flows.fetched_kv.tolist() == [0.0, 1.0, 2.0]
    assert flows.written_kv.tolist() == [1.0, 1.0, 0.0]


def test_a_token_that_has_left_hbm_does_not_come_back() -> None:
    """Tokens 0 and 5 are on the host; then 6 dies in HBM, and the plan wants one token less on the host: 5 stays there."""
    setting = make_setting(Selector.H2O, prompt=8, output=2, sparsity=0.5)
    plan = Plan(setting=setting, homes=make_homes((2, 3), host_kv=(2, 1), dropped=(4, 5)))

    flows = replayed_flows(plan, RecordedSelection(selector=Selector.H2O, picks=((((0, 5),),) * 2,)))

    assert flows.fetched_kv.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("picks", "message"),
    [
        (PICKS[:2], "recording of 2 decode steps, must have the plan's 3"),
        ((*PICKS[:2], PICKS[2][:1]), "recording of 1 layers, must have the plan's 2"),
        ((*PICKS[:2], (((1,), (1,)), ((1,), (1,)))), "recording of 2 sequences, must have the plan's 1"),
        (
            (*PICKS[:2], (((8,),), ((1,),))),
            "recording at step 3, layer 0, sequence 0: pick=8, must be one of the 8 older tokens",
        ),
        (
            ((((0, 1, 2),), ((1, 2),)), *PICKS[1:]),
            "recording at step 1, layer 0, sequence 0: 3 picks, must be at most the plan's 2",
        ),
    ],
)
def test_a_recording_of_another_plan_is_refused(picks: Any, message: str) -> None:
    recording = RecordedSelection(selector=Selector.TOPK, picks=picks)

    with refuses(message):
        replayed_flows(topk_plan(), recording)


@pytest.mark.parametrize(
    ("lane", "message"),
    [
        ((1, 1), "recording at step 1, layer 0, sequence 0: 2 picks, must name each token once"),
        ((-1,), "recording at step 1, layer 0, sequence 0: pick=-1, must be a whole number of at least 0"),
        ((1.5,), "recording at step 1, layer 0, sequence 0: pick=1.5, must be a whole number of at least 0"),
    ],
)
def test_picks_must_be_token_numbers(lane: Any, message: str) -> None:
    with refuses(message):
        RecordedSelection(selector=Selector.TOPK, picks=(((lane,),),))


def test_a_recording_of_another_selector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^recording.selector=pages, must be the plan's topk$"):
        replayed_flows(topk_plan(), RecordedSelection(selector=Selector.PAGES, picks=PICKS))


def test_dense_attention_has_nothing_to_replay() -> None:
    with pytest.raises(ValueError, match=r"^recording.selector=dense, selects every token"):
        replayed_flows(in_hbm(make_setting()), RecordedSelection(selector=Selector.DENSE, picks=()))


def test_a_pick_that_the_plan_must_have_dropped_is_refused() -> None:
    """H2O forgets at once: a token left out never returns."""
    plan = in_hbm(make_setting(Selector.H2O, prompt=8, output=3, sparsity=0.5))
    returning = RecordedSelection(selector=Selector.H2O, picks=((((0, 5),),) * 2, (((1, 5),),) * 2))

    with refuses(
        "recording at step 1, layer 0, sequence 0: attends to token 0, the plan has 5 dropped by then and too few others "
        "to drop"
    ):
        replayed_flows(plan, returning)


def test_with_one_output_token_there_is_nothing_to_replay() -> None:
    plan = newest_in_hbm(make_setting(Selector.PAGES, output=1, sparsity=0.5), 2)

    flows = replayed_flows(plan, RecordedSelection(selector=Selector.PAGES, picks=()))

    assert flows.fetched_kv.tolist() == [0.0]
    assert flows.written_kv.tolist() == [2.0]
