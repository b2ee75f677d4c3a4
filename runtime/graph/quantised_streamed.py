"""Rows of INT8 where dense tokens stream in, or are computed again, which those in INT8 lie beside as they are computed.

Ranges of keys and the open group's keys stay in HBM, of all tokens: a group is frozen from them once it is complete, and its
levels go to where its tokens are by then.
"""

from math import gcd

import torch
from torch import Tensor

from runtime.graph.launch import power_of_two
from runtime.graph.rounding import round_prompt
from runtime.graph.schedule import Row, Widths
from runtime.graph.streamed_rows import Addressed
from runtime.models import Decoder
from sim.kv import GROUP_TOKENS
from sim.plan import Plan
from sim.slots import head_bytes, key_groups


class RoundedRows:
    """Bytes: levels [lane, key or value, head, channel], then ranges of values [lane, head, 2] in 16 bit."""

    dtype = torch.uint8

    def __init__(self, plan: Plan, decoder: Decoder, lanes: int) -> None:
        self.spec, self.lanes, self.entry_bytes = decoder.spec, lanes, decoder.dtype.itemsize
        self.lane_bytes = self.spec.kv_heads * head_bytes(self.spec.head_dim)
        self.shape: tuple[int, ...] = (lanes * self.lane_bytes,)
        first, channels, device = (self.spec.layers, lanes, self.spec.kv_heads), self.spec.head_dim, decoder.device
        groups = key_groups(plan.setting)
        self.key_ranges = torch.zeros((*first, groups, 2, channels), dtype=torch.float16, device=device)
        self.waiting = torch.zeros((*first, GROUP_TOKENS, channels), dtype=decoder.dtype, device=device)
        self.kv_bytes = self.key_ranges.nbytes + self.waiting.nbytes

    def widths(self, buffers: int, inputs: int) -> Widths:
        return Widths(
            slot=self.spec.layers * self.lane_bytes,
            kv=self.lane_bytes,
            again=2 * self.spec.kv_dim * self.entry_bytes,
            inputs=inputs * self.entry_bytes,
            buffers=buffers,
        )

    def listed(self, row: Row) -> tuple[int, ...]:
        """The slot of each token in HBM, the oldest first: attention takes tokens of a group together."""
        return tuple(sorted(range(len(row.positions)), key=row.positions.__getitem__))

    def planes(self, rows: Tensor) -> tuple[Tensor, ...]:
        spec, tokens, entries = self.spec, rows.shape[0], 2 * self.lanes * self.spec.kv_dim
        levels = rows[:, :entries].view(tokens, self.lanes, 2, spec.kv_heads, spec.head_dim)
        ranges = rows[:, entries:].view(torch.float16).view(tokens, self.lanes, spec.kv_heads, 2)
        return levels[:, :, 0], levels[:, :, 1], ranges

    def stored(self, layer: int, lanes: slice, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Levels of keys whose group is open are 0: they are told when it is complete."""
        return round_prompt(k, v, self.key_ranges[layer, lanes], self.waiting[layer, lanes])

    def attend(self, at: Addressed, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        from runtime.graph import quantised_streamed_kernels as module  # machines without a GPU may lack Triton

        spec, token_bytes = self.spec, self.lanes * self.lane_bytes
        rounded = (at.block, at.block.view(torch.float16))
        keys, listed = (self.key_ranges[at.layer], self.waiting[at.layer]), (at.listed, at.places, at.row)
        kinds = {"GROUP": GROUP_TOKENS, "CHANNELS": spec.head_dim, "PADDED": power_of_two(spec.head_dim)}
        groups, numbers = self.key_ranges.shape[3], (at.listed.shape[1], at.layer, at.layers)
        module.bear[self.lanes, spec.kv_heads](
            k,
            v,
            *rounded,
            at.on_host,
            *keys,
            *listed,
            k.stride(0),
            token_bytes,
            spec.kv_heads,
            groups,
            *numbers,
            at.kept_from,
            ON_HOST=at.on_host.numel() > 0,
            num_warps=4,
            **kinds,
        )
        widths = at.widths
        module.attend[spec.heads, self.lanes](
            q,
            *rounded,
            at.block.view(attended.dtype),
            *keys,
            *listed,
            at.padding,
            attended,
            spec.head_dim**-0.5,
            q.stride(0),
            token_bytes,
            spec.heads,
            spec.kv_heads,
            groups,
            *numbers,
            BUFFERS=at.buffers,
            FROM_FRONT=at.from_front,
            UNIT=gcd(16, *(self.lanes * width for width in (widths.kv, widths.again, widths.inputs))),
            WIDTH=self.entry_bytes,
            BLOCK=32,
            num_warps=1,
            **kinds,
        )
