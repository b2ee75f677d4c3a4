"""Where a row's staging lies in the block of ``runtime.graph.streamed``, and the tables in which a step looks that up."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.graph.schedule import Layout

if TYPE_CHECKING:
    from runtime.graph.streamed import StreamedSlots


class Staging:
    """Views of the end of the block, and the ``places`` where they begin: ``recomputed`` [token, lane, key or value, head,
    channel] and each of ``inputs`` [token, lane, hidden] in the compute type, each buffer of ``fetched`` [token, *row].

    What is recomputed comes last: where it lies, for which a prefix is captured, follows from the number of its tokens.
    """

    def __init__(self, slots: "StreamedSlots", layout: Layout) -> None:
        self.layout, lanes, widths = layout, slots.lanes, slots.widths
        spec, kind = slots.decoder.spec, slots.decoder.dtype
        at = slots.block.numel() - widths.staged(layout) * lanes

        def taken(tokens: int, width: int) -> Tensor:
            nonlocal at
            at += tokens * width * lanes
            return slots.block[at - tokens * width * lanes : at]

        again, hidden = layout.recomputed, spec.hidden if widths.inputs else 0
        rings, brought = range(slots.buffers), at
        self.fetched = [taken(layout.fetched, widths.kv).view(layout.fetched, *slots.rows.shape) for _ in rings]
        self.inputs = [taken(again, widths.inputs).view(kind).view(again, lanes, hidden) for _ in rings]
        self.inputs_at, self.fetched_at = ([one.data_ptr() for one in ring] for ring in (self.inputs, self.fetched))
        self.places = (at, brought, layout.fetched * widths.kv * lanes)
        self.recomputed = taken(again, widths.again).view(kind).view(again, lanes, 2, spec.kv_heads, spec.head_dim)


def places_of(slots: "StreamedSlots", device: torch.device) -> Tensor:
    """[row, 7]: tokens held, recomputed and fetched, the newborn one's slot, then where staging begins in the block: what is
    recomputed, the first buffer of what is fetched, and from each of those to the next.
    """
    rows = [
        (
            len(row.positions),
            row.recomputed,
            row.fetched,
            row.newborn,
            *Staging(slots, row.layout).places,
        )
        for row in slots.schedule.rows.values()
    ]
    return torch.tensor([(0,) * 7, *rows], dtype=torch.int64, device=device)


def table_of(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """[row, slot], filled up with zeros; row 0 is the prefill, which asks for none."""
    width = max((len(row) for row in rows), default=1)
    return torch.tensor([[*row, *(0,) * (width - len(row))] for row in ((), *rows)], dtype=torch.int32, device=device)
