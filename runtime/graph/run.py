"""Runs one wave of a plan by replaying a captured decode step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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

    @torch.inference_mode()
    def run(self, prompts: Prompts, on_step: Callable[[int], None] | None = None) -> GraphRun:
        """Greedy completions. ``on_step`` is called before each decode step, with its row; reading the device there costs."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        marks[0].record()
        self.step.tokens.copy_(self._prefill(prompts).argmax(-1))
        self.step.generated[:, 0] = self.step.tokens
        self.row.fill_(1)
        marks[1].record()
        for row in range(1, self.plan.homes.steps):
            if on_step:
                on_step(row)
            self.step.replay()
        marks[2].record()
        torch.cuda.synchronize()
        prefill_ms, decode_ms = (before.elapsed_time(after) for before, after in pairwise(marks))
        return GraphRun(tokens=self.step.generated.clone(), prefill_s=prefill_ms / 1e3, decode_s=decode_ms / 1e3)

    def _prefill(self, prompts: Prompts) -> Tensor:
        decoder, tokens = self.decoder, prompts.tokens
        positions = (torch.arange(tokens.shape[1], device=tokens.device) - self.padding[:, None]).clamp(min=0)
        x = decoder.embed(tokens, positions)
        for layer in range(decoder.spec.layers):
            q, k, v, x = prompt_layer(decoder, layer, x, positions, self.padding)
            self.slots.start(layer, q, k, v)
        return decoder.logits(x[:, -1:])[:, 0]
