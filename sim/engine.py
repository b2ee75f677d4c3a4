"""Runs a plan event by event: layer by layer, prefill then decode, wave after wave, over a GPU stream and two copy engines.

It times single operations of a layer and knows no step's price; how they overlap is what it finds out. The contract it
keeps is written in ``sim.pipeline``, which states in closed form what should come out.
"""

from dataclasses import fields

import numpy as np
from simpy import Environment

from sim.cost import CostModel
from sim.counts import Column
from sim.forecast import static_hbm_bytes, static_host_bytes
from sim.layer import ATTEND_OPS, QUERY_OPS, REST_OPS, LayerTimes
from sim.machine import CapacityExceeded, Pool, Process, Progress, Stream
from sim.pipeline import ring_depth
from sim.plan import Plan
from sim.recording import RecordedSelection
from sim.trace import Level, Resource, Span, Tier, Trace, WaveTrace
from sim.waves import WaveLoad, wave_loads

__all__ = ["CapacityExceeded", "simulate"]


def simulate(plan: Plan, cost: CostModel, *, recording: RecordedSelection | None = None, ops: bool = False) -> Trace:
    """Run ``plan`` and return what happened: with the traffic to expect, or with that of a recorded selection.

    ``ops`` records each GPU operation instead of each layer.

    Waves of the same size do the same, so each distinct one runs once and is counted as often as it occurs.
    Raises CapacityExceeded at the first step that does not fit.
    """
    setting = plan.setting
    _, loads = wave_loads(plan, cost, recording)
    waves = [_WaveRun(plan, load.times, ops).trace(load, setting.wave_sizes.count(load.sequences)) for load in loads]
    return Trace(
        source=f"simulated with profile {cost.profile.name}",
        output_tokens=setting.workload.output_tokens,
        static_hbm_bytes=static_hbm_bytes(setting),
        static_host_bytes=static_host_bytes(setting),
        waves=tuple(waves),
    )


