"""A solution as JSON: the plan, what it is predicted to do, how sure that is, and where every figure comes from."""

from datetime import UTC, datetime
from typing import Any

from planner.request import Request
from planner.solution import Solution
from planner.worth import Worth
from sim.codec import to_plain
from sim.files import plan_to_json

_LOSSLESS_KEYS = ("dtype", "weight_format", "weights_on_host", "concurrency", "placement", "write_back", "recompute")


def answer_to_json(solution: Solution, request: Request, worth: Worth | None, *, command: str) -> dict[str, Any]:
    """The plan's own keys first, so that the answer can be loaded as a plan, then what is known about it."""
    return {
        **plan_to_json(solution.plan),
        "predicted": to_plain(solution.predicted),
        "solver": to_plain(solution.certificate),
        "worth": to_plain(worth),
        "lossless": _lossless(solution),
        "provenance": _provenance(solution, request, command),
    }


def kvplan_version() -> str:
    """The installed version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvplan")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _lossless(solution: Solution) -> dict[str, Any] | None:
    """The best lossless plan without its homes; null where none fits."""
    best = solution.lossless
    if best is None:
        return None
    setting = to_plain(best.plan.setting)
    return {
        "is_this_plan": best.plan == solution.plan,
        **{key: setting[key] for key in _LOSSLESS_KEYS},
        "phases": to_plain(best.plan.phases),
        **to_plain(best.predicted),
    }


def _provenance(solution: Solution, request: Request, command: str) -> dict[str, Any]:
    machine = request.machine
    return {
        "kvplan_version": kvplan_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "profile": {"name": request.profile.name, "basis": request.profile.basis},
        "sources": {
            "gpu": machine.gpu.source,
            "host": machine.host.source,
            "model": request.model.source,
            "access": solution.plan.setting.access.source,
        },
        "overrides": list(machine.overrides),
    }
