"""Dense attention over tokens that stream in, layer after layer: as keys and values, or as inputs to project again.

Which tokens a layer lacks is known before the run and the oldest lie on the host as one block, so the copy engine brings
them, as many layers ahead as the ring has buffers. Such a step takes tens of milliseconds: it is launched, not captured,
with lengths that are known without asking the device. Its memory in HBM is what the plan says, staging included.
"""

import torch
from torch import Tensor

from runtime.graph.launch import power_of_two
from runtime.graph.pinned import shared
from runtime.graph.schedule import Layout, Row, Widths, schedule_of
from runtime.graph.step import DecodeStep
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.streams import Done, SideStream
from sim.plan import Plan, WriteBack

_PROJECTED_ROWS = 8192  # at once: enough for the matrix units' full rate, and few to hold normed


class StreamedSlots:
    """HBM: slots [slot, layer, lane, key or value, head, channel], then staging. On the host keys and values
    [layer, position, lane, key or value, head, channel] and inputs [layer, position, lane, hidden].
    """

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor) -> None:
        spec, device, dtype = decoder.spec, decoder.device, decoder.dtype
        self.plan, self.decoder, self.lanes, self.layers = plan, decoder, lanes.count, spec.layers
        self.buffers = min(plan.setting.prefetch_layers + 1, spec.layers)
        kv = 2 * spec.kv_dim
        self.widths = Widths(slot=spec.layers * kv, kv=kv, inputs=spec.hidden, buffers=self.buffers)
        self.schedule = schedule_of(plan, self.widths)
        self.block = torch.zeros(self.schedule.elements * self.lanes, dtype=dtype, device=device)
        row, most = (self.lanes, 2, spec.kv_heads, spec.head_dim), max(plan.homes.hbm)
        self.slots = self.block[: most * self.widths.slot * self.lanes].view(most, spec.layers, *row)
        self.host_kv = shared(device, (spec.layers, self.schedule.kept_to - self.schedule.kept_from, *row), dtype)
        self.saved = plan.saved_inputs_tokens
        self.host_inputs = shared(device, (spec.layers, self.saved, self.lanes, spec.hidden), dtype)
        self.newborn = torch.zeros((spec.layers, self.lanes, spec.hidden), dtype=dtype, device=device)
        self.padding = padding.to(torch.int32)
        at = torch.arange(max(1, self.saved), device=device)[:, None]
        self.positions = (at - padding).clamp(min=0)  # [position, lane], as the decoder encodes them
        self.held = _table([row.positions for row in self.schedule.rows.values()], device)
        self.reads, self.writes = (SideStream(device, overlap=True) for _ in range(2))
        self.staging = _Staging(self, Layout(recomputed=0, fetched=0))
        self.now = 0
        self.pending: dict[int, Done] = {}  # by place: row * layers + layer

    @property
    def kv_bytes(self) -> int:
        """Of HBM, staging included."""
        return self.block.numel() * self.block.element_size()

    def keep_prompt(self, layer: int, first: int, x: Tensor) -> None:
        """Save inputs of some lanes' prompts, those from ``first`` on: [lane, token, hidden]."""
        kept = x[:, : self.saved].transpose(0, 1)
        self.host_inputs.device[layer, : kept.shape[0], first : first + x.shape[0]] = kept

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        self._forget()
        lanes, tokens = slice(first, first + k.shape[0]), k.shape[1]
        off = tokens - self.plan.homes.hbm[0]
        written = self._written_prompt(tokens)
        base = self.schedule.kept_from
        for part, rows in enumerate((k, v)):
            self.slots[: tokens - off, layer, lanes, part] = rows[:, off:].transpose(0, 1)
            there = self.host_kv.device[layer, written.start - base : written.stop - base, lanes, part]
            there.copy_(rows[:, written].transpose(0, 1))

    def seek(self, row: int) -> None:
        """The next step is ``row``."""
        self._forget()
        self.now = row - 1

    def begin_step(self) -> None:
        """Slots and staging of the step, and its first fetches where the step before had no room for them."""
        self.now += 1
        row = self._row
        self.writes.last.wait()
        if self.staging.layout != row.layout:
            self.staging = _Staging(self, row.layout)
        for there, here in row.moves:
            self.slots[here].copy_(self.slots[there])
        for place in range(self.now * self.layers, self.now * self.layers + self.buffers):
            if place not in self.pending:
                self._fetch(place)

    def keep(self, layer: int, x: Tensor) -> None:
        """Save the newborn tokens' inputs [lane, hidden], unless they are never asked for."""
        position = self._cached - 1
        if position < self.saved:
            self.newborn[layer].copy_(x)
            with self.writes.work():
                self.host_inputs.host[layer, position].copy_(self.newborn[layer], non_blocking=True)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        place = self.now * self.layers + layer
        self.pending.pop(place).wait()
        buffer = place % self.buffers
        self._project(layer, buffer)
        self._launch(layer, q, k, v, self.staging.fetched[buffer], attended)
        if self._row.written:
            with self.writes.work():
                for position, slot in self._row.written:
                    there = self.host_kv.host[layer, position - self.schedule.kept_from]
                    there.copy_(self.slots[slot, layer], non_blocking=True)
        self._fetch(place + self.buffers)

    def settle(self, layer: int) -> None:
        """Nothing is chosen."""

    def picks(self) -> list[list[tuple[int, ...]]]:
        """Of every layer, none."""
        return []

    @property
    def _row(self) -> Row:
        return self.schedule.rows[self.now]

    @property
    def _cached(self) -> int:
        return self.plan.setting.token_counts.cached[self.now]

    def _written_prompt(self, tokens: int) -> slice:
        """Positions of the prompt that the host has as keys and values when decoding begins."""
        homes = self.plan.homes
        if self.plan.setting.write_back is WriteBack.AT_BIRTH:
            return slice(0, tokens)
        if homes.steps == 1 or not homes.host_kv[1]:
            return slice(self.schedule.kept_from, self.schedule.kept_from)
        return slice(homes.activations[1], homes.activations[1] + homes.host_kv[1])

    def _fetch(self, place: int) -> None:
        """Begin to fill the buffer of ``place`` with what its layer and row lack, unless the row is staged elsewhere."""
        number, layer = divmod(place, self.layers)
        row = self.schedule.rows.get(number)
        if row is None or row.layout != self.staging.layout:
            return
        if row.recomputed + row.fetched == 0:
            self.pending[place] = Done()
            return
        first = row.recomputed - self.schedule.kept_from
        with self.reads.work():
            self.writes.last.wait()
            buffer = place % self.buffers
            if row.recomputed:
                here = self.staging.inputs[buffer][: row.recomputed]
                here.copy_(self.host_inputs.host[layer, : row.recomputed], non_blocking=True)
            if row.fetched:
                here = self.staging.fetched[buffer][: row.fetched]
                here.copy_(self.host_kv.host[layer, first : first + row.fetched], non_blocking=True)
        self.pending[place] = self.reads.last

    def _forget(self) -> None:
        """Let fetches end that nobody waits for."""
        self.pending.clear()
        self.reads.last.wait()

    def _project(self, layer: int, buffer: int) -> None:
        """Keys and values of the oldest tokens, from their inputs."""
        tokens = max(1, _PROJECTED_ROWS // self.lanes)
        for first in range(0, self._row.recomputed, tokens):
            some = slice(first, min(first + tokens, self._row.recomputed))
            x, rows = self.staging.inputs[buffer][some], self.staging.recomputed[some].flatten(2)
            self.decoder.reproject(layer, x, self.positions[some], out=rows)

    def _launch(self, layer: int, q: Tensor, k: Tensor, v: Tensor, fetched: Tensor, attended: Tensor) -> None:
        from runtime.graph import streamed_kernels  # machines without a GPU may lack Triton

        spec, row, held = self.decoder.spec, self._row, self.slots[:, layer]
        streamed_kernels.attend[spec.heads, self.lanes](
            q,
            k,
            v,
            held,
            self.held[self.now - 1],
            self.staging.recomputed,
            fetched,
            self.padding,
            attended,
            spec.head_dim**-0.5,
            q.stride(0),
            k.stride(0),
            held.stride(0),
            spec.heads,
            spec.kv_heads,
            len(row.positions),
            row.recomputed,
            row.fetched,
            row.newborn,
            CHANNELS=spec.head_dim,
            PADDED=power_of_two(spec.head_dim),
            BLOCK=32,
            num_warps=1,
        )


class _Staging:
    """Views of the end of the block: ``recomputed`` and each buffer of ``fetched`` [token, lane, key or value, head, channel],
    each of ``inputs`` [token, lane, hidden].
    """

    def __init__(self, slots: StreamedSlots, layout: Layout) -> None:
        self.layout, lanes, widths = layout, slots.lanes, slots.widths
        row = slots.slots.shape[2:]
        at = slots.block.numel() - widths.staged(layout) * lanes

        def taken(tokens: int, width: int) -> Tensor:
            nonlocal at
            at += tokens * width * lanes
            return slots.block[at - tokens * width * lanes : at]

        self.recomputed = taken(layout.recomputed, widths.kv).view(layout.recomputed, *row)
        rings = range(slots.buffers)
        self.inputs = [
            taken(layout.recomputed, widths.inputs).view(layout.recomputed, lanes, widths.inputs) for _ in rings
        ]
        self.fetched = [taken(layout.fetched, widths.kv).view(layout.fetched, *row) for _ in rings]


class StreamedStep(DecodeStep):
    """Launched step by step: Python knows the row, and tells the slots each layer's inputs."""

    slots: StreamedSlots

    def capture(self) -> None:
        """Nothing is captured. On a GPU a step is run, so that its kernels are compiled."""
        if self.decoder.device.type == "cuda" and self.cached.shape[0] > 1:
            self.seek(1)
            self.replay()

    def seek(self, row: int) -> None:
        super().seek(row)
        self.slots.seek(row)

    def _attend(self, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.slots.keep(layer, x.view(self.slots.lanes, -1))
        self.slots.attend(layer, q, k, v, self.attended)


def _table(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """[row, slot], filled up with zeros; each row 16-byte aligned, as a kernel is compiled anew where that changes."""
    width = -(-max((len(row) for row in rows), default=1) // 4) * 4
    return torch.tensor([[*row, *(0,) * (width - len(row))] for row in rows], dtype=torch.int32, device=device)
