"""Dense attention with all KV in HBM: a token's slot is its position."""

from typing import Any

import torch
from torch import Tensor

from runtime.graph.launch import Launcher
from runtime.lanes import Lanes
from runtime.models import Decoder
from sim.plan import Plan


class DenseSlots:
    """Keys and values [layer, lane, head, position, channel]."""

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        spec, device = decoder.spec, decoder.device
        counts = plan.setting.token_counts
        self.row, self.launcher = row, Launcher(spec, padding)
        shape = (spec.layers, lanes.count, spec.heads, counts.cached[-1], spec.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.cached = torch.tensor(counts.cached, dtype=torch.int32, device=device)
        self.count = torch.ones(1, dtype=torch.int32, device=device)

    @property
    def kv_bytes(self) -> int:
        """Of HBM."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def start(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        """Keep a prompt's keys and values, [lane, token, head, channel]."""
        self.keys[layer, :, :, : k.shape[1]] = k.transpose(1, 2)
        self.values[layer, :, :, : v.shape[1]] = v.transpose(1, 2)

    def begin_step(self) -> None:
        torch.index_select(self.cached, 0, self.row, out=self.count)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        self.launcher.attend(q, k, v, self.keys[layer], self.values[layer], attended, counts=self.count)

    def settle(self, layer: int) -> None:
        """Nothing is chosen."""

    def picks(self) -> list[Any]:
        """Of every layer, none."""
        return []
