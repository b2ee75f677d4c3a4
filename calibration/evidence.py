"""What a profile keeps of measurements besides its constants: products, what libraries hold, a step to compare with, its errors."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from sim.allocated import multiplying_streams, peak_allocated_bytes
from sim.capture import is_captured
from sim.cost import CostModel
from sim.measured import Measured
from sim.predict import Prediction
from sim.profile import FamilyError, MeasuredProduct, Measurement
from sim.recipe import Recipe, plan_of
from sim.spec import DType


def measured_products(measurements: Sequence[Measurement]) -> tuple[MeasuredProduct, ...]:
    """Every matrix that was multiplied by itself, by rows."""
    found = dict[tuple[int, int, DType], dict[int, float]]()
    for took in measurements:
        if took.family == "product":
            key = (took.number("inputs"), took.number("outputs"), DType(took.text("dtype")))
            found.setdefault(key, {})[took.number("rows")] = took.seconds
    return tuple(
        MeasuredProduct(
            inputs=inputs,
            outputs=outputs,
            dtype=dtype,
            rows=tuple(sorted(by)),
            seconds=tuple(by[n] for n in sorted(by)),
        )
        for (inputs, outputs, dtype), by in found.items()
    )


def library_bytes(cost: CostModel, measured: Measured) -> list[float]:
    """What allocators have given out besides what plans account for, a stream, of every captured run whose peak is known."""
    plans = [
        (took.peak_bytes, plan_of(Recipe.of(took.case), measured.machine))
        for took in measured.measurements
        if took.peak_bytes
    ]
    bare = replace(cost, profile=replace(cost.profile, library_bytes=0.0))
    return [
        (took - peak_allocated_bytes(plan, bare)) / multiplying_streams(plan.setting)
        for took, plan in plans
        if is_captured(plan.setting)
    ]


def steadiest_step(measurements: Sequence[Measurement]) -> Measurement | None:
    """Of decode: what later runs of the machine are compared with."""
    steps = [one for one in measurements if one.family == "decode"]
    return min(steps, key=lambda one: one.high_s / one.low_s, default=None)


def family_errors(rows: Sequence[tuple[Measurement, Prediction]], cost: CostModel) -> tuple[FamilyError, ...]:
    """How far ``cost`` is from each family, the worst one first."""
    errors = list[FamilyError]()
    for family in dict.fromkeys(took.family for took, _ in rows):
        shares = [(abs(price(cost) / took.seconds - 1), took.case) for took, price in rows if took.family == family]
        worst, case = max(shares)
        middle = median(share for share, _ in shares)
        errors.append(FamilyError(family=family, measurements=len(shares), median=middle, worst=worst, worst_case=case))
    return tuple(sorted(errors, key=lambda error: -error.median))
