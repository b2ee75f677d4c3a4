"""Continuous admission: sequences enter when pages fall free, step back when they run out, and leave when they are done.

``sim.admission`` says who runs; here every running sequence is a wave of its own, whose HBM grows page by page, and a
machine step decodes all of them together. A sequence that steps back is either copied to host memory with all its state,
or given up: then its prompt and the tokens it has are prefilled again, densely, as one longer prompt. Under a sparse
selector that is a new start: what the selector goes by is the new prefill's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from runtime.admitted import StepLog, admission_rules
from runtime.models import Decoder
from runtime.options import Options, Run, Stretch
from runtime.recorder import Record, Recorder
from runtime.sampling import Sampler
from runtime.wave import Wave, WaveOptions, decode, padded, until_stop
from sim.admission import Change, Scheduler, Turn
from sim.homes import TokenHomes
from sim.plan import Admission, Plan
from sim.workload import Workload


def run_continuously(
    plan: Plan,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: Options,
    on_tokens: Callable[[int], None],
) -> Run:
    """Generate after all ``prompts``; ``on_tokens`` is told after each machine step how many tokens there are."""
    machine = _Machine(plan, decoder, prompts, options)
    while (turn := machine.scheduler.step()) is not None:
        machine.run(turn)
        on_tokens(sum(len(sequence.tokens) for sequence in machine.sequences))
    return machine.finished()


@dataclass(slots=True)
class _Sequence:
    """``wave`` is there while it runs or is swapped out; its prefill gave the token numbered ``base``.

    ``recorders`` are those of all its prefills, each with its ``base``.
    """

    number: int
    prompt: tuple[int, ...]
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    base: int = 0
    recorders: list[tuple[int, Recorder]] = field(default_factory=list)
    wave: Wave | None = None
    swapped_bytes: float = 0.0
    steps: list[int] = field(default_factory=list)  # machine steps that gave a token


class _Machine:
    """All sequences, and what each machine step did."""

    def __init__(self, plan: Plan, decoder: Decoder, prompts: Sequence[Sequence[int]], options: Options) -> None:
        self.plan, self.decoder, self.options = plan, decoder, options
        self.stop_tokens = decoder.config.stop_tokens if options.stop else ()
        self.rules = admission_rules(plan, len(prompts))
        self.scheduler = Scheduler(self.rules)
        places, steps = options.places or range(len(prompts)), plan.setting.workload.output_tokens
        self.sequences = [
            _Sequence(number, tuple(prompt), Sampler(options.sampling, (place,), steps, decoder.device))
            for number, (prompt, place) in enumerate(zip(prompts, places, strict=True))
        ]
        self.log, self.most_allocated_bytes = StepLog(decoder.device), 0

    def run(self, turn: Turn) -> None:
        """One machine step."""
        self.log.begin()
        out_bytes = sum(self._step_back(change) for change in turn.left)
        in_bytes = sum(self._return(change) for change in turn.entered if change.swapped)
        decoding = [self.sequences[number] for number in turn.decoding]
        entered = [self.sequences[change.number] for change in turn.entered if not change.swapped]
        held_bytes = sum(self.rules.held_bytes[len(sequence.tokens)] for sequence in (*decoding, *entered))
        for sequence in entered:
            self._enter(sequence)
        if decoding:
            self._decode(decoding)
        self.log.end(
            fetched_bytes=in_bytes,
            written_bytes=out_bytes,
            hbm_bytes=held_bytes,
            host_bytes=sum(sequence.swapped_bytes for sequence in self.sequences),
        )
        self._note_allocated()
        for sequence in (*decoding, *entered):
            self._require_slots(sequence)
            self._let_go_if_done(sequence)

    def _enter(self, sequence: _Sequence) -> None:
        """Prefill the prompt and the tokens there are."""
        sequence.base = len(sequence.tokens)
        resumed = plan_from(self.plan, sequence.base)
        length = resumed.setting.workload.prompt_tokens
        recorder = Recorder(resumed, self.log.clock, Record(selections=False, picks=self.options.record.picks))
        sequence.wave = Wave(
            resumed,
            self.decoder,
            padded([[*sequence.prompt, *sequence.tokens]], length, self.decoder.device),
            recorder,
            options=WaveOptions(
                per_head=self.options.per_head,
                published_ranges=self.options.published_ranges,
                overlap=self.options.overlap,
                by_page=True,
            ),
        )
        recorder.tally = sequence.wave.cache.tally
        sequence.recorders.append((sequence.base, recorder))
        self._append([sequence], sequence.wave.prefill())

    def _decode(self, sequences: list[_Sequence]) -> None:
        waves = [(sequence.wave, len(sequence.tokens) - sequence.base) for sequence in sequences if sequence.wave]
        newest = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=self.decoder.device)
        self._append(sequences, decode(waves, newest))

    def _append(self, sequences: list[_Sequence], logits: Tensor) -> None:
        chosen = [
            sequence.sampler.choose(row[None], len(sequence.tokens))
            for sequence, row in zip(sequences, logits, strict=True)
        ]
        for sequence, token, row in zip(sequences, torch.cat(chosen).tolist(), logits, strict=True):
            sequence.tokens.append(token)
            sequence.steps.append(len(self.log))
            if self.options.record.logits:
                sequence.logits.append(row)

    def _step_back(self, change: Change) -> float:
        """Give up what the sequence holds, or copy it to the host; bytes copied."""
        sequence = self.sequences[change.number]
        assert sequence.wave is not None
        if not change.swapped:
            sequence.wave = None
            return 0.0
        sequence.wave.move(torch.device("cpu"))
        sequence.swapped_bytes = self.rules.held_bytes[change.done - 1]
        return sequence.swapped_bytes

    def _return(self, change: Change) -> float:
        """Copy what the sequence held back; bytes copied."""
        sequence = self.sequences[change.number]
        assert sequence.wave is not None
        sequence.wave.move(self.decoder.device)
        moved, sequence.swapped_bytes = sequence.swapped_bytes, 0.0
        return moved

    def _let_go_if_done(self, sequence: _Sequence) -> None:
        if sequence.tokens[-1] in self.stop_tokens:
            self.scheduler.retire(sequence.number)
            sequence.wave = None
        elif len(sequence.tokens) == len(self.rules.held_bytes):
            sequence.wave = None

    def _require_slots(self, sequence: _Sequence) -> None:
        assert sequence.wave is not None
        sequence.wave.require_slots(len(sequence.tokens) - 1)

    def _note_allocated(self) -> None:
        running = [sequence.wave for sequence in self.sequences if sequence.wave and not sequence.swapped_bytes]
        allocated = sum(wave.cache.on_device.size_bytes for wave in running)
        self.most_allocated_bytes = max(self.most_allocated_bytes, allocated)

    def finished(self) -> Run:
        complete = all(len(sequence.logits) == len(self.rules.held_bytes) for sequence in self.sequences)
        return Run(
            completions=tuple(until_stop(sequence.tokens, self.stop_tokens) for sequence in self.sequences),
            trace=self.log.trace(self.plan.setting, [sequence.steps for sequence in self.sequences]),
            kv_allocated_bytes=self.most_allocated_bytes,
            stats=(),
            picks=None,
            logits=torch.stack([torch.stack(sequence.logits) for sequence in self.sequences]) if complete else None,
            stretches=tuple(self._stretches(sequence) for sequence in self.sequences),
        )

    def _stretches(self, sequence: _Sequence) -> tuple[Stretch, ...]:
        wanted = self.options.record.picks
        return tuple(
            Stretch(first=base, picks=recorder.picks() if wanted else None) for base, recorder in sequence.recorders
        )


def plan_from(plan: Plan, done: int) -> Plan:
    """What is left of one sequence's plan once ``done`` of its tokens belong to the prompt."""
    work = plan.setting.workload
    left = Workload(batch=1, prompt_tokens=work.prompt_tokens + done, output_tokens=work.output_tokens - done)
    setting = replace(plan.setting, workload=left, concurrency=1, admission=Admission.WAVES)
    counts = setting.token_counts
    none = (0,) * left.output_tokens
    living = tuple(cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True))
    homes = TokenHomes(hbm=living, host_kv=none, activations=none, dropped=counts.dead, copies=none)
    return Plan(setting=setting, homes=homes)
