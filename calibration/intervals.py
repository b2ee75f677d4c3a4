"""How sure a fit is of each constant: 95 % intervals that hold where kernel families are off by different amounts."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

_MOST_LEVERAGE = 0.9  # a measurement that decides a constant by itself shows nothing of how far it is off
_SURE = 0.975

Floats = NDArray[np.float64]


def half_widths(slopes: Floats, residuals: Floats, floor: Floats) -> Floats:
    """Of 95 % intervals of the constants, from a least-squares fit's ``slopes`` [row, constant] and ``residuals`` [row].

    A sandwich (MacKinnon and White 1985, HC3): each row is taken to be off as far as it was found to be, by what it did not
    draw the fit to itself, and by ``floor`` besides; not all rows as far as each other. Few rows tell a constant less surely:
    Student's t for as many as tell it, an effective number, less one.
    """
    inverse = np.linalg.pinv(slopes.T @ slopes, rcond=1e-12)
    drawn = slopes @ inverse  # [row, constant]: how far each row's residual moves each constant
    leverage = np.clip((drawn * slopes).sum(axis=1), 0.0, _MOST_LEVERAGE)
    off = np.hypot(residuals / (1 - leverage), floor)
    variance = ((drawn * off[:, None]) ** 2).sum(axis=0)
    influence = drawn**2
    telling = influence.sum(axis=0) ** 2 / np.maximum((influence**2).sum(axis=0), 1e-300)
    half: Floats = student.ppf(_SURE, np.maximum(1.0, telling - 1)) * np.sqrt(variance)
    return half
