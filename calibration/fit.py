"""A profile from measurements: bounded, robust least squares on the ratio of predicted to measured seconds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares

from calibration.evidence import family_errors, library_bytes, measured_products, steadiest_step
from calibration.intervals import half_widths
from calibration.problem import JITTER, LEAST, MOST, Problem, problem_of
from sim.cost import CostModel
from sim.measured import Measured
from sim.predict import usual_launch_s
from sim.profile import Estimate, Evidence, Profile
from sim.spec import MachineSpec

_NOT_FITTED = (
    "other_power_share",  # steps are either nearly all products, or hardly held back
    "reserve_bytes",  # bytes, not seconds
    "library_bytes",
)
# A CPU does one thing after the other: what it fetches, all of it waits for.
_ON_CPU = {
    "gemm_sustained_share": 1.0,
    "prefill_sustained_share": 1.0,
    "gather_sm_share": 1.0,
    "selection_exposed_share": 1.0,
    "prompt_tile_s": 0.0,
    "branch_s": 0.0,
}
# Steps would give these whatever value makes up for something else.
_TOLD_BY = {
    "link_duplex_efficiency": "duplex",
    "host_attention_efficiency": "host_attention",
    "host_round_trip_s": "host_attention",
    "gather_link_efficiency": "gather",
    "link_efficiency": "copy",
    "copy_setup_s": "copy",
    "copy_floor_s": "copy",
}
_FIRST_SCALE, _LEAST_SCALE, _OUTLYING = 0.5, 0.005, 3.0  # weighted residuals beyond this count less than their square
_LEAST_EFFECT = 1e-3  # of a constant on any measurement, below which it counts as none
_STEP = 0.01  # of a constant's logarithm, over which a slope is taken
_WIDEST = 1.0  # a factor of nearly three each way: where an interval is wider, the nominal value is tried as well
# Where to begin, times the nominal value: so that neither of two constants hides behind the other in a maximum.
_SHOWS = {
    "gemm_half_rows": 2.0,
    "copy_setup_s": 0.5,
    "gemm_sustained_share": 0.75,
    "prefill_sustained_share": 0.9,
}
_FLOORS = ("host_operation_s",)  # seen only where they bind
_SILENT = "nominal: no measurement depends on it"
_WORSE = 0.1  # of a family's cost, below which a fit counts as no worse
_ALIKE = 0.003  # seconds that differ by less are not told apart
OnStep = Callable[[int, int, str], None]


def fit(measured: Measured, *, name: str, basis: str, on_step: OnStep | None = None) -> Profile:
    """The profile that explains ``measured`` best; what the data cannot tell keeps its nominal value.

    ``on_step`` is told which of how many steps begins, and what it is; the last one again for every constant in doubt.
    Raises ValueError where there is nothing to fit to.
    """
    tell = on_step or _nobody
    machine = measured.machine
    start = replace(Profile.nominal(machine), name=name, basis=basis, products=measured_products(measured.measurements))
    if machine.is_cpu:
        start = replace(start, **_ON_CPU)  # type: ignore[arg-type]
    with problem_of(measured.measurements, machine, start) as nothing:
        if not nothing.rows:
            raise ValueError("measurements, there are none that a constant prices: measure first")
        problem = nothing.of(_fitted_names(machine, {took.family for took, _ in nothing.rows}))
        tell(1, 3, "which constants show")
        silent = _silent(problem, _begin(problem), problem.names)
        problem = problem.of(name for name in problem.names if name not in silent)
        tell(2, 3, f"{len(problem.names)} constants, {len(problem.rows)} measurements")
        found, scale = _solved_twice(problem)
        problem, found, kept = _without_the_unknown(
            problem, found, scale, lambda name: tell(3, 3, f"whether it needs {name}")
        )
        estimates = _estimates(problem, found, scale)
    kept |= dict.fromkeys(silent, _SILENT)
    fitted = problem.profile(found.x)
    besides = library_bytes(CostModel(machine=machine, profile=fitted), measured)
    if besides:
        fitted = replace(fitted, library_bytes=max(0.0, median(besides)))
        kept["library_bytes"] = (
            f"the median of what {len(besides)} allocators' peaks held besides what is accounted for, a stream"
        )
    evidence = Evidence(
        fingerprint=measured.fingerprint,
        machine=machine if machine.is_cpu else None,
        estimates=(*estimates, *_left(kept, problem)),
        errors=family_errors(problem.rows, CostModel(machine=machine, profile=fitted)),
        access=measured.access,
        random_access=measured.random_access,
        reference=steadiest_step(measured.measurements),
        launch_s=usual_launch_s(measured.measurements),
    )
    return replace(fitted, evidence=evidence)


def _nobody(_: int, __: int, ___: str) -> None:
    """Nobody wants to know how far the fit has come."""


def _fitted_names(machine: MachineSpec, families: set[str]) -> tuple[str, ...]:
    """All constants but those that are fixed here, or that nothing but what was not measured can tell."""
    untold = {name for name, family in _TOLD_BY.items() if family not in families}
    fixed = _ON_CPU if machine.is_cpu else {}
    return tuple(name for name in Profile.constants() if name not in {*_NOT_FITTED, *untold, *fixed})


def _begin(problem: Problem) -> NDArray[np.float64]:
    """Nominal values; where those are nothing, or hide another constant behind a maximum, a place from which both show."""
    shown = np.array([np.log(_SHOWS.get(name, 1.0)) for name in problem.names])
    begin = problem.nominal + shown
    first = np.array([0.0 if name in _FLOORS else np.log(0.1) for name in problem.names])
    vanished: NDArray[np.float64] = np.where(begin <= np.log(LEAST), first, begin)
    return vanished


def _solved(problem: Problem, begin: NDArray[np.float64], scale: float, tries: int = 40) -> OptimizeResult:
    kinds = Profile.constants()
    low = np.full(len(problem.names), np.log(LEAST))
    high = np.array([0.0 if kinds[name] == "share" else np.log(MOST) for name in problem.names])
    return least_squares(
        problem.residuals_and_pull,
        np.clip(begin, low + 1e-3, high - 1e-3),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=scale,
        ftol=1e-5,
        xtol=1e-4,
        max_nfev=tries,
        workers=lambda _, places: problem.at_each(places),
    )


def _solved_twice(problem: Problem) -> tuple[OptimizeResult, float]:
    """First with few outliers, to come near; then with what is far off by the usual residual counted less."""
    near = _solved(problem, _begin(problem), _FIRST_SCALE)
    scale = max(_LEAST_SCALE, _OUTLYING * float(np.median(np.abs(problem.residuals(near.x)))))
    return _solved(problem, near.x, scale), scale


def _without_the_unknown(
    problem: Problem, found: OptimizeResult, scale: float, tell: Callable[[str], None]
) -> tuple[Problem, OptimizeResult, dict[str, str]]:
    """Give constants back their nominal values, one by one, where no family of measurements fits those any worse."""
    kept, certain = dict[str, str](), set[str]()
    allowed = _allowed_costs(problem, found, scale)
    widths = _doubtful_widths(problem, found, scale, certain)
    while True:
        open_to_doubt = [
            (problem.nominal[problem.names.index(name)] <= np.log(LEAST), width, name)
            for name, width in widths.items()
            if name not in certain
        ]
        if not open_to_doubt:
            return problem, found, kept
        _, _, name = max(open_to_doubt)  # of two that make up for each other, the one that is nominally nothing
        tell(name)
        place = problem.names.index(name)
        fewer = problem.of(n for n in problem.names if n != name)
        without = _solved(fewer, np.delete(found.x, place), scale, tries=8)  # it is near
        costs = _family_costs(fewer, fewer.residuals(without.x), scale)
        if all(costs[family] <= most for family, most in allowed.items()):
            silent = _silent(problem, found.x, (name,))
            kept[name] = _SILENT if silent else "nominal: the data fit it no worse than any other value"
            problem, found = fewer, without
            widths = _doubtful_widths(problem, found, scale, certain)
        else:
            certain.add(name)


def _doubtful_widths(problem: Problem, found: OptimizeResult, scale: float, certain: set[str]) -> dict[str, float]:
    """Of the intervals of those that are wide, or that no measurement shows."""
    widths = dict(zip(problem.names, _half_widths(problem, found, scale).tolist(), strict=True))
    wide = {name for name in problem.names if widths[name] > _WIDEST}
    doubtful = wide | _silent(problem, found.x, set(problem.names) - wide - certain)
    return {name: widths[name] for name in doubtful}


def _silent(problem: Problem, x: NDArray[np.float64], names: Iterable[str]) -> set[str]:
    """Those that no measurement would show, were they nominal or three times as large as they are, or a third."""
    here = list(problem.each_log_ratio(x))
    return {name for name in names if _is_silent(problem, x, name, here)}


def _is_silent(problem: Problem, x: NDArray[np.float64], name: str, here: Sequence[float]) -> bool:
    place, most = problem.names.index(name), 0.0 if Profile.constants()[name] == "share" else np.log(MOST)
    for value in (problem.nominal[place], x[place] + 1.1, x[place] - 1.1):
        moved = np.array(x)
        moved[place] = min(value, most)
        ratios = zip(problem.each_log_ratio(moved), here, strict=True)
        if any(abs(ratio - before) > _LEAST_EFFECT for ratio, before in ratios):  # most show it soon
            return False
    return True


def _allowed_costs(problem: Problem, found: OptimizeResult, scale: float) -> dict[str, float]:
    """What no family may exceed: each is judged by itself, so that a few telling measurements do not drown among many."""
    costs = _family_costs(problem, problem.residuals(found.x), scale)
    alike = _family_costs(problem, problem.weights * _ALIKE, scale)
    return {family: (1 + _WORSE) * cost + alike[family] for family, cost in costs.items()}


def _family_costs(problem: Problem, residuals: NDArray[np.float64], scale: float) -> dict[str, float]:
    """The robust cost, summed over the measurements of each family."""
    costs = scale**2 * (np.sqrt(1 + (np.asarray(residuals) / scale) ** 2) - 1)
    by_family = dict[str, float]()
    for (took, _), cost in zip(problem.rows, costs, strict=True):
        by_family[took.family] = by_family.get(took.family, 0.0) + float(cost)
    return by_family


def _half_widths(problem: Problem, found: OptimizeResult, scale: float) -> NDArray[np.float64]:
    """Of 95 % intervals of the logarithms, from the Jacobian at the solution, outliers weighing as they did in the fit; no
    measurement is surer than its jitter.
    """
    residual = problem.residuals(found.x)
    damped = np.sqrt(1 / np.sqrt(1 + (residual / scale) ** 2))
    slopes = _jacobian(problem, found.x) * damped[:, None]
    half = half_widths(slopes, damped * residual, damped * problem.weights * JITTER)
    flat = np.abs(slopes).max(axis=0) < _LEAST_EFFECT
    return np.where(flat, np.inf, half)


def _jacobian(problem: Problem, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes of the weighted residuals, by differences of a hundredth: smaller steps drown in nothing, larger ones cross kinks.

    To both sides, where a share may still grow: what shows on one side of a kink shows by half.
    """
    kinds = Profile.constants()
    at_most = np.array([0.0 if kinds[name] == "share" else np.log(MOST) for name in problem.names])
    below, above = ([np.array(x) for _ in range(len(x))] for _ in range(2))
    for place in range(len(x)):
        below[place][place] -= _STEP
        above[place][place] = min(x[place] + _STEP, max(x[place], at_most[place]))
    if not len(x):
        return np.zeros((len(problem.rows), 0))
    moved = [found[: len(problem.rows)] for found in problem.at_each([*below, *above])]
    widths = [above[place][place] - below[place][place] for place in range(len(x))]
    return np.stack(
        [(up - down) / width for down, up, width in zip(moved[: len(x)], moved[len(x) :], widths, strict=True)], axis=1
    )


