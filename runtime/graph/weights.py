"""Weights that stream in while captured steps run: a layer is copied as one block, some layers ahead of the one that computes.

Every layer has a buffer of its own in the ring, so that copies have fixed ends and are nodes of the step's graph; where a
step is replayed in pieces the host queues the same copies between them. The first layers of the step to come are
copied while this one ends: a step finds them there.
"""

from runtime.graph.copy_engine import CopyEngine, Mark, current_stream
from runtime.models.streamed import StreamedLayers


class ComingWeights:
    """Of ``layers``: blocks brought by ``engine``. What a block lacks of the matrix that is cut comes from HBM, by a kernel among
    those that compute: steps in which a copy engine did it were seen to take an H200 6 to 13 % longer.
    """

    def __init__(self, layers: StreamedLayers, engine: CopyEngine) -> None:
        self.layers, self.engine, self.device = layers, engine, layers.device
        self._moves = [layers.move(layer) for layer in range(len(layers))]
        self._reached = Mark(self.device)  # by the current stream
        self._arrived = [Mark(self.device) for _ in range(layers.buffers)]

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
        self._reached.hold(self.engine.stream)
        self.engine.copy(*self._moves[coming])
        self._arrived[coming % self.layers.buffers].put(self.engine.stream)
        self.layers.complete(coming)

    def end(self) -> None:
        """Let the step end no sooner than what comes for the next one."""
        for layer in range(self.layers.ahead):
            self._hold(layer)

    def _hold(self, layer: int) -> None:
        self._arrived[layer % self.layers.buffers].hold(current_stream(self.device))
