"""What a fit minimises: how far predictions are from measurements, for any values of the constants; by several processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calibration.beside import beside, cores
from sim.cost import CostModel
from sim.predict import Prediction, predictable
from sim.profile import Measurement, Profile
from sim.spec import MachineSpec

# What one unit of an amount is while fitting, where its nominal value is nothing.
_TYPICAL = {
    "product_setup_s": 5e-6,
    "attention_setup_s": 5e-6,
    "attention_token_s": 1e-6,
    "quantised_token_s": 1e-6,
    "paged_token_s": 1e-6,
    "streamed_token_s": 1e-6,
    "host_operation_s": 2e-5,
    "selection_pass_s": 1e-6,
    "recall_setup_s": 5e-6,
    "recall_doubling_s": 2e-6,
    "branch_s": 2e-5,
}
LEAST, MOST = 1e-4, 1e4  # of the typical value: as good as nothing, and a bound that only keeps the numbers finite
_STEP_FAMILIES = ("decode", "prefill")
_STEP_WEIGHT = 4.0  # whole layers are what a plan is made of
_PULL, _LOW = 0.003, float(np.log(0.01))
JITTER = 0.03  # of any measurement besides the spread that it shows
_WORTH_IT, _MOST_PROCESSES = 300, 16  # rows, which take some 0.1 s; a fit has about forty constants

Logs = NDArray[np.float64]  # of constants, in units of their scales
Rows = tuple[tuple[Measurement, Prediction], ...]
Each = Callable[[tuple[str, ...], Iterable[Logs]], Iterable[NDArray[np.float64]]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The logarithms of constants ``names`` in units of their scales; one row a measurement.

    In logarithms the residuals are nearly straight lines of the constants, and an interval is a factor.
    ``each`` gives ``residuals_and_pull`` of many places at once.
    """

    machine: MachineSpec
    start: Profile
    rows: Rows
    names: tuple[str, ...]
    each: Each | None = None

    @cached_property
    def scales(self) -> NDArray[np.float64]:
        kinds = Profile.constants()
        return np.array(
            [1.0 if kinds[name] == "share" else getattr(self.start, name) or _TYPICAL[name] for name in self.names]
        )

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        families = [took.family for took, _ in self.rows]
        return np.array(
            [
                (_STEP_WEIGHT if took.family in _STEP_FAMILIES else 1.0)
                * _trust(took)
                / np.sqrt(families.count(took.family))
                for took, _ in self.rows
            ]
        )

    @cached_property
    def nominal(self) -> Logs:
        values = np.array([getattr(self.start, name) for name in self.names]) / self.scales
        logs: Logs = np.log(np.maximum(values, LEAST))
        return logs

    def of(self, names: Iterable[str]) -> "Problem":
        """The same with other constants."""
        return replace(self, names=tuple(names))

    def profile(self, x: Logs) -> Profile:
        values = {name: float(value) for name, value in zip(self.names, np.exp(x) * self.scales, strict=True)}
        return replace(self.start, **values)  # type: ignore[arg-type]

    def each_log_ratio(self, x: Logs) -> Iterator[float]:
        """Row by row."""
        cost = CostModel(machine=self.machine, profile=self.profile(x))
        return (float(np.log(price(cost) / took.seconds)) for took, price in self.rows)

    def residuals(self, x: Logs) -> NDArray[np.float64]:
        return self.weights * np.fromiter(self.each_log_ratio(x), np.float64)

    def residuals_and_pull(self, x: Logs) -> NDArray[np.float64]:
        """Of constants that make up for each other, those near their nominal values are preferred, ever so slightly."""
        return np.concatenate((self.residuals(x), _PULL * (x - np.maximum(self.nominal, _LOW))))

    def at_each(self, places: Iterable[Logs]) -> Iterable[NDArray[np.float64]]:
        """``residuals_and_pull`` of each."""
        return map(self.residuals_and_pull, places) if self.each is None else self.each(self.names, places)


def _trust(took: Measurement) -> float:
    """Less where repeated samples disagree: 1 for a steady one."""
    spread = (
        float(np.log(took.high_s / took.low_s)) / 2.56
    )  # a normal distribution's 10th to 90th percentile, in sigmas
    return float(JITTER / np.hypot(JITTER, spread / np.sqrt(took.samples)))


@contextmanager
def problem_of(measurements: Sequence[Measurement], machine: MachineSpec, start: Profile) -> Iterator[Problem]:
    """One without constants as yet; looked at by several processes as long as it lasts, where there is enough of it."""
    problem = Problem(machine=machine, start=start, rows=tuple(predictable(measurements, machine)), names=())
    processes = min(_MOST_PROCESSES, cores())
    if len(problem.rows) < _WORTH_IT or processes < 2:
        yield problem
        return
    with beside(processes, _begin, measurements, machine, start) as pool:

        def each(of: tuple[str, ...], places: Iterable[Logs]) -> Iterable[NDArray[np.float64]]:
            several = list(places)
            try:
                return list(pool.map(_residuals, [of] * len(several), several))
            except BrokenProcessPool:  # one was ended from outside, or could not begin: this process does it
                return map(problem.of(of).residuals_and_pull, several)

        yield replace(problem, each=each)


_problems = dict[tuple[str, ...], Problem]()  # of a process, by the constants that are fitted; the first has none


def _begin(measurements: Sequence[Measurement], machine: MachineSpec, start: Profile) -> None:
    _problems[()] = Problem(machine=machine, start=start, rows=tuple(predictable(measurements, machine)), names=())


def _residuals(names: tuple[str, ...], x: Logs) -> NDArray[np.float64]:
    if names not in _problems:
        _problems[names] = _problems[()].of(names)
    return _problems[names].residuals_and_pull(x)
