"""A solution for people: the plan, its speed, phases, memory and certificate, and the best lossless plan beside it."""

from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from planner.layout import grid, percent, sections, table
from planner.limits import Stretch, stretches
from planner.request import Request
from planner.solution import Certificate, Solution
from planner.wording import certificate_texts, loss_texts, plan_rows, question_text, speed_rows, wanted_text, waves_text
from planner.worth import Worth
from sim.cost import CostModel
from sim.footprint import resident_weight_bytes
from sim.forecast import forecast, setting_workspace_bytes, static_host_bytes
from sim.outcome import Outcome
from sim.plan import Plan
from sim.units import format_bytes, format_per_s, format_rate, format_seconds


def summary(solution: Solution, request: Request, worth: Worth | None = None) -> RenderableType:
    """What ``planner solve`` prints."""
    setting = solution.plan.setting
    cost = CostModel(machine=request.machine, profile=request.profile)
    rows = stretches(forecast(solution.plan, cost), cost)
    return sections(
        (question_text(setting), [Text(wanted_text(request))]),
        ("", [_plans_table(solution), Text(""), *map(Text, loss_texts(solution))]),
        (f"Phases of {waves_text(setting)}", [_phases_table(rows)]),
        ("Memory", [_memory_table(solution, request)]),
        ("How sure", [Text(line) for line in (*_certificate(solution.certificate, request), *_worth(worth))]),
    )


def simulation_summary(plan: Plan, outcome: Outcome, source: str, *, solved_with: str | None = None) -> RenderableType:
    """What ``planner simulate`` prints. ``solved_with``: the profile that the plan was solved with, where it is another."""
    machine, used = plan.setting.machine, outcome.utilisation
    rows = [
        *speed_rows(outcome),
        ("peak in HBM", _of(outcome.peak_hbm_bytes, machine.gpu.hbm_bytes)),
        ("peak in host memory", _of(outcome.peak_host_bytes, machine.host.usable_bytes)),
        ("GPU", f"busy {percent(used.gpu)}"),
        ("host to GPU", _traffic(outcome.h2d_bytes, used.h2d, outcome.makespan_s)),
        ("GPU to host", _traffic(outcome.d2h_bytes, used.d2h, outcome.makespan_s)),
    ]
    rests_on = [Text(source)]
    if solved_with is not None:
        rests_on.append(Text(f"solved with another profile, {solved_with}: its own prediction differs"))
    return sections((question_text(plan.setting), [grid(rows), Text(""), *rests_on]))


def _plans_table(solution: Solution) -> Table:
    """The plan, and beside it the best lossless one unless that is the same."""
    columns = [("best plan, lossless" if solution.plan.setting.is_lossless else "best plan", solution)]
    if not _is_own_lossless(solution) and solution.lossless is not None:
        columns.append(("best lossless plan", solution.lossless))
    described = [plan_rows(shown) for _, shown in columns]
    rows = [(lines[0][0], *(value for _, value in lines)) for lines in zip(*described, strict=True)]
    return table(("", *(heading for heading, _ in columns)), rows, left=(0, 1, 2))


def _is_own_lossless(solution: Solution) -> bool:
    return solution.lossless is not None and solution.lossless.plan == solution.plan


def _phases_table(rows: tuple[Stretch, ...]) -> Table:
    headings = ("phase", "steps", "time", "per step", "GPU busy", "H2D busy", "D2H busy", "limited by")
    return table(headings, map(_phase_row, rows), left=(0, 7))


def _phase_row(row: Stretch) -> tuple[str, ...]:
    steps = str(row.first_step) if row.steps == 1 else f"{row.first_step}-{row.last_step}"
    times = format_seconds(row.seconds), format_seconds(row.seconds / row.steps)
    return (row.name, steps, *times, *map(percent, (row.gpu, row.h2d, row.d2h)), row.limit)


def _memory_table(solution: Solution, request: Request) -> Table:
    setting, predicted, machine = solution.plan.setting, solution.predicted, request.machine
    weights = resident_weight_bytes(setting.model, setting.dtype, setting.weight_format, setting.weights_on_host)
    workspace = setting_workspace_bytes(setting)
    kv = predicted.peak_hbm_bytes - weights - workspace
    parts = (
        f"weights {format_bytes(weights)}",
        f"workspace {format_bytes(workspace)}",
        f"KV {format_bytes(kv)} (room for {format_bytes(setting.kv_budget_bytes)})",
    )
    streamed = static_host_bytes(setting)
    on_host = f" ({format_bytes(streamed)} of it weights)" if streamed else ""
    host = _of(predicted.peak_host_bytes, machine.host.usable_bytes)
    return grid(
        [
            ("HBM", f"{_of(predicted.peak_hbm_bytes, machine.gpu.hbm_bytes)}: {', '.join(parts)}"),
            ("host memory", f"{host} that may be pinned{on_host}"),
        ]
    )


def _certificate(certificate: Certificate, request: Request) -> Iterable[str]:
    yield from certificate_texts(certificate)
    yield f"profile {request.profile.name}: {request.profile.basis}"


def _worth(worth: Worth | None) -> Iterable[str]:
    """What to buy next."""
    if worth is not None:
        yield (
            f"one more is worth, in tokens/s: GiB of HBM {format_per_s(worth.hbm_tokens_per_s_per_gib)}, GiB of host "
            f"memory {format_per_s(worth.host_tokens_per_s_per_gib)}, GB/s of link "
            f"{format_per_s(worth.link_tokens_per_s_per_gb_s)}, % of FLOP/s "
            f"{format_per_s(worth.flops_tokens_per_s_per_percent)}"
        )


def _traffic(moved_bytes: int, busy_share: float, makespan_s: float) -> str:
    if not moved_bytes:
        return "nothing"
    rate = format_rate(moved_bytes / (busy_share * makespan_s))
    return f"{format_bytes(moved_bytes)}, busy {percent(busy_share)}, {rate} while busy"


def _of(used_bytes: int, capacity_bytes: int) -> str:
    return f"{format_bytes(used_bytes)} of {format_bytes(capacity_bytes)}"
