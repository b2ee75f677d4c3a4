"""Continuous admission by page: sequences enter as soon as there is room, and the youngest step back when there is none.

The rule is vLLM's: a sequence is admitted while pages for what it has are free, it takes another page as it grows, and
when pages run out the one that came last gives its own back. It returns later, its tokens prefilled again or copied
back from host memory. Nothing here knows how long a step takes.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from sim.checks import require_positive, require_whole
from sim.flows import Column
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What each step of the machine does, [machine step] each; ``decoded_at`` is [machine step, sequence step] counts.

    ``prefilled_squares`` sums the squared lengths of what is prefilled.
    """

    decoded_at: Column
    prefilled: Column
    prefilled_tokens: Column
    prefilled_squares: Column
    swapped_in: Column
    swapped_out: Column
    held_bytes: Column
    host_bytes: Column
    served: tuple[Served, ...]


@dataclass(slots=True)
class _Sequence:
    """``done`` tokens have been generated; ``swapped`` ones return by copy."""

    number: int
    done: int = 0
    swapped: bool = False


@dataclass(slots=True)
class _Step:
    """One machine step as it is put together."""

    decoded: list[int] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)
    swapped_in: float = 0.0
    swapped_out: float = 0.0
    held_bytes: float = 0.0
    host_bytes: float = 0.0


def schedule(rules: Rules) -> Schedule:
    """Run the admission rule until every sequence has its tokens."""
    return _Scheduler(rules).run()


class _Scheduler:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.tokens = len(rules.held_bytes)
        self.waiting = deque(_Sequence(number) for number in range(rules.batch))
        self.running: list[_Sequence] = []
        self.host_bytes = 0.0
        self.first_step: dict[int, int] = {}
        self.last_step: dict[int, int] = {}
        self.steps: list[_Step] = []

    def run(self) -> Schedule:
        while self.waiting or self.running:
            step = _Step()
            held = self._make_room(step)
            self._decode(step)
            step.held_bytes, step.host_bytes = self._admit(step, held), self.host_bytes
            self._finish()
            self.steps.append(step)
        return self._collected()

    def _needed(self, sequence: _Sequence) -> float:
        """Bytes that ``sequence`` holds once its next token's predecessor is cached."""
        return self.rules.held_bytes[sequence.done]

    def _make_room(self, step: _Step) -> float:
        """Let the youngest step back until all that run can grow; what they then hold."""
        held = sum(self._needed(sequence) for sequence in self.running)
        while held > self.rules.budget_bytes:
            youngest = self.running.pop()
            held -= self._needed(youngest)
            self._step_back(youngest, step)
        return held

    def _step_back(self, sequence: _Sequence, step: _Step) -> None:
        kept = self.rules.held_bytes[sequence.done - 1]
        fits_host = self.host_bytes + kept <= self.rules.host_bytes
        if self.rules.preemption is Preemption.SWAP and fits_host:
            sequence.swapped = True
            self.host_bytes += kept
            step.swapped_out += kept
        self.waiting.appendleft(sequence)

    def _decode(self, step: _Step) -> None:
        for sequence in self.running:
            step.decoded.append(sequence.done)
            sequence.done += 1

    def _admit(self, step: _Step, held: float) -> float:
        """Take in who waits while pages, places and the step's prefill last."""
        rules, prefilled = self.rules, 0
        limit = rules.budget_bytes * (1 - FREE_SHARE) if self.running else rules.budget_bytes
        while self.waiting and len(self.running) < rules.most_sequences:
            sequence = self.waiting[0]
            tokens = 0 if sequence.swapped else rules.prompt_tokens + sequence.done
            too_long = prefilled and prefilled + tokens > rules.prefill_tokens
            if too_long or held + self._needed(sequence) > (limit if self.running else rules.budget_bytes):
                break
            self.running.append(self.waiting.popleft())
            held += self._needed(sequence)
            prefilled += tokens
            self._enter(sequence, step)
        return held

    def _enter(self, sequence: _Sequence, step: _Step) -> None:
        if sequence.swapped:
            moved = self.rules.held_bytes[sequence.done - 1]
            self.host_bytes -= moved
            step.swapped_in += moved
            step.decoded.append(sequence.done)
            sequence.swapped = False
        else:
            step.prefilled.append(self.rules.prompt_tokens + sequence.done)
        if sequence.done == 0:
            self.first_step[sequence.number] = len(self.steps)
        sequence.done += 1

    def _finish(self) -> None:
        for sequence in self.running:
            if sequence.done == self.tokens:
                self.last_step[sequence.number] = len(self.steps)
        self.running = [sequence for sequence in self.running if sequence.done < self.tokens]

    def _served(self) -> tuple[Served, ...]:
        ends = Counter((self.first_step[number], self.last_step[number]) for number in range(self.rules.batch))
        return tuple(Served(sequences=many, first_step=a, last_step=b) for (a, b), many in sorted(ends.items()))

    def _collected(self) -> Schedule:
        decoded_at = np.zeros((len(self.steps), self.tokens))
        for number, step in enumerate(self.steps):
            np.add.at(decoded_at[number], step.decoded, 1.0)
        column = {
            name: np.array([getattr(step, name) for step in self.steps])
            for name in ("swapped_in", "swapped_out", "held_bytes", "host_bytes")
        }
        return Schedule(
            decoded_at=decoded_at,
            prefilled=np.array([float(len(step.prefilled)) for step in self.steps]),
            prefilled_tokens=np.array([float(sum(step.prefilled)) for step in self.steps]),
            prefilled_squares=np.array([float(sum(n * n for n in step.prefilled)) for step in self.steps]),
            served=self._served(),
            **column,
        )
