"""The mixed-integer solvers behind PuLP: HiGHS where highspy is installed, else CBC."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import pulp

SOLVERS = ("highs", "cbc")
GAP = 1e-5  # relative: between a solver's best and its bound when it stops


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverRun:
    """How one program went. ``bound`` is what the solver proved, at most ``objective`` apart from its tolerance."""

    name: str
    status: str
    objective: float
    bound: float
    solve_s: float

    @property
    def is_optimal(self) -> bool:
        return self.status == "optimal"


def _let_go_of_importers() -> None:
    """PuLP keeps an error of each solver that it lacks; with the error the frames of whoever imported it, and what they hold.

    Of a caller that has a model on a GPU that is the model, for as long as the process lives.
    """
    for solver in vars(pulp).values():
        error = getattr(solver, "err", None)
        while isinstance(error, BaseException):
            error.__traceback__, error = None, error.__context__


_let_go_of_importers()


def default_solver() -> str:
    """HiGHS if it can be imported."""
    return "highs" if find_spec("highspy") else "cbc"


def run_solver(lp: pulp.LpProblem, name: str | None = None) -> SolverRun:
    """Solve ``lp`` in place with the solver called ``name``.

    Raises ValueError if there is no such solver here.
    """
    name = name or default_solver()
    started = time.perf_counter()
    status = lp.solve(_command(name))
    solve_s = time.perf_counter() - started
    objective = float(pulp.value(lp.objective) or 0.0)
    return SolverRun(
        name=name,
        status=pulp.LpStatus[status].lower(),
        objective=objective,
        bound=_proved(lp, name, objective),
        solve_s=solve_s,
    )


# Our programs are solved at the root in milliseconds; heuristics that solve others on the way take twice as long.
_HIGHS_OPTIONS = {
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_rins": False,
    "mip_heuristic_run_root_reduced_cost": False,
    "mip_heuristic_run_feasibility_jump": False,
}


class _QuietHighs(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS whose constructor does not print its banner on standard output, which belongs to our own answer."""

    def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802
        with _no_stdout():
            super().createAndConfigureSolver(lp)


@contextmanager
def _no_stdout() -> Iterator[None]:
    """Send what native code writes to file descriptor 1 nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _command(name: str) -> pulp.LpSolver:
    if name == "highs" and find_spec("highspy"):
        return _QuietHighs(msg=False, gapRel=GAP, threads=1, **_HIGHS_OPTIONS)
    if name == "cbc":
        installed = pulp.COIN_CMD(msg=False, gapRel=GAP)
        bundled = pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, msg=False, gapRel=GAP)  # until PuLP 4
        for command in (installed, bundled):
            if command.available():
                return command
    raise ValueError(
        f"solver={name}, must be one of {', '.join(SOLVERS)} and installed: pip install highspy, or pulp[cbc]"
    )


def _proved(lp: pulp.LpProblem, name: str, objective: float) -> float:
    if name != "highs":
        return objective * (1 - GAP)  # CBC stops within gapRel of its bound, which PuLP does not pass on
    info = lp.solverModel.getInfo()
    return float(info.mip_dual_bound) if abs(info.mip_dual_bound) < 1e300 else objective
