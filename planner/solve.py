"""The best plan for a request: bound every discrete choice, solve the program of those that may still win."""

import sys

from planner.callable import CallableModule
from planner.infeasible import infeasible
from planner.request import Request
from planner.search import Best, Search
from planner.solution import Solution
from sim.cost import CostModel


def solve(request: Request, *, solver: str | None = None, suggest: bool = True) -> Solution:
    """The best plan and, beside it, the best one that leaves the output unchanged.

    ``solver`` names the mixed-integer solver (see ``planner.solvers``); by default the best one installed.
    Raises Infeasible if no plan fits; ``suggest`` also looks for changes to the request that would fit.
    """
    search = Search(request, CostModel(machine=request.machine, profile=request.profile), solver)
    best = search.best(lossless_only=False)
    if best is None:
        raise infeasible(request, suggest=suggest)
    lossless = search.best(lossless_only=True)
    return _solution(best, None if lossless is None else _solution(lossless, None))


def _solution(best: Best, lossless: Solution | None) -> Solution:
    priced = best.found.priced
    return Solution(plan=priced.plan, predicted=priced.outcome, certificate=best.certificate, lossless=lossless)


sys.modules[__name__].__class__ = CallableModule
