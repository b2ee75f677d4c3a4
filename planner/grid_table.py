"""What ``planner whatif`` answers: a table for people, rows for programs."""

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text as Line

from planner.layout import table
from planner.solution import Blame, Shortage, Tier
from planner.sweep import Figures, Point, Refusal, Text
from sim.units import GIB, format_bytes, format_per_s, format_seconds

_WHOLE = ("batch", "prompt", "output")
_REAL = ("hbm_gib", "host_gib", "link_gb_s", "kv_budget_gib", "sparsity", "max_tpot_ms")
_FIGURES = ("tokens/s", "TTFT", "TPOT", "HBM\nGiB", "host\nGiB", "plan", "lossless\ntokens/s")
_FIELDS_WIDTH = 34  # of columns for fields; beside the figures at least as much is left for the plan
_PLAN = _FIGURES.index("plan")


def grid_table(points: Sequence[Point]) -> RenderableType:
    """One row a point; a column for each given field that varies, or one for all where they would leave too little room."""
    names = [name for name, _ in points[0].values if len({dict(point.values)[name] for point in points}) > 1]
    fields = [[_shown(dict(point.values)[name]) for name in names] for point in points]
    headings = [name.replace("_", "\n") for name in names]
    if _width([headings, *fields]) > _FIELDS_WIDTH:
        headings = ["point"]
        fields = [[_in_words(names, cells)] for cells in fields]
    rows = ((*cells, *_figure_cells(point.outcome)) for cells, point in zip(fields, points, strict=True))
    figures = table((*headings, *_FIGURES), rows, left=(*range(len(headings)), len(headings) + _PLAN))
    profiles = dict.fromkeys(point.outcome.profile for point in points if isinstance(point.outcome, Figures))
    return Group(figures, *([Line(f"profiles: {', '.join(profiles)}")] if profiles else []))


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Characters of a line of columns that hold ``rows``, two between them."""
    columns = zip(*rows, strict=True)
    return sum(2 + max(len(line) for cell in column for line in cell.split("\n")) for column in columns)


def _in_words(names: Sequence[str], cells: Sequence[str]) -> str:
    """Names of things by themselves, numbers with the field's name."""
    pairs = zip(names, cells, strict=True)
    return ", ".join(f"{name} {cell}" if name in (*_WHOLE, *_REAL, "concurrency") else cell for name, cell in pairs)


def point_to_json(point: Point) -> dict[str, Any]:
    """The fields that were given, then the figures, SI units inside; null where there is no plan."""
    outcome = point.outcome
    figures = {name: getattr(outcome, name, None) for name in Figures.__dataclass_fields__}
    feasible = isinstance(outcome, Figures)
    reason = outcome.reason if isinstance(outcome, Refusal) else None
    given = {name: _plain(name, value) for name, value in point.values}
    return {**given, "feasible": feasible, "reason": reason, **figures}


def csv_text(points: Sequence[Point]) -> str:
    """The same rows with a heading; an empty cell where there is nothing."""
    rows = [{name: _cell(value) for name, value in point_to_json(point).items()} for point in points]
    text = StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _figure_cells(outcome: Figures | Refusal) -> tuple[str, ...]:
    if isinstance(outcome, Refusal):
        why = outcome.reason if outcome.shortage is None else _shortage_words(outcome.shortage)
        return ("-", "-", "-", "-", "-", why, "-")
    lossless = outcome.lossless_tokens_per_s
    return (
        format_per_s(outcome.tokens_per_s),
        format_seconds(outcome.ttft_s),
        "-" if outcome.tpot_s is None else format_seconds(outcome.tpot_s),
        f"{outcome.peak_hbm_bytes / GIB:.1f}",
        f"{outcome.peak_host_bytes / GIB:.1f}",
        outcome.plan,
        "-" if lossless is None else format_per_s(lossless),
    )


def _shortage_words(shortage: Shortage) -> str:
    if shortage.tier is None:
        return "no plan fits: too slow"
    memory = {Tier.HBM: "HBM", Tier.HOST: "host memory"}[shortage.tier]
    blame = "KV" if shortage.blame is Blame.KV else shortage.blame.value
    return f"no plan fits: {memory} {format_bytes(shortage.missing_bytes)} short ({blame})"


def _shown(value: Text) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _plain(name: str, value: Text) -> Any:
    if isinstance(value, bool):
        return value
    text = _shown(value)
    if name in _WHOLE or (name == "concurrency" and text not in ("auto", "all")):
        return int(text)
    return float(text) if name in _REAL else text


def _cell(value: Any) -> Any:
    """Truth values as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else value
