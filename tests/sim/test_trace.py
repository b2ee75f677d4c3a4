"""Traces: totals read off the spans, and events that a trace viewer opens."""

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

from hypothesis import given, settings

from builders import make_cost, make_machine, make_setting, newest_in_hbm
from sim.cost import CostModel
from sim.engine import simulate
from sim.outcome import Outcome, Served, Utilisation
from sim.plan import Plan
from sim.trace import Level, Resource, Span, Tier, Trace, WaveTrace, chrome_events
from strategies import priced_plans

# Three sequences that ran 10 s, twice, then one that ran 6 s; three tokens each.
LONG = WaveTrace(
    sequences=3,
    repeats=2,
    served=(Served(sequences=3, first_step=0, last_step=2),),
    spans=(
        Span(Resource.GPU, "query", 0, 0, 0.0, 4.0),
        Span(Resource.H2D, "fetch", 1, 0, 4.0, 6.0, 100.0),
        Span(Resource.GPU, "head", 1, None, 6.0, 9.0),
        Span(Resource.D2H, "write", 1, 0, 9.0, 10.0, 50.25),
    ),
    levels=(Level(Tier.HBM, 0, 0.0, 30.5), Level(Tier.HOST, 0, 0.0, 5.0), Level(Tier.HBM, 1, 4.0, 20.0)),
    step_end_s=(4.0, 8.0, 10.0),
)
SHORT = WaveTrace(
    sequences=1,
    repeats=1,
    served=(Served(sequences=1, first_step=0, last_step=2),),
    spans=(Span(Resource.GPU, "query", 0, 0, 0.0, 6.0),),
    levels=(Level(Tier.HOST, 0, 0.0, 7.0),),
    step_end_s=(2.0, 4.0, 6.0),
)
TRACE = Trace(source="by hand", output_tokens=3, static_hbm_bytes=1000, static_host_bytes=10, waves=(LONG, SHORT))


def test_totals_of_a_trace_by_hand() -> None:
    """First tokens come at 4, 14 and 22 s; after them 6, 6 and 4 s of decoding for two tokens."""
    assert TRACE.outcome == Outcome(
        makespan_s=26.0,
        tokens_per_s=7 * 3 / 26,
        ttft_s=(3 * 4 + 3 * 14 + 1 * 22) / 7,
        tpot_s=(3 * 6 + 3 * 6 + 1 * 4) / 7 / 2,
        peak_hbm_bytes=1031,
        peak_host_bytes=17,
        h2d_bytes=200,
        d2h_bytes=100,
        utilisation=Utilisation(gpu=(2 * 7 + 6) / 26, h2d=2 * 2 / 26, d2h=2 * 1 / 26),
    )


def test_sequences_of_one_wave_may_be_served_at_different_steps() -> None:
    """Two from step 0 to step 1 (4 and 8 s), one from step 1 to step 2 (8 and 10 s)."""
    served = (Served(sequences=2, first_step=0, last_step=1), Served(sequences=1, first_step=1, last_step=2))
    outcome = replace(TRACE, output_tokens=2, waves=(replace(LONG, repeats=1, served=served),)).outcome

    assert outcome.ttft_s == (2 * 4 + 8) / 3
    assert outcome.tpot_s == (2 * (8 - 4) + (10 - 8)) / 3


def test_one_token_has_no_time_between_tokens() -> None:
    only_prefill = Trace(source="t", output_tokens=1, static_hbm_bytes=0, static_host_bytes=0, waves=(SHORT,))

    assert only_prefill.outcome.tpot_s is None


def events_by_kind(trace: Trace) -> dict[str, list[dict[str, Any]]]:
    kinds = defaultdict(list)
    for event in json.loads(json.dumps(list(chrome_events(trace)))):
        kinds[event["ph"]].append(event)
    return kinds


def test_events_of_a_trace_by_hand() -> None:
    kinds = events_by_kind(TRACE)

    assert [event["args"]["name"] for event in kinds["M"]] == ["gpu", "h2d", "d2h", "cpu", "launch"]
    assert kinds["X"][1] == {
        "ph": "X",
        "name": "fetch",
        "pid": 0,
        "tid": 1,
        "ts": 4e6,
        "dur": 2e6,
        "args": {"step": 1, "layer": 0, "bytes": 100.0, "GB/s": 0.0},
    }
    assert kinds["X"][-1]["ts"] == 10e6  # the second distinct wave is drawn behind the first one
    assert kinds["C"][0] == {"ph": "C", "name": "KV in hbm", "pid": 0, "ts": 0.0, "args": {"hbm": 30.5}}


def test_rates_stand_beside_the_times() -> None:
    machine = make_machine(hbm_bytes_per_s=1e12, link_bytes_per_s=2e9)
    setting = make_setting(machine=machine)
    trace = simulate(newest_in_hbm(setting, slots=1), make_cost(machine))

    moved = [event for event in events_by_kind(trace)["X"] if event["args"]["bytes"]]

    assert moved
    assert {event["args"]["GB/s"] for event in moved} == {2.0}


@settings(max_examples=40, deadline=None)
@given(priced_plans())
def test_events_follow_each_other_on_every_thread(priced: tuple[Plan, CostModel]) -> None:
    kinds = events_by_kind(simulate(*priced))
    threads: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in kinds["X"]:
        threads[event["tid"]].append(event)
    counters: dict[str, list[float]] = defaultdict(list)
    for event in kinds["C"]:
        counters[event["name"]].append(event["ts"])

    for events in threads.values():
        starts = [event["ts"] for event in events]
        ends = [event["ts"] + event["dur"] for event in events]
        assert starts == sorted(starts)
        assert all(end <= start * (1 + 1e-9) + 1e-3 for end, start in zip(ends, starts[1:], strict=False))
    assert all(times == sorted(times) for times in counters.values())
    assert set(threads) <= {event["tid"] for event in kinds["M"]}
    assert set(counters) == {"KV in hbm", "KV in host"}
