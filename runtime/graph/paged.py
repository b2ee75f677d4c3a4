"""Keys and values of sequences of any age, in pages that one pool lends: continuous admission's memory.

What a lane does in a step is a row of ``state``: tokens with the newborn one (0: the lane is idle), the sequence, its
padding, then its pages. Layers share it. Integer keys of the newest group wait in pages of their own.
"""

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from runtime.graph.launch import chains, power_of_two
from runtime.models import Decoder
from runtime.quantise import encode_keys, encode_values, key_range
from sim.attention import PAGE_TOKENS
from sim.kv import GROUP_TOKENS, KvFormat
from sim.plan import Plan

COUNT, SEQUENCE, PADDING, TABLE = range(4)  # columns of ``state``; the pages begin at TABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of an attention kernel: tokens that a loop takes at once, warps of a program."""

    block: int = 32
    warps: int = 1


@dataclass(slots=True, kw_only=True)
class Leaf:
    """A sequence's pages: of its tokens in order, and of its open group."""

    tokens: list[int] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)

    @property
    def all(self) -> list[int]:
        return self.tokens + self.opened


class PagedSlots:
    """``blocks`` [layer, page, head, 2, page token, channel]; with INT8 also the ranges that levels are read by.

    All of it fits ``plan``'s budget; the tables, a few KiB, are not counted.
    """

    def __init__(self, plan: Plan, decoder: Decoder, lanes: int, shape: Shape | None = None) -> None:
        spec, work, device = decoder.spec, plan.setting.workload, decoder.device
        self.kv_format, self.dtype = plan.setting.kv_format.gpu, decoder.dtype
        self.heads, self.channels = spec.heads, spec.head_dim
        self.shape, self.chained = shape or Shape(), chains(device, lanes)
        self.grouped = self.kv_format.is_grouped
        self.stored = {KvFormat.NATIVE: decoder.dtype, KvFormat.FP8: torch.float8_e4m3fn}.get(
            self.kv_format, torch.uint8
        )
        self.opened = GROUP_TOKENS // self._open_page_tokens if self.grouped else 0
        self.most_pages = -(-work.cached_tokens // PAGE_TOKENS)
        head_bytes = 2 * PAGE_TOKENS * spec.head_dim * self.stored.itemsize
        ranges_bytes = 4 * (PAGE_TOKENS + spec.head_dim // _SHARES) if self.grouped else 0
        self.page_bytes = spec.layers * spec.heads * (head_bytes + ranges_bytes)
        self.pages = min(plan.setting.kv_budget_bytes // self.page_bytes, lanes * (self.most_pages + self.opened))
        self._require_page(plan.setting.kv_budget_bytes)
        block = (spec.layers, self.pages, spec.heads, 2, PAGE_TOKENS, spec.head_dim)
        self._bytes = torch.zeros(block, dtype=torch.uint8 if self.stored.itemsize == 1 else self.stored, device=device)
        self.blocks = self._bytes.view(self.stored)
        groups = self.pages if self.grouped else 1
        half = {"dtype": torch.float16, "device": device}
        self.key_ranges = torch.zeros((spec.layers, groups, spec.heads, 2, spec.head_dim // _SHARES), **half)
        self.value_ranges = torch.zeros((spec.layers, groups, spec.heads, 2, PAGE_TOKENS), **half)
        self.open_column = TABLE + self.most_pages
        self.state = torch.zeros((lanes, self.open_column + self.opened), dtype=torch.int32, device=device)

    @property
    def kv_bytes(self) -> int:
        """Of HBM."""
        return self.pages * self.page_bytes

    def pages_of(self, tokens: int) -> int:
        """Of a sequence with ``tokens`` cached."""
        return -(-tokens // PAGE_TOKENS) + self.opened

    def enter(self, layer: int, pages: Tensor, opened: Tensor, k: Tensor, v: Tensor) -> None:
        """Store prompts [sequence, token, head, channel] in ``pages`` [sequence, page]; ``opened`` are the open groups'."""
        if not self.grouped:
            for which, rows in enumerate((k, v)):
                stored = encode_keys(rows, self.kv_format, None)  # FP8 and native store keys and values alike
                self._bytes[layer, pages, :, which] = _paged(stored).to(self._bytes.dtype)
            return
        frozen = k.shape[1] // GROUP_TOKENS * GROUP_TOKENS
        per = GROUP_TOKENS // PAGE_TOKENS
        for first in range(0, frozen, GROUP_TOKENS):
            keys, held = k[:, first : first + GROUP_TOKENS], pages[:, first // PAGE_TOKENS :][:, :per]
            ranges = key_range(keys, 8)  # [sequence, 2, head, channel]
            levels = encode_keys(keys, self.kv_format, ranges[:, None].expand(-1, GROUP_TOKENS, -1, -1, -1))
            self._bytes[layer, held, :, 0] = _paged(levels)
            shares = ranges.unflatten(-1, (_SHARES, -1)).permute(0, 3, 2, 1, 4)  # [sequence, share, head, 2, channel]
            self.key_ranges[layer, held] = shares
        values = encode_values(v, self.kv_format)
        self._bytes[layer, pages, :, 1] = _paged(values["v"])
        self.value_ranges[layer, pages] = _paged(values["v_range"]).transpose(-1, -2)
        waiting = torch.zeros((k.shape[0], GROUP_TOKENS, *k.shape[2:]), dtype=k.dtype, device=k.device)
        waiting[:, : k.shape[1] - frozen] = k[:, frozen:]
        rows = waiting.unflatten(1, (self.opened, -1)).transpose(2, 3)  # [sequence, page, head, token, channel]
        self._native[layer, opened] = rows

    def begin_step(self) -> None:
        """The state was set before."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        """Queries, newborn keys and values [lane, head, channel] (rows of one tensor) over each lane's pages."""
        common = {
            "TABLE": TABLE,
            "PAGE": PAGE_TOKENS,
            "CHANNELS": self.channels,
            "PADDED": power_of_two(self.channels),
            "BLOCK": self.shape.block,
            "CHAINED": self.chained,
            "num_warps": self.shape.warps,
        }
        grid, rows = (q.shape[0], self.heads), (q, k, v)
        numbers = (self.channels**-0.5, q.stride(0), self.state.shape[1], self.heads)
        if not self.grouped:
            eight_bit = self.kv_format is KvFormat.FP8
            _kernels().attend[grid](
                *rows, self.blocks[layer], self.state, attended, *numbers, EIGHT_BIT=eight_bit, **common
            )
            return
        _kernels().attend_int8[grid](
            *rows,
            self.blocks[layer],
            self._native[layer],
            self.key_ranges[layer],
            self.value_ranges[layer],
            self.state,
            attended,
            *numbers,
            self.open_column,
            GROUP=GROUP_TOKENS,
            QUARTER=self.channels // _SHARES,
            PER=self._open_page_tokens,
            **common,
        )

    def settle(self, layer: int) -> None:
        """Nothing is chosen."""

    def read(self, layer: int, pages: Tensor) -> list[Tensor]:
        """Rows of ``pages`` [page] in every plane, copied."""
        return [plane[layer].index_select(0, pages) for plane in self._planes]

    def write(self, layer: int, pages: Tensor, rows: list[Tensor]) -> None:
        """What ``read`` gave."""
        for plane, row in zip(self._planes, rows, strict=True):
            plane[layer].index_copy_(0, pages, row)

    @property
    def _planes(self) -> tuple[Tensor, ...]:
        return (self._bytes, self.key_ranges, self.value_ranges) if self.grouped else (self._bytes,)

    @property
    def _native(self) -> Tensor:
        """Pages of open groups, [layer, page, head, token, channel]."""
        return self._bytes.flatten(3).view(self.dtype).unflatten(-1, (self._open_page_tokens, self.channels))

    @property
    def _open_page_tokens(self) -> int:
        """Keys in the compute type that a page of levels has room for."""
        return 2 * PAGE_TOKENS // self.dtype.itemsize

    def _require_page(self, budget_bytes: int) -> None:
        need = self.pages_of(self.most_pages * PAGE_TOKENS)
        if self.pages < need:
            raise ValueError(
                f"kv_budget_bytes={budget_bytes:,}, must hold one whole sequence of {need * self.page_bytes:,} bytes"
            )
        if self.grouped and self.channels % _SHARES:
            raise ValueError(f"head_dim={self.channels}, pages of {self.kv_format} need a multiple of {_SHARES}")


_SHARES = GROUP_TOKENS // PAGE_TOKENS  # pages that hold a group's ranges, each some channels


def _paged(rows: Tensor) -> Tensor:
    """[sequence, token, head, …] as [sequence, page, head, page token, …], zeros after the last token."""
    short = -rows.shape[1] % PAGE_TOKENS
    if short:
        rows = torch.cat((rows, rows.new_zeros((rows.shape[0], short, *rows.shape[2:]))), dim=1)
    return rows.unflatten(1, (-1, PAGE_TOKENS)).transpose(2, 3)


def _kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import paged_kernels as module

    return module
