"""The fit's figures hold the measurements and the cost model's own prices; the campaign's hold its runs."""

from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports import plan_page
from reports.chart import Chart
from reports.figures.campaign import campaign_errors, campaign_parity, short
from reports.figures.fitted import KINDS, fit_errors, fitted_charts, spread
from sim.cost import CostModel
from sim.measured import Measured
from sim.predict import predictable
from sim.profile import Profile
from sim.units import GB
from studies import make_study, make_verdict, measured_study, three_phases


@pytest.fixture(scope="module")
def fitted() -> tuple[Profile, Measured, list[Chart]]:
    study = measured_study(three_phases())
    assert study.raw
    return study.cost.profile, study.raw, fitted_charts(study.cost.profile, study.raw)


def test_points_are_the_measurements(fitted: tuple[Profile, Measured, list[Chart]]) -> None:
    _, raw, charts = fitted
    for kind, chart in zip(KINDS, charts, strict=True):
        taken = [one for one in raw.measurements if kind.draws(one) and "memory=pageable" not in one.case]
        drawn = [
            (x, x / y / GB if kind.rate else y / 1e6)
            for trace in chart.figure.data
            if trace.mode.startswith("markers")
            for x, y in zip(trace.x, trace.y, strict=True)
        ]

        assert len(drawn) == len(taken) >= 8
        wanted = sorted((kind.x(one), one.seconds) for one in taken)
        assert [x for x, _ in sorted(drawn)] == [x for x, _ in wanted]
        assert [seconds for _, seconds in sorted(drawn)] == pytest.approx([seconds for _, seconds in wanted])


def test_curves_are_what_the_profile_prices(fitted: tuple[Profile, Measured, list[Chart]]) -> None:
    """They pass through the fitted value of every point at either end, and the errors are those that the profile states."""
    profile, raw, charts = fitted
    assert profile.evidence
    stated = {one.family: one for one in profile.evidence.errors}
    cost = CostModel(machine=raw.machine, profile=profile)
    whole = {
        kind.family: predictable([one for one in raw.measurements if one.family == kind.family], raw.machine)
        for kind in KINDS
    }
    for kind, chart in zip(KINDS, charts, strict=True):
        cases, xs, measured, _, _, said = chart.table.columns
        errors = [abs(f / m - 1) for f, m in zip(said, measured, strict=True)]
        lines = [trace for trace in chart.figure.data if trace.mode == "lines"]
        ends = {kind.y(x, f) for x, f in zip(xs, said, strict=True) if x in (min(xs), max(xs))}
        drawn = [trace.y[place] for trace in lines for place in (0, -1)]

        by_case = {took.case: abs(price(cost) / took.seconds - 1) for took, price in whole[kind.family]}
        assert median(by_case.values()) == pytest.approx(stated[kind.family].median)
        assert max(by_case, key=by_case.__getitem__) == stated[kind.family].worst_case
        assert errors == pytest.approx([by_case[case] for case in cases])
        assert kind.without or max(errors) == pytest.approx(stated[kind.family].worst)
        assert all(any(end == pytest.approx(y) for y in drawn) for end in ends)


def test_a_curve_is_the_cost_model_s_own(fitted: tuple[Profile, Measured, list[Chart]]) -> None:
    profile, raw, charts = fitted
    copies = next(chart for chart in charts if chart.name == "fit-copies").figure.data[0]
    cost = CostModel(machine=raw.machine, profile=profile)
    for x, rate in zip(copies.x, copies.y, strict=True):
        floor, setup = profile.copy_floor_s, profile.copy_setup_s + float(x) / cost.link_bytes_per_s
        assert rate == pytest.approx(x / max(floor, setup) / GB)


def test_every_family_has_its_error(fitted: tuple[Profile, Measured, list[Chart]]) -> None:
    profile = fitted[0]
    assert profile.evidence
    chart = fit_errors(profile.evidence.errors)
    medians, worst = chart.figure.data[1:]
    drawn = {y: (m / 100, w / 100) for y, m, w in zip(medians.y, medians.x, worst.x, strict=True)}

    assert drawn == {
        one.family.replace("_", " "): pytest.approx((one.median, one.worst)) for one in profile.evidence.errors
    }


def test_a_page_says_what_it_lacks() -> None:
    study = measured_study(three_phases(), raw=None, verdict=None)
    page = plan_page(study)

    assert "no curve is drawn" in page
    assert "fit-errors" in page
    assert "Predictions against runs" not in page
    assert "The profile against its measurements" not in plan_page(make_study(three_phases()))


@given(wanted=st.lists(st.floats(0, 10), min_size=1, max_size=12), gap=st.floats(0.01, 2))
def test_labels_keep_their_distance_and_their_order(wanted: list[float], gap: float) -> None:
    found = spread(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    placed = [found[place] for place in order]

    assert all(b - a >= gap * (1 - 1e-9) - 1e-9 for a, b in pairwise(placed))
    assert sum(found) == pytest.approx(sum(wanted), abs=1e-6)


# The campaign


def test_every_plan_stands_where_it_ran() -> None:
    verdict = make_verdict()
    points = [trace for trace in campaign_parity(verdict).figure.data if trace.mode == "markers"]
    drawn = {pair for trace in points for pair in zip(trace.x, trace.y, strict=True)}
    bars = campaign_errors(verdict).figure.data[0]

    assert len(points) == 5
    assert drawn == {(one.simulated.makespan_s, one.measured.makespan_s) for one in verdict.plans}
    assert list(bars.x) == pytest.approx([100 * one.makespan for one in verdict.plans])
    page = plan_page(measured_study(three_phases()))
    assert verdict.plans[0].recipe in page
    assert "3 more plans of the campaign have not been run" in page
    assert "judged by profile measured" in page


def test_a_plan_is_named_briefly() -> None:
    assert short("model=opt-1.3b batch=8 prompt=64 output=32 concurrency=3 hbm=75 recompute=activations_host") == (
        "opt-1.3b, 8 x (64 + 32)",
        "3 at once, 75 % in HBM, recomputes activations host",
    )
    assert short("model=opt-1.3b batch=8 prompt=64 output=32 concurrency=8") == ("opt-1.3b, 8 x (64 + 32)", "")
