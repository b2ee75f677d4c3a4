"""Bytes of a sparse plan, exactly: a short run of it whose picks are recorded, beside the simulator on those very picks."""

from dataclasses import replace

from calibration.runner import Runner
from runtime.recorder import Record
from sim.capture import evicts_least_wanted
from sim.cost import CostModel
from sim.forecast import forecast
from sim.plan import Plan
from sim.profile import Profile
from sim.recipe import Recipe, plan_of
from sim.recording import RecordedSelection
from sim.spec import MachineSpec
from sim.trace import Trace
from sim.verdict import Replayed

_SEQUENCES, _TOKENS = 2, 8  # of a run that launches kernel by kernel and lists every pick: under a second


def replayed(recipe: Recipe, machine: MachineSpec, runner: Runner) -> Replayed | None:
    """None where nothing is picked, or nothing lies outside HBM; nor where the plan's run has the least wanted leave HBM.

    Which those are, the attention paid to them says and no list of picks; the run that lists them keeps homes by age.
    The plan's share of tokens in HBM is that of the short run's tokens; what its lanes pick does not overrun a budget.
    """
    batch = min(_SEQUENCES, recipe.batch)
    short = replace(recipe, batch=batch, concurrency=0, output=min(_TOKENS, recipe.output))
    plan = plan_of(short, machine)
    plan = replace(plan, setting=replace(plan.setting, kv_budget_bytes=2 * plan.setting.kv_budget_bytes))
    if evicts_least_wanted(plan.setting):
        return None
    if plan.setting.attention.is_dense or not (any(plan.homes.host_kv) or any(plan.homes.activations)):
        return None
    ran = runner.run(plan, record=Record(selections=False, picks=True))
    assert ran.picks is not None
    picks = tuple(tuple(tuple(layer) for layer in step) for step in ran.picks)
    return _compared(plan, ran.trace, RecordedSelection(selector=recipe.selector, picks=picks))


def _compared(plan: Plan, trace: Trace, recording: RecordedSelection) -> Replayed:
    """What moves is no question of how fast: any profile will do."""
    machine = plan.setting.machine
    cost = CostModel(machine=machine, profile=Profile.nominal(machine))
    simulated, measured = forecast(plan, cost, recording=recording).outcome, trace.outcome
    return Replayed(
        measured_h2d_bytes=measured.h2d_bytes,
        measured_d2h_bytes=measured.d2h_bytes,
        simulated_h2d_bytes=simulated.h2d_bytes,
        simulated_d2h_bytes=simulated.d2h_bytes,
    )
