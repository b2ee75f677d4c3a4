"""Continuous admission by page: sequences enter as soon as there is room, and the youngest step back when there is none.

The rule is vLLM's: a sequence is admitted while pages for what it has are free, it takes another page as it grows, and
when pages run out the one that came last gives its own back. It returns later, its tokens prefilled again or copied
back from host memory. Nothing here knows how long a step takes.
"""

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from sim.checks import require_positive, require_whole
from sim.counts import Column
from sim.outcome import Served
from sim.plan import Preemption

FREE_SHARE = 0.01  # of the pages that admission leaves free, so that a newcomer does not at once displace another


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """``held_bytes`` is what a sequence holds after each of its steps, [step]; its last entry is the most it ever needs.

    At most ``most_sequences`` run at once, and a step prefills at most ``prefill_tokens`` unless one sequence has more.
    """

    batch: int
    prompt_tokens: int
    held_bytes: tuple[float, ...]
    budget_bytes: float
    host_bytes: float
    most_sequences: int
    prefill_tokens: int
    preemption: Preemption

    def __post_init__(self) -> None:
        require_whole("batch", self.batch)
        require_whole("most_sequences", self.most_sequences)
        require_positive("budget_bytes", self.budget_bytes)
        if max(self.held_bytes) > self.budget_bytes:
            raise ValueError(
                f"budget_bytes={self.budget_bytes:,.0f}, must hold one whole sequence of {max(self.held_bytes):,.0f} bytes"
            )


class Run(NamedTuple):
    """A sequence that decodes without a break: its steps from ``sequence_step`` on, in machine steps from ``machine_step``."""

    machine_step: int
    sequence_step: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What each step of the machine does, [machine step] columns; ``runs`` say who decodes at which age.

    What is prefilled has ``prefill_lengths``: newcomers of each are alike.
    """

    steps: int
    runs: tuple[Run, ...]
    prefilled: Column
    prefilled_tokens: Column
    prefill_lengths: Column
    swapped_in: Column
    swapped_out: Column
    held_bytes: Column
    host_bytes: Column
    served: tuple[Served, ...]

    def decoding(self, per_sequence: Column) -> Column:
        """Summed over the sequences that decode in each machine step, a quantity given for each of a sequence's steps."""
        total: Column = np.zeros(self.steps)
        for run in self.runs:
            end = run.sequence_step + run.length
            total[run.machine_step : run.machine_step + run.length] += per_sequence[run.sequence_step : end]
        return total

    def largest(self, per_sequence: Column) -> Column:
        """Among the sequences that decode in each machine step, the most of a quantity given for each of a sequence's steps."""
        most: Column = np.zeros(self.steps)
        for run in self.runs:
            steps = slice(run.machine_step, run.machine_step + run.length)
            most[steps] = np.maximum(most[steps], per_sequence[run.sequence_step : run.sequence_step + run.length])
        return most


@dataclass(slots=True)
class _Sequence:
    """``done`` tokens have been generated; ``swapped`` ones return by copy. It runs since ``since`` with ``had`` done."""

    number: int
    done: int = 0
    swapped: bool = False
    since: int = 0
    had: int = 0


