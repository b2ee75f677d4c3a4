"""The fast path: the same recurrences as the engine, in closed form and without an event loop."""

from dataclasses import dataclass
from math import ceil

from sim.cost import CostModel
from sim.flows import Column, Flows, Occupancy, flows_of, home_columns, occupancy_of
from sim.footprint import layer_weight_bytes, resident_weight_bytes, workspace_bytes
from sim.layer import LayerTimes, layer_prices, layer_times
from sim.outcome import Outcome, Utilisation
from sim.pipeline import fill_seconds, step_seconds
from sim.plan import Plan, Setting
from sim.recording import RecordedSelection, replayed_flows


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Sequences that start together: how long each of their steps takes, [step], and before the first one."""

    sequences: int
    times: LayerTimes
    fill_s: float
    step_s: Column

    @property
    def seconds(self) -> float:
        return self.fill_s + float(self.step_s.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A plan's traffic, its pools and its distinct waves (a full one, and a smaller last one where there is a rest)."""

    plan: Plan
    flows: Flows
    occupancy: Occupancy
    waves: tuple[Wave, ...]

    @property
    def outcome(self) -> Outcome:
        return _outcome(self)


def forecast(plan: Plan, cost: CostModel, *, recording: RecordedSelection | None = None) -> Forecast:
    """Price every step of ``plan``: with the traffic to expect, or with that of a recorded selection."""
    homes = home_columns(plan.homes)
    flows = flows_of(plan, homes) if recording is None else replayed_flows(plan, recording)
    sizes = dict.fromkeys(plan.setting.wave_sizes)
    waves = tuple(_wave(plan.setting, flows, cost, size) for size in sizes)
    return Forecast(plan=plan, flows=flows, occupancy=occupancy_of(plan, homes, flows), waves=waves)


def static_hbm_bytes(setting: Setting) -> int:
    """Weights and workspace: what HBM holds before the first token is cached."""
    weights = resident_weight_bytes(setting.model, setting.dtype, setting.weight_format, setting.weights_on_host)
    return weights + workspace_bytes(setting.model, setting.dtype, setting.concurrency, setting.workload.prompt_tokens)


def static_host_bytes(setting: Setting) -> int:
    """Weights that are streamed."""
    return ceil(
        setting.weights_on_host
        * setting.model.layers
        * layer_weight_bytes(setting.model, setting.dtype, setting.weight_format)
    )


def _wave(setting: Setting, flows: Flows, cost: CostModel, sequences: int) -> Wave:
    times = layer_times(layer_prices(cost, setting, sequences), flows, cost)
    depth = setting.prefetch_layers
    return Wave(
        sequences=sequences,
        times=times,
        fill_s=fill_seconds(times, depth),
        step_s=step_seconds(times, setting.model.layers, depth),
    )


def _outcome(priced: Forecast) -> Outcome:
    setting = priced.plan.setting
    layers, work = setting.model.layers, setting.workload
    full, rest = divmod(work.batch, setting.concurrency)
    repeats = [full] * (full > 0) + [1] * (rest > 0)
    waves = list(zip(priced.waves, repeats, strict=True))
    makespan_s = sum(wave.seconds * count for wave, count in waves)
    busy_gpu_s = busy_h2d_s = busy_d2h_s = h2d_bytes = d2h_bytes = first_s = decode_s = start_s = 0.0
    for wave, count in waves:
        times, prefill_s = wave.times, wave.fill_s + float(wave.step_s[0])
        busy_gpu_s += count * _busy_gpu_s(times, layers)
        busy_h2d_s += count * layers * float((times.prefetch_s + times.correct_s).sum())
        busy_d2h_s += count * layers * float(times.write_s.sum())
        h2d_bytes += count * layers * float((times.prefetch_bytes + times.correct_bytes).sum())
        d2h_bytes += count * layers * float(times.write_bytes.sum())
        mean_start_s = start_s + wave.seconds * (count - 1) / 2
        first_s += wave.sequences * count * (mean_start_s + prefill_s)
        decode_s += wave.sequences * count * (wave.seconds - prefill_s)
        start_s += wave.seconds * count
    occupancy = priced.occupancy
    return Outcome(
        makespan_s=makespan_s,
        tokens_per_s=work.batch * work.output_tokens / makespan_s,
        ttft_s=first_s / work.batch,
        tpot_s=decode_s / work.batch / work.decode_steps if work.decode_steps else None,
        peak_hbm_bytes=static_hbm_bytes(setting) + ceil(setting.concurrency * float(occupancy.hbm.max())),
        peak_host_bytes=static_host_bytes(setting) + ceil(setting.concurrency * float(occupancy.host.max())),
        h2d_bytes=round(h2d_bytes),
        d2h_bytes=round(d2h_bytes),
        utilisation=Utilisation(gpu=busy_gpu_s / makespan_s, h2d=busy_h2d_s / makespan_s, d2h=busy_d2h_s / makespan_s),
    )


def _busy_gpu_s(times: LayerTimes, layers: int) -> float:
    layer_s = times.query_s + times.attend_s + times.rest_s
    return layers * float(layer_s.sum()) + times.head_s * len(layer_s)


def over_capacity(priced: Forecast) -> tuple[Column, Column]:
    """Bytes that each step needs beyond the KV budget, and beyond what the host has, [step]; negative where there is room."""
    setting, held = priced.plan.setting, priced.occupancy
    host_bytes = setting.machine.host.usable_bytes - static_host_bytes(setting)
    return setting.concurrency * held.hbm - setting.kv_budget_bytes, setting.concurrency * held.host - host_bytes
