"""Near-tied plans of several workloads, all run: how much slower is what a measured or the nominal profile chooses.

    python benchmarks/decisions.py h200.json --table benchmarks/results/decisions.json [--workloads 8] [--seed 0]

A workload fixes model, sequences, tokens and bytes of HBM for KV; its candidates are plans within them that differ in
concurrency, placement, what lies on the host and, where it may, in sparsity. It counts if at least two of them are
within 15 % of the best in simulation. The table is written before anything runs, and resumed where it stopped.
On a CPU set GOMP_SPINCOUNT=10000: threads that spin for long while they wait cost a factor of ten on busy cores.
"""

import argparse
import datetime
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibration.campaign import LONGEST_S, machine_of, measured_figures, require_here
from calibration.draw import draw_recipe
from calibration.machine import device_of, is_cpu
from calibration.runner import Runner
from sim.attention import Selector
from sim.cost import CostModel
from sim.files import write_atomically
from sim.forecast import forecast
from sim.kv import KvFormat
from sim.plan import Placement, Plan, Recompute
from sim.profile import Profile
from sim.profile_files import content_hash, load_profile
from sim.recipe import Recipe, plan_of
from sim.spec import MachineSpec

TIED, MOST_TRIED, MOST_DRAWS = 0.15, 4, 400
LONGEST_SHARE = 0.4  # of what a run of a campaign may take: here several are run for each workload
GOAL = 0.03


def candidates(drawn: Recipe, budget_bytes: float, machine: MachineSpec) -> Iterator[Recipe]:
    """Plans of the drawn workload that keep to the budget: in waves, spilling, recomputing; sparse ones if it is sparse."""
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


def largest_share(recipe: Recipe, budget_bytes: float, machine: MachineSpec) -> Recipe | None:
    """As much in HBM as the budget allows, in twentieths; None where even the least is too much."""
    for hbm in range(100, -1, -5):
        fitting = replace(recipe, hbm=hbm)
        if plan_of(fitting, machine).setting.kv_budget_bytes <= budget_bytes:
            return fitting
    return None


def seconds(recipe: Recipe, cost: CostModel, profile: Profile) -> float:
    return forecast(plan_of(recipe, cost.machine, profile), cost).outcome.makespan_s


def draw(profile: Profile, machine: MachineSpec, seed: int, wanted: int) -> list[dict[str, Any]]:
    """Workloads with near-tied candidates; first those over whose best plan the two profiles disagree."""
    rng, on_gpu = random.Random(seed), not is_cpu(machine)
    measured = CostModel(machine=machine, profile=profile)
    nominal = CostModel(machine=machine, profile=Profile.nominal(machine))
    longest_s = LONGEST_SHARE * LONGEST_S["gpu" if on_gpu else "cpu"]
    agreed, disputed = list[dict[str, Any]](), list[dict[str, Any]]()
    for _ in range(MOST_DRAWS):
        if len(disputed) >= wanted:
            break
        drawn = replace(draw_recipe(rng, on_gpu=on_gpu), concurrency=0, recompute=Recompute.NONE, kv=KvFormat.NATIVE)
        share = rng.choice((0.3, 0.5, 0.7))
        workload = tied(drawn, share, measured, nominal, profile, longest_s)
        if workload is not None:
            (agreed if workload["nominal_choice"] == workload["measured_choice"] else disputed).append(workload)
    return (disputed + agreed)[:wanted]


def tied(
    drawn: Recipe, share: float, measured: CostModel, nominal: CostModel, profile: Profile, longest_s: float
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
    if len(near) < 2 or not 0.2 < times[ranked[0]] < longest_s or times[by_nominal] > 3 * longest_s:
        return None
    return {
        "workload": f"{drawn.model} batch={drawn.batch} prompt={drawn.prompt} output={drawn.output} "
        f"{drawn.selector} keep={drawn.keep} kv_budget_bytes={budget:.0f}",
        "measured_choice": ranked[0],
        "nominal_choice": by_nominal,
        "predicted_s": {case: times[case] for case in tried},
        "measured_s": {},
    }


def fits(plan: Plan, share: float, machine: MachineSpec) -> bool:
    """Weights, workspace and the budgeted KV, with room to spare; on the host the rest."""
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))
    outcome, kv = forecast(plan, cost).outcome, plan.setting.kv_budget_bytes
    needed = outcome.peak_hbm_bytes - (1 - share) * kv
    return needed < 0.85 * machine.gpu.hbm_bytes and kv < 0.4 * machine.host.dram_bytes


def run(table: dict[str, Any], profile: Profile, machine: MachineSpec, device: str, file: Path) -> None:
    runner = Runner(device=device_of(device))
    for workload in sorted(table["workloads"], key=lambda one: one["workload"]):
        for case, predicted_s in workload["predicted_s"].items():
            if case not in workload["measured_s"]:
                plan = plan_of(Recipe.of(case), machine, profile)
                workload["measured_s"][case] = measured_figures(plan, runner, predicted_s).makespan_s
                write_atomically(file, json.dumps(table, indent=1) + "\n")


def report(table: dict[str, Any]) -> None:
    print(f"{'measured':>9} {'nominal':>8} {'tried':>5}  workload (seconds over the best of those tried)")
    losses = []
    for workload in table["workloads"]:
        took = workload["measured_s"]
        best = min(took.values())
        ours, theirs = (took[workload[f"{who}_choice"]] / best - 1 for who in ("measured", "nominal"))
        losses.append((ours, theirs))
        print(f"{ours:+9.1%} {theirs:+8.1%} {len(took):5}  {workload['workload']}")
    within = sum(ours <= GOAL for ours, _ in losses)
    print(
        f"{table['date']}, {table['device']}, profile {table['profile']}: {within} of {len(losses)} within {GOAL:.0%} of "
        f"the best; {sum(ours > theirs + 0.01 for ours, theirs in losses)} slower than the nominal choice by over 1 %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, help="as `planner calibrate` writes it")
    parser.add_argument("--table", type=Path, required=True, help="JSON file to write and resume")
    parser.add_argument("--workloads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--prepare", action="store_true", help="write the workloads down and run nothing")
    asked = parser.parse_args()
    profile = load_profile(asked.profile)
    machine = machine_of(profile)
    if asked.table.exists():
        table = json.loads(asked.table.read_text())
        if table["profile_hash"] != content_hash(profile):
            parser.error(f"{asked.table}: of another profile: name another table")
    else:
        assert profile.evidence is not None
        table = {
            "profile": profile.name,
            "profile_hash": content_hash(profile),
            "device": profile.evidence.fingerprint.device,
            "date": datetime.date.today().isoformat(),
            "seed": asked.seed,
            "workloads": draw(profile, machine, asked.seed, asked.workloads),
        }
        write_atomically(asked.table, json.dumps(table, indent=1) + "\n")
    if not asked.prepare:
        require_here(profile, device_of(asked.device))
        run(table, profile, machine, asked.device, asked.table)
        report(table)


if __name__ == "__main__":
    main()
