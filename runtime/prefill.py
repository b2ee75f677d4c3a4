"""The prompts' pass: a layer over whole sequences, and what the first step will attend to."""

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
    passes = []
    for at in range(0, x.shape[0], size):
        rows, where = x[at : at + size], positions[at : at + size]
        q, k, v = decoder.project(layer, rows, where)
        attended = attend_prompt(q, k, v, None if padding is None else padding[at : at + size], scale)
        passes.append((q, k, v, decoder.finish(layer, rows, attended)))
    q, k, v, after = (torch.cat(parts) if len(passes) > 1 else parts[0] for parts in zip(*passes, strict=True))
    return q, k, v, after


def _long_prompt_layer(
    decoder: Decoder, layer: int, x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same chunk by chunk of tokens, each attending to those before it: no more than a chunk's activations are held."""
    after, scale = torch.empty_like(x), decoder.spec.head_dim**-0.5
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for at in range(0, x.shape[1], PREFILL_CHUNK_TOKENS):
        chunk = slice(at, at + PREFILL_CHUNK_TOKENS)
        seen.append(decoder.project(layer, x[:, chunk], positions[:, chunk]))
        k, v = (torch.cat(parts, dim=1) for parts in list(zip(*seen, strict=True))[1:])
        attended = attend_prompt(seen[-1][0], k, v, None, scale)
        after[:, chunk] = decoder.finish(layer, x[:, chunk], attended)
    q = torch.cat([part[0] for part in seen], dim=1)
    return q, k, v, after


def first_picks(ledger: Ledger, selector: LayerSelector) -> Tensor:
    """What row 1 will attend to, [lane, position]: of the older tokens as many may be candidates as live on."""
    counts, older = ledger.counts, ledger.older(0)
    living = selector.picks(0, older, counts.cached[0] - counts.dead[0] - counts.local[0])
    candidates = ledger.older(1) & (living | ~older)
    return selector.picks(1, candidates, counts.selected[1])
