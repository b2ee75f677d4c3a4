"""The fast path: the same recurrences as the engine, in closed form and without an event loop."""

from dataclasses import dataclass
from math import ceil

from sim.cost import CostModel
from sim.counts import Column
from sim.flows import Flows
from sim.footprint import layer_weight_bytes, resident_weight_bytes, workspace_bytes
from sim.layer import LayerTimes
from sim.outcome import Outcome, Utilisation, served_seconds
from sim.pipeline import fill_seconds, step_seconds
from sim.plan import Plan, Setting
from sim.recording import RecordedSelection
from sim.waves import WaveLoad, wave_loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """A wave's load, what passes before its first step, and how long each step takes and when it has ended, [step]."""

    load: WaveLoad
    fill_s: float
    step_s: Column
    step_end_s: Column

    @property
    def sequences(self) -> int:
        return self.load.sequences

    @property
    def times(self) -> LayerTimes:
        return self.load.times

    @property
    def seconds(self) -> float:
        return float(self.step_end_s[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A plan's distinct waves: a full one, and a smaller last one where there is a rest. ``flows`` are of one sequence."""

    plan: Plan
    flows: Flows
    waves: tuple[Wave, ...]

    @property
    def outcome(self) -> Outcome:
        return _outcome(self)


def forecast(plan: Plan, cost: CostModel, *, recording: RecordedSelection | None = None) -> Forecast:
    """Price every step of ``plan``: with the traffic to expect, or with that of a recorded selection."""
    flows, loads = wave_loads(plan, cost, recording)
    return Forecast(plan=plan, flows=flows, waves=tuple(_priced(plan.setting, load) for load in loads))


def static_hbm_bytes(setting: Setting) -> int:
    """Weights and workspace: what HBM holds before the first token is cached."""
    weights = resident_weight_bytes(setting.model, setting.dtype, setting.weight_format, setting.weights_on_host)
    return weights + setting_workspace_bytes(setting)


def setting_workspace_bytes(setting: Setting) -> int:
    """Activations of the widest moment."""
    work, on_host = setting.workload, setting.weights_on_host
    return workspace_bytes(setting.model, setting.dtype, setting.concurrency, work.prompt_tokens, on_host)


def static_host_bytes(setting: Setting) -> int:
    """Weights that are streamed."""
    return ceil(
        setting.weights_on_host
        * setting.model.layers
        * layer_weight_bytes(setting.model, setting.dtype, setting.weight_format)
    )


def _priced(setting: Setting, load: WaveLoad) -> Wave:
    fill_s = fill_seconds(load.times, setting.prefetch_layers)
    step_s = step_seconds(load.times, setting.model.layers, setting.prefetch_layers)
    return Wave(load=load, fill_s=fill_s, step_s=step_s, step_end_s=fill_s + step_s.cumsum())


def _outcome(priced: Forecast) -> Outcome:
    setting = priced.plan.setting
    layers, work = setting.model.layers, setting.workload
    waves = [(wave, setting.wave_sizes.count(wave.load.sequences)) for wave in priced.waves]
    makespan_s = sum(wave.seconds * count for wave, count in waves)
    busy_gpu_s = busy_h2d_s = busy_d2h_s = h2d_bytes = d2h_bytes = first_s = decode_s = start_s = 0.0
    for wave, count in waves:
        load, times = wave.load, wave.load.times
        busy_gpu_s += count * _busy_gpu_s(times, layers)
        busy_h2d_s += count * layers * float((times.prefetch_s + times.correct_s).sum())
        busy_d2h_s += count * layers * float((times.in_line_s + times.write_s).sum())
        h2d_bytes += count * layers * float((times.prefetch_bytes + times.correct_bytes).sum())
        d2h_bytes += count * layers * float(times.write_bytes.sum())
        first, decode = served_seconds(load.served, wave.step_end_s)
        first_s += count * (load.sequences * (start_s + wave.seconds * (count - 1) / 2) + first)
        decode_s += count * decode
        start_s += wave.seconds * count
    return Outcome(
        makespan_s=makespan_s,
        tokens_per_s=work.batch * work.output_tokens / makespan_s,
        ttft_s=first_s / work.batch,
        tpot_s=decode_s / work.batch / work.decode_steps if work.decode_steps else None,
        peak_hbm_bytes=static_hbm_bytes(setting) + ceil(max(float(wave.load.held.hbm.max()) for wave in priced.waves)),
        peak_host_bytes=static_host_bytes(setting)
        + ceil(max(float(wave.load.held.host.max()) for wave in priced.waves)),
        h2d_bytes=round(h2d_bytes),
        d2h_bytes=round(d2h_bytes),
        utilisation=Utilisation(gpu=busy_gpu_s / makespan_s, h2d=busy_h2d_s / makespan_s, d2h=busy_d2h_s / makespan_s),
    )


def _busy_gpu_s(times: LayerTimes, layers: int) -> float:
    layer_s = times.query_s + times.attend_s + times.rest_s
    return layers * float(layer_s.sum()) + float(times.head_s.sum())


def over_capacity(priced: Forecast) -> tuple[Column, Column]:
    """Bytes that each step of the full wave needs beyond the KV budget, and beyond what the host has, [step]."""
    setting, held = priced.plan.setting, priced.waves[0].load.held
    host_bytes = setting.machine.host.usable_bytes - static_host_bytes(setting)
    return held.hbm - setting.kv_budget_bytes, held.host - host_bytes
