"""Straight pieces from points: below all of them where they turn down, at most a little above where corners are left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.hull import lower_hull

COUNTS = st.lists(st.integers(1, 500), min_size=1, max_size=40, unique=True).map(sorted)


def largest(pieces: tuple[tuple[float, float], ...], counts: np.ndarray) -> np.ndarray:
    return np.max([constant + per_unit * counts for constant, per_unit in pieces], axis=0)


def hull_of(counts: list[int], seconds: list[float]) -> tuple[tuple[float, float], ...]:
    return lower_hull(np.array(counts, dtype=np.float64), np.array(seconds))


def test_corners_are_kept_where_a_price_turns_up() -> None:
    assert hull_of([1, 2, 3, 4], [1.0, 1.0, 1.0, 3.0]) == ((1.0, 0.0), (pytest.approx(-5.0), pytest.approx(2.0)))


def test_a_price_that_turns_down_is_its_chord() -> None:
    assert hull_of([1, 2, 3], [1.0, 3.0, 3.0]) == ((0.0, 1.0),)


def test_one_point_is_a_constant() -> None:
    assert hull_of([7], [2.5]) == ((2.5, 0.0),)


@given(COUNTS, st.data())
def test_no_point_lies_far_below_the_pieces(counts: list[int], data: st.DataObject) -> None:
    seconds = [data.draw(st.floats(1e-3, 1e3)) for _ in counts]

    above = largest(hull_of(counts, seconds), np.array(counts, dtype=np.float64))

    assert (above <= np.array(seconds) * (1.005 + 1e-9)).all()


@given(COUNTS, st.floats(1e-3, 10), st.floats(0, 1), st.floats(0, 1e-2))
def test_a_convex_price_is_met_everywhere(counts: list[int], constant: float, slope: float, square: float) -> None:
    at = np.array(counts, dtype=np.float64)
    seconds = constant + slope * at + square * at**2

    ratios = largest(hull_of(counts, seconds.tolist()), at) / seconds

    assert (ratios >= 1 - 1e-9).all()
    assert (ratios <= 1.005 + 1e-9).all()
