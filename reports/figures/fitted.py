"""What a profile was fitted to: measured points under the curves of the cost model, and the error of each kernel family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from reports.chart import Chart, Table
from reports.figures.shared import figure
from reports.look import BLUE, GREY, SERIES, VERMILION, axis, one_two_five, plain, share
from sim.cost import CostModel
from sim.measured import Measured
from sim.predict import predictable
from sim.profile import FamilyError, Measurement, Profile
from sim.units import GB, format_bytes

MICRO = 1e-6
_POINTS = 41  # of a curve; those that bend do so once
_SMALL = {"font": {"size": 11}, "showarrow": False}
_SOURCES = {"hbm": "HBM", "host": "host"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A family of measurements as a picture: ``word`` of the case plus ``more`` is its x, ``curve`` names what shares a curve.

    ``rate`` draws bytes a second instead of seconds. ``series`` names points that share one. ``without`` are words of cases
    that are left to the table of errors.
    """

    family: str
    name: str
    word: str
    x_title: str
    about: str
    curve: Callable[[Measurement], str]
    series: Callable[[Measurement], str]
    more: int = 0
    rate: bool = False
    without: tuple[str, ...] = ()

    def draws(self, took: Measurement) -> bool:
        return took.family == self.family and not any(word in took.case for word in self.without)

    def x(self, took: Measurement) -> int:
        return took.number(self.word) + self.more

    def y(self, x: int, seconds: float) -> float:
        return x / seconds / GB if self.rate else seconds / MICRO


def _shape(took: Measurement) -> str:
    return f"{took.number('inputs'):,} x {took.number('outputs'):,}"


def _sequences(took: Measurement) -> str:
    return f"{took.text('model')}, {took.text('batch')} at once"


KINDS = (
    Kind(
        family="product",
        name="fit-products",
        word="rows",
        x_title="rows",
        about="Matrix products: measured points, fitted curves; inputs x outputs of each matrix at its curve",
        curve=_shape,
        series=_shape,
    ),
    Kind(
        family="attention",
        name="fit-attention",
        word="prompt",
        more=1,
        x_title="tokens attended to",
        about="One layer's decode attention in the compute type: measured points, fitted curves; model and sequences at each",
        curve=_sequences,
        series=_sequences,
        without=("kv=", "admission="),
    ),
    Kind(
        family="copy",
        name="fit-copies",
        word="bytes",
        x_title="size of the copy",
        about="Copies between pinned host memory and the GPU: measured points, one fitted curve for both ways",
        curve=lambda _: "fitted",
        series=lambda took: f"to {took.text('to')}",
        rate=True,
    ),
    Kind(
        family="gather",
        name="fit-gathers",
        word="bytes",
        x_title="bytes gathered",
        about="Scattered rows gathered from HBM and from host memory: a fitted curve for each; the size of a row beside its point",
        curve=lambda took: f"from {_SOURCES.get(took.text('from'), took.text('from'))}",
        series=lambda took: format_bytes(took.number("row")),
        rate=True,
    ),
)


def fitted_charts(profile: Profile, raw: Measured) -> list[Chart]:
    """One for each kind of operation that was measured."""
    cost = CostModel(machine=raw.machine, profile=profile)
    charts = []
    for kind in KINDS:
        rows = predictable([one for one in raw.measurements if kind.draws(one)], raw.machine)
        if rows:
            charts.append(_fitted(kind, [(took, price(cost)) for took, price in rows], cost))
    return charts


