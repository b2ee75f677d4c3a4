"""What crosses the link where the newest group's keys wait in HBM: in the settings of ``sim.capture.keeps_open_group``.

The host holds the tokens that come last. Of those the open group's keys wait in HBM, in the compute type, so that their
values alone are fetched; in the rows that no newborn token has taken yet lies what the group before left behind. Levels
take a byte a channel, ranges of values ``SCALE_BYTES`` a head; ranges of keys stay in HBM.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sim.kv import GROUP_TOKENS, SCALE_BYTES
from sim.spec import ModelSpec

_Column: TypeAlias = NDArray[np.floating[Any]]  # [step]


def fetched_layer_bytes(model: ModelSpec, on_host: _Column, cached: _Column) -> _Column:
    """Of one sequence and layer, in a decode step with ``cached`` tokens, so many of them ``on_host``, the newborn one included.

    That one is not fetched. Of the x others, 63 have keys in HBM, or both their levels: those of the open group are fetched
    for their values, those left behind only for their ranges.
    """
    outside = np.maximum(0.0, on_host - 1)
    levels = 2 * np.maximum(0.0, outside - (GROUP_TOKENS - 1)) + np.minimum(_waiting(cached), outside)
    fetched: _Column = model.kv_dim * levels + model.kv_heads * SCALE_BYTES * outside
    return fetched


def least_layer_bytes(model: ModelSpec, cached: _Column) -> tuple[float, _Column]:
    """A straight line below ``fetched_layer_bytes``, on it from 64 tokens on the host on: what each adds, less what is spared."""
    token_bytes = float(2 * model.kv_dim + model.kv_heads * SCALE_BYTES)
    return token_bytes, token_bytes + model.kv_dim * (2 * (GROUP_TOKENS - 1) - _waiting(cached))


def _waiting(cached: _Column) -> _Column:
    """Tokens of the open group, the newborn one aside."""
    return (cached - 1) % GROUP_TOKENS
