"""The tiered KV cache: both tiers' slots, saved layer inputs, and the ledger of every layer, kept to the plan's homes."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from runtime.attention import Part
from runtime.lanes import Lanes
from runtime.ledger import Ledger, Moves
from runtime.masks import listed
from runtime.memory import device_zeros, host_zeros
from runtime.models import Decoder
from runtime.streams import Done, SideStream
from runtime.tally import Tally
from runtime.tier import KeyFreezer, KvShape, OpenKeys, Tier
from sim.attention import PAGE_TOKENS
from sim.kv import GROUP_TOKENS
from sim.plan import Placement, Plan, Recompute, WriteBack
from sim.slots import host_slots_by, slots_by

_Moved: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # keys and values, positions, and which of them count


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Tokens that one layer's attention needs and HBM lacks, fetched or recomputed: a list for each source."""

    parts: tuple[Part, ...]


class TieredCache:
    """All layers of one wave. Every method works on one layer in one row of the plan; shapes are ``runtime.lanes``'."""

    def __init__(
        self,
        plan: Plan,
        decoder: Decoder,
        lanes: Lanes,
        padding: Tensor,
        *,
        published_ranges: bool,
        overlap: bool,
        by_page: bool,
    ) -> None:
        setting, spec, device = plan.setting, decoder.spec, decoder.device
        self.plan, self.decoder, self.lanes, self.padding = plan, decoder, lanes, padding
        self.counts, self.homes = setting.token_counts, plan.homes
        shape = KvShape(
            layers=spec.layers,
            lanes=lanes.count,
            heads=lanes.heads,
            head_dim=spec.head_dim,
            positions=setting.workload.cached_tokens,
            dtype=decoder.dtype,
        )
        self.on_device, self.on_host = _Allocator(device, host=False), _Allocator(device, host=True)
        formats = setting.kv_format
        grouped = formats.gpu.is_grouped or formats.host.is_grouped
        open_keys = OpenKeys(shape, None if published_ranges else GROUP_TOKENS, self.on_device, needed=grouped)
        self.slots_by, self.by_page = slots_by(plan), by_page
        slots = _whole_pages(self.slots_by[0]) if by_page else self.slots_by[-1]
        self.hbm = Tier(formats.gpu, shape, slots, self.on_device, open_keys, device=device)
        self.host_slots_by = host_slots_by(plan)
        if setting.host_attention:  # the CPU's own memory: it attends there
            where, on_cpu = torch.device("cpu"), _Allocator(torch.device("cpu"), host=False)
        else:
            where, on_cpu = device, self.on_host
        self.host = Tier(formats.host, shape, self.host_slots_by[-1], on_cpu, open_keys, device=where)
        self.freezer = KeyFreezer(open_keys, (self.hbm, self.host))
        self.ledgers = [Ledger(plan, lanes.count, device) for _ in range(spec.layers)]
        keeper = self.on_device if setting.recompute is Recompute.ACTIVATIONS_HBM else self.on_host
        saved = (spec.layers, lanes.sequences, plan.saved_inputs_tokens, spec.hidden)
        self.inputs = keeper(saved, decoder.dtype)
        self.write_back = SideStream(device, overlap=overlap)
        self.written = [Done()] * spec.layers  # each layer's last write-back
        self.tally = Tally(setting.workload.output_tokens, spec.layers, device)

    def begin(self, layer: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        """Place a prompt's tokens as row 0 says; ``x`` [sequence, token, hidden] are the layer's inputs."""
        ledger = self.ledgers[layer]
        self.freezer.start(layer, k)
        self.inputs[layer] = x[:, : self.inputs.shape[2]] if self.inputs.shape[2] <= x.shape[1] else self._padded(x)
        moves = ledger.settle(0)
        self._put(self.hbm, layer, ledger.in_hbm, self.homes.hbm[0] + self.homes.copies[0], k, v)
        self._put(self.host, layer, moves.written, self._most_at_start(), k, v)
        if self.host.pool.slots:
            self.tally.add(0, layer, written=moves.written)

    def grow(self, row: int) -> None:
        """Take the pages that ``row`` needs, if pages are taken as they are needed."""
        slots = _whole_pages(self.slots_by[row])
        if self.by_page and slots > self.hbm.pool.slots:
            given_up = sum(plane.nbytes for plane in self.hbm.pool.planes.values())
            self.hbm.pool.grow(slots, self.on_device)
            self.on_device.size_bytes -= given_up

    def stage(self, row: int, layer: int) -> Staged:
        """Bring what ``row`` attends to and HBM lacks; copies of it stay where the placement says so."""
        self.written[layer].wait()
        ledger, parts = self.ledgers[layer], list[Part]()
        moved = list[_Moved]()
        most, dense = self.counts.selected[row], self.plan.setting.attention.is_dense
        if length := self.homes.host_kv[row] if dense else min(most, self.host.pool.slots):
            from_host = ledger.missing & ~ledger.inputs
            self.tally.add(row, layer, fetched=from_host)
            if self.plan.setting.host_attention:
                parts.append(self._on_host(row, layer, from_host))
            else:
                moved.append(self._fetched(layer, *listed(from_host, length)))
        if length := self.homes.activations[row] if dense else min(most, self.inputs.shape[2]):
            from_inputs = ledger.missing & ledger.inputs
            self.tally.add(row, layer, reprojected=from_inputs)
            moved.append(self._reprojected(layer, *listed(from_inputs, length)))
        if moved and self.plan.setting.placement is Placement.RESIDENT:
            self._adopt(row, layer, moved)
        return Staged(parts=(*parts, *(Part.of(*tokens) for tokens in moved)))

    def release(self, row: int, layer: int) -> None:
        """Free the slots of copies that ``row`` does not attend to, as soon as that is known."""
        self.hbm.pool.drop(layer, self.ledgers[layer].release(row))

    def bear(self, row: int, layer: int, x: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the newborn token of ``row``, [lane, 1, ...]."""
        position = self.counts.cached[row] - 1
        at = torch.full((self.lanes.count, 1), position, device=k.device)
        valid = torch.ones_like(at, dtype=torch.bool)
        self.hbm.bear(layer, at, valid, k, v)
        self.ledgers[layer].bear(row)
        if self.plan.setting.write_back is WriteBack.AT_BIRTH:
            with self.write_back.work(at, valid, k, v):
                self.host.bear(layer, at, valid, k, v)
            self.written[layer] = self.write_back.last
            self.tally.add(row, layer, written=valid)
        if self.freezer.closes(position):
            self.written[layer].wait()
        self.freezer.bear(layer, position, k)
        if position < self.inputs.shape[2]:
            self.inputs[layer, :, position] = x[:, 0]

    def parts(self, row: int, layer: int, staged: Staged) -> list[Part]:
        """Everything that the layer's query attends to: the slots in HBM, and what was staged and is not there."""
        kept = self.ledgers[layer].in_hbm
        others = [
            replace(part, attended=part.attended & ~kept.gather(-1, part.positions) & self._real(part.positions))
            for part in staged.parts
        ]
        return [*self._in_hbm(row, layer), *others]

    def _in_hbm(self, row: int, layer: int) -> list[Part]:
        """What is attended to in HBM: in place, or gathered where that is the lesser work; an open group apart if need be."""
        ledger, parts = self.ledgers[layer], list[Part]()
        wanted = ledger.wanted & ledger.in_hbm
        most = self.counts.local[row] + self.counts.selected[row]
        start, cached = self.freezer.open_keys.start[layer], self.counts.cached[row]
        if self.hbm.kv_format.is_grouped and self.hbm.widens and start < cached:
            at = torch.arange(start, cached, device=wanted.device).expand(self.lanes.count, -1)
            parts.append(self.hbm.waiting(layer, at, wanted[:, start:cached] & self._real(at)))
            wanted = wanted & (ledger.position < start)
            most -= min(self.counts.local[row], cached - start)
        if most * (1 if self.hbm.widens else 2) < self.slots_by[row]:
            at, valid = listed(wanted, most)
            return [self.hbm.list(layer, at, valid & self._real(at)), *parts]
        slots = self.slots_by[row]
        return [self.hbm.all(layer, slots, lambda positions: self._held(wanted, positions), frozen=True), *parts]

    def everything(self, row: int, layer: int) -> list[Part]:
        """All living tokens whose KV is somewhere, for a look at what a selection leaves out."""
        self.written[layer].wait()
        ledger = self.ledgers[layer]
        there = ledger.on_host & ~ledger.in_hbm
        return [
            self.hbm.all(
                layer, self.slots_by[row], lambda positions: self._held(ledger.in_hbm, positions), frozen=False
            ),
            self.host.all(layer, self.host.pool.slots, lambda positions: self._held(there, positions), frozen=False),
        ]

    def _held(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Which of ``positions`` [lane, slot] are in ``mask``; those of empty slots and padding are not."""
        none = self.hbm.pool.positions
        return mask.gather(-1, positions.clamp(max=none - 1)) & (positions < none) & self._real(positions)

    def settle(self, row: int, layer: int) -> None:
        """Homes of ``row``, while the step before it still runs: dead tokens go, others move outward."""
        moves = self.ledgers[layer].settle(row)
        leaving = max(0, self.homes.hbm[row - 1] - self.homes.hbm[row] + 1)
        if self.plan.setting.write_back is WriteBack.AT_EVICTION:
            self._move_out(layer, moves, leaving)
            if leaving and self.host.pool.slots:
                self.tally.add(row - 1, layer, written=moves.written)
        else:
            self.hbm.pool.drop(layer, moves.hbm_freed)
            with self.write_back.work(moves.host_freed):
                self.host.pool.drop(layer, moves.host_freed)
            self.written[layer] = self.write_back.last

    def _move_out(self, layer: int, moves: Moves, leaving: int) -> None:
        if not self.host.pool.slots:
            self.hbm.pool.drop(layer, moves.hbm_freed)
            return
        at, valid = listed(moves.written, leaving)
        k, v = self.hbm.take(layer, at)
        self.hbm.pool.drop(layer, moves.hbm_freed)
        with self.write_back.work(at, valid, k, v, moves.host_freed):
            self.host.pool.drop(layer, moves.host_freed)
            self.host.put(layer, at, valid, k, v)
        self.written[layer] = self.write_back.last

    def _adopt(self, row: int, layer: int, moved: list[_Moved]) -> None:
        kept = self.ledgers[layer].adopt(row)
        for k, v, positions, attended in moved:
            self.hbm.put(layer, positions, attended & kept.gather(-1, positions), k, v)

    def _fetched(self, layer: int, positions: Tensor, valid: Tensor) -> _Moved:
        k, v = self.host.take(layer, positions)
        return k, v, positions, valid

    def _on_host(self, row: int, layer: int, mask: Tensor) -> Part:
        """Tokens that the CPU attends to where they lie."""
        part = self.host.all(layer, self.host_slots_by[row], lambda positions: self._held(mask, positions), frozen=True)
        return replace(part, positions=part.positions.clamp(max=self.hbm.pool.positions - 1))

    def _reprojected(self, layer: int, positions: Tensor, valid: Tensor) -> _Moved:
        """Project saved inputs again; position encoding and key norm included."""
        inside = positions.clamp(max=self.inputs.shape[2] - 1)
        sequence = torch.arange(self.lanes.sequences, device=positions.device)[:, None]
        x = self.inputs[layer][sequence, inside]
        k, v = self.decoder.reproject(layer, x, (inside - self.padding[:, None]).clamp(min=0))
        return self.lanes.keys(k), self.lanes.keys(v), positions, valid

    def _put(self, tier: Tier, layer: int, mask: Tensor, length: int, k: Tensor, v: Tensor) -> None:
        """Store the prompt tokens in ``mask``, of which there are at most ``length``."""
        at, valid = listed(mask[:, : k.shape[1]], min(length, k.shape[1]))
        if at.shape[1] and tier.pool.slots:
            lane = torch.arange(k.shape[0], device=k.device)[:, None]
            tier.put(layer, at, valid, k[lane, at], v[lane, at])

    def _most_at_start(self) -> int:
        return self.counts.cached[0] if self.counts.dead[-1] else self.homes.hbm[0] + self.homes.host_kv[0]

    def _padded(self, x: Tensor) -> Tensor:
        """More inputs than the prompt has will be saved: room for those to come."""
        return torch.nn.functional.pad(x, (0, 0, 0, self.inputs.shape[2] - x.shape[1]))

    def _real(self, positions: Tensor) -> Tensor:
        return positions >= self.lanes.spread(self.padding)[:, None]


class _Allocator:
    """Zeroed memory of one tier, and how much of it was asked for."""

    def __init__(self, device: torch.device, *, host: bool) -> None:
        self.device, self.host, self.size_bytes = device, host, 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = (host_zeros if self.host else device_zeros)(self.device, shape, dtype)
        self.size_bytes += tensor.numel() * tensor.element_size()
        return tensor


def _whole_pages(slots: int) -> int:
    return -(-slots // PAGE_TOKENS) * PAGE_TOKENS
