"""Runs one wave of a plan by replaying a captured decode step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.graph.copy_engine import CopyEngine
from runtime.graph.dense import DenseSlots
from runtime.graph.forwarded import ForwardedSlots, ForwardedStep
from runtime.graph.fused import FusedDecoder
from runtime.graph.prefilling import PromptGraph
from runtime.graph.quantised_dense import QuantisedSlots
from runtime.graph.quantised_recent import QuantisedRecentSlots
from runtime.graph.quantised_window import QuantisedWindowSlots
from runtime.graph.recall import RecallSlots
from runtime.graph.recent import RecentSlots
from runtime.graph.step import DecodeStep
from runtime.graph.streamed import StreamedSlots
from runtime.graph.streamed_step import StreamedStep
from runtime.graph.support import forwards, require_graphable, streams
from runtime.graph.weights import ComingWeights
from runtime.graph.widening import sharing_room
from runtime.graph.window import WindowSlots
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.models.streamed import StreamedLayers
from runtime.prefill import prompt_layer
from runtime.wave import Prompts
from sim.attention import Selector
from sim.footprint import prefill_rows, prefills_at_once
from sim.plan import Plan
from sim.slots import keeps_newest


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

    A prefill in one pass over weights that are all there is captured as well. Prompts with padding, whose attention takes more
    memory for its mask, are launched kernel by kernel, and so are those that come after them.

    Raises ValueError for a plan or a decoder that cannot be captured.
    """

    def __init__(self, plan: Plan, decoder: Decoder, padding: Sequence[int]) -> None:
        require_graphable(plan, decoder)
        self.plan, self.given = plan, decoder
        layers = decoder.weights.layers
        streamed = layers if isinstance(layers, StreamedLayers) else None
        self.decoder = decoder = sharing_room(in_place(decoder), len(padding))
        self.fused = FusedDecoder(decoder)
        self.lanes = Lanes.of(decoder.spec, len(padding), per_head=False)
        self.padding, self.padded = torch.tensor(padding, dtype=torch.int32, device=decoder.device), any(padding)
        self.row = torch.ones(1, dtype=torch.int64, device=decoder.device)
        cached = torch.tensor(plan.setting.token_counts.cached, device=decoder.device)
        self.slots: DenseSlots | QuantisedSlots | WindowSlots | RecallSlots | StreamedSlots
        self.step: DecodeStep
        self.weights: ComingWeights | None = None
        if forwards(plan):
            self.slots = ForwardedSlots(plan, decoder, self.lanes, self.padding, self.row)
            self.weights = ComingWeights(streamed, self.slots.reads) if streamed else None
            self.step = ForwardedStep(decoder, self.slots, self.padding, cached, self.row, self.weights)
        elif streams(plan):
            self.slots = StreamedSlots(plan, decoder, self.lanes, self.padding, self.row)
            self.weights = ComingWeights(streamed, self.slots.reads) if streamed else None
            self.step = StreamedStep(decoder, self.slots, self.padding, cached, self.row, self.weights)
        else:
            self.slots = slots_kind(plan)(plan, decoder, self.lanes, self.padding, self.row)
            self.weights = ComingWeights(streamed, CopyEngine(decoder.device)) if streamed else None
            self.step = DecodeStep(decoder, self.slots, self.padding, cached, self.row, self.weights)
        prompt = plan.setting.workload.prompt_tokens
        at_once = self.weights is None and prefills_at_once(self.lanes.count, prompt) and plan.homes.steps > 1
        self.whole_prompts = PromptGraph(decoder, self.lanes.count, prompt) if at_once else None
        self.capture()

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the step, and the prefill where that can be; again after what they do has been changed."""
        if self.weights is not None:
            self.weights.fill()
        self.step.capture()
        self.fused.warm_up()
        if self.whole_prompts is not None:
            self.padded = False
            self.whole_prompts.capture(self._take_in)
        elif isinstance(self.slots, WindowSlots):
            self._warm_up()

    def run(self, prompts: Prompts, on_step: Callable[[int], None] | None = None) -> GraphRun:
        """Greedy completions. ``on_step`` is called before each decode step, with its row; reading the device there costs."""
        prefill_s = self.prefill(prompts)
        decode_s = self.decode(1, self.plan.homes.steps, on_step)
        return GraphRun(tokens=self.step.generated.clone(), prefill_s=prefill_s, decode_s=decode_s)

    @torch.inference_mode()
    def prefill(self, prompts: Prompts) -> float:
        """Fill the slots, give the first token; seconds."""
        self.padding.copy_(prompts.padding)
        self.padded = not prompts.whole and bool(prompts.padding.any())
        if isinstance(self.slots, StreamedSlots):
            self.slots.take(prompts.tokens)
        if self.whole_prompts is not None and self.padded:
            self.whole_prompts.release()
        with _Stopwatch(self.decoder.device) as watch:
            if self.whole_prompts is None or self.padded:
                self._take_in(prompts.tokens)
            else:
                self.whole_prompts.take_in(prompts.tokens, self._take_in)
        return watch.seconds

    def _take_in(self, tokens: Tensor) -> None:
        """The prompts [lane, token], pass by pass. May be captured: all else that changes from wave to wave is on the device."""
        size = prefill_rows(*tokens.shape) // tokens.shape[1]
        passes = [slice(first, first + size) for first in range(0, self.lanes.count, size)]
        if self.weights is None:
            for lanes in passes:
                self._prefill([lanes], tokens)
        else:  # which cross the link once
            self.weights.begin_prefill()
            self._prefill(passes, tokens)
            self.weights.end_prefill()
        self.step.generated[:, 0] = self.step.tokens

    def _prefill(self, passes: list[slice], tokens: Tensor) -> None:
        """All layers of some passes, each over lanes of its own: their activations are held from one layer to the next."""
        decoder, at = self.decoder, [self._positions(lanes, tokens.shape[1]) for lanes in passes]
        x = [decoder.embed(tokens[lanes], positions) for lanes, positions in zip(passes, at, strict=True)]
        for layer in range(decoder.spec.layers):
            if self.weights is not None:
                self.weights.layers.begin(layer)
            for number, lanes in enumerate(passes):
                x[number] = self._prefill_layer(layer, lanes.start, x[number], at[number], self.padding[lanes])
        for lanes, last in zip(passes, x, strict=True):
            self.step.tokens[lanes] = decoder.logits(last[:, -1:])[:, 0].argmax(-1)

    def _positions(self, lanes: slice, tokens: int) -> Tensor:
        """[lane, token]."""
        return (torch.arange(tokens, device=self.padding.device) - self.padding[lanes, None]).clamp(min=0)

    def _prefill_layer(self, layer: int, first: int, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        """The layer's output; what it was made from goes before the next layer comes."""
        if isinstance(self.slots, StreamedSlots):
            self.slots.keep_prompt(layer, first, x)
        q, k, v, after = prompt_layer(self.fused, layer, x, positions, padding if self.padded else None)
        self.slots.start(layer, first, q, k, v)
        return after

    def _warm_up(self) -> None:
        """A layer of one prompt, so that the first one waits for no compiler."""
        positions = torch.arange(self.plan.setting.workload.prompt_tokens, device=self.decoder.device)[None]
        x = self.decoder.embed(torch.zeros_like(positions), positions)
        self._prefill_layer(0, 0, x, positions, self.padding[:1])

    @torch.inference_mode()
    def decode(self, first: int, last: int, on_step: Callable[[int], None] | None = None) -> float:
        """Rows ``first`` to before ``last``; seconds."""
        with _Stopwatch(self.decoder.device) as watch:
            self.step.seek(first)
            for row in range(first, last):
                if on_step:
                    on_step(row)
                self.step.replay()
        return watch.seconds


