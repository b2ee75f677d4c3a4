"""Simulated against measured: every step beside its prediction, and totals by kind of work with their errors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from reports.chart import Chart, Table, thinned
from reports.figures.homes import step_title
from reports.figures.shared import figure, merged, phase_marks, room_for_text
from reports.look import GREY, SERIES, axis, distance, one_two_five, plain
from reports.study import Run, Study
from reports.timeline import LANES, kind_of
from sim.counts import Column
from sim.trace import Resource, WaveTrace
from sim.units import MILLI


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Step durations of a measured run, the mean of its full waves, beside those that were simulated, [step]."""

    run: Run
    simulated_s: Column
    measured_s: Column

    @property
    def errors(self) -> Column:
        """Measured relative to simulated, less one."""
        error: Column = self.measured_s / self.simulated_s - 1
        return error

    @property
    def worst_step(self) -> int:
        return int(np.argmax(np.abs(self.errors)))


def pairs_of(study: Study) -> list[Pair]:
    """One for each measured run; steps that only one of the two has are left out."""
    sequences = study.priced.waves[0].sequences
    simulated = step_durations([study.simulated.wave_like(sequences)])
    pairs = []
    for run in study.measured:
        waves = [wave for wave in run.trace.waves if wave.sequences == sequences] or [run.trace.waves[0]]
        measured = step_durations(waves)
        steps = min(len(simulated), len(measured))
        pairs.append(Pair(run=run, simulated_s=simulated[:steps], measured_s=measured[:steps]))
    return pairs


def step_durations(waves: list[WaveTrace]) -> Column:
    """Seconds of each step, the mean over ``waves``, [step]."""
    steps = min(len(wave.step_end_s) for wave in waves)
    each = [np.diff(wave.step_end_s[:steps], prepend=0.0) for wave in waves]
    mean: Column = np.mean(each, axis=0)
    return mean


def steps_measured(study: Study, pairs: list[Pair]) -> Chart:
    """Both over the steps; the prefill stands in the parity plot."""
    first = 1 if len(pairs[0].simulated_s) > 1 else 0
    shown = thinned(min(len(pair.simulated_s) for pair in pairs))[first:]
    runs = [("simulated", pairs[0].simulated_s, GREY, "dash")]
    runs += [(pair.run.name, pair.measured_s, colour, "solid") for pair, colour in zip(pairs, SERIES, strict=False)]
    traces = [
        go.Scatter(
            x=shown,
            y=seconds[shown] / MILLI,
            name=plain(name),
            mode="lines",
            line={"color": colour, "width": 2, "dash": dash},
            hovertemplate="%{y:,.4~g} ms",
        )
        for name, seconds, colour, dash in runs
    ]
    layout = {
        "xaxis": axis(step_title(study.plan, of_machine=True)),
        "yaxis": axis("time of the step, ms", rangemode="tozero"),
        **merged(phase_marks(study.plan)),
    }
    table: dict[str, Any] = {f"{name}, s": seconds[shown] for name, seconds, _, _ in runs}
    return Chart(
        name="steps-measured",
        figure=figure(traces, 320, **layout),
        key=tuple((f"{name} (dashed)" if dash == "dash" else name, colour) for name, _, colour, dash in runs),
        table=Table.of({"step": shown, **table}),
        about="Time of each step, simulated and measured",
    )


