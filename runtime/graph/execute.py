"""Runs a plan by a captured step where plan and options allow, and records it as the eager runtime does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.graph.paged_run import PagedWave
from runtime.graph.run import GraphWave
from runtime.graph.support import require_graphable
from runtime.models import Decoder
from runtime.options import Options, Run, Stretch
from runtime.recorder import Record, Recorder
from runtime.tally import Tally
from runtime.wave import Prompts, padded
from sim.attention import Selector
from sim.plan import Plan, WriteBack

_LAG_STEPS = 16  # that may be launched before one is known to have ended, and between two looks at stop tokens


class Captures:
    """Of one job: its memory and its captured step, kept from one wave or batch to the next.

    Made anew where the last one does not do; its memory goes before the next one's comes.
    """

    def __init__(self) -> None:
        self._wave: GraphWave | None = None
        self._paged: PagedWave | None = None

    def wave(self, plan: Plan, decoder: Decoder, lanes: int) -> GraphWave:
        """For at least ``lanes`` sequences."""
        held, self._paged = self._wave, None
        if held is None or held.given is not decoder or held.lanes.count < lanes or held.plan != plan:
            self._wave = held = None
            self._wave = held = GraphWave(plan, decoder, [0] * lanes)
        return held

    def paged(self, plan: Plan, decoder: Decoder, sequences: int) -> PagedWave:
        """For at least ``sequences``, admitted as pages fall free."""
        held, self._wave = self._paged, None
        if held is None or held.given is not decoder or held.step.sequences < sequences or held.plan != plan:
            self._paged = held = None
            batch = plan.setting.workload.batch
            self._paged = held = PagedWave(plan, decoder, sequences=max(batch, sequences))
        return held


def captures(plan: Plan, decoder: Decoder, options: Options) -> bool:
    """Whether waves run by a captured step; unless asked for, only on a GPU.

    Raises ValueError where it is asked for and cannot be.
    """
    if options.captured is False or (options.captured is None and decoder.device.type != "cuda"):
        return False
    try:
        _require_capturable(plan, decoder, options)
    except ValueError:
        if options.captured:
            raise
        return False
    return True


def _require_capturable(plan: Plan, decoder: Decoder, options: Options) -> None:
    require_graphable(plan, decoder, plan.setting.admission)
    if find_spec("triton") is None:
        raise ValueError("triton is not installed, a captured step runs its kernels: pip install triton")
    record = options.record
    unknown = {
        "sampling.temperature": options.sampling.temperature != 0,
        "per_head": options.per_head,
        "published_ranges": options.published_ranges,
        "overlap=False": not options.overlap,
        **{f"record.{name}": getattr(record, name) for name in ("layers", "picks", "logits", "mass")},
    }
    asked = next((name for name, is_asked in unknown.items() if is_asked), None)
    if asked is not None:
        raise ValueError(f"{asked}, is not to be had from a captured step: run eagerly")
    if plan.homes.steps == 1:
        raise ValueError("output=1, has no decode step to capture")
    if plan.setting.attention.selector is Selector.SWA and plan.setting.write_back is WriteBack.AT_BIRTH:
        raise ValueError("write_back=at_birth, a captured step under swa writes at eviction")


def recorded(plan: Plan, record: Record) -> Record:
    """``record`` without what a captured step does not tell: which pages it picked."""
    return replace(record, selections=record.selections and plan.setting.attention.selector is not Selector.PAGES)


def run_wave(
    wave: GraphWave,
    prompts: Prompts,
    recorder: Recorder,
    stop_tokens: tuple[int, ...],
    on_step: Callable[[int], None],
) -> Tensor:
    """Tokens [sequence, step], some steps more than needed where every sequence ends early.

    Nothing waits for the step just launched: what is done and who has ended is looked at some steps later.
    """
    lanes, step, row = prompts.tokens.shape[0], wave.step, 0
    counted, layers = recorder.record.selections, wave.decoder.spec.layers
    recorder.tally = Tally(wave.plan.homes.steps, layers, wave.decoder.device, selections=counted)
    watch = _Watch(recorder.clock, torch.tensor(stop_tokens, dtype=torch.int64, device=wave.decoder.device), on_step)
    streamed = layers if wave.weights is not None else 0
    recorder.begin_step(0)
    recorder.streamed(0, streamed)
    wave.prefill(_filled(prompts, wave.lanes.count))
    recorder.end_step(0, step.logits)
    wave.slots.record(0, recorder.tally, lanes)
    step.seek(1)
    for row in range(1, wave.plan.homes.steps):
        recorder.begin_step(row)
        recorder.streamed(row, streamed)
        step.replay()
        recorder.end_step(row, step.logits)
        wave.slots.record(row, recorder.tally, lanes)
        if row % _LAG_STEPS == 0 and watch.all_ended(row, step.generated[:lanes, : row + 1]):
            break
    watch.tell(row)
    return step.generated[:lanes, : row + 1]


def run_admitted(
    wave: PagedWave, prompts: Sequence[Sequence[int]], options: Options, on_tokens: Callable[[int], None]
) -> Run:
    """All ``prompts`` as pages fall free; texts that end make room some steps later."""
    plan, decoder = wave.plan, wave.decoder
    prepared = padded(prompts, plan.setting.workload.prompt_tokens, decoder.device)
    ran = wave.run(prepared, decoder.config.stop_tokens if options.stop else (), on_tokens)
    return Run(
        completions=ran.completions,
        trace=ran.trace,
        kv_allocated_bytes=wave.slots.kv_bytes,
        stats=(),
        picks=None,
        logits=None,
        stretches=tuple(tuple(Stretch(first=first, picks=None) for first in starts) for starts in ran.starts),
    )


class _Watch:
    """Follows the device at a distance: tells which steps have ended, and learns whether every sequence has."""

    def __init__(self, clock: Clock, stops: Tensor, on_step: Callable[[int], None]) -> None:
        self.clock, self.stops, self.on_step = clock, stops, on_step
        self.ended = torch.zeros(2, dtype=torch.bool, pin_memory=clock.on_gpu)  # written and read in turn
        self.asked: int | None = None  # the mark after the last write
        self.told = 0

    def all_ended(self, row: int, generated: Tensor) -> bool:
        """Whether every sequence had a stop token when this was asked the last time; waits for that, no longer."""
        turn = row // _LAG_STEPS % 2
        if self.asked is not None:
            self.clock.wait(self.asked)
            self.tell(row - _LAG_STEPS)
            if bool(self.ended[1 - turn]):
                return True
        if self.stops.numel():
            self.ended[turn].copy_(torch.isin(generated, self.stops).any(1).all(), non_blocking=True)
        self.asked = self.clock.mark()
        return False

    def tell(self, row: int) -> None:
        """Rows up to ``row`` have ended, or have been launched and nothing else is to be done."""
        for done in range(self.told, row + 1):
            self.on_step(done)
        self.told = row + 1


def _filled(prompts: Prompts, lanes: int) -> Prompts:
    """Lanes that have no prompt repeat the first one."""
    spare = (lanes - prompts.tokens.shape[0], -1)
    return Prompts(
        tokens=torch.cat((prompts.tokens, prompts.tokens[:1].expand(*spare))),
        padding=torch.cat((prompts.padding, prompts.padding[:1].expand(spare[0]))),
        whole=prompts.whole,
    )
