"""One wave: sequences that are prefilled and decoded together, every layer's attention through the tiered cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.attention import Part, attend, attend_prompt
from runtime.cache import TieredCache
from runtime.fetches import Prefetcher
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.prefill import first_picks, prompt_layer
from runtime.recorder import Recorder
from runtime.sampling import Sampler
from runtime.selectors import Scope, layer_selector
from sim.plan import Plan, Recompute


class BudgetExceeded(Exception):
    """A run needed more memory for KV than its plan has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """``tokens`` [sequence, token], those of short prompts at the end; the first ``padding`` [sequence] are none."""

    tokens: Tensor
    padding: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveOptions:
    """See ``runtime.execute.Options``."""

    per_head: bool
    published_ranges: bool
    overlap: bool


class Wave:
    """Runs ``prompts`` under ``plan``. Nothing is read back before a step has ended."""

    def __init__(
        self,
        plan: Plan,
        decoder: Decoder,
        prompts: Prompts,
        recorder: Recorder,
        *,
        options: WaveOptions,
    ) -> None:
        spec, setting = decoder.spec, plan.setting
        self.plan, self.decoder, self.prompts, self.recorder = plan, decoder, prompts, recorder
        self.counts, self.scale = setting.token_counts, spec.head_dim**-0.5
        self.lanes = Lanes.of(spec, prompts.tokens.shape[0], per_head=options.per_head)
        self.cache = TieredCache(
            plan,
            decoder,
            self.lanes,
            prompts.padding,
            published_ranges=options.published_ranges,
            overlap=options.overlap,
        )
        self.fetches = Prefetcher(plan, self.cache, overlap=options.overlap)
        self.selectors = [layer_selector(self._scope()) for _ in range(spec.layers)]
        self.recalls = setting.attention.selector.recalls

    def run(self, sampler: Sampler, stop_tokens: tuple[int, ...], on_step: Callable[[int], None]) -> Tensor:
        """Generated tokens, [sequence, step]; fewer steps than planned where every sequence has ended before."""
        logits = self._prefill()
        generated: list[Tensor] = []
        ended = torch.zeros(self.lanes.sequences, dtype=torch.bool, device=self.decoder.device)
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=ended.device)
        for row in range(self.plan.setting.workload.output_tokens):
            if row:
                logits = self._step(row, generated[-1])
            self.cache.write_back.last.wait()  # a step ends when all three streams have ended
            self.fetches.stream.last.wait()
            self.recorder.end_step(row, logits)
            generated.append(sampler.choose(logits, row))
            self._require_slots(row)
            on_step(row)
            ended |= torch.isin(generated[-1], stops)
            if stop_tokens and bool(ended.all()):
                break
        return torch.stack(generated, dim=1)

    def _prefill(self) -> Tensor:
        """Row 0: the prompts, densely, layer by layer; what the plan has elsewhere leaves HBM at once."""
        tokens, padding = self.prompts.tokens, self.prompts.padding
        positions = (torch.arange(tokens.shape[1], device=padding.device) - padding[:, None]).clamp(min=0)
        x = self.decoder.embed(tokens, positions)
        self.recorder.begin_step(0)
        for layer in range(self.decoder.spec.layers):
            self.recorder.begin_layer(0, layer)
            self._come(0, layer)
            q, k, v, after = prompt_layer(self.decoder, layer, x, positions, padding)
            self._place_prompt(layer, x, self.lanes.queries(q), self.lanes.keys(k), self.lanes.keys(v))
            x = after
            self.recorder.end_layer(0, layer)
        return self.decoder.logits(x[:, -1:])[:, 0]

    def _come(self, row: int, layer: int) -> None:
        self.fetches.ahead_of(row, layer)
        if self.fetches.weights:
            self.recorder.streamed(row)

    def _place_prompt(self, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Homes of row 0, then those of row 1. What the first step will attend to is settled first: it must not die."""
        ledger, selector = self.cache.ledgers[layer], self.selectors[layer]
        selector.start(q, k)
        ledger.want(0, torch.zeros_like(ledger.alive))
        at_start, first = ledger.wanted, self._first_picks(layer)
        if first is not None:
            ledger.want(1, first)
        wanted, ledger.wanted = ledger.wanted, at_start
        ledger.bury(0)
        self.cache.begin(layer, x, k, v)
        ledger.wanted = wanted
        if self.plan.homes.steps > 1:
            ledger.bury(1)
            self.cache.settle(1, layer)

    def _first_picks(self, layer: int) -> Tensor | None:
        """None where picks wait for the query."""
        if self.recalls or self.plan.homes.steps == 1:
            return None
        return first_picks(self.cache.ledgers[layer], self.selectors[layer])

    def _step(self, row: int, tokens: Tensor) -> Tensor:
        """A decode step: logits [sequence, vocab] after ``tokens`` [sequence]."""
        positions = (self.counts.cached[row] - 1 - self.prompts.padding)[:, None]
        self.recorder.begin_step(row)
        x = self.decoder.embed(tokens[:, None], positions)
        prefix = _Prefix(self.plan, self.decoder, self.prompts, row)
        for layer in range(self.decoder.spec.layers):
            self.recorder.begin_layer(row, layer)
            self._come(row, layer)
            q, k, v = self.decoder.project(layer, x, positions)
            attended = self._attend(row, layer, x, self.lanes.queries(q)[:, 0], k, v, prefix)
            x = self.decoder.finish(layer, x, self.lanes.merge(attended))
            self.recorder.end_layer(row, layer)
        return self.decoder.logits(x)[:, 0]

    def _attend(self, row: int, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix: "_Prefix") -> Tensor:
        cache, selector, ledger = self.cache, self.selectors[layer], self.cache.ledgers[layer]
        k, v = self.lanes.keys(k), self.lanes.keys(v)
        selector.bear(row, k)
        if self.recalls:
            ledger.want(row, selector.picks(row, ledger.older(row), self.counts.selected[row], q))
            cache.release(row, layer)
        cache.bear(row, layer, x, k, v)
        parts = cache.parts(row, layer, self.fetches.staged(row, layer)) + prefix.parts(layer)
        attended, weights = attend(q, parts, self.scale)
        self.recorder.selected(row, layer, ledger, self.counts)
        if self.recorder.record.mass:
            self._weigh(row, layer, q)
        if selector.needs_weights:
            selector.observe(row, _by_position(weights, parts, self.counts.cached[-1]))
        if row + 1 < self.plan.homes.steps:
            self._settle(row + 1, layer)
        return attended

    def _weigh(self, row: int, layer: int, q: Tensor) -> None:
        """Note how much of its attention to all living tokens the step's query pays to those it attends to."""
        parts = self.cache.everything(row, layer)
        _, weights = attend(q, parts, self.scale)
        paid = _by_position(weights, parts, self.counts.cached[-1])[:, :-1] * self.cache.ledgers[layer].wanted
        self.cache.tally.add(row, layer, mass=paid / (q.shape[1] * q.shape[2]))

    def _settle(self, row: int, layer: int) -> None:
        """Choose what ``row`` will attend to, where that is known by now, and bring homes up to it."""
        ledger, selector = self.cache.ledgers[layer], self.selectors[layer]
        if not self.recalls:
            ledger.want(row, selector.picks(row, ledger.older(row), self.counts.selected[row]))
        ledger.bury(row)
        self.cache.settle(row, layer)

    def _scope(self) -> Scope:
        return Scope(
            attention=self.plan.setting.attention,
            counts=self.counts,
            padding=self.lanes.spread(self.prompts.padding),
            dtype=self.decoder.dtype,
            scale=self.scale,
        )

    def _require_slots(self, row: int) -> None:
        pools = self.cache.hbm.pool, self.cache.host.pool
        if any(bool(pool.overflowed.any()) for pool in pools):
            raise BudgetExceeded(f"KV overflows its slots at step {row}: more tokens than the plan has room for")


class _Prefix:
    """Tokens at the front that have no home: forwarded through every layer anew, beside the step."""

    def __init__(self, plan: Plan, decoder: Decoder, prompts: Prompts, row: int) -> None:
        self.decoder, self.padding = decoder, prompts.padding
        self.tokens = plan.homes.dropped[row] if plan.setting.recompute is Recompute.TOKENS else 0
        if self.tokens:
            at = torch.arange(self.tokens, device=prompts.padding.device)
            self.positions = (at - prompts.padding[:, None]).clamp(min=0)
            self.real = at >= prompts.padding[:, None]
            self.x = decoder.embed(prompts.tokens[:, : self.tokens], self.positions)

    def parts(self, layer: int) -> list[Part]:
        """Keys and values of one layer; layers are asked for in order."""
        if not self.tokens:
            return []
        q, k, v = self.decoder.project(layer, self.x, self.positions)
        attended = attend_prompt(q, k, v, self.padding, self.decoder.spec.head_dim**-0.5)
        self.x = self.decoder.finish(layer, self.x, attended)
        at = torch.arange(self.tokens, device=k.device).expand(k.shape[0], -1)
        return [Part.of(k, v, at, self.real)]


def _by_position(weights: Tensor, parts: list[Part], positions: int) -> Tensor:
    """Weights [lane, head, group, token] over ``parts``, heads summed, as [lane, position + 1]."""
    at = torch.cat([part.positions for part in parts], dim=-1)
    summed = weights.sum((1, 2))
    return summed.new_zeros(at.shape[0], positions + 1).scatter_add_(-1, at, summed)
