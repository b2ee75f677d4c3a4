"""Simulated beside measured: errors, what explains each, and what a roofline would have said."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calibration.campaign import Campaign, Results
from calibration.roofline import roofline_s, with_hindsight
from sim.allocated import peak_allocated_bytes
from sim.cost import CostModel
from sim.counts import Column
from sim.engine import simulate
from sim.flows import flows_of, home_columns
from sim.occupancy import occupancy_of
from sim.plan import Admission, Plan
from sim.profile import Profile
from sim.recipe import Recipe, plan_of
from sim.scheduled import admit
from sim.spec import MachineSpec
from sim.verdict import Figures, Judged, Stratum, Verdict


def judge(campaign: Campaign, results: Results, profile: Profile, machine: MachineSpec, *, on_gpu: bool) -> Verdict:
    """Simulate what was run and compare.

    Raises ValueError if nothing was.
    """
    cost = CostModel(machine=machine, profile=profile)
    strata = {one.recipe: one.stratum for one in campaign.plans}
    ran = [(one.recipe, one.figures) for one in results.results if one.figures is not None]
    again = {one.recipe: one.replayed for one in results.results}
    if not ran:
        why = next((one.reason for one in results.results), "none was started")
        raise ValueError(f"campaign of {len(campaign.plans)} plans, none has run: {why}")
    plans = {recipe: plan_of(Recipe.of(recipe), machine, profile) for recipe, _ in ran}
    rival = with_hindsight(
        [roofline_s(plans[recipe], cost) for recipe, _ in ran], [figures.makespan_s for _, figures in ran]
    )
    judged = [
        replace(
            _judged(recipe, strata[recipe], plans[recipe], cost, figures, error, on_gpu=on_gpu),
            replayed=again[recipe],
        )
        for (recipe, figures), error in zip(ran, rival, strict=True)
    ]
    failed = tuple((one.recipe, one.reason) for one in results.results if one.figures is None)
    not_replayed = tuple((one.recipe, one.reason) for one in results.results if one.figures and one.reason)
    return Verdict(
        gpu=campaign.gpu,
        profile=profile.name,
        profile_hash=campaign.profile_hash,
        seed=campaign.seed,
        waiting=len(strata.keys() - {one.recipe for one in results.results}),
        plans=tuple(sorted(judged, key=lambda one: -abs(one.makespan))),
        failed=failed,
        not_replayed=not_replayed,
    )


def _judged(
    recipe: str, stratum: Stratum, plan: Plan, cost: CostModel, measured: Figures, roofline: float, *, on_gpu: bool
) -> Judged:
    asked = peak_allocated_bytes(plan, cost) if on_gpu else None  # on a CPU no allocator says what was measured
    simulated = Figures.of(simulate(plan, cost), asked)
    return Judged(
        recipe=recipe,
        stratum=stratum,
        measured=measured,
        simulated=simulated,
        makespan=simulated.makespan_s / measured.makespan_s - 1,
        ttft=simulated.ttft_s / measured.ttft_s - 1,
        tpot_p50=_error(simulated.tpot_p50_s, measured.tpot_p50_s),
        tpot_p95=_error(simulated.tpot_p95_s, measured.tpot_p95_s),
        moved=_error(simulated.moved_bytes, measured.moved_bytes),
        peak_hbm=simulated.peak_hbm_bytes / measured.peak_hbm_bytes - 1 if on_gpu else None,
        roofline=roofline,
        explained_by=explained_by(plan, simulated, measured),
    )


def _error(simulated: float | None, measured: float | None) -> float | None:
    if not simulated and not measured:
        return None
    return (simulated or 0.0) / measured - 1 if measured else None


def explained_by(plan: Plan, simulated: Figures, measured: Figures) -> str:
    """Where most of the difference lies: the prefill, what every decode step has, or what grows with its tokens."""
    said, took = np.array(simulated.step_s), np.array(measured.step_s[: len(simulated.step_s)])
    gap = took - said[: len(took)]
    prefills, grows, name = _drivers(plan)
    prefills, grows = prefills[: len(gap)], grows[: len(gap)]
    decode, tokens = gap[~prefills], grows[~prefills]
    driver = tokens - tokens.mean() if len(tokens) else tokens
    slope = float(driver @ (decode - decode.mean()) / (driver @ driver)) if driver.any() else 0.0
    # what grows weighs by all of its tokens, not by their growth alone, but never by more than there is to explain
    growing = np.clip(slope * tokens, -np.abs(decode), np.abs(decode))
    parts = {
        "prefill": float(gap[prefills].sum()),
        "products, launches": float((decode - growing).sum()),
        name: float(growing.sum()),
    }
    return max(parts, key=lambda part: abs(parts[part]))


def _drivers(plan: Plan) -> tuple[NDArray[np.bool_], Column, str]:
    """By steps: which ones prefill; tokens that time grows with, and what that time is spent on."""
    homes = home_columns(plan.homes)
    flows = flows_of(plan, homes)
    if plan.setting.admission is Admission.CONTINUOUS:
        planned = admit(plan.setting, occupancy_of(plan, homes, flows))
        return planned.prefilled > 0, planned.decoding(flows.kept), "attention"
    moved = flows.fetched_kv + flows.fetched_inputs + flows.forwarded
    first = np.arange(len(moved)) == 0
    return (first, moved, "link or recomputation") if moved[1:].any() else (first, flows.kept, "attention")
