"""Plans that a fit has not seen: drawn by a seed and written down before they run, run, resumed and compared."""

import datetime
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from calibration.draw import draw_recipe
from calibration.families.base import FAILURES, reason_of
from calibration.families.steps import steady
from calibration.machine import device_name, name_at, require_answering
from calibration.replay import replayed
from calibration.runner import Runner
from runtime.wave import BudgetExceeded
from sim import catalogue
from sim.breakdown import CPU_WAIT, FETCH_WAIT, LAUNCH_WAIT, OUTPUT_LAYER, WRITE_WAIT, breakdown
from sim.codec import from_plain, to_plain
from sim.cost import CostModel
from sim.files import read_json_object, write_atomically
from sim.forecast import Forecast, forecast
from sim.plan import Plan
from sim.profile import Profile
from sim.profile_files import content_hash
from sim.recipe import Recipe, plan_of
from sim.spec import MachineSpec
from sim.units import GIB
from sim.verdict import Figures, Replayed, Stratum

SCHEMA_VERSION = 1
NOT_RUN: tuple[type[Exception], ...] = (*FAILURES, BudgetExceeded)  # of a plan that cannot be run
LONGEST_S = {"gpu": 10.0, "cpu": 4.0}  # of a run, as predicted
SHORTEST_S = {"gpu": 0.2, "cpu": 0.1}
_HBM_SHARE = 0.85  # of what the card has: allocators and captured graphs need the rest
_HOST_SHARE, _MOST_HOST_BYTES = 0.5, 8 * GIB  # pinning takes about a second a GiB, for every run
_LAUNCH_SHARE = 0.25  # of the decode steps
_DRAWS = 300  # for each plan that is wanted
_REPEATS = ((1.0, 3), (5.0, 2))  # runs shorter than this are made so often, and their median counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A plan to run and how long it should take."""

    stratum: Stratum
    recipe: str
    predicted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What is fixed before anything runs."""

    profile: str
    profile_hash: str
    gpu: str
    seed: int
    prepared: str
    plans: tuple[Drawn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A plan of a campaign, run; None where it could not be, with the reason.

    ``replayed`` is of a short run whose picks were recorded; where that failed ``reason`` is its.
    """

    recipe: str
    figures: Figures | None
    reason: str
    date: str
    device: str
    replayed: Replayed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What has been run of the campaign with that hash."""

    campaign_hash: str
    results: tuple[Result, ...] = ()


def machine_of(profile: Profile) -> MachineSpec:
    """The machine that the profile's shares are of: its own description, or the catalogue's card.

    Raises ValueError for a profile that was not measured.
    """
    if profile.evidence is None:
        raise ValueError(f"profile {profile.name}: not measured at all: run `planner calibrate` first")
    if profile.evidence.machine is not None:
        return profile.evidence.machine
    gpu = catalogue.gpu(profile.evidence.fingerprint.gpu)
    return MachineSpec(name=gpu.name, gpu=gpu, host=catalogue.host())


def require_here(profile: Profile, device: torch.device) -> None:
    """Raise ValueError unless ``device`` is of the kind that was measured; of CPUs the number of cores does not tell it."""
    measured_on, here = machine_of(profile).gpu.name, name_at(device)
    if measured_on == here and device.type == "cpu" and profile.evidence:
        measured_on, here = profile.evidence.fingerprint.device, device_name(device)
    if measured_on != here:
        raise ValueError(
            f"profile {profile.name}: measured on {measured_on}, this machine is {here}: run `planner calibrate` here "
            "first"
        )


def prepare(
    profile: Profile, machine: MachineSpec, *, seed: int, plans: int, longest_s: float | None = None
) -> Campaign:
    """Draw plans, as evenly over the strata as they can be found, sorted so that a model's weights are drawn once.

    None is predicted to run longer than ``longest_s``. Raises ValueError where fewer ``plans`` fit.
    """
    rng, on_gpu = random.Random(seed), not machine.is_cpu
    longest_s = longest_s or LONGEST_S["gpu" if on_gpu else "cpu"]
    cost, quota = CostModel(machine=machine, profile=profile), max(1, plans // len(Stratum))
    drawn, spare, seen, count = list[Drawn](), list[Drawn](), set[str](), Counter[Stratum]()
    for _ in range(_DRAWS * plans):
        if len(drawn) == min(plans, quota * len(Stratum)):
            break
        recipe = draw_recipe(rng, on_gpu=on_gpu)
        one = None if recipe.case in seen else _judged(recipe, profile, cost, longest_s)
        seen.add(recipe.case)
        if one is None:
            continue
        if count[one.stratum] < quota:
            count[one.stratum] += 1
            drawn.append(one)
        else:
            spare.append(one)
    drawn += spare[: plans - len(drawn)]
    if len(drawn) < plans:
        raise ValueError(f"plans={plans}, only {len(drawn)} fit this machine and {longest_s:g} s: ask for fewer")
    drawn.sort(key=_by_weights)
    return Campaign(
        profile=profile.name,
        profile_hash=content_hash(profile),
        gpu=machine.gpu.name,
        seed=seed,
        prepared=datetime.date.today().isoformat(),
        plans=tuple(drawn),
    )


def _by_weights(one: Drawn) -> tuple[str, str, int, str]:
    recipe = Recipe.of(one.recipe)
    return recipe.model, recipe.weights, recipe.streamed, one.recipe


def _judged(recipe: Recipe, profile: Profile, cost: CostModel, longest_s: float) -> Drawn | None:
    """None for a plan that does not fit the machine or takes too long."""
    machine, kind = cost.machine, "cpu" if cost.machine.is_cpu else "gpu"
    try:
        priced = forecast(plan_of(recipe, machine, profile), cost)
    except ValueError:  # more tokens than the model's context, or a format that the card lacks
        return None
    outcome = priced.outcome
    fits = outcome.peak_hbm_bytes < _HBM_SHARE * machine.gpu.hbm_bytes
    fits = fits and outcome.peak_host_bytes < min(_MOST_HOST_BYTES, _HOST_SHARE * machine.host.dram_bytes)
    if not fits or not SHORTEST_S[kind] < outcome.makespan_s < longest_s:
        return None
    return Drawn(stratum=stratum_of(priced), recipe=recipe.case, predicted_s=outcome.makespan_s)


def stratum_of(priced: Forecast) -> Stratum:
    """What the largest part of the decode steps goes to: a prefill is products for the most part, whatever binds the plan. Launches
    and choices from a quarter on: of captured steps they take no more than a third, beside weights that any step reads.
    """
    spent = Counter[str]()
    for wave in priced.waves:
        by_kind = breakdown(priced.plan.setting, wave)
        spent.update({kind: float(seconds[1:].sum()) for kind, seconds in by_kind.items()})
    shares = {
        Stratum.WEIGHTS: spent["matrix products"] + spent[OUTPUT_LAYER],
        Stratum.KV_READS: spent["attention"] + spent["quantisation"],
        Stratum.LINK: spent[FETCH_WAIT] + spent[WRITE_WAIT] + spent[CPU_WAIT] + spent["SMs lent to transfers"],
        Stratum.LAUNCH: spent["kernel launches"] + spent["unfused passes"] + spent["selection"] + spent[LAUNCH_WAIT],
        Stratum.RECOMPUTE: spent["recomputation"],
    }
    if shares[Stratum.LAUNCH] > _LAUNCH_SHARE * sum(shares.values()):
        return Stratum.LAUNCH
    return max(shares, key=lambda stratum: shares[stratum])


def run_campaign(
    campaign: Campaign,
    profile: Profile,
    machine: MachineSpec,
    device: torch.device,
    before: Results,
    on_result: Callable[[Results, int], None],
) -> Results:
    """Run what has no result yet; ``on_result`` is given all results after each, and how many plans there are.

    Raises ValueError for another profile than the campaign was prepared for, and where the device no longer answers.
    """
    if campaign.profile_hash != content_hash(profile):
        raise ValueError(
            f"profile {profile.name}: not the one that the campaign was prepared for ({campaign.profile}, "
            f"{campaign.profile_hash[:19]}...): give that one, or prepare another campaign"
        )
    done, results, runner = {one.recipe for one in before.results}, before, Runner(device=device)
    for drawn in campaign.plans:
        if drawn.recipe in done:
            continue
        plan = plan_of(Recipe.of(drawn.recipe), machine, profile)
        result = _run(drawn, plan, runner, device_name(device))
        results = replace(results, results=(*results.results, result))
        on_result(results, len(campaign.plans))
        if result.figures is None:
            require_answering(device)
    return results


def drift(profile: Profile, machine: MachineSpec, device: torch.device) -> float | None:
    """How many times as long the profile's reference step takes now; None without one."""
    reference = profile.evidence.reference if profile.evidence else None
    if reference is None:
        return None
    plan, runner = plan_of(Recipe.of(reference.case), machine, profile), Runner(device=device)
    runner.warm(plan)
    steps = [seconds for _ in range(3) for seconds in steady(runner.run(plan).trace.waves[0].step_end_s)]
    return median(steps) / reference.seconds


