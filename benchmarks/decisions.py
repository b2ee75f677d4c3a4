"""Near-tied plans of several workloads, all run: how much slower is what a measured or the nominal profile chooses.

    python benchmarks/decisions.py h200.json --table benchmarks/results/decisions_h200.json [--seconds 240]

A workload fixes model, sequences, tokens and bytes of HBM for KV; its candidates are plans within them that differ in
concurrency, admission, placement, what lies on the host and how it comes back. It counts if at least two of them are within
15 % of the best in simulation, and if all that are tried can be run in its share of --seconds. The table is written before
anything runs (--prepare: nothing does), and the same command goes on where it stopped; without a profile it is only shown.
On a CPU set GOMP_SPINCOUNT=10000: threads that spin for long while they wait cost a factor of ten on busy cores.
"""

import argparse
import datetime
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from calibration.campaign import NOT_RUN, machine_of, measured_figures, repeats_of, require_here
from calibration.draw import draw_recipe
from calibration.families.base import reason_of
from calibration.machine import device_of
from calibration.runner import Runner
from sim.attention import Selector
from sim.cost import CostModel
from sim.files import write_atomically
from sim.forecast import forecast
from sim.kv import KvFormat
from sim.plan import Admission, Placement, Plan, Recompute
from sim.profile import Profile
from sim.profile_files import content_hash, load_profile
from sim.recipe import Recipe, plan_of
from sim.spec import MachineSpec
from sim.units import GIB

RESULTS = Path(__file__).parent / "results"
TIED, MOST_TRIED, MOST_DRAWS = 0.15, 4, 800
SHORTEST_S, LONGEST_OUTPUT = 0.2, 64
# Besides the predicted runs, guessed: the steps that load, compile and capture; pinning, for every run; a model's weights.
WARM_S, PIN_S_PER_GIB, WEIGHTS_S = {"gpu": 3.0, "cpu": 1.0}, {"gpu": 1.0, "cpu": 0.0}, 3.0
GOAL, ROUNDS = 0.03, 2  # all of a workload's plans one after the other, and again: what differs then is noise
CHOOSERS = ("measured", "nominal")


