"""The least time that a setting could take: every step by itself, free to move its tokens anew.

What couples the steps (homes only move outward, inputs are saved from birth, evictions cross the link) is left out, and
of the paths through a step only the two that weigh most are kept, so no plan of the setting is faster.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from planner.coefficients import (
    Coefficients,
    Timing,
    evenly_attended,
    least_h2d_bytes,
    still_flows,
    waited_pieces,
)
from planner.options import Family
from planner.request import Objective, Request
from planner.spill import SLACK, Line, SavedRange, Spill, any_saved, spill_of
from sim.attention_prices import attention_s_per_token, least_attention_s
from sim.cost import CostModel
from sim.counts import Column, counts_of
from sim.footprint import PREFILL_CHUNK_TOKENS, layer_weight_bytes
from sim.gemms import LayerGemms, least_products_s, least_read_s
from sim.layer import layer_times
from sim.pipeline import step_seconds
from sim.plan import Setting, WriteBack
from sim.prompt_prices import prompt_launch_s

SAVED_CASES = 4  # of how many tokens have their inputs saved, to begin with
NARROW_SHARE = 0.0125  # a case this narrow, relative to its upper end, or narrower than a token, is not halved


def least_bound(problem: Coefficients, judge: Callable[[tuple[Column, ...]], float]) -> tuple[float, SavedRange]:
    """What no plan of the setting beats, as ``judge`` sums its steps (given for each wave size, [step]); inf if none fits.

    And how many saved inputs that rests on.
    """
    everything = any_saved(problem)
    if not is_coupled(problem):
        return rough_bound(problem, judge), everything
    edges = [everything.most * share / SAVED_CASES for share in range(SAVED_CASES + 1)]
    cases = [SavedRange(fewest=low, most=high) for low, high in pairwise(edges)]
    queue = [(_case_bound(problem, case, judge), case) for case in cases]
    while True:  # halve the case that looks best until it is narrow: how many inputs are saved then hardly matters
        queue.sort(key=lambda entry: entry[0])
        bound, best = queue[0]
        if bound == float("inf") or best.width <= max(1.0, NARROW_SHARE * best.most):
            return bound, best
        middle = (best.fewest + best.most) / 2
        halves = (SavedRange(fewest=best.fewest, most=middle), SavedRange(fewest=middle, most=best.most))
        queue[:1] = [(max(bound, _case_bound(problem, case, judge)), case) for case in halves]


def rough_bound(problem: Coefficients, judge: Callable[[tuple[Column, ...]], float]) -> float:
    """The same without what couples the steps: no higher, and quick."""
    return _case_bound(problem, any_saved(problem), judge)


def is_coupled(problem: Coefficients) -> bool:
    """Saved inputs take room from birth and so couple the steps; it matters where that room is short."""
    memory, tokens = problem.memory, float(counts_of(problem.setting).cached[-1])
    short_host = memory.host_per_saved * tokens + float(memory.host_by_kv[-1]) * tokens > memory.host_budget
    return problem.uses_inputs and (memory.hbm_per_saved > 0 or short_host)


def _case_bound(problem: Coefficients, case: SavedRange, judge: Callable[[tuple[Column, ...]], float]) -> float:
    spill = spill_of(problem, case)
    alike = np.isclose(spill.lowest, spill.highest, rtol=SLACK, atol=SLACK)
    if np.any((spill.lowest > spill.highest) & ~alike):
        return float("inf")
    return judge(tuple(_step_bound(problem, timing, spill) for timing in problem.timings))


def still_bound(problem: Coefficients, cost: CostModel) -> tuple[Column, ...]:
    """Seconds of each step for each wave size if all fitted HBM, [step] each: no home elsewhere is faster by the same kernels."""
    setting, flows = problem.setting, still_flows(problem.setting)
    times = (layer_times(timing.prices, flows, cost, away=False) for timing in problem.timings)
    return tuple(step_seconds(one, setting.model.layers, setting.prefetch_layers) for one in times)


def spilling_bound(problem: Coefficients, cost: CostModel) -> tuple[Column, ...]:
    """The same by the quickest attention that any kernels could give: below every plan that keeps tokens elsewhere, streams them,
    forwards them or reads them in place. Of plans that are launched otherwise it says nothing.
    """
    setting, flows = problem.setting, still_flows(problem.setting)
    steps = list[Column]()
    for timing in problem.timings:
        setup_s, kept_s = least_attention_s(cost, setting, timing.sequences)
        prices = replace(timing.prices, attention_s=setup_s, attention_s_per_kept=kept_s)
        times = layer_times(prices, flows, cost, away=False)
        steps.append(step_seconds(times, setting.model.layers, setting.prefetch_layers))
    return tuple(steps)


def fits(problem: Coefficients) -> bool:
    """Every step has room for all living tokens in HBM."""
    return not np.any(problem.memory.hbm_all_in > problem.memory.hbm_budget)


def _still_s(problem: Coefficients, timing: Timing) -> Column:
    setting = problem.setting
    return step_seconds(timing.still, setting.model.layers, setting.prefetch_layers)


def _step_bound(problem: Coefficients, timing: Timing, spill: Spill) -> Column:
    """The base of every step, raised where HBM overflows."""
    steps = spill.steps
    if problem.setting.host_attention:
        step_s = _assisted(problem, timing, spill)
    else:
        step_s = _still_s(problem, timing)
        decoding = steps > 0  # the prefill fetches nothing
        if decoding.any():
            step_s[steps[decoding]] = np.maximum(step_s[steps], _spilled_s(problem, timing, spill))[decoding]
    step_s[0] = max(step_s[0], _writing_prefill_s(problem, timing, spill))
    launched: Column = np.maximum(step_s, problem.setting.model.layers * timing.still.launched_s)
    return launched


def _spilled_s(problem: Coefficients, timing: Timing, spill: Spill) -> Column:
    """Seconds of the steps that overflow HBM."""
    lines = _lines(problem, timing, spill)
    if problem.uses_inputs or problem.uses_forward:
        return _shared(problem, timing, spill, lines)
    return _fixed(problem, timing, spill, lines)


def _assisted(problem: Coefficients, timing: Timing, spill: Spill) -> Column:
    """The CPU attends to the tokens on the host: at least as many as must be there, more where GPU and CPU then even out."""
    still, prices, setting = timing.still, timing.prices, problem.setting
    least = np.maximum(np.ceil(spill.kv_base - SLACK), 0.0)
    round_trip_s, per_token_s = prices.host_attention.pieces[-1]
    cpu_s = still.query_s + still.rest_s + round_trip_s
    most, even = np.maximum(least, counts_of(setting).pool), evenly_attended(timing)
    layer_s = np.where(least > 0, np.inf, still.layer_s)
    for shared in (np.clip(np.floor(even), least, most), np.clip(np.ceil(even), least, most)):
        assisted_s = np.maximum(still.layer_s + timing.gpu_s_by_kv * shared, cpu_s + per_token_s * shared)
        layer_s = np.minimum(layer_s, assisted_s)
    layer_s[0] = still.layer_s[0]
    layers, depth, streamed_s = setting.model.layers, setting.prefetch_layers, still.prefetch_s
    after_s, last_s = still.rest_s, np.maximum(still.head_s, still.write_s)
    computed_s = np.maximum(layers * layer_s, (layers - depth) * streamed_s + after_s) + last_s
    fetched_s = (layers - depth) * np.maximum(layer_s, streamed_s) + depth * np.append(streamed_s[1:], 0.0)
    longest: Column = np.maximum(np.maximum(computed_s, fetched_s), layer_s + layers * still.write_s)
    return longest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lines:
    """Fetch and GPU seconds of a layer, as base and slope in the recomputed tokens; what recomputing costs is apart."""

    fetch_base: Column
    fetch_slope: Column
    gpu_base: Column
    gpu_slope: Column


def _lines(problem: Coefficients, timing: Timing, spill: Spill) -> _Lines:
    steps, (setup_s, per_byte_s) = spill.steps, waited_pieces(timing.prices)[-1]
    by_kv, by_second = timing.h2d_bytes_by_kv[steps], timing.h2d_bytes_by_inputs[steps]
    bytes_base = least_h2d_bytes(problem.setting, timing, steps, spill.kv_base)
    bytes_slope = by_kv * spill.kv_slope + by_second
    surely = (by_second > 0) | (spill.highest <= 0)  # else all tokens may be recomputed without the link
    streamed_s = timing.still.prefetch_s[steps]
    fetch_base = streamed_s + setup_s * ((bytes_base > 0) & surely) + per_byte_s * bytes_base
    gpu_by_kv, share = timing.gpu_s_by_kv[steps], timing.prices.sm_share
    return _Lines(
        fetch_base=fetch_base,
        fetch_slope=per_byte_s * bytes_slope,
        gpu_base=timing.still.layer_s[steps] + gpu_by_kv * spill.kv_base + share * (fetch_base - streamed_s),
        gpu_slope=gpu_by_kv * spill.kv_slope + share * per_byte_s * bytes_slope,
    )


def _fixed(problem: Coefficients, timing: Timing, spill: Spill, lines: _Lines) -> Column:
    """Nothing can be recomputed: what is fetched is known, so every path through the step counts."""
    layers, depth, head_s = (
        problem.setting.model.layers,
        problem.setting.prefetch_layers,
        timing.still.head_s[spill.steps],
    )
    fetch_s, gpu_s = lines.fetch_base, lines.gpu_base
    if timing.prices.recalls:
        return layers * (gpu_s + fetch_s) + head_s
    after_s = timing.still.layer_s[spill.steps] - timing.still.query_s[spill.steps]
    following_s = np.where(_followed(spill), np.append(fetch_s[1:], 0.0), _streamed_next_s(timing, spill))
    computed_s = np.maximum(layers * gpu_s, (layers - depth) * fetch_s + after_s) + head_s
    longest: Column = np.maximum(computed_s, (layers - depth) * np.maximum(gpu_s, fetch_s) + depth * following_s)
    return longest


def _shared(problem: Coefficients, timing: Timing, spill: Spill, lines: _Lines) -> Column:
    """Tokens are shared between fetching and recomputing, so that both take equally long or a limit is hit.

    A step is at least any mean of its paths, weight m on computing, L c + head, and 1 - m on fetching, either
    (L - D) f + attend + rest + head or (L - D) f + D f'. Summed over the steps, each f stands by itself, and the best
    mean is the one that makes a step's choice indifferent (weak duality: any m gives a bound).
    """
    pieces = timing.prices.reproject.pieces if problem.uses_inputs else timing.prices.forward.pieces
    rows = timing.rows_by_inputs[spill.steps] if problem.uses_inputs else np.ones(len(spill.steps))
    constants, slopes = (np.array(column)[:, None] for column in zip(*pieces, strict=True))
    by_piece = np.stack(
        [_mean_of_paths(problem, timing, spill, lines, *piece) for piece in zip(constants, slopes * rows, strict=True)]
    )
    counts = by_piece.argmax(axis=0)  # one piece for each step, or what is left to the next one would count twice
    return _mean_of_paths(problem, timing, spill, lines, constants[counts, 0], slopes[counts, 0] * rows)


def _mean_of_paths(
    problem: Coefficients, timing: Timing, spill: Spill, lines: _Lines, constant_s: Column, per_token_s: Column
) -> Column:
    """The bound for one piece of the recomputation's price; ``constant_s`` of it is saved where nothing is recomputed."""
    layer = Line(lines.gpu_base + constant_s, lines.gpu_slope + per_token_s)
    fetch = Line(lines.fetch_base, lines.fetch_slope)
    layers, depth, head_s = (
        problem.setting.model.layers,
        problem.setting.prefetch_layers,
        timing.still.head_s[spill.steps],
    )
    lowest, highest = spill.lowest, np.maximum(spill.lowest, spill.highest)
    if timing.prices.recalls:
        total = Line(layers * (layer.base + fetch.base) + head_s, layers * (layer.slope + fetch.slope))
        none = np.where(lowest > 0, np.inf, total.base - layers * constant_s)
        known_late: Column = np.minimum(np.minimum(total.at(lowest), total.at(highest)), none)
        return known_late
    query_s = timing.still.query_s[spill.steps]
    compute = Line(layers * layer.base + head_s, layers * layer.slope)
    finished = Line(layer.base - query_s + head_s, layer.slope)  # attend, rest and head, behind the last fetch
    ahead = (finished.at(lowest) < depth * fetch.at(lowest)) & (spill.steps > 0)
    behind = Line(np.where(ahead, 0.0, finished.base), np.where(ahead, 0.0, finished.slope))
    streamed_s = np.where(ahead & ~_followed(spill), depth * _streamed_next_s(timing, spill), 0.0)
    fetched = Line(
        (layers - depth) * fetch.base + behind.base + streamed_s, (layers - depth) * fetch.slope + behind.slope
    )
    fetched_whole = Line(fetched.base + ahead * depth * fetch.base, fetched.slope + ahead * depth * fetch.slope)
    mean = _indifferent(compute, fetched_whole, lowest, highest)
    left = (1 - mean) * ahead * depth * _followed(spill)  # of the next step's fetch
    before = np.append(0.0, left[:-1])
    total = Line(
        mean * compute.base + (1 - mean) * fetched.base + before * fetch.base,
        mean * compute.slope + (1 - mean) * fetched.slope + before * fetch.slope,
    )
    fetched_none = fetched.base - np.where(ahead, 0.0, constant_s)
    mean_none = mean * (compute.base - layers * constant_s) + (1 - mean) * fetched_none
    none = np.where(lowest > 0, np.inf, np.maximum(mean_none, fetched_none) + before * fetch.base)
    known_ahead: Column = np.minimum(np.minimum(total.at(lowest), total.at(highest)), none)
    return known_ahead


