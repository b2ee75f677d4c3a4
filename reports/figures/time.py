"""Where the time goes: each step's seconds by what they are spent on, and the totals of all waves."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from reports.chart import Chart, Table, thinned
from reports.figures.homes import step_title, whose
from reports.figures.shared import (
    HATCHING,
    band_names,
    figure,
    hatch,
    merged,
    phase_marks,
    room_for_text,
    stacked,
    used,
)
from reports.look import WORK_COLOURS, axis, plain
from reports.study import Study
from sim.breakdown import breakdown, totals
from sim.counts import Column
from sim.plan import Admission
from sim.units import MILLI, format_seconds


def step_times(study: Study) -> Chart:
    """Decode steps of the full wave, stacked; the prefill would dwarf them and stands in the totals."""
    plan, wave = study.plan, study.priced.waves[0]
    steps = len(wave.step_s)
    first = 0 if steps == 1 or plan.setting.admission is Admission.CONTINUOUS else 1
    shown = thinned(steps, [phase.first_step for phase in plan.phases])
    shown = shown[shown >= first]
    spent = breakdown(plan.setting, wave)
    bands = used({kind: seconds[shown] / MILLI for kind, seconds in spent.items()})
    longest, top = float(wave.step_s[shown].max()), _top(wave.step_s[shown])
    names = band_names(shown, bands, WORK_COLOURS, top)
    layout = {
        "xaxis": axis(step_title(plan, of_machine=True)),
        "yaxis": axis("time of the step, ms", range=[0, top]),
        **merged(phase_marks(plan), names),
    }
    return Chart(
        name="step-times",
        figure=figure(stacked(shown, bands, WORK_COLOURS, "ms"), 360, **layout),
        key=tuple((kind, WORK_COLOURS[kind]) for kind in reversed(bands)),
        table=Table.of(
            {"step": shown, "step, s": wave.step_s[shown]}
            | {f"{kind}, s": values[shown] for kind, values in spent.items()}
        ),
        about=f"Time of each step{whose(plan)} by what it is spent on"
        + (f"; the longest, {format_seconds(longest)}, is cut off" if longest / MILLI > top else ""),
    )


def _top(step_s: Column) -> float:
    """Milliseconds that the axis reaches: the longest step, unless a few prefills would flatten all others."""
    usual, longest = float(np.quantile(step_s, 0.97)), float(step_s.max())
    return 1.05 * (longest if longest < 3 * usual else 1.4 * usual) / MILLI


def total_seconds(study: Study) -> dict[str, float]:
    """Seconds of the whole work by what they are spent on, every wave and every prefill counted; largest first."""
    setting = study.plan.setting
    spent: dict[str, float] = {}
    for wave in study.priced.waves:
        repeats = setting.wave_sizes.count(wave.sequences)
        for kind, seconds in totals(setting, wave).items():
            spent[kind] = spent.get(kind, 0.0) + repeats * seconds
    return dict(sorted(((kind, s) for kind, s in spent.items() if s > 0), key=lambda item: -item[1]))


def time_totals(spent: Mapping[str, float]) -> Chart:
    """One bar for each thing that time is spent on."""
    kinds, whole = list(spent), sum(spent.values())
    bars = go.Bar(
        x=np.array([spent[kind] for kind in kinds]),
        y=[plain(kind) for kind in kinds],
        orientation="h",
        marker={
            "color": [WORK_COLOURS[kind] for kind in kinds],
            "pattern": {
                "shape": [hatch(kind) for kind in kinds],
                "fillmode": "overlay",
                "fgcolor": HATCHING,
                "size": 7,
                "solidity": 0.2,
            },
        },
        text=[f"{format_seconds(spent[kind])}, {100 * spent[kind] / whole:.0f} %" for kind in kinds],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:,.4~g} s<extra></extra>",
    )
    layout = {
        "xaxis": axis("seconds of the whole work", range=[0, 1.35 * max(spent.values())]),
        "meta": room_for_text(max(spent.values()), 95),
        "yaxis": axis("", autorange="reversed"),
        "hovermode": "closest",
        "bargap": 0.3,
    }
    return Chart(
        name="time-totals",
        figure=figure([bars], 90 + 34 * len(kinds), **layout),
        key=(),
        table=Table.of({"spent on": kinds, "seconds": [spent[kind] for kind in kinds]}),
        about="Seconds of the whole work by what they are spent on",
    )
