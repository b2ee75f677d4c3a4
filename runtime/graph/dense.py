"""Dense attention: a token's slot is its position. What HBM has no slots for is read from pinned memory where it lies.

Every step attends to every token, so which of them lie in HBM makes no difference: here the first ones do, and none ever
moves. The kernel that attends is the one that fetches, and the newborn token is written to where it will stay.
"""

from typing import Any

import torch
from torch import Tensor

from runtime.graph.launch import Launcher
from runtime.graph.pinned import registered
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.tally import Tally
from sim.plan import Plan
from sim.slots import dense_slots


class DenseSlots:
    """Keys and values [layer, lane, head, position, channel], in HBM and then on the host."""

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        spec, device = decoder.spec, decoder.device
        counts = plan.setting.token_counts
        self.row, self.launcher = row, Launcher(spec, padding)
        self.near = dense_slots(plan)
        self.far = counts.cached[-1] - self.near
        shape = (spec.layers, lanes.count, spec.kv_heads, self.near, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        host = (*shape[:3], max(1, self.far), spec.head_dim)
        self.host_keys, self.host_values = (registered(device, host, decoder.dtype) for _ in range(2))
        self.numbers = counts.cached
        self.cached = torch.tensor(counts.cached, dtype=torch.int32, device=device)
        self.count = torch.ones(1, dtype=torch.int32, device=device)

    @property
    def kv_bytes(self) -> int:
        """Of HBM."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        lanes = slice(first, first + k.shape[0])
        for rows, here, there in ((k, self.keys, self.host_keys), (v, self.values, self.host_values)):
            near, far = rows[:, : self.near], rows[:, self.near :]
            here[layer, lanes, :, : near.shape[1]] = near.transpose(1, 2)
            there[layer, lanes, :, : far.shape[1]] = far.transpose(1, 2)

    def begin_step(self) -> None:
        torch.index_select(self.cached, 0, self.row, out=self.count)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        keys, values = self.keys[layer], self.values[layer]
        far = (self.host_keys[layer], self.host_values[layer]) if self.far else None
        self.launcher.attend(q, k, v, keys, values, attended, counts=self.count, far=far)

    def settle(self, layer: int) -> None:
        """Nothing is chosen."""

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        """Count, of the first ``lanes``, what ``row`` read from the host and stored there."""
        stored = self.numbers[row] - (self.numbers[row - 1] if row else 0)
        beyond = max(0, self.numbers[row] - self.near)
        newborn = min(stored, beyond)
        tally.put(row, fetched=lanes * (beyond - newborn) if row else 0, written=lanes * newborn)

    def picks(self) -> list[Any]:
        """Of every layer, none."""
        return []
