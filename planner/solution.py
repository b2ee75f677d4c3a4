"""The answer: a plan, what it is predicted to do, and how far from the best it can be."""

from dataclasses import dataclass
from enum import StrEnum

from planner.request import Request
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


class Tier(StrEnum):
    """A memory that can be too small."""

    HBM = "hbm"
    HOST = "host"


class Blame(StrEnum):
    """What asks for more than there is: three kinds of bytes, or a bound on the time between tokens."""

    WEIGHTS = "weights"
    WORKSPACE = "workspace"
    KV = "kv"
    LATENCY = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change after which a plan fits, as options of the command line, and the speed of that plan, which was solved for."""

    words: str
    request: Request
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why nothing fits. Of the plan that comes nearest: which memory overflows, from which step on, and by how much.

    ``tier`` is None where memory suffices and latency does not. ``step`` is None where weights and workspace alone are
    too large. With ``missing_bytes`` more of ``tier`` that plan would fit; ``blamed_bytes`` is what ``blame`` takes.
    """

    blame: Blame
    blamed_bytes: int
    tier: Tier | None
    step: int | None
    missing_bytes: int
    suggestions: tuple[Suggestion, ...] = ()


class Infeasible(Exception):
    """No plan fits; the message, one line, says why and what to change, ``shortage`` says it in numbers."""

    def __init__(self, message: str, shortage: Shortage | None = None) -> None:
        super().__init__(message, shortage)
        self.shortage = shortage

    def __str__(self) -> str:
        return str(self.args[0])
