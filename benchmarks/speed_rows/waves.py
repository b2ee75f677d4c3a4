"""Rows that run waves by ``GraphWave``: sparse window, dense, and dense with what HBM lacks read from the host."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from runtime.graph.quantised_dense import QuantisedSlots, fetched_bytes
from runtime.graph.recall import RecallSlots
from runtime.graph.run import GraphWave
from runtime.models import Decoder
from runtime.wave import Prompts
from sim.attention import Attention, Selector
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats, inputs_layer_bytes, kv_layer_bytes
from sim.plan import Mechanism, Placement, Plan
from sim.profile import Profile
from sim.slots import rounded_dense_slots
from sim.units import GIB
from speed_rows.common import (
    BATCH,
    BUDGET_BYTES,
    MODEL,
    OUTPUT,
    PROMPT,
    REPEATS,
    Measured,
    dense_plan,
    dense_setting,
    random_tokens,
    read_weight_bytes,
    setting,
    token_bytes,
)
from speed_rows.recall import LLAMA_CASE, OPT_CASE, fetched_share, recall_plan, selections

SAMPLED_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveRow:
    """A ``sampled`` row runs 16 steps at each of five context lengths, and its decoding time is the integral over them.

    With ``turnover`` that share of each step's selection is new, whatever the weights would select.
    """

    plan: Callable[[], Plan]
    must: float | None = None
    aim: float | None = None
    sampled: bool = False
    repeats: int = REPEATS
    turnover: float | None = None
    model: str = MODEL

    def measure(self, decoder: Decoder) -> Measured:
        plan, start = self.plan(), time.perf_counter()
        wave = GraphWave(plan, decoder, [0] * plan.setting.concurrency)
        if self.turnover is not None:
            prescribe(wave, selections(plan, self.turnover, decoder.device))
        torch.cuda.synchronize()
        setup_s, prompts = time.perf_counter() - start, batches(plan, wave)
        run = run_sampled if self.sampled else run_whole
        runs = [run(wave, prompts) for _ in range(1 if self.sampled else self.repeats)]
        hbm_bytes, link_bytes = mean_step_bytes(plan, wave)
        return Measured(
            generated=plan.setting.workload.batch * plan.setting.workload.output_tokens,
            recompute_flop=mean_step_flop(plan),
            runs=runs,
            decode_steps=len(prompts) * plan.setting.workload.decode_steps,
            hbm_bytes=read_weight_bytes(decoder) + hbm_bytes,
            link_bytes=link_bytes,
            kv_bytes=wave.slots.kv_bytes,
            budget_bytes=plan.setting.kv_budget_bytes,
            setup_s=setup_s,
            sampled=self.sampled,
            notes={"waves": len(prompts), **recall_notes(plan, wave)},
        )


def resident_plan() -> Plan:
    return dense_plan(dense_setting(24 * GIB), PROMPT + OUTPUT)


def waves_plan() -> Plan:
    """So few sequences at once that all their KV fits; no more waves than that takes, and even ones."""
    one = dense_setting(BUDGET_BYTES, 1)
    fit = BUDGET_BYTES // (one.workload.cached_tokens * token_bytes(one))
    return dense_plan(dense_setting(BUDGET_BYTES, ceil(BATCH / ceil(BATCH / fit))), PROMPT + OUTPUT)


def lossless_plan() -> Plan:
    """What has no slot is read where it lies."""
    chosen = dense_setting(BUDGET_BYTES, fetch_by=Mechanism.GATHER_KERNEL)
    return dense_plan(chosen, BUDGET_BYTES // (BATCH * token_bytes(chosen)))


def lossless_int8_plan() -> Plan:
    chosen = dense_setting(BUDGET_BYTES, kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8))
    return dense_plan(chosen, rounded_dense_slots(chosen))


def copied_plan() -> Plan:
    """What has no slot comes by the copy engine, a layer ahead; the ring of fetched layers lies in the budget too."""
    chosen = dense_setting(BUDGET_BYTES)
    cached, slot = chosen.token_counts.cached, BATCH * token_bytes(chosen)
    staged = (chosen.prefetch_layers + 1) * slot // chosen.model.layers
    none = (0,) * len(cached)
    hbm = tuple(
        min(n, (BUDGET_BYTES - n * staged) // (slot - staged)) if n * slot > BUDGET_BYTES else n for n in cached
    )
    host = tuple(n - near for n, near in zip(cached, hbm, strict=True))
    return Plan(setting=chosen, homes=TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=none, copies=none))


def recompute_plan() -> Plan:
    """The planner's own for the whole batch at once, without loss: it keeps layer inputs on the host."""
    from planner import Request, solve

    chosen = dense_setting(BUDGET_BYTES)
    asked = Request(
        machine=chosen.machine,
        profile=Profile.nominal(chosen.machine),
        model=chosen.model,
        workload=chosen.workload,
        max_sparsity=0.0,
        kv_formats=(),
        concurrency=BATCH,
        kv_budget_bytes=BUDGET_BYTES,
    )
    return solve(asked).plan


def window_plan() -> Plan:
    """As many slots as the budget has; beyond them the newest tokens and the selected ones are in HBM."""
    chosen = setting(Attention(selector=Selector.SWA, sparsity=0.8), BUDGET_BYTES, placement=Placement.RESIDENT)
    counts, model = chosen.token_counts, chosen.model
    living = [cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True)]
    history = max(counts.local) * (1 + max(living)) * BATCH * model.layers * chosen.dtype.size_bytes
    slots, off, rows = (BUDGET_BYTES - history) // (BATCH * token_bytes(chosen)), 0, []
    for alive, local, selected in zip(living, counts.local, counts.selected, strict=True):
        if alive > slots:
            off = max(off, min(alive - local, selected + alive - slots))
        rows.append((alive - off, off, max(0, min(off, slots - (alive - off)))))
    hbm, host, copies = zip(*rows, strict=True)
    none = (0,) * len(rows)
    homes = TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=counts.dead, copies=copies)
    return Plan(setting=chosen, homes=homes)


