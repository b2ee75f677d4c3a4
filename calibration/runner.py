"""Runs plans with the runtime: random weights, drawn once for each shape, and the trace of what happened."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from runtime.execute import DTYPES, execute
from runtime.graph.execute import Captures
from runtime.graph.recall import RecallSlots
from runtime.graph.run import GraphWave
from runtime.graph.window import WindowSlots
from runtime.models import Decoder, as_planned, random_decoder
from runtime.models.config import config_from_spec
from runtime.options import Options
from runtime.recorder import LanePicks, Record, SelectionStats
from runtime.wave import Prompts
from sim.plan import Plan, Setting
from sim.recipe import shortened
from sim.recording import Flags
from sim.spec import DType, ModelSpec, WeightFormat
from sim.trace import Trace

_PACES, _LAUNCHES = 5, 50

Slots = TypeVar("Slots", WindowSlots, RecallSlots)
Weights: TypeAlias = tuple[ModelSpec, DType, WeightFormat, float]  # the last: the share on the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run. ``peak_bytes`` is the most that the device's allocator gave out, None on a CPU; ``launch_s`` what the host took
    to launch a kernel just before and after, on average, 0 on a CPU or where it was not looked at.
    """

    trace: Trace
    peak_bytes: int | None
    picks: LanePicks | None
    stats: tuple[tuple[SelectionStats, ...], ...]
    launch_s: float = 0.0


@dataclass(slots=True)
class Runner:
    """Keeps the last model's weights, and what the last plan captured: its first run takes it, and the most memory."""

    device: torch.device
    _held: Weights | None = None
    _decoder: Decoder | None = field(default=None, repr=False)
    _plan: Plan | None = field(default=None, repr=False)
    _captures: Captures = field(default_factory=Captures, repr=False)

    def warm(self, plan: Plan) -> None:
        """Load, compile and choose what ``plan`` needs, by its first steps."""
        self.run(shortened(plan, 3))

    def run(self, plan: Plan, *, record: Record | None = None) -> Ran:
        """Random prompts of the full length through ``plan``."""
        if self._plan != plan:
            self._begin(plan)
        decoder, prompts = self.decoder(plan.setting), _prompts(plan).tolist()
        options = Options(stop=False, record=record or Record(selections=False))
        self._reset_peak()
        with _uncollected():
            before_s = launch_s(self.device)
            ran = execute(plan, decoder, prompts, options=options, captured=self._captures)
            after_s = launch_s(self.device)
        return Ran(
            trace=ran.trace,
            peak_bytes=self._peak_bytes(),
            picks=ran.picks,
            stats=ran.stats,
            launch_s=(before_s + after_s) / 2,
        )

    def window_picks(self, plan: Plan) -> LanePicks:
        """Of one wave of captured steps under sparse window attention: read off the device before each."""
        counts, picks = plan.setting.token_counts, list[list[list[tuple[int, ...]]]]()

        def look(row: int, slots: WindowSlots) -> None:
            older = counts.cached[row] - counts.local[row]
            attended = slots.picks()
            picks.append([[tuple(at for at in lane if at < older) for lane in layer] for layer in attended])

        self._watch(plan, WindowSlots, look)
        return picks

    def page_picks(self, plan: Plan) -> list[Flags]:
        """Of one wave of captured steps under page digests: whether a lane picks a token, [layer and lane, token] of each step."""
        picks = list[Tensor]()

        def look(row: int, slots: RecallSlots) -> None:
            if row > 1:  # what the step before it picked
                picks.append(slots.chosen(row - 1))

        slots = self._watch(plan, RecallSlots, look)
        picks.append(slots.chosen(plan.homes.steps - 1))
        return [picked.flatten(0, 1).cpu().numpy() for picked in picks]

    def _watch(self, plan: Plan, kind: type[Slots], look: Callable[[int, Slots], None]) -> Slots:
        """One wave of captured steps; ``look`` is given the row and the slots before each, which are returned."""
        self._begin(plan)
        wave = GraphWave(plan, self.decoder(plan.setting), [0] * plan.setting.workload.batch)
        slots = wave.slots
        assert isinstance(slots, kind)
        padding = torch.zeros(plan.setting.workload.batch, dtype=torch.int64, device=self.device)
        prompts = Prompts(tokens=_prompts(plan).to(self.device), padding=padding, whole=True)
        wave.run(prompts, lambda row: look(row, slots))
        return slots

    def decoder(self, setting: Setting) -> Decoder:
        """With its weights stored as ``setting`` says, and no other copy of them: it would count as the plan's memory."""
        wanted = (setting.model, setting.dtype, setting.weight_format, setting.weights_on_host)
        if self._held != wanted or self._decoder is None:
            self._decoder = None
            self._forget()
            config = replace(config_from_spec(setting.model), stop_tokens=())
            drawn = random_decoder(config, device=self.device, dtype=DTYPES[setting.dtype])
            self._decoder, self._held = as_planned(drawn, setting), wanted
        return self._decoder

    def _begin(self, plan: Plan) -> None:
        """Let go of the last plan's graphs, and of what libraries keep for streams that ran before: a run's peak is its own."""
        self._plan, self._captures = plan, Captures()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()  # public only as what empties every cache

    def _forget(self) -> None:
        """Give memory back before other weights take it. What is left outlives them: collections until then pass it over, for
        each of which it would otherwise take longer than many a run.
        """
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        """What earlier runs took is kept at hand, so that a prefill does not wait for the allocator."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def _prompts(plan: Plan) -> Tensor:
    """Random tokens [sequence, token], always the same."""
    work = plan.setting.workload
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, plan.setting.model.vocab, (work.batch, work.prompt_tokens), generator=generator)


def launch_s(device: torch.device) -> float:
    """What the host takes to launch a kernel now; 0 on a CPU, where nothing is launched.

    Not a constant of the machine: cores shared with others were seen to do the same work in one time or in twice that, and to
    change from one to the other within a second.
    """
    if device.type != "cuda":
        return 0.0
    took, one = list[float](), torch.zeros(1, device=device)
    for _ in range(_PACES):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(_LAUNCHES):
            one.add_(1.0)
        took.append((time.perf_counter() - start_s) / _LAUNCHES)
    return median(took)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile: how long that takes depends on what else the process holds."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


Run = Callable[[Plan], Ran]
