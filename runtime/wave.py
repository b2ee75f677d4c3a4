"""One wave: sequences that are prefilled and decoded together, every layer's attention through the tiered cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """``tokens`` [sequence, token], those of short prompts at the end; the first ``padding`` [sequence] are none.

    ``whole``: it is known, without asking the device, that there is no padding.
    """

    tokens: Tensor
    padding: Tensor
    whole: bool = False

    @property
    def hidden(self) -> Tensor | None:
        """The padding, where there may be some: without, attention needs no mask of tokens by tokens."""
        return None if self.whole else self.padding


def padded(prompts: Sequence[Sequence[int]], length: int, device: torch.device) -> Prompts:
    """``prompts`` at the end of rows of ``length``."""
    tokens = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    padding = [length - len(prompt) for prompt in prompts]
    return Prompts(
        tokens=torch.tensor(tokens, device=device),
        padding=torch.tensor(padding, device=device),
        whole=not any(padding),
    )


def until_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Up to the first stop token, that one included."""
    end = next((place for place, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tuple(tokens[: end + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveOptions:
    """See ``runtime.options.Options``; ``by_page`` takes HBM page by page as tokens come instead of all at once."""

    per_head: bool
    published_ranges: bool
    overlap: bool
    by_page: bool = False


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
            by_page=options.by_page,
        )
        self.fetches = Prefetcher(plan, self.cache, overlap=options.overlap)
        self.selectors = [layer_selector(self._scope()) for _ in range(spec.layers)]
        self.recalls = setting.attention.selector.recalls

    def run(self, sampler: Sampler, stop_tokens: tuple[int, ...], on_step: Callable[[int], None]) -> Tensor:
        """Generated tokens, [sequence, step]; fewer steps than planned where every sequence has ended before."""
        logits = self.prefill()
        generated: list[Tensor] = []
        ended = torch.zeros(self.lanes.sequences, dtype=torch.bool, device=self.decoder.device)
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=ended.device)
        for row in range(self.plan.setting.workload.output_tokens):
            if row:
                self.recorder.begin_step(row)
                logits = decode([(self, row)], generated[-1])
            self.cache.write_back.last.wait()  # a step ends when all three streams have ended
            self.fetches.stream.last.wait()
            self.recorder.end_step(row, logits)
            generated.append(sampler.choose(logits, row))
            self.require_slots(row)
            on_step(row)
            ended |= torch.isin(generated[-1], stops)
            if stop_tokens and bool(ended.all()):
                break
        return torch.stack(generated, dim=1)

    def prefill(self) -> Tensor:
        """Row 0: the prompts, densely, layer by layer; what the plan has elsewhere leaves HBM at once."""
        tokens, padding = self.prompts.tokens, self.prompts.padding
        positions = (torch.arange(tokens.shape[1], device=padding.device) - padding[:, None]).clamp(min=0)
        x = self.decoder.embed(tokens, positions)
        self.recorder.begin_step(0)
        for layer in range(self.decoder.spec.layers):
            self.come(0, layer)
            x = self._prefill_layer(layer, x, positions)
            self.recorder.end_layer(0, layer)
        return self.decoder.logits(x[:, -1:])[:, 0]

    def _prefill_layer(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """The layer's output; what it was made from goes before the next layer comes."""
        q, k, v, after = prompt_layer(self.decoder, layer, x, positions, self.prompts.hidden)
        self._place_prompt(layer, x, self.lanes.queries(q), self.lanes.keys(k), self.lanes.keys(v))
        return after

    def come(self, row: int, layer: int) -> None:
        """A layer's turn begins: what is fetched ahead of others starts."""
        self.recorder.begin_layer(row, layer)
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

    def newborn_positions(self, row: int) -> Tensor:
        """[sequence, 1]."""
        return (self.counts.cached[row] - 1 - self.prompts.padding)[:, None]

    def attend(self, row: int, layer: int, inputs: "Inputs") -> Tensor:
        """What one layer's attention gives a decode step, [sequence, 1, query_head, channel]."""
        cache, selector, ledger = self.cache, self.selectors[layer], self.cache.ledgers[layer]
        q = self.lanes.queries(inputs.q)[:, 0]
        k, v = self.lanes.keys(inputs.k), self.lanes.keys(inputs.v)
        selector.bear(row, k)
        if self.recalls:
            ledger.want(row, selector.picks(row, ledger.older(row), self.counts.selected[row], q))
            cache.release(row, layer)
        cache.bear(row, layer, inputs.x, k, v)
        parts = cache.parts(row, layer, self.fetches.staged(row, layer)) + inputs.prefix.parts(layer)
        attended, weights = attend(q, parts, self.scale)
        self.recorder.selected(row, layer, ledger, self.counts)
        if self.recorder.record.mass:
            self._weigh(row, layer, q)
        if selector.needs_weights:
            selector.observe(row, _by_position(weights, parts, self.counts.cached[-1]))
        if row + 1 < self.plan.homes.steps:
            self._settle(row + 1, layer)
        return self.lanes.merge(attended)

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
        return Scope.of(self.plan.setting, self.lanes.spread(self.prompts.padding), self.decoder.dtype)

    def move(self, device: torch.device) -> None:
        """Copy what HBM holds of this wave to ``device``: slots, ranges, open keys, selection state."""
        cache = self.cache
        holders: list[dict[str, Any]] = [cache.hbm.pool.planes, vars(cache.hbm), vars(cache.freezer.open_keys)]
        for holder in [*holders, *(vars(selector) for selector in self.selectors)]:
            for name, value in holder.items():
                if isinstance(value, Tensor):
                    holder[name] = value.to(device, copy=True)

    def require_slots(self, row: int) -> None:
        """Raise BudgetExceeded where tokens found no slot."""
        pools = self.cache.hbm.pool, self.cache.host.pool
        if any(bool(pool.overflowed.any()) for pool in pools):
            raise BudgetExceeded(f"KV overflows its slots at step {row}: more tokens than the plan has room for")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A wave's share of a layer's input, [sequence, 1, ...], and its recomputed tokens."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    prefix: "_Prefix"


def decode(waves: Sequence[tuple[Wave, int]], tokens: Tensor) -> Tensor:
    """A decode step of waves, each in a row of its own: logits [sequence, vocab] after ``tokens`` [sequence].

    Matrix products are those of all sequences together; attention is each wave's own affair.
    """
    decoder, sizes = waves[0][0].decoder, [wave.lanes.sequences for wave, _ in waves]
    positions = torch.cat([wave.newborn_positions(row) for wave, row in waves])
    x = decoder.embed(tokens[:, None], positions)
    prefixes = [_Prefix(wave.plan, decoder, wave.prompts, row) for wave, row in waves]
    for wave, row in waves:
        wave.cache.grow(row)
    for layer in range(decoder.spec.layers):
        for wave, row in waves:
            wave.come(row, layer)
        columns = [torch.split(part, sizes) for part in (x, *decoder.project(layer, x, positions))]
        attended = [
            wave.attend(row, layer, Inputs(x=inputs, q=q, k=k, v=v, prefix=prefix))
            for (wave, row), prefix, inputs, q, k, v in zip(waves, prefixes, *columns, strict=True)
        ]
        x = decoder.finish(layer, x, torch.cat(attended))
        for wave, row in waves:
            wave.recorder.end_layer(row, layer)
    return decoder.logits(x)[:, 0]


class _Prefix:
    """Tokens at the front that have no home: forwarded through every layer anew, beside the step."""

    def __init__(self, plan: Plan, decoder: Decoder, prompts: Prompts, row: int) -> None:
        self.decoder, self.hidden = decoder, prompts.hidden
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
        attended = attend_prompt(q, k, v, self.hidden, self.decoder.spec.head_dim**-0.5)
        self.x = self.decoder.finish(layer, self.x, attended)
        at = torch.arange(self.tokens, device=k.device).expand(k.shape[0], -1)
        return [Part.of(k, v, at, self.real)]


def _by_position(weights: Tensor, parts: list[Part], positions: int) -> Tensor:
    """Weights [lane, head, group, token] over ``parts``, heads summed, as [lane, position + 1]."""
    at = torch.cat([part.positions for part in parts], dim=-1)
    summed = weights.sum((1, 2))
    return summed.new_zeros(at.shape[0], positions + 1).scatter_add_(-1, at, summed)
