"""Page digests with recall on the device: scored once a layer's query is known, what is missing then fetched from the host.

The newest tokens are at home in HBM, older ones on the host; what a step attends to has a copy in HBM until a step leaves
it out. The rules are those of ``runtime.selectors.pages`` and ``runtime.ledger``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.graph.fetching import fetch, kernels
from runtime.graph.launch import EXCHANGED_HEADS, Launcher, power_of_two
from runtime.graph.pinned import registered
from runtime.lanes import Lanes
from runtime.models import Decoder
from runtime.tally import Tally
from sim.attention import PAGE_TOKENS
from sim.plan import Plan, WriteBack
from sim.slots import hbm_slots, most_attended

_FEW_PAGES = 128  # of a lane: what chooses among them takes few warps
_FEW_PROGRAMS, _SOME_PROGRAMS = 640, 1024  # of a lane and query head each, up to which four warps score faster than one
_DIGESTED = 512  # channels of a page's tokens that a program takes at once


class Entries(NamedTuple):
    """Of every layer and lane; the names are ``recall_kernels.choose``'s."""

    digests: Tensor
    slot_of: Tensor
    holds: Tensor
    taken: Tensor
    fetch_counts: Tensor


class Scratch(NamedTuple):
    """What one layer's kernels tell each other; layers follow one another."""

    scores: Tensor
    peaks: Tensor
    totals: Tensor
    free: Tensor
    slots: Tensor
    counts: Tensor
    fetches: Tensor


