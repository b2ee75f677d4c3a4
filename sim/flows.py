"""What a plan moves at each step, in tokens of one sequence."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sim.access import AGES, LivingAges
from sim.capture import evicts_least_wanted, keeps_key_ranges, keeps_open_group
from sim.counts import Column, Counts, counts_of, ratio
from sim.homes import TokenHomes
from sim.kv import key_range_bytes, kv_layer_bytes
from sim.open_group import fetched_layer_bytes
from sim.plan import Placement, Plan, Recompute, Setting, WriteBack

# Shares of the older tokens, the oldest ones, and of each row's picks those that fall on them, [row, share].
Picked: TypeAlias = tuple[Column, NDArray[np.floating[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """``TokenHomes`` as columns."""

    hbm: Column
    host_kv: Column
    activations: Column
    dropped: Column
    copies: Column

    def following(self, counts: Counts) -> "Following":
        """What comes after each row; the last one stays as it is."""
        return Following(
            host_kv=_shifted(self.host_kv), beyond=_shifted(self.beyond(counts)), copies=_shifted(self.copies)
        )

    def beyond(self, counts: Counts) -> Column:
        """Living tokens whose KV is neither in HBM nor on the host."""
        return self.activations + self.dropped - counts.dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """Of the row that follows: tokens whose home is the host, living ones whose KV is nowhere, and copies in HBM."""

    host_kv: Column
    beyond: Column
    copies: Column


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """Tokens of one sequence that each step attends, fetches, recomputes and writes back, and whose KV the host holds.

    ``reprojected`` tokens are recomputed from their layer inputs, ``forwarded`` ones from token ids.
    Expected values of an access profile need not be whole numbers.
    """

    cached: Column
    kept: Column
    selected: Column
    fetched_kv: Column
    fetched_inputs: Column
    reprojected: Column
    forwarded: Column
    host_attended: Column
    written_kv: Column
    written_inputs: Column
    on_host: Column


def keeps_away(flows: Flows) -> bool:
    """Whether any token is outside HBM at any step: fetched, recomputed, attended to or written there."""
    named = (
        "fetched_kv",
        "fetched_inputs",
        "reprojected",
        "forwarded",
        "host_attended",
        "written_kv",
        "written_inputs",
    )
    return any(bool(getattr(flows, name).any()) for name in named)


def flows_of(plan: Plan, homes: Homes) -> Flows:
    """Traffic of ``plan``, whose homes are given as columns, that its access profile leads to expect."""
    counts = counts_of(plan.setting)
    return flows_between(plan.setting, counts, homes, homes.following(counts), plan.saved_inputs_tokens)


def flows_between(
    setting: Setting, counts: Counts, homes: Homes, following: Following, saved_inputs_tokens: int
) -> Flows:
    """Traffic of rows of any plans of ``setting``, each with its step's counts and with what follows it."""
    fetched = _fetched_tokens(setting, homes, counts)
    none = np.zeros(len(fetched))
    reprojected = none
    if setting.recompute.from_activations:
        reprojected = fetched * ratio(homes.activations, homes.host_kv + homes.activations)
    host_kv = fetched - reprojected
    return Flows(
        cached=counts.cached,
        kept=counts.local + counts.selected,
        selected=counts.selected,
        fetched_kv=none if setting.host_attention else crossing_kv(setting, counts, host_kv),
        fetched_inputs=reprojected if setting.recompute is Recompute.ACTIVATIONS_HOST else none,
        reprojected=reprojected,
        forwarded=homes.dropped * counts.decoding if setting.recompute is Recompute.TOKENS else none,
        host_attended=host_kv if setting.host_attention else none,
        written_kv=_written_kv(setting, counts, homes, following),
        written_inputs=_written_inputs(setting, counts, saved_inputs_tokens),
        on_host=_on_host(setting, homes),
    )


