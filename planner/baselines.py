"""Published systems as plans that one engine runs. Each gets what it is known for, and its own way to choose.

What a system leaves out or is given beyond its paper stands in its footnote.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from planner.options import concurrencies, kv_budget
from planner.request import Request
from sim.attention import Attention, Selector
from sim.cost import CostModel
from sim.counts import Column
from sim.flows import flows_of, home_columns
from sim.forecast import Forecast, forecast, over_capacity
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.occupancy import occupancy_of
from sim.plan import Admission, Mechanism, Placement, Plan, Preemption, Recompute, Setting, WriteBack
from sim.units import format_bytes

Candidates = Callable[[Request], Iterable[Plan]]
Judge = Callable[[Forecast], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A system by the name that ``planner compare`` prints; ``candidates`` are the plans that it chooses among.

    ``lossless`` is said of it where none of its plans fits; else the plan itself says it.
    """

    policy: str
    lossless: bool
    footnote: str
    candidates: Candidates
    judge: Judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What became of a rival: a priced plan, or the reason why it has none."""

    rival: Rival
    priced: Forecast | None
    reason: str | None


def play(rival: Rival, request: Request, cost: CostModel) -> Played:
    """The plan that ``rival`` chooses by its own judgement among those that fit."""
    best: Forecast | None = None
    reason = f"out of memory: weights and workspace leave no room in HBM of {request.machine.name}"
    for plan in rival.candidates(request):
        try:
            priced = forecast(plan, cost)
        except ValueError as error:  # not even one sequence has room under continuous admission
            reason = f"out of memory: {error}"
            continue
        short = shortage_of(priced)
        if short:
            reason = short
        elif best is None or rival.judge(priced) < rival.judge(best):
            best = priced
    return Played(rival=rival, priced=best, reason=None if best else reason)


def shortage_of(priced: Forecast) -> str | None:
    """Which memory a plan overflows, and by how much at worst; None if it fits."""
    for name, over in zip(("HBM", "host memory"), over_capacity(priced), strict=True):
        if np.any(over > 0):
            step = int(np.argmax(over))
            return f"out of memory: {format_bytes(float(over[step]))} too much in {name} at step {step}"
    return None


_VLLM = (
    "vLLM: continuous admission by 16-token pages, recompute or swap when they run out, whichever is faster; all "
    "requests are there from the start"
)
_VLLM_8BIT = "vLLM with an 8-bit KV cache: fp8 where the card has it, else int8"
_FLEXGEN = (
    "FlexGen: static shares of KV and of weights in HBM, the best of a grid under our cost model, CPU attention or "
    "fetching, any block size; its 4-bit cache where int4 is among the KV formats allowed"
)
_ACCELERATE = "Accelerate: all KV in host memory, whole batch; given an overlap of fetches that it does not have"
_DEEPSPEED = "DeepSpeed-ZeRO: weights streamed from the host, all KV in HBM, whole batch as published"
_ALISA = (
    "ALISA: as published, recent placement, INT8, alpha, beta, p1 and p2 by the least sum of compute, transfer and "
    "recompute; recomputed from layer inputs, which the paper leaves open"
)
_H2O = "H2O: heavy hitters and newest tokens in HBM, the rest dropped; any number of waves"
_KVPR = "KVPR: KV and layer inputs in host memory, the split between fetching and recomputing tuned; whole batch"


def setting_for(
    request: Request, concurrency: int, attention: Attention, weights_on_host: float = 0.0
) -> Setting | None:
    """All in HBM, native formats, what the rivals vary; None where weights and workspace alone overflow HBM."""
    budget = kv_budget(request, concurrency, weights_on_host)
    if budget < 0:
        return None
    return Setting(
        machine=request.machine,
        model=request.model,
        workload=request.workload,
        dtype=request.dtype,
        weight_format=request.weight_format,
        weights_on_host=weights_on_host,
        concurrency=concurrency,
        attention=attention,
        access=request.profile.access(attention.selector),
        kv_format=KvFormats(),
        fetch_by=Mechanism.COPY_ENGINE if attention.is_dense else Mechanism.GATHER_KERNEL,
        kv_budget_bytes=budget,
    )


def least_host_share(setting: Setting, cached: Column) -> float:
    """The smallest share of each row, in twentieths, that must leave HBM so that every step fits."""
    low, high = 0, 20
    while low < high:
        middle = (low + high) // 2
        if _fits_hbm(plan_with(setting, middle / 20 * cached, np.zeros_like(cached))):
            high = middle
        else:
            low = middle + 1
    return high / 20


def _fits_hbm(plan: Plan) -> bool:
    homes = home_columns(plan.homes)
    held = occupancy_of(plan, homes, flows_of(plan, homes))
    return plan.setting.concurrency * float(held.hbm.max()) <= plan.setting.kv_budget_bytes


def plan_with(setting: Setting, host_kv: Column, activations: Column) -> Plan:
    """Whole tokens with these homes, the rest in HBM; homes only move outward, and what a step needs stays in HBM."""
    counts = setting.token_counts
    cached, dead = np.array(counts.cached), np.array(counts.dead)
    most = np.minimum.accumulate((cached - dead - np.array(setting.slots_needed))[::-1])[::-1]
    kept = np.maximum.accumulate(np.minimum(np.rint(activations).astype(int), most) + dead)
    beyond = np.maximum.accumulate(
        np.maximum(np.minimum(np.rint(host_kv).astype(int), most - kept + dead) + kept, kept)
    )
    columns = (cached - beyond, beyond - kept, kept - dead, dead, np.zeros_like(dead))
    hbm, on_host, inputs, dropped, copies = (tuple(int(tokens) for tokens in column) for column in columns)
    return Plan(
        setting=setting,
        homes=TokenHomes(hbm=hbm, host_kv=on_host, activations=inputs, dropped=dropped, copies=copies),
    )


def summed_s(priced: Forecast) -> float:
    """ALISA's own objective: compute, transfers and recomputation added up, nothing overlapped."""
    layers = priced.plan.setting.model.layers
    total = 0.0
    for wave, size in zip(priced.waves, dict.fromkeys(priced.plan.setting.wave_sizes), strict=True):
        times = wave.times
        layer_s = times.layer_s + times.prefetch_s + times.correct_s + times.write_s
        total += priced.plan.setting.wave_sizes.count(size) * layers * float(layer_s.sum())
    return total


