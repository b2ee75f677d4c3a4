"""What a wave moves, counted on the device and read back once at its end."""

import torch
from torch import Tensor

KINDS = ("fetched", "reprojected", "written", "picked", "new", "age", "mass")


class Tally:
    """Sums over lanes and tokens, [row, layer, kind]. ``selections``: whether picks are asked for."""

    def __init__(self, rows: int, layers: int, device: torch.device, *, selections: bool = True) -> None:
        self.selections = selections
        self.sums = torch.zeros((rows, layers, len(KINDS)), dtype=torch.float64, device=device)
        self._begun = set[tuple[int, int, str]]()

    def add(self, row: int, layer: int, **tokens: Tensor) -> None:
        """Add the members of a mask, or the sum of numbers, to each named kind."""
        for kind, values in tokens.items():
            place = self.sums[row, layer, KINDS.index(kind)]
            if (row, layer, kind) in self._begun:
                place += values.sum()
            else:  # one kernel instead of two
                torch.sum(values, dim=(0, 1), dtype=torch.float64, out=place)
                self._begun.add((row, layer, kind))

    def add_all(self, row: int, **tokens: Tensor) -> None:
        """The same for every layer at once, [layer, lane, ...]."""
        for kind, values in tokens.items():
            self.sums[row, :, KINDS.index(kind)] += values.sum((1, 2))

    def put(self, row: int, **tokens: float) -> None:
        """Add a number that is the same in every layer."""
        for kind, value in tokens.items():
            if value:
                self.sums[row, :, KINDS.index(kind)] += value

    def of(self, kind: str) -> Tensor:
        """[row, layer] on the CPU."""
        return self.sums[..., KINDS.index(kind)].cpu()
