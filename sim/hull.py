"""Convex prices from points: the straight pieces that a program can read."""

import numpy as np

from sim.flows import Column

_TOLERANCE = 0.005  # of a price, by which a piece that is left out may raise it


def lower_hull(counts: Column, seconds: Column) -> tuple[tuple[float, float], ...]:
    """Of points with ascending ``counts``, the largest of these affine functions (constant, per unit) is their convex hull from
    below, with corners left out where the chord between their neighbours is hardly above them.
    """
    corners = list[int]()
    for place in range(len(counts)):
        while len(corners) > 1 and not _turns_up(counts, seconds, corners[-2], corners[-1], place):
            corners.pop()
        corners.append(place)
    corners = _fewer(counts, seconds, corners)
    if len(corners) == 1:
        return ((float(seconds[0]), 0.0),)
    x, y = counts[corners], seconds[corners]
    slopes = np.diff(y) / np.diff(x)
    return tuple(zip((y[:-1] - slopes * x[:-1]).tolist(), slopes.tolist(), strict=True))


def _turns_up(counts: Column, seconds: Column, first: int, second: int, third: int) -> bool:
    """Whether the second point lies below the chord of the others."""
    before = (seconds[second] - seconds[first]) * (counts[third] - counts[second])
    return bool(before < (seconds[third] - seconds[second]) * (counts[second] - counts[first]))


def _fewer(counts: Column, seconds: Column, corners: list[int]) -> list[int]:
    """From each corner as far as all that are passed over lie close below the chord."""
    kept, at = [corners[0]], 0
    while at + 1 < len(corners):
        to = at + 1
        while to + 1 < len(corners) and _is_close(counts, seconds, corners[at : to + 2]):
            to += 1
        kept.append(corners[to])
        at = to
    return kept


def _is_close(counts: Column, seconds: Column, corners: list[int]) -> bool:
    first, *passed, last = corners
    chord = np.interp(counts[passed], counts[[first, last]], seconds[[first, last]])
    return bool((chord <= (1 + _TOLERANCE) * seconds[passed]).all())
