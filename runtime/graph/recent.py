"""Sparse window attention as published: HBM holds the newest tokens, the host those that are older.

What a step attends to of the latter is fetched at every step, a layer's share while layers before it compute: a step is
chosen by the one before it, so all is known in time. The contract is that of ``sim.pipeline``, on both sides of a step's
end: the last of a step fetch for the first layers of the next one, which a wave's first step has from its prefill.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.graph.launch import power_of_two
from runtime.graph.taking_in import Prompt, score_bits, weigh
from runtime.graph.window import Entries, WindowSlots
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.streams import Done, SideStream
from runtime.tally import Tally
from sim.capture import CHOOSING_WARPS, WEIGHED_TOGETHER
from sim.plan import Plan
from sim.slots import Room, buffers, host_slots_by

_GATHERING = 16  # programs, each with 16 KB under way: some times what fills a link of 55 GB/s and 1.5 us
_UNDER_WAY = 8192  # bytes of keys, and as many of values, that one of them reads at once
_TOGETHER = 2048  # of them, at most, of one token


class Expected(NamedTuple):
    """Of every layer and lane, what the coming step has from the host: the slots there of ``staged`` tokens, and all in all."""

    sources: Tensor  # [layer, lane, row]
    staged: Tensor  # [layer, lane]
    fetched: Tensor


class RecentSlots(WindowSlots):
    """Besides ``WindowSlots``': a stage of ``prefetch_layers`` + 1 buffers, keys and values [buffer, lane, head, row, channel].

    The buffer of layer l is l mod that number: where that does not divide the layers, what comes for the next step waits for
    layers somewhat nearer the end. What finds no row in the stage, attention reads where it lies.
    """

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        super().__init__(plan, decoder, lanes, padding, row)
        device, layers = decoder.device, decoder.spec.layers
        self.depth, self.rows = buffers(plan) - 1, self.room.rows
        self.stage = self._staged()
        self.kept = torch.tensor([*self.in_hbm, self.in_hbm[-1]], dtype=torch.int32, device=device)
        numbers = [torch.zeros((layers, lanes.count), dtype=torch.int32, device=device) for _ in range(2)]
        sources = torch.zeros((layers, lanes.count, self.rows), dtype=torch.int32, device=device)
        self.expected = Expected(sources, *numbers)
        self.fetching = SideStream(device, overlap=True)
        self.arrived = [Done()] * layers

    def _tiers(self) -> tuple[int, int]:
        self.room = Room.of(self.plan)
        self.in_hbm = [min(tokens, self.room.slots) for tokens in self.plan.homes.hbm]
        if self.counts.dead[-1]:
            return self.room.slots, host_slots_by(self.plan)[-1]
        return self.room.slots, max(n - kept for n, kept in zip(self.counts.cached, self.in_hbm, strict=True))

    @property
    def kv_bytes(self) -> int:
        return super().kv_bytes + sum(plane.numel() * plane.element_size() for plane in self.stage)

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().start(layer, first, q, k, v)
        if layer < self.depth and first + k.shape[0] == self.lanes.count:
            self._gather(layer)

    def begin_step(self) -> None:
        """The layers before this one are there already."""
        super().begin_step()
        self._fetch(self.depth)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        self.arrived[layer].wait()
        super().attend(layer, q, k, v, attended)
        self._fetch(layer + self.depth + 1)  # its buffer has just been read

    def _elsewhere(self, layer: int) -> dict[str, tuple[Tensor, ...]]:
        buffer = layer % (self.depth + 1)
        far, staged = (plane[layer] for plane in self._away()), (plane[buffer] for plane in self.stage)
        return {"far": tuple(far), "staged": tuple(staged)}

    def _away(self) -> tuple[Tensor, ...]:
        """What the host holds, as planes of which the stage has some rows."""
        return self.host_keys, self.host_values

    def _staged(self) -> tuple[Tensor, ...]:
        """Room for rows of those planes."""
        spec, first = self.decoder.spec, (self.depth + 1, self.lanes.count)
        shape = (*first, spec.kv_heads, self.rows, spec.head_dim)
        keys, values = (torch.zeros(shape, dtype=self.decoder.dtype, device=self.decoder.device) for _ in range(2))
        return keys, values

    def _fetch(self, layer: int) -> None:
        if layer < len(self.arrived):
            with self.fetching.work():
                self._gather(layer)
            self.arrived[layer] = self.fetching.last

    def settle(self, layer: int) -> None:
        """Choose for the next step, write what leaves HBM; fetch for the next step where this layer's buffer is read no more."""
        super().settle(layer)
        buffer, layers = layer % (self.depth + 1), len(self.arrived)
        if buffer < self.depth and layer + self.depth + 1 >= layers:
            with self.fetching.work():
                self._gather(buffer)
        if layer == layers - 1:
            self.fetching.last.wait()  # the step waits for this stream only
            self.arrived = [Done()] * layers

    def _settle(self, layer: int, state: Entries) -> None:
        expected = self._expected(layer)
        kernels().settle[(self.lanes.count,)](
            *self._known(layer, state),
            self.kept,
            state.moves,
            state.move_counts,
            *expected,
            self.launcher.queries,
            self.width,
            state.ring.shape[1],
            self.entries,
            self.table.shape[1],
            self.near,
            self.far,
            self.rows,
            ENTRIES=power_of_two(self.entries),
            CHUNK=WEIGHED_TOGETHER,
            num_warps=CHOOSING_WARPS,
        )

    def _gather(self, layer: int) -> None:
        spec, lanes, expected, planes = (
            self.decoder.spec,
            self.lanes.count,
            self._expected(layer),
            self._elsewhere(layer),
        )
        (keys, values, *others), (far_keys, far_values, *far_others) = planes["staged"], planes["far"]
        size, heads = keys.element_size(), spec.kv_heads
        width = min(_TOGETHER // size, power_of_two(heads * spec.head_dim))
        chunks = -(-heads * spec.head_dim // width)
        programs = -(-_GATHERING // chunks)
        ranges, far_ranges = (rows[0].view(torch.int32) if rows else keys for rows in (others, far_others))
        kernels().gather[programs, chunks](
            expected.sources,
            expected.staged,
            far_keys,
            far_values,
            far_ranges,
            keys,
            values,
            ranges,
            lanes,
            -(-programs // lanes),
            heads,
            self.far,
            self.rows,
            CHANNELS=spec.head_dim,
            HEADS=power_of_two(heads),
            WIDTH=width,
            TOKENS=_UNDER_WAY // size // width,
            RANGED=bool(others),
            num_warps=4,
        )

    def _choose(self, weights: Tensor, prompt: Prompt) -> None:
        window, state = self.window, self.state
        lanes, queries, tokens = weights.shape
        padding, counts = self.launcher.padding, self.counts
        kernels().choose_newest[(lanes,)](
            weigh(window, weights, prompt, padding),
            state.rank,
            state.slots,
            state.counts,
            state.position,
            state.last,
            state.place,
            *self.expected,
            padding,
            prompt.first_lane,
            prompt.first_row,
            lanes,
            tokens,
            self.entries,
            self.width,
            *window.older,
            window.older[0] - counts.dead[0],
            counts.selected[1],
            counts.dead[1],
            window.attended,
            counts.dead[0],
            self.in_hbm[0],
            self.in_hbm[1] - 1,
            self.near,
            self.rows,
            TOKENS=power_of_two(tokens),
            ENTRIES=power_of_two(self.entries),
            BITS=score_bits(self.launcher.queries, queries),
            num_warps=4 if tokens <= 2048 else 16,
        )

    def _expected(self, layer: int) -> Expected:
        return Expected(*(tensor[layer] for tensor in self.expected))

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        """As the eager runtime counts: what ``row`` wrote, and what the next one fetches and, if asked, picks."""
        if row + 1 == self.plan.homes.steps:
            return
        if tally.selections:
            self._count_picks(row + 1, tally, lanes)
        state = self.state
        written = state.move_counts[:, :lanes, None]
        if row == 0:
            written = (state.position[:, :lanes] >= 0) & (state.place[:, :lanes] >= self.near)
        tally.add_all(row, written=written)
        tally.add_all(row + 1, fetched=self.expected.fetched[:, :lanes, None])


def kernels() -> ModuleType:
    """The module of kernels, imported where they first run: machines without a GPU may lack Triton."""
    from runtime.graph import recent_kernels as module

    return module
