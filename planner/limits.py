"""Where a plan's time goes: for each phase, how busy each resource is and which one it waits for."""

from dataclasses import dataclass

import numpy as np

from sim.breakdown import GPU_WORK, OUTPUT_LAYER
from sim.cost import CostModel
from sim.forecast import Forecast, Wave
from sim.layer import LayerTimes
from sim.plan import Admission, Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps of one full wave, how long they take, and the share of that time in which each resource is busy."""

    name: str
    first_step: int
    last_step: int
    seconds: float
    gpu: float
    h2d: float
    d2h: float
    limit: str

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


def stretches(priced: Forecast, cost: CostModel) -> tuple[Stretch, ...]:
    """The prefill, then each phase with its decode steps, of a full wave.

    Under continuous admission prefill and decoding share every step of the machine, so there is one stretch.
    """
    setting, wave = priced.plan.setting, priced.waves[0]
    last = len(wave.step_s) - 1
    if setting.admission is Admission.CONTINUOUS:
        return (_stretch(setting, cost, wave, "continuous", 0, last),)
    phases = priced.plan.phases
    ends = [phase.first_step - 1 for phase in phases[1:]] + [last]
    decode = (
        (phase.name.value, max(1, phase.first_step), end)
        for phase, end in zip(phases, ends, strict=True)
        if end >= max(1, phase.first_step)
    )
    return tuple(_stretch(setting, cost, wave, *span) for span in (("prefill", 0, 0), *decode))


def _stretch(setting: Setting, cost: CostModel, wave: Wave, name: str, first: int, last: int) -> Stretch:
    times, span = wave.times, slice(first, last + 1)
    fill_s = wave.fill_s if first == 0 else 0.0
    seconds = fill_s + float(wave.step_s[span].sum())
    layers = setting.model.layers
    gpu_s = layers * (times.query_s + times.attend_s + times.rest_s)[span] + times.head_s[span]
    busy_s = {
        "gpu": float(gpu_s.sum()),
        "h2d": layers * float((times.prefetch_s + times.correct_s)[span].sum()),
        "d2h": layers * float((times.in_line_s + times.write_s)[span].sum()),
        "cpu": layers * float(times.host_attention_s[span].sum()),
        "host": layers * float(times.launched_s[span].sum()),
    }
    slowest = max(busy_s, key=lambda resource: busy_s[resource])
    limit = {
        "h2d": "link, host to GPU",
        "d2h": "link, GPU to host",
        "cpu": "CPU attention",
        "host": "host, launching operations",
    }.get(slowest) or _gpu_limit(setting, cost, times, span, busy_s["gpu"], wave.sequences)
    gpu, h2d, d2h = (min(1.0, busy_s[resource] / seconds) for resource in ("gpu", "h2d", "d2h"))
    return Stretch(name=name, first_step=first, last_step=last, seconds=seconds, gpu=gpu, h2d=h2d, d2h=d2h, limit=limit)


def _gpu_limit(setting: Setting, cost: CostModel, times: LayerTimes, span: slice, gpu_s: float, sequences: int) -> str:
    """The kind of GPU work that takes most of its time, and what that work waits for."""
    layers, ops = setting.model.layers, times.ops
    work_s = {kind: layers * float(sum(ops[name][span].sum() for name in names)) for kind, names in GPU_WORK.items()}
    work_s[OUTPUT_LAYER] = float(times.head_s[span].sum())
    most = max(work_s, key=lambda kind: work_s[kind])
    share = f"{100 * work_s[most] / gpu_s:.0f} %"
    if most != "matrix products":
        return f"GPU: {most}, {share}"
    rows = setting.workload.prompt_tokens * sequences if span == slice(0, 1) else min(sequences, setting.concurrency)
    return f"GPU: {'weights' if _waits_for_weights(setting, cost, rows) else 'arithmetic'}, {share}"


def _waits_for_weights(setting: Setting, cost: CostModel, rows: int) -> bool:
    model = setting.model
    streaming, *_, arithmetic = cost.gemm(model.hidden, model.intermediate, setting.dtype, setting.weight_format).pieces
    return bool(np.greater_equal(streaming[0], arithmetic[0] + arithmetic[1] * rows))
