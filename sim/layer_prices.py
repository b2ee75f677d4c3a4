"""What one decoder layer costs: a setting's prices, which ``sim.layer`` multiplies by a plan's flows."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.attention import PAGE_TOKENS, Selector
from sim.attention_prices import attention_flops, attention_prices, pieces_begun, rounding_s
from sim.capture import (
    FUSED_ROWS,
    captures_prefill,
    evicts_least_wanted,
    forwards,
    gathers_ahead,
    is_captured,
    reads_in_place,
    streams,
)
from sim.choice_prices import branches, choice_prices, exposed_share, recall_prices
from sim.cost import CostModel, Pieces
from sim.counts import Column, counts_of
from sim.flows import link_token_bytes
from sim.footprint import cut_matrix_bytes, layer_weight_bytes
from sim.gemms import LayerGemms, decoded_products_s
from sim.kv import KvFormat, inputs_layer_bytes, kv_layer_bytes
from sim.launches import begin_operations, decode_operations, end_operations, prefill_operations
from sim.passes import OPERATIONS, of_inputs, of_step
from sim.plan import Mechanism, Placement, Setting
from sim.power import CLOCK_FELT, HBM_FELT, lost_after, recomputed
from sim.prompt_prices import forwarded, prefill_passes, prefill_s

_IDLE_SHARE = 0.4  # of what a fetch takes besides its bytes, by one that finds nothing to fetch: 3.4 of 9 us on an H200
_AHEAD_SM_SHARE = 0.05  # of multiprocessors, by a gather ahead or an exchange under a window: few small programs
_CLOCKED = ("score", "select", "norms", "launch")  # and attention over heads that share keys, by many small programs
_DRAWING = ("qkv", "attention", "out", "mlp", "norms")  # of a prefill, what draws power
_HIDDEN_SHARE = 0.6  # of a piece's begin, by what is projected before it: 4 to 7 of 14 to 17 us are felt on an H200
_MANY_ROWS_LAUNCHES = 1  # of a captured layer whose products are cuBLAS's: their kernels begin one after the other


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPrices:
    """Seconds (and link bytes) of one layer for ``sequences`` at once. ``per_*`` are for each token of one sequence.

    The integer program and the engine read these same numbers. ``spared_s_per_fetched`` of attention that reads in place what
    the host holds: it waits for the link then, and does the rest meanwhile. ``launched_s`` is what the host takes to launch a
    layer, nothing where it replays a captured step. That goes on beside the GPU's work, or, ``launches_felt``, on top of it
    where a CPU does both. The ``_away`` ones are of plans that keep anything outside HBM, at any step; the ``_linked`` one is of
    plans that fetch some of it, where that makes a difference: their steps are replayed in pieces, which begin after
    ``linked_s``. ``completed_s`` is for what a layer's block of streamed weights lacks of the matrix that is cut, which a kernel
    puts beside it. ``begun_s``, in the prefill's launches as well, is a layer's share of what the host does before the first one,
    when the GPU has nothing to do yet. All are at full clocks; ``lost`` is the share by which a prefill's products would take
    longer at those of each step, [step], empty where clocks never fall, and ``clocked`` are the operations that clocks hold up;
    the others wait for HBM or a link.
    """

    sequences: int
    qkv_s: float
    out_s: float
    mlp_s: float
    launch_s: float
    score_s: float
    score_s_per_cached: float
    select_s: float
    select_s_per_kept: float
    gather_s_per_selected: float
    convert_s: float
    convert_s_per_moved: float
    attention_s: float
    attention_s_away: float
    attention_s_per_kept: float
    attention_s_per_kept_away: float
    spared_s_per_fetched: float
    reproject: Pieces
    forward: Pieces
    host_attention: Pieces
    fetch: Pieces
    stream: Pieces
    prompt_write: Pieces
    sm_share: float
    weight_bytes: float
    weights_s: float
    completed_s: float
    bytes_per_kv: float
    bytes_per_inputs: float
    exposed_share: float
    ahead_share: float
    recalls: bool
    head_s: float
    prefill: dict[str, float]
    launched_s: float
    launched_away_s: float
    launched_linked_s: float
    linked_s: float
    prefill_launched_s: float
    prefill_launched_away_s: float
    begun_s: float
    launches_felt: bool
    clocked: tuple[str, ...] = ()
    lost: tuple[float, ...] = ()

    def lost_in(self, steps: NDArray[np.intp]) -> Column | float:
        """By how much longer a prefill's products would take in each of ``steps``."""
        return np.array(self.lost)[steps] if self.lost else 0.0

    def slower(self, operation: str, lost: Column | float) -> Column | float:
        """How many times as long as at full clocks a decode step's operation takes."""
        return 1 + (CLOCK_FELT if operation in self.clocked else HBM_FELT) * lost


