"""Where the seconds of each step go: the GPU's by kind of work, then what keeps it waiting."""

from dataclasses import replace

import numpy as np

from sim.counts import Column
from sim.forecast import Wave
from sim.pipeline import step_seconds
from sim.plan import Setting

GPU_WORK = {
    "matrix products": ("qkv", "out", "mlp"),
    "attention": ("attention", "gather"),
    "selection": ("score", "select"),
    "quantisation": ("convert",),
    "recomputation": ("reproject", "forward"),
    "unfused passes": ("norms",),
    "kernel launches": ("launch",),
    "SMs lent to transfers": ("gather_sms",),
}
OUTPUT_LAYER = "output layer"
CPU_WAIT, FETCH_WAIT, WRITE_WAIT = "waiting for the CPU", "waiting for fetch", "waiting for write-back"
LAUNCH_WAIT = "waiting for launches"


def breakdown(setting: Setting, wave: Wave) -> dict[str, Column]:
    """Seconds of each step by what they are spent on, [step]; they add up to ``wave.step_s``."""
    layers, times = setting.model.layers, wave.times
    ops = times.ops
    spent = {kind: layers * np.sum([ops[name] for name in names], axis=0) for kind, names in GPU_WORK.items()}
    spent[OUTPUT_LAYER] = times.head_s
    computed_s = layers * times.layer_s + times.head_s
    on_gpu_s = times.query_s + times.attend_s + times.rest_s
    spent[CPU_WAIT] = layers * (times.layer_s - on_gpu_s - times.in_line_s)
    none = np.zeros_like(times.write_s)
    fetched_s, written_s = (
        step_seconds(replace(times, launched_s=none, write_s=write_s), layers, setting.prefetch_layers)
        for write_s in (none, times.write_s)
    )
    spent[FETCH_WAIT] = fetched_s - computed_s
    spent[WRITE_WAIT] = written_s - fetched_s + layers * times.in_line_s
    spent[LAUNCH_WAIT] = wave.step_s - written_s
    return {kind: _without_dust(seconds, wave.step_s) for kind, seconds in spent.items()}


def totals(setting: Setting, wave: Wave) -> dict[str, float]:
    """Seconds of the whole wave by what they are spent on; what passes before the first step is a wait for its fetch."""
    spent = {kind: float(seconds.sum()) for kind, seconds in breakdown(setting, wave).items()}
    spent[FETCH_WAIT] += wave.fill_s
    return spent


def _without_dust(seconds: Column, step_s: Column) -> Column:
    """Differences of equal sums leave some 1e-18 s; none is time."""
    kept: Column = np.where(seconds > 1e-9 * step_s, seconds, 0.0)
    return kept
