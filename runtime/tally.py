"""What a wave moves, counted on the device and read back once at its end."""

import torch
from torch import Tensor

KINDS = ("fetched", "reprojected", "written", "picked", "new", "age", "mass")


class Tally:
    """Sums over lanes, [row, layer, kind]."""

    def __init__(self, rows: int, layers: int, device: torch.device) -> None:
        self.sums = torch.zeros((rows, layers, len(KINDS)), dtype=torch.float64, device=device)

    def add(self, row: int, layer: int, **tokens: Tensor) -> None:
        """Add the members of a mask, or the sum of numbers, to each named kind."""
        for kind, values in tokens.items():
            self.sums[row, layer, KINDS.index(kind)] += values.sum()

    def of(self, kind: str) -> Tensor:
        """[row, layer] on the CPU."""
        return self.sums[..., KINDS.index(kind)].cpu()