def _run(drawn: Drawn, plan: Plan, runner: Runner, device: str) -> Result:
    date = datetime.date.today().isoformat()
    result = Result(recipe=drawn.recipe, figures=None, reason="", date=date, device=device)
    try:
        result = replace(result, figures=measured_figures(plan, runner, drawn.predicted_s))
        return replace(result, replayed=replayed(Recipe.of(drawn.recipe), plan.setting.machine, runner))
    except NOT_RUN as error:
        return replace(result, reason=reason_of(error))


def measured_figures(plan: Plan, runner: Runner, predicted_s: float) -> Figures:
    """The run with the median makespan, of two the quicker, after a few steps that load and compile what is needed."""
    runner.warm(plan)
    repeats = repeats_of(predicted_s)
    runs = [runner.run(plan) for _ in range(repeats)]
    peak_bytes = max((ran.peak_bytes for ran in runs if ran.peak_bytes is not None), default=None)
    figures = sorted(
        (replace(Figures.of(ran.trace, peak_bytes), launch_s=ran.launch_s) for ran in runs),
        key=lambda one: one.makespan_s,
    )
    return figures[(repeats - 1) // 2]


def repeats_of(predicted_s: float) -> int:
    """How often a run is made; short ones more than once."""
    return next((times for below_s, times in _REPEATS if predicted_s < below_s), 1)


def campaign_hash(campaign: Campaign) -> str:
    """Of all that was fixed beforehand."""
    return f"sha256:{hashlib.sha256(repr(to_plain(campaign)).encode()).hexdigest()}"


def save(path: Path, noun: Campaign | Results) -> None:
    """A campaign or its results."""
    whole = {"schema_version": SCHEMA_VERSION, **to_plain(noun)}
    write_atomically(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def load_campaign(path: Path) -> Campaign:
    """What ``save`` wrote; ValueError for another schema version or a value that does not fit."""
    return from_plain(Campaign, _body(path), str(path))


def load_results(path: Path, campaign: Campaign) -> Results:
    """Results so far, none if there is no such file; ValueError if they are another campaign's."""
    if not path.exists():
        return Results(campaign_hash=campaign_hash(campaign))
    results = from_plain(Results, _body(path), str(path))
    if results.campaign_hash != campaign_hash(campaign):
        raise ValueError(f"{path}: results of another campaign: move the file away, or give that campaign")
    return results


def results_file(campaign: Path) -> Path:
    """Beside the campaign, which itself is never changed."""
    return campaign.with_suffix(".results.json")


def _body(path: Path) -> dict[str, object]:
    data = read_json_object(path)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version={version!r}, must be {SCHEMA_VERSION}: prepare the campaign again")
    return data