def crossing_kv(setting: Setting, counts: Counts, wanted: Column) -> Column:
    """In whole tokens' worth, what crosses the link in each row if its step attends to ``wanted`` tokens of the host's."""
    if not keeps_open_group(setting):
        return wanted
    token_bytes = kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.host)
    return fetched_layer_bytes(setting.model, wanted, counts.cached) / token_bytes


def link_token_bytes(setting: Setting) -> int:
    """What crosses the link with a token's KV in one layer.

    Under captured window attention over INT8 it is counted whole, levels and ranges of values, also before its group is
    frozen: levels of keys then follow a token that left HBM before. Few do, of windows shorter than a group.
    """
    whole = kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.host)
    return whole - key_range_bytes(setting.model) * keeps_key_ranges(setting)


def home_columns(homes: TokenHomes) -> Homes:
    """The rows of ``homes`` as float columns."""
    return Homes(
        hbm=_column(homes.hbm),
        host_kv=_column(homes.host_kv),
        activations=_column(homes.activations),
        dropped=_column(homes.dropped),
        copies=_column(homes.copies),
    )


def _column(tokens: tuple[int, ...]) -> Column:
    """Most plans leave some homes empty, and zeros need no conversion."""
    return np.array(tokens, dtype=np.float64) if any(tokens) else np.zeros(len(tokens))


def _fetched_tokens(setting: Setting, homes: Homes, counts: Counts) -> Column:
    """Never more than there are: few tokens may come to less than a whole one of what is picked."""
    off_hbm = homes.host_kv + homes.activations - homes.copies
    picked = picked_shares(setting, counts)
    if picked is None:
        return off_hbm * counts.fetch_rate
    if _new_picks(setting) is not None:
        return _fetched_again(setting, homes, counts, picked)
    fetched: Column = np.minimum(off_hbm, counts.pool * counts.fetch_rate * _ends(picked, ratio(off_hbm, counts.pool)))
    return fetched


def _fetched_again(setting: Setting, homes: Homes, counts: Counts, new: Picked) -> Column:
    """Of picks that have copies: the new ones that fall on what is homed outside HBM, however many slots there are for copies,
    or all those for which there is no slot.

    ``planner.coefficients.fetch_rate`` bounds it from below, for which new ones count as if among what has no copy, if those are
    a larger share of theirs.
    """
    homed, older = homes.host_kv + homes.activations, counts.pool + counts.selected
    oldest = ratio(homed, older)
    at, shares = (np.array(column) for column in zip(*setting.access.age_shares, strict=True))
    wanted = counts.decoding * counts.selected * np.interp(oldest, at, shares)
    first = counts.cached == setting.workload.prompt_tokens + 1
    fresh = np.where(first, counts.selected, counts.pool * counts.fetch_rate)
    coming = fresh * _ends(new, np.maximum(oldest, ratio(homed - homes.copies, counts.pool)))
    fetched: Column = np.minimum(homed, np.maximum(coming, wanted - homes.copies))
    return fetched


def _ends(picked: Picked, oldest: Column) -> Column:
    """Of each row's picks, those that fall on so large a share of the tokens, the oldest ones."""
    (at, shares), row = picked, np.arange(len(oldest))
    after = np.clip(np.searchsorted(at, oldest), 1, len(at) - 1)
    within = np.minimum(1.0, (oldest - at[after - 1]) / (at[after] - at[after - 1]))
    below = shares[row, after - 1]
    ends: Column = below + within * (shares[row, after] - below)
    return ends