def _followed(spill: Spill) -> NDArray[np.bool_]:
    """The next step overflows HBM too."""
    return np.append(np.diff(spill.steps) == 1, False)


def _streamed_next_s(timing: Timing, spill: Spill) -> Column:
    """What the step after each fetches for a layer whatever is in HBM: streamed weights."""
    streamed_s = np.append(timing.still.prefetch_s[1:], 0.0)
    return streamed_s[spill.steps]


def _indifferent(compute: Line, fetched: Line, lowest: Column, highest: Column) -> Column:
    """The weight of computing that makes the mean independent of the choice; all or nothing where a limit is hit."""
    gap = compute.slope - fetched.slope
    even = np.divide(fetched.base - compute.base, gap, out=np.zeros_like(gap), where=gap > 0)
    balanced = np.clip(-np.divide(fetched.slope, gap, out=np.zeros_like(gap), where=gap > 0), 0.0, 1.0)
    at = np.clip(even, lowest, highest)
    longer = (compute.at(at) >= fetched.at(at)).astype(np.float64)
    mean: Column = np.where((even > lowest) & (even < highest), balanced, longer)
    return mean


def _writing_prefill_s(problem: Coefficients, timing: Timing, spill: Spill) -> float:
    """A prefill whose every layer waits until what must cross to the host has been written."""
    layer_s = float(timing.still.layer_s[0]) + timing.prices.prompt_write.at_one(_prompt_bytes(problem, timing, spill))
    return problem.setting.model.layers * layer_s + timing.prices.head_s


