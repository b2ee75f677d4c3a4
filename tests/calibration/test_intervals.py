"""Intervals of constants, by what many fits of made-up rows give."""

import numpy as np
import pytest

from calibration.intervals import half_widths

FITS = 400


@pytest.mark.parametrize(
    ("rows", "off"),
    [
        ((60, 60), (0.03, 0.03)),
        ((60, 60), (0.01, 0.3)),  # families off by different amounts
        ((4, 200), (0.3, 0.03)),  # a family of few, far off
        ((3, 3), (0.05, 0.05)),
    ],
)
def test_nineteen_of_twenty_intervals_hold_the_truth(rows: tuple[int, int], off: tuple[float, float]) -> None:
    """Two constants, each told by a family of its own, and a little by the other's; weights as a fit gives them."""
    rng = np.random.default_rng(3)
    family = np.repeat([0, 1], rows)
    weights = 1 / np.sqrt(np.array(rows))[family]
    slopes = np.where(family[:, None] == [0, 1], 1.0, 0.1) * weights[:, None]
    held = np.zeros(2)
    for _ in range(FITS):
        seen = weights * rng.normal(0.0, np.array(off)[family])
        found, *_ = np.linalg.lstsq(slopes, seen, rcond=None)
        held += np.abs(found) <= half_widths(slopes, seen - slopes @ found, np.zeros(len(family)))

    assert (held / FITS > 0.90).all(), held / FITS
    assert (held / FITS < 0.999).all(), held / FITS


def test_rows_that_agree_are_no_surer_than_their_floor() -> None:
    slopes, nothing = np.ones((4, 1)), np.zeros(4)

    half = half_widths(slopes, nothing, np.full(4, 0.03))

    assert half == pytest.approx(3.18 * 0.03 / 2, rel=0.01)  # Student's t of three


def test_a_row_that_decides_a_constant_alone_leaves_it_open() -> None:
    slopes = np.diag([1.0, 1.0])

    half = half_widths(slopes, np.zeros(2), np.full(2, 0.03))

    assert half == pytest.approx([12.7 * 0.03] * 2, rel=0.01)
