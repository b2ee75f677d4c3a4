"""Records a wave into the simulator's ``WaveTrace``: when steps (and layers) ended, what moved, what each tier held."""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from torch import Tensor

from runtime.clock import Clock
from runtime.ledger import Ledger
from runtime.masks import listed
from runtime.tally import Tally
from sim.attention import TokenCounts
from sim.flows import Flows, flows_of, home_columns, homed_on_host, link_token_bytes
from sim.footprint import layer_weight_bytes
from sim.kv import inputs_layer_bytes
from sim.occupancy import Occupancy, occupancy_of
from sim.outcome import Served
from sim.plan import Plan, Recompute
from sim.trace import Level, Resource, Span, Tier, WaveTrace

LanePicks: TypeAlias = list[list[list[tuple[int, ...]]]]  # [decode step, layer, sequence]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What to record besides steps: a span for each layer, the picked tokens (to be replayed), logits, attention kept.

    For the last one every living token's key is read at every step. Without ``selections`` their counts, turnover and
    age are not taken, which spares a dozen small kernels a layer.
    """

    selections: bool = True
    layers: bool = False
    picks: bool = False
    logits: bool = False
    mass: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionStats:
    """Of one decode step, means over layers and sequences; ``age`` runs from 0, the newest older token, to 1, the first.

    ``mass`` is the share of attention to all living tokens that falls on the attended ones (saved inputs not counted),
    None unless it was asked for.
    """

    picked: float
    turnover: float
    age: float
    mass: float | None


class Recorder:
    """One wave's. Counts stay on the device until the wave has ended; ``captured`` steps may keep others in HBM."""

    def __init__(self, plan: Plan, clock: Clock, record: Record, *, captured: bool = False) -> None:
        self.plan, self.clock, self.record, self.captured = plan, clock, record, captured
        self.marks: list[tuple[int, int | None, int, int]] = []  # step, layer, first mark, last mark
        self.tally: Tally | None = None
        self.logits: list[Tensor] = []
        self._picks = defaultdict[int, list[tuple[Tensor, Tensor]]](list)  # by row
        self._before: dict[int, Tensor] = {}
        self._step_mark = self._layer_mark = 0
        self._streamed = Counter[int]()  # layers whose weights were streamed for each step

    def begin_step(self, row: int) -> None:  # noqa: ARG002
        self._step_mark = self.clock.mark()

    def streamed(self, row: int, layers: int = 1) -> None:
        """The weights of so many layers were copied for ``row``."""
        self._streamed[row] += layers

    def begin_layer(self, row: int, layer: int) -> None:  # noqa: ARG002
        if self.record.layers:
            self._layer_mark = self.clock.mark()

    def end_layer(self, row: int, layer: int) -> None:
        if self.record.layers:
            self.marks.append((row, layer, self._layer_mark, self.clock.mark()))

    def end_step(self, row: int, logits: Tensor) -> None:
        self.marks.append((row, None, self._step_mark, self.clock.mark()))
        if self.record.logits:
            self.logits.append(logits)

    def selected(self, row: int, layer: int, ledger: Ledger, counts: TokenCounts) -> None:
        """Note what ``row`` picked of the older tokens."""
        wanted = self.record.selections or self.record.picks
        if self.plan.setting.attention.is_dense or self.tally is None or not wanted:
            return
        older = max(1, counts.cached[row] - counts.local[row])
        picks = ledger.wanted & (ledger.position < older)
        new = picks & ~self._before[layer] if layer in self._before else picks
        ages = (older - 1 - ledger.position) / max(1, older - 1)
        self.tally.add(row, layer, picked=picks, new=new, age=ages * picks)
        self._before[layer] = picks
        if self.record.picks:
            self._picks[row].append(listed(picks, counts.selected[row]))

    def picks(self) -> LanePicks:
        """The picked tokens as numbers, of the decode steps that have run; none under dense attention."""
        return [[_numbers(*layer) for layer in step] for step in self._picks.values()]

    def stats(self, lanes: int) -> tuple[SelectionStats, ...]:
        """Of every decode step; none where they were not taken."""
        if not self.record.selections:
            return ()
        assert self.tally is not None
        sums = (self.tally.of(kind).sum(1).tolist() for kind in ("picked", "new", "age", "mass"))
        every = lanes * self.plan.setting.model.layers
        return tuple(
            SelectionStats(
                picked=picked / every,
                turnover=new / max(picked, 1),
                age=age / max(picked, 1),
                mass=mass / every if self.record.mass else None,
            )
            for picked, new, age, mass in list(zip(*sums, strict=True))[1:]
        )

    def flows(self, lanes: int) -> Flows:
        """What moved, as the simulator counts it: means over layers and sequences."""
        assert self.tally is not None
        setting, lanes_in_all = self.plan.setting, lanes * self.plan.setting.model.layers
        fetched, reprojected, written = (
            np.asarray(self.tally.of(kind).sum(1).tolist()) / lanes_in_all
            for kind in ("fetched", "reprojected", "written")
        )
        none, homes = np.zeros_like(fetched), home_columns(self.plan.homes)
        from_host = setting.recompute is Recompute.ACTIVATIONS_HOST
        expected = flows_of(self.plan, homes)
        return replace(
            expected,
            fetched_kv=none if setting.host_attention else fetched,
            host_attended=fetched if setting.host_attention else none,
            fetched_inputs=reprojected if from_host else none,
            reprojected=reprojected,
            written_kv=written,
            on_host=expected.on_host if self.captured else homed_on_host(setting, homes),
        )

    def occupancy(self, lanes: int) -> Occupancy:
        """Bytes of one sequence's KV in each tier during each step."""
        return occupancy_of(self.plan, home_columns(self.plan.homes), self.flows(lanes))

    def trace(self, sequences: int, lanes: int) -> WaveTrace:
        """The wave. Where layers were not recorded, transfers have bytes and no duration of their own."""
        seconds = self.clock.seconds()
        start_s = seconds[self.marks[0][2]] if not self.record.layers else seconds[min(mark[2] for mark in self.marks)]
        ends = [seconds[last] - start_s for _, layer, _, last in self.marks if layer is None]
        spans, flows = [], self.flows(lanes)
        for step, layer, first, last in self.marks:
            if layer is not None or not self.record.layers:
                name = "layer" if layer is not None else "step" if step else "prefill"
                spans.append(Span(Resource.GPU, name, step, layer, seconds[first] - start_s, seconds[last] - start_s))
        for step, end_s in enumerate(ends):
            spans += self._transfers(step, end_s, sequences, flows)
        return WaveTrace(
            sequences=sequences,
            repeats=1,
            served=(Served(sequences=sequences, first_step=0, last_step=len(ends) - 1),),
            spans=tuple(spans),
            levels=self._levels(ends, sequences, lanes),
            step_end_s=tuple(ends),
        )

    def _transfers(self, step: int, end_s: float, sequences: int, flows: Flows) -> list[Span]:
        model, dtype = self.plan.setting.model, self.plan.setting.dtype
        kv, inputs = link_token_bytes(self.plan.setting), inputs_layer_bytes(model, dtype)
        scale = sequences * model.layers
        setting = self.plan.setting
        weights = setting.weights_on_host * layer_weight_bytes(model, dtype, setting.weight_format)
        fetched = scale * (kv * flows.fetched_kv[step] + inputs * flows.fetched_inputs[step])
        fetched += weights * self._streamed[step]
        written = scale * (kv * flows.written_kv[step] + inputs * flows.written_inputs[step])
        both = ((Resource.H2D, "fetch", fetched), (Resource.D2H, "write", written))
        return [Span(which, name, step, None, end_s, end_s, size) for which, name, size in both if size]

    def _levels(self, ends: list[float], sequences: int, lanes: int) -> tuple[Level, ...]:
        occupancy = self.occupancy(lanes)
        starts = [0.0, *ends[:-1]]
        return tuple(
            Level(tier, step, start_s, float(sequences * held[step]))
            for step, start_s in enumerate(starts)
            for tier, held in ((Tier.HBM, occupancy.hbm), (Tier.HOST, occupancy.host))
        )


def _numbers(at: Tensor, valid: Tensor) -> list[tuple[int, ...]]:
    """Each lane's positions that count."""
    return [
        tuple(token for token, counts in zip(row, flags, strict=True) if counts)
        for row, flags in zip(at.tolist(), valid.tolist(), strict=True)
    ]
