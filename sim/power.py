"""What a card's power limit leaves of its clocks: for products of what is recomputed, step after step, and after a prefill."""

from dataclasses import replace

import numpy as np

from sim.cost import SETTLING_S, CostModel, Pieces, fallen_share
from sim.counts import Column

RISING_S = 0.034  # that clocks take to rise again after a prefill: an H200's, by the first decode steps of 113 plans
# By a decode step's kernels, of what a prefill's products lose: those that wait for HBM, whose clocks stay, and all others (an
# H200's gates and norms take 1.2 times as long just after a prefill, its products 1.02 to 1.08 times).
HBM_FELT, CLOCK_FELT = 0.25, 1.5
_LOOKED_AT = 40
_TANGENTS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # of the most tokens; a line's error between two is about 1 % at most


def recomputed(
    cost: CostModel,
    product: Pieces,
    passes_s: float,
    *,
    sequences: int,
    beside_s: float,
    most_tokens: int,
    layer_steps: int | None,
) -> Pieces:
    """Seconds by recomputed tokens of each sequence: ``product`` of their rows, ``passes_s`` a row, beside the rest of a layer.

    What is beside grows with the tokens by their own passes. The seconds that the power limit allows are convex in the
    tokens: their tangents are pieces like the others. The card takes a while to hold products back: in ``layer_steps`` layers,
    with half of the most tokens in each, for a share of the time (None: for all of it).
    """
    lines = product.scaled(sequences).pieces
    per_token_s = sequences * passes_s
    pieces = [(constant_s, slope_s + per_token_s) for constant_s, slope_s in lines]
    setup_s, row_s = lines[-1]
    share = settled_share(beside_s + (row_s + per_token_s) * most_tokens / 2, layer_steps)

    def delay_s(tokens: Column) -> Column:
        return held_back_s(cost, row_s * tokens, beside_s + setup_s + per_token_s * tokens, share)

    for touched in _TANGENTS:
        at, step = touched * most_tokens, touched * most_tokens * 1e-4
        before_s, here_s, after_s = delay_s(np.array([at - step, at, at + step])).tolist()
        slope_s = (after_s - before_s) / (2 * step)
        if here_s > 0:
            pieces.append((setup_s + here_s - slope_s * at, row_s + per_token_s + slope_s))
    return replace(product, pieces=_felt(pieces, most_tokens))


def held_back_s(cost: CostModel, arithmetic_s: Column, beside_s: Column, share: float) -> Column:
    """What products of ``arithmetic_s`` lose beside ``beside_s`` of other work, once clocks have fallen by ``share``."""
    return share * (cost.power_capped_s(arithmetic_s, beside_s) - arithmetic_s)


def settled_share(layer_s: float, layer_steps: int | None) -> float:
    """Of what clocks will fall by, what they have in the mean over ``layer_steps`` layers; None: all of it."""
    return 1.0 if layer_steps is None else float(fallen_share(layer_steps * layer_s, SETTLING_S))


def lost_after(cost: CostModel, prefill_s: float, step_s: Column) -> Column:
    """Share by which a prefill's products would take longer in the decode steps after it than at full clocks, [step]: these rise
    again.

    ``prefill_s`` is how long the prefill drew the card's whole power, ``step_s`` what each step takes at full clocks.
    """
    fallen = (1 / cost.profile.prefill_sustained_share - 1) * -np.expm1(-prefill_s / SETTLING_S)
    middle_s = np.cumsum(step_s) - step_s / 2
    lost: Column = fallen * np.exp(-middle_s / RISING_S)
    return lost


def _felt(pieces: list[tuple[float, float]], most_tokens: int) -> tuple[tuple[float, float], ...]:
    """Those that are the largest anywhere from one token to the most, each a constraint of the program; the first in any case,
    below which none may fall between none and one.
    """
    tokens = np.geomspace(1.0, most_tokens, _LOOKED_AT)
    constants_s, slopes_s = (np.array(column)[:, None] for column in zip(*pieces, strict=True))
    largest = {0, *(constants_s + slopes_s * tokens).argmax(axis=0).tolist()}
    return tuple(piece for place, piece in enumerate(pieces) if place in largest)