def _fitted(kind: Kind, rows: Sequence[tuple[Measurement, float]], cost: CostModel) -> Chart:
    xs = sorted({kind.x(took) for took, _ in rows})
    grid = np.unique(np.geomspace(xs[0], max(xs[-1], xs[0] + 1), _POINTS).round().astype(int))
    first = {kind.curve(took): took for took, _ in reversed(rows)}
    curves = {name: _curve(kind, took, grid, cost) for name, took in first.items()}
    colours = dict(zip(curves, SERIES * (1 + len(curves) // len(SERIES)), strict=False))
    lines = [
        go.Scatter(
            x=grid,
            y=values,
            name=plain(name),
            mode="lines",
            line={"color": colours[name], "width": 2},
            hoverinfo="skip",
        )
        for name, values in curves.items()
    ]
    points = [
        _points(kind, name, [row for row in rows if kind.curve(row[0]) == name], colours[name]) for name in curves
    ]
    ys = [y for values in curves.values() for y in values] + [kind.y(kind.x(took), took.seconds) for took, _ in rows]
    low, high = np.log10(min(ys) / 1.3), np.log10(max(ys) * 1.3)
    height = max(360, 24 * len(curves) + 160)
    ends = spread([float(np.log10(values[-1])) for values in curves.values()], 17 * (high - low) / (height - 90))
    labels = [
        {
            **_SMALL,
            "x": 1.01,
            "xref": "paper",
            "xanchor": "left",
            "y": end,
            "text": f"<span style='color:{colours[name]}'>●</span> {plain(name)}",
        }
        for name, end in zip(curves, ends, strict=True)
    ]
    ticks = one_two_five(10**low, 10**high)
    layout = {
        "xaxis": axis(kind.x_title, type="log", tickvals=xs, ticktext=[_tick(kind, x) for x in xs], tickangle=0),
        "yaxis": axis(
            "rate, GB/s" if kind.rate else "time, us",
            type="log",
            range=[low, high],
            tickvals=ticks,
            ticktext=[f"{tick:,g}" for tick in ticks],
        ),
        "hovermode": "closest",
        "annotations": labels,
        "margin": {"l": 8, "r": 14 + 7 * max(len(name) + 2 for name in curves), "t": 34, "b": 8},
    }
    return Chart(
        name=kind.name,
        figure=figure([*lines, *points], height, **layout),
        key=(),
        table=_table(kind, rows),
        about=kind.about,
    )


def _curve(kind: Kind, took: Measurement, grid: Any, cost: CostModel) -> list[float]:
    """The cost model's own answer for the same operation at every size."""
    cases = [took.at(kind.word, int(x) - kind.more) for x in grid]
    priced = predictable(cases, cost.machine)
    return [kind.y(int(x), price(cost)) for x, (_, price) in zip(grid, priced, strict=True)]


_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")


def _points(kind: Kind, name: str, rows: Sequence[tuple[Measurement, float]], colour: str) -> Any:
    """With whiskers from the tenth to the ninetieth percentile; symbols where several series share a curve."""
    ys = [kind.y(kind.x(took), took.seconds) for took, _ in rows]
    bounds = [sorted((kind.y(kind.x(took), took.low_s), kind.y(kind.x(took), took.high_s))) for took, _ in rows]
    series = list(dict.fromkeys(kind.series(took) for took, _ in rows))
    symbols = [_SYMBOLS[series.index(kind.series(took)) % len(_SYMBOLS)] for took, _ in rows]
    curve, first = [kind.y(kind.x(took), seconds) for took, seconds in rows], min(kind.x(took) for took, _ in rows)
    unit = "GB/s" if kind.rate else "us"
    said = [
        f"{plain(took.case)}<br>measured {y:,.4g} {unit}, fitted {kind.y(kind.x(took), seconds):,.4g} {unit}"
        for (took, seconds), y in zip(rows, ys, strict=True)
    ]
    return go.Scatter(
        x=[kind.x(took) for took, _ in rows],
        y=ys,
        name=plain(name),
        mode="markers+text" if len(series) > 1 else "markers",
        marker={"color": colour, "size": 9, "symbol": symbols, "line": {"width": 1, "color": "#ffffff"}},
        error_y={
            "type": "data",
            "array": [max(0.0, high - y) for (_, high), y in zip(bounds, ys, strict=True)],
            "arrayminus": [max(0.0, y - low) for (low, _), y in zip(bounds, ys, strict=True)],
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        text=_names(kind, rows, series),
        textposition=[
            "middle left" if y > fitted and kind.x(took) > first else "middle right"
            for (took, _), y, fitted in zip(rows, ys, curve, strict=True)
        ],
        textfont={"size": 11},
        cliponaxis=False,
        hovertext=said,
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _names(kind: Kind, rows: Sequence[tuple[Measurement, float]], series: Sequence[str]) -> list[str]:
    """A series of several is named once, at its last but one point, which has room around it."""
    if len(series) < 2:
        return [""] * len(rows)
    at = {name: [place for place, (took, _) in enumerate(rows) if kind.series(took) == name] for name in series}
    named = {places[len(places) // 2 - (len(places) > 1)]: name for name, places in at.items()}
    return [plain(named.get(place, "")) for place in range(len(rows))]


def _tick(kind: Kind, x: int) -> str:
    return format_bytes(x) if kind.word == "bytes" else f"{x:,}"


def _table(kind: Kind, rows: Sequence[tuple[Measurement, float]]) -> Table:
    return Table.of(
        {
            "case": [took.case for took, _ in rows],
            kind.x_title: [kind.x(took) for took, _ in rows],
            "measured, s": [took.seconds for took, _ in rows],
            "10 % took less than, s": [took.low_s for took, _ in rows],
            "90 % took less than, s": [took.high_s for took, _ in rows],
            "fitted, s": [seconds for _, seconds in rows],
        }
    )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places near ``wanted``, in its order, that keep ``gap`` from each other: labels do not cover one another."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    groups: list[list[int]] = []
    for place in order:
        groups.append([place])
        while (
            len(groups) > 1
            and _middle(groups[-1], wanted) - _middle(groups[-2], wanted)
            < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = [0.0] * len(wanted)
    for group in groups:
        lowest = _middle(group, wanted) - gap * (len(group) - 1) / 2
        for rank, place in enumerate(group):
            found[place] = lowest + gap * rank
    return found


def _middle(group: Sequence[int], wanted: Sequence[float]) -> float:
    return sum(wanted[place] for place in group) / len(group)


def fit_errors(errors: Sequence[FamilyError]) -> Chart:
    """From the median to the worst error of each family, as the profile states them."""
    ordered = sorted(errors, key=lambda one: -one.worst)
    names = [plain(one.family.replace("_", " ")) for one in ordered]
    least = 1e-4  # below 0.01 % nothing is told apart
    ends = [(max(least, one.median), max(least, one.worst)) for one in ordered]
    bars = go.Scatter(
        x=[x for pair in ends for x in (100 * pair[0], 100 * pair[1], None)],
        y=[name for name in names for _ in range(3)],
        mode="lines",
        line={"color": GREY, "width": 2},
        hoverinfo="skip",
    )
    dots = [
        go.Scatter(
            x=[100 * pair[place] for pair in ends],
            y=names,
            name=name,
            mode="markers+text",
            marker={"color": colour, "size": 10, "symbol": symbol},
            text=[f" {share((one.median, one.worst)[place])} " for one in ordered],
            textposition=position,
            cliponaxis=False,
            hovertext=[plain(one.worst_case) for one in ordered],
            hovertemplate="%{y}: "
            + name
            + " error %{x:.3g} %"
            + (", %{hovertext}" if place else "")
            + "<extra></extra>",
        )
        for place, (name, colour, symbol, position) in enumerate(
            (("median", BLUE, "circle", "middle left"), ("worst", VERMILION, "diamond", "middle right"))
        )
    ]
    low, high = 100 * min(pair[0] for pair in ends) / 8, 100 * max(pair[1] for pair in ends) * 8
    ticks = [tick for tick in one_two_five(low, high) if tick <= high / 2]
    layout = {
        "xaxis": axis(
            "error, % of measured",
            type="log",
            range=[float(np.log10(low)), float(np.log10(high))],
            tickvals=ticks,
            ticktext=[f"{tick:g}" for tick in ticks],
        ),
        "yaxis": axis("", autorange="reversed"),
        "hovermode": "closest",
    }
    table: dict[str, Any] = {
        "family": [one.family for one in ordered],
        "measured": [one.measurements for one in ordered],
        "median error": [one.median for one in ordered],
        "worst error": [one.worst for one in ordered],
        "worst case": [one.worst_case for one in ordered],
    }
    return Chart(
        name="fit-errors",
        figure=figure([bars, *dots], 90 + 30 * len(ordered), **layout),
        key=(("median", BLUE), ("worst case", VERMILION)),
        table=Table.of(table),
        about="Error of the fit by kernel family: the dot is the median, the diamond the worst case",
    )
