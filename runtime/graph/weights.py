"""Weights that stream in while captured steps run: a layer is copied as one block, some layers ahead of the one that computes.

Every layer has a buffer of its own in the ring, so that copies have fixed ends and are nodes of the step's graph; where a
step is replayed in pieces the host queues the same copies between them. The first layers of the step to come are
copied while this one ends: a step finds them there.
"""

import torch

from runtime.graph.copy_engine import CopyEngine, Mark, current_stream
from runtime.models.streamed import StreamedLayers


class ComingWeights:
    """Of ``layers``: blocks brought by ``engine``, and beside it what a block lacks of the matrix that is cut, from HBM."""

    def __init__(self, layers: StreamedLayers, engine: CopyEngine) -> None:
        self.layers, self.device = layers, layers.device
        self._moves = [layers.moves(layer) for layer in range(len(layers))]
        self._reached = Mark(self.device)  # by the current stream
        self._ways = [_Way(way, layers.buffers, self.device) for way in (engine, CopyEngine(self.device))]

    def fill(self) -> None:
        """Have the first layers there, as every step finds them."""
        self.begin_prefill()
        self.end_prefill()

    def begin_prefill(self) -> None:
        """A wave's prompts come, which take every layer once; ``layers.begin`` is called at each."""
        self.layers.start(len(self.layers) + self.layers.ahead, overlap=True)

    def end_prefill(self) -> None:
        """Let no step begin before its first layers are there."""
        for layer in range(self.layers.ahead):
            self.layers.wait(layer)

    def wait(self, layer: int) -> None:
        """Let the current stream go no further before the layer is there; the first ones have been since the step began."""
        if layer >= self.layers.ahead:
            self._hold(layer)

    def bring_ahead(self, layer: int) -> None:
        """All before ``layer`` have been computed: begin to bring what comes ``ahead`` of it, into the buffer that is free now."""
        coming = (layer + self.layers.ahead) % len(self.layers)
        self._reached.put(current_stream(self.device))
        for way, move in zip(self._ways, self._moves[coming], strict=False):
            self._reached.hold(way.engine.stream)
            way.engine.copy(*move)
            way.arrived[coming % self.layers.buffers].put(way.engine.stream)

    def end(self) -> None:
        """Let the step end no sooner than what comes for the next one."""
        for layer in range(self.layers.ahead):
            self._hold(layer)

    def _hold(self, layer: int) -> None:
        for way, _ in zip(self._ways, self._moves[layer], strict=False):
            way.arrived[layer % self.layers.buffers].hold(current_stream(self.device))


class _Way:
    """One of the copies that a layer comes by; ``arrived`` is where each buffer has what it brings."""

    def __init__(self, engine: CopyEngine, buffers: int, device: torch.device) -> None:
        self.engine, self.arrived = engine, [Mark(device) for _ in range(buffers)]
