"""The step of ``runtime.graph.streamed``: pieces that are replayed, and what the slots do between them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime.graph.capturing import captured
from runtime.graph.step import DecodeStep
from runtime.graph.streamed import StreamedSlots
from runtime.graph.weights import ComingWeights
from runtime.models import Decoder
from runtime.streams import warming_stream


class StreamedStep(DecodeStep):
    """Replayed piece by piece; the slots do between them what Python must know the row for.

    Where weights stream in too, a piece ends with each layer as well: the host queues the copies of those to come.
    """

    slots: StreamedSlots

    def __init__(
        self,
        decoder: Decoder,
        slots: StreamedSlots,
        padding: Tensor,
        cached: Tensor,
        row: Tensor,
        weights: ComingWeights | None = None,
    ) -> None:
        super().__init__(decoder, slots, padding, cached, row, weights)
        self.graphs: dict[tuple[int, int], list[torch.cuda.CUDAGraph]] = {}  # by the slots' kinds of rows
        self.shared_logits = self.logits  # where each of several sets of graphs puts its own: they must outlive it

    @property
    def pieces(self) -> int:
        return (1 if self.weights is None else 2) * self.decoder.spec.layers + 1

    def replay(self) -> None:
        self.slots.advance()
        graphs = self.graphs.get(self.slots.kind)
        pieces: Iterator[object] = self._pieces() if graphs is None else _replayed(graphs)
        for layer in range(self.decoder.spec.layers):
            next(pieces, None)
            if self.weights is not None:
                self.weights.bring_ahead(layer)
                self.weights.wait(layer)
            if layer:
                self.slots.leave(layer - 1)
            if self.weights is not None:
                next(pieces, None)
            self.slots.bring(layer)
        next(pieces, None)
        self.slots.leave(self.decoder.spec.layers - 1)
        if self.weights is not None:
            self.weights.end()

    def _begin(self, layer: int) -> Iterator[int]:
        if self.weights is not None:
            yield layer
            self._pause()

    def _join(self) -> None:
        """The host has queued what runs beside, and joins it."""

    def capture(self) -> None:
        """Run twice, so that kernels are compiled, then capture for each kind of row, where there is a step and a GPU."""
        self.graphs = {}
        if self.decoder.device.type != "cuda" or self.cached.shape[0] == 1:
            return
        stream = warming_stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.seek(1)
                self.replay()
            self.slots.warm_up_prefixes()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what all that took: the graphs take as much, and none of it
            self.capture_each()
        torch.cuda.current_stream().wait_stream(stream)

    def capture_each(self) -> None:
        """One set of graphs after the other uses the pool's memory, since they never run side by side."""
        pool = torch.cuda.graph_pool_handle()
        for kind, row in self.slots.first_rows().items():
            self.seek(row)
            self.slots.point(row)
            self.graphs[kind] = list(self._captured(pool))
        self.seek(1)

    def _captured(self, pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
        """They pass tensors on to each other."""
        pieces = self._pieces()
        for _ in range(self.pieces):
            yield captured(pool, partial(next, pieces, None))

    def seek(self, row: int) -> None:
        super().seek(row)
        self.slots.seek(row)

    def _emit(self, tokens: Tensor) -> None:
        if self.slots.prefix is not None:
            self.shared_logits.copy_(self.logits)
            self.logits = self.shared_logits
        super()._emit(tokens)

    def _attend(self, layer: int, inputs: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.slots.keep(layer, inputs.view(self.slots.lanes, -1))
        self.slots.forward(layer)
        self.slots.attend(layer, q, k, v, self.attended)


def _replayed(graphs: Sequence[torch.cuda.CUDAGraph]) -> Iterator[None]:
    for graph in graphs:
        graph.replay()
        yield
