"""A comparison for people: lossless policies first, then those that change the output, footnotes below."""

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from planner.compare import Row, best_outcomes
from planner.layout import sections, table
from planner.request import Request
from planner.wording import question_text
from sim.outcome import Outcome
from sim.units import GIB, MILLI


def comparison(rows: Sequence[Row], request: Request) -> RenderableType:
    """What ``planner compare`` prints."""
    best = dict(best_outcomes(list(rows)))
    lossless = [row for row in rows if row.feasible and row.lossless]
    lossy = [row for row in rows if row.feasible and not row.lossless]
    notes = [Text(f"{number}  {row.footnote}") for number, row in enumerate(rows, 1)]
    numbers = {row.policy: number for number, row in enumerate(rows, 1)}
    misfits = [Text(f"{row.policy} [{numbers[row.policy]}]: {row.reason}") for row in rows if not row.feasible]
    return sections(
        (question_text(request), []),
        *(
            [("Lossless: the output is that of dense attention", [_table(lossless, numbers, best.get(True))])]
            if lossless
            else []
        ),
        *([("Not lossless: each changes the output", [_table(lossy, numbers, best.get(False))])] if lossy else []),
        *([("Do not fit", misfits)] if misfits else []),
        ("Notes", [*notes, Text(f"profile {request.profile.name}: {request.profile.basis}")]),
    )


def _table(rows: Iterable[Row], numbers: dict[str, int], best: Outcome | None) -> Table:
    """Fastest first; the ratio is of throughput, against the optimum of the section."""
    headings = ("policy", "tokens/s", "ratio", "TTFT s", "TPOT ms", "HBM GiB", "host GiB", "H2D GiB", "D2H GiB")
    fastest_first = sorted(rows, key=lambda row: -_outcome(row).tokens_per_s)
    return table(headings, (_cells(row, numbers[row.policy], best) for row in fastest_first))


def _cells(row: Row, number: int, best: Outcome | None) -> tuple[str, ...]:
    outcome = _outcome(row)
    sizes = (outcome.peak_hbm_bytes, outcome.peak_host_bytes, outcome.h2d_bytes, outcome.d2h_bytes)
    return (
        f"{row.policy} [{number}]" + (f"\n {row.given_up}" if row.given_up else ""),
        f"{outcome.tokens_per_s:,.0f}",
        f"{outcome.tokens_per_s / best.tokens_per_s:.2f}" if best else "-",
        f"{outcome.ttft_s:,.2f}",
        "-" if outcome.tpot_s is None else f"{outcome.tpot_s / MILLI:,.1f}",
        *(f"{size / GIB:,.1f}" for size in sizes),
    )


def _outcome(row: Row) -> Outcome:
    assert row.outcome is not None
    return row.outcome
