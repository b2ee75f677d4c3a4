"""A sweep: throughput over pairs of fields, what can be had against what, and what each field alone changes."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import plotly.graph_objects as go

from reports.chart import Chart, Table
from reports.figures.shared import figure
from reports.look import BLUE, GREY, ORANGE, SCALE, VERMILION, axis, plain
from reports.sweep import Row, Sweep, field_words, is_number, point_name
from sim.units import GIB, MILLI

MOST_MAPS = 6
MOST_LABELS = 120  # cells; beyond that numbers do not fit theirs


def heat_maps(sweep: Sweep) -> tuple[Chart, ...]:
    """Throughput for every pair of varied fields, the best over the others."""
    pairs = list(combinations(sweep.varied, 2))[:MOST_MAPS]
    return tuple(_heat_map(sweep, down, across, number) for number, (down, across) in enumerate(pairs, 1))


def best_by(rows: Sequence[Row], fields: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    """The fastest row for each combination of ``fields``."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in fields)
        if key not in best or row["tokens_per_s"] > best[key]["tokens_per_s"]:
            best[key] = row
    return best


def _heat_map(sweep: Sweep, down: str, across: str, number: int) -> Chart:
    best = best_by(sweep.feasible, (down, across))
    xs, ys = sweep.values(across), sweep.values(down)
    found = [[best.get((y, x)) for x in xs] for y in ys]
    speeds = [[row["tokens_per_s"] if row else None for row in line] for line in found]
    cells = [[f"{row['tokens_per_s']:,.0f}" if row else "no plan" for row in line] for line in found]
    heat = go.Heatmap(
        x=[plain(x) for x in xs],
        y=[plain(y) for y in ys],
        z=speeds,
        text=cells if len(xs) * len(ys) <= MOST_LABELS else None,
        texttemplate="%{text}" if len(xs) * len(ys) <= MOST_LABELS else None,
        hovertext=[[plain(row.get("plan") or "") if row else "no plan fits" for row in line] for line in found],
        hovertemplate="%{y}, %{x}: %{z:,.4~g} tokens/s<br>%{hovertext}<extra></extra>",
        colorscale=SCALE,
        colorbar={"title": {"text": "tokens/s"}, "thickness": 12, "len": 0.9},
        xgap=2,
        ygap=2,
        hoverongaps=True,
    )
    blanks = [
        {"x": plain(xs[i]), "y": plain(ys[j]), "text": "no plan", "showarrow": False, "font": {"size": 11}}
        for j, line in enumerate(found)
        for i, row in enumerate(line)
        if row is None and len(xs) * len(ys) <= MOST_LABELS
    ]
    layout = {
        "xaxis": axis(plain(field_words(across)), type="category"),
        "yaxis": axis(plain(field_words(down)), type="category"),
        "hovermode": "closest",
        "annotations": blanks,
    }
    rest = ", the best over the rest" if len(sweep.varied) > 2 else ""
    triples = [(y, x, speeds[j][i]) for j, y in enumerate(ys) for i, x in enumerate(xs)]
    columns = zip((down, across, "tokens_per_s"), zip(*triples, strict=True), strict=True)
    return Chart(
        name=f"heat-{number}",
        figure=figure([heat], 130 + 38 * max(3, len(ys)), **layout),
        key=(),
        table=Table.of(dict(columns)),
        about=f"Throughput by {field_words(down)} and {field_words(across)}{rest}",
    )