class _WaveRun:
    """One wave on a fresh machine. Columns become lists: plain numbers are what an event loop is quick with."""

    def __init__(self, plan: Plan, times: LayerTimes, ops: bool) -> None:
        self.setting = plan.setting
        self.layers = plan.setting.model.layers
        self.depth = ring_depth(times, plan.setting.prefetch_layers)
        self.times = {name: value.tolist() for name, value in _columns(times).items()}
        self.ops = {name: seconds.tolist() for name, seconds in times.ops.items()} if ops else {}
        self.by_op = ops
        self.recalls = times.recalls
        self.env = Environment()
        self.spans: list[Span] = []
        self.levels: list[Level] = []
        self.gpu, self.h2d, self.d2h, self.cpu, self.launcher = (
            Stream(self.env, which, self.spans) for which in Resource
        )

    def trace(self, load: WaveLoad, repeats: int) -> WaveTrace:
        step_end_s: list[float] = []
        held = (load.held.hbm.tolist(), load.held.host.tolist())
        self.env.run(self.env.process(self._steps(step_end_s, *held)))
        return WaveTrace(
            sequences=load.sequences,
            repeats=repeats,
            served=load.served,
            spans=tuple(self.spans),
            levels=tuple(self.levels),
            step_end_s=tuple(step_end_s),
        )

    def _steps(self, step_end_s: list[float], hbm_bytes: list[float], host_bytes: list[float]) -> Process:
        machine = self.setting.machine
        hbm = Pool(self.env, Tier.HBM, self.setting.kv_budget_bytes, self.levels)
        host = Pool(self.env, Tier.HOST, machine.host.usable_bytes - static_host_bytes(self.setting), self.levels)
        for layer in range(self.depth):
            yield from self._prefetch(0, layer)
        for step, (in_hbm, on_host) in enumerate(zip(hbm_bytes, host_bytes, strict=True)):
            hbm.hold(step, in_hbm)
            host.hold(step, on_host)
            yield self.env.all_of([self.env.process(driver) for driver in self._drivers(step)])
            step_end_s.append(self.env.now)

    def _drivers(self, step: int) -> list[Process]:
        """A process for each stream that has something to do in ``step``, sharing its progress marks."""
        asked, ended = Progress(self.env), Progress(self.env)
        arrived = Progress(self.env, reached=0 if self.recalls else self.depth)
        drivers = [self._gpu_step(step, asked, arrived, ended)]
        if self.recalls:
            drivers.append(self._recall_step(step, asked, arrived))
        elif self.times["prefetch_s"][step] or self._following(step):
            drivers.append(self._ring_step(step, arrived, ended))
        else:
            arrived.reached = self.layers
        if self.times["write_s"][step]:
            drivers.append(self._write_step(step, ended))
        if self.times["launched_s"][step]:
            drivers.append(self.launcher.run("launch", step, None, self.layers * self.times["launched_s"][step]))
        return drivers

    def _gpu_step(self, step: int, asked: Progress, arrived: Progress, ended: Progress) -> Process:
        for layer in range(self.layers):
            yield from self._gpu_ops("query", QUERY_OPS, step, layer)
            asked.advance()
            yield from arrived.until(layer + 1)
            if self.times["host_attention_s"][step]:
                on_cpu = self.env.process(self.cpu.run("attention", step, layer, self.times["host_attention_s"][step]))
                yield from self._gpu_ops("attend", ATTEND_OPS, step, layer)
                yield on_cpu
            else:
                yield from self._gpu_ops("attend", ATTEND_OPS, step, layer)
            yield from self._gpu_ops("rest", REST_OPS, step, layer)
            if self.times["in_line_s"][step]:
                yield from self._write(step, layer, self.times["in_line_s"][step])
            ended.advance()
        yield from self.gpu.run("head", step, None, self.times["head_s"][step])

    def _gpu_ops(self, segment: str, names: tuple[str, ...], step: int, layer: int) -> Process:
        if not self.by_op:
            yield from self.gpu.run(segment, step, layer, self.times[f"{segment}_s"][step])
            return
        for name in names:
            if self.ops[name][step]:
                yield from self.gpu.run(name, step, layer, self.ops[name][step])

    def _ring_step(self, step: int, arrived: Progress, ended: Progress) -> Process:
        """Fetch for the layer ``depth`` ahead as soon as the layer before the current one has left its buffer."""
        for job in range(self.layers):
            yield from ended.until(job)
            ahead = job + self.depth
            if ahead < self.layers:
                yield from self._prefetch(step, ahead)
                arrived.advance()
            else:
                yield from self._prefetch(step + 1, ahead - self.layers)

    def _recall_step(self, step: int, asked: Progress, arrived: Progress) -> Process:
        """Correct each layer's guess once its query is known, then guess the next layer's."""
        for layer in range(self.layers):
            yield from asked.until(layer + 1)
            if self.times["correct_s"][step]:
                yield from self.h2d.run(
                    "correct", step, layer, self.times["correct_s"][step], self.times["correct_bytes"][step]
                )
            arrived.advance()
            following = (step, layer + 1) if layer + 1 < self.layers else (step + 1, 0)
            yield from self._prefetch(*following)

    def _write_step(self, step: int, ended: Progress) -> Process:
        for layer in range(self.layers):
            yield from ended.until(layer + 1)
            yield from self._write(step, layer, self.times["write_s"][step])

    def _write(self, step: int, layer: int, seconds: float) -> Process:
        yield from self.d2h.run("write", step, layer, seconds, self.times["write_bytes"][step])

    def _prefetch(self, step: int, layer: int) -> Process:
        seconds = self.times["prefetch_s"][step] if step < len(self.times["prefetch_s"]) else 0.0
        if seconds:
            yield from self.h2d.run("fetch", step, layer, seconds, self.times["prefetch_bytes"][step])

    def _following(self, step: int) -> float:
        return self.times["prefetch_s"][step + 1] if step + 1 < len(self.times["prefetch_s"]) else 0.0


def _columns(times: LayerTimes) -> dict[str, Column]:
    members = {member.name: getattr(times, member.name) for member in fields(times)}
    return {name: value for name, value in members.items() if isinstance(value, np.ndarray)}
