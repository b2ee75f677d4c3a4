"""Runs a plan of continuous admission: newcomers are prefilled, all that run decode by one captured step.

Who enters and who steps back is ``sim.admission``'s rule, which the simulator follows too.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.graph.paged import COUNT, PADDING, SEQUENCE, TABLE, Leaf, PagedSlots, PageSize, Shape
from runtime.graph.step import CapturedStep
from runtime.graph.support import require_graphable
from runtime.models import Decoder
from runtime.prefill import prompt_layer
from runtime.wave import BudgetExceeded, Prompts
from sim.admission import Change, Rules, Scheduler, Turn
from sim.flows import flows_of, home_columns, occupancy_of
from sim.footprint import PREFILL_CHUNK_TOKENS
from sim.plan import Admission, Plan
from sim.scheduled import page_rules


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRun:
    """``tokens`` [sequence, step], of an ended text those after its stop token arbitrary; seconds, prefills' among them."""

    tokens: Tensor
    seconds: float
    prefill_s: float
    machine_steps: int

    def completions(self, stop_tokens: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Each text up to its first stop token, that one included."""
        ends = set(stop_tokens)
        rows = self.tokens.tolist()
        return tuple(
            tuple(row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]) for row in rows
        )


class PagedStep(CapturedStep):
    """Lanes of any age: a lane's last token is read from ``generated`` [sequence, step], where the next one goes too.

    Idle lanes write to a sequence more than there are.
    """

    def __init__(self, decoder: Decoder, slots: PagedSlots, plan: Plan) -> None:
        work = plan.setting.workload
        super().__init__(decoder, slots, slots.state.shape[0])
        self.state, self.prompt_tokens = slots.state, work.prompt_tokens
        size = (work.batch + 1, work.output_tokens)
        self.generated = torch.zeros(size, dtype=torch.int64, device=decoder.device)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        sequence, place = self._at()
        positions = (self.state[:, COUNT] - 1 - self.state[:, PADDING]).clamp(min=0)
        return self.generated[sequence, (place - 1).clamp(min=0)], positions.long()

    def _emit(self, tokens: Tensor) -> None:
        self.generated.index_put_(self._at(), tokens)

    def _at(self) -> tuple[Tensor, Tensor]:
        """Sequence and place of the tokens to come, [lane]."""
        place = self.state[:, COUNT] - self.prompt_tokens
        return self.state[:, SEQUENCE].long(), place.clamp(min=0).long()


class PagedWave:
    """Pages and a captured step for ``plan``; ``run`` may be called again and again.

    One graph serves all steps: its products read the same weights for any number of rows up to 64, and an idle lane's
    attention ends at once. ``lanes`` more than the plan's concurrency are always idle.

    Raises ValueError for a plan or a decoder that cannot be captured.
    """

    def __init__(self, plan: Plan, decoder: Decoder, *, lanes: int | None = None, shape: Shape | None = None) -> None:
        require_graphable(plan, decoder, Admission.CONTINUOUS)
        self.plan, self.decoder = plan, decoder
        self.slots = PagedSlots(plan, decoder, lanes or plan.setting.concurrency, shape)
        self.step = PagedStep(decoder, self.slots, plan)
        self.rules = rules_of(plan)
        with torch.inference_mode():
            self.step.capture()

    @torch.inference_mode()
    def run(self, prompts: Prompts, stop_tokens: Sequence[int] = ()) -> PagedRun:
        """Greedy completions of the whole batch; with ``stop_tokens`` an ended text makes room two steps later."""
        run = _Run(self, prompts, stop_tokens)
        run.clock.mark()
        while run.step():
            pass
        run.clock.mark()
        seconds = run.clock.seconds()
        passes = zip(seconds[1:-1:2], seconds[2:-1:2], strict=True)
        return PagedRun(
            tokens=self.step.generated[:-1].clone(),
            seconds=seconds[-1],
            prefill_s=sum(end - start for start, end in passes),
            machine_steps=run.scheduler.steps,
        )


def rules_of(plan: Plan) -> Rules:
    """The simulator's, with what ``PagedSlots`` holds, byte for byte."""
    homes = home_columns(plan.homes)
    rules = page_rules(plan.setting, occupancy_of(plan, homes, flows_of(plan, homes)))
    size, cached = PageSize.of(plan.setting), plan.setting.token_counts.cached
    return replace(rules, held_bytes=tuple(float(size.pages_of(tokens) * size.page_bytes) for tokens in cached))


class _Run:
    """One run's bookkeeping: free pages and lanes, and what each sequence holds."""

    def __init__(self, wave: PagedWave, prompts: Prompts, stop_tokens: Sequence[int]) -> None:
        self.slots, self.captured, self.decoder, self.prompts = wave.slots, wave.step, wave.decoder, prompts
        self.work = wave.plan.setting.workload
        self.padding = prompts.padding.tolist()
        self.scheduler, self.clock = Scheduler(wave.rules), Clock(wave.decoder.device)
        self.pages = list(range(self.slots.pages))
        self.lanes = list(range(wave.plan.setting.concurrency))
        self.leaves: dict[int, Leaf] = {}
        self.lane_of: dict[int, int] = {}
        self.done = [0] * self.work.batch
        self.swapped: dict[int, list[list[Tensor]]] = {}  # sequence: [layer][plane] in pinned memory
        self.stops = _StopWatcher(stop_tokens, self.captured.generated)

    def step(self) -> bool:
        """One step of the machine; whether there was one."""
        for number in self.stops.ended() & self.leaves.keys():
            self.scheduler.retire(number)
            self._free(number)
        turn = self.scheduler.step()
        if turn is None:
            return False
        for change in turn.left:
            self._step_back(change)
        for change in turn.entered:
            self._seat(change)
        for change in turn.entered:
            if change.swapped:
                self._swap_in(change)
        if turn.decoding:
            self._decode(turn)
        self._prefill([change for change in turn.entered if not change.swapped])
        self._finish(turn)
        return True

    def _decode(self, turn: Turn) -> None:
        state = np.zeros(tuple(self.slots.state.shape), dtype=np.int32)
        state[:, SEQUENCE] = self.work.batch
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
        self.slots.state.copy_(_pinned(state, self.decoder.device), non_blocking=True)
        self.captured.replay()

    def _prefill(self, changes: list[Change]) -> None:
        """Newcomers of one length together, as many as a pass takes."""
        alike: dict[int, list[int]] = defaultdict(list)
        for change in changes:
            alike[change.done].append(change.number)
        for done, numbers in alike.items():
            size = max(1, PREFILL_CHUNK_TOKENS // (self.work.prompt_tokens + done))
            for first in range(0, len(numbers), size):
                self.clock.mark()
                self._prefill_pass(numbers[first : first + size], done)
                self.clock.mark()

    def _prefill_pass(self, numbers: list[int], done: int) -> None:
        """All layers of sequences that have ``done`` tokens; gives each one more."""
        decoder, generated, device = self.decoder, self.captured.generated, self.decoder.device
        at = _uploaded(numbers, device)
        pages = _uploaded([self.leaves[number].tokens for number in numbers], device)
        opened = _uploaded([self.leaves[number].opened for number in numbers], device)
        tokens = torch.cat((self.prompts.tokens[at], generated[at, :done]), dim=1)
        padding = self.prompts.padding[at]
        positions = (torch.arange(tokens.shape[1], device=device) - padding[:, None]).clamp(min=0)
        x = decoder.embed(tokens, positions)
        padded = any(self.padding[number] for number in numbers)
        for layer in range(decoder.spec.layers):
            _, k, v, x = prompt_layer(decoder, layer, x, positions, padding if padded else None)
            self.slots.enter(layer, pages, opened, k, v)
        generated[at, done] = decoder.logits(x[:, -1:])[:, 0].argmax(-1)

    def _finish(self, turn: Turn) -> None:
        """Count the new tokens, and let go of who has them all."""
        prefilled = [change.number for change in turn.entered if not change.swapped]
        numbers = [*turn.decoding, *prefilled]
        self.stops.note(numbers, [self.done[number] for number in numbers])
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

    def _step_back(self, change: Change) -> None:
        if change.swapped:
            self._swap_out(change.number)
        self._free(change.number)

    def _free(self, number: int) -> None:
        self.pages += self.leaves.pop(number).all
        self.lanes.append(self.lane_of.pop(number))

    def _swap_out(self, number: int) -> None:
        """Queued before whatever will use the pages next."""
        pages = _uploaded(self.leaves[number].all, self.decoder.device)
        self.swapped[number] = [
            [_to_host(rows) for rows in self.slots.read(layer, pages)] for layer in range(self.decoder.spec.layers)
        ]

    def _swap_in(self, change: Change) -> None:
        device = self.decoder.device
        pages = _uploaded(self.leaves[change.number].all, device)
        for layer, planes in enumerate(self.swapped.pop(change.number)):
            self.slots.write(layer, pages, [rows.to(device, non_blocking=True) for rows in planes])


class _StopWatcher:
    """Whose text has ended, known a step late: what a step gave is read while the next one runs."""

    def __init__(self, stop_tokens: Sequence[int], generated: Tensor) -> None:
        self.stop_tokens, self.generated = frozenset(stop_tokens), generated
        self.late: deque[tuple[list[int], Tensor, torch.cuda.Event | None]] = deque()
        self.over: set[int] = set()

    def note(self, numbers: list[int], places: list[int]) -> None:
        """Read the tokens in ``places`` of sequences ``numbers`` later."""
        if not self.stop_tokens or not numbers:
            return
        device = self.generated.device
        tokens = _to_host(self.generated[_uploaded(numbers, device), _uploaded(places, device)])
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.late.append((numbers, tokens, event))

    def ended(self) -> set[int]:
        """Of all steps but the last one."""
        while len(self.late) > 1:
            numbers, tokens, event = self.late.popleft()
            if event is not None:
                event.synchronize()
            self.over |= {n for n, token in zip(numbers, tokens.tolist(), strict=True) if token in self.stop_tokens}
        return self.over


def _pinned(array: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """Memory that a queued copy reads is lent again by torch only after that copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _uploaded(numbers: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """As a tensor of ``device``, without waiting for it."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(rows: Tensor) -> Tensor:
    if rows.device.type != "cuda":
        return rows.clone()
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