def at_pace(prices: LayerPrices, pace: float) -> LayerPrices:
    """The same of a host that takes ``pace`` times as long to launch a kernel."""
    if pace == 1:
        return prices
    return replace(
        prices,
        launched_s=pace * prices.launched_s,
        launched_away_s=pace * prices.launched_away_s,
        launched_linked_s=pace * prices.launched_linked_s,
        prefill_launched_s=pace * prices.prefill_launched_s,
        prefill_launched_away_s=pace * prices.prefill_launched_away_s,
        begun_s=pace * prices.begun_s,
        prefill=prices.prefill | {"launch": prices.prefill["launch"] + (pace - 1) * prices.begun_s},
    )


@lru_cache(maxsize=256)
def layer_prices(cost: CostModel, setting: Setting, sequences: int) -> LayerPrices:
    """Price ``setting`` for a wave of ``sequences``."""
    return priced_layer(cost, setting, sequences)


def priced_layer(cost: CostModel, setting: Setting, sequences: int, *, settled: bool = False) -> LayerPrices:
    """The same where no price is asked for twice: to look one up takes as long as to work some out.

    ``settled``: of a run repeated until clocks no longer fall.
    """
    model, dtype, formats, profile = setting.model, setting.dtype, setting.kv_format, cost.profile
    gpu_kv, host_kv = (kv_layer_bytes(model, dtype, tier) for tier in (formats.gpu, formats.host))
    score_s, score_s_per_cached = recall_prices(cost, setting, sequences)
    felt = exposed_share(cost, setting, sequences) if is_captured(setting) else 1.0
    select_s, select_s_per_kept = (felt * seconds for seconds in choice_prices(cost, setting, sequences))
    gathers = not setting.attention.is_dense and setting.placement is Placement.RECENT and not is_captured(setting)
    quantises = formats.gpu is not KvFormat.NATIVE and not is_captured(setting)  # a captured step's attention does it
    kv_flops = attention_flops(model, sequences)
    guess, late = setting.guess_hits, setting.attention.selector.recalls or reads_in_place(setting)
    attention_s, kept_s = attention_prices(cost, setting, sequences)
    attention_away_s, kept_away_s = attention_prices(cost, setting, sequences, away=True)
    fetch, bytes_per_kv = _fetched_by(cost, setting, sequences), float(sequences * link_token_bytes(setting))
    most_tokens = setting.workload.cached_tokens
    weight_bytes = setting.weights_on_host * layer_weight_bytes(model, dtype, setting.weight_format)
    completed_bytes = cut_matrix_bytes(model, dtype, setting.weight_format, setting.weights_on_host)
    decoded_s = decoded_products_s(cost, setting, sequences)
    beside_s = sum(decoded_s.values()) + kept_away_s * setting.attention.kept_tokens(most_tokens)
    layer_steps = None if settled else model.layers * setting.workload.decode_steps
    prices = LayerPrices(
        sequences=sequences,
        qkv_s=decoded_s["qkv"],
        out_s=decoded_s["out"],
        mlp_s=decoded_s["mlp"],
        launch_s=decode_launch_s(cost, setting, sequences),
        score_s=score_s,
        score_s_per_cached=score_s_per_cached,
        select_s=select_s,
        select_s_per_kept=select_s_per_kept,
        gather_s_per_selected=cost.gather_s(sequences * gpu_kv) if gathers else 0.0,
        convert_s=rounding_s(cost, setting, sequences) + cost.launch_s(1) if quantises else 0.0,
        convert_s_per_moved=cost.widening_s(sequences * (gpu_kv + host_kv)) if formats.gpu is not formats.host else 0.0,
        attention_s=attention_s,
        attention_s_away=attention_away_s,
        attention_s_per_kept=kept_s,
        attention_s_per_kept_away=kept_away_s,
        spared_s_per_fetched=min(kept_away_s, bytes_per_kv * fetch.pieces[-1][1]) if reads_in_place(setting) else 0.0,
        reproject=_reprojected(cost, setting, sequences, beside_s=beside_s, layer_steps=layer_steps),
        forward=forwarded(cost, setting, sequences, beside_s=beside_s, layer_steps=layer_steps),
        host_attention=cost.host_attention(sequences * host_kv, kv_flops),
        fetch=fetch,
        stream=cost.transfer(Mechanism.COPY_ENGINE),
        prompt_write=cost.transfer(_prompt_written_by(setting)),
        sm_share=_sm_share(cost, setting),
        linked_s=pieces_begun(setting) * profile.piece_setup_s if forwards(setting) else 0.0,
        weight_bytes=weight_bytes,
        weights_s=cost.transfer(Mechanism.COPY_ENGINE, handed_over=is_captured(setting)).at_one(weight_bytes),
        completed_s=cost.elementwise_s(2 * completed_bytes) if is_captured(setting) else 0.0,
        bytes_per_kv=bytes_per_kv,
        bytes_per_inputs=float(sequences * inputs_layer_bytes(model, dtype)),
        exposed_share=(1.0 if guess is None else 1.0 - guess) if late else 0.0,
        ahead_share=(0.0 if guess is None else 1.0) if late else 1.0,
        recalls=late,
        head_s=LayerGemms.of(cost, setting).head.at_one(sequences)
        + profile.step_overhead_s
        + profile.branch_s * branches(setting),
        prefill=prefill_s(cost, setting, sequences),
        launches_felt=cost.machine.is_cpu,
        clocked=(*_CLOCKED, *(["attention"] if model.heads > model.kv_heads else [])),
        **_launch_prices(cost, setting, prefill_passes(sequences, setting.workload.prompt_tokens)),
    )
    return replace(prices, lost=_lost(cost, setting, prices))


