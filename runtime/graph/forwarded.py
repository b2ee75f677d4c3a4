"""Dense attention where the oldest tokens have no home: they are forwarded anew within each step, which is one graph.

There is a graph for each number of forwarded tokens, which is rounded up so that there are few; how many of those count it
looks up on the device, as it does with all else that changes from row to row. All graphs take turns with the same memory.
What they stage lies at the end of the slots' block, at a place that follows from the number.
"""

from collections.abc import Iterator
from typing import Any

import torch

from runtime.graph.capturing import captured
from runtime.graph.step import DecodeStep
from runtime.graph.streamed import StreamedSlots
from runtime.graph.streamed_step import StreamedStep


class ForwardedSlots(StreamedSlots):
    """Of a plan that keeps nothing on the host: between steps at most slots are moved."""

    rounded = True

    def advance(self) -> None:
        """Slots of the next row."""
        self.point(self.now + 1)
        for there, here in self._row.moves:
            self.slots[here].copy_(self.slots[there])


class ForwardedStep(StreamedStep):
    """Nothing comes between its pieces: they are one graph, of which copies of streamed weights are nodes."""

    slots: ForwardedSlots

    def replay(self) -> None:
        self.slots.advance()
        graphs = self.graphs.get(self.slots.kind)
        if graphs is None:
            self._run()
        else:
            graphs[0].replay()

    def _captured(self, pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
        yield captured(pool, self._run)

    def _begin(self, layer: int) -> Iterator[int]:
        yield from DecodeStep._begin(self, layer)

    def _join(self) -> None:
        DecodeStep._join(self)
