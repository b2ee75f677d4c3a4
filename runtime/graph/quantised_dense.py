"""Dense attention over INT8 keys and values in both tiers. A token's slot is its position, as in ``runtime.graph.dense``.

Ranges of keys and the open group's keys stay in HBM, so that what crosses the link is levels and the ranges of values.
All that lies in HBM fits the plan's budget: where its slots and those ranges do not, there are fewer slots.
"""

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.graph.launch import Parts, chains, merge, power_of_two
from runtime.graph.pinned import registered
from runtime.graph.rounding import Rounded, round_prompt
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.tally import Tally
from sim.kv import GROUP_TOKENS, KvFormat, kv_layer_bytes
from sim.open_group import fetched_layer_bytes
from sim.plan import Plan, Setting
from sim.slots import dense_slots, key_groups

BLOCK, WARPS = 32, 1  # tokens that a loop takes at once, warps of a program
GROUPED_WARPS = 2  # the fewest whose registers hold a block and its products: more repeat what they do with queries


class QuantisedSlots:
    """Levels [layer, lane, head, position, channel], ranges of values [layer, lane, head, 2, position], near and far."""

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        spec, device = decoder.spec, decoder.device
        counts = plan.setting.token_counts
        self.setting, self.numbers = plan.setting, counts.cached
        self.row, self.padding, self.chained = row, padding.to(torch.int32), chains(device, lanes.count)
        self.near = dense_slots(plan)
        self.far = counts.cached[-1] - self.near
        first = (spec.layers, lanes.count, spec.kv_heads)
        self.here = tuple(
            torch.zeros((*first, *shape), dtype=dtype, device=device)
            for shape, dtype in _planes(self.near, spec.head_dim)
        )
        self.there = tuple(
            registered(device, (*first, *shape), dtype) for shape, dtype in _planes(max(1, self.far), spec.head_dim)
        )
        groups, half = key_groups(plan.setting), torch.float16
        self.key_ranges = torch.zeros((*first, groups, 2, spec.head_dim), dtype=half, device=device)
        self.waiting = torch.zeros((*first, GROUP_TOKENS, spec.head_dim), dtype=decoder.dtype, device=device)
        self.cached = torch.tensor(counts.cached, dtype=torch.int32, device=device)
        self.count = torch.ones(1, dtype=torch.int32, device=device)
        shared = spec.heads // spec.kv_heads
        self.parts = Parts.of(padding, spec.kv_heads, shared, spec.head_dim) if shared > 1 else None

    @property
    def kv_bytes(self) -> int:
        """Of HBM: levels and ranges of values near, ranges of all keys, the open group's keys."""
        held = (*self.here, self.key_ranges, self.waiting)
        return sum(plane.numel() * plane.element_size() for plane in held)

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        lanes, tokens = slice(first, first + k.shape[0]), k.shape[1]
        rounded = round_prompt(k, v, self.key_ranges[layer, lanes], self.waiting[layer, lanes])
        self._store(layer, lanes, rounded)
        if self.far and tokens >= GROUP_TOKENS:
            self._leave_behind(layer, lanes, rounded, tokens % GROUP_TOKENS)

    def begin_step(self) -> None:
        torch.index_select(self.cached, 0, self.row, out=self.count)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        waiting = self.waiting[layer]
        planes = (*(plane[layer] for plane in self.here), *(plane[layer] for plane in self.there))
        held = (*planes, self.key_ranges[layer], waiting, waiting.view(torch.uint8), self.count)
        sizes = (self.near, max(1, self.far), self.key_ranges.shape[3])
        kinds = {
            "GROUP": GROUP_TOKENS,
            "CHANNELS": attended.shape[2],
            "WIDTH": waiting.element_size(),
            "FAR": self.far > 0,
        }
        if self.parts is None:
            self._attend_alone((q, k, v), held, attended, sizes, kinds)
        else:
            self._attend_in_groups((q, k, v), held, attended, sizes, kinds, self.parts)

    def _attend_alone(
        self,
        newborn: tuple[Tensor, Tensor, Tensor],
        held: tuple[Tensor, ...],
        attended: Tensor,
        sizes: tuple[int, int, int],
        kinds: dict[str, Any],
    ) -> None:
        """Each query head has a key head of its own."""
        lanes, heads, channels = attended.shape
        _kernels().attend[lanes, heads](
            *newborn,
            *held,
            self.padding,
            attended,
            channels**-0.5,
            newborn[0].stride(0),
            heads,
            *sizes,
            PADDED=power_of_two(channels),
            BLOCK=BLOCK,
            FREEZE=8,
            CHAINED=self.chained,
            num_warps=WARPS,
            **kinds,
        )

    def _attend_in_groups(
        self,
        newborn: tuple[Tensor, Tensor, Tensor],
        held: tuple[Tensor, ...],
        attended: Tensor,
        sizes: tuple[int, int, int],
        kinds: dict[str, Any],
        parts: Parts,
    ) -> None:
        (q, k, v), heads, module = newborn, newborn[1].shape[1], _grouped_kernels()
        lanes, queries, channels = attended.shape
        module.bear[lanes, heads](
            k,
            v,
            *held,
            k.stride(0),
            heads,
            *sizes,
            PADDED=power_of_two(channels),
            FREEZE=32,
            num_warps=4,
            **kinds,
        )
        module.attend[lanes, heads, parts.count](
            q,
            *held,
            self.padding,
            parts.mixed,
            parts.peaks,
            parts.totals,
            channels**-0.5,
            q.stride(0),
            heads,
            *sizes,
            SHARED=queries // heads,
            ROWS=max(16, power_of_two(queries // heads)),
            PADDED=max(16, power_of_two(channels)),
            BLOCK=BLOCK,
            PARTS=parts.count,
            PRECISION="ieee",  # of float32; 16-bit products are exact
            num_warps=GROUPED_WARPS,
            **kinds,
        )
        merge(parts, attended)

    def settle(self, layer: int) -> None:
        """A group is frozen by the attention that completes it."""

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        """Count, of the first ``lanes``, what ``row`` read from the host and stored there, in whole tokens' bytes."""
        cached = self.numbers[row]
        if row == 0:
            tally.put(0, written=lanes * max(0, cached - self.near))
            return
        model, setting = self.setting.model, self.setting
        token = kv_layer_bytes(model, setting.dtype, KvFormat.INT8) * setting.concurrency * model.layers
        fetched = fetched_bytes(setting, self.near, cached) / token
        tally.put(row, fetched=lanes * fetched, written=lanes * (cached > self.near))

    def picks(self) -> list[Any]:
        """Of every layer, none."""
        return []

    def _store(self, layer: int, lanes: slice, rounded: Rounded) -> None:
        """A prompt's planes."""
        tokens = rounded.keys.shape[1]
        near, far = min(self.near, tokens), max(0, tokens - self.near)
        ranges = rounded.value_ranges.permute(0, 2, 3, 1)
        planes = (rounded.keys.transpose(1, 2), 2), (rounded.values.transpose(1, 2), 2), (ranges, 3)
        for (plane, at), here, there in zip(planes, self.here, self.there, strict=True):
            here[layer, lanes].narrow(at, 0, near).copy_(plane.narrow(at, 0, near))
            if far:
                there[layer, lanes].narrow(at, 0, far).copy_(plane.narrow(at, near, far))

    def _leave_behind(self, layer: int, lanes: slice, rounded: Rounded, waiting: int) -> None:
        """Levels of the last whole group in those rows of the open group's keys in which none waits."""
        tokens, width = rounded.keys.shape[1], rounded.keys.shape[3]
        last = slice(tokens - GROUP_TOKENS, tokens - waiting)
        rows = self.waiting.view(torch.uint8)[layer, lanes, :, waiting:]
        levels, values = rounded.keys[:, last], rounded.values[:, last]
        rows[..., :width], rows[..., width : 2 * width] = levels.transpose(1, 2), values.transpose(1, 2)


def fetched_bytes(setting: Setting, near: int, cached: int) -> int:
    """What crosses the link in the step that attends to ``cached`` tokens, ``near`` slots a lane being in HBM."""
    layer_bytes = fetched_layer_bytes(setting.model, np.array([float(cached - near)]), np.array([float(cached)]))
    return setting.concurrency * setting.model.layers * int(layer_bytes[0])


def _planes(slots: int, channels: int) -> tuple[tuple[tuple[int, int], torch.dtype], ...]:
    """Levels of keys, of values, ranges of values: the last dimensions."""
    return ((slots, channels), torch.uint8), ((slots, channels), torch.uint8), ((2, slots), torch.float16)


def _kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import quantised_dense_kernels as module

    return module


def _grouped_kernels() -> ModuleType:
    from runtime.graph import quantised_grouped_kernels as module

    return module
