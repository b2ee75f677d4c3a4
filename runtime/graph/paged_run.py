"""Runs a plan of continuous admission: newcomers are prefilled, all that run decode by one captured step.

Who enters and who steps back is ``sim.admission``'s rule, which the simulator follows too.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.admitted import StepLog, admission_rules
from runtime.graph.copies import pinned, uploaded
from runtime.graph.fused import FusedDecoder
from runtime.graph.paged import COUNT, PADDING, SEQUENCE, TABLE, Leaf, PagedSlots, PageSize, Shape
from runtime.graph.paged_step import PagedStep
from runtime.graph.stops import StopWatcher
from runtime.graph.support import require_graphable
from runtime.graph.swap import HostPages, most_swapped_bytes
from runtime.graph.widening import sharing_room
from runtime.models import Decoder
from runtime.prefill import Alike, unlike_layer
from runtime.wave import BudgetExceeded, Prompts, until_stop
from sim.admission import Change, Rules, Scheduler, Turn
from sim.plan import Admission, Plan
from sim.trace import Trace

_LAG_STEPS = 16  # that may be launched before one is known to have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRun:
    """``tokens`` [sequence, step], of an ended text those after its stop token arbitrary; ``prefill_s`` is a part of all.

    ``starts`` are the tokens of each sequence that a prefill gave.
    """

    tokens: Tensor
    completions: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...]
    trace: Trace
    prefill_s: float

    @property
    def seconds(self) -> float:
        return self.trace.waves[0].seconds

    @property
    def machine_steps(self) -> int:
        return len(self.trace.waves[0].step_end_s)


class PagedWave:
    """Pages and a captured step for ``plan``; ``run`` may be called again and again.

    One graph serves all steps: its products read the same weights for any number of rows up to 64, and an idle lane's
    attention ends at once. ``lanes`` more than the plan's concurrency are always idle. A run has at most ``sequences``,
    without a number the plan's batch. The host keeps room for what the schedule of so many swaps out at once: where
    texts that end early make that more, a sequence that finds no room there is prefilled again.

    Raises ValueError for a plan or a decoder that cannot be captured, BudgetExceeded where no sequence fits.
    """

    def __init__(
        self,
        plan: Plan,
        decoder: Decoder,
        *,
        sequences: int | None = None,
        lanes: int | None = None,
        shape: Shape | None = None,
    ) -> None:
        require_graphable(plan, decoder, Admission.CONTINUOUS)
        self.plan, self.given = plan, decoder
        rules, batch = rules_of(plan), sequences or plan.setting.workload.batch
        self.rules = replace(rules, host_bytes=most_swapped_bytes(replace(rules, batch=batch)))
        lanes = lanes or plan.setting.concurrency
        self.decoder = decoder = sharing_room(decoder, lanes)
        self.fused = FusedDecoder(decoder)
        self.slots = PagedSlots(plan, decoder, lanes, shape)
        self.host = HostPages(self.slots.planes, int(self.rules.host_bytes) // self.slots.size.page_bytes)
        self.step = PagedStep(decoder, self.slots, plan, batch)
        with torch.inference_mode():
            self.step.capture()
            self.fused.warm_up()

    @torch.inference_mode()
    def run(
        self, prompts: Prompts, stop_tokens: tuple[int, ...] = (), on_tokens: Callable[[int], None] | None = None
    ) -> PagedRun:
        """Greedy completions of all ``prompts``; with ``stop_tokens`` an ended text makes room two steps later.

        ``on_tokens`` is told how many tokens there are after each machine step, once that is known to have ended.
        """
        run = _Run(self, prompts, stop_tokens)
        tell = on_tokens or _ignore
        while run.step():
            run.tell(tell, behind=_LAG_STEPS)
        run.stops.ended(behind=0)
        run.tell(tell, behind=0)
        tokens = self.step.generated[: len(run.done)].clone()
        completions = tuple(until_stop(row, stop_tokens) for row in tokens.tolist())
        trace = run.log.trace(self.plan.setting, run.steps_of(completions))
        seconds = run.log.clock.seconds()
        prefill_s = sum(seconds[end] - seconds[begin] for begin, end in run.passes)
        return PagedRun(
            tokens=tokens, completions=completions, starts=run.starts_of(completions), trace=trace, prefill_s=prefill_s
        )


def _ignore(_: int) -> None:
    """Nobody wants to know how far the run has come."""


def rules_of(plan: Plan) -> Rules:
    """The simulator's, with what ``PagedSlots`` holds, byte for byte."""
    size, work = PageSize.of(plan.setting), plan.setting.workload
    held = [float(size.pages_of(tokens) * size.page_bytes) for tokens in plan.setting.token_counts.cached]
    return admission_rules(plan, work.batch, held)


