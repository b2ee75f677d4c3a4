"""What a plan moves and holds at each step, in tokens and bytes of one sequence."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sim.access import AGES, AccessProfile, LivingAges
from sim.attention import Attention, count_tokens
from sim.capture import evicts_least_wanted, is_captured, keeps_key_ranges, keeps_open_group, streams_levels
from sim.homes import TokenHomes
from sim.kv import GROUP_TOKENS, KvFormat, inputs_layer_bytes, key_range_bytes, kv_layer_bytes, open_group_bytes
from sim.open_group import fetched_layer_bytes
from sim.plan import Placement, Plan, Recompute, Setting, WriteBack
from sim.spec import DType, ModelSpec

Column: TypeAlias = NDArray[
    np.floating[Any]
]  # [step]; row 0 is the prefill, row j the decode step with prompt + j tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """``TokenCounts`` as columns, and what follows from them under a placement.

    ``decoding`` is 0 in the prefill's row and 1 elsewhere. ``pool`` counts the tokens that may be off HBM: all but the
    local window, with ``resident`` all but the selected ones too. Of those that are, each step fetches the share
    ``fetch_rate`` when picks fall on every age alike (dense: all; ``recent``: the selected among the older tokens;
    ``resident``: the newly selected among those that the step before left out), and ``death_rate`` die at its end.
    ``copy_rate`` is how many copies stay in HBM for each token that is off it: what was fetched stays until it is
    deselected, 1 / turnover steps later. Others are written in the place of those off it that are among the ``dying`` and,
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
        return _ratio(self.dying, self.pool) + self.returned_rate

    def at(self, steps: NDArray[np.intp]) -> "Counts":
        """Rows of the given steps, in any order and as often as they are named."""
        return Counts(**{column.name: getattr(self, column.name)[steps] for column in fields(self)})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Bytes that the KV pools of one sequence hold during each step, all layers."""

    hbm: Column
    host: Column


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
        reprojected = fetched * _ratio(homes.activations, homes.host_kv + homes.activations)
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


def offloaded_token_bytes(setting: Setting) -> float:
    """What stays in HBM of a living token whose KV does not, in one layer."""
    state = setting.attention.offloaded_state_bytes_per_token(setting.model, setting.dtype)
    return state + key_range_bytes(setting.model) * keeps_key_ranges(setting)


def occupancy_of(plan: Plan, homes: Homes, flows: Flows) -> Occupancy:
    """What the KV pools hold, scales, selection state, staging and saved inputs included. Capacity is judged by this alone."""
    setting, counts = plan.setting, counts_of(plan.setting)
    model, dtype, formats = setting.model, setting.dtype, setting.kv_format
    gpu_kv, host_kv = (kv_layer_bytes(model, dtype, tier) for tier in (formats.gpu, formats.host))
    slots = homes.hbm + homes.copies
    hbm = slots * gpu_kv + held_state_bytes(setting)
    if offloaded_bytes := offloaded_token_bytes(setting):
        hbm += (counts.cached - counts.dead - slots) * offloaded_bytes
    host = _host_tokens(setting, flows) * host_kv
    if setting.recompute.from_activations:
        holder = hbm if setting.recompute is Recompute.ACTIVATIONS_HBM else host
        saved_tokens = np.minimum(counts.cached, plan.saved_inputs_tokens) - homes.dropped
        holder += np.maximum(0.0, saved_tokens) * inputs_layer_bytes(model, dtype)
    return Occupancy(hbm=model.layers * hbm + _staging_bytes(setting, homes, flows), host=model.layers * host)


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


def counts_of(setting: Setting) -> Counts:
    """Token counts of one sequence, shared among settings that count alike."""
    work = setting.workload
    placement, drop_dead, least_wanted = setting.placement, setting.drop_dead, evicts_least_wanted(setting)
    return _count_columns(
        setting.attention, setting.access, placement, work.prompt_tokens, work.output_tokens, drop_dead, least_wanted
    )


def held_state_bytes(setting: Setting) -> Column:
    """HBM of one sequence and layer that no choice of homes changes: selection state, keys of an open group, and ranges of
    the dead ones' where they stay; where levels stream, of keys to come too: there is room for all ranges from the start.
    """
    work, dtype = setting.workload, setting.dtype
    state = _state_bytes(setting.attention, setting.model, dtype, work.prompt_tokens, work.output_tokens)
    if keeps_key_ranges(setting):
        state = state + counts_of(setting).dead * key_range_bytes(setting.model)
    if streams_levels(setting):
        cached = counts_of(setting).cached
        state = state + (max(cached[-1], GROUP_TOKENS) - cached) * key_range_bytes(setting.model)
    return state + open_group_bytes(setting.model, dtype, setting.kv_format.gpu)


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
        turnover = np.array([access.turnover(share) for share in (local + selected) / cached])
        had = np.minimum(np.arange(steps) * turnover, 1.0) if least_wanted else decoding
        turnover[1:2] = turnover[1:2] if least_wanted else 1.0  # after a prompt nothing but the newest has a copy
        returning = access.returning if least_wanted else 1.0
        pool, picks = pool - selected, selected * turnover * returning
        copies = selected * had * returning
    fetched = decoding if attention.is_dense else np.minimum(_ratio(picks, pool), 1.0) * decoding  # of few, all
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
        death_rate=_ratio(dying, pool),
        copy_rate=_ratio(copies, pool),
        dying=dying * exchanging if least_wanted else dying,
        returned_rate=fetched * exchanging,
    )


def _fetched_tokens(setting: Setting, homes: Homes, counts: Counts) -> Column:
    """Never more than there are: few tokens may come to less than a whole one of what is picked.

    Where the ages of new picks are known those count that fall on what is homed outside HBM, none of which has a copy, however
    many slots there are for such.
    """
    homed = homes.host_kv + homes.activations
    off_hbm = homed - homes.copies
    picked = picked_shares(setting, counts)
    if picked is None:
        return off_hbm * counts.fetch_rate
    at, shares = picked
    oldest, row = _ratio(off_hbm, counts.pool), np.arange(len(off_hbm))
    if _new_picks(setting) is not None:
        off_hbm, oldest = homed, _ratio(homed, counts.pool + counts.selected)
    after = np.clip(np.searchsorted(at, oldest), 1, len(at) - 1)
    within = (oldest - at[after - 1]) / (at[after] - at[after - 1])
    below = shares[row, after - 1]
    ends = below + within * (shares[row, after] - below)
    fetched: Column = np.minimum(off_hbm, counts.pool * counts.fetch_rate * ends)
    return fetched


def picked_shares(setting: Setting, counts: Counts) -> tuple[Column, NDArray[np.floating[Any]]] | None:
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
        gone = np.clip(_ratio(steps, counts.local), 0.0, 1.0)
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


def _ratio(part: Column, whole: Column) -> Column:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def _written_kv(setting: Setting, counts: Counts, homes: Homes, following: Following) -> Column:
    """KV that crosses to the host during each step: newborn tokens, or those whose home is the host from the next row on.

    Where a token on the host dies or moves further out, another one that has just left HBM takes its place.
    """
    prefill = 1 - counts.decoding
    if setting.write_back is WriteBack.AT_BIRTH:
        return counts.decoding + prefill * (homes.hbm + homes.host_kv)
    if evicts_least_wanted(setting):
        return _written_in_exchange(counts, homes, following)
    dying = counts.death_rate * (1 - _ratio(homes.copies, homes.host_kv + homes.activations))
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


def _host_tokens(setting: Setting, flows: Flows) -> Column:
    """Tokens whose KV takes host memory: those that it holds, or that are on their way there."""
    if setting.write_back is WriteBack.AT_BIRTH:
        return flows.on_host
    on_their_way = flows.written_kv.copy()
    on_their_way[0] -= flows.on_host[0]
    return flows.on_host + on_their_way


def reprojected_layer_bytes(setting: Setting) -> int:
    """Of a token that is projected again, staged: as it is computed in a captured step; launched by the host, as HBM has others."""
    kept = KvFormat.NATIVE if is_captured(setting) else setting.kv_format.gpu
    return kv_layer_bytes(setting.model, setting.dtype, kept)


def _staging_bytes(setting: Setting, homes: Homes, flows: Flows) -> Column:
    """Transient HBM: the ring of fetched layers, a layer's recomputed prefix, and two layers spilled in the prefill.

    Of a prefix that is forwarded, a layer's keys and values and, twice, its inputs: those of all sequences that go in, and
    what has come out. It goes through a layer in passes of no more rows than a prefill's, so that all else that a pass holds
    is ``footprint.workspace_bytes``. The keys and values of a few tokens that make the number up take the place of inputs.
    """
    model, dtype = setting.model, setting.dtype
    gpu_kv = kv_layer_bytes(model, dtype, setting.kv_format.gpu)
    native_kv = kv_layer_bytes(model, dtype, KvFormat.NATIVE)
    inputs = inputs_layer_bytes(model, dtype)
    buffers = setting.prefetch_layers + 1
    fetched = flows.fetched_kv
    if keeps_open_group(setting):  # read in place: the room is for ranges of the host's keys, which stay in HBM
        fetched = homes.host_kv * counts_of(setting).decoding
    staged = fetched * (buffers * gpu_kv)
    if setting.recompute is not Recompute.NONE:
        staged += flows.fetched_inputs * (buffers * inputs) + flows.reprojected * reprojected_layer_bytes(setting)
        staged += flows.forwarded * (native_kv + 2 * inputs)
    staged[0] += 2 * (setting.workload.prompt_tokens - homes.hbm[0]) * native_kv
    return staged


@lru_cache(maxsize=256)
def _state_bytes(attention: Attention, model: ModelSpec, dtype: DType, prompt_tokens: int, steps: int) -> Column:
    per_token = attention.state_bytes_per_token(model, dtype)
    cached = range(prompt_tokens, prompt_tokens + steps)
    return np.array([attention.state_bytes(n, dtype) + per_token * n for n in cached])
