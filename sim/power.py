"""Products of what is recomputed, step after step: what a card's power limit leaves of their clocks."""

from dataclasses import replace

import numpy as np

from sim.cost import CostModel, Pieces, fallen_share

_SETTLING_S = 0.3  # of steps that recompute: in 0.6 s an H200's lose 0.4 of what they will, then all of it
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
    whole_s = None if layer_steps is None else layer_steps * (beside_s + (row_s + per_token_s) * most_tokens / 2)
    settled = 1.0 if whole_s is None else float(fallen_share(whole_s, _SETTLING_S))

    def held_back(tokens: float) -> float:
        capped_s = cost.power_capped_s(row_s * tokens, beside_s + setup_s + per_token_s * tokens)
        return settled * (capped_s - row_s * tokens)

    for share in _TANGENTS:
        at, step = share * most_tokens, share * most_tokens * 1e-4
        delay_s, slope_s = held_back(at), (held_back(at + step) - held_back(at - step)) / (2 * step)
        if delay_s > 0:
            pieces.append((setup_s + delay_s - slope_s * at, row_s + per_token_s + slope_s))
    return replace(product, pieces=_felt(pieces, most_tokens))


def _felt(pieces: list[tuple[float, float]], most_tokens: int) -> tuple[tuple[float, float], ...]:
    """Those that are the largest anywhere from one token to the most, each a constraint of the program; the first in any case,
    below which none may fall between none and one.
    """
    tokens = np.geomspace(1.0, most_tokens, _LOOKED_AT)
    constants_s, slopes_s = (np.array(column)[:, None] for column in zip(*pieces, strict=True))
    largest = {0, *(constants_s + slopes_s * tokens).argmax(axis=0).tolist()}
    return tuple(piece for place, piece in enumerate(pieces) if place in largest)
