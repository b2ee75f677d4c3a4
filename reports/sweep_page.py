"""A sweep's page: the best point, throughput over the grid, what can be had against what, and what each field changes."""

from collections.abc import Callable, Iterator
from typing import Any

from reports import html
from reports.figures.sweep import base_row, frontier, heat_maps, pareto_charts, sensitivities, sensitivity
from reports.page import Section, document
from reports.sweep import Row, Sweep, field_words, point_name
from sim.units import GIB, format_bytes, format_seconds

MOST_ROWS = 200


def sweep_page(sweep: Sweep) -> str:
    """The whole document."""
    sections = [_answer(sweep)]
    if sweep.feasible and sweep.varied:
        sections += [*_maps(sweep), *_fronts(sweep), _sensitivity(sweep)]
    return document(sweep.title, sweep.question, [*sections, _points(sweep)])


def _answer(sweep: Sweep) -> Section:
    fits, points = sweep.feasible, len(sweep.rows)
    if not fits:
        says = f"None of the {points:,} points has a plan."
        return Section(name="answer", title="The answer", says=says, parts=())
    best = base_row(sweep)
    where = point_name(best, sweep.varied) or "the only point"
    says = f"The fastest of {points:,} points is {where}, with {best['tokens_per_s']:,.0f} tokens/s; {_missing(sweep)}."
    parts = (html.figures(_figures(best)), html.paragraph(f"Its plan: {best['plan']}.") if best.get("plan") else "")
    return Section(name="answer", title="The answer", says=says, parts=parts)


def _missing(sweep: Sweep) -> str:
    misfits = len(sweep.rows) - len(sweep.feasible)
    return "every point has a plan" if not misfits else f"{misfits:,} {'has' if misfits == 1 else 'have'} no plan"


def _figures(row: Row) -> list[tuple[str, str]]:
    """What is known of the point, as it is read."""
    said: dict[str, tuple[str, Callable[[Any], str]]] = {
        "tokens_per_s": ("throughput", lambda value: f"{value:,.0f} tokens/s"),
        "ttft_s": ("time to first token (TTFT)", format_seconds),
        "tpot_s": ("time per output token (TPOT)", format_seconds),
        "peak_hbm_bytes": ("peak in HBM", format_bytes),
    }
    return [(words, shown(row[name])) for name, (words, shown) in said.items() if row.get(name) is not None]


def _maps(sweep: Sweep) -> Iterator[Section]:
    charts = heat_maps(sweep)
    if charts:
        speeds = [row["tokens_per_s"] for row in sweep.feasible]
        says = f"Throughput lies between {min(speeds):,.0f} and {max(speeds):,.0f} tokens/s; dark cells are fast."
        yield Section(name="maps", title="Throughput over the grid", says=says, parts=charts)


def _fronts(sweep: Sweep) -> Iterator[Section]:
    charts = pareto_charts(sweep)
    if charts:
        timed = [row for row in sweep.feasible if row.get("tpot_s") is not None]
        front = frontier(timed, "tpot_s")
        says = "More throughput costs memory."
        if front:
            says = (
                f"From {front[0]['tokens_per_s']:,.0f} tokens/s at {format_seconds(front[0]['tpot_s'])} per token to "
                f"{front[-1]['tokens_per_s']:,.0f} at {format_seconds(front[-1]['tpot_s'])}: "
                f"{len(front):,} of {len(timed):,} points are not beaten."
            )
        yield Section(name="fronts", title="What can be had against what", says=says, parts=charts)


def _sensitivity(sweep: Sweep) -> Section:
    name, rows = sensitivities(sweep)[0]
    speeds = [row["tokens_per_s"] for row in rows]
    says = (
        f"From the fastest point, {field_words(name)} matters most: alone it moves throughput between {min(speeds):,.0f} and "
        f"{max(speeds):,.0f} tokens/s."
    )
    return Section(name="sensitivity-section", title="What one field changes", says=says, parts=(sensitivity(sweep),))


def _points(sweep: Sweep) -> Section:
    headings = (*map(field_words, sweep.fields), "tokens/s", "TTFT", "TPOT", "HBM GiB", "plan or reason")
    words = (*(place for place in range(len(sweep.fields))), len(headings) - 1)
    rows = [_cells(sweep, row) for row in sweep.rows[:MOST_ROWS]]
    left_out = len(sweep.rows) - len(rows)
    parts = (
        html.code(sweep.commands) if sweep.commands else "",
        html.facts(sweep.versions) if sweep.versions else "",
        html.table(headings, rows, "Every point" + (f" but the last {left_out:,}" if left_out else ""), left=words),
    )
    says = f"{len(sweep.rows):,} points, each solved by itself; the figures' numbers can be saved below each of them."
    return Section(name="points", title="The points", says=says, parts=parts)


def _cells(sweep: Sweep, row: Row) -> tuple[str, ...]:
    values = [str(row[name]) for name in sweep.fields]
    if row["tokens_per_s"] is None:
        return (*values, "-", "-", "-", "-", str(row.get("reason") or "no plan fits"))
    times = ["-" if row.get(name) is None else format_seconds(row[name]) for name in ("ttft_s", "tpot_s")]
    hbm = "-" if row.get("peak_hbm_bytes") is None else f"{row['peak_hbm_bytes'] / GIB:,.1f}"
    return (*values, f"{row['tokens_per_s']:,.0f}", *times, hbm, str(row.get("plan") or ""))
