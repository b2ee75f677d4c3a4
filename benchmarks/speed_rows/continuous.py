"""Rows that admit sequences page by page (``PagedWave``), as vLLM does, with KV in 16 and in 8 bit."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from runtime.graph.paged import Shape
from runtime.graph.paged_run import PagedWave
from runtime.models import Decoder
from runtime.wave import Prompts
from sim.admission import schedule
from sim.kv import KvFormat, KvFormats
from sim.plan import Admission, Plan, Preemption
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
    token_bytes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousRow:
    """At most ``concurrency`` at once, the best number by prediction; ``lanes`` may be more: then some are always idle."""

    kv_format: KvFormat
    concurrency: int
    must: float | None
    aim: float | None
    lanes: int | None = None
    shape: Shape | None = None
    model: str = MODEL

    @property
    def plan(self) -> Plan:
        formats, admission = KvFormats(gpu=self.kv_format), Admission.CONTINUOUS
        options = {"kv_format": formats, "admission": admission, "preemption": Preemption.SWAP}
        chosen = dense_setting(BUDGET_BYTES, self.concurrency, **options)
        return dense_plan(chosen, PROMPT + OUTPUT)

    def measure(self, decoder: Decoder) -> Measured:
        """Whole runs; the first of all also chooses and loads the prefill's kernels."""
        plan, start = self.plan, time.perf_counter()
        wave = PagedWave(plan, decoder, lanes=self.lanes, shape=self.shape)
        torch.cuda.synchronize()
        setup_s, padding = time.perf_counter() - start, torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        prompts = Prompts(tokens=random_tokens(plan.setting, BATCH, PROMPT), padding=padding)
        runs = [wave.run(prompts) for _ in range(REPEATS)]
        planned = schedule(wave.rules)
        decoding = planned.decoding(np.ones(OUTPUT))
        cached = planned.decoding(np.array(plan.setting.token_counts.cached, dtype=np.float64))
        steps = int((decoding > 0).sum())
        swapped_bytes = float(planned.swapped_out.sum() + planned.swapped_in.sum())
        return Measured(
            runs=[(run.seconds, run.prefill_s) for run in runs],
            decode_steps=steps,
            hbm_bytes=read_weight_bytes(decoder) + float(cached.sum()) * token_bytes(plan.setting) / steps,
            link_bytes=0.0,
            waited_link_bytes=swapped_bytes / steps,
            kv_bytes=wave.slots.kv_bytes,
            budget_bytes=BUDGET_BYTES,
            setup_s=setup_s,
            sampled=False,
            notes={
                "lanes": wave.step.attended.shape[0],
                "mean_running": float(decoding.sum()) / steps,
                "prefilled_tokens": int(planned.prefilled_tokens.sum()),
                "swapped_gb": swapped_bytes / 1e9,
                "host_gib": wave.rules.host_bytes / GIB,
            },
        )


ROWS = {
    "dense in the budget, continuous, fp16": ContinuousRow(
        kv_format=KvFormat.NATIVE, concurrency=28, must=2500, aim=3300
    ),
    "dense in the budget, continuous, INT8": ContinuousRow(
        kv_format=KvFormat.INT8, concurrency=40, must=5000, aim=6500
    ),
    "dense in the budget, continuous, FP8": ContinuousRow(kv_format=KvFormat.FP8, concurrency=64, must=5000, aim=6500),
}
