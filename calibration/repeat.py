"""Two machines of a kind, or two days: what the same measurements differ by is the floor of any claim."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sim.measured import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of one family's common measurements: the median and the largest difference, and on average which is slower."""

    family: str
    common: int
    median: float
    worst: float
    worst_case: str
    bias: float


def differences(first: Measured, second: Measured) -> tuple[Difference, ...]:
    """Family by family, the second's seconds over the first's; the most different family first.

    Raises ValueError if they have nothing in common.
    """
    others = {(one.family, one.case): one.seconds for one in second.measurements}
    ratios = dict[str, list[tuple[float, str]]]()
    for one in first.measurements:
        if (one.family, one.case) in others:
            ratio = others[one.family, one.case] / one.seconds - 1
            ratios.setdefault(one.family, []).append((ratio, one.case))
    if not ratios:
        raise ValueError("the two measurement files have no case in common: measure both on the same kind of device")
    return tuple(sorted((_difference(family, pairs) for family, pairs in ratios.items()), key=lambda one: -one.median))


def _difference(family: str, pairs: Sequence[tuple[float, str]]) -> Difference:
    worst, case = max(pairs, key=lambda pair: abs(pair[0]))
    return Difference(
        family=family,
        common=len(pairs),
        median=median(abs(ratio) for ratio, _ in pairs),
        worst=abs(worst),
        worst_case=case,
        bias=median(ratio for ratio, _ in pairs),
    )
