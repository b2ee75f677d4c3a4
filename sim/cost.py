"""Bytes and FLOPs to seconds, operation by operation. Pure; durations come from here and what builds on it alone."""

from dataclasses import dataclass, field, replace
from math import cos, log, pi, sin
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from sim.counts import Column
from sim.kv import KvFormat
from sim.plan import Mechanism
from sim.profile import Profile
from sim.spec import DType, MachineSpec, WeightFormat, weight_bytes_per_parameter

Amount = TypeVar("Amount", float, Column)
_Ratios: TypeAlias = tuple[list[float], list[float]]
# Cosines and sines of five angles: a hypotenuse is the largest of such sums, to 2 %. Streaming alone comes first, arithmetic last.
_TANGENTS = ((1.0, 0.0), *((cos(turn * pi / 8), sin(turn * pi / 8)) for turn in (1, 2, 3)), (0.0, 1.0))
SETTLING_S = (
    0.08  # of clocks: an H200's prefills of 0.06 to 0.4 s, and steps that recompute; an H100's of 0.1, 0.4 and 1.5 s
)
_KNOWN_BEYOND = 4  # times the most rows that were measured, from which on a product is taken for what its curve says
QUERY_TILE = 64  # of a head's queries, which a program of a GPU's causal attention takes together


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The largest of affine functions of a token (or row, or byte) count; 0 at a count of 0 if ``free_at_zero``.

    Program and engine read the same pieces: (constant_s, per_unit_s).
    """

    pieces: tuple[tuple[float, float], ...]
    free_at_zero: bool = False

    def at(self, counts: Column) -> Column:
        """Seconds for each of ``counts``."""
        if self.free_at_zero and not counts.any():
            return np.zeros(len(counts))  # most plans leave most operations unused
        seconds: Column = self.pieces[-1][0] + self.pieces[-1][1] * counts
        for constant_s, per_unit_s in self.pieces[:-1]:
            seconds = np.maximum(seconds, constant_s + per_unit_s * counts if per_unit_s else constant_s)
        return seconds * (counts > 0) if self.free_at_zero else seconds

    def at_one(self, count: float) -> float:
        """Seconds for one count."""
        if self.free_at_zero and count <= 0:
            return 0.0
        return max(constant_s + per_unit_s * count for constant_s, per_unit_s in self.pieces)

    def scaled(self, units_per_count: float) -> "Pieces":
        """The same cost by a count of which each stands for ``units_per_count`` units."""
        pieces = tuple((constant_s, per_unit_s * units_per_count) for constant_s, per_unit_s in self.pieces)
        return replace(self, pieces=pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Prices operations on one machine. Every method is a pure function of its arguments and the two fields."""

    machine: MachineSpec
    profile: Profile
    _ratios: dict[tuple[int, int, DType], _Ratios] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def hbm_bytes_per_s(self) -> float:
        return self.machine.gpu.hbm_bytes_per_s

    @property
    def link_bytes_per_s(self) -> float:
        """Large pinned copies, one direction alone."""
        return self.machine.gpu.link.bytes_per_s * self.profile.link_efficiency

    def gemm(
        self,
        inputs: int,
        outputs: int,
        dtype: DType,
        weight_format: WeightFormat,
        *,
        products: int = 1,
        one_pass: bool = False,
    ) -> Pieces:
        """[rows, inputs] x [inputs, outputs] by rows: streaming the weights, and arithmetic at rows / (rows + half) of its peak.

        Where the one gives way to the other both are felt: the whole is the hypotenuse of the two, here by its tangents.
        Several ``products`` may share the columns; each has its own ramp and tail. Weights stored in fewer bits are widened
        before each use, as keys and values are or in ``one_pass`` over them: the product itself reads wide ones, of which it
        finds some in the GPU's cache after one pass.
        """
        wide_bytes = inputs * outputs * weight_bytes_per_parameter(dtype, WeightFormat.NATIVE)
        setup_s = products * self.profile.product_setup_s
        if weight_format is not WeightFormat.NATIVE:
            stored_bytes = inputs * outputs * weight_bytes_per_parameter(dtype, weight_format)
            widen_s = self.weight_widening_s if one_pass else self.widening_s
            setup_s += widen_s(stored_bytes + wide_bytes) + self.launch_s(products)
        stream_s = wide_bytes / (self.hbm_bytes_per_s * self.profile.gemm_hbm_efficiency)
        if weight_format is not WeightFormat.NATIVE and one_pass:
            stream_s *= 1 - self._found_share(wide_bytes / products)
        row_s = 2 * inputs * outputs / (self.machine.gpu.flop_per_s(dtype) * self.profile.gemm_peak_efficiency)
        half_s = row_s * self.profile.gemm_half_rows
        return Pieces(pieces=tuple((setup_s + near * stream_s + far * half_s, far * row_s) for near, far in _TANGENTS))

    def _found_share(self, size_bytes: float) -> float:
        """Of a matrix that was just widened, what its product need not read from HBM."""
        whole_bytes = self.profile.widened_found_bytes
        return min(1.0, max(0.0, 2 - size_bytes / whole_bytes)) if whole_bytes else 0.0

    def as_measured(self, inputs: int, outputs: int, rows: Amount, dtype: DType) -> Amount:
        """How many times as long as ``gemm`` says that product takes: 1 where none of the matrix was measured.

        Between measured rows by their logarithms; before the first as there, beyond the last as it says soon enough.
        """
        if (found := self._ratios.get((inputs, outputs, dtype))) is None:
            found = self._ratios[inputs, outputs, dtype] = self._measured_ratios(inputs, outputs, dtype)
        at, ratios = found
        times: Any = np.interp(np.log(np.maximum(rows, 1)), at, ratios)
        return cast(Amount, times)

    def _measured_ratios(self, inputs: int, outputs: int, dtype: DType) -> _Ratios:
        """Logarithms of rows, and how many times as long as by its curve a product of so many takes."""
        key, curve = (inputs, outputs, dtype), self.gemm(inputs, outputs, dtype, WeightFormat.NATIVE)
        for one in self.profile.products:
            if (one.inputs, one.outputs, one.dtype) == key:
                ratios = [seconds / curve.at_one(n) for n, seconds in zip(one.rows, one.seconds, strict=True)]
                return [log(n) for n in (*one.rows, _KNOWN_BEYOND * one.rows[-1])], [*ratios, 1.0]
        return [0.0], [1.0]

    def power_capped_s(self, arithmetic_s: Amount, beside_s: Amount) -> Amount:
        """What products take that go on for seconds, in steps where other work takes ``beside_s``; prefills: see ``settling``.

        ``arithmetic_s`` is what they take at first. Back to back they draw the card's whole power at
        ``gemm_sustained_share`` of that rate, and the square of their clocks at others; the other work leaves them what it
        does not draw. With a the seconds at the sustained rate and R what the other work leaves, u seconds of products fit
        the limit where a^2 / u = u + R.
        """
        alone_s = arithmetic_s / self.profile.gemm_sustained_share
        spared_s = beside_s * (1 - self.profile.other_power_share)
        capped: Any = np.maximum(arithmetic_s, (np.hypot(spared_s, 2 * alone_s) - spared_s) / 2)
        seconds: Amount = capped
        return seconds

    def settling(self, whole_s: Amount, before_s: Any = 0.0) -> Amount:
        """How many times as long as products take in a prefill of ``whole_s``, after ``before_s`` of the same: the power limit
        lowers clocks by and by, as exp(-t / settling), to ``prefill_sustained_share``.
        """
        until: Any = before_s + whole_s
        fallen: Any = until * fallen_share(until, SETTLING_S) - before_s * fallen_share(before_s, SETTLING_S)
        share: Any = np.where(whole_s > 0, fallen / np.maximum(whole_s, np.finfo(np.float64).tiny), 0.0)[()]
        slower: Amount = 1 + share * (1 / self.profile.prefill_sustained_share - 1)
        return slower

    def elementwise_s(self, size_bytes: float) -> float:
        """Passes that read or write ``size_bytes`` of HBM and do little else."""
        return size_bytes / (self.hbm_bytes_per_s * self.profile.elementwise_efficiency)

    def norm_s(self, size_bytes: float) -> float:
        """Those of kernels that are held up by other things as well."""
        return size_bytes / (self.hbm_bytes_per_s * self.profile.norm_efficiency)

    def conversion_s(self, size_bytes: float) -> float:
        """KV rounded, ``size_bytes`` read and written."""
        return size_bytes / (self.hbm_bytes_per_s * self.profile.conversion_efficiency)

    def widening_s(self, size_bytes: float) -> float:
        """KV widened, ``size_bytes`` read and written."""
        return size_bytes / (self.hbm_bytes_per_s * self.profile.widening_efficiency)

    def weight_widening_s(self, size_bytes: float) -> float:
        """Matrices widened by one kernel, ``size_bytes`` read and written."""
        return size_bytes / (self.hbm_bytes_per_s * self.profile.weight_widening_efficiency)

    def selection_s(self, size_bytes: float) -> float:
        """Passes of a selection that read or write ``size_bytes`` of HBM."""
        return size_bytes / (self.hbm_bytes_per_s * self.profile.selection_efficiency)

    def gather_s(self, size_bytes: float) -> float:
        """Scattered rows of HBM read and written contiguously, ``size_bytes`` in each direction."""
        return 2 * size_bytes / (self.hbm_bytes_per_s * self.profile.gather_efficiency)

    def attention_s(self, kv_bytes: float, flops: float, dtype: DType, kv_format: KvFormat) -> float:
        """Decode attention: reading keys and values, or arithmetic where a group of queries shares them."""
        native = kv_format is KvFormat.NATIVE
        efficiency = self.profile.attention_efficiency if native else self.profile.quantised_attention_efficiency
        return max(kv_bytes / (self.hbm_bytes_per_s * efficiency), flops / self.attention_flop_per_s(dtype))

    def attention_turn_s(
        self, head_dim: int, kv_format: KvFormat, *, paged: bool = False, streamed: bool = False
    ) -> float:
        """What a head's program takes for each token that it goes over, however few sequences there are.

        Half as many channels take two thirds of the time (an H200's kernels over 16-bit tokens).
        """
        profile = self.profile
        token_s = profile.attention_token_s if kv_format is KvFormat.NATIVE else profile.quantised_token_s
        token_s += paged * profile.paged_token_s + streamed * profile.streamed_token_s
        return token_s * (64 + head_dim) / 192

    def prompt_attention_s(self, heads: int, head_dim: int, sequences: Amount, tokens: Amount, dtype: DType) -> Amount:
        """A layer's causal attention over ``sequences`` prompts of ``tokens`` each.

        Arithmetic, or what a multiprocessor takes at least for a head's tile of queries, however few its tokens: half as many
        channels take three quarters of that (an H200's kernels over 16-bit tokens).
        """
        tile_s = self.profile.prompt_tile_s * (128 + head_dim) / 256 / self.machine.gpu.sm_count
        least_s = sequences * heads * np.ceil(tokens / QUERY_TILE) * tile_s
        arithmetic_s = 2.0 * heads * head_dim * sequences * tokens**2 / self.attention_flop_per_s(dtype)
        longer: Any = np.maximum(least_s, arithmetic_s)
        seconds: Amount = longer
        return seconds

    def attention_flop_per_s(self, dtype: DType) -> float:
        return self.machine.gpu.flop_per_s(dtype) * self.profile.prefill_attention_efficiency

    def launch_s(self, kernels: float) -> float:
        return kernels * self.machine.gpu.launch_s

    def host_attention(self, kv_bytes: float, flops: float) -> Pieces:
        """CPU attention over ``kv_bytes`` and ``flops`` a count, with the round trip of queries and results."""
        host, share = self.machine.host, self.profile.host_attention_efficiency
        per_count_s = max(kv_bytes / (host.dram_bytes_per_s * share), flops / (host.flop_per_s * share))
        return Pieces(pieces=((self.profile.host_round_trip_s, per_count_s),), free_at_zero=True)

    def transfer(self, mechanism: Mechanism, *, handed_over: bool = False) -> Pieces:
        """One transfer by bytes, the other direction idle: max(floor, setup + bytes / bandwidth).

        ``handed_over``: a copy among others, for each of which the engine waits until streams have agreed.
        """
        profile, rate = self.profile, self.link_bytes_per_s
        if mechanism is Mechanism.GATHER_KERNEL:
            return Pieces(
                pieces=((profile.gather_setup_s, 1 / (rate * profile.gather_link_efficiency)),), free_at_zero=True
            )
        wait_s = handed_over * profile.copy_handover_s
        pieces = ((wait_s + profile.copy_floor_s, 0.0), (wait_s + profile.copy_setup_s, 1 / rate))
        return Pieces(pieces=pieces, free_at_zero=True)

    def duplex_delay_s(self, size_bytes: Column, opposite_bytes: Column) -> Column:
        """What a transfer loses to one the other way: while both run, each keeps a fixed share of its rate."""
        kept = self.profile.link_duplex_efficiency
        overlapped: Column = np.minimum(size_bytes, opposite_bytes)
        return overlapped * ((1 - kept) / (self.link_bytes_per_s * kept))


def fallen_share(whole_s: Amount, settling_s: float) -> Amount:
    """Of what clocks will fall by, what they have fallen by in the mean over ``whole_s``: that of 1 - exp(-t / settling)."""
    ended = whole_s / settling_s
    fallen: Any = np.where(ended > 0, 1 + np.expm1(-ended) / np.maximum(ended, np.finfo(np.float64).tiny), 0.0)
    share: Amount = fallen[()]
    return share