def _makespan_s(priced: Forecast) -> float:
    return priced.outcome.makespan_s


def _cached(request: Request) -> Column:
    work = request.workload
    return np.arange(work.prompt_tokens, work.prompt_tokens + work.output_tokens, dtype=np.float64)


def _dense(request: Request, concurrency: int, weights_on_host: float = 0.0) -> Setting | None:
    """Dense attention in native formats; None where weights and workspace alone overflow HBM."""
    return setting_for(request, concurrency, Attention(selector=Selector.DENSE), weights_on_host)


def _vllm(request: Request) -> Iterator[Plan]:
    yield from _paged(request, KvFormat.NATIVE)


def _vllm_8bit(request: Request) -> Iterator[Plan]:
    has_fp8 = request.machine.gpu.fp8_flop_per_s is not None
    yield from _paged(request, KvFormat.FP8 if has_fp8 else KvFormat.INT8)


def _paged(request: Request, kv_format: KvFormat) -> Iterator[Plan]:
    """Continuous admission, both ways of stepping back."""
    nothing = np.zeros(request.workload.output_tokens)
    setting = _dense(request, request.workload.batch)
    if setting is None:
        return
    for preemption in Preemption:
        paged = replace(setting, admission=Admission.CONTINUOUS, preemption=preemption)
        yield plan_with(replace(paged, kv_format=KvFormats(gpu=kv_format, host=kv_format)), nothing, nothing)


def _flexgen(request: Request) -> Iterator[Plan]:
    """Its policy: block size, shares of weights and of KV on the host, where to attend, compression."""
    cached, nothing = _cached(request), np.zeros(request.workload.output_tokens)
    formats = [KvFormat.NATIVE, *([KvFormat.INT4] if KvFormat.INT4 in request.kv_formats else [])]
    for concurrency, kv_format, weights in product(concurrencies(request), formats, (0.0, 0.5, 1.0)):
        setting = _dense(request, concurrency, weights)
        if setting is None:
            continue
        stored = replace(setting, kv_format=KvFormats(gpu=kv_format, host=kv_format))
        least = least_host_share(stored, cached)
        on_host = (False, True) if kv_format is KvFormat.NATIVE else (False,)
        for share, on_cpu in product(sorted({least, (least + 1) / 2, 1.0}), on_host):
            if share or not on_cpu:
                yield plan_with(replace(stored, host_attention=on_cpu), share * cached, nothing)


