"""What several figures draw: stacked areas that name themselves, phase boundaries, capacities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from reports.chart import Steps
from reports.look import base_layout, ink_on, plain
from sim.counts import Column
from sim.plan import Admission, Plan

PHASE_NAMES = {"gpu": "all in HBM", "gpu_cpu": "HBM and host", "recompute": "recomputation"}
HATCHING = "#ffffff"
_NAMED_FROM = 0.09  # of the axis: a thinner band has no room for its name


def figure(traces: Sequence[Any], height_px: int, **layout: Any) -> Any:
    """A plotly figure in the common look."""
    return go.Figure(data=list(traces), layout=base_layout(height_px) | layout)


def stacked(x: Steps, bands: Mapping[str, Column], colours: Mapping[str, str], unit: str) -> list[Any]:
    """Areas on top of each other, the first one at the bottom."""
    return [
        go.Scatter(
            x=x,
            y=values,
            name=plain(name),
            stackgroup="all",
            mode="lines",
            line={"width": 0.5, "color": colours[name]},
            fillcolor=colours[name],
            fillpattern={
                "shape": hatch(name),
                "bgcolor": colours[name],
                "fgcolor": HATCHING,
                "size": 7,
                "solidity": 0.2,
            },
            hovertemplate=f"%{{y:,.4~g}} {unit}",
        )
        for name, values in bands.items()
    ]


def hatch(name: str) -> str:
    """Waiting is no work: it is hatched, so that colour alone need not tell them apart."""
    return "/" if name.startswith("waiting") else ""


def band_names(x: Steps, bands: Mapping[str, Column], colours: Mapping[str, str], top: float) -> dict[str, list[Any]]:
    """A label inside each band at its thickest place, where it is thick enough for one."""
    floor, labels = np.zeros(len(x)), []
    inner = slice(len(x) // 6, max(len(x) // 6 + 1, len(x) - len(x) // 6))
    for name, values in bands.items():
        at = inner.start + int(np.argmax(values[inner]))
        if values[at] >= _NAMED_FROM * top and len(x) > 3:
            labels.append(
                {
                    "x": float(x[at]),
                    "y": float(floor[at] + values[at] / 2),
                    "xanchor": "left" if 3 * at < len(x) else "right" if 3 * at > 2 * len(x) else "center",
                    "text": plain(name),
                    "showarrow": False,
                    "font": {"color": ink_on(colours[name]), "size": 12},
                    "bgcolor": colours[name] if hatch(name) else None,
                }
            )
        floor = floor + values
    return {"shapes": [], "annotations": labels}


def phase_marks(plan: Plan) -> dict[str, list[Any]]:
    """Shapes and annotations where a phase begins; none where sequences enter one by one, each with phases of its own."""
    starts = [phase for phase in plan.phases if phase.first_step > 0]
    if plan.setting.admission is Admission.CONTINUOUS:
        return {"shapes": [], "annotations": []}
    line = {"color": "#8a8f98", "width": 1, "dash": "dash"}
    shapes = [
        {"type": "line", "x0": p.first_step, "x1": p.first_step, "y0": 0, "y1": 1, "yref": "paper", "line": line}
        for p in starts
    ]
    last = plan.homes.steps - 1
    names = [
        {
            "x": p.first_step,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "xanchor": "left" if p.first_step < 0.6 * last else "right",
            "text": f"from step {p.first_step}: {PHASE_NAMES[p.name]}",
            "showarrow": False,
            "font": {"size": 11},
        }
        for p in starts
    ]
    return {"shapes": shapes, "annotations": names}


def capacity(value: float, text: str, *, yref: str = "y", xref: str = "paper") -> dict[str, list[Any]]:
    """A line at ``value`` across the figure, with its name above it."""
    line = {"color": "#d55e00", "width": 1.5, "dash": "dot"}
    shape = {"type": "line", "x0": 0, "x1": 1, "xref": xref, "y0": value, "y1": value, "yref": yref, "line": line}
    name = {
        "x": 1,
        "xref": xref,
        "xanchor": "right",
        "y": value,
        "yref": yref,
        "yanchor": "bottom",
        "text": plain(text),
        "showarrow": False,
        "font": {"size": 12},
    }
    return {"shapes": [shape], "annotations": [name]}


def merged(*marks: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Shapes and annotations of several."""
    return {kind: [one for mark in marks for one in mark[kind]] for kind in ("shapes", "annotations")}


def room_for_text(reach: float, pixels: int, *, both_ways: bool = False) -> dict[str, Any]:
    """How far bars reach, and how many pixels their labels need beyond that: the page sets the range by its width."""
    return {"reach": reach or 1.0, "room": pixels, "both_ways": both_ways}


def used(bands: Mapping[str, Column]) -> dict[str, Column]:
    """Without the bands that are empty all along."""
    return {name: values for name, values in bands.items() if values.any()}
