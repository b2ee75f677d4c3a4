"""Every span of a run, packed for the page: columns of small whole numbers, deflated. The page draws what is in view.

Gaps and durations are whole nanoseconds, so that nothing adds up to an error.
"""

import base64
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from reports.look import SPAN_COLOURS
from reports.study import Study
from sim.breakdown import GPU_WORK, OUTPUT_LAYER
from sim.trace import Resource, Span, WaveTrace

UNIT_S = 1e-9
MOST_BYTES = 700_000  # of all runs together, as text; simulated spans take about one byte each, measured ones eight
LANES = {
    Resource.GPU: "GPU stream",
    Resource.H2D: "copy to GPU",
    Resource.D2H: "copy to host",
    Resource.CPU: "CPU",
    Resource.LAUNCH: "launches",
}
_KINDS = list(SPAN_COLOURS)
_OF_RESOURCE = {
    Resource.H2D: "fetch",
    Resource.D2H: "write-back",
    Resource.CPU: "attention on the CPU",
    Resource.LAUNCH: "launches by the host",
}


def timeline_data(study: Study) -> dict[str, Any]:
    """All runs, simulated first, with the phases to jump to; as many steps of those that are wanted as there is room for."""
    sequences = study.priced.waves[0].sequences
    runs = (study.simulated, *study.measured)
    waves = [run.wave_like(sequences) for run in runs]
    first, last = _wanted(waves, study.drawn_steps)
    packed = [_packed(run.name, wave, first, last) for run, wave in zip(runs, waves, strict=True)]
    while last > first and (size := _size_bytes(packed)) > MOST_BYTES:
        last = first + min(last - first - 1, int((last - first) * 0.95 * MOST_BYTES / size))
        packed = [_packed(run.name, wave, first, last) for run, wave in zip(runs, waves, strict=True)]
    return {
        "runs": packed,
        "kinds": [{"name": kind, "colour": colour} for kind, colour in SPAN_COLOURS.items()],
        "first_step": first,
        "last_step": last,
        "phases": [{"name": phase.name.value, "step": phase.first_step} for phase in study.plan.phases],
    }


def _wanted(waves: Sequence[WaveTrace], wanted: tuple[int, int] | None) -> tuple[int, int]:
    """First and last step, as far as every run has them; all unless some are asked for."""
    last = min(len(wave.step_end_s) for wave in waves) - 1
    return (0, last) if wanted is None else (min(wanted[0], last), min(wanted[1], last))


def _size_bytes(packed: Sequence[dict[str, Any]]) -> int:
    return sum(len(lane["packed"]) for run in packed for lane in run["lanes"])


def kind_of(span: Span) -> str:
    """What a span is called in colours: a kind of GPU work, or what crosses the link."""
    return _kind(span.resource, span.name, span.layer is None)


@lru_cache(maxsize=1024)
def _kind(resource: Resource, name: str, in_no_layer: bool) -> str:
    if resource in _OF_RESOURCE:
        return _OF_RESOURCE[resource]
    if name == "head":
        return OUTPUT_LAYER
    if not in_no_layer and name in ("layer", "query", "attend", "rest"):
        return "a layer"
    return next((kind for kind, names in GPU_WORK.items() if name in names), "other")


def _packed(name: str, wave: WaveTrace, first: int, last: int) -> dict[str, Any]:
    drawn = [span for span in wave.spans if first <= span.step <= last and span.end_s > span.start_s]
    names = sorted({(span.name, _KINDS.index(kind_of(span))) for span in drawn})
    places = {pair: place for place, pair in enumerate(names)}
    lanes = [(which, [span for span in drawn if span.resource is which]) for which in Resource]
    return {
        "name": name,
        "step_end_s": list(wave.step_end_s[: last + 1]),
        "names": [{"name": one, "kind": kind} for one, kind in names],
        "lanes": [
            {"name": LANES[which], "stream": which.value} | _lane(spans, places)
            for which, spans in lanes
            if spans or which not in (Resource.CPU, Resource.LAUNCH)
        ],
    }


def _lane(spans: list[Span], places: dict[tuple[str, int], int]) -> dict[str, Any]:
    spans = sorted(spans, key=lambda span: (span.start_s, span.end_s))
    start_s, end_s = (np.array([getattr(span, name) for span in spans]) for name in ("start_s", "end_s"))
    starts, ends = np.rint(start_s / UNIT_S), np.rint(end_s / UNIT_S)
    before = np.concatenate([[0.0], ends[:-1]]) if len(ends) else ends
    columns = (  # widest first, so that each is aligned in the page's buffer
        np.array([span.size_bytes for span in spans], dtype="<f8"),
        (starts - before).astype("<f8"),
        (ends - starts).astype("<f8"),
        np.array([span.step for span in spans], dtype="<i4"),
        np.array([-1 if span.layer is None else span.layer for span in spans], dtype="<i2"),
        np.array([places[span.name, _KINDS.index(kind_of(span))] for span in spans], dtype="<u2"),
    )
    packed = zlib.compress(b"".join(column.tobytes() for column in columns), 6)
    return {"spans": len(spans), "unit_s": UNIT_S, "packed": base64.b64encode(packed).decode("ascii")}