def _accelerate(request: Request) -> Iterator[Plan]:
    cached = _cached(request)
    setting = _dense(request, request.workload.batch)
    if setting:
        yield plan_with(replace(setting, write_back=WriteBack.AT_BIRTH), cached, np.zeros_like(cached))


def _deepspeed(request: Request) -> Iterator[Plan]:
    nothing = np.zeros(request.workload.output_tokens)
    setting = _dense(request, request.workload.batch, weights_on_host=1.0)
    if setting:
        yield plan_with(setting, nothing, nothing)


def _alisa(request: Request) -> Iterator[Plan]:
    """Phase I until HBM is full, then alpha of all tokens on the host; from p2 on beta of those are recomputed."""
    cached = _cached(request)
    selector = Attention(selector=Selector.SWA, sparsity=request.max_sparsity or 0.8)
    setting = setting_for(request, request.workload.batch, selector)
    if setting is None:
        return
    stored = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    base = replace(setting, kv_format=stored, drop_dead=False, recompute=Recompute.ACTIVATIONS_HOST)
    steps, nothing = np.arange(len(cached)), np.zeros_like(cached)
    p1 = _first_overflow(plan_with(base, nothing, nothing))
    least = least_host_share(base, cached)
    for alpha, beta, p2 in product((least, (least + 1) / 2, 1.0), (0.0, 0.1, 0.25, 0.5), _evenly(p1, len(cached))):
        off = alpha * cached * (steps >= p1)
        recomputed = beta * off * (steps >= p2)
        yield plan_with(base, off - recomputed, recomputed)


def _h2o(request: Request) -> Iterator[Plan]:
    nothing = np.zeros(request.workload.output_tokens)
    for concurrency in concurrencies(request):
        kept = Attention(selector=Selector.H2O, sparsity=request.max_sparsity or 0.8)
        setting = setting_for(request, concurrency, kept)
        if setting:
            yield plan_with(replace(setting, placement=Placement.RESIDENT), nothing, nothing)


def _kvpr(request: Request) -> Iterator[Plan]:
    """Everything on the host; the first tokens as layer inputs, recomputed while the rest is on its way."""
    cached = _cached(request)
    setting = _dense(request, request.workload.batch)
    if setting is None:
        return
    base = replace(setting, write_back=WriteBack.AT_BIRTH, recompute=Recompute.ACTIVATIONS_HOST)
    for share in np.linspace(0, 1, 41):
        yield plan_with(base, (1 - share) * cached, share * cached)


def _first_overflow(plan: Plan) -> int:
    """The first step that does not fit HBM, or the number of steps if all do."""
    homes = home_columns(plan.homes)
    over = (
        plan.setting.concurrency * occupancy_of(plan, homes, flows_of(plan, homes)).hbm > plan.setting.kv_budget_bytes
    )
    return int(np.argmax(over)) if np.any(over) else plan.homes.steps


def _evenly(first: int, last: int) -> tuple[int, ...]:
    return tuple(sorted({first + (last - first) * quarter // 4 for quarter in range(5)}))


RIVALS = (
    Rival(policy="vllm", lossless=True, footnote=_VLLM, candidates=_vllm, judge=_makespan_s),
    Rival(policy="vllm-8bit", lossless=False, footnote=_VLLM_8BIT, candidates=_vllm_8bit, judge=_makespan_s),
    Rival(policy="flexgen", lossless=True, footnote=_FLEXGEN, candidates=_flexgen, judge=_makespan_s),
    Rival(policy="accelerate", lossless=True, footnote=_ACCELERATE, candidates=_accelerate, judge=_makespan_s),
    Rival(policy="deepspeed-zero", lossless=True, footnote=_DEEPSPEED, candidates=_deepspeed, judge=_makespan_s),
    Rival(policy="alisa", lossless=False, footnote=_ALISA, candidates=_alisa, judge=summed_s),
    Rival(policy="h2o", lossless=False, footnote=_H2O, candidates=_h2o, judge=_makespan_s),
    Rival(policy="kvpr", lossless=True, footnote=_KVPR, candidates=_kvpr, judge=_makespan_s),
)
