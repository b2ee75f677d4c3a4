"""The prompts' pass: a layer over whole sequences, and what the first step will attend to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.attention import attend_prompt
from runtime.ledger import Ledger
from runtime.models import Decoder
from runtime.selectors import LayerSelector
from sim.footprint import PREFILL_CHUNK_TOKENS, prefill_rows


def prompt_layer(
    decoder: Decoder, layer: int, x: Tensor, positions: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and output of a layer, in passes of whole sequences, or of parts of long ones.

    ``padding`` None: every prompt is whole.
    """
    if padding is None and x.shape[1] > PREFILL_CHUNK_TOKENS:
        return _long_prompt_layer(decoder, layer, x, positions)
    size, scale = prefill_rows(x.shape[0], x.shape[1]) // x.shape[1], decoder.spec.head_dim**-0.5
    if size >= x.shape[0]:
        q, k, v = decoder.project(layer, x, positions)
        return q, k, v, decoder.finish(layer, x, attend_prompt(q, k, v, padding, scale))
    q, k, v, after = _rows_of(decoder, x)
    for at in range(0, x.shape[0], size):
        some = slice(at, at + size)
        q[some], k[some], v[some] = decoder.project(layer, x[some], positions[some])
        here = None if padding is None else padding[some]
        attended = attend_prompt(q[some], k[some], v[some], here, scale)
        after[some] = decoder.finish(layer, x[some], attended)
    return q, k, v, after


def _rows_of(decoder: Decoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for query, key, value and output of all tokens."""
    spec, tokens = decoder.spec, x.shape[:2]
    q = x.new_empty((*tokens, spec.heads, spec.head_dim))
    k, v = (x.new_empty((*tokens, spec.kv_heads, spec.head_dim)) for _ in range(2))
    return q, k, v, torch.empty_like(x)


def _long_prompt_layer(
    decoder: Decoder, layer: int, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same chunk by chunk of tokens, each attending to those before it: no more than a chunk's activations are held."""
    scale = decoder.spec.head_dim**-0.5
    q, k, v, after = _rows_of(decoder, x)
    for at in range(0, x.shape[1], PREFILL_CHUNK_TOKENS):
        chunk = slice(at, min(at + PREFILL_CHUNK_TOKENS, x.shape[1]))
        q[:, chunk], k[:, chunk], v[:, chunk] = decoder.project(layer, x[:, chunk], positions[:, chunk])
        attended = attend_prompt(q[:, chunk], k[:, : chunk.stop], v[:, : chunk.stop], None, scale)
        after[:, chunk] = decoder.finish(layer, x[:, chunk], attended)
    return q, k, v, after


class Alike(NamedTuple):
    """Prompts of one length, side by side among a pass's rows; ``padding`` [sequence] None: every one is whole."""

    sequences: int
    tokens: int
    padding: Tensor | None

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens


def unlike_layer(
    decoder: Decoder, layer: int, x: Tensor, positions: Tensor, some: Sequence[Alike]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of each kind [sequence, token, head, channel], and output of a layer, of prompts of several lengths: their
    rows ``x`` [1, row, hidden] go through its products together, and each kind attends for itself.
    """
    if len(some) == 1:
        shape = (some[0].sequences, some[0].tokens)
        _, k, v, after = prompt_layer(decoder, layer, x.view(*shape, -1), positions.view(shape), some[0].padding)
        return [(k, v)], after.flatten(0, 1)[None]
    scale, kept = decoder.spec.head_dim**-0.5, list[tuple[Tensor, Tensor]]()
    rows, projected = [one.rows for one in some], decoder.project(layer, x, positions)
    attended = torch.empty_like(projected[0], memory_format=torch.contiguous_format)
    parts = (torch.split(tensor[0], rows) for tensor in (attended, *projected))
    for one, there, *here in zip(some, *parts, strict=True):
        queries, keys, values = (part.unflatten(0, (one.sequences, one.tokens)) for part in here)
        there.view(queries.shape).copy_(attend_prompt(queries, keys, values, one.padding, scale))
        kept.append((keys, values))
    return kept, decoder.finish(layer, x, attended)


def first_picks(ledger: Ledger, selector: LayerSelector) -> Tensor:
    """What row 1 will attend to, [lane, position]: of the older tokens as many may be candidates as live on."""
    counts, older = ledger.counts, ledger.older(0)
    living = selector.picks(0, older, counts.cached[0] - counts.dead[0] - counts.local[0])
    candidates = ledger.older(1) & (living | ~older)
    return selector.picks(1, candidates, counts.selected[1])
