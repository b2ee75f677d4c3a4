"""Where the KV lives: tokens of a sequence by home, and bytes of each memory, over the steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from reports.chart import Chart, Steps, Table, thinned
from reports.figures.shared import band_names, capacity, figure, merged, phase_marks, stacked, used
from reports.look import BLUE, GREY, HOME_COLOURS, ORANGE, PINK, SKY, axis
from reports.study import Study
from sim.counts import Column
from sim.flows import home_columns
from sim.footprint import resident_weight_bytes
from sim.forecast import setting_workspace_bytes, static_host_bytes
from sim.plan import Admission, Plan
from sim.units import GIB, format_bytes

FLATTENS = 2.5  # times what is used: a line so far above it would leave the rest flat
BYTE_COLOURS = {
    "weights": GREY,
    "workspace": SKY,
    "KV and selection state": BLUE,
    "KV": ORANGE,
    "streamed weights": GREY,
}


def token_homes(plan: Plan) -> Chart:
    """Tokens of one sequence by home. Copies are in HBM as well, so they are a line and no band."""
    homes = home_columns(plan.homes)
    shown = thinned(plan.homes.steps, [phase.first_step for phase in plan.phases])
    # The newest are the innermost: HBM lies at the top, as if tokens sank outward.
    bands = {
        "dropped": homes.dropped[shown],
        "layer inputs": homes.activations[shown],
        "host memory": homes.host_kv[shown],
        "HBM": homes.hbm[shown],
    }
    drawn = used(bands)
    traces = stacked(shown, drawn, HOME_COLOURS, "tokens")
    if homes.copies.any():
        traces.append(_copies(shown, homes.copies[shown]))
    top = float(plan.setting.workload.cached_tokens)
    names = band_names(shown, drawn, HOME_COLOURS, top)
    layout = {
        "xaxis": axis(step_title(plan)),
        "yaxis": axis("tokens of one sequence", rangemode="tozero"),
        **merged(phase_marks(plan), names),
    }
    key = tuple((name, HOME_COLOURS[name]) for name in reversed(drawn))
    return Chart(
        name="token-homes",
        figure=figure(traces, 340, **layout),
        key=(*key, *((("copies in HBM of tokens at home elsewhere", PINK),) if homes.copies.any() else ())),
        table=Table.of({"step": shown, **_headed(bands), "copies in HBM, tokens": homes.copies[shown]}),
        about="Tokens of one sequence by where they are at home, over the steps",
    )


def tier_bytes(study: Study) -> tuple[Chart, ...]:
    """Bytes in HBM and in host memory while a full wave runs, each against what there is."""
    setting, held = study.plan.setting, study.priced.waves[0].load.held
    weights = resident_weight_bytes(setting.model, setting.dtype, setting.weight_format, setting.weights_on_host)
    workspace = setting_workspace_bytes(setting)
    steps = len(held.hbm)
    hbm = {
        "weights": np.full(steps, float(weights)),
        "workspace": np.full(steps, float(workspace)),
        "KV and selection state": held.hbm,
    }
    host = {"streamed weights": np.full(steps, float(static_host_bytes(setting))), "KV": held.host}
    gpu, dram = setting.machine.gpu, setting.machine.host
    limits = [(weights + workspace + setting.kv_budget_bytes, "room for KV ends"), (gpu.hbm_bytes, "HBM")]
    charts = [_tier(study.plan, "hbm-bytes", "HBM", hbm, limits)]
    if any(values.any() for values in host.values()):
        charts.append(_tier(study.plan, "host-bytes", "host memory", host, [(dram.usable_bytes, "may be pinned")]))
    return tuple(charts)


def whose(plan: Plan) -> str:
    """Whose steps a figure shows, where that must be said."""
    if plan.setting.admission is Admission.CONTINUOUS:
        return " of the machine"
    return " of a full wave" if len(plan.setting.wave_sizes) > 1 else ""


def step_title(plan: Plan, *, of_machine: bool = False) -> str:
    """What the horizontal axis counts."""
    if plan.setting.admission is Admission.CONTINUOUS:
        return "step of the machine" if of_machine else "output token (0: the prefill)"
    return "decode step (0: the prefill)"


def _tier(plan: Plan, name: str, memory: str, bands: dict[str, Column], limits: Sequence[tuple[float, str]]) -> Chart:
    shown = thinned(len(next(iter(bands.values()))), [phase.first_step for phase in plan.phases])
    drawn = used({kind: values[shown] / GIB for kind, values in bands.items()})
    full = float(sum(values for values in drawn.values()).max())  # type: ignore[union-attr]
    # A line far above what is used would flatten it: it is said instead.
    near = [(size / GIB, f"{text}: {format_bytes(size)}") for size, text in limits if size / GIB <= FLATTENS * full]
    top = max([full, *(size for size, _ in near)]) * 1.12
    names = band_names(shown, drawn, BYTE_COLOURS, top)
    layout = {
        "xaxis": axis(step_title(plan, of_machine=True)),
        "yaxis": axis(f"{memory}, GiB", range=[0, top]),
        **merged(phase_marks(plan), names, *(capacity(size, text) for size, text in _apart(near, top))),
    }
    return Chart(
        name=name,
        figure=figure(stacked(shown, drawn, BYTE_COLOURS, "GiB"), 300, **layout),
        key=tuple((kind, BYTE_COLOURS[kind]) for kind in reversed(drawn)),
        table=Table.of({"step": shown} | {f"{kind}, bytes": values[shown] for kind, values in bands.items()}),
        about=f"Bytes in {memory} over the steps{whose(plan)}{_beyond(limits, full)}",
    )


def _beyond(limits: Sequence[tuple[float, str]], full: float) -> str:
    """Capacities that the picture has no room for."""
    far = [f"{text}: {format_bytes(size)}" for size, text in limits if size / GIB > FLATTENS * full]
    return f"; beyond the picture, {'; '.join(far)}" if far else ""


def _apart(limits: Sequence[tuple[float, str]], top: float) -> list[tuple[float, str]]:
    """A label closer than a line of text to the one above joins it."""
    kept: list[tuple[float, str]] = []
    for size, text in sorted(limits, reverse=True):
        if kept and kept[-1][0] - size < 0.09 * top:
            kept[-1] = (kept[-1][0], f"{kept[-1][1]}; {text}")
            text = ""
        kept.append((size, text))
    return kept


def _copies(shown: Steps, copies: Column) -> Any:
    return go.Scatter(
        x=shown,
        y=copies,
        name="copies in HBM",
        mode="lines",
        line={"color": PINK, "width": 2, "dash": "dash"},
        hovertemplate="%{y:,.4~g} tokens",
    )


def _headed(bands: dict[str, Column]) -> dict[str, Column]:
    return {f"{name}, tokens": values for name, values in reversed(bands.items())}