class Change(NamedTuple):
    """A sequence that enters or steps back with ``done`` tokens generated; ``swapped``: by copy, not by prefill."""

    number: int
    done: int
    swapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one machine step does, in this order: who steps back, who enters, who decodes.

    Who enters by prefill gets its next token from that and does not decode in the same step.
    """

    left: tuple[Change, ...]
    entered: tuple[Change, ...]
    decoding: tuple[int, ...]


@dataclass(slots=True)
class _Event:
    """What happens in a machine step besides decoding."""

    prefilled: list[int] = field(default_factory=list)
    swapped_in: float = 0.0
    swapped_out: float = 0.0
    left: list[Change] = field(default_factory=list)
    entered: list[Change] = field(default_factory=list)


def schedule(rules: Rules) -> Schedule:
    """Run the admission rule until every sequence has its tokens."""
    return Scheduler(rules).run()


class Scheduler:
    """The admission rule. ``run`` takes steps together in which nobody enters, leaves or steps back; a runtime calls ``step``."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.tokens = len(rules.held_bytes)
        self.waiting = deque(_Sequence(number) for number in range(rules.batch))
        self.running: list[_Sequence] = []
        self.runs: list[Run] = []
        self.steps = 0
        self.host_bytes = 0.0
        self.host_levels: list[tuple[int, float]] = []
        self.first_step: dict[int, int] = {}
        self.last_step: dict[int, int] = {}
        self.events: dict[int, _Event] = {}

    def run(self) -> Schedule:
        while self.waiting or self.running:
            self.step()
            self._skip_quiet_steps()
        return self._collected()

    def step(self) -> Turn | None:
        """One machine step; None when every sequence has its tokens."""
        if not (self.waiting or self.running):
            return None
        event = _Event()
        self._make_room(event)
        for sequence in self.running:
            sequence.done += 1
        decoding = [sequence.number for sequence in self.running]
        self._admit(event)
        self._finish()
        if event != _Event():
            self.events[self.steps] = event
            self.host_levels.append((self.steps, self.host_bytes))
        self.steps += 1
        decoding += [change.number for change in event.entered if change.swapped]
        return Turn(left=tuple(event.left), entered=tuple(event.entered), decoding=tuple(decoding))

    def retire(self, number: int) -> None:
        """Take out a sequence whose text has ended before its last token; one that has stepped back does not return."""
        for sequence in self.running:
            if sequence.number == number:
                self.last_step[number] = self.steps - 1
                self._close(sequence)
        for sequence in self.waiting:
            if sequence.number == number:
                self.last_step[number] = self.steps - 1
                self.host_bytes -= self.rules.held_bytes[sequence.done - 1] if sequence.swapped else 0.0
        self.running = [sequence for sequence in self.running if sequence.number != number]
        self.waiting = deque(sequence for sequence in self.waiting if sequence.number != number)

    def _held(self, ahead: int = 0) -> float:
        """Bytes that all that run hold, ``ahead`` steps from now."""
        held = self.rules.held_bytes
        return sum(held[sequence.done + ahead] for sequence in self.running)

    def _make_room(self, event: _Event) -> None:
        """Let the youngest step back until all that run can grow."""
        while self._held() > self.rules.budget_bytes:
            self._step_back(self.running.pop(), event)

    def _step_back(self, sequence: _Sequence, event: _Event) -> None:
        self._close(sequence)
        kept = self.rules.held_bytes[sequence.done - 1]
        if self.rules.preemption is Preemption.SWAP and self.host_bytes + kept <= self.rules.host_bytes:
            sequence.swapped = True
            self.host_bytes += kept
            event.swapped_out += kept
        event.left.append(Change(sequence.number, sequence.done, sequence.swapped))
        self.waiting.appendleft(sequence)

    def _admit(self, event: _Event) -> None:
        """Take in who waits while pages, places and the step's prefill last."""
        rules = self.rules
        limit = rules.budget_bytes * (1 - FREE_SHARE) if self.running else rules.budget_bytes
        held = sum(rules.held_bytes[sequence.done - 1] for sequence in self.running)
        while self.waiting and len(self.running) < rules.most_sequences:
            sequence = self.waiting[0]
            tokens = 0 if sequence.swapped else rules.prompt_tokens + sequence.done
            too_long = event.prefilled and sum(event.prefilled) + tokens > rules.prefill_tokens
            if too_long or held + rules.held_bytes[sequence.done] > limit:
                break
            held += rules.held_bytes[sequence.done]
            self.running.append(self.waiting.popleft())
            self._enter(sequence, event)

    def _enter(self, sequence: _Sequence, event: _Event) -> None:
        sequence.since, sequence.had = self.steps, sequence.done
        event.entered.append(Change(sequence.number, sequence.done, sequence.swapped))
        if sequence.swapped:
            moved = self.rules.held_bytes[sequence.done - 1]
            self.host_bytes -= moved
            event.swapped_in += moved
            sequence.swapped = False
        else:
            event.prefilled.append(self.rules.prompt_tokens + sequence.done)
            sequence.since, sequence.had = self.steps + 1, sequence.done + 1
        self.first_step.setdefault(sequence.number, self.steps)
        sequence.done += 1

    def _finish(self) -> None:
        for sequence in self.running:
            if sequence.done == self.tokens:
                self.last_step[sequence.number] = self.steps
                self._close(sequence)
        self.running = [sequence for sequence in self.running if sequence.done < self.tokens]

    def _close(self, sequence: _Sequence) -> None:
        if sequence.done > sequence.had:
            self.runs.append(Run(sequence.since, sequence.had, sequence.done - sequence.had))

    def _skip_quiet_steps(self) -> None:
        """Decode on while all that run fit and none is about to finish; until one leaves nobody can enter."""
        if not self.running or (self.waiting and self._someone_fits()):
            return
        quiet = self.tokens - 1 - max(sequence.done for sequence in self.running)
        low, high = 0, quiet
        while low < high:  # held bytes never shrink as sequences grow
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._held(middle - 1) <= self.rules.budget_bytes else (low, middle - 1)
        for sequence in self.running:
            sequence.done += low
        self.steps += low

    def _someone_fits(self) -> bool:
        """The next in line could enter now (a step's prefill was full, say)."""
        if len(self.running) >= self.rules.most_sequences:
            return False
        return self._held() + self.rules.held_bytes[self.waiting[0].done] <= self.rules.budget_bytes

    def _served(self) -> tuple[Served, ...]:
        ends = Counter((self.first_step[number], self.last_step[number]) for number in range(self.rules.batch))
        return tuple(Served(sequences=many, first_step=a, last_step=b) for (a, b), many in sorted(ends.items()))

    def _collected(self) -> Schedule:
        names = ("prefilled", "prefilled_tokens", "prefill_lengths")
        column = {name: np.zeros(self.steps) for name in names}
        swaps = {name: np.zeros(self.steps) for name in ("swapped_in", "swapped_out")}
        held = np.array(self.rules.held_bytes)
        entered: Column = np.zeros(self.steps)
        for step, event in self.events.items():
            column["prefilled"][step] = len(event.prefilled)
            column["prefilled_tokens"][step] = sum(event.prefilled)
            column["prefill_lengths"][step] = len(set(event.prefilled))
            swaps["swapped_in"][step], swaps["swapped_out"][step] = event.swapped_in, event.swapped_out
            entered[step] = sum(held[tokens - self.rules.prompt_tokens] for tokens in event.prefilled)
        host: Column = np.zeros(self.steps)
        for step, level in self.host_levels:
            host[step:] = level
        planned = Schedule(
            steps=self.steps,
            runs=tuple(self.runs),
            held_bytes=entered,
            host_bytes=host,
            served=self._served(),
            **column,
            **swaps,
        )
        return replace(planned, held_bytes=entered + planned.decoding(held))
