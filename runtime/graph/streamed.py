"""Dense attention over tokens that stream in, layer after layer: as keys and values, or as inputs to project again; or that
are forwarded again, from token ids.

Which tokens a layer lacks is known before the run and the oldest lie on the host as one block, so the copy engine brings
them, as many layers ahead as the ring has buffers. The step is captured in pieces, one from each layer's attention to the
next one's; between them the host queues copies, and projects inputs, whose number changes from step to step. A prefix is
forwarded within the pieces, of which there are then as many sets as numbers of tokens. Inputs are saved as a layer's first
norm leaves them, so that none is taken again. What pieces need to know of the row they look up on the device. Memory in HBM
is what the plan says, staging included.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.graph.copy_engine import Block, CopyEngine, Mark, current_stream
from runtime.graph.pinned import shared
from runtime.graph.prefix import Prefix
from runtime.graph.projecting import projection_of
from runtime.graph.quantised_streamed import RoundedRows
from runtime.graph.schedule import Layout, Row, schedule_of
from runtime.graph.staging import Staging, places_of, table_of
from runtime.graph.streamed_rows import Addressed, NativeRows, Rows
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.tally import Tally
from sim.capture import forwarded_tokens
from sim.plan import Plan, Recompute, WriteBack

_PROJECTED_ROWS = 8192  # at once: enough for the matrix units' full rate


class StreamedSlots:
    """HBM: slots [slot, layer, *row], then staging, a block of one kind of elements. On the host keys and values
    [layer, position, *row] and inputs [layer, position, lane, hidden]. A token's row is all lanes': see ``streamed_rows``.
    """

    rounded = False  # as ``schedule_of`` says

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        spec, device, dtype = decoder.spec, decoder.device, decoder.dtype
        self.plan, self.decoder, self.lanes, self.layers, self.row = plan, decoder, lanes.count, spec.layers, row
        self.buffers = min(plan.setting.prefetch_layers + 1, spec.layers)
        forwards = plan.setting.recompute is Recompute.TOKENS  # their layer inputs are activations like a prefill's
        kind = NativeRows if plan.setting.kv_format.are_native else RoundedRows
        self.rows: Rows = kind(plan, decoder, self.lanes)
        self.widths = self.rows.widths(self.buffers, inputs=0 if forwards else spec.hidden)
        self.schedule = schedule_of(plan, self.widths, rounded=self.rounded)
        self.block = torch.zeros(self.schedule.elements * self.lanes, dtype=self.rows.dtype, device=device)
        shape, most = self.rows.shape, max(plan.homes.hbm)
        self.slots = self.block[: most * self.widths.slot * self.lanes].view(most, spec.layers, *shape)
        kept = self.schedule.kept_to - self.schedule.kept_from
        self.host_kv = shared(device, (spec.layers, kept, *shape), self.rows.dtype)
        self.saved = plan.saved_inputs_tokens
        self.host_inputs = shared(device, (spec.layers, self.saved, self.lanes, spec.hidden), dtype)
        self.newborn = torch.zeros((spec.layers, self.lanes, spec.hidden), dtype=dtype, device=device)
        self.padding = padding.to(torch.int32)
        self.prefix = Prefix(plan, decoder, padding) if forwards else None
        self.positions = torch.zeros((self.saved, self.lanes), dtype=torch.int64, device=device)  # as they are encoded
        self.held = table_of([self.rows.listed(there) for there in self.schedule.rows.values()], device)
        self.places = places_of(self, device)
        self.project = projection_of(decoder)
        self.reads, self.writes = CopyEngine(device), CopyEngine(device)
        self.main = current_stream(device)
        self.reached, self.written = Mark(device), Mark(device)  # by the main stream; by what goes to the host
        self.ring = [Mark(device) for _ in range(self.buffers)]  # what comes into each buffer has come
        self.there_kv, self.there_inputs = Block(self.host_kv.host, dims=2), Block(self.host_inputs.host, dims=2)
        self.here, self.born = Block(self.slots, dims=2), Block(self.newborn, dims=1)
        self.staging = Staging(self, Layout(recomputed=0, fetched=0))
        self.again: list[list[_Again]] = []  # of each buffer
        self.now = 0
        self.pending = set[int]()  # places that are being filled, or need nothing: row * layers + layer

    @property
    def kv_bytes(self) -> int:
        """Of HBM, staging included."""
        return self.block.numel() * self.block.element_size() + self.rows.kv_bytes

    def take(self, tokens: Tensor) -> None:
        """The prompts' tokens [lane, token], those of short prompts at the end: some may have to be forwarded again.

        A wave begins here: prefill itself, which may be captured, waits for no other stream.
        """
        self._forget()
        if self.prefix is not None:
            self.prefix.take(tokens)

    def keep_prompt(self, layer: int, first: int, x: Tensor) -> None:
        """Save what some lanes' prompts are projected from, those from ``first`` on; ``x`` are the layer's inputs,
        [lane, token, hidden].
        """
        if not self.saved:
            return
        kept = self.decoder.attention_input(layer, x[:, : self.saved]).transpose(0, 1)
        self.host_inputs.device[layer, : kept.shape[0], first : first + x.shape[0]] = kept

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        lanes, tokens = slice(first, first + k.shape[0]), k.shape[1]
        off = tokens - self.plan.homes.hbm[0]
        written = self._written_prompt(tokens)
        base = self.schedule.kept_from
        here = self.slots[: tokens - off, layer]
        there = self.host_kv.device[layer, written.start - base : written.stop - base]
        planes = zip(self.rows.planes(here), self.rows.planes(there), strict=True)
        for (near, far), rows in zip(planes, self.rows.stored(layer, lanes, k, v), strict=True):
            near[:, lanes] = rows[:, off:].transpose(0, 1)
            far[:, lanes] = rows[:, written].transpose(0, 1)

    def seek(self, row: int) -> None:
        """The next step is ``row``."""
        self._forget()
        self.now = row - 1
        at = torch.arange(self.saved, device=self.padding.device)[:, None]
        self.positions.copy_((at - self.padding).clamp(min=0))

    def advance(self) -> None:
        """Slots and staging of the next row, and its first fetches where the step before had no room for them."""
        self.point(self.now + 1)
        row = self._row
        self.written.hold(self.main)
        self.again = [list(self._at_once(row.recomputed, inputs)) for inputs in self.staging.inputs]
        for there, here in row.moves:
            self.slots[here].copy_(self.slots[there])
        self.reached.put(self.main)
        for place in range(self.now * self.layers, self.now * self.layers + self.buffers):
            if place not in self.pending:
                self._fetch(place)

    def bring(self, layer: int) -> None:
        """What the layer's attention needs, once its fetch has ended."""
        place = self.now * self.layers + layer
        self.pending.remove(place)
        buffer = place % self.buffers
        if self._brings(self._row):
            self.ring[buffer].hold(self.main)
        for one in self.again[buffer]:
            self.project(layer, one.inputs, one.positions, one.rows)

    @property
    def kind(self) -> tuple[int, int]:
        """Of the row at hand: the tokens that are forwarded and where they are staged, for which the step is captured."""
        tokens = 0 if self.prefix is None else self._made_up(self._row)
        return tokens, self.staging.recomputed.data_ptr() if tokens else 0

    def first_rows(self) -> dict[tuple[int, int], int]:
        """A row of each kind, the longest prefix first: others find room in what it took."""
        rows = dict[tuple[int, int], int]()
        for row in reversed(self.schedule.rows):
            self.point(row)
            rows.setdefault(self.kind, row)
        return dict(sorted(rows.items(), reverse=True))

    def point(self, row: int) -> None:
        """What is launched or captured from here on is as ``row`` has it."""
        self.now = row
        if self.staging.layout != self._row.layout:
            self.staging = Staging(self, self._row.layout)

    def _made_up(self, row: Row) -> int:
        """Tokens that are forwarded in ``row``: as many as one of few graphs does, no more than are staged."""
        made_up = forwarded_tokens(row.recomputed, self.plan.setting.workload.prompt_tokens)
        return min(made_up, row.layout.recomputed)

    def leave(self, layer: int) -> None:
        """Once the layer has attended: what goes to the host, and the next fetch into its buffer."""
        position, written = self._cached - 1, self._row.written
        self.reached.put(self.main)
        if written or position < self.saved:
            self.reached.hold(self.writes.stream)
            if position < self.saved:
                self.writes.copy(self.there_inputs.at(layer, position), self.born.at(layer), self.born.size_bytes)
            for kept, slot in written:
                there = self.there_kv.at(layer, kept - self.schedule.kept_from)
                self.writes.copy(there, self.here.at(slot, layer), self.here.size_bytes)
            self.written.put(self.writes.stream)
        self._fetch(self.now * self.layers + layer + self.buffers)

    def begin_step(self) -> None:
        if self.prefix is not None:
            self.prefix.begin(self._made_up(self._row))

    def forward(self, layer: int) -> None:
        """Stage the prefix's keys and values of ``layer``."""
        if self.prefix is not None:
            self.prefix.forward(layer, self.staging.recomputed)

    def warm_up_prefixes(self) -> None:
        """Compile and load what a prefix of each length needs, and let go of what that took."""
        if self.prefix is None:
            return
        for row in self.first_rows().values():
            self.point(row)
            self.begin_step()
            self.forward(0)
        self.prefix.begin(0)

    def keep(self, layer: int, inputs: Tensor) -> None:
        """Hold what the newborn tokens were projected from [lane, hidden] until it is written, if it is ever asked for."""
        if self.saved:
            self.newborn[layer].copy_(inputs)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        self.rows.attend(self._addressed(layer), q, k, v, attended)

    def settle(self, layer: int) -> None:
        """Nothing is chosen."""

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        """Count, of the first ``lanes``, what ``row`` fetched, projected and wrote."""
        if row == 0:
            prompt = self._written_prompt(self.plan.setting.workload.prompt_tokens)
            tally.put(0, written=lanes * (prompt.stop - prompt.start))
            return
        now = self.schedule.rows[row]
        written, fetched, projected = len(now.written), now.fetched, 0 if self.prefix else now.recomputed
        tally.put(row, written=lanes * written, fetched=lanes * fetched, reprojected=lanes * projected)

    def picks(self) -> list[list[tuple[int, ...]]]:
        """Of every layer, none."""
        return []

    def _addressed(self, layer: int) -> Addressed:
        return Addressed(
            layer=layer,
            layers=self.layers,
            buffers=self.buffers,
            block=self.block,
            slots=self.slots[:, layer],
            on_host=self.host_kv.device[layer],
            kept_from=self.schedule.kept_from,
            listed=self.held,
            places=self.places,
            row=self.row,
            padding=self.padding,
            from_front=self.prefix is not None,
            widths=self.widths,
        )

    @property
    def _row(self) -> Row:
        return self.schedule.rows[self.now]

    @property
    def _cached(self) -> int:
        return self.plan.setting.token_counts.cached[self.now]

    def _written_prompt(self, tokens: int) -> slice:
        """Positions of the prompt that the host has as keys and values when decoding begins."""
        homes = self.plan.homes
        again = [lost + inputs for lost, inputs in zip(homes.dropped, homes.activations, strict=True)]
        if self.plan.setting.write_back is WriteBack.AT_BIRTH:
            return slice(again[0], tokens)
        if homes.steps == 1 or not homes.host_kv[1]:
            return slice(self.schedule.kept_from, self.schedule.kept_from)
        return slice(again[1], again[1] + homes.host_kv[1])

    def _fetch(self, place: int) -> None:
        """Begin to fill the buffer of ``place`` with what its layer and row lack, unless the row is staged elsewhere."""
        number, layer = divmod(place, self.layers)
        row = self.schedule.rows.get(number)
        if row is None or row.layout != self.staging.layout:
            return
        self.pending.add(place)
        if not self._brings(row):
            return
        buffer, reads = place % self.buffers, self.reads
        self.reached.hold(reads.stream)
        if number > self.now:  # what this step has written; the main stream has waited for what those before it wrote
            self.written.hold(reads.stream)
        if row.recomputed and self.saved:
            size_bytes = row.recomputed * self.there_inputs.size_bytes
            reads.copy(self.staging.inputs_at[buffer], self.there_inputs.at(layer, 0), size_bytes)
        if row.fetched:
            there = self.there_kv.at(layer, row.recomputed - self.schedule.kept_from)
            reads.copy(self.staging.fetched_at[buffer], there, row.fetched * self.there_kv.size_bytes)
        self.ring[buffer].put(reads.stream)

    def _brings(self, row: Row) -> bool:
        """Whether copies come from the host: a prefix needs none."""
        return row.fetched > 0 or (row.recomputed > 0 and self.saved > 0)

    def _forget(self) -> None:
        """Let copies end that nobody waits for; from here on the main stream is the current one."""
        self.main = current_stream(self.padding.device)
        self.pending.clear()
        for mark in (*self.ring, self.written):
            mark.hold(self.main)

    def _at_once(self, tokens: int, inputs: Tensor) -> "Iterator[_Again]":
        """The oldest ``tokens``, so many together; none where no inputs are saved."""
        if not self.saved:
            return
        most = max(1, _PROJECTED_ROWS // self.lanes)
        for first in range(0, tokens, most):
            some = slice(first, min(first + most, tokens))
            yield _Again(
                inputs=inputs[some].flatten(0, 1),
                positions=self.positions[some].flatten(),
                rows=self.staging.recomputed[some].view(-1, 2 * self.decoder.spec.kv_dim),
            )


class _Again(NamedTuple):
    """Inputs [row, hidden] that are projected at once, their positions [row], and where keys and values go, [row, 2 * kv_dim]."""

    inputs: Tensor
    positions: Tensor
    rows: Tensor
