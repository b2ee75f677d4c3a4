"""Sparse window attention as published over INT8 in both tiers: HBM holds the newest tokens, the stage the older ones' rows.

What is gathered ahead is levels, and ranges of values. Of the group that is open then there are no levels of keys yet, and in
the step that completes it rows are gathered already: attention takes those keys as they wait.
"""

from torch import Tensor

from runtime.graph.quantised_window import QuantisedWindowSlots
from runtime.graph.recent import RecentSlots
from runtime.graph.window import Entries
from runtime.tally import Tally


class QuantisedRecentSlots(RecentSlots, QuantisedWindowSlots):
    """Who lies where, and comes when, is ``RecentSlots``' affair; what lies there ``QuantisedWindowSlots``'. Planes of the stage
    [buffer, lane, head, row, ...] are those of HBM.
    """

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        super().record(row, tally, lanes)
        self._count_followed(row, tally, lanes)

    def _settle(self, layer: int, state: Entries) -> None:
        super()._settle(layer, state)
        self._name(layer * self.lanes.count, self.lanes.count, self.count)

    def _away(self) -> tuple[Tensor, ...]:
        return self.far_planes

    def _staged(self) -> tuple[Tensor, ...]:
        return self._planes(self.depth + 1, self.lanes.count, self.decoder.spec.kv_heads, self.rows)
