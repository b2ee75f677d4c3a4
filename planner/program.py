"""The integer program under construction: its variables and its named rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pulp

from planner.coefficients import Coefficients
from planner.objective import Weights
from planner.spill import SavedRange

Term = tuple[pulp.LpVariable, float]


@dataclass(slots=True, kw_only=True)
class Program:
    """The program under construction. Variables by knot; those of time by wave size, then knot.

    Times are measured in ``unit_s``, what a layer takes at least: the solver's tolerances are absolute.
    """

    problem: Coefficients
    knots: tuple[int, ...]
    weights: Weights
    latency: Weights
    max_tpot_s: float | None
    saved_range: SavedRange
    unit_s: float
    lp: pulp.LpProblem
    rows: dict[str, pulp.LpConstraint] = field(default_factory=dict)
    kv: list[pulp.LpVariable] = field(default_factory=list)
    inputs: list[pulp.LpVariable] = field(default_factory=list)
    forward: list[pulp.LpVariable] = field(default_factory=list)
    linked: list[pulp.LpVariable] = field(default_factory=list)
    recomputing: list[pulp.LpVariable] = field(default_factory=list)
    written: list[pulp.LpVariable] = field(default_factory=list)
    saved: list[pulp.LpVariable] = field(default_factory=list)
    saved_at_birth: pulp.LpVariable | None = None
    fetch_s: list[list[pulp.LpVariable]] = field(default_factory=list)
    layer_s: list[list[pulp.LpVariable]] = field(default_factory=list)
    write_s: list[list[pulp.LpVariable]] = field(default_factory=list)
    step_s: list[list[pulp.LpVariable]] = field(default_factory=list)

    def variable(self, name: str, knot: int, upper: float | None = None, binary: bool = False) -> pulp.LpVariable:
        category = pulp.LpBinary if binary else pulp.LpContinuous
        return self.lp.add_variable(f"{name}_step_{knot}", 0, upper, category)

    def at_most(self, name: str, terms: Sequence[Term], limit: float) -> None:
        """Sum of coefficient x variable <= limit; a variable may be named more than once."""
        self.rows[name] = summed(terms) <= limit
        self.lp.addConstraint(self.rows[name], name)

    def at_most_s(self, name: str, tokens: Sequence[Term], times: Sequence[Term], limit_s: float) -> None:
        """Seconds for tokens and switches + factor x time variables <= limit."""
        self.at_most(name, [*scaled(tokens, self.unit_s), *times], limit_s / self.unit_s)

    def following(self, variables: Sequence[pulp.LpVariable], place: int, scale: float) -> list[Term]:
        """A quantity one step after the knot at ``place``, on the line to the next knot."""
        if place + 1 == len(self.knots):
            return []
        share = 1 / (self.knots[place + 1] - self.knots[place])
        return [(variables[place], scale * (1 - share)), (variables[place + 1], scale * share)]


def summed(terms: Sequence[Term]) -> pulp.LpAffineExpression:
    """PuLP keeps only the last of several coefficients of one variable."""
    coefficients: dict[pulp.LpVariable, float] = {}
    for variable, coefficient in terms:
        coefficients[variable] = coefficients.get(variable, 0.0) + coefficient
    return pulp.LpAffineExpression(coefficients)


def scaled(terms: Sequence[Term], scale: float) -> list[Term]:
    """Coefficients near 1 keep the solver's tolerances meaningful."""
    return [(variable, coefficient / scale) for variable, coefficient in terms]
