"""Matrix products of few rows, and the residual sums and norms between them, chained where the GPU can."""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as fn

from runtime.graph.launch import chains, power_of_two
from runtime.models.decoder import Affine, Decoder, LayerWeights

MOST_ROWS = 64
_SHARED_BYTES = 227 * 1024  # of a multiprocessor, from Hopper on
_EVEN = 0.9  # of the places for programs, in use until the last of them ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Of a weight matrix: columns and inner elements of a tile, parts of the inner dimension, tiles in flight."""

    columns: int
    inner: int
    parts: int
    stages: int

    def fits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it divides ``weight`` [column, inner] for the rows of ``x``, into programs that keep the GPU busy to the end;
        what it does not, cuBLAS multiplies.
        """
        columns, inner = weight.shape
        sixteen_bit = x.dtype in (torch.float16, torch.bfloat16)
        divides = columns % self.columns == 0 and inner % (self.inner * self.parts) == 0
        if not (sixteen_bit and divides and x.shape[0] <= MOST_ROWS):
            return False
        return x.device.type != "cuda" or self.is_even(x.shape[0], columns, _multiprocessors(x.device))

    def is_even(self, rows: int, columns: int, multiprocessors: int) -> bool:
        """Whether all programs run at once, or in rounds that are nearly full.

        Measured on an H200: 160 programs of 32 rows, of which 132 run at once, take 25 to 33 % longer than those of 16 rows, which
        all do; 320 of which 264 do, 29 %; see benchmarks/NOTES.md.
        """
        together = _rows_at_once(rows) + self.columns
        at_once = multiprocessors * max(1, _SHARED_BYTES // (2 * together * self.inner * self.stages))
        programs = columns // self.columns * self.parts
        rounds = -(-programs // at_once)
        return rounds == 1 or programs >= _EVEN * rounds * at_once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """Parts [part, row, column] that are still to be added, and the bias of their sum."""

    parts: Tensor
    bias: Tensor | None


def linear(x: Tensor, affine: Affine, tiling: Tiling, *, relu: bool = False) -> Tensor:
    """With bias, and ReLU where asked for. ``tiling`` has one part."""
    weight = affine.widened()
    if not tiling.fits(x, weight) or affine.bias is None:
        y = fn.linear(x, weight, affine.bias)
        return fn.relu(y) if relu else y
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _launch(x, weight, affine.bias, out, tiling, relu=relu)
    return out


def partial_linear(x: Tensor, affine: Affine, tiling: Tiling) -> Sum:
    """In parts, which ``add_norm`` adds up."""
    weight = affine.widened()
    if not tiling.fits(x, weight):
        return Sum(parts=fn.linear(x, weight, affine.bias)[None], bias=None)
    out = torch.empty((tiling.parts, x.shape[0], weight.shape[0]), device=x.device)
    _launch(x, weight, None, out, tiling, relu=False)
    return Sum(parts=out, bias=affine.bias)


def add_norm(
    x: Tensor, added: Sum | None, norm: Affine, eps: float, normed: Tensor, *, centred: bool, apart: bool = False
) -> None:
    """``x`` [row, hidden] += ``added``, and its norm in ``normed``: by layer where ``centred``, else by root mean square.

    ``apart``: among kernels that are not chained.
    """
    width, chained = x.shape[1], not apart and chains(x.device, x.shape[0])
    added_bias = None if added is None else added.bias
    _kernels().add_norm[(x.shape[0],)](
        x,
        x if added is None else added.parts,
        x if added_bias is None else added_bias,
        norm.weight,
        x if norm.bias is None else norm.bias,
        normed,
        width,
        eps,
        WIDTH=power_of_two(width),
        PARTS=0 if added is None else added.parts.shape[0],
        ADDED_BIAS=added_bias is not None,
        BIASED=norm.bias is not None,
        CENTRED=centred,
        CHAINED=chained,
        launch_pdl=chained,
        num_warps=8 if width > 1024 else 1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """How queries and keys take in their position; ``norms`` of their channels come before, where a model has them."""

    frequencies: Tensor
    magnitude: float
    eps: float

    @classmethod
    def of(cls, decoder: Decoder) -> "Turning | None":
        """None where positions are in the embedding."""
        if decoder.frequencies is None:
            return None
        return cls(frequencies=decoder.frequencies, magnitude=decoder.magnitude, eps=decoder.config.norm_eps)


Norms = tuple[Tensor, Tensor]  # of a query's and of a key's channels


def head_norms(layer: LayerWeights) -> Norms | None:
    """None where a model has none."""
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return layer.query_norm, layer.key_norm


def place(
    rows: Tensor, queries: int, positions: Tensor, turning: Turning, norms: Norms | None, *, at_once: int = 1
) -> None:
    """Position and norm of ``rows`` [lane, query and key head, channel], in place; ``positions`` [lane].

    ``at_once``: heads of a program, a power of two.
    """
    lanes, heads, channels = rows.shape
    query_norm, key_norm = norms or (rows, rows)
    _kernels().place[lanes, -(-heads // at_once)](
        rows,
        positions,
        turning.frequencies,
        query_norm,
        key_norm,
        heads,
        queries,
        rows.stride(0),
        turning.eps,
        turning.magnitude,
        HEADS=at_once,
        CHANNELS=channels,
        PADDED=power_of_two(channels),
        DIMS=2 * turning.frequencies.shape[0],
        NORMED=norms is not None,
        num_warps=min(4, at_once),
    )


def gate(up: Tensor, out: Tensor | None = None) -> Tensor:
    """``up`` [row, 2 * width] to [row, width]: the second half times SiLU of the first, which ``out`` may be."""
    rows, width = up.shape[0], up.shape[1] // 2
    out = up.new_empty((rows, width)) if out is None else out
    _kernels().gate[rows, -(-width // 1024)](up, out, width, out.stride(0), BLOCK=1024, num_warps=4)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tiling: Tiling, *, relu: bool) -> None:
    chained = chains(x.device, x.shape[0])
    _kernels().product[weight.shape[0] // tiling.columns, tiling.parts](
        x,
        weight,
        x if bias is None else bias,
        out,
        x.shape[0],
        weight.shape[0],
        weight.shape[1],
        ROWS=_rows_at_once(x.shape[0]),
        COLUMNS=tiling.columns,
        INNER=tiling.inner,
        PARTS=tiling.parts,
        RAW=bias is None,
        RELU=relu,
        CHAINED=chained,
        launch_pdl=chained,
        num_warps=4,
        num_stages=tiling.stages,
    )


def _rows_at_once(rows: int) -> int:
    """Of a tile; 32 would take the matrix units' older instructions: slower."""
    return 16 if rows <= 16 else MOST_ROWS


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import product_kernels as module

    return module
