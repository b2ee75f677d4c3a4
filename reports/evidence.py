"""What speaks for the numbers: the profile's fit to what was measured, and plans that were run to test it."""

from collections.abc import Iterator, Sequence

from reports import html
from reports.chart import Chart
from reports.figures.campaign import BOUND_BY, campaign_errors, campaign_parity
from reports.figures.fitted import fit_errors, fitted_charts
from reports.look import distance, share
from reports.page import Section
from reports.study import Study
from sim.profile import FamilyError
from sim.profile_files import content_hash
from sim.units import format_seconds
from sim.verdict import Verdict

_MOST_NAMED = 5


def fit_section(study: Study) -> Iterator[Section]:
    """Only where the profile is measured."""
    profile = study.cost.profile
    if profile.evidence is None or not profile.evidence.errors:
        return
    errors = profile.evidence.errors
    curves = fitted_charts(profile, study.raw) if study.raw else []
    parts: list[str | Chart] = [
        html.paragraph(_errors_say(errors)),
        fit_errors(errors),
        html.table(
            ("family", "measured", "median error", "worst", "worst at"),
            [
                (one.family, str(one.measurements), share(one.median), share(one.worst), one.worst_case)
                for one in errors
            ],
            "Error of the fit by kernel family",
            left=(0, 4),
        ),
    ]
    for chart in curves:
        parts += [html.paragraph(_curve_says(chart)), chart]
    points = sum(one.measurements for one in errors)
    says = f"{profile.name} was fitted to {points} measurements of {len(errors)} kernel families" + (
        "; points are measured, curves are what the plan is priced by, products of decode steps by their points where a matrix has "
        "any."
        if curves
        else "; the measurements do not lie beside it, so that no curve is drawn."
    )
    yield Section(name="fit", title="The profile against its measurements", says=says, parts=tuple(parts))


def _errors_say(errors: Sequence[FamilyError]) -> str:
    best, worst = min(errors, key=lambda one: one.median), max(errors, key=lambda one: one.worst)
    return (
        f"The fit is closest for {best.family.replace('_', ' ')} ({share(best.median)} in the median); furthest off is "
        f"{worst.family.replace('_', ' ')}, {share(worst.worst)} at {worst.worst_case}."
    )


def _curve_says(chart: Chart) -> str:
    """The measurement that is furthest from its curve."""
    cases, _, measured, _, _, fitted = chart.table.columns
    rows = [(f / m, case, m, f) for case, m, f in zip(cases, measured, fitted, strict=True)]
    ratio, case, took, said = max(rows, key=lambda row: abs(row[0] - 1))
    within = sum(abs(row[0] - 1) <= 0.1 for row in rows)
    return (
        f"{within} of {len(rows)} points lie within 10 % of their curve; furthest off is {case}, fitted "
        f"{format_seconds(said)} for {format_seconds(took)} ({distance(ratio)})."
    )


def campaign_section(study: Study) -> Iterator[Section]:
    """Only where a verdict is given."""
    verdict = study.verdict
    if verdict is None:
        return
    worst = [
        (
            one.recipe,
            BOUND_BY[one.stratum],
            *(format_seconds(run.makespan_s) for run in (one.simulated, one.measured)),
            distance(1 + one.makespan),
            one.explained_by,
        )
        for one in verdict.plans[:_MOST_NAMED]
    ]
    headings = ("plan", "mostly spent on", "predicted", "measured", "error", "explained by")
    parts = (
        html.bullets(_caveats(verdict, study)),
        html.paragraph(_parity_says(verdict)),
        campaign_parity(verdict),
        html.paragraph(_plans_say(verdict)),
        campaign_errors(verdict),
        html.table(headings, worst, "The worst plans", left=(0, 1, 5)),
    )
    says = (
        f"Of {len(verdict.plans)} plans run on {verdict.gpu}, none of which the fit has seen, the predicted makespan is off "
        f"by {share(verdict.median_error)} in the median and {share(verdict.worst_error)} at worst."
    )
    yield Section(name="campaign", title="Predictions against runs", says=says, parts=parts)


def _caveats(verdict: Verdict, study: Study) -> Iterator[str]:
    if verdict.profile_hash != content_hash(study.cost.profile):
        yield f"These plans were judged by profile {verdict.profile}, this page is priced by {study.cost.profile.name}."
    if verdict.waiting:
        yield f"{verdict.waiting} more plans of the campaign have not been run."
    for recipe, reason in verdict.failed:
        yield f"Could not be run: {recipe}: {reason}"


def _parity_says(verdict: Verdict) -> str:
    over = sum(one.makespan > 0 for one in verdict.plans)
    return (
        f"{over} plans took less time than predicted (below the dotted line), {len(verdict.plans) - over} took as much or "
        "more."
    )


def _plans_say(verdict: Verdict) -> str:
    near, worst = sum(abs(one.makespan) <= 0.1 for one in verdict.plans), verdict.plans[0]
    return (
        f"{near} of {len(verdict.plans)} plans are predicted within 10 %; the worst is {worst.recipe} "
        f"({distance(1 + worst.makespan)}, explained by: {worst.explained_by})."
    )
