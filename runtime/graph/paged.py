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
from runtime.quantise import encode_keys, encode_values, frozen_groups
from sim.attention import PAGE_TOKENS
from sim.kv import GROUP_TOKENS, KvFormat
from sim.plan import Plan, Setting

COUNT, SEQUENCE, PADDING, TABLE = range(4)  # columns of ``state``; the pages begin at TABLE
SHARES = GROUP_TOKENS // PAGE_TOKENS  # pages that hold a group's ranges, each some channels


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSize:
    """Bytes of a page, all layers, and the pages that an open group takes; its keys wait ``open_tokens`` a page."""

    page_bytes: int
    opened: int
    open_tokens: int

    @classmethod
    def of(cls, setting: Setting) -> "PageSize":
        """Raises ValueError for heads whose ranges a group's pages cannot share."""
        model, kv_format, native = setting.model, setting.kv_format.gpu, setting.dtype.size_bytes
        if kv_format.is_grouped and model.head_dim % SHARES:
            raise ValueError(f"head_dim={model.head_dim}, pages of {kv_format} need a multiple of {SHARES}")
        width = native if kv_format is KvFormat.NATIVE else 1
        head_bytes = 2 * PAGE_TOKENS * model.head_dim * width
        if kv_format.is_grouped:
            head_bytes += 2 * 2 * (PAGE_TOKENS + model.head_dim // SHARES)  # two 16-bit floats a value and channel
        open_tokens = 2 * PAGE_TOKENS // native
        return cls(
            page_bytes=model.layers * model.kv_heads * head_bytes,
            opened=GROUP_TOKENS // open_tokens if kv_format.is_grouped else 0,
            open_tokens=open_tokens,
        )

    def pages_of(self, tokens: int) -> int:
        """Of a sequence with ``tokens`` cached."""
        return -(-tokens // PAGE_TOKENS) + self.opened


class PagedSlots:
    """``blocks`` [layer, page, head, 2, page token, channel]; with INT8 also the ranges that levels are read by.

    All of it fits ``plan``'s budget; the tables, a few KiB, are not counted.
    """

    def __init__(self, plan: Plan, decoder: Decoder, lanes: int, shape: Shape | None = None) -> None:
        spec, work, device = decoder.spec, plan.setting.workload, decoder.device
        self.kv_format, self.dtype, self.size = plan.setting.kv_format.gpu, decoder.dtype, PageSize.of(plan.setting)
        self.heads, self.channels = spec.kv_heads, spec.head_dim
        self.shape, self.chained = shape or Shape(), chains(device, lanes)
        self.grouped = self.kv_format.is_grouped
        self.most_pages = -(-work.cached_tokens // PAGE_TOKENS)
        self.pages = self._affordable(plan.setting.kv_budget_bytes, lanes)
        native = self.kv_format is KvFormat.NATIVE
        block = (spec.layers, self.pages, spec.kv_heads, 2, PAGE_TOKENS, spec.head_dim)
        self.planes = [torch.zeros(block, dtype=decoder.dtype if native else torch.uint8, device=device)]
        if self.grouped:
            ranges = (*block[:3], 2)
            for width in (spec.head_dim // SHARES, PAGE_TOKENS):  # of keys, of values
                self.planes.append(torch.zeros((*ranges, width), dtype=torch.float16, device=device))
        self.open_column = TABLE + self.most_pages
        self.state = torch.zeros((lanes, self.open_column + self.size.opened), dtype=torch.int32, device=device)

    @property
    def kv_bytes(self) -> int:
        """Of HBM."""
        return self.pages * self.size.page_bytes

    def enter(self, layer: int, pages: Tensor, opened: Tensor, k: Tensor, v: Tensor) -> None:
        """Store prompts [sequence, token, head, channel] in ``pages`` [sequence, page]; ``opened`` are the open groups'."""
        blocks = self.planes[0][layer]
        if not self.grouped:
            for which, rows in enumerate((k, v)):  # FP8 and native store keys and values alike
                blocks[pages, :, which] = _paged(encode_keys(rows, self.kv_format, None))
            return
        frozen = k.shape[1] // GROUP_TOKENS * GROUP_TOKENS
        if frozen:
            held = pages[:, : frozen // PAGE_TOKENS].reshape(-1, SHARES)
            levels, ranges = frozen_groups(k, self.kv_format)
            blocks[held, :, 0] = _paged(levels)
            shares = ranges.view(*ranges.shape[:3], SHARES, -1).permute(0, 3, 2, 1, 4)
            self.planes[1][layer, held] = shares  # [group, share, head, 2, channel]
        values = encode_values(v, self.kv_format)
        blocks[pages, :, 1] = _paged(values["v"])
        self.planes[2][layer, pages] = _paged(values["v_range"]).transpose(-1, -2)
        waiting = torch.zeros((k.shape[0], GROUP_TOKENS, *k.shape[2:]), dtype=k.dtype, device=k.device)
        waiting[:, : k.shape[1] - frozen] = k[:, frozen:]
        waiting = waiting.view(k.shape[0], self.size.opened, self.size.open_tokens, *k.shape[2:])
        self._native[layer, opened] = waiting.transpose(2, 3)

    def begin_step(self) -> None:
        """The state was set before."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        """Queries [lane, query head, channel], newborn keys and values [lane, head, channel] over each lane's pages."""
        common = {
            "TABLE": TABLE,
            "PAGE": PAGE_TOKENS,
            "GROUPED": q.shape[1] // self.heads,
            "CHANNELS": self.channels,
            "PADDED": power_of_two(self.channels),
            "BLOCK": self.shape.block,
            "CHAINED": self.chained,
            "num_warps": self.shape.warps,
        }
        grid, rows = q.shape[:2], (q, k, v)
        numbers = (self.channels**-0.5, q.stride(0), k.stride(0), self.state.shape[1], self.heads)
        blocks = self.planes[0][layer]
        if not self.grouped:
            eight_bit = self.kv_format is KvFormat.FP8
            blocks = blocks.view(torch.float8_e4m3fn) if eight_bit else blocks
            _kernels().attend[grid](*rows, blocks, self.state, attended, *numbers, EIGHT_BIT=eight_bit, **common)
            return
        _kernels().attend_int8[grid](
            *rows,
            blocks,
            self._native[layer],
            self.planes[1][layer],
            self.planes[2][layer],
            self.state,
            attended,
            *numbers,
            self.open_column,
            GROUP=GROUP_TOKENS,
            QUARTER=self.channels // SHARES,
            PER=self.size.open_tokens,
            FREEZE=8,
            **common,
        )

    def settle(self, layer: int) -> None:
        """Nothing is chosen."""

    @property
    def _native(self) -> Tensor:
        """Pages of open groups, [layer, page, head, token, channel]."""
        blocks = self.planes[0]
        return blocks.flatten(3).view(self.dtype).view(*blocks.shape[:3], self.size.open_tokens, self.channels)

    def _affordable(self, budget_bytes: int, lanes: int) -> int:
        """Pages in the budget, no more than all lanes can fill."""
        one = self.most_pages + self.size.opened
        if budget_bytes < one * self.size.page_bytes:
            need = one * self.size.page_bytes
            raise ValueError(f"kv_budget_bytes={budget_bytes:,}, must hold one whole sequence of {need:,} bytes")
        return min(budget_bytes // self.size.page_bytes, lanes * one)


def _paged(rows: Tensor) -> Tensor:
    """[sequence, token, head, …] as [sequence, page, head, page token, …], zeros after the last token."""
    short = -rows.shape[1] % PAGE_TOKENS
    if short:
        rows = torch.cat((rows, rows.new_zeros((rows.shape[0], short, *rows.shape[2:]))), dim=1)
    return rows.view(rows.shape[0], -1, PAGE_TOKENS, *rows.shape[2:]).transpose(2, 3)


def _kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import paged_kernels as module

    return module
