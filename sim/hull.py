"""Convex prices from points: the straight pieces that a program can read."""

from itertools import pairwise
from typing import TypeAlias

from sim.counts import Column

Point: TypeAlias = tuple[float, float]  # a count, and its price
_TOLERANCE = 0.005  # of a price, by which a piece that is left out may raise it


def lower_hull(counts: Column, seconds: Column) -> tuple[tuple[float, float], ...]:
    """Of points with ascending ``counts``, the largest of these affine functions (constant, per unit) is their convex hull from
    below, with corners left out where the chord between their neighbours is hardly above them.
    """
    corners = list[Point]()
    for point in zip(counts.tolist(), seconds.tolist(), strict=True):
        while len(corners) > 1 and not _turns_up(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    if len(corners) == 1:
        return ((corners[0][1], 0.0),)
    pieces = ((first, _slope(first, second)) for first, second in pairwise(_fewer(corners)))
    return tuple((second - slope * count, slope) for (count, second), slope in pieces)


def _turns_up(first: Point, second: Point, third: Point) -> bool:
    """Whether the second point lies below the chord of the others."""
    return (second[1] - first[1]) * (third[0] - second[0]) < (third[1] - second[1]) * (second[0] - first[0])


def _fewer(corners: list[Point]) -> list[Point]:
    """From each corner as far as all that are passed over lie close below the chord: each bears one that is so steep."""
    kept, steepest = corners[:1], float("inf")
    for passed, following in pairwise(corners[1:]):
        steepest = min(steepest, _slope(kept[-1], (passed[0], (1 + _TOLERANCE) * passed[1])))
        if _slope(kept[-1], following) > steepest:
            kept.append(passed)
            steepest = float("inf")
    return [*kept, corners[-1]]


def _slope(first: Point, second: Point) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
