"""Runs one wave of a plan by replaying a captured decode step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.graph.dense import DenseSlots
from runtime.graph.step import DecodeStep
from runtime.graph.support import require_graphable
from runtime.graph.window import WindowSlots
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.prefill import prompt_layer
from runtime.wave import Prompts
from sim.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRun:
    """``tokens`` [sequence, step]; seconds of the prefill (the first token with it) and of all decode steps together."""

    tokens: Tensor
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens.numel() / (self.prefill_s + self.decode_s)


class GraphWave:
    """Memory and a captured step for waves of ``plan``'s concurrency; ``run`` may be called again and again.

    Raises ValueError for a plan or a decoder that cannot be captured.
    """

    def __init__(self, plan: Plan, decoder: Decoder, padding: Sequence[int]) -> None:
        require_graphable(plan, decoder)
        self.plan, self.decoder = plan, decoder
        self.lanes = Lanes.of(decoder.spec, len(padding), per_head=False)
        self.padding = torch.tensor(padding, device=decoder.device)
        self.row = torch.ones(1, dtype=torch.int64, device=decoder.device)
        kind = DenseSlots if plan.setting.attention.is_dense else WindowSlots
        self.slots = kind(plan, decoder, self.lanes, self.padding, self.row)
        cached = torch.tensor(plan.setting.token_counts.cached, device=decoder.device)
        self.step = DecodeStep(decoder, self.slots, self.padding, cached, self.row)
        with torch.inference_mode():
            self.step.capture()

    def run(self, prompts: Prompts, on_step: Callable[[int], None] | None = None) -> GraphRun:
        """Greedy completions. ``on_step`` is called before each decode step, with its row; reading the device there costs."""
        prefill_s = self.prefill(prompts)
        decode_s = self.decode(1, self.plan.homes.steps, on_step)
        return GraphRun(tokens=self.step.generated.clone(), prefill_s=prefill_s, decode_s=decode_s)

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> float:
        """Fill the slots, give the first token; seconds."""
        decoder, tokens = self.decoder, prompts.tokens
        with _Stopwatch() as watch:
            positions = (torch.arange(tokens.shape[1], device=tokens.device) - self.padding[:, None]).clamp(min=0)
            x = decoder.embed(tokens, positions)
            for layer in range(decoder.spec.layers):
                q, k, v, x = prompt_layer(decoder, layer, x, positions, self.padding)
                self.slots.start(layer, q, k, v)
            self.step.tokens.copy_(decoder.logits(x[:, -1:])[:, 0].argmax(-1))
            self.step.generated[:, 0] = self.step.tokens
        return watch.seconds

    @torch.inference_mode()
    def decode(self, first: int, last: int, on_step: Callable[[int], None] | None = None) -> float:
        """Rows ``first`` to before ``last``; seconds."""
        with _Stopwatch() as watch:
            self.row.fill_(first)
            for row in range(first, last):
                if on_step:
                    on_step(row)
                self.step.replay()
        return watch.seconds


class _Stopwatch:
    """Seconds on the device between entry and exit."""

    seconds: float

    def __enter__(self) -> "_Stopwatch":
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.start.record()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.record()
        torch.cuda.synchronize()
        self.seconds = float(self.start.elapsed_time(self.end)) / 1e3