def candidates(drawn: Recipe, budget_bytes: float, machine: MachineSpec) -> Iterator[Recipe]:
    """Plans of the drawn workload that keep to the budget: in waves, spilling, recomputing, admitted as pages fall free;
    sparse ones if it is sparse.
    """
    base = replace(drawn, recompute=Recompute.NONE, kv=KvFormat.NATIVE, hbm=100)
    sizes = sorted({-(-base.batch // waves) for waves in (1, 2, 3, 4, 6)}, reverse=True)
    sparse = base.selector is not Selector.DENSE
    for size in sizes:
        for placement in (Placement.RESIDENT, Placement.RECENT) if sparse else (Placement.RECENT,):
            for source in (Recompute.NONE,) if sparse else (Recompute.NONE, Recompute.ACTIVATIONS_HOST):
                recipe = replace(base, concurrency=size, placement=placement, recompute=source)
                fitting = largest_share(recipe, budget_bytes, machine)
                alike = fitting is not None and fitting.hbm == 100  # nothing to place or to recompute
                first = placement is not Placement.RECENT or not sparse
                if fitting is not None and (not alike or (first and source is Recompute.NONE)):
                    yield fitting
    paged = None if sparse else largest_share(replace(base, admission=Admission.CONTINUOUS), budget_bytes, machine)
    if paged is not None:
        yield paged


def largest_share(recipe: Recipe, budget_bytes: float, machine: MachineSpec) -> Recipe | None:
    """As much in HBM as the budget allows, in twentieths; None where even the least is too much."""
    for hbm in range(100, -1, -5):
        fitting = replace(recipe, hbm=hbm)
        if plan_of(fitting, machine).setting.kv_budget_bytes <= budget_bytes:
            return fitting
    return None


def seconds(recipe: Recipe, cost: CostModel, profile: Profile) -> float:
    return forecast(plan_of(recipe, cost.machine, profile), cost).outcome.makespan_s


def running_s(recipe: Recipe, cost: CostModel, profile: Profile) -> float:
    """Of all runs of a candidate, with what comes before them."""
    kind, outcome = "cpu" if cost.machine.is_cpu else "gpu", forecast(plan_of(recipe, cost.machine), cost).outcome
    predicted_s = seconds(recipe, cost, profile)
    one_s = predicted_s + PIN_S_PER_GIB[kind] * outcome.peak_host_bytes / GIB
    return WARM_S[kind] + repeats_of(predicted_s) * one_s


def workload_of(rng: random.Random, *, on_gpu: bool) -> Recipe:
    """Of what may be drawn, model, numbers and selector."""
    drawn = draw_recipe(rng, on_gpu=on_gpu)
    return Recipe(
        model=drawn.model,
        batch=drawn.batch,
        prompt=drawn.prompt,
        output=min(drawn.output, LONGEST_OUTPUT),
        dtype=drawn.dtype,
        selector=drawn.selector,
        keep=drawn.keep,
        placement=drawn.placement,
    )


def draw(profile: Profile, machine: MachineSpec, seed: int, wanted: int, within_s: float) -> list[dict[str, Any]]:
    """Workloads with near-tied candidates; first those over whose best plan the two profiles disagree."""
    rng, on_gpu = random.Random(seed), not machine.is_cpu
    measured = CostModel(machine=machine, profile=profile)
    nominal = CostModel(machine=machine, profile=Profile.nominal(machine))
    agreed, disputed = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()  # by name: one may be drawn twice
    for _ in range(MOST_DRAWS):
        if len(disputed) >= wanted:
            break
        drawn, share = workload_of(rng, on_gpu=on_gpu), rng.choice((0.3, 0.5, 0.7))
        workload = tied(drawn, share, measured, nominal, profile, within_s / wanted - WEIGHTS_S)
        if workload is not None:
            alike = workload["nominal_choice"] == workload["measured_choice"]
            (agreed if alike else disputed).setdefault(workload["workload"], workload)
    return [*disputed.values(), *agreed.values()][:wanted]


def tied(
    drawn: Recipe, share: float, measured: CostModel, nominal: CostModel, profile: Profile, within_s: float
) -> dict[str, Any] | None:
    """The workload with the candidates to try; None where none is near the best, or it takes too long."""
    machine = measured.machine
    try:
        whole = plan_of(replace(drawn, hbm=100), machine)
        budget = share * whole.setting.kv_budget_bytes
        found = list(candidates(drawn, budget, machine))
        times = {one.case: seconds(one, measured, profile) for one in found}
        nominally = {one.case: seconds(one, nominal, profile) for one in found}
    except ValueError:  # more tokens than the model's context
        return None
    if not fits(whole, share, machine) or len(times) < 2:
        return None
    ranked = sorted(times, key=lambda case: times[case])
    near = [case for case in ranked if times[case] <= (1 + TIED) * times[ranked[0]]]
    by_nominal = min(nominally, key=lambda case: nominally[case])
    tried = list(dict.fromkeys([*near[: MOST_TRIED - 1], by_nominal]))
    all_s = ROUNDS * sum(running_s(Recipe.of(case), measured, profile) for case in tried)
    if len(near) < 2 or times[ranked[0]] < SHORTEST_S or all_s > within_s:
        return None
    return {
        "workload": f"{drawn.model} batch={drawn.batch} prompt={drawn.prompt} output={drawn.output} "
        f"{drawn.selector} keep={drawn.keep} kv_budget_bytes={budget:.0f}",
        "measured_choice": ranked[0],
        "nominal_choice": by_nominal,
        "running_s": all_s,
        "predicted_s": {case: times[case] for case in tried},
        "measured_s": {},
        "failed": {},
    }


def fits(plan: Plan, share: float, machine: MachineSpec) -> bool:
    """Weights, workspace and the budgeted KV, with room to spare; on the host the rest."""
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))
    outcome, kv = forecast(plan, cost).outcome, plan.setting.kv_budget_bytes
    needed = outcome.peak_hbm_bytes - (1 - share) * kv
    return needed < 0.85 * machine.gpu.hbm_bytes and kv < 0.4 * machine.host.dram_bytes


def run(table: dict[str, Any], profile: Profile, machine: MachineSpec, device: str, file: Path) -> None:
    """Model by model, so that weights are drawn once for each."""
    runner = Runner(device=device_of(device))
    for workload in sorted(table["workloads"], key=lambda one: one["workload"]):
        took, failed = workload["measured_s"], workload["failed"]
        for number in range(ROUNDS):
            for case, predicted_s in workload["predicted_s"].items():
                rounds = took.setdefault(case, [])
                if len(rounds) > number or case in failed:
                    continue
                plan = plan_of(Recipe.of(case), machine, profile)
                try:
                    rounds.append(measured_figures(plan, runner, predicted_s).makespan_s)
                except NOT_RUN as error:
                    failed[case] = reason_of(error)
                write_atomically(file, json.dumps(table, indent=1) + "\n")
                print(f"{(rounds or [nan])[-1]:8.3f} s, {predicted_s:.3f} predicted: {case}", flush=True)


def losses(workload: dict[str, Any]) -> tuple[float, float, float] | None:
    """Of the measured profile's choice and the nominal one's: seconds over the best of those tried, as shares of it; and by how
    much a choice's own rounds differ.

    None until all have run; not a number where a choice could not be run.
    """
    took = {case: rounds for case, rounds in workload["measured_s"].items() if len(rounds) == ROUNDS}
    if len(took) + len(workload["failed"]) < len(workload["predicted_s"]):
        return None
    best_s = min(map(mean, took.values()), default=nan)
    chosen = [took.get(workload[f"{who}_choice"], [nan]) for who in CHOOSERS]
    ours, theirs = (mean(rounds) / best_s - 1 for rounds in chosen)
    return ours, theirs, max((max(rounds) - min(rounds)) / best_s for rounds in chosen)


def report(table: dict[str, Any]) -> None:
    print(f"{'measured':>9} {'nominal':>8} {'noise':>6} {'tried':>5}  workload (seconds over the best of those tried)")
    judged = [(one, all_three) for one in table["workloads"] if (all_three := losses(one)) is not None]
    for workload, (ours, theirs, noise) in judged:
        print(f"{ours:+9.1%} {theirs:+8.1%} {noise:6.1%} {len(workload['predicted_s']):5}  {workload['workload']}")
        for case, reason in workload["failed"].items():
            print(f"  not run: {case}: {reason}")
    within = sum(ours <= GOAL for _, (ours, _, _) in judged)
    slower = sum(not ours <= theirs + noise for _, (ours, theirs, noise) in judged)
    print(
        f"{table['date']}, {table['device']}, profile {table['profile']}: {within} of {len(judged)} within {GOAL:.0%} of "
        f"the best; {slower} slower than the nominal choice by more than their rounds differ; "
        f"{len(table['workloads']) - len(judged)} workloads have not been run"
    )


def prepared(profile: Profile, machine: MachineSpec, asked: argparse.Namespace) -> dict[str, Any]:
    assert profile.evidence is not None
    workloads = draw(profile, machine, asked.seed, asked.workloads, asked.seconds)
    if len(workloads) < asked.workloads:
        raise ValueError(
            f"--seconds={asked.seconds}, {len(workloads)} workloads of {asked.workloads} can be run in it: give more"
        )
    return {
        "profile": profile.name,
        "profile_hash": content_hash(profile),
        "device": profile.evidence.fingerprint.device,
        "date": datetime.date.today().isoformat(),
        "seed": asked.seed,
        "workloads": workloads,
    }


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, nargs="?", help="as `planner calibrate` writes it")
    parser.add_argument("--table", type=Path, default=RESULTS / "decisions.json", help="JSON file to write and resume")
    parser.add_argument("--workloads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=240.0, help="that all runs may take, as predicted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--prepare", action="store_true", help="write the workloads down and run nothing")
    return parser


def main() -> None:
    parser = options()
    asked = parser.parse_args()
    table = json.loads(asked.table.read_text()) if asked.table.exists() else None
    if asked.profile is None:
        report(table) if table else print(f"{asked.table}: not there yet; {parser.format_usage().strip()}")
        return
    profile = load_profile(asked.profile)
    machine = machine_of(profile)
    if table is None:
        try:
            table = prepared(profile, machine, asked)
        except ValueError as error:
            parser.error(str(error))
        write_atomically(asked.table, json.dumps(table, indent=1) + "\n")
    if table["profile_hash"] != content_hash(profile):
        parser.error(f"{asked.table}: of another profile: name another table")
    if asked.prepare:
        all_s = sum(one["running_s"] for one in table["workloads"])
        tried = sum(len(one["predicted_s"]) for one in table["workloads"])
        print(f"{asked.table}: {len(table['workloads'])} workloads, {tried} plans, about {all_s:.0f} s to run")
        return
    require_here(profile, device_of(asked.device))
    run(table, profile, machine, asked.device, asked.table)
    report(table)


if __name__ == "__main__":
    main()
