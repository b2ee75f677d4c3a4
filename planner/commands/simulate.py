"""``planner simulate``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.commands import options
from planner.inputs import profile_of, real
from planner.terminal import one_line, patiently, show, show_json, write_answer
from sim.access import parametric_access
from sim.codec import to_plain
from sim.cost import CostModel
from sim.engine import simulate as run
from sim.files import plan_from_json, read_json_object, trace_text
from sim.outputs import require_outputs
from sim.plan import Plan
from sim.trace import chrome_events

EPILOG = """\
[bold]Examples[/bold]

  planner solve -o plan.json

  planner simulate plan.json

  planner simulate plan.json --trace run.json

Open the trace in https://ui.perfetto.dev or in chrome://tracing.
"""


def simulate(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan file, as `planner solve -o` writes it.")],
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write every span of the run to this file (Perfetto, chrome://tracing)."),
    ] = None,
    save_trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the run to this file, exactly, for `planner report`."),
    ] = None,
    profile: options.Profile = None,
    turnover: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Assume this share of the sparse picks to be new at each step, to see what that costs.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Run a plan layer by layer on a simulated GPU stream and copy engines."""
    outputs = [None if one is None else Path(one) for one in (trace, save_trace)]
    require_outputs(outputs, [plan, profile])
    loaded, solved_with = _load(Path(plan))
    if turnover is not None:
        loaded = _with_turnover(loaded, turnover)
    machine = loaded.setting.machine
    chosen = profile_of(profile, machine)
    with patiently("simulating"):
        ran = run(loaded, CostModel(machine=machine, profile=chosen))
        if trace is not None:
            write_answer(Path(trace), json.dumps({"traceEvents": list(chrome_events(ran)), "displayTimeUnit": "ms"}))
        if save_trace is not None:
            write_answer(Path(save_trace), trace_text(ran))
    if as_json:
        show_json(to_plain(ran.outcome))
        return
    from planner.summary import simulation_summary

    other = solved_with if solved_with not in (None, chosen.name) else None
    show(simulation_summary(loaded, ran.outcome, ran.source, solved_with=other))


def _with_turnover(plan: Plan, text: str) -> Plan:
    """The same plan when picks change as fast as that: a stress, no measurement."""
    share = 0.0 if text.strip() == "0" else real("--turnover", text, 1)
    access = parametric_access(plan.setting.attention.selector, share)
    return replace(plan, setting=replace(plan.setting, access=access))


def _load(path: Path) -> tuple[Plan, str | None]:
    """The plan in ``path``, and the profile that its own prediction rests on, if it says so; every error names the file."""
    try:
        data = read_json_object(path)
        return plan_from_json(data, str(path)), _solved_with(data)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def _solved_with(answer: Any) -> str | None:
    found = answer
    for key in ("provenance", "profile", "name"):
        found = found.get(key) if isinstance(found, dict) else None
    return one_line(found) if isinstance(found, str) else None
