"""The optimum and its rivals on one problem, each as a plan that the same engine prices."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from planner.baselines import RIVALS, Rival, play
from planner.request import Request
from planner.search import Search
from planner.wording import given_up
from sim.attention import Selector
from sim.cost import CostModel
from sim.forecast import Forecast
from sim.outcome import Outcome
from sim.plan import Plan

_OPTIMUM = "Optimum: the best of everything that the request allows"
_OPTIMUM_LOSSLESS = "Optimum, lossless: the best that leaves the output unchanged"
_PAGES = (
    "Pages: digests of 16 keys in HBM, any token may be recalled; the best plan with native KV at the sparsity allowed"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy: its plan and outcome, or the reason why it has none. ``given_up`` says what changes the output."""

    policy: str
    lossless: bool
    given_up: str
    plan: Plan | None
    outcome: Outcome | None
    reason: str | None
    footnote: str

    @property
    def feasible(self) -> bool:
        return self.outcome is not None


def compare(request: Request) -> list[Row]:
    """A row for each policy, in the order of the table; one that does not fit says why."""
    cost = CostModel(machine=request.machine, profile=request.profile)
    search = Search(request, cost)
    rows = [
        _searched("optimum", _OPTIMUM, search, lossless=False),
        _searched("optimum-lossless", _OPTIMUM_LOSSLESS, search, lossless=True),
    ]
    rows += [_played(rival, request, cost) for rival in RIVALS]
    return [*rows, _pages(request, cost)]


def row_to_json(row: Row) -> dict[str, object]:
    """The keys that other programs rely on."""
    figures = ("makespan_s", "tokens_per_s", "ttft_s", "tpot_s", "peak_hbm_bytes", "peak_host_bytes")
    return {
        "policy": row.policy,
        "lossless": row.lossless,
        "feasible": row.feasible,
        "reason": row.reason,
        **{name: getattr(row.outcome, name, None) for name in (*figures, "h2d_bytes", "d2h_bytes")},
    }


def best_outcomes(rows: list[Row]) -> Iterator[tuple[bool, Outcome]]:
    """The optimum of the lossless and of all rows: what a row's throughput is held against."""
    for row in rows:
        if row.policy == "optimum" and row.outcome:
            yield False, row.outcome
        if row.policy == "optimum-lossless" and row.outcome:
            yield True, row.outcome


def _searched(policy: str, footnote: str, search: Search, *, lossless: bool) -> Row:
    best = search.best(lossless_only=lossless)
    return _row(policy, footnote, best.found.priced if best else None, "no plan fits", lossless)


def _played(rival: Rival, request: Request, cost: CostModel) -> Row:
    played = play(rival, request, cost)
    return _row(rival.policy, rival.footnote, played.priced, played.reason, rival.lossless)


def _pages(request: Request, cost: CostModel) -> Row:
    recalling = replace(request, selectors=(Selector.PAGES,), kv_formats=(), max_sparsity=request.max_sparsity or 0.8)
    best = Search(recalling, cost).best(lossless_only=False, sparse_only=True)
    return _row("pages", _PAGES, best.found.priced if best else None, "no plan fits", False)


def _row(policy: str, footnote: str, priced: Forecast | None, reason: str | None, lossless: bool) -> Row:
    if priced is None:
        return Row(
            policy=policy, lossless=lossless, given_up="", plan=None, outcome=None, reason=reason, footnote=footnote
        )
    return Row(
        policy=policy,
        lossless=priced.plan.setting.is_lossless,
        given_up=given_up(priced.plan.setting),
        plan=priced.plan,
        outcome=priced.outcome,
        reason=None,
        footnote=footnote,
    )
