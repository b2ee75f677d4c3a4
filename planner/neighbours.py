"""Rows of token homes near a plan: about as many tokens off HBM and recomputed as there, or as need be."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from planner.coefficients import Coefficients
from planner.rounding import Shape
from sim.counts import Column, counts_of
from sim.flows import Homes
from sim.plan import Placement, Plan

Flags = NDArray[np.bool_]
Index = NDArray[np.intp]

BAND = 2  # tokens to either side of the centre that are tried
ABOVE_NEED = 2  # tokens off HBM beyond what a row needs
LOOK_AHEAD = (1, 2, 4)  # steps
SLACK = 1e-9  # relative, where sums are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Centre:
    """Where to look, [step] each: tokens off HBM that have no copy there, all with their home off it, and ``second`` ones.

    Those are kept as inputs and belong to both, or are dropped to be forwarded again and belong to neither.
    """

    off: Column
    homed: Column
    second: Column
    saved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Candidate rows of homes, sorted by step, [row] each."""

    step: Index
    homes: Homes

    def take(self, which: Index | Flags) -> "Rows":
        taken = {column.name: getattr(self.homes, column.name)[which] for column in fields(self.homes)}
        return Rows(step=self.step[which], homes=Homes(**taken))

    def __len__(self) -> int:
        return len(self.step)


def nearby_rows(problem: Coefficients, centre: Centre, saved: int) -> Rows:
    """Rows of every step: as few tokens off HBM as fit, a few more, and about as many as at the centre.

    Copies are as many as the access profile leads to expect, or as many as keep all homes where the centre has them.
    """
    setting, counts = problem.setting, counts_of(problem.setting)
    resident, chooses = setting.placement is Placement.RESIDENT, problem.uses_inputs or problem.uses_forward
    step = np.arange(problem.steps)[:, None, None, None]
    second = _second_nearby(problem, centre)[:, :, None, None] if chooses else np.zeros(1)
    off = np.arange(counts.pool.max() + 1)[:, None]
    homed = centre.homed[step] + np.array([-np.inf, 0.0, 1.0, 2.0, 4.0] if resident else [-np.inf])
    copies = np.maximum(np.ceil(counts.copy_rate[step] * off - SLACK), homed - off)
    inputs = second if problem.uses_inputs else np.zeros(1)
    lost = counts.dead[step] + (second if problem.uses_forward else 0.0)
    host_kv = off + copies - inputs
    columns = np.broadcast_arrays(step, off, counts.cached[step] - lost - off - copies, host_kv, inputs, lost, copies)
    steps, off, *homes = columns
    names = ("hbm", "host_kv", "activations", "dropped", "copies")
    rows = Rows(step=steps.ravel(), homes=Homes(**{n: c.ravel() for n, c in zip(names, homes, strict=True)}))
    fits = (_are_valid(problem, rows, saved) & _fit_hbm(problem, rows, saved)).reshape(steps.shape)
    fewest = fits & (np.cumsum(fits, axis=2) <= 1 + ABOVE_NEED)
    near = fits & (np.abs(off - centre.off[step]) <= (BAND if setting.host_attention else 1))
    for later in LOOK_AHEAD:  # what leaves HBM later may leave now
        slots = (counts.cached - counts.dead - centre.off)[np.minimum(step + later, problem.steps - 1)]
        near |= fits & (counts.cached[step] - counts.dead[step] - off == slots)
    return rows.take(np.flatnonzero(fewest | near))


def _second_nearby(problem: Coefficients, centre: Centre) -> Column:
    """About as many recomputed tokens as at the centre, hardly any, and all that must leave HBM; [step, choice], no two alike."""
    near = [centre.second + more for more in range(-BAND, BAND + 1)]
    steps = np.arange(problem.steps)
    apart = (*LOOK_AHEAD, *(-later for later in LOOK_AHEAD))  # what is recomputed later may be now, or as few as before
    near += [centre.second[np.clip(steps + other, 0, problem.steps - 1)] for other in apart]
    whole = all_second(problem)
    choices = np.sort(np.stack([*near, 0 * whole, 0 * whole + 1, whole - 1, whole, whole + 1], axis=1), axis=1)
    repeated = np.diff(choices, axis=1, prepend=-1.0) == 0
    return np.where(repeated, -1.0, choices)


def all_second(problem: Coefficients) -> Column:
    """Recomputed tokens at each step if nothing were homed on the host as KV."""
    memory, most = problem.memory, np.array(problem.setting.workload.prompt_tokens if problem.uses_forward else np.inf)
    frees = memory.freed_by_forward if problem.uses_forward else memory.freed_by_inputs
    pool = np.minimum(counts_of(problem.setting).pool, most)
    need = memory.hbm_all_in + memory.hbm_per_saved * pool - memory.hbm_budget
    enough = np.divide(np.maximum(0.0, need), frees, out=np.where(need > 0, pool, 0.0), where=frees > 0)
    second: Column = np.minimum(pool, np.maximum.accumulate(np.ceil(enough - SLACK)))
    return second


def _are_valid(problem: Coefficients, rows: Rows, saved: int) -> Flags:
    setting, homes, dead = problem.setting, rows.homes, counts_of(problem.setting).dead[rows.step]
    slots, most_dropped = np.array(setting.slots_needed)[rows.step], np.array(setting.most_dropped)[rows.step]
    valid: Flags = (homes.activations >= 0) & (homes.host_kv >= 0) & (homes.hbm >= 0) & (homes.dropped >= dead)
    valid &= (homes.hbm + homes.copies >= slots) & (homes.dropped <= most_dropped)
    valid &= (homes.activations == 0) | (homes.activations + homes.dropped <= saved)
    return valid


def _fit_hbm(problem: Coefficients, rows: Rows, saved: int) -> Flags:
    memory, counts, homes, step = problem.memory, counts_of(problem.setting), rows.homes, rows.step
    homed = homes.host_kv + homes.activations
    inputs = (homed - homes.copies) * homes.activations / np.maximum(homed, 1.0)
    kept = np.maximum(0.0, np.minimum(counts.cached[step], saved) - homes.dropped)
    held = memory.hbm_all_in[step] + memory.hbm_per_saved * kept
    held = held - memory.freed_by_kv[step] * (homed - homes.copies - inputs) - memory.freed_by_inputs[step] * inputs
    if problem.uses_forward:
        held = held - memory.freed_by_forward[step] * homes.dropped
    fits: Flags = held <= memory.hbm_budget * (1 + SLACK)
    return fits


def centre_of(plan: Plan) -> Centre:
    """Around ``plan``."""
    homes, forwards = plan.homes, not plan.setting.recompute.from_activations
    host_kv, activations, dropped, copies = (
        np.array(column, dtype=np.float64) for column in (homes.host_kv, homes.activations, homes.dropped, homes.copies)
    )
    second = dropped - counts_of(plan.setting).dead if forwards else activations
    homed = host_kv + activations
    return Centre(off=homed - copies, homed=homed, second=second, saved=plan.saved_inputs_tokens)


def centre_of_lines(shape: Shape) -> Centre:
    """Around what the program decides, in whole tokens."""
    off, second = np.ceil(shape.off - 1e-6), np.rint(shape.share_inputs * shape.off + shape.forward)
    return Centre(off=off, homed=off, second=second, saved=shape.saved_at_birth)
