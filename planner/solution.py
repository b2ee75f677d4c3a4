"""The answer: a plan, what it is predicted to do, and how far from the best it can be."""

from dataclasses import dataclass

from sim.outcome import Outcome
from sim.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """``objective_s`` is the makespan of the plan as simulated, ``bound_s`` one that no plan of the problem can beat.

    ``gap`` = objective / bound - 1, the sum of ``solver_gap`` (integer program against its own relaxation) and
    ``discretisation_gap`` (buckets, rounding and linear pieces against the exact cost). ``options`` counts the discrete
    choices that were considered, ``solved`` those whose program had to be solved; the rest were bounded and pruned.
    """

    name: str
    status: str
    objective_s: float
    bound_s: float
    gap: float
    solver_gap: float
    discretisation_gap: float
    solve_s: float
    options: int
    solved: int
    binding: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """``lossless`` is the best plan that leaves the output unchanged: the same plan where that is lossless, None if none fits."""

    plan: Plan
    predicted: Outcome
    certificate: Certificate
    lossless: "Solution | None"


class Infeasible(Exception):
    """No plan fits; the message says which memory is short by how much, and what to change."""
