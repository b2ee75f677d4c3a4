"""The figures' values are the plan's and the trace's; nothing is computed on the way to the picture."""

import base64
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from builders import make_setting, newest_in_hbm
from reports import Run, plan_page, sentences, sweep_page
from reports.chart import MOST_POINTS, Chart, thinned
from reports.figures.homes import tier_bytes, token_homes
from reports.figures.measured import family_errors, family_seconds, pairs_of, parity, steps_measured
from reports.figures.rivals import rival_charts
from reports.figures.sweep import base_row, frontier, heat_maps, pareto_charts, sensitivities, sensitivity
from reports.figures.time import step_times, time_totals, total_seconds
from reports.look import plain
from reports.plan_page import headline
from reports.timeline import MOST_BYTES, timeline_data
from sim.footprint import resident_weight_bytes, workspace_bytes
from sim.trace import Resource
from sim.units import GIB, MILLI
from studies import as_if_measured, continuous, large, make_rivals, make_study, make_sweep, three_phases

PLANS = {"three phases": three_phases, "continuous": continuous, "large": large}


def bands(chart: Chart) -> dict[str, np.ndarray]:
    return {trace.name: np.array(trace.y, dtype=float) for trace in chart.figure.data}


def test_tokens_are_drawn_where_the_plan_has_them() -> None:
    plan = three_phases()
    drawn = bands(token_homes(plan))

    assert {name: tuple(values) for name, values in drawn.items()} == {
        "layer inputs": plan.homes.activations,
        "host memory": plan.homes.host_kv,
        "HBM": plan.homes.hbm,
    }
    phases = [shape.x0 for shape in token_homes(plan).figure.layout.shapes]
    assert phases == [phase.first_step for phase in plan.phases[1:]] == [3, 7]


@pytest.mark.parametrize("name", PLANS)
def test_bytes_are_those_that_the_simulation_holds(name: str) -> None:
    study = make_study(PLANS[name]())
    setting, levels = study.plan.setting, study.simulated.trace.waves[0].levels
    charts = {chart.name: bands(chart) for chart in tier_bytes(study)}
    held = {tier: [level.size_bytes / GIB for level in levels if level.tier == tier] for tier in ("hbm", "host")}
    weights = resident_weight_bytes(setting.model, setting.dtype, setting.weight_format, 0.0)
    workspace = workspace_bytes(setting.model, setting.dtype, setting.concurrency, setting.workload.prompt_tokens)

    assert charts["hbm-bytes"]["KV and selection state"] == pytest.approx(held["hbm"])
    assert charts["hbm-bytes"]["weights"][0] * GIB == pytest.approx(weights)
    assert charts["hbm-bytes"]["workspace"][0] * GIB == pytest.approx(workspace)
    assert charts.get("host-bytes", {"KV": np.zeros(len(held["host"]))})["KV"] == pytest.approx(held["host"])


def test_capacities_are_lines_where_they_are() -> None:
    study = make_study(large())
    chart = tier_bytes(study)[0]
    setting = study.plan.setting
    static = study.priced.outcome.peak_hbm_bytes - study.priced.waves[0].load.held.hbm.max()
    lines = sorted(shape.y0 * GIB for shape in chart.figure.layout.shapes if shape.y0 == shape.y1)

    assert lines == pytest.approx(sorted([static + setting.kv_budget_bytes, setting.machine.gpu.hbm_bytes]), abs=1)


def test_a_capacity_far_above_is_said_instead_of_drawn() -> None:
    host = tier_bytes(make_study(large()))[1]

    assert host.name == "host-bytes"
    assert "beyond the picture, may be pinned: 115 GiB" in host.about
    assert not [shape for shape in host.figure.layout.shapes if shape.y0 == shape.y1]


@pytest.mark.parametrize("name", PLANS)
def test_bands_of_a_step_add_up_to_its_time(name: str) -> None:
    study = make_study(PLANS[name]())
    chart = step_times(study)
    simulated_s = np.diff(study.simulated.trace.waves[0].step_end_s, prepend=0.0)
    first = chart.table.columns[0][0]
    fill_s = study.priced.waves[0].fill_s if first == 0 else 0.0

    assert first == (0 if name == "continuous" else 1)
    assert sum(bands(chart).values()) * MILLI + fill_s == pytest.approx(simulated_s[first:])


@pytest.mark.parametrize("name", PLANS)
def test_totals_add_up_to_the_makespan(name: str) -> None:
    study = make_study(PLANS[name]())
    spent = total_seconds(study)
    bars = time_totals(spent).figure.data[0]

    assert sum(bars.x) == pytest.approx(study.simulated.trace.outcome.makespan_s)
    assert dict(zip(bars.y, bars.x, strict=True)) == spent