def _estimates(problem: Problem, found: OptimizeResult, scale: float) -> list[Estimate]:
    effects = np.abs(_jacobian(problem, found.x) / problem.weights[:, None])
    halves = _half_widths(problem, found, scale)
    kinds = Profile.constants()
    estimates = list[Estimate]()
    for place, name in enumerate(problem.names):
        value, half = float(np.exp(found.x[place]) * problem.scales[place]), min(float(halves[place]), 20.0)
        rows = zip(problem.rows, effects[:, place], strict=True)
        telling = [took.family for (took, _), effect in rows if effect > 0.02]
        counts = ", ".join(f"{telling.count(family)} {family}" for family in dict.fromkeys(telling))
        high = value * float(np.exp(half))
        estimates.append(
            Estimate(
                parameter=name,
                low=_told(value * float(np.exp(-half))),
                high=_told(min(1.0, high) if kinds[name] == "share" else high),
                evidence=f"fitted to {counts}" if counts else "fitted: anything this small would do",
            )
        )
    return estimates


def _told(bound: float) -> float:
    """Of an interval no more digits tell anything."""
    return float(f"{bound:.5g}")


def _left(kept: dict[str, str], problem: Problem) -> list[Estimate]:
    """Every other constant, and why it is as it is."""
    estimates = list[Estimate]()
    for name in Profile.constants():
        if name in problem.names:
            continue
        reason = kept.get(name, "nominal: nothing measured here tells it")
        if name in _ON_CPU and problem.machine.is_cpu:
            reason = f"{_ON_CPU[name]:g}: a CPU does one thing after the other"
        estimates.append(Estimate(parameter=name, low=None, high=None, evidence=reason))
    return estimates