def picked_shares(setting: Setting, counts: Counts) -> Picked | None:
    """Shares of the older tokens, the oldest ones, and of each row's picks the share that falls on them, [row, share]; None
    where those outside HBM are of any age, or picks are of every age alike.

    Where the unattended die a window's picks are as in the first step, then more and more as later, until as many steps have gone
    by as tokens are local. Where any may return and copies stay, the first step's picks are all new.
    """
    if setting.attention.is_dense or evicts_least_wanted(setting):
        return None
    steps = counts.cached - setting.workload.prompt_tokens - 1  # before this one
    if (ages := _new_picks(setting)) is not None:
        gone = (steps > 0).astype(np.float64)
    elif setting.drop_dead and setting.placement is Placement.RECENT:
        ages = _living_ages(setting)
        gone = np.clip(ratio(steps, counts.local), 0.0, 1.0)
    if ages is not None:
        first, later = (np.array((0.0, *shares, 1.0)) for shares in (ages.first, ages.later))
        return np.linspace(0.0, 1.0, AGES + 1), first + gone[:, None] * (later - first)
    if setting.access.picks_every_age_alike:
        return None
    at, shares = (np.array(column) for column in zip(*setting.access.age_shares, strict=True))
    return at, np.broadcast_to(shares, (len(counts.cached), len(shares)))


def _new_picks(setting: Setting) -> LivingAges | None:
    """How old they are where any token may return and what is picked has a copy until it is left out; None: not looked at."""
    recalls, copies = setting.attention.selector.recalls, setting.placement is Placement.RESIDENT
    return _living_ages(setting) if recalls and copies else None


def _living_ages(setting: Setting) -> LivingAges | None:
    return setting.access.ages_at(1 - setting.attention.sparsity)


def _shifted(column: Column) -> Column:
    shifted = np.empty(len(column))
    shifted[:-1], shifted[-1] = column[1:], column[-1]
    return shifted


def _written_kv(setting: Setting, counts: Counts, homes: Homes, following: Following) -> Column:
    """KV that crosses to the host during each step: newborn tokens, or those whose home is the host from the next row on.

    Where a token on the host dies or moves further out, another one that has just left HBM takes its place.
    """
    prefill = 1 - counts.decoding
    if setting.write_back is WriteBack.AT_BIRTH:
        return counts.decoding + prefill * (homes.hbm + homes.host_kv)
    if evicts_least_wanted(setting):
        return _written_in_exchange(counts, homes, following)
    dying = counts.death_rate * (1 - ratio(homes.copies, homes.host_kv + homes.activations))
    staying = homes.host_kv * (1 - dying)
    if setting.recompute is not Recompute.NONE:
        moved_on = following.beyond - (homes.beyond(counts) - homes.activations * dying)
        staying = np.maximum(0.0, staying - np.maximum(0.0, moved_on))
    written: Column = np.maximum(0.0, following.host_kv - staying) + prefill * homes.host_kv
    return written


def _written_in_exchange(counts: Counts, homes: Homes, following: Following) -> Column:
    """The same where the least wanted leave HBM: what lies outside it more, and what takes the place of others there."""
    off_hbm, later = homes.host_kv - homes.copies, following.host_kv - following.copies
    staying = off_hbm * (1 - counts.returned_rate) - np.minimum(off_hbm, counts.dying)
    written: Column = np.maximum(0.0, later - staying) + (1 - counts.decoding) * off_hbm
    return written


def _written_inputs(setting: Setting, counts: Counts, saved_inputs_tokens: int) -> Column:
    if setting.recompute is not Recompute.ACTIVATIONS_HOST:
        return np.zeros(len(counts.cached))
    newborn = (counts.cached <= saved_inputs_tokens) * counts.decoding  # of step j: the token numbered prompt + j
    return newborn + (1 - counts.decoding) * min(saved_inputs_tokens, setting.workload.prompt_tokens)


def homed_on_host(setting: Setting, homes: Homes) -> Column:
    """Tokens whose KV the host holds where homes go by age: with at_birth all that are kept as KV, else those homed there."""
    return homes.hbm + homes.host_kv if setting.write_back is WriteBack.AT_BIRTH else homes.host_kv


def _on_host(setting: Setting, homes: Homes) -> Column:
    """The same of any setting: where the least wanted leave HBM a token is in one place, and a copy has left the host."""
    return homes.host_kv - homes.copies if evicts_least_wanted(setting) else homed_on_host(setting, homes)