def test_rivals_are_told_apart_and_what_does_not_fit_is_shown() -> None:
    lossless, lossy = rival_charts(make_rivals())

    assert list(lossless.figure.data[0].y) == ["optimum-lossless", "flexgen", "zero"]
    assert list(lossless.figure.data[0].x) == [120.0, 80.0, 0.0]
    assert lossless.figure.data[0].text[2] == "does not fit"
    assert list(lossy.figure.data[0].y) == ["optimum<br><i>int8 KV</i>", "alisa<br><i>80 % by swa</i>"]
    assert lossy.table.rows[1][:4] == ("alisa", False, "80 % by swa", 160.0)


def test_headline_is_the_outcome() -> None:
    outcome = make_rivals()[0].outcome
    assert outcome is not None
    numbers = dict(headline(outcome))

    assert numbers["throughput"] == "200 tokens/s"
    assert numbers["time per output token (TPOT)"] == "20 ms"
    assert numbers["peak in HBM"] == "16 GiB"


# Simulated against measured


def test_measured_steps_stand_beside_simulated_ones() -> None:
    study = make_study(three_phases())
    run = Run(name="bench", trace=as_if_measured(study.simulated.trace))
    study = replace(study, measured=(run,))
    (pair,) = pairs_of(study)
    ends = [wave.step_end_s for wave in (study.simulated.trace.waves[0], run.trace.waves[0])]
    simulated, measured = (np.diff(end, prepend=0.0) for end in ends)
    lines, points = bands(steps_measured(study, [pair])), parity([pair]).figure.data[1]

    assert lines["simulated"] * MILLI == pytest.approx(simulated[1:])
    assert lines["bench"] * MILLI == pytest.approx(measured[1:])
    assert np.array(points.x) * MILLI == pytest.approx(simulated)
    assert np.array(points.y) * MILLI == pytest.approx(measured)
    assert pair.worst_step == int(np.argmax(np.abs(measured / simulated - 1)))


def test_errors_by_kind_of_work_are_ratios_of_busy_seconds() -> None:
    study = make_study(three_phases())
    run = Run(name="bench", trace=as_if_measured(study.simulated.trace))
    chart = family_errors(replace(study, measured=(run,)))
    found, known = family_seconds(run), family_seconds(study.simulated)
    bars = dict(zip(chart.figure.data[0].y, chart.figure.data[0].x, strict=True))

    assert bars["GPU in all"] == pytest.approx(100 * (found["GPU in all"] / known["GPU in all"] - 1))
    assert {"copy to GPU", "copy to host", "GPU: matrix products", "GPU: recomputation"} <= set(bars)
    busy = sum(wave.repeats * wave.busy_s(Resource.GPU) for wave in run.trace.waves)
    assert found["GPU in all"] == pytest.approx(busy)
    assert sorted(bars.values(), key=abs, reverse=True) == list(bars.values())
    worst = next(iter(bars))
    said = sentences.measured(replace(study, measured=(run,)), pairs_of(replace(study, measured=(run,))))
    assert said.endswith(f"the largest error is {bars[worst]:+.1f} %, {worst} in bench.")


def test_a_run_that_knows_its_steps_alone_can_be_shown() -> None:
    """As the runtime records it: a span a step, transfers with bytes and no duration."""
    study = make_study(three_phases())
    waves = []
    for wave in study.simulated.trace.waves:
        steps = [span for span in wave.spans if span.name == "head"]
        starts = [0.0, *wave.step_end_s[:-1]]
        whole = [
            span._replace(name="step", start_s=start, end_s=end)
            for span, start, end in zip(steps, starts, wave.step_end_s, strict=True)
        ]
        moved = [span._replace(end_s=span.start_s) for span in wave.spans if span.resource is Resource.H2D]
        waves.append(replace(wave, spans=(*whole, *moved)))
    run = Run(name="steps", trace=replace(study.simulated.trace, waves=tuple(waves)))
    page = plan_page(replace(study, measured=(run,)))

    assert "steps reached" in page
    assert list(family_errors(replace(study, measured=(run,))).figure.data[0].y) == ["GPU in all"]


# The timeline's packing


def unpacked(lane: dict[str, Any]) -> dict[str, np.ndarray]:
    raw, n, at, columns = zlib.decompress(base64.b64decode(lane["packed"])), lane["spans"], 0, {}
    kinds = ("size", "<f8"), ("gap", "<f8"), ("took", "<f8"), ("step", "<i4"), ("layer", "<i2"), ("name", "<u2")
    for name, kind in kinds:
        columns[name] = np.frombuffer(raw, kind, n, at)
        at += columns[name].nbytes
    ends = np.cumsum(columns["gap"] + columns["took"])
    return columns | {"start_s": (ends - columns["took"]) * lane["unit_s"], "end_s": ends * lane["unit_s"]}


