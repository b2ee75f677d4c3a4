"""Who lies where: the homes and copies of one layer's tokens, lane by lane, moved outward as the plan says.

The rules are those of ``sim.recording``, which replays a recorded selection in plain numbers:
the oldest living tokens are the outermost; dropped are those attended to the longest ago, of equals the oldest; with
``resident`` placement what a step attends to has a copy, as far as there are slots, until a step leaves it out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.masks import lowest, newest, oldest
from sim.plan import Placement, Plan, Recompute, WriteBack


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Sets of tokens [lane, position]: slots that become free in HBM and on the host, and KV to be copied to the host."""

    hbm_freed: Tensor
    host_freed: Tensor
    written: Tensor


class Ledger:
    """Masks [lane, position]: ``home`` in HBM, ``inputs`` kept as layer inputs, ``on_host`` as KV, ``in_hbm`` home or copy."""

    def __init__(self, plan: Plan, lanes: int, device: torch.device) -> None:
        counts = plan.setting.token_counts
        self.plan, self.counts = plan, counts
        living = tuple(cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True))
        at_birth = plan.setting.write_back is WriteBack.AT_BIRTH
        self.stays = plan.homes.hbm == living and not at_birth  # what lives, lives in HBM alone
        self.position = torch.arange(counts.cached[-1], device=device)
        self.last = torch.full((lanes, counts.cached[-1]), -1, device=device)  # the row that last attended to a token
        none = torch.zeros_like(self.last, dtype=torch.bool)
        self.alive = none | (self.position < counts.cached[0])
        self.home, self.in_hbm = self.alive, self.alive
        self.inputs, self.on_host, self._kept_as_kv = none, none, none
        self.wanted, self.wanted_before = none, none  # what this step attends to, and what the one before did
        self.born = self.asked = 0  # the rows whose newborn token is there, whose picks are known

    @property
    def off_hbm(self) -> Tensor:
        """Living tokens with a home on the host, or kept as inputs; those recomputed from token ids are neither."""
        return self.alive & (self.inputs | self._kept_as_kv)

    @property
    def missing(self) -> Tensor:
        """What the step attends to and HBM lacks."""
        return self.wanted & self.off_hbm & ~self.in_hbm

    def local(self, row: int) -> Tensor:
        """The newest tokens, which every step attends to, the newborn among them."""
        cached = self.counts.cached[row]
        return (self.position >= cached - self.counts.local[row]) & (self.position < cached)

    def older(self, row: int) -> Tensor:
        """Living tokens that a selector may pick."""
        return self.alive & (self.position < self.counts.cached[row] - self.counts.local[row])

    def want(self, row: int, picks: Tensor) -> None:
        """Attend to ``picks`` and the newest tokens in ``row``."""
        self.asked = row
        self.wanted_before = self.wanted if row else self.alive & self.local(row)
        self.wanted = picks | self.local(row)
        self.last = self.last.masked_fill(self.wanted, row)

    def bury(self, row: int) -> None:
        """Let go of tokens until as many are dead as the plan says."""
        count = self.counts.dead[row] - (self.counts.dead[row - 1] if row else 0)
        if count:
            self.alive = self.alive & ~lowest(self.last.float(), self.alive, count)

    def settle(self, row: int) -> Moves:
        """Homes of ``row`` before its newborn token comes, copies of what is still wanted."""
        was_in_hbm, was_on_host = self.in_hbm, self.on_host
        if self.stays:
            self.home = self.in_hbm = self.home & self.alive
            return Moves(hbm_freed=was_in_hbm & ~self.alive, host_freed=self.on_host, written=self.on_host)
        homes, newborn = self.plan.homes, 1 if row else 0
        self.home = newest(self.home & self.alive, self._lanewise(max(0, homes.hbm[row] - newborn)))
        off = self.alive & ~self.home & (self.position >= self._forwarded(row))
        surviving = (self.inputs & self.alive).sum(-1)
        self.inputs = oldest(off, surviving.clamp(min=homes.activations[row]))
        at_birth = self.plan.setting.write_back is WriteBack.AT_BIRTH
        self.on_host = (off | self.home if at_birth else off) & ~self.inputs
        self._kept_as_kv = off & ~self.inputs
        attended_to = self.wanted if self.asked < row else self.wanted_before
        self.in_hbm = self.home | (was_in_hbm & attended_to & self._copies(row))
        return Moves(
            hbm_freed=was_in_hbm & ~self.in_hbm,
            host_freed=was_on_host & ~self.on_host,
            written=self.on_host & ~was_on_host,
        )

    def bear(self, row: int) -> None:
        """The newborn token of ``row`` is in HBM, with ``at_birth`` on the host too."""
        self.born = row
        newborn = self.position == self.counts.cached[row] - 1
        self.alive, self.home, self.in_hbm = self.alive | newborn, self.home | newborn, self.in_hbm | newborn
        if self.plan.setting.write_back is WriteBack.AT_BIRTH:
            self.on_host = self.on_host | newborn

    def release(self, row: int) -> Tensor:
        """Copies to discard now that it is known what ``row`` attends to."""
        before = self.in_hbm
        self.in_hbm = self.home | (before & self._copies(row))
        return before & ~self.in_hbm

    def adopt(self, row: int) -> Tensor:
        """Fetched tokens that stay as copies."""
        copies = self._copies(row) & ~self.in_hbm
        self.in_hbm = self.in_hbm | copies
        return copies

    def _copies(self, row: int) -> Tensor:
        """What has a copy in ``row``: wanted tokens that are off HBM, the newest if there are not slots for all.

        Before a selector that recalls has its query, what the step before attended to may still be wanted: it stays.
        """
        wanted = self.off_hbm & self.wanted
        if self.plan.setting.attention.selector.recalls and self.asked < row:
            return wanted if self.plan.setting.placement is Placement.RESIDENT else torch.zeros_like(wanted)
        return newest(wanted, self._room(row, reserved=1 if self.born < row else 0))

    def _room(self, row: int, reserved: int) -> Tensor:
        homes = self.plan.homes
        if self.plan.setting.placement is Placement.RECENT:
            return self._lanewise(0)
        return (homes.hbm[row] + homes.copies[row] - reserved - self.home.sum(-1)).clamp(min=0)

    def _forwarded(self, row: int) -> int:
        """Tokens at the front that are recomputed from token ids."""
        return self.plan.homes.dropped[row] if self.plan.setting.recompute is Recompute.TOKENS else 0

    def _lanewise(self, count: int) -> Tensor:
        return torch.full((self.alive.shape[0],), count, device=self.alive.device)
