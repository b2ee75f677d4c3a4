"""Local attention: a window of the newest tokens and nothing else."""

import torch
from torch import Tensor

from runtime.selectors.base import LayerSelector


class Local(LayerSelector):
    """No older token is picked."""

    def picks(self, row: int, older: Tensor, count: int, q: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(older)