def test_packed_spans_are_the_trace_to_the_nanosecond() -> None:
    study = make_study(large())
    (run,) = timeline_data(study)["runs"]
    for lane in run["lanes"]:
        spans = [span for span in study.simulated.trace.waves[0].spans if span.resource == lane["stream"]]
        columns = unpacked(lane)

        assert columns["start_s"] == pytest.approx([span.start_s for span in spans], abs=1e-9)
        assert columns["end_s"] == pytest.approx([span.end_s for span in spans], abs=1e-9)
        assert columns["size"].tolist() == [span.size_bytes for span in spans]
        assert columns["step"].tolist() == [span.step for span in spans]


def test_steps_that_do_not_fit_the_page_are_left_out() -> None:
    study = make_study(large())
    rng = np.random.default_rng(0)
    wave = study.simulated.trace.waves[0]
    noisy = tuple(span._replace(size_bytes=float(rng.random())) for span in wave.spans)
    run = Run(name="noisy", trace=replace(study.simulated.trace, waves=(replace(wave, spans=noisy),)))
    data = timeline_data(replace(study, measured=(run,)))

    assert 0 < data["last_step"] < 511
    assert sum(len(lane["packed"]) for run in data["runs"] for lane in run["lanes"]) <= MOST_BYTES
    assert timeline_data(replace(study, drawn_steps=(40, 9999)))["last_step"] == 511


# Sweeps


def test_heat_maps_hold_the_best_over_the_other_fields() -> None:
    sweep = make_sweep()
    by_gpu_and_batch, *others = heat_maps(sweep)
    heat = by_gpu_and_batch.figure.data[0]

    assert len(others) == 2
    assert list(heat.x) == ["4", "8", "16"]
    assert list(heat.y) == ["slow", "fast"]
    assert heat.z[1][2] == max(
        row["tokens_per_s"] for row in sweep.feasible if (row["gpu"], row["batch"]) == ("fast", 16)
    )
    assert heat.z[0][2] == next(r["tokens_per_s"] for r in sweep.rows if (r["batch"], r["sparsity"]) == (16, 0.0))


def test_no_point_of_the_front_is_beaten() -> None:
    sweep = make_sweep()
    front = frontier(sweep.feasible, "tpot_s")
    beaten = [row for row in sweep.feasible if all(row is not one for one in front)]

    assert len(front) > 1
    for row in beaten:
        assert any(one["tpot_s"] <= row["tpot_s"] and one["tokens_per_s"] >= row["tokens_per_s"] for one in front)
    tpot, memory = pareto_charts(sweep)
    assert list(tpot.figure.data[1].y) == [row["tokens_per_s"] for row in front]
    assert list(memory.figure.data[0].x) == [row["peak_hbm_bytes"] / GIB for row in sweep.feasible]


def test_sensitivity_varies_one_field_from_the_fastest_point() -> None:
    sweep = make_sweep()
    best = base_row(sweep)
    found = dict(sensitivities(sweep))

    assert (best["gpu"], best["batch"], best["sparsity"]) == ("fast", 16, 0.8)
    assert sorted(row["batch"] for row in found["batch"]) == [4, 8, 16]
    assert [row["gpu"] for row in found["gpu"]] == ["fast"]  # the slow one's point has no plan
    assert sum(len(trace.x) for trace in sensitivity(sweep).figure.data) == 3 + 1 + 2


def test_a_sweep_without_any_plan_says_so() -> None:
    rows = tuple({**row, "tokens_per_s": None} for row in make_sweep().rows)

    assert "None of the 12 points has a plan." in sweep_page(make_sweep(rows=rows))


# What all pages keep


def test_pages_stay_small() -> None:
    study = make_study(large(), rivals=make_rivals())
    run = Run(name="bench", trace=as_if_measured(study.simulated.trace))

    assert len(plan_page(replace(study, measured=(run,))).encode()) < 6_000_000


def test_a_single_step_has_a_page() -> None:
    study = make_study(newest_in_hbm(make_setting(output=1), slots=4))

    assert "Where the time goes" in plan_page(study)


def test_long_lines_are_thinned_but_keep_their_ends_and_corners() -> None:
    shown = thinned(100_000, keep=(1_234,))

    assert len(shown) <= MOST_POINTS + 2
    assert {0, 1_233, 1_234, 99_999} <= set(shown.tolist())


def test_markup_of_plotly_is_taken_literally() -> None:
    assert plain("<b>%{x}</b> & &lt;") == "&lt;b&gt;%&#123;x}&lt;/b&gt; &amp; &amp;lt;"
