"""Dense attention where the oldest tokens have no home: they are forwarded anew within each step, which is one graph.

There is a graph for each number of forwarded tokens, which is rounded up so that there are few; how many of those count it
looks up on the device, as it does with all else that changes from row to row. All graphs take turns with the same memory.
What they stage lies at the end of the slots' block, at a place that follows from the number.
"""

import torch
from torch import Tensor

from runtime.graph.capturing import captured
from runtime.graph.schedule import Layout
from runtime.graph.step import DecodeStep
from runtime.graph.streamed import Staging, StreamedSlots
from runtime.models import Decoder
from runtime.streams import warming_stream


class ForwardedSlots(StreamedSlots):
    """Of a plan that keeps nothing on the host: between steps at most slots are moved."""

    rounded = True

    def advance(self) -> None:
        """Slots of the next row."""
        self.now += 1
        for there, here in self._row.moves:
            self.slots[here].copy_(self.slots[there])

    @property
    def forwarded(self) -> int:
        """Tokens that the graph of the row at hand forwards."""
        return self._row.layout.recomputed

    def stage(self, tokens: int) -> None:
        """What is launched or captured from here on forwards so many."""
        self.staging = Staging(self, Layout(recomputed=tokens, fetched=0))

    def begin_step(self) -> None:
        assert self.prefix is not None
        self.prefix.begin(self.staging.layout.recomputed)

    def forward(self, layer: int) -> None:
        """Stage the prefix's keys and values of ``layer``."""
        assert self.prefix is not None
        self.prefix.forward(layer, self.staging.recomputed)


class ForwardedStep(DecodeStep):
    """Replays the graph that the row's prefix asks for."""

    slots: ForwardedSlots

    def __init__(self, decoder: Decoder, slots: ForwardedSlots, padding: Tensor, cached: Tensor, row: Tensor) -> None:
        super().__init__(decoder, slots, padding, cached, row)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by forwarded tokens
        self.shared_logits = self.logits  # where each graph puts its own: they must outlive it

    def replay(self) -> None:
        self.slots.advance()
        if self.slots.forwarded in self.graphs:
            self.graphs[self.slots.forwarded].replay()
        else:
            self.slots.stage(self.slots.forwarded)
            self._run()

    def capture(self) -> None:
        """Run each once, so that kernels are compiled and loaded, then capture it, where there is a step and a GPU."""
        self.graphs = {}
        if self.decoder.device.type != "cuda" or self.cached.shape[0] == 1:
            return
        stream = warming_stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for row in self._first_rows().values():
                self.seek(row)
                self.replay()
            torch.cuda.synchronize()
            self.graphs = self._captured()
        torch.cuda.current_stream().wait_stream(stream)

    def _first_rows(self) -> dict[int, int]:
        """A row for each number of forwarded tokens, the longest prefix first: others find room in what it took."""
        rows = self.slots.schedule.rows
        return {rows[row].layout.recomputed: row for row in reversed(rows)}

    def _captured(self) -> dict[int, torch.cuda.CUDAGraph]:
        """One after the other uses the pool's memory, since they never run side by side."""
        pool, graphs = torch.cuda.graph_pool_handle(), dict[int, torch.cuda.CUDAGraph]()
        for tokens, row in self._first_rows().items():
            self.seek(row)
            self.slots.stage(tokens)
            graphs[tokens] = captured(pool, self._run)
        return graphs

    def seek(self, row: int) -> None:
        super().seek(row)
        self.slots.seek(row)

    def _emit(self, tokens: Tensor) -> None:
        self.shared_logits.copy_(self.logits)
        self.logits = self.shared_logits
        super()._emit(tokens)

    def _attend(self, layer: int, inputs: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        self.slots.forward(layer)
        self.slots.attend(layer, q, k, v, self.attended)