def _lost(cost: CostModel, setting: Setting, prices: LayerPrices) -> tuple[float, ...]:
    """By a prefill that draws the card's whole power, twice where its graph is replayed before it counts: [step], as soon as
    steps follow that find all in HBM.
    """
    if cost.profile.prefill_sustained_share == 1:
        return ()
    counts = setting.token_counts
    cached, kept = np.array(counts.cached), np.add(counts.local, counts.selected)
    constant_s = prices.qkv_s + prices.out_s + prices.mlp_s + prices.launch_s
    constant_s += prices.score_s + prices.select_s + prices.attention_s
    per_kept_s = prices.attention_s_per_kept + prices.select_s_per_kept
    layer_s = constant_s + prices.score_s_per_cached * cached + per_kept_s * kept
    prefill_s = setting.model.layers * sum(prices.prefill[name] for name in _DRAWING)
    prefill_s *= 1 + captures_prefill(setting)
    steps = lost_after(cost, prefill_s, (setting.model.layers * layer_s + prices.head_s)[1:])
    return (0.0, *steps.tolist())


def _reprojected(
    cost: CostModel, setting: Setting, sequences: int, *, beside_s: float, layer_steps: int | None
) -> Pieces:
    """Keys and values of a layer by the tokens whose inputs are kept; most of the begin of a piece hides behind them."""
    if not setting.recompute.from_activations:
        return Pieces(pieces=((0.0, 0.0),), free_at_zero=True)
    projected = recomputed(
        cost,
        LayerGemms.of(cost, setting).kv,
        of_inputs(setting.model, fused=is_captured(setting)).seconds(cost, setting.dtype),
        sequences=sequences,
        beside_s=beside_s,
        most_tokens=setting.workload.cached_tokens,
        layer_steps=layer_steps,
    )
    if not (is_captured(setting) and streams(setting, away=True)):
        return projected
    hidden_s = _HIDDEN_SHARE * cost.profile.piece_setup_s
    felt = tuple((constant_s - hidden_s, slope_s) for constant_s, slope_s in projected.pieces)
    return replace(projected, pieces=((0.0, 0.0), *felt))


