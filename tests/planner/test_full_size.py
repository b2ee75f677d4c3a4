"""At full size: the optimum against every step searched by itself, against the engine, and from either solver."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from exhaustive import Rows, paths_of, room_on_host, traffic_of, written_tokens
from planner.bound import least_bound
from planner.coefficients import coefficients_of
from planner.objective import objective_weights
from planner.optimum import optimum
from planner.problem import build
from planner.request import Request
from planner.search import KNOTS, PRUNE_SHARE, Best, choose_knots, in_seconds
from planner.solvers import run_solver
from sim import catalogue
from sim.cost import CostModel
from sim.counts import Column, counts_of
from sim.engine import simulate
from sim.plan import Placement, Recompute, Setting
from sim.profile import Profile
from sim.spec import MachineSpec
from sim.workload import Workload

WITHIN_SEARCH = 2e-3
WITHIN_ENGINE = 5e-3
SAVED_CASES = 12  # of how many inputs are saved, besides what the optimum saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A card, a model and work for them; ``options`` are the request's. What the optimum does is in the name."""

    name: str
    gpu: str
    model: str
    batch: int
    prompt: int
    output: int
    options: dict[str, Any]

    @property
    def request(self) -> Request:
        machine = MachineSpec(name=self.gpu, gpu=catalogue.gpu(self.gpu), host=catalogue.host())
        return Request(
            machine=machine,
            profile=Profile.nominal(machine),
            model=catalogue.model(self.model),
            workload=Workload(batch=self.batch, prompt_tokens=self.prompt, output_tokens=self.output),
            **self.options,
        )


