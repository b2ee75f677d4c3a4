"""Plans that were run to test the predictions: each beside what was predicted, and how far off it was."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from reports.chart import Chart, Table
from reports.figures.shared import figure, room_for_text
from reports.look import BLUE, GREY, VERMILION, axis, distance, one_two_five, plain
from sim.verdict import Judged, Verdict, by_stratum

BOUND_BY = {
    "weights": "weights",
    "kv_reads": "reading KV",
    "link": "the host link",
    "launch": "launches and choices",
    "recompute": "recomputation",
}
_PANEL_PX = 170


def short(recipe: str) -> tuple[str, str]:
    """A plan's model and work, and what is particular about it."""
    words = dict(word.split("=", 1) for word in recipe.split())
    batch, concurrency = words.get("batch"), words.pop("concurrency", "")
    work = f"{words.pop('batch', '?')} x ({words.pop('prompt', '?')} + {words.pop('output', '?')})"
    name = f"{words.pop('model', '?')}, {work}"
    said = {
        "selector": "{}",
        "keep": "keeps {} %",
        "kv": "{} KV",
        "hbm": "{} % in HBM",
        "recompute": "recomputes {}",
        "admission": "{} admission",
        "weights": "{} weights",
        "streamed": "{} % of the weights streamed",
    }
    rest = [text.format(words[word].replace("_", " ")) for word, text in said.items() if word in words]
    waves = [f"{concurrency} at once"] if concurrency not in ("", batch) else []
    return name, ", ".join([*waves, *rest])


def campaign_parity(verdict: Verdict) -> Chart:
    """A panel for what the plans' time is mostly spent on; on the dotted line the prediction is right."""
    groups = by_stratum(verdict.plans)[1:]
    seconds = [one.makespan_s for plan in verdict.plans for one in (plan.simulated, plan.measured)]
    low, high = min(seconds) / 1.4, max(seconds) * 1.4
    span, ticks = [float(np.log10(low)), float(np.log10(high))], one_two_five(low, high)
    scale = {"type": "log", "range": span, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    traces: list[Any] = []
    annotations: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"hovermode": "closest", "annotations": annotations}
    for place, (stratum, members) in enumerate(groups):
        suffix = "" if place == 0 else str(place + 1)
        top = 1 - place / len(groups)
        last = place == len(groups) - 1
        x_axis = axis("predicted makespan, s" if last else "", **scale, anchor=f"y{suffix}", showticklabels=last)
        layout[f"xaxis{suffix}"] = x_axis | ({} if place == 0 else {"matches": "x"})
        domain = [top - 0.86 / len(groups), top]
        layout[f"yaxis{suffix}"] = axis("measured, s", **scale, anchor=f"x{suffix}", domain=domain)
        traces += _panel(members, (low, high), suffix)
        plans = f"{len(members)} plan{'s' if len(members) > 1 else ''}"
        annotations.append(
            {
                "x": 0.02,
                "xref": "paper",
                "xanchor": "left",
                "y": 0.97 * span[1] + 0.03 * span[0],
                "yref": f"y{suffix}",
                "yanchor": "top",
                "showarrow": False,
                "align": "left",
                "text": f"<b>{BOUND_BY[stratum]}</b>, {plans}<br>worst {distance(1 + members[0].makespan)}",
            }
        )
    return Chart(
        name="campaign-parity",
        figure=figure(traces, 60 + _PANEL_PX * len(groups), **layout),
        key=(),
        table=_table(verdict),
        about="Measured against predicted makespan, by what a plan's time is mostly spent on; dotted: equal; "
        "diamond: the worst of its kind",
    )


def _panel(members: Sequence[Judged], ends: tuple[float, float], suffix: str) -> list[Any]:
    """The worst one is told apart by shape and by name."""
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    worst = [place == 0 for place in range(len(members))]
    return [
        go.Scatter(
            x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot", "width": 1}, hoverinfo="skip", **axes
        ),
        go.Scatter(
            x=[one.simulated.makespan_s for one in members],
            y=[one.measured.makespan_s for one in members],
            mode="markers",
            marker={
                "color": [VERMILION if one else BLUE for one in worst],
                "symbol": ["diamond" if one else "circle" for one in worst],
                "size": [11 if one else 8 for one in worst],
            },
            hovertext=[f"{plain(one.recipe)}<br>error {distance(1 + one.makespan)}" for one in members],
            hovertemplate="%{hovertext}<br>predicted %{x:,.4~g} s, measured %{y:,.4~g} s<extra></extra>",
            cliponaxis=False,
            **axes,
        ),
    ]


def campaign_errors(verdict: Verdict) -> Chart:
    """Every plan, the worst first."""
    plans = verdict.plans
    names = [f"{plain(name)}<br><i>{plain(rest)}</i>" for name, rest in (short(one.recipe) for one in plans)]
    above = {"xref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom", "align": "left", "showarrow": False}
    labels = [{**above, "y": row - 0.15, "text": name, "font": {"size": 11}} for row, name in enumerate(names)]
    rows = list(range(len(plans)))  # plans may share a short name
    bars = go.Bar(
        x=[100 * one.makespan for one in plans],
        y=rows,
        orientation="h",
        marker={"color": BLUE},
        text=[distance(1 + one.makespan) for one in plans],
        textposition="outside",
        cliponaxis=False,
        hovertext=[f"{plain(one.recipe)}<br>{plain(one.explained_by)}" for one in plans],
        hovertemplate="%{hovertext}<br>%{x:+.2f} %<extra></extra>",
    )
    reach = max(1.0, *(abs(100 * one.makespan) for one in plans))
    layout = {
        "xaxis": axis("error of makespan, %", range=[-1.4 * reach, 1.4 * reach], zeroline=True, zerolinecolor=GREY),
        "yaxis": axis("", range=[len(plans) - 0.5, -0.8], showticklabels=False, showgrid=False),
        "hovermode": "closest",
        "meta": room_for_text(reach, 62, both_ways=True),
        "bargap": 0.72,
        "annotations": labels,
    }
    return Chart(
        name="campaign-errors",
        figure=figure([bars], 80 + 54 * len(plans), **layout),
        key=(),
        table=_table(verdict),
        about="Error of the predicted makespan by plan: above zero, less time was needed than predicted",
    )


def _table(verdict: Verdict) -> Table:
    plans = verdict.plans
    return Table.of(
        {
            "plan": [one.recipe for one in plans],
            "mostly spent on": [str(one.stratum) for one in plans],
            "predicted makespan, s": [one.simulated.makespan_s for one in plans],
            "measured makespan, s": [one.measured.makespan_s for one in plans],
            "error of makespan": [one.makespan for one in plans],
            "error of TTFT": [one.ttft for one in plans],
            "error of median TPOT": [one.tpot_p50 for one in plans],
            "explained by": [one.explained_by for one in plans],
        }
    )
