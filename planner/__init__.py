"""Which caching plan is best for a machine, a model and a workload, and how sure that is.

``from planner import Question, Request, request_of, solve, sweep``; each is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.inputs import Question, request_of
    from planner.request import Request
    from planner.solution import Infeasible, Solution
    from planner.solve import solve
    from planner.sweep import sweep

__all__ = ["Infeasible", "Question", "Request", "Solution", "request_of", "solve", "sweep"]

_MODULES = {
    "Infeasible": "solution",
    "Question": "inputs",
    "Request": "request",
    "Solution": "solution",
    "request_of": "inputs",
}


def __getattr__(name: str) -> Any:
    if name in ("solve", "sweep"):
        return import_module(f"planner.{name}")  # see planner.callable
    if name in _MODULES:
        return getattr(import_module(f"planner.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")
