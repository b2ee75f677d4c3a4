"""Token counts of one sequence at each step, and the rates at which what is off HBM is fetched and dies."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sim.access import EARLY_STEPS, AccessProfile
from sim.attention import Attention, count_tokens
from sim.capture import evicts_least_wanted
from sim.plan import Placement, Setting

# [step]; row 0 is the prefill, row j the decode step with prompt + j tokens
Column: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """``TokenCounts`` as columns, and what follows from them under a placement.

    ``decoding`` is 0 in the prefill's row and 1 elsewhere. ``pool`` counts the tokens that may be off HBM: all but the
    local window, with ``resident`` all but the selected ones too. Of those that are, each step fetches the share
    ``fetch_rate`` when picks fall on every age alike (dense: all; ``recent``: the selected among the older tokens;
    ``resident``: the newly selected, in the first step all, among those that the step before left out), and ``death_rate``
    die at its end. ``copy_rate`` is how many copies stay in HBM for each token that is off it: what was fetched stays until
    it is deselected, so that from the first step on all that are selected have one; where the least wanted leave HBM those
    that have returned, over 1 / turnover steps. Others are written in the place of those off it that are among the ``dying`` and,
    where the least wanted leave HBM, of the share ``returned_rate``; there none in the prefill's row, which keeps what lives
    after it, and none after the last.
    """

    cached: Column
    local: Column
    selected: Column
    dead: Column
    decoding: Column
    pool: Column
    fetch_rate: Column
    death_rate: Column
    copy_rate: Column
    dying: Column
    returned_rate: Column

    @property
    def replaced_rate(self) -> Column:
        """Of those off HBM, at least: as many as die and return where all alike do. The least wanted die first."""
        return ratio(self.dying, self.pool) + self.returned_rate

    def at(self, steps: NDArray[np.intp]) -> "Counts":
        """Rows of the given steps, in any order and as often as they are named."""
        return Counts(**{column.name: getattr(self, column.name)[steps] for column in fields(self)})


def counts_of(setting: Setting) -> Counts:
    """Token counts of one sequence, shared among settings that count alike."""
    work = setting.workload
    placement, drop_dead, least_wanted = setting.placement, setting.drop_dead, evicts_least_wanted(setting)
    return _count_columns(
        setting.attention, setting.access, placement, work.prompt_tokens, work.output_tokens, drop_dead, least_wanted
    )


@lru_cache(maxsize=256)
def _count_columns(
    attention: Attention,
    access: AccessProfile,
    placement: Placement,
    prompt_tokens: int,
    steps: int,
    drop_dead: bool,
    least_wanted: bool,
) -> Counts:
    counts = count_tokens(attention, prompt_tokens, steps, drop_dead=drop_dead)
    columns = (
        np.array(column, dtype=np.float64) for column in (counts.cached, counts.local, counts.selected, counts.dead)
    )
    cached, local, selected, dead = columns
    decoding = (np.arange(steps) > 0).astype(np.float64)
    pool, picks, copies = cached - dead - local, selected, np.zeros(steps)
    if placement is Placement.RESIDENT:
        turnover = _turnovers(access, (local + selected) / cached)
        had, returning = decoding, 1.0
        if least_wanted:
            had, returning = np.minimum(np.arange(steps) * turnover, 1.0), access.returning
        else:
            turnover[1:2] = 1.0  # after a prompt nothing but the newest has a copy
        pool, picks = pool - selected, selected * turnover * returning
        copies = selected * had * returning
    fetched = decoding if attention.is_dense else np.minimum(ratio(picks, pool), 1.0) * decoding  # of few, all
    dying = np.diff(dead, append=dead[-1])
    exchanging = least_wanted * decoding * (np.arange(steps) < steps - 1)  # a prompt is kept as the first step needs it
    return Counts(
        cached=cached,
        local=local,
        selected=selected,
        dead=dead,
        decoding=decoding,
        pool=cached - 1 if attention.is_dense else pool,
        fetch_rate=fetched,
        death_rate=ratio(dying, pool),
        copy_rate=ratio(copies, pool),
        dying=dying * exchanging if least_wanted else dying,
        returned_rate=fetched * exchanging,
    )


def _turnovers(access: AccessProfile, keep_shares: Column) -> Column:
    """Of each step: as early ones until half of their steps have gone by, as later ones from twice as many on, between them by the
    logarithm of their number.
    """
    later = np.array([access.turnover(share) for share in keep_shares])
    if access.early_turnovers is None:
        return later
    early = np.array([access.early_turnover(share) for share in keep_shares])
    steps = np.maximum(np.arange(len(keep_shares)), 1)
    fading: Column = np.clip(0.5 - 0.5 * np.log2(steps / EARLY_STEPS), 0.0, 1.0)
    turnovers: Column = later + fading * (early - later)
    return turnovers


def ratio(part: Column, whole: Column) -> Column:
    """Nothing of nothing."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
