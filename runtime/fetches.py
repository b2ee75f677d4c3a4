"""Fetches that run ahead of the layers they are for, as far as the plan says, from one step into the next."""

from runtime.cache import Staged, TieredCache
from runtime.models.streamed import StreamedLayers
from runtime.streams import Done, SideStream
from sim.plan import Plan


class Prefetcher:
    """A ring of ``depth`` + 1 layers, the contract of ``sim.pipeline``: the fetch for the layer ``depth`` ahead starts when
    the layer before the current one has ended. Selectors that recall fetch once the query is known.

    A staged layer is kept until the fetch after next begins, which waits for all that has used it.
    """

    def __init__(self, plan: Plan, cache: TieredCache, *, overlap: bool) -> None:
        self.cache, self.layers, self.rows = cache, plan.setting.model.layers, plan.homes.steps
        recalls = plan.setting.attention.selector.recalls
        self.depth = 0 if recalls or self.layers <= plan.setting.prefetch_layers else plan.setting.prefetch_layers
        self.stream = SideStream(cache.decoder.device, overlap=overlap and self.depth > 0)
        layers = cache.decoder.weights.layers
        self.weights = layers if isinstance(layers, StreamedLayers) else None
        if self.weights:
            self.weights.start(self.rows * self.layers, overlap=overlap)
        self._ring: dict[int, tuple[Staged, Done]] = {}

    def ahead_of(self, row: int, layer: int) -> None:
        """``layer`` of ``row`` comes: begin the fetch for the layer ``depth`` after it, and have its weights there."""
        if self.weights:
            self.weights.begin(row * self.layers + layer)
        place = row * self.layers + layer + self.depth
        ahead, its_layer = divmod(place, self.layers)
        if self.depth and 1 <= ahead < self.rows:
            with self.stream.work(self.cache.ledgers[its_layer].in_hbm):  # which staging replaces
                self._ring.pop(place - self.depth - 1, None)
                if self.weights:
                    self.weights.wait(its_layer)
                staged = self.cache.stage(ahead, its_layer)
            self._ring[place] = (staged, self.stream.last)

    def staged(self, row: int, layer: int) -> Staged:
        """What was fetched for ``layer``; the current stream waits for it."""
        if not self.depth:
            return self.cache.stage(row, layer)
        staged, done = self._ring[row * self.layers + layer]
        done.wait()
        return staged
