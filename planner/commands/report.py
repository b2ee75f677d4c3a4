"""``planner report``."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.commands import options
from planner.terminal import patiently, show_json, write_answer
from sim.outputs import require_outputs
from sim.units import format_bytes

EPILOG = """\
[bold]Examples[/bold]

  planner solve -o plan.json

  planner report plan.json -o report.html

  planner report plan.json --compare --steps 100-140

  planner report plan.json measured.json -o report.html

  planner validate h100.json --campaign campaign.json --so-far --json > verdict.json

  planner report plan.json --verdict verdict.json

The page opens from disk in any browser, prints, and needs no network.
"""


def report(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Plan file, as `planner solve -o` writes it.")],
    traces: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TRACE]...", help="Recorded runs of the plan, set beside the simulated one."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Solve again and show the published systems beside the plan.")
    ] = False,
    profile: options.Profile = None,
    verdict: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="What `planner validate --json` printed: plans that were run on this GPU, beside their predictions.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="FIRST-LAST", help="Steps that the timeline holds; by default all that fit the page."),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The page.")] = "report.html",
    as_json: options.Json = False,
) -> None:
    """Write a page that shows a plan: the answer, where the KV lives, where the time goes, a timeline, and the sources."""
    from planner.reporting import Wanted, study_of

    pages = load_reports()
    require_outputs([Path(out)], [plan, *(traces or ()), profile, verdict])
    with patiently("reporting"):
        wanted = Wanted(
            plan=Path(plan),
            traces=tuple(map(Path, traces or ())),
            profile=profile,
            rivals=compare,
            steps=_range(steps),
            command=_command(plan, traces or [], compare, profile, verdict, steps, out),
            verdict=None if verdict is None else Path(verdict),
        )
        study = study_of(pages, wanted)
        page = pages.plan_page(study)
        write_answer(Path(out), page)
    size_bytes = len(page.encode())
    if as_json:
        show_json({"file": out, "size_bytes": size_bytes})
        return
    print(f"{out}: {format_bytes(size_bytes)}, opens in any browser")


def load_reports() -> Any:
    """The package that makes pages. It needs plotly, which planning does not.

    Raises ValueError where plotly is missing.
    """
    try:
        return import_module("reports")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("plotly"):
            raise
        raise ValueError("plotly is not installed, pages are made with it: pip install 'kvplan[reports]'") from None


def _range(steps: str | None) -> tuple[int, int] | None:
    if steps is None:
        return None
    first, dash, last = steps.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else True)):
        raise ValueError(f"--steps={steps!r}, must be a step or two with a dash between, as 100-140")
    ends = int(first), int(last or first)
    if ends[0] > ends[1]:
        raise ValueError(f"--steps={steps!r}, must begin before it ends")
    return ends


def _command(
    plan: str, traces: list[str], compare: bool, profile: str | None, verdict: str | None, steps: str | None, out: str
) -> str:
    import shlex

    chosen = [*(["--compare"] if compare else []), *(["--profile", profile] if profile else [])]
    chosen += [*(["--verdict", verdict] if verdict else [])]
    chosen += [*(["--steps", steps] if steps else [])]
    return shlex.join(["planner", "report", plan, *traces, *chosen, "-o", out])