def _launch_prices(cost: CostModel, setting: Setting, passes: int) -> dict[str, Any]:
    """Of a layer, with its share of what the host launches at a step's ends."""
    operation_s, layers = cost.profile.host_operation_s, setting.model.layers
    begun = begin_operations(setting) / layers
    step, prefill = (end_operations(setting, prefill=prefill).worth / layers for prefill in (False, True))
    prefill += begun
    return {
        "begun_s": operation_s * begun,
        "launched_s": operation_s * (step + decode_operations(setting, away=False).worth),
        "launched_away_s": operation_s * (step + decode_operations(setting, away=True).worth),
        "launched_linked_s": operation_s * (step + decode_operations(setting, away=True, linked=True).worth),
        "prefill_launched_s": operation_s * (prefill + prefill_operations(setting, passes, away=False).worth),
        "prefill_launched_away_s": operation_s * (prefill + prefill_operations(setting, passes, away=True).worth),
    }


def decode_launch_s(cost: CostModel, setting: Setting, rows: int) -> float:
    """What runs between a decode step's products: rotation and a gate are kernels of their own, and of many rows ReLU is."""
    model, kernels = setting.model, cost.profile.kernels_per_layer
    kernels += (not model.positions) + model.gated_mlp
    if not is_captured(setting):
        return cost.launch_s(kernels)
    passed_s = of_step(model).seconds(cost, setting.dtype, rows)
    if rows > FUSED_ROWS:
        kernels += _MANY_ROWS_LAUNCHES + (not model.gated_mlp)
        if not model.gated_mlp:
            passed_s += OPERATIONS["relu"].seconds(cost, setting.dtype, rows * model.intermediate)
    return cost.launch_s(kernels) + passed_s


def _fetched_by(cost: CostModel, setting: Setting, sequences: int) -> Pieces:
    """Attention that reads in place does as a gather kernel does; copies for pieces of a step wait for each other's streams. Pages
    are fetched by a kernel that often finds none to fetch.
    """
    if reads_in_place(setting) or gathers_ahead(setting):
        return cost.transfer(Mechanism.GATHER_KERNEL)
    if setting.attention.selector is Selector.PAGES and is_captured(setting):
        gather = cost.transfer(setting.fetch_by)
        begun = _IDLE_SHARE + (1 - _IDLE_SHARE) * _fetching_share(setting, sequences)
        return replace(gather, pieces=tuple((begun * constant_s, slope_s) for constant_s, slope_s in gather.pieces))
    return cost.transfer(setting.fetch_by, handed_over=is_captured(setting) and streams(setting, away=True))


def _fetching_share(setting: Setting, sequences: int) -> float:
    """Of the steps after the first, in which any of ``sequences`` picks a page anew, wherever it lies, were all alike."""
    counts = counts_of(setting)
    new = (counts.fetch_rate * counts.pool)[2:]
    return float(1 - np.exp(-sequences * new / PAGE_TOKENS).mean()) if len(new) else 1.0


def _prompt_written_by(setting: Setting) -> Mechanism:
    """Kernels, captured or not: host memory is mapped. What the CPU attends to is its own, to which tensors are copied."""
    return Mechanism.COPY_ENGINE if setting.host_attention else Mechanism.GATHER_KERNEL


def _sm_share(cost: CostModel, setting: Setting) -> float:
    """Share of a fetch that the GPU stream loses to it."""
    late = setting.attention.selector.recalls and setting.guess_hits is None  # nothing runs beside
    few = gathers_ahead(setting) or evicts_least_wanted(setting)
    if late or reads_in_place(setting) or not (few or setting.fetch_by is Mechanism.GATHER_KERNEL):
        return 0.0
    return _AHEAD_SM_SHARE if few else cost.profile.gather_sm_share
