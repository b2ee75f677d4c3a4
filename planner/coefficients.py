"""A setting's costs and bytes as affine functions of the tokens off HBM: what bound and integer program both read.

Variables, in tokens of one sequence at one step: ``kv`` (KV on the host only), ``inputs`` (kept as layer inputs only) and
``forward`` (dropped, computed again from token ids). Every number comes from ``sim``; nothing is priced here.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.capture import evicts_least_wanted, keeps_open_group
from sim.cost import CostModel
from sim.counts import Column, counts_of
from sim.flows import Flows, crossing_kv, keeps_away, picked_shares
from sim.forecast import static_host_bytes
from sim.kv import KvFormat, inputs_layer_bytes, kv_layer_bytes
from sim.layer import LayerTimes, layer_times
from sim.layer_prices import LayerPrices, layer_prices
from sim.occupancy import held_state_bytes, offloaded_token_bytes, reprojected_layer_bytes
from sim.open_group import least_layer_bytes
from sim.plan import Recompute, Setting, WriteBack


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one sequence, [step]: all in HBM, what a token off it frees there, and what it takes on the host."""

    hbm_all_in: Column
    freed_by_kv: Column
    freed_by_inputs: Column
    freed_by_forward: Column
    hbm_budget: float
    host_all_in: Column
    host_by_kv: Column
    host_by_inputs: Column
    host_by_forward: Column
    host_per_written: float
    host_per_saved: float
    hbm_per_saved: float
    host_budget: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one layer of a wave, [step]: with everything in HBM (``still``), and for each token off it.

    Once some are off it, up to ``h2d_bytes_spared`` of what they come to do not cross the link.
    """

    sequences: int
    prices: LayerPrices
    still: LayerTimes
    h2d_bytes_by_kv: Column
    h2d_bytes_spared: Column
    h2d_bytes_by_inputs: Column
    rows_by_inputs: Column
    gpu_s_by_kv: Column
    gpu_s_by_written: float
    d2h_bytes_by_written: float
    d2h_bytes_by_saved: float
    duplex_s_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """All that a program over the token homes of ``setting`` needs; one ``Timing`` for each distinct wave size."""

    setting: Setting
    memory: Memory
    timings: tuple[Timing, ...]
    repeats: tuple[int, ...]

    @property
    def uses_inputs(self) -> bool:
        return self.setting.recompute.from_activations

    @property
    def uses_forward(self) -> bool:
        return self.setting.recompute is Recompute.TOKENS

    @property
    def steps(self) -> int:
        return self.setting.workload.output_tokens


def coefficients_of(setting: Setting, cost: CostModel) -> Coefficients:
    """Read the affine pieces of ``setting`` off the cost model."""
    sizes = setting.wave_sizes
    still, memory = still_flows(setting), _memory(setting)
    distinct = tuple(dict.fromkeys(sizes))
    away = setting.host_attention or keeps_away(still) or bool(np.any(memory.hbm_all_in > memory.hbm_budget))
    return Coefficients(
        setting=setting,
        memory=memory,
        timings=tuple(_timing(setting, cost, size, still, away) for size in distinct),
        repeats=tuple(sizes.count(size) for size in distinct),
    )


def fetch_rate(setting: Setting) -> Column:
    """Share of the tokens off HBM that each step fetches at least, [step]; none where the CPU attends to them.

    Where picks differ by age, what falls on however many of the oldest tokens is no less than their smallest share of it.
    """
    counts = counts_of(setting)
    if setting.host_attention:
        return np.zeros_like(counts.fetch_rate)
    picked = picked_shares(setting, counts)
    if picked is None:
        return counts.fetch_rate
    at, shares = picked
    least: Column = (shares[:, 1:] / at[1:]).min(axis=1)
    return counts.fetch_rate * least


def homes_per_token(setting: Setting) -> Column:
    """Tokens that the host has a place for, or that are kept as inputs, for each one off HBM: also those with a copy there.

    Where the least wanted leave HBM, what returns leaves the host.
    """
    copy_rate = counts_of(setting).copy_rate
    return np.ones_like(copy_rate) if evicts_least_wanted(setting) else 1 + copy_rate


def least_h2d_bytes(setting: Setting, timing: Timing, steps: NDArray[np.intp], kv: Column) -> Column:
    """Of a layer at ``steps`` with at least ``kv`` tokens on the host."""
    if not keeps_open_group(setting):
        return timing.h2d_bytes_by_kv[steps] * kv
    counts = counts_of(setting).at(steps)
    return timing.prices.bytes_per_kv * counts.fetch_rate * crossing_kv(setting, counts, kv)


def waited_pieces(prices: LayerPrices) -> tuple[tuple[float, float], ...]:
    """The fetch's, by bytes, less what attention is spared that reads them in place: a step takes one after the other, so that
    only the sum counts.
    """
    spared_s = prices.spared_s_per_fetched / prices.bytes_per_kv
    return tuple((constant_s, per_byte_s - spared_s) for constant_s, per_byte_s in prices.fetch.pieces)


def _h2d_bytes(setting: Setting, prices: LayerPrices) -> tuple[Column, Column]:
    """A token on the host, and what is spared of all together: a straight line, no higher than what is fetched, [step]."""
    rate = fetch_rate(setting)
    if not keeps_open_group(setting):
        return rate * prices.bytes_per_kv, np.zeros_like(rate)
    by_kv, spared = least_layer_bytes(setting.model, counts_of(setting).cached)
    return rate * (prices.sequences * by_kv), rate * (prices.sequences * spared)


def _gpu_s_by_kv(setting: Setting, prices: LayerPrices) -> Column:
    """What a token on the host costs the GPU: converting what is fetched; less attention where the CPU does it."""
    if setting.host_attention:
        return -prices.attention_s_per_kept_away * counts_of(setting).decoding
    return fetch_rate(setting) * prices.convert_s_per_moved


def still_flows(setting: Setting) -> Flows:
    """Everything in HBM: nothing is fetched; newborn tokens are written where the setting says so."""
    counts = counts_of(setting)
    none = np.zeros_like(counts.cached)
    written = none
    if setting.write_back is WriteBack.AT_BIRTH:
        written = counts.decoding  # what the prefill writes depends on how much it keeps as KV
    return Flows(
        cached=counts.cached,
        kept=counts.local + counts.selected,
        selected=counts.selected,
        fetched_kv=none,
        fetched_inputs=none,
        reprojected=none,
        forwarded=none,
        host_attended=none,
        written_kv=written,
        written_inputs=none,
        on_host=none,
    )


def _memory(setting: Setting) -> Memory:
    model, dtype, counts = setting.model, setting.dtype, counts_of(setting)
    layers, ring = model.layers, setting.prefetch_layers + 1
    gpu_kv, host_kv = (kv_layer_bytes(model, dtype, tier) for tier in (setting.kv_format.gpu, setting.kv_format.host))
    native_kv, inputs = kv_layer_bytes(model, dtype, KvFormat.NATIVE), inputs_layer_bytes(model, dtype)
    from_host = setting.recompute is Recompute.ACTIVATIONS_HOST
    slot = gpu_kv - offloaded_token_bytes(setting)
    rate, living = fetch_rate(setting), counts.cached - counts.dead
    spilled = np.zeros_like(rate)
    spilled[0] = 2 * native_kv  # two layers of what the prefill spills
    hbm_all_in = layers * (living * gpu_kv + held_state_bytes(setting))
    hbm_all_in[0] += 2 * native_kv * counts.dead[0]
    at_birth = setting.write_back is WriteBack.AT_BIRTH
    per_token = homes_per_token(setting)
    return Memory(
        hbm_all_in=hbm_all_in,
        freed_by_kv=layers * slot - ring * rate * gpu_kv - spilled,
        freed_by_inputs=layers * slot
        - rate * (reprojected_layer_bytes(setting) + (ring * inputs if from_host else 0))
        - spilled,
        freed_by_forward=layers * slot - (native_kv + 2 * inputs) * counts.decoding - spilled,
        hbm_budget=setting.kv_budget_bytes / setting.concurrency,
        host_all_in=layers * host_kv * living if at_birth else np.zeros_like(rate),
        host_by_kv=np.zeros_like(rate) if at_birth else layers * host_kv * per_token,
        host_by_inputs=-layers * host_kv * per_token if at_birth else np.zeros_like(rate),
        host_by_forward=np.full_like(rate, -layers * host_kv if at_birth else 0.0),
        host_per_written=0.0 if at_birth else float(layers * host_kv),
        host_per_saved=float(layers * inputs) if from_host else 0.0,
        hbm_per_saved=float(layers * inputs) if setting.recompute is Recompute.ACTIVATIONS_HBM else 0.0,
        host_budget=(setting.machine.host.usable_bytes - static_host_bytes(setting)) / setting.concurrency,
    )


def _timing(setting: Setting, cost: CostModel, sequences: int, still: Flows, away: bool) -> Timing:
    """``away``: some tokens will be outside HBM, which costs the host launches at every step."""
    prices = layer_prices(cost, setting, sequences)
    rate = fetch_rate(setting)
    from_host = setting.recompute is Recompute.ACTIVATIONS_HOST
    h2d_by_kv, h2d_spared = _h2d_bytes(setting, prices)
    h2d_by_inputs = rate * prices.bytes_per_inputs if from_host else np.zeros_like(rate)
    kept = cost.profile.link_duplex_efficiency
    if keeps_open_group(setting):  # a step may fetch less than the token that is written beside it: no delay is sure
        kept = 1.0
    return Timing(
        sequences=sequences,
        prices=prices,
        still=layer_times(prices, still, cost, away=away),
        h2d_bytes_by_kv=h2d_by_kv,
        h2d_bytes_spared=h2d_spared,
        h2d_bytes_by_inputs=h2d_by_inputs,
        rows_by_inputs=rate,
        gpu_s_by_kv=prices.slower("attention", prices.lost_in(np.arange(len(rate)))) * _gpu_s_by_kv(setting, prices),
        gpu_s_by_written=prices.convert_s_per_moved,
        d2h_bytes_by_written=prices.bytes_per_kv,
        d2h_bytes_by_saved=prices.bytes_per_inputs if from_host else 0.0,
        duplex_s_per_byte=(1 - kept) / (cost.link_bytes_per_s * kept),
    )


def evenly_attended(timing: Timing) -> Column:
    """Tokens of one sequence on the host with which its CPU attends as long as the GPU does with the rest, [step]."""
    still, (round_trip_s, per_token_s) = timing.still, timing.prices.host_attention.pieces[-1]
    gap = per_token_s - timing.gpu_s_by_kv
    slack_s = still.layer_s - still.query_s - still.rest_s - round_trip_s
    even: Column = np.divide(slack_s, gap, out=np.zeros_like(gap), where=gap > 0)
    return np.maximum(0.0, even)
