"""``planner validate``: loaded by the command line when it is called."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibration.cli_calibrate import _device, _require_extra
from sim.outputs import require_outputs
from sim.profile_files import load_profile
from sim.verdict import verdict_to_json

if TYPE_CHECKING:
    from calibration.campaign import Results

EPILOG = """\
[bold]Examples[/bold]

  planner validate cpu.json

  planner validate h200.json --plans 32 --seed 7 --prepare campaign.json

  planner validate h200.json --campaign campaign.json

A campaign is written down, and committed, before it runs; results go beside it, campaign.results.json, and the same
command goes on where it stopped.
"""


def validate(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="Profile, as `planner calibrate` writes it.")],
    device: Annotated[
        str | None, typer.Option(metavar="cuda|cpu", help="Where to run.", show_default="what the profile is of")
    ] = None,
    plans: Annotated[int, typer.Option(metavar="N", help="Plans to draw.")] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the drawing.")] = 0,
    longest: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Of a run, as predicted.", show_default="10 on a GPU, 4 on a CPU"),
    ] = None,
    prepare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plans, write them down and run nothing.")
    ] = None,
    campaign: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run, or go on with, the plans written down there.")
    ] = None,
    so_far: Annotated[
        bool, typer.Option("--so-far", help="Judge the plans of --campaign that have been run; run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Run plans that the fit has not seen, and set what was measured beside what was predicted."""
    require_outputs([prepare], [profile])
    loaded = load_profile(profile)
    if prepare is not None and campaign is not None:
        raise ValueError("--prepare and --campaign, exclude each other: prepare first, then run")
    if so_far and campaign is None:
        raise ValueError("--so-far, needs a campaign that has begun: give --campaign FILE")
    if longest is not None and campaign is not None:
        raise ValueError("--longest, is of plans to be drawn: leave it out, or draw another campaign by --prepare")
    if longest is not None and not longest > 0:
        raise ValueError(f"--longest={longest:g}, must be above 0 seconds")
    if plans < 1:
        raise ValueError(f"--plans={plans}, must be at least 1")
    _require_extra()
    from calibration import campaign as running
    from calibration.tables import counting, launches, show, verdict_tables
    from calibration.verdict import judge

    machine = running.machine_of(loaded)
    if prepare is not None:
        of_before = running.results_file(prepare)
        if of_before.exists():
            raise ValueError(f"{prepare}, {of_before.name} beside it has results of what it was: name another file")
        drawn = running.prepare(loaded, machine, seed=seed, plans=plans, longest_s=longest)
        running.save(prepare, drawn)
        seconds = sum(one.predicted_s for one in drawn.plans)
        print(f"{prepare}: {plans} plans of seed {seed} for {drawn.profile_hash}, {seconds:.0f} s predicted")
        return
    drawn = (
        running.load_campaign(campaign)
        if campaign
        else running.prepare(loaded, machine, seed=seed, plans=plans, longest_s=longest)
    )
    file = running.results_file(campaign) if campaign else None
    before = running.load_results(file, drawn) if file else running.Results(campaign_hash=running.campaign_hash(drawn))
    moved: float | None = None
    done = {one.recipe for one in before.results}
    lacking = set() if so_far else {one.recipe for one in drawn.plans} - done
    where = _device(device or ("cpu" if machine.is_cpu or not lacking else "cuda"))
    if lacking:  # what has all been run can be judged anywhere
        running.require_here(loaded, where)
        moved = running.drift(loaded, machine, where)
    with counting("running") as on_plan:

        def keep(results: "Results", total: int) -> None:
            if file is not None:
                running.save(file, results)
            on_plan(len(results.results) + 1, total, results.results[-1].recipe)

        due = replace(drawn, plans=tuple(one for one in drawn.plans if one.recipe in done | lacking))
        results = running.run_campaign(due, loaded, machine, where, before, keep)
    verdict = judge(drawn, results, loaded, machine, on_gpu=not machine.is_cpu)
    host = launches(verdict, loaded.evidence.launch_s if loaded.evidence else 0.0)
    today = None if moved is None else f"the profile's reference step takes {moved:.2f} times what it took then"
    if as_json:
        print(json.dumps(verdict_to_json(verdict, moved), indent=1, allow_nan=False))
        return
    show(
        *verdict_tables(verdict),
        *(f"not run: {recipe}: {reason}" for recipe, reason in verdict.failed),
        *(f"not replayed: {recipe}: {reason}" for recipe, reason in verdict.not_replayed),
        "",
        verdict.summary,
        *([verdict.replays] if verdict.replays else []),
        *(line for line in (today, host) if line),
    )
