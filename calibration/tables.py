"""What the commands print."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from rich.console import Console
from rich.table import Table

from calibration.repeat import Difference
from sim.profile import Profile
from sim.units import format_seconds
from sim.verdict import Judged, Verdict, by_stratum

_COLUMNS = 118


def show(*tables: Table | str) -> None:
    """Print to standard output, as wide as a terminal allows."""
    console = Console(width=min(_COLUMNS, Console().width) if Console().is_terminal else _COLUMNS, highlight=False)
    for table in tables:
        console.print(table, markup=False) if isinstance(table, str) else console.print(table)


@contextmanager
def counting(task: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr where that is a terminal: told which of how many has begun, and what it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(task),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        yield lambda number, total, what: progress.update(bar, completed=number - 1, total=total, description=what[:70])


def constants_table(profile: Profile) -> Table:
    """Every constant, its interval and what it rests on."""
    table = _table(f"{profile.name}: {profile.basis}", "constant", "value", "95 %", "rests on")
    for one in profile.evidence.estimates if profile.evidence else ():
        interval = "" if one.low is None or one.high is None else f"{one.low:.3g} to {one.high:.3g}"
        table.add_row(one.parameter, f"{getattr(profile, one.parameter):.4g}", interval, one.evidence)
    return table


def families_table(profile: Profile) -> Table:
    """How far the fitted cost model is from what was measured."""
    table = _table("Fit, by kernel family", "family", "measured", "median error", "worst", "at")
    for one in profile.evidence.errors if profile.evidence else ():
        table.add_row(one.family, str(one.measurements), f"{one.median:.1%}", f"{one.worst:.0%}", one.worst_case)
    return table


def differences_table(found: Sequence[Difference]) -> Table:
    """The floor of any claim."""
    table = _table("Repeatability", "family", "common", "median difference", "bias", "worst", "at")
    for one in found:
        cells = (
            one.family,
            str(one.common),
            f"{one.median:.1%}",
            f"{one.bias:+.1%}",
            f"{one.worst:.0%}",
            one.worst_case,
        )
        table.add_row(*cells)
    return table


def verdict_tables(verdict: Verdict) -> Iterator[Table]:
    """Plans worst first, then strata."""
    plans = _table(
        "Predicted over measured, worst makespan first",
        *("measured", "makespan", "TTFT", "TPOT p50", "p95", "bytes", "peak HBM", "roofline", "explained by", "plan"),
    )
    for one in verdict.plans:
        plans.add_row(
            format_seconds(one.measured.makespan_s),
            _signed(one.makespan),
            _signed(one.ttft),
            _signed(one.tpot_p50),
            _signed(one.tpot_p95),
            _signed(one.moved),
            _signed(one.peak_hbm),
            _signed(one.roofline),
            one.explained_by,
            one.recipe,
        )
    yield plans
    strata = _table(
        "Absolute errors",
        *("bound by", "plans", "makespan median", "worst", "TPOT p50", "TTFT", "bytes", "peak HBM", "roofline"),
    )
    for name, members in by_stratum(verdict.plans):
        strata.add_row(
            name,
            str(len(members)),
            _middle(members, lambda one: one.makespan),
            f"{max(abs(one.makespan) for one in members):.1%}",
            _middle(members, lambda one: one.tpot_p50),
            _middle(members, lambda one: one.ttft),
            _middle(members, lambda one: one.moved),
            _middle(members, lambda one: one.peak_hbm),
            _middle(members, lambda one: one.roofline),
        )
    yield strata


def launches(verdict: Verdict, then_s: float) -> str | None:
    """What the host took to launch a kernel around the runs, and ``then_s``, when the profile was measured; None if not known."""
    took = [one.measured.launch_s for one in verdict.plans if one.measured.launch_s]
    if not took or not then_s:
        return None
    now = f"{1e6 * median(took):.1f} us ({1e6 * min(took):.1f} to {1e6 * max(took):.1f})"
    return f"a launch took the host {now} around the runs, {1e6 * then_s:.1f} us when the profile was measured"


def _middle(members: Sequence[Judged], of: Callable[[Judged], float | None]) -> str:
    errors = [abs(error) for error in map(of, members) if error is not None]
    return f"{median(errors):.1%}" if errors else "-"


def _signed(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