def in_place(decoder: Decoder) -> Decoder:
    """``decoder`` with its streamed layers where a captured step finds them; itself where all weights are in HBM."""
    layers = decoder.weights.layers
    if not isinstance(layers, StreamedLayers):
        return decoder
    weights = replace(decoder.weights, layers=layers.in_place())
    kind, on_host = decoder.weight_format, decoder.weights_on_host
    return Decoder(decoder.config, weights, weight_format=kind, weights_on_host=on_host)


def slots_kind(plan: Plan) -> type[DenseSlots] | type[QuantisedSlots] | type[WindowSlots] | type[RecallSlots]:
    """Of a step that is captured."""
    selector = plan.setting.attention.selector
    if selector is Selector.SWA:
        if plan.setting.kv_format.are_native:
            return RecentSlots if keeps_newest(plan) else WindowSlots
        return QuantisedRecentSlots if keeps_newest(plan) else QuantisedWindowSlots
    if selector is Selector.PAGES:
        return RecallSlots
    return DenseSlots if plan.setting.kv_format.are_native else QuantisedSlots


class _Stopwatch:
    """Seconds on the device between entry and exit."""

    seconds: float

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)

    def __enter__(self) -> "_Stopwatch":
        self.clock.mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.clock.mark()
        self.seconds = self.clock.seconds()[-1]
