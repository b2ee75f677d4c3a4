"""The optimum alone, without its lossless companion: what shortage, marginal worth and sweeps solve again and again."""

from planner.request import Request
from planner.search import Best, Search
from sim.cost import CostModel


def optimum(request: Request, *, solver: str | None = None, lossless_only: bool = False) -> Best | None:
    """The best plan of ``request``; None if none fits."""
    search = Search(request, CostModel(machine=request.machine, profile=request.profile), solver)
    return search.best(lossless_only=lossless_only)
