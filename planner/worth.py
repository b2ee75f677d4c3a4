"""What a little more of the machine is worth: the request is solved again with one unit more of each resource."""

from dataclasses import dataclass, replace
from typing import Any

from planner.optimum import optimum
from planner.request import Objective, Request
from planner.shortage import with_more
from planner.solution import Solution, Tier
from sim.cost import CostModel
from sim.forecast import forecast
from sim.plan import Plan
from sim.units import GB, GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Tokens a second that exactly one unit more brings, everything else the same.

    Discrete choices make steps of it: two units more need not bring twice as much.
    """

    hbm_tokens_per_s_per_gib: float
    host_tokens_per_s_per_gib: float
    link_tokens_per_s_per_gb_s: float
    flops_tokens_per_s_per_percent: float


def worth_of(solution: Solution, request: Request, *, solver: str | None = None) -> Worth | None:
    """The marginal values around ``solution``; None where something else than throughput is wanted."""
    if request.objective is not Objective.THROUGHPUT:
        return None
    return Worth(
        hbm_tokens_per_s_per_gib=_gain(solution, with_more(request, Tier.HBM, GIB), solver),
        host_tokens_per_s_per_gib=_gain(solution, _more_dram(request), solver),
        link_tokens_per_s_per_gb_s=_gain(solution, _wider_link(request), solver),
        flops_tokens_per_s_per_percent=_gain(solution, _more_flops(request), solver),
    )


def _gain(solution: Solution, better: Request, solver: str | None) -> float:
    """Two optima, each within its gap, may differ the wrong way; the plan at hand runs on the better machine too."""
    best = optimum(better, solver=solver)
    again = 0.0 if best is None else best.found.priced.outcome.tokens_per_s
    return max(again, _same_plan(solution.plan, better)) - solution.predicted.tokens_per_s


def _same_plan(plan: Plan, better: Request) -> float:
    cost = CostModel(machine=better.machine, profile=better.profile)
    moved = replace(plan, setting=replace(plan.setting, machine=better.machine))
    return forecast(moved, cost).outcome.tokens_per_s


def _more_dram(request: Request) -> Request:
    """Of which the share that may be pinned counts."""
    host = request.machine.host
    more = replace(host, dram_bytes=host.dram_bytes + GIB)
    return replace(request, machine=replace(request.machine, host=more))


def _wider_link(request: Request) -> Request:
    link = request.machine.gpu.link
    return _with_gpu(request, link=replace(link, bytes_per_s=link.bytes_per_s + GB))


def _more_flops(request: Request) -> Request:
    """In every arithmetic that the card has."""
    gpu = request.machine.gpu
    rates = {
        name: getattr(gpu, name) for name in ("fp16_flop_per_s", "fp32_flop_per_s", "fp8_flop_per_s", "int8_op_per_s")
    }
    return _with_gpu(request, **{name: 1.01 * rate for name, rate in rates.items() if rate is not None})


def _with_gpu(request: Request, **changes: Any) -> Request:
    machine = request.machine
    return replace(request, machine=replace(machine, gpu=replace(machine.gpu, **changes)))