ROWS = {
    "SWA, keep 20 %, resident": WaveRow(plan=window_plan, must=9000, aim=11000),
    "dense, all in HBM": WaveRow(plan=resident_plan, must=7500, aim=8500),
    "dense in the budget, waves, fp16": WaveRow(plan=waves_plan, must=2500, aim=3300),
    "lossless, rest fetched, fp16": WaveRow(plan=lossless_plan, sampled=True),
    "lossless, rest copied ahead, fp16": WaveRow(plan=copied_plan, sampled=True),
    "lossless, rest fetched, INT8": WaveRow(plan=lossless_int8_plan, must=1000, aim=1300, repeats=1),
    # 1.5 and 1.8 times what fetching reached, 380
    "lossless, rest recomputed, fp16": WaveRow(plan=recompute_plan, must=570, aim=684, sampled=True),
    "page digests, keep 10 %": WaveRow(plan=lambda: recall_plan(OPT_CASE), must=4000, aim=7000, turnover=0.28),
    "Llama-3.1-8B, 32k, pages, keep 5 %": WaveRow(
        plan=lambda: recall_plan(LLAMA_CASE), model=LLAMA_CASE.model, turnover=0.28, repeats=1
    ),
}


def batches(plan: Plan, wave: GraphWave) -> list[Prompts]:
    """The batch's prompts, a wave each; what the last wave lacks is filled up and not counted."""
    size, work = plan.setting.concurrency, plan.setting.workload
    tokens = random_tokens(plan.setting, ceil(work.batch / size), size, work.prompt_tokens)
    return [Prompts(tokens=rows, padding=wave.padding) for rows in tokens]


def prescribe(wave: GraphWave, bias: Tensor) -> None:
    """Let the pages' scores be as ``bias`` wants them."""
    assert isinstance(wave.slots, RecallSlots)
    wave.slots.bias = bias
    wave.capture()


def run_whole(wave: GraphWave, prompts: list[Prompts]) -> tuple[float, float]:
    """Seconds of it all, and of the prefills among them; after a prefill whose kernels are chosen and loaded."""
    wave.prefill(prompts[0])
    runs = [wave.run(part) for part in prompts]
    prefill_s = sum(run.prefill_s for run in runs)
    return prefill_s + sum(run.decode_s for run in runs), prefill_s


def run_sampled(wave: GraphWave, prompts: list[Prompts]) -> tuple[float, float]:
    """Steps at five lengths, the time between them by the trapezoidal rule. Slots hold what they held before."""
    assert len(prompts) == 1
    wave.prefill(prompts[0])
    prefill_s, rows = wave.prefill(prompts[0]), [1, 124, 248, 372, OUTPUT - SAMPLED_STEPS]
    times = [wave.decode(row, row + SAMPLED_STEPS) / SAMPLED_STEPS for row in rows]
    middles = [row + (SAMPLED_STEPS - 1) / 2 for row in rows]
    between = sum((b - a) * (s + t) / 2 for a, b, s, t in zip(middles, middles[1:], times, times[1:], strict=False))
    ends = (middles[0] - 0.5) * times[0] + (OUTPUT - 0.5 - middles[-1]) * times[-1]
    return prefill_s + between + ends, prefill_s


def mean_step_bytes(plan: Plan, wave: GraphWave) -> tuple[float, float]:
    """Keys and values attended to, read once, of HBM and over the link; digests, and inputs to be projected again."""
    counts, homes, chosen = plan.setting.token_counts, plan.homes, plan.setting
    attended = statistics.mean(near + far for near, far in zip(counts.local[1:], counts.selected[1:], strict=True))
    together = chosen.concurrency * token_bytes(chosen)
    if isinstance(wave.slots, QuantisedSlots):
        link_bytes = statistics.mean(fetched_bytes(chosen, wave.slots.near, cached) for cached in counts.cached[1:])
        return together * attended - link_bytes, link_bytes
    if isinstance(wave.slots, RecallSlots):
        fetched = float(wave.slots.fetched_tokens[:, 1:].sum()) / chosen.workload.decode_steps
        link_bytes = fetched * kv_layer_bytes(chosen.model, chosen.dtype, chosen.kv_format.gpu)
        digest = chosen.attention.state_bytes_per_token(chosen.model, chosen.dtype)
        digests = chosen.concurrency * chosen.model.layers * digest * statistics.mean(counts.cached[1:])
        return together * attended + digests, link_bytes
    if not chosen.attention.is_dense:
        return together * attended, 0.0
    fetched, recomputed = (statistics.mean(home[1:]) for home in (homes.host_kv, homes.activations))
    inputs = chosen.concurrency * chosen.model.layers * inputs_layer_bytes(chosen.model, chosen.dtype)
    return together * (attended - fetched - recomputed), together * fetched + inputs * recomputed


def mean_step_flop(plan: Plan) -> float:
    """Of projecting saved inputs to keys and values again."""
    model = plan.setting.model
    rows = plan.setting.concurrency * statistics.mean(plan.homes.activations[1:])
    return rows * model.layers * 2 * model.hidden * 2 * model.kv_dim


def recall_notes(plan: Plan, wave: GraphWave) -> dict[str, float]:
    """The share of the picks that came from the host."""
    if not isinstance(wave.slots, RecallSlots):
        return {}
    return {"fetched_share": fetched_share(plan, wave.slots.fetched_tokens)}
