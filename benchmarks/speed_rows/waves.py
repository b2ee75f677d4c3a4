"""Rows that run waves by ``GraphWave``: sparse window, dense, and dense with what HBM lacks read from the host."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from runtime.graph.quantised_dense import QuantisedSlots, fetched_bytes, most_slots
from runtime.graph.run import GraphWave
from runtime.models import Decoder
from runtime.wave import Prompts
from sim.attention import Attention, Selector
from sim.homes import TokenHomes
from sim.kv import KvFormat, KvFormats
from sim.plan import Placement, Plan
from sim.units import GIB
from speed_rows.common import (
    BATCH,
    BUDGET_BYTES,
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

SAMPLED_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveRow:
    """A ``sampled`` row runs 16 steps at each of five context lengths, and its decoding time is the integral over them."""

    plan: Callable[[], Plan]
    must: float | None = None
    aim: float | None = None
    sampled: bool = False

    def measure(self, decoder: Decoder) -> Measured:
        plan, start = self.plan(), time.perf_counter()
        wave = GraphWave(plan, decoder, [0] * plan.setting.concurrency)
        torch.cuda.synchronize()
        setup_s, prompts = time.perf_counter() - start, batches(plan, wave)
        run = run_sampled if self.sampled else run_whole
        hbm_bytes, link_bytes = mean_step_bytes(plan, wave)
        return Measured(
            runs=[run(wave, prompts) for _ in range(1 if self.sampled else REPEATS)],
            decode_steps=len(prompts) * (OUTPUT - 1),
            hbm_bytes=read_weight_bytes(decoder) + hbm_bytes,
            link_bytes=link_bytes,
            kv_bytes=wave.slots.kv_bytes,
            budget_bytes=plan.setting.kv_budget_bytes,
            setup_s=setup_s,
            sampled=self.sampled,
            notes={"waves": len(prompts)},
        )


def resident_plan() -> Plan:
    return dense_plan(dense_setting(24 * GIB), PROMPT + OUTPUT)


def waves_plan() -> Plan:
    """So few sequences at once that all their KV fits; no more waves than that takes, and even ones."""
    one = dense_setting(BUDGET_BYTES, 1)
    fit = BUDGET_BYTES // (one.workload.cached_tokens * token_bytes(one))
    return dense_plan(dense_setting(BUDGET_BYTES, ceil(BATCH / ceil(BATCH / fit))), PROMPT + OUTPUT)


def lossless_plan() -> Plan:
    chosen = dense_setting(BUDGET_BYTES)
    return dense_plan(chosen, BUDGET_BYTES // (BATCH * token_bytes(chosen)))


def lossless_int8_plan() -> Plan:
    chosen = dense_setting(BUDGET_BYTES, kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8))
    return dense_plan(chosen, most_slots(chosen))


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
    "lossless, rest fetched, INT8": WaveRow(plan=lossless_int8_plan, must=1000, aim=1300),
}


def batches(plan: Plan, wave: GraphWave) -> list[Prompts]:
    """The batch's prompts, a wave each; what the last wave lacks is filled up and not counted."""
    size = plan.setting.concurrency
    tokens = random_tokens(plan.setting, ceil(BATCH / size), size, PROMPT)
    return [Prompts(tokens=rows, padding=wave.padding) for rows in tokens]


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
    """Keys and values attended to, read once, of HBM and over the link."""
    counts, homes, chosen = plan.setting.token_counts, plan.homes, plan.setting
    attended = statistics.mean(near + far for near, far in zip(counts.local[1:], counts.selected[1:], strict=True))
    fetched = statistics.mean(homes.host_kv[1:]) if chosen.attention.is_dense else 0.0
    together = chosen.concurrency * token_bytes(chosen)
    if isinstance(wave.slots, QuantisedSlots):
        link_bytes = statistics.mean(fetched_bytes(chosen, wave.slots.near, cached) for cached in counts.cached[1:])
        return together * attended - link_bytes, link_bytes
    return together * (attended - fetched), together * fetched