class RecallSlots:
    """Keys and values [layer, lane, head, slot, channel]; on the host [layer, lane, position, head, channel].

    ``bias`` [row, lane, page] is added to the pages' scores, for tests and benchmarks of other selections than the
    weights lead to.
    """

    def __init__(self, plan: Plan, decoder: Decoder, lanes: Lanes, padding: Tensor, row: Tensor) -> None:
        spec, device = decoder.spec, decoder.device
        self.plan, self.decoder, self.lanes, self.padding, self.row = plan, decoder, lanes, padding, row
        self.counts = plan.setting.token_counts
        self.launcher = Launcher(spec, padding)
        self.width = most_attended(plan.setting)
        self.near, self.far = hbm_slots(plan), _host_rows(plan)
        shape = (spec.layers, lanes.count, spec.kv_heads, self.near, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        host = (spec.layers, lanes.count, max(1, self.far), spec.kv_heads, spec.head_dim)
        self.host_keys, self.host_values = (registered(device, host, decoder.dtype) for _ in range(2))
        self.pages = -(-self.counts.cached[-1] // PAGE_TOKENS)
        self.state, self.scratch = self._entries(), self._scratch()
        self.table = _table(plan, device)
        self.off = plan.homes.host_kv[min(1, plan.homes.steps - 1)]  # of the first step, the oldest tokens
        self.first = self._first_homes()
        self.bias: Tensor | None = None

    @property
    def kv_bytes(self) -> int:
        """Of HBM: slots and digests."""
        held = (self.keys, self.values, self.state.digests)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def fetched_tokens(self) -> Tensor:
        """[layer, row, lane]: tokens that came from the host."""
        return self.state.fetch_counts

    def start(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        """Take in digests, and the homes of the first step."""
        lanes, tokens, off = slice(first, first + k.shape[0]), k.shape[1], self.off
        self._digest(layer, first, k)
        on_host = min(tokens, self.far) if self.plan.setting.write_back is WriteBack.AT_BIRTH else off
        for rows, here, there in ((k, self.keys, self.host_keys), (v, self.values, self.host_values)):
            there[layer, lanes, :on_host] = rows[:, :on_host]
            here[layer, lanes, :, : tokens - off] = rows[:, off:].transpose(1, 2)
        self.state.slot_of[layer, lanes], self.state.holds[layer, lanes] = self.first
        self.state.taken[layer, lanes].zero_()

    def begin_step(self) -> None:
        """Nothing is chosen before the query is known."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        self.choose(layer, q, k)
        if self.far:
            self._fetch(layer)
        self.launcher.attend(
            q,
            k,
            v,
            self.keys[layer],
            self.values[layer],
            attended,
            counts=self.scratch.counts,
            slots=self.scratch.slots,
        )

    def choose(self, layer: int, q: Tensor, k: Tensor) -> None:
        """What the step attends to, and which of it must come from the host; the newborn key is taken in."""
        self._score(layer, q, k)
        self._choose(layer)

    def settle(self, layer: int) -> None:
        """Write back what leaves HBM."""
        if not self.far:
            return
        kernels().write_back[(self.launcher.exchanging,)](
            self.state.slot_of[layer],
            self.row,
            self.table,
            self.keys[layer],
            self.values[layer],
            self.host_keys[layer],
            self.host_values[layer],
            self.lanes.count,
            self.launcher.heads,
            self.near,
            self.host_keys.shape[2],
            self.counts.cached[-1],
            self.table.shape[1],
            CHANNELS=self.launcher.channels,
            PADDED=self.launcher.padded,
            HEADS=min(EXCHANGED_HEADS, power_of_two(self.launcher.heads)),
            num_warps=8,
        )

    def record(self, row: int, tally: Tally, lanes: int) -> None:
        """Count, of the first ``lanes``, what ``row`` fetched and wrote."""
        *_, firsts, lasts = _columns(self.plan)
        first, last = firsts[row], lasts[row]
        tally.put(row, written=lanes * (min(last, self.far) - (first if row else 0)))
        if row and self.far:
            tally.add_all(row, fetched=self.state.fetch_counts[:, row, :lanes, None])

    def picks(self) -> list[list[tuple[int, ...]]]:
        """Positions with a place in HBM after the last step, [layer][lane]: those at home, and those attended to."""
        return [
            [tuple(sorted(position for position in lane if position >= 0)) for lane in layer]
            for layer in self.state.holds.tolist()
        ]

    def chosen(self, row: int) -> Tensor:
        """Older tokens that ``row``, the last step, picked, [layer, lane, position]."""
        position, padding = torch.arange(self.counts.cached[-1], device=self.decoder.device), self.padding[:, None]
        take = self.state.taken.repeat_interleave(PAGE_TOKENS, dim=-1)[..., : len(position)]
        first = torch.maximum(position // PAGE_TOKENS * PAGE_TOKENS, padding)
        older = self.counts.cached[row] - self.counts.local[row]
        return (position >= padding) & (position < older) & (position - first < take)

    def _digest(self, layer: int, first: int, k: Tensor) -> None:
        (lanes, tokens), width = k.shape[:2], self.launcher.heads * self.launcher.channels
        rows = k if k.stride()[2:] == (self.launcher.channels, 1) else k.contiguous()
        block = min(_DIGESTED, power_of_two(width))
        kernels().digest[lanes, self.pages, -(-width // block)](
            rows,
            self.state.digests[layer],
            self.launcher.padding,
            first,
            *rows.stride()[:2],
            tokens,
            self.pages,
            width,
            PAGE=PAGE_TOKENS,
            BLOCK=block,
            num_warps=2,
        )

    def _score(self, layer: int, q: Tensor, k: Tensor) -> None:
        launcher, scratch = self.launcher, self.scratch
        warps, block = _score_tile(self.lanes.count * launcher.queries, self.pages)
        kernels().score[self.lanes.count, launcher.queries](
            q,
            k,
            self.state.digests[layer],
            scratch.scores,
            scratch.peaks,
            scratch.totals,
            launcher.padding,
            self.row,
            self.table,
            launcher.channels**-0.5,
            q.stride(0),
            k.stride(0),
            launcher.heads,
            self.pages,
            GROUP=launcher.group,
            CHANNELS=launcher.channels,
            PADDED=launcher.padded,
            PAGE=PAGE_TOKENS,
            BLOCK=block,
            num_warps=warps,
        )

    def _choose(self, layer: int) -> None:
        scratch, state = self.scratch, self.state
        pages = power_of_two(self.pages)
        kernels().choose[(self.lanes.count,)](
            scratch.scores,
            scratch.peaks,
            scratch.totals,
            scratch.scores if self.bias is None else self.bias,
            state.taken[layer],
            state.slot_of[layer],
            state.holds[layer],
            scratch.free,
            scratch.slots,
            scratch.counts,
            scratch.fetches,
            state.fetch_counts[layer],
            self.launcher.padding,
            self.row,
            self.table,
            self.launcher.queries,
            self.pages,
            self.table.shape[1],
            self.counts.cached[-1],
            self.near,
            self.width,
            PAGE=PAGE_TOKENS,
            PAGES=pages,
            SLOTS=power_of_two(self.near),
            CHUNK=1024 if pages <= _FEW_PAGES else 4096,
            HEADS=max(1, min(power_of_two(self.launcher.queries), 4096 // pages)),
            BIASED=self.bias is not None,
            num_warps=8 if pages <= _FEW_PAGES else 16,
        )

    def _fetch(self, layer: int) -> None:
        here, there = (self.keys[layer], self.values[layer]), (self.host_keys[layer], self.host_values[layer])
        fetch(self.scratch.fetches, self.state.fetch_counts[layer], self.row, here, there)

    def _first_homes(self) -> tuple[Tensor, Tensor]:
        """Slots by position and positions by slot, of every lane after the prompt, as the first step needs them."""
        tokens, off = self.counts.cached[0], self.off
        slot_of, holds = (self._numbers(size).fill_(-1) for size in (self.counts.cached[-1], self.near))
        places = torch.arange(tokens - off, device=holds.device, dtype=torch.int32)
        slot_of[off:tokens], holds[: tokens - off] = places, places + off
        return slot_of, holds

    def _entries(self) -> Entries:
        spec, device, dtype = self.decoder.spec, self.decoder.device, self.decoder.dtype
        both = (spec.layers, self.lanes.count)
        return Entries(
            digests=torch.zeros((*both, self.pages, 2, spec.kv_heads, spec.head_dim), dtype=dtype, device=device),
            slot_of=self._numbers(*both, self.counts.cached[-1]).fill_(-1),
            holds=self._numbers(*both, self.near).fill_(-1),
            taken=self._numbers(*both, self.pages),
            fetch_counts=self._numbers(spec.layers, self.plan.homes.steps, self.lanes.count),
        )

    def _scratch(self) -> Scratch:
        lanes, queries, device = self.lanes.count, self.launcher.queries, self.decoder.device
        return Scratch(
            scores=torch.zeros((lanes, queries, self.pages), device=device),
            peaks=torch.zeros((lanes, queries), device=device),
            totals=torch.ones((lanes, queries), device=device),
            free=self._numbers(lanes, self.near),
            slots=self._numbers(lanes, self.width),
            counts=self._numbers(lanes).fill_(1),
            fetches=self._numbers(lanes, self.width, 2),
        )

    def _numbers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.decoder.device)


def has_room_for_copies(plan: Plan) -> bool:
    """Whether in every row the local window is at home in HBM, and the slots hold all that is selected beyond it."""
    homes, counts, slots = plan.homes, plan.setting.token_counts, hbm_slots(plan)
    rows = zip(homes.hbm, homes.host_kv, counts.local, counts.selected, strict=True)
    return all(hbm >= local and hbm + min(off, selected) <= slots for hbm, off, local, selected in rows)


def _score_tile(programs: int, pages: int) -> tuple[int, int]:
    """Warps of a program that scores, and pages that they take at once, the best of those tried on an H200: few programs must
    have much in flight, many fill the card by themselves.
    """
    if pages > _FEW_PAGES or (programs <= _FEW_PROGRAMS and pages > 32):
        return 4, 64
    return (4, 32) if programs <= _SOME_PROGRAMS else (1, 16)


def _host_rows(plan: Plan) -> int:
    """Positions of a lane that the host holds at some time, from 0 on."""
    if plan.setting.write_back is WriteBack.AT_BIRTH:
        return plan.setting.token_counts.cached[-1]
    return max(plan.homes.host_kv)


def _table(plan: Plan, device: torch.device) -> Tensor:
    """[6, row]: what ``recall_kernels.score`` looks up. The first row's write-back is the prefill's."""
    return torch.tensor(_columns(plan), dtype=torch.int32, device=device)


def _columns(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Cached, older and selected tokens, those off HBM, and from and to which one a row writes to the host."""
    counts, off = plan.setting.token_counts, plan.homes.host_kv
    older = tuple(cached - near for cached, near in zip(counts.cached, counts.local, strict=True))
    if plan.setting.write_back is WriteBack.AT_BIRTH:
        first, last = tuple(cached - 1 for cached in counts.cached), counts.cached
    else:
        first, last = off, (*off[1:], off[-1])
    return counts.cached, older, counts.selected, off, first, last
