"""Strided attention: older tokens at even distances."""

import torch
from torch import Tensor

from runtime.selectors.base import LayerSelector


class Strided(LayerSelector):
    """Of n older tokens g are wanted: those in the middle of each g-th part.

    Where unpicked tokens are dropped only a few more than g are left at a later step; then those go that stand closest
    between their neighbours, which keeps the distances even.
    """

    def scores(self, row: int, older: Tensor, q: Tensor | None) -> Tensor:  # noqa: ARG002
        counts = self.scope.counts
        if row and counts.dead[row]:
            return self._distances(older)
        count, left = (
            counts.selected[row],
            counts.cached[row] - counts.local[row],
        )  # none is dead: they lie side by side
        scores = self.scope.zeros(self.scope.positions)
        scores[:, [(2 * part + 1) * left // (2 * count) for part in range(count)]] = 1.0
        return scores

    def _distances(self, older: Tensor) -> Tensor:
        """From the token before to the token after, [lane, position]; the outermost ones stay."""
        far = 4 * self.scope.positions
        at = torch.arange(self.scope.positions, device=older.device)
        before = torch.where(older, at, -far).cummax(-1).values.roll(1, -1)
        before[:, 0] = -far
        after = torch.where(older, at, 2 * far).flip(-1).cummin(-1).values.flip(-1).roll(-1, -1)
        after[:, -1] = 2 * far
        return (after - before).float()