class _Newcomers(NamedTuple):
    """Who come with ``done`` tokens: their numbers ``at``, what they hold, and what they are prefilled from [sequence, token]."""

    done: int
    at: Tensor
    pages: Tensor
    opened: Tensor
    tokens: Tensor
    positions: Tensor
    alike: Alike


class _Run:
    """One run's bookkeeping: free pages and lanes, what each sequence holds, and what each machine step gave."""

    def __init__(self, wave: PagedWave, prompts: Prompts, stop_tokens: Sequence[int]) -> None:
        self.slots, self.captured, self.decoder, self.prompts = wave.slots, wave.step, wave.fused, prompts
        self.host, self.host_pages = wave.host, list(range(wave.host.pages))
        self.work = wave.plan.setting.workload
        self.padding = prompts.padding.tolist()
        self.done = [0] * len(self.padding)
        self.scheduler = Scheduler(replace(wave.rules, batch=len(self.done)))
        self.log, self.passes = StepLog(wave.decoder.device), list[tuple[int, int]]()  # marks around each prefill pass
        self.pages = list(range(self.slots.pages))
        self.lanes = list(range(wave.plan.setting.concurrency))
        self.leaves: dict[int, Leaf] = {}
        self.lane_of: dict[int, int] = {}
        self.swapped: dict[int, list[int]] = {}  # pages on the host
        self.starts: list[list[int]] = [[] for _ in self.done]
        self.stops = StopWatcher(stop_tokens, self.captured.generated)
        self.given: list[list[tuple[int, int]]] = []  # of each machine step: sequences, and the places of their tokens
        self.told_steps = self.told_tokens = 0

    def step(self) -> bool:
        """One step of the machine; whether there was one."""
        for number in self.stops.ended():
            self._retire(number)
        turn = self.scheduler.step()
        if turn is None:
            return False
        self.log.begin()
        written_bytes = sum(self._step_back(change) for change in turn.left)
        for change in turn.entered:
            self._seat(change)
        fetched_bytes = sum(self._swap_in(change) for change in turn.entered if change.swapped)
        if turn.decoding:
            self._decode(turn)
        self._prefill([change for change in turn.entered if not change.swapped])
        self.log.end(
            fetched_bytes=fetched_bytes,
            written_bytes=written_bytes,
            hbm_bytes=sum(self._bytes_of(leaf.all) for leaf in self.leaves.values()),
            host_bytes=sum(self._bytes_of(pages) for pages in self.swapped.values()),
        )
        self._finish(turn)
        return True

    def tell(self, on_tokens: Callable[[int], None], behind: int) -> None:
        """Of all steps but the last ``behind``, as soon as they have ended; tokens after a stop token are none."""
        while self.told_steps < len(self.log) - behind:
            self.log.wait(self.told_steps)
            ends, given = self.stops.ends, self.given[self.told_steps]
            self.told_tokens += sum(place <= ends.get(number, place) for number, place in given)
            self.told_steps += 1
            on_tokens(self.told_tokens)

    def steps_of(self, completions: Sequence[Sequence[int]]) -> list[list[int]]:
        """The machine steps that gave each sequence its ``completions``."""
        steps: list[list[int]] = [[] for _ in completions]
        for step, given in enumerate(self.given):
            for number, place in given:
                if place < len(completions[number]):
                    steps[number].append(step)
        return steps

    def starts_of(self, completions: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each that a prefill gave."""
        begun = zip(self.starts, completions, strict=True)
        return tuple(tuple(first for first in starts if first < len(text)) for starts, text in begun)

    def _decode(self, turn: Turn) -> None:
        state = np.zeros(tuple(self.slots.state.shape), dtype=np.int32)
        state[:, SEQUENCE] = self.captured.sequences
        for number in turn.decoding:
            tokens, leaf, row = (
                self.work.prompt_tokens + self.done[number],
                self.leaves[number],
                state[self.lane_of[number]],
            )
            self._grow(leaf, tokens)
            row[[COUNT, SEQUENCE, PADDING]] = tokens, number, self.padding[number]
            row[TABLE : TABLE + len(leaf.tokens)] = leaf.tokens
            row[self.slots.open_column :] = leaf.opened
        self.slots.state.copy_(pinned(torch.from_numpy(state), self.decoder.device), non_blocking=True)
        self.captured.replay()

    def _prefill(self, changes: list[Change]) -> None:
        """All newcomers by one pass, those of one length side by side: a step admits no more tokens than a pass takes."""
        if not changes:
            return
        alike: dict[int, list[int]] = defaultdict(list)
        for change in changes:
            alike[change.done].append(change.number)
            self.starts[change.number].append(change.done)
        begin = self.log.clock.mark()
        self._prefill_pass(alike)
        self.passes.append((begin, self.log.clock.mark()))

    def _prefill_pass(self, alike: dict[int, list[int]]) -> None:
        """All layers of sequences, by the tokens that they have; gives each one more."""
        decoder, generated = self.decoder, self.captured.generated
        kinds = [self._of_one_length(numbers, done) for done, numbers in alike.items()]
        positions = torch.cat([kind.positions.flatten() for kind in kinds])[None]
        x = decoder.embed(torch.cat([kind.tokens.flatten() for kind in kinds])[None], positions)

        def through(layer: int, x: Tensor) -> Tensor:
            """What the layer's output was made from goes before the next layer comes."""
            kept, after = unlike_layer(decoder, layer, x, positions, [kind.alike for kind in kinds])
            for kind, (k, v) in zip(kinds, kept, strict=True):
                self.slots.enter(layer, kind.pages, kind.opened, k, v)
            return after

        for layer in range(decoder.spec.layers):
            x = through(layer, x)
        parts = torch.split(x[0], [kind.alike.rows for kind in kinds])
        ends = [part.view(*kind.tokens.shape, -1)[:, -1] for kind, part in zip(kinds, parts, strict=True)]
        chosen = decoder.logits(torch.cat(ends)[:, None])[:, 0].argmax(-1)
        for kind, tokens in zip(kinds, torch.split(chosen, [kind.alike.sequences for kind in kinds]), strict=True):
            generated[kind.at, kind.done] = tokens

    def _of_one_length(self, numbers: list[int], done: int) -> "_Newcomers":
        device = self.decoder.device
        at = uploaded(numbers, device)
        tokens = torch.cat((self.prompts.tokens[at], self.captured.generated[at, :done]), dim=1)
        padding = self.prompts.padding[at]
        hidden = padding if any(self.padding[number] for number in numbers) else None
        return _Newcomers(
            done=done,
            at=at,
            pages=uploaded([self.leaves[number].tokens for number in numbers], device),
            opened=uploaded([self.leaves[number].opened for number in numbers], device),
            tokens=tokens,
            positions=(torch.arange(tokens.shape[1], device=device) - padding[:, None]).clamp(min=0),
            alike=Alike(len(numbers), tokens.shape[1], hidden),
        )

    def _finish(self, turn: Turn) -> None:
        """Count the new tokens, and let go of who has them all."""
        prefilled = [change.number for change in turn.entered if not change.swapped]
        numbers = [*turn.decoding, *prefilled]
        places = [self.done[number] for number in numbers]
        self.stops.note(numbers, places)
        self.given.append(list(zip(numbers, places, strict=True)))
        for number in numbers:
            self.done[number] += 1
            if self.done[number] == self.work.output_tokens:
                self._free(number)

    def _seat(self, change: Change) -> None:
        """A lane, and pages for the tokens that a newcomer brings."""
        number, leaf = change.number, Leaf()
        self.lane_of[number], self.leaves[number] = self.lanes.pop(), leaf
        leaf.opened = [self._page() for _ in range(self.slots.size.opened)]
        self._grow(leaf, self.work.prompt_tokens + change.done - (1 if change.swapped else 0))

    def _grow(self, leaf: Leaf, tokens: int) -> None:
        while len(leaf.all) < self.slots.size.pages_of(tokens):
            leaf.tokens.append(self._page())

    def _page(self) -> int:
        if not self.pages:
            raise BudgetExceeded(f"all {self.slots.pages} pages are lent: the admission rule counted fewer")
        return self.pages.pop()

    def _bytes_of(self, pages: list[int]) -> int:
        return len(pages) * self.slots.size.page_bytes

    def _step_back(self, change: Change) -> int:
        """Give up what the sequence holds, or copy it to the host; bytes copied."""
        moved_bytes = self._swap_out(change.number) if change.swapped else 0
        self._free(change.number)
        return moved_bytes

    def _free(self, number: int) -> None:
        self.pages += self.leaves.pop(number).all
        self.lanes.append(self.lane_of.pop(number))

    def _retire(self, number: int) -> None:
        """The text has ended: what the sequence still holds, here or on the host, is free."""
        self.scheduler.retire(number)
        self.host_pages += self.swapped.pop(number, [])
        if number in self.leaves:
            self._free(number)

    def _swap_out(self, number: int) -> int:
        """Queued before whatever will use the pages next; bytes copied."""
        pages = self.leaves[number].all
        self.swapped[number] = [self.host_pages.pop() for _ in pages]
        self.host.write(pages, self.swapped[number])
        return self._bytes_of(pages)

    def _swap_in(self, change: Change) -> int:
        """Bytes copied."""
        pages, there = self.leaves[change.number].all, self.swapped.pop(change.number)
        self.host.read(pages, there)
        self.host_pages += there  # free for what is queued later
        return self._bytes_of(pages)