def parity(pairs: list[Pair]) -> Chart:
    """Each step a point; on the diagonal the prediction is right. Both axes are logarithmic: the prefill is far out."""
    low = min(float(min(pair.simulated_s.min(), pair.measured_s.min())) for pair in pairs) / MILLI
    high = max(float(max(pair.simulated_s.max(), pair.measured_s.max())) for pair in pairs) / MILLI
    ends = np.array([low / 1.15, high * 1.15])
    points = [
        go.Scatter(
            x=pair.simulated_s / MILLI,
            y=pair.measured_s / MILLI,
            name=plain(pair.run.name),
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.6},
            customdata=np.arange(len(pair.simulated_s)),
            hovertemplate="step %{customdata}: simulated %{x:,.4~g} ms, measured %{y:,.4~g} ms<extra></extra>",
        )
        for pair, colour in zip(pairs, SERIES, strict=False)
    ]
    equal = go.Scatter(
        x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"}, name="equal", hoverinfo="skip"
    )
    span = [float(np.log10(end)) for end in ends]
    ticks = one_two_five(float(ends[0]), float(ends[1]))
    scale = {"type": "log", "range": span, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    at = span[0] + 0.06 * (span[1] - span[0])
    label = {"x": at, "y": at, "xanchor": "left", "yanchor": "top", "text": "equal", "showarrow": False}
    layout = {
        "xaxis": axis("simulated, ms", **scale),
        "yaxis": axis("measured, ms", **scale),
        "hovermode": "closest",
        "annotations": [label],
    }
    table: dict[str, Any] = {
        "run": [pair.run.name for pair in pairs for _ in pair.simulated_s],
        "step": [step for pair in pairs for step in range(len(pair.simulated_s))],
        "simulated, s": np.concatenate([pair.simulated_s for pair in pairs]),
        "measured, s": np.concatenate([pair.measured_s for pair in pairs]),
    }
    return Chart(
        name="parity",
        figure=figure([equal, *points], 380, **layout),
        key=tuple((pair.run.name, colour) for pair, colour in zip(pairs, SERIES, strict=False)),
        table=Table.of(table),
        about="Each step's measured time against its simulated time",
    )


def family_seconds(run: Run) -> dict[str, float]:
    """Busy seconds of the whole work by kind of work and stream; all kernels of the GPU together where only steps are known."""
    spent: dict[str, float] = defaultdict(float)
    for wave in run.trace.waves:
        for span in wave.spans:
            on_gpu = span.resource is Resource.GPU
            kind = f"GPU: {kind_of(span)}" if on_gpu else LANES[span.resource]
            for name in (kind, "GPU in all") if on_gpu else (kind,):
                spent[name] += wave.repeats * (span.end_s - span.start_s)
    return {name: seconds for name, seconds in spent.items() if seconds > 0}


def worst_error(name: str, simulated: Mapping[str, float], measured: Sequence[Mapping[str, float]]) -> float:
    """The largest distance of any run from the simulated one."""
    return max((abs(run[name] / simulated[name] - 1) for run in measured if name in run), default=0.0)


def family_errors(study: Study) -> Chart:
    """Measured over simulated, less one, for each kind of work that both know."""
    simulated = family_seconds(study.simulated)
    found = [(run, family_seconds(run)) for run in study.measured]
    names = [name for name in simulated if any(name in seconds for _, seconds in found)]
    names.sort(key=lambda name: -worst_error(name, simulated, [seconds for _, seconds in found]))
    bars = [
        go.Bar(
            x=[100 * (seconds[name] / simulated[name] - 1) if name in seconds else None for name in names],
            y=[plain(name) for name in names],
            name=plain(run.name),
            orientation="h",
            marker={"color": colour},
            text=[distance(seconds[name] / simulated[name]) if name in seconds else "" for name in names],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:+.2f} %<extra></extra>",
        )
        for (run, seconds), colour in zip(found, SERIES, strict=False)
    ]
    errors = [abs(x) for bar in bars for x in bar.x if x is not None] or [0.0]
    reach = max(*errors, 1.0)
    layout = {
        "xaxis": axis("error, %", range=[-1.4 * reach, 1.4 * reach], zeroline=True, zerolinecolor=GREY),
        "yaxis": axis("", autorange="reversed"),
        "hovermode": "closest",
        "barmode": "group",
        "meta": room_for_text(reach, 62, both_ways=True),
        "bargap": 0.3,
    }
    table: dict[str, Any] = {"work": names, "simulated, s": [simulated[name] for name in names]}
    return Chart(
        name="family-errors",
        figure=figure(bars, 100 + 34 * len(names) * max(1, len(bars)), **layout),
        key=tuple((run.name, colour) for (run, _), colour in zip(found, SERIES, strict=False))
        if len(found) > 1
        else (),
        table=Table.of(table | {f"{run.name}, s": [seconds.get(name) for name in names] for run, seconds in found}),
        about="Error of the prediction by kind of work: above zero, measured took longer",
    )