LOSSLESS: dict[str, Any] = {"max_sparsity": 0.0, "kv_formats": ()}
CASES = (
    Case(
        name="KV to the host, then inputs, on an H100",
        gpu="h100-80g-sxm",
        model="opt-30b",
        batch=64,
        prompt=128,
        output=512,
        options=LOSSLESS | {"concurrency": 64},
    ),
    Case(
        name="inputs, up to the host's limit, on an A6000",
        gpu="rtx-a6000",
        model="pythia-12b",
        batch=128,
        prompt=1024,
        output=1024,
        options=LOSSLESS | {"concurrency": 128},
    ),
    Case(
        name="the CPU attends on a T4",
        gpu="t4",
        model="llama-3-8b",
        batch=64,
        prompt=1024,
        output=128,
        options=LOSSLESS,
    ),
    Case(
        name="weights are streamed, the CPU attends, on a V100",
        gpu="v100-16g",
        model="qwen3-32b",
        batch=32,
        prompt=1024,
        output=128,
        options=LOSSLESS | {"concurrency": 32},
    ),
    Case(
        name="KV to the host, in waves on an RTX 5090",
        gpu="rtx-5090",
        model="qwen2.5-14b",
        batch=128,
        prompt=128,
        output=512,
        options=LOSSLESS,
    ),
    Case(
        name="sparse attention, 8-bit KV, what is selected in HBM, in waves on an A10",
        gpu="a10",
        model="llama-2-7b",
        batch=128,
        prompt=512,
        output=1024,
        options={},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_optimum_is_that_of_every_step_by_itself(case: Case) -> None:
    best = _best(case.request)

    searched_s = per_step_search(case.request, best)

    assert best.found.run is not None, "everything fits HBM: nothing to search"
    assert best.found.objective_s <= searched_s * (1 + WITHIN_SEARCH)
    assert best.certificate.bound_s <= best.found.objective_s


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prediction_is_what_the_engine_runs(case: Case) -> None:
    request = case.request
    priced = _best(request).found.priced

    simulated = simulate(priced.plan, CostModel(machine=request.machine, profile=request.profile)).outcome

    assert priced.outcome.makespan_s == pytest.approx(simulated.makespan_s, rel=WITHIN_ENGINE)
    assert priced.outcome.makespan_s == pytest.approx(simulated.makespan_s, rel=1e-9)
    assert (priced.outcome.peak_hbm_bytes, priced.outcome.peak_host_bytes) == pytest.approx(
        (simulated.peak_hbm_bytes, simulated.peak_host_bytes), abs=1
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_solvers_find_the_same_optimum(case: Case) -> None:
    highs, cbc = (_best(case.request, solver) for solver in ("highs", "cbc"))

    assert (highs.certificate.name, cbc.certificate.name) == ("highs", "cbc")
    assert highs.found.run is not None
    assert cbc.found.run is not None
    assert cbc.found.objective_s == pytest.approx(
        highs.found.objective_s, rel=PRUNE_SHARE
    )  # another vertex may round otherwise, and then the best be found with other steps sampled
    program_s = [_program_s(case.request, highs.found.priced.plan.setting, solver) for solver in ("highs", "cbc")]
    assert program_s[1] == pytest.approx(program_s[0], rel=5e-5)


def _program_s(request: Request, setting: Setting, solver: str) -> float:
    """Of the setting's first program, with the same steps sampled whoever solves it."""
    problem = coefficients_of(setting, CostModel(machine=request.machine, profile=request.profile))
    _, saved = least_bound(problem, objective_weights(request.objective, setting).of)
    program = build(problem, choose_knots(problem, KNOTS), request.objective, request.max_tpot_s, saved)
    run = in_seconds(run_solver(program.lp, solver), program)
    assert run.is_optimal
    return run.objective


def _best(request: Request, solver: str = "highs") -> Best:
    best = optimum(request, solver=solver)
    assert best is not None
    return best


def per_step_search(request: Request, best: Best) -> float:
    """The least sum over steps, each by itself with whatever homes are best for it, in the optimum's setting.

    Only how many inputs are saved at birth is common to all steps; some numbers are tried. A step follows one that
    fetches as much. Tokens that a step had to move out stay out in the later ones, as homes only move outward.
    """
    plan, last = best.found.priced.plan, request.workload.cached_tokens
    saved = {0}
    if plan.setting.recompute.from_activations:
        saved |= {plan.saved_inputs_tokens, *np.linspace(0, last, SAVED_CASES, dtype=int).tolist()}
    return min(_steps_by_themselves(request, plan.setting, number) for number in saved)


def _steps_by_themselves(request: Request, setting: Setting, saved: int) -> float:
    cost = CostModel(machine=request.machine, profile=request.profile)
    rows = _rows_with_room(setting, saved)
    traffic = traffic_of(setting, rows, np.full(len(rows), float(saved)))
    fits = setting.concurrency * traffic.host_bytes <= room_on_host(setting)
    if len(np.unique(rows.step[fits])) < setting.workload.output_tokens:
        return float("inf")
    rows, traffic = rows.take(fits), traffic.take(fits)
    paths = paths_of(setting, cost, rows, traffic, written_tokens(setting, rows, None))
    ahead = paths.fetch * ((rows.step > 0) & (rows.step < setting.workload.output_tokens - 1))
    weights = objective_weights(request.objective, setting)
    seconds = paths.seconds(ahead, setting.prefetch_layers, weights, rows.step)
    starts = np.searchsorted(rows.step, np.arange(setting.workload.output_tokens))
    return float(np.minimum.reduceat(seconds, starts).sum())


def _rows_with_room(setting: Setting, saved: int) -> Rows:
    """For each step and number of recomputed tokens: as few others off HBM as must be (or any more, for the CPU)."""
    counts = counts_of(setting)
    step, second, more = (axis.ravel() for axis in np.meshgrid(*_axes(setting, saved), indexing="ij"))
    kv = np.maximum(0.0, _fewest_kv(setting, step, second, saved))
    off = np.full(setting.workload.output_tokens, np.inf)
    np.minimum.at(off, step, kv + second)
    if setting.placement is Placement.RECENT:
        off = np.maximum.accumulate(off + counts.dead) - counts.dead
    kv = np.maximum(kv, off[step] - second) + more
    possible = kv + second <= counts.pool[step]
    return _rows(setting, step[possible], second[possible], kv[possible])


def _axes(setting: Setting, saved: int) -> tuple[Column, Column, Column]:
    """Steps, recomputed tokens, and tokens on the host beyond what is needed."""
    pool = int(counts_of(setting).pool.max())
    most = {
        Recompute.NONE: 0,
        Recompute.TOKENS: setting.workload.prompt_tokens,
        Recompute.ACTIVATIONS_HOST: saved,
        Recompute.ACTIVATIONS_HBM: saved,
    }[setting.recompute]
    seconds, more = np.arange(min(pool, most) + 1.0), np.arange(pool + 1.0 if setting.host_attention else 1.0)
    return np.arange(setting.workload.output_tokens), seconds, more


def _fewest_kv(setting: Setting, step: Column, second: Column, saved: int) -> Column:
    """HBM is linear in the tokens on the host; infinite where they make no room."""
    held = [
        setting.concurrency
        * traffic_of(setting, _rows(setting, step, second, kv), np.full(len(step), float(saved))).hbm_bytes
        for kv in (np.zeros(len(step)), np.ones(len(step)))
    ]
    need, frees = held[0] - setting.kv_budget_bytes, held[0] - held[1]
    kv: Column = np.ceil(np.divide(need, frees, out=np.full_like(need, np.inf), where=frees > 0) - 1e-9)
    return np.where(need > 0, kv, 0.0)


def _rows(setting: Setting, step: Column, second: Column, kv: Column) -> Rows:
    """Copies are those that the access profile leads to expect."""
    counts, keeps = counts_of(setting), setting.recompute.from_activations
    copies = np.ceil(counts.copy_rate[step] * (kv + second) - 1e-9)
    lost = counts.dead[step] + (0.0 if keeps else second)
    inputs = second if keeps else np.zeros_like(second)
    hbm = counts.cached[step] - lost - inputs - kv - copies
    return Rows(step=step, hbm=hbm, host_kv=kv + copies, activations=inputs, dropped=lost, copies=copies)
