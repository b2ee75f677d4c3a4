"""Sparse window attention over INT8 keys and values in both tiers. Who lies where is ``runtime.graph.window``'s affair.

Ranges of all keys and the open group's keys stay in HBM, so that what changes places is levels and the ranges of values.
A token that leaves HBM before its group is frozen takes the levels of its values along; those of its keys follow then.
All that lies in HBM fits the plan's budget: where its slots and those ranges do not, there are fewer slots.
"""

from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from runtime.graph.launch import EXCHANGED_HEADS, Weights, exchanging, merge, power_of_two
from runtime.graph.pinned import registered
from runtime.graph.rounding import round_prompt
from runtime.graph.taking_in import Prompt, keep
from runtime.graph.window import Entries, WindowSlots
from runtime.tally import Tally
from sim.kv import GROUP_TOKENS
from sim.plan import Plan
from sim.slots import head_bytes, keeps_newest, key_groups, most_attended, rounded_window_slots

BLOCK, WARPS = 32, 1  # tokens that attention takes at once, warps of its programs

Rows: TypeAlias = tuple[Tensor, ...]  # of queries, keys and values; or keys, values, and ranges of these


class QuantisedWindowSlots(WindowSlots):
    """Levels [layer, lane, head, slot, channel], ranges of values [layer, lane, head, slot, 2]; on the host slots come
    before heads.

    ``tokens`` [layer, lane, width] are the positions of what the lists name; of the open group, ``turns`` and ``homes``
    [layer, lane, group token] say where in the list a token comes and where it lies, -1 where it is or does not.
    """

    def begin_step(self) -> None:
        torch.index_select(self.table[0], 0, self.row, out=self.count)

    @property
    def kv_bytes(self) -> int:
        """Of HBM: levels and ranges of values near, ranges of all keys, the open group's keys, weights of past queries."""
        held = (*self.near_planes, self.key_ranges, self.waiting, self.state.ring)
        return sum(plane.numel() * plane.element_size() for plane in held)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        launch = self._attend_alone if self.launcher.group == 1 else self._attend_in_groups
        launch(layer, (q, k, v), attended, self._elsewhere(layer))

    def _attend_alone(self, layer: int, rows: Rows, attended: Tensor, elsewhere: dict[str, Rows]) -> None:
        state, lanes, heads = self.state, self.lanes.count, self.launcher.heads
        near = tuple(plane[layer] for plane in self.near_planes)
        staged, (_, *far_values) = elsewhere.get("staged", near), elsewhere.get("far", near)
        _kernels().attend[lanes, heads](
            *rows,
            *near,
            self.far_planes[0][layer],
            *far_values,
            *staged,
            self.key_ranges[layer],
            self.waiting[layer],
            state.slots[layer],
            state.counts[layer],
            self.tokens[layer],
            self.turns[layer],
            self.homes[layer],
            self.count,
            attended,
            self.scores[layer],
            self.peaks[layer],
            self.sums[layer],
            self.followed[layer],
            self.launcher.channels**-0.5,
            rows[0].stride(0),
            heads,
            self.near,
            max(1, self.far),
            staged[0].shape[2],
            self.width,
            self.key_ranges.shape[3],
            GROUP=GROUP_TOKENS,
            CHANNELS=self.launcher.channels,
            PADDED=self.launcher.padded,
            BLOCK=BLOCK,
            FREEZE=8,
            STAGED="staged" in elsewhere,
            CHAINED=self.launcher.chained,
            num_warps=WARPS,
        )

    def _attend_in_groups(self, layer: int, rows: Rows, attended: Tensor, elsewhere: dict[str, Rows]) -> None:
        """Newborn tokens first, for all programs of a head to see."""
        (q, k, v), state, launcher, parts = rows, self.state, self.launcher, self.launcher.parts
        near = tuple(plane[layer] for plane in self.near_planes)
        staged, far = elsewhere.get("staged", near), elsewhere.get("far", near)
        lanes, heads, channels = self.lanes.count, launcher.heads, launcher.channels
        kinds = {"GROUP": GROUP_TOKENS, "CHANNELS": channels, "num_warps": 4}
        _grouped_kernels().bear[lanes, heads](
            k,
            v,
            *near,
            self.far_planes[0][layer],
            self.key_ranges[layer],
            self.waiting[layer],
            state.slots[layer],
            state.counts[layer],
            self.homes[layer],
            self.count,
            self.followed[layer],
            k.stride(0),
            heads,
            self.near,
            max(1, self.far),
            self.width,
            self.key_ranges.shape[3],
            PADDED=launcher.padded,
            FREEZE=32,
            **kinds,
        )
        _grouped_kernels().attend[lanes, heads, parts.count](
            q,
            *near,
            *far,
            *staged,
            self.key_ranges[layer],
            self.waiting[layer],
            state.slots[layer],
            state.counts[layer],
            self.tokens[layer],
            self.count,
            parts.mixed,
            parts.peaks,
            parts.totals,
            self.scores[layer],
            channels**-0.5,
            q.stride(0),
            heads,
            self.near,
            max(1, self.far),
            staged[0].shape[2],
            self.width,
            self.key_ranges.shape[3],
            SHARED=launcher.group,
            ROWS=max(16, power_of_two(launcher.group)),
            PADDED=max(16, launcher.padded),
            BLOCK=32,
            PARTS=parts.count,
            STAGED="staged" in elsewhere,
            PRECISION="ieee",  # of float32; 16-bit products are exact
            **kinds,
        )
        weights = Weights(scores=self.scores[layer], peaks=self.peaks[layer], sums=self.sums[layer])
        merge(parts, attended, weights)

    def _settle(self, layer: int, state: Entries) -> None:
        super()._settle(layer, state)
        self._name(layer * self.lanes.count, self.lanes.count, self.count)

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        super().record(row, tally, lanes)
        self._count_followed(row, tally, lanes)

    def _count_followed(self, row: int, tally: Tally, lanes: int) -> None:
        """The levels of keys that follow to the host when their group is frozen count by their share of a token."""
        if row and self.far and self.counts.cached[row] % GROUP_TOKENS == 0:
            channels = self.decoder.spec.head_dim
            share = channels / head_bytes(channels)
            tally.add_all(row, written=self.followed[:, :lanes, None] * share)

    def _hold(self) -> None:
        spec, device, dtype = self.decoder.spec, self.decoder.device, self.decoder.dtype
        first, channels, far = (spec.layers, self.lanes.count), spec.head_dim, max(1, self.far)
        self.near_planes = self._planes(*first, spec.kv_heads, self.near)
        self.far_planes = tuple(
            registered(device, (*first, far, spec.kv_heads, width), kind) for width, kind in self._kinds()
        )
        groups = (*first, spec.kv_heads, key_groups(self.plan.setting), 2, channels)
        self.key_ranges = torch.zeros(groups, dtype=torch.float16, device=device)
        waiting = (*first, spec.kv_heads, GROUP_TOKENS, channels)
        self.waiting = torch.zeros(waiting, dtype=dtype, device=device)
        self.tokens = torch.zeros((*first, self.width), dtype=torch.int32, device=device)
        self.turns, self.homes = (
            torch.full((*first, GROUP_TOKENS), -1, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.followed = torch.zeros(first, dtype=torch.int32, device=device)  # keys frozen on the host, each lane's
        self.count = torch.ones(1, dtype=torch.int32, device=device)
        self.prompted = torch.full((1,), self.counts.cached[0], dtype=torch.int32, device=device)

    def _planes(self, *shape: int) -> Rows:
        """In HBM, for so many tokens of so many heads."""
        device = self.decoder.device
        return tuple(torch.zeros((*shape, width), dtype=kind, device=device) for width, kind in self._kinds())

    def _kinds(self) -> tuple[tuple[int, torch.dtype], ...]:
        """Of a token's levels, keys' and values', and of its value's range: numbers a head, and their type."""
        channels = self.decoder.spec.head_dim
        return (channels, torch.uint8), (channels, torch.uint8), (2, torch.float16)

    def _keep(self, layer: int, prompt: Prompt) -> None:
        lanes = slice(prompt.first_lane, prompt.first_lane + prompt.lanes)
        rounded = round_prompt(prompt.k, prompt.v, self.key_ranges[layer, lanes], self.waiting[layer, lanes])
        ranges = rounded.value_ranges.view(torch.int32)  # [lane, token, head, 1]
        here, there = (
            (planes[0], planes[1], planes[2].view(torch.int32)) for planes in (self.near_planes, self.far_planes)
        )
        for rows, planes in (((rounded.keys, rounded.values), (0, 1)), ((ranges, ranges), (2, 2))):
            some = Prompt(k=rows[0], v=rows[1], first_lane=prompt.first_lane, first_row=prompt.first_row)
            near, far = ((tier[planes[0]], tier[planes[1]]) for tier in (here, there))
            keep(self.window, some, self.state, near, far)
        self._name(prompt.first_row, prompt.lanes, self.prompted)

    def _name(self, first_row: int, lanes: int, newborn: Tensor) -> None:
        """Positions for the step whose newborn token's is ``newborn`` [1]: of its lists, and of its open group."""
        state = self.state
        _kernels().name[(lanes,)](
            state.rank,
            state.position,
            state.place,
            self.tokens,
            self.turns,
            self.homes,
            newborn,
            first_row,
            self.entries,
            self.width,
            GROUP=GROUP_TOKENS,
            ENTRIES=power_of_two(self.entries),
            num_warps=4,
        )

    def _exchange(self, layer: int, state: Entries) -> None:
        lanes, heads, channels = self.lanes.count, self.decoder.spec.kv_heads, self.decoder.spec.head_dim
        _kernels().exchange[(exchanging(self.decoder.spec, lanes),)](
            state.moves,
            state.move_counts,
            *(plane[layer] for plane in self.near_planes[:2]),
            self.near_planes[2][layer].view(torch.int32),
            *(plane[layer] for plane in self.far_planes[:2]),
            self.far_planes[2][layer].view(torch.int32),
            lanes,
            heads,
            self.near,
            max(1, self.far),
            self.entries,
            CHANNELS=channels,
            PADDED=power_of_two(channels),
            HEADS=min(EXCHANGED_HEADS, power_of_two(heads)),
            num_warps=8,
        )


def has_room_for_ranges(plan: Plan) -> bool:
    """Whether the budget has slots for all that a step attends to, or that it does not gather, beside what does not depend
    on them.
    """
    setting = plan.setting
    needed = max(setting.token_counts.local) if keeps_newest(plan) else most_attended(setting)
    return rounded_window_slots(setting) >= needed


def _kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import quantised_window_kernels as module

    return module


def _grouped_kernels() -> ModuleType:
    from runtime.graph import quantised_window_grouped_kernels as module

    return module
