"""Sparse window attention on the device: who is attended to, who dies, who gives way to whom, a step ahead.

An *entry* stands for a living token; its slot lies in HBM or, where those do not suffice, in pinned host memory. What a
step attends to is in HBM; the least wanted of the others change places with it. The rules are those of
``runtime.selectors.swa`` and ``runtime.ledger``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.graph.launch import Launcher, Weights, power_of_two
from runtime.graph.pinned import registered
from runtime.graph.taking_in import Prompt, Window, choose, keep, prompt_weights, remember
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.tally import Tally
from sim.attention import TokenCounts
from sim.capture import CHOOSING_WARPS, WEIGHED_TOGETHER
from sim.footprint import weighed_at_once
from sim.plan import Plan
from sim.slots import WindowSize, window_slots


class Entries(NamedTuple):
    """Of every layer and lane; the names are ``kernels.settle``'s."""

    rank: Tensor
    position: Tensor
    last: Tensor
    place: Tensor
    ring: Tensor
    slots: Tensor
    counts: Tensor
    moves: Tensor
    move_counts: Tensor


class WindowSlots:
    """Keys and values [layer, lane, head, slot, channel]; on the host [layer, lane, slot, head, channel]."""

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        spec, device = decoder.spec, decoder.device
        self.plan, self.decoder, self.lanes, self.padding, self.row = plan, decoder, lanes, padding, row
        self.counts = plan.setting.token_counts
        self.launcher = Launcher(spec, padding)
        self.history = [plan.setting.attention.history_steps(cached) for cached in self.counts.cached]
        self.window = Window(counts=self.counts, history=(self.history[0], self.history[min(1, len(self.history) - 1)]))
        self.entries, self.queries, self.width = WindowSize.of(plan.setting)
        self.near, self.far = self._tiers()
        self._hold()
        self.state = self._empty(spec.layers, lanes.count)
        scores = (spec.layers, lanes.count, spec.heads)
        self.scores = torch.zeros((*scores, self.width), device=device)
        self.peaks, self.sums = torch.zeros(scores, device=device), torch.ones(scores, device=device)
        self.table = _table(self.counts, self.history, device)
        self.picked = torch.zeros(
            0, dtype=torch.bool, device=device
        )  # [layer, lane, entry], what the last row recorded

    def _tiers(self) -> tuple[int, int]:
        """Slots of a lane in HBM and on the host."""
        near = window_slots(self.plan)
        return near, self.entries - near

    @property
    def kv_bytes(self) -> int:
        """Of HBM: slots, and the weights of past queries."""
        ring = self.state.ring
        return 2 * self.keys.numel() * self.keys.element_size() + ring.numel() * ring.element_size()

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Choose what the first step attends to, and keep what lives."""
        if self.plan.homes.steps == 1:
            return
        state, padding = self.state, self.launcher.padding
        prompt = Prompt(k=k, v=v, first_lane=first, first_row=layer * self.lanes.count + first)
        sizes = (prompt.lanes, self.window.tokens, self.window.queries)
        at_once = weighed_at_once(self.decoder.spec, self.plan.setting.dtype, *sizes)
        weights = prompt_weights(self.window, self.lanes.queries(q), prompt, padding, at_once)
        self._choose(weights, prompt)
        remember(self.window, weights, prompt, padding, state)
        self._keep(layer, prompt)

    def _choose(self, weights: Tensor, prompt: Prompt) -> None:
        choose(self.window, weights, self.launcher.queries, prompt, self.launcher.padding, self.state)

    def begin_step(self) -> None:
        """Every layer's list is there already."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        state, elsewhere = self.state, self._elsewhere(layer)
        weights = Weights(scores=self.scores[layer], peaks=self.peaks[layer], sums=self.sums[layer])
        self.launcher.attend(
            q,
            k,
            v,
            self.keys[layer],
            self.values[layer],
            attended,
            counts=state.counts[layer],
            slots=state.slots[layer],
            weights=weights,
            **elsewhere,
        )

    def _elsewhere(self, layer: int) -> dict[str, tuple[Tensor, ...]]:  # noqa: ARG002
        """Where a layer's list has tokens without a slot in HBM: ``staged`` there, ``far`` on the host; keys, values, what else
        there is. Here nowhere.
        """
        return {}

    def settle(self, layer: int) -> None:
        """Choose for the next step, and move what it needs."""
        state = Entries(*(tensor[layer] for tensor in self.state))
        self._settle(layer, state)
        if self.far:
            self._exchange(layer, state)

    def _settle(self, layer: int, state: Entries) -> None:
        """Choose for the next step."""
        self.launcher.kernels.settle[(self.lanes.count,)](
            *self._known(layer, state),
            state.moves,
            state.move_counts,
            self.launcher.queries,
            self.width,
            state.ring.shape[1],
            self.entries,
            self.table.shape[1],
            self.near,
            ENTRIES=power_of_two(self.entries),
            CHUNK=WEIGHED_TOGETHER,
            num_warps=CHOOSING_WARPS,
        )

    def _known(self, layer: int, state: Entries) -> tuple[Tensor, ...]:
        """What a choice goes by, and fills: ``kernels.settle``'s first arguments."""
        chosen = (state.rank, state.slots, state.counts, state.position, state.last, state.place, state.ring)
        paid = (self.scores[layer], self.peaks[layer], self.sums[layer])
        return (*paid, *chosen, self.launcher.padding, self.row, self.table)

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        """Count, of the first ``lanes``, what ``row`` wrote, and what the next one fetches and, if asked, picks."""
        if row == 0:
            tally.put(0, written=lanes * max(0, self.counts.cached[1] - self.counts.dead[1] - self.near))
        if row + 1 == self.plan.homes.steps:
            return
        if tally.selections:
            self._count_picks(row + 1, tally, lanes)
        if row and self.far:
            moved = torch.arange(self.entries, device=self.row.device) < self.state.move_counts[:, :lanes, None]
            moves = self.state.moves[:, :lanes]
            tally.add_all(row + 1, fetched=moved & (moves[..., 2] > 0))
            tally.add_all(row, written=moved & (moves[..., 3] > 0))

    def _count_picks(self, row: int, tally: Tally, lanes: int) -> None:
        position = self.state.position[:, :lanes]
        older = max(1, self.counts.cached[row] - self.counts.local[row])
        picks = (self.state.rank[:, :lanes] >= 0) & (position < older)
        ages = (older - 1 - position) / max(1, older - 1)
        new = picks if row == 1 else picks & ~self.picked
        tally.add_all(row, picked=picks, new=new, age=ages * picks)
        self.picked = picks

    def picks(self) -> list[list[tuple[int, ...]]]:
        """Positions that the coming step attends to, [layer][lane]; reads the device."""
        held = zip(self.state.rank.tolist(), self.state.position.tolist(), strict=True)
        return [
            [
                tuple(sorted(p for i, p in zip(*lane, strict=True) if i >= 0))
                for lane in zip(index, position, strict=True)
            ]
            for index, position in held
        ]

    def _hold(self) -> None:
        """Memory for keys and values, near and far."""
        spec, device, dtype = self.decoder.spec, self.decoder.device, self.decoder.dtype
        shape = (spec.layers, self.lanes.count, spec.kv_heads, self.near, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        host = (spec.layers, self.lanes.count, max(1, self.far), spec.kv_heads, spec.head_dim)
        self.host_keys, self.host_values = (registered(device, host, dtype) for _ in range(2))

    def _keep(self, layer: int, prompt: Prompt) -> None:  # noqa: ARG002
        """What lives of a prompt, whose entries are chosen."""
        near, far = (self.keys, self.values), (self.host_keys, self.host_values)
        keep(self.window, prompt, self.state, near, far)

    def _exchange(self, layer: int, state: Entries) -> None:
        """Carry out the layer's moves."""
        near, far = (self.keys[layer], self.values[layer]), (self.host_keys[layer], self.host_values[layer])
        self.launcher.exchange(state.moves, state.move_counts, near, far)

    def _empty(self, layers: int, lanes: int) -> Entries:
        device, dtype = self.decoder.device, self.decoder.dtype
        entry = torch.full((layers, lanes, self.entries), -1, dtype=torch.int32, device=device)
        place = torch.arange(self.entries, dtype=torch.int32, device=device).expand_as(entry)
        return Entries(
            rank=entry,
            position=entry.clone(),
            last=entry.clone(),
            place=place.clone(),
            ring=torch.zeros((layers, lanes, self.queries, self.entries), dtype=dtype, device=device),
            slots=torch.zeros((layers, lanes, self.width), dtype=torch.int32, device=device),
            counts=torch.ones((layers, lanes), dtype=torch.int32, device=device),
            moves=torch.zeros((layers, lanes, self.entries, 4), dtype=torch.int32, device=device),
            move_counts=torch.zeros((layers, lanes), dtype=torch.int32, device=device),
        )


def _table(counts: TokenCounts, history: list[int], device: torch.device) -> Tensor:
    """[5, row]: what ``kernels.settle`` looks up; the last row twice, for the step that has none after it."""
    dying = [now - before for before, now in zip((0, *counts.dead), counts.dead, strict=False)]
    columns = (counts.cached, counts.local, counts.selected, dying, history)
    return torch.tensor([[*column, column[-1]] for column in columns], dtype=torch.int32, device=device)