def _prompt_bytes(problem: Coefficients, timing: Timing, spill: Spill) -> float:
    """Of the prompt, that one layer writes at least: all of it at birth, unless it is kept otherwise; what overflows HBM."""
    if problem.setting.write_back is WriteBack.AT_BIRTH and not (problem.uses_inputs or problem.uses_forward):
        counts = counts_of(problem.setting)
        return timing.d2h_bytes_by_written * float(counts.cached[0] - counts.dead[0])
    if not len(spill.steps) or spill.steps[0]:
        return 0.0
    ends = (spill.lowest[0], max(spill.lowest[0], spill.highest[0]))
    tokens = [(spill.kv_base[0] + spill.kv_slope[0] * x, x) for x in ends]
    return float(min(timing.d2h_bytes_by_written * max(kv, 0.0) + timing.d2h_bytes_by_saved * x for kv, x in tokens))


def family_bound(family: Family, request: Request, cost: CostModel) -> float:
    """What no setting of the family beats: every step reads the weights, from HBM and over the link."""
    model, waves = request.model, -(-request.workload.batch // family.concurrency)
    layer_bytes = layer_weight_bytes(model, request.dtype, request.weight_format)
    streamed_s = model.layers * family.weights_on_host * layer_bytes / cost.link_bytes_per_s
    step_s = max(streamed_s, model.layers * least_read_s(cost, model, request.dtype, request.weight_format))
    if request.objective is Objective.THROUGHPUT:
        return waves * request.workload.output_tokens * step_s
    return step_s if request.objective is Objective.TTFT or request.workload.decode_steps else 0.0


def paged_bound(problem: Coefficients, request: Request, cost: CostModel) -> float:
    """What continuous admission cannot beat: enough steps to hold every sequence at every age, each with mean rows.

    Matrix products cost the most of several straight lines of their rows, so their mean is at least that of mean rows;
    attention costs the same whoever runs beside. The last token needs no step more than the others.
    """
    setting, memory = problem.setting, problem.memory
    tokens, batch = problem.steps, setting.workload.batch
    places = min(float(setting.concurrency), setting.kv_budget_bytes * tokens / float(memory.hbm_all_in.sum()))
    steps = max(tokens, batch * tokens / max(places, 1.0))
    rows = batch * tokens / steps
    gemms, layers = LayerGemms.of(cost, setting), setting.model.layers
    gemm_s = least_products_s(cost, setting, rows)
    launch_s = cost.launch_s(cost.profile.kernels_per_layer)  # of any step, one that only prefills too
    step_s = layers * (gemm_s + launch_s) + gemms.head.at_one(rows) + cost.profile.step_overhead_s
    at_least_s = float(prompt_launch_s(cost, setting, np.zeros(1))[0])  # beside no passes: none are counted here
    prompts_s = _fewest_prefills(setting) * layers * (at_least_s - launch_s)
    if request.objective is Objective.TTFT:
        return 0.0
    if request.objective is Objective.TPOT:
        return layers * least_products_s(cost, setting, 1.0)
    attended = float((counts_of(setting).local + counts_of(setting).selected)[1:].sum())
    attention_s = layers * attention_s_per_token(cost, setting) * batch * attended
    return steps * step_s + prompts_s + attention_s


def _fewest_prefills(setting: Setting) -> int:
    """Passes of prompts through a layer: each of no more sequences than run at once, and of no more tokens than a pass takes."""
    work = setting.workload
    by_tokens = work.batch * work.prompt_tokens / max(PREFILL_CHUNK_TOKENS, work.prompt_tokens)
    return ceil(max(work.batch / setting.concurrency, by_tokens))