def frontier(rows: Sequence[Row], cost: str) -> list[Row]:
    """Rows that no other beats in throughput without a larger ``cost``, by rising cost."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["tokens_per_s"])):
        if not best or row["tokens_per_s"] > best[-1]["tokens_per_s"]:
            best.append(row)
    return best


def pareto_charts(sweep: Sweep) -> tuple[Chart, ...]:
    """Throughput against time per token, and against memory for KV (or all of HBM that is used)."""
    wanted = [("pareto-tpot", "tpot_s", "time per output token, ms", 1 / MILLI, "time per output token")]
    memory = (
        "kv_budget_bytes" if all(row.get("kv_budget_bytes") is not None for row in sweep.feasible) else "peak_hbm_bytes"
    )
    named = "KV budget, GiB" if memory == "kv_budget_bytes" else "peak in HBM, GiB"
    wanted.append(("pareto-memory", memory, named, 1 / GIB, "the memory that it takes"))
    usable = [(name, cost, title, scale, words) for name, cost, title, scale, words in wanted if _known(sweep, cost)]
    return tuple(_pareto(sweep, *one) for one in usable)


def _known(sweep: Sweep, cost: str) -> list[Row]:
    return [row for row in sweep.feasible if row.get(cost) is not None]


def _pareto(sweep: Sweep, name: str, cost: str, title: str, scale: float, words: str) -> Chart:
    rows = _known(sweep, cost)
    front = frontier(rows, cost)
    points = go.Scatter(
        x=[row[cost] * scale for row in rows],
        y=[row["tokens_per_s"] for row in rows],
        mode="markers",
        name="every point",
        marker={"color": GREY, "size": 8, "opacity": 0.7},
        text=[plain(point_name(row, sweep.varied)) for row in rows],
        hovertemplate="%{text}<br>%{y:,.4~g} tokens/s, %{x:,.4~g}<extra></extra>",
    )
    line = go.Scatter(
        x=[row[cost] * scale for row in front],
        y=[row["tokens_per_s"] for row in front],
        mode="lines+markers",
        name="not beaten",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        marker={"color": BLUE, "size": 10, "symbol": "diamond"},
        text=[plain(point_name(row, sweep.varied)) for row in front],
        hovertemplate="%{text}<br>%{y:,.4~g} tokens/s, %{x:,.4~g}<extra></extra>",
    )
    layout = {
        "xaxis": axis(title, rangemode="tozero"),
        "yaxis": axis("throughput, tokens/s", rangemode="tozero"),
        "hovermode": "closest",
    }
    on_front = [any(row is one for one in front) for row in rows]
    columns = {field: [row[field] for row in rows] for field in (*sweep.varied, cost, "tokens_per_s")}
    return Chart(
        name=name,
        figure=figure([points, line], 380, **layout),
        key=(("not beaten by any other point", BLUE), ("beaten", GREY)),
        table=Table.of(columns | {"not beaten": on_front}),
        about=f"Throughput against {words}",
    )


def base_row(sweep: Sweep) -> Row:
    """The fastest point: what the sensitivity varies one field at a time from."""
    return max(sweep.feasible, key=lambda row: row["tokens_per_s"])


def sensitivities(sweep: Sweep) -> list[tuple[str, list[Row]]]:
    """For each varied field the rows that differ from the base in it alone, largest reach first."""
    base = base_row(sweep)
    found = []
    for name in sweep.varied:
        others = [one for one in sweep.fields if one != name]
        found.append((name, [row for row in sweep.feasible if all(row[one] == base[one] for one in others)]))
    return sorted(found, key=lambda item: _reach(item[1]), reverse=True)


def _reach(rows: Sequence[Row]) -> float:
    speeds = [row["tokens_per_s"] for row in rows]
    return float(max(speeds) - min(speeds))


def sensitivity(sweep: Sweep) -> Chart:
    """A line for each field, its values as named points."""
    found, best = sensitivities(sweep), base_row(sweep)["tokens_per_s"]
    lines = [
        go.Scatter(
            x=[row["tokens_per_s"] for row in rows],
            y=[plain(field_words(name))] * len(rows),
            mode="lines+markers+text",
            line={"color": GREY, "width": 5},
            marker={"size": 13, "color": [VERMILION if row is base_row(sweep) else ORANGE for row in rows]},
            text=_sparse_labels([(row["tokens_per_s"], _short(row[name])) for row in rows], best),
            textposition="top center",
            cliponaxis=False,
            hovertext=[plain(f"{name} {row[name]}") for row in rows],
            hovertemplate="%{hovertext}: %{x:,.4~g} tokens/s<extra></extra>",
        )
        for name, rows in found
    ]
    layout = {
        "xaxis": axis("throughput, tokens/s", rangemode="tozero", range=[0, 1.08 * best]),
        "yaxis": axis("", type="category", range=[len(found) - 0.6, -0.7]),
        "hovermode": "closest",
    }
    triples = [(name, row[name], row["tokens_per_s"]) for name, rows in found for row in rows]
    columns = zip(("field", "value", "tokens_per_s"), zip(*triples, strict=True), strict=True)
    return Chart(
        name="sensitivity",
        figure=figure(lines, 110 + 64 * len(found), **layout),
        key=(("the fastest point", VERMILION), ("one field changed", ORANGE)),
        table=Table.of(dict(columns)),
        about="What changing one field alone does to the fastest point",
    )


def _sparse_labels(points: list[tuple[float, str]], full: float) -> list[str]:
    """Labels that would overlap one already given are left to the hover."""
    taken: list[float] = []
    labels = []
    for x, text in points:
        free = all(abs(x - other) > 0.08 * full for other in taken)
        labels.append(plain(text) if free else "")
        taken += [x] if free else []
    return labels


def _short(value: Any) -> str:
    text = f"{float(value):g}" if is_number(value) else str(value)
    return text if len(text) <= 14 else f"{text[:13]}…"
