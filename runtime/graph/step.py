"""One decode step as a CUDA graph: every tensor has its place, every length is on the device."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as fn

from runtime.graph.capturing import captured
from runtime.graph.launch import chains
from runtime.graph.products import Sum, Tiling, Turning, add_norm, gate, head_norms, linear, partial_linear, place
from runtime.graph.weights import ComingWeights
from runtime.models import Decoder
from runtime.models.decoder import Affine
from runtime.streams import SideStream, warming_stream


class Slots(Protocol):
    """Where a step's keys and values lie, and what it attends to."""

    def begin_step(self) -> None: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> None:
        """One query a lane and head, [lane, head, channel], rows of ``k`` and ``v`` being stored first."""

    def settle(self, layer: int) -> None:
        """Choose for the next step; runs beside the rest of this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tilings:
    """Of a layer's matrices: the best of those tried on an H200, see benchmarks/NOTES.md."""

    qkv: Tiling = field(default_factory=lambda: Tiling(columns=64, inner=128, parts=1, stages=3))
    out: Tiling = field(default_factory=lambda: Tiling(columns=64, inner=128, parts=2, stages=4))
    up: Tiling = field(default_factory=lambda: Tiling(columns=64, inner=128, parts=1, stages=3))
    down: Tiling = field(default_factory=lambda: Tiling(columns=64, inner=128, parts=2, stages=4))


class CapturedStep:
    """The step of ``lanes`` sequences. What goes in, and where what comes out goes, is a subclass's affair.

    ``weights`` are None where all lie in HBM.
    """

    def __init__(self, decoder: Decoder, slots: Slots, lanes: int, weights: ComingWeights | None = None) -> None:
        spec, device = decoder.spec, decoder.device
        self.decoder, self.slots, self.weights = decoder, slots, weights
        self.chained = chains(device, lanes)
        self.pauses = torch.zeros(1, dtype=torch.int32, device=device)
        self.attended = torch.zeros((lanes, spec.heads, spec.head_dim), dtype=decoder.dtype, device=device)
        self.logits = torch.zeros((lanes, spec.vocab), device=device)  # of the last step
        self.tilings = Tilings()
        self.beside = SideStream(device, overlap=True)
        self.graph: torch.cuda.CUDAGraph | None = None

    def replay(self) -> None:
        """One step."""
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _reset(self) -> None:
        """Make the next step one that can be taken."""

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """Tokens and positions, [lane]."""
        raise NotImplementedError

    def _emit(self, tokens: Tensor) -> None:
        """The likeliest tokens, [lane]."""
        raise NotImplementedError

    def _advance(self) -> None:
        """All of the step has ended."""

    def capture(self) -> None:
        """Run twice, so that kernels are compiled, then capture. The slots' state is arbitrary afterwards.

        Without a GPU, where kernels are interpreted, nothing is captured: ``replay`` runs the step.
        """
        if self.decoder.device.type != "cuda":
            return
        stream = warming_stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._reset()
                self._run()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what those runs took: the graph takes as much, and none of it
            self.graph = captured(torch.cuda.graph_pool_handle(), self._run)
        torch.cuda.current_stream().wait_stream(stream)

    def _run(self) -> None:
        for _ in self._pieces():
            pass  # nothing comes between

    def _pieces(self) -> Iterator[int]:
        """The step, which stops before each layer's attention with that layer's number; see ``_begin`` for other stops."""
        tokens, positions = self._inputs()
        self.slots.begin_step()
        x = self.decoder.embed(tokens[:, None], positions[:, None])
        through = self._fused(x[:, 0], positions) if fuses(self.decoder) else self._plain(x, positions[:, None])
        self.logits = yield from through
        self._emit(self.logits.argmax(-1))
        self._join()
        self._advance()

    def _begin(self, layer: int) -> Iterator[int]:
        """The layer's weights are there from here on, and those to come after it on their way, which wait for none of them."""
        if self.weights is not None:
            self.weights.bring_ahead(layer)
            self.weights.wait(layer)
            self._pause()
        yield from ()

    def _pause(self) -> None:
        """Keep a chained kernel, which is launched before the one ahead of it ends, from waiting for a copy as well."""
        if self.chained:
            self.pauses += 1

    def _join(self) -> None:
        """What runs beside the step ends with it."""
        self.beside.last.wait()
        if self.weights is not None:
            self.weights.end()

    def _plain(self, x: Tensor, positions: Tensor) -> Generator[int, None, Tensor]:
        """Any family, in the decoder's own operations."""
        decoder = self.decoder
        for layer in range(decoder.spec.layers):
            yield from self._begin(layer)
            inputs = decoder.attention_input(layer, x)
            q, k, v = (rows[:, 0].contiguous() for rows in decoder.project_normed(layer, inputs, positions))
            yield layer
            self._attend(layer, inputs, q, k, v)
            x = decoder.finish(layer, x, self.attended[:, None])
        return decoder.logits(x)[:, 0]

    def _fused(self, x: Tensor, positions: Tensor) -> Generator[int, None, Tensor]:
        """From x [lane, hidden]: residual sums and norms in one kernel, biases and ReLU in the products' epilogues."""
        decoder, tilings, added = self.decoder, self.tilings, None
        normed, lanes, relu = torch.empty_like(x), x.shape[0], not decoder.spec.gated_mlp
        for layer, weights in enumerate(decoder.weights.layers):
            yield from self._begin(layer)
            self._norm(x, added, weights.attention_norm, normed)
            q, k, v = self._queries(layer, linear(normed, weights.qkv, tilings.qkv), positions)
            yield layer
            self._attend(layer, normed, q, k, v)
            mixed = partial_linear(self.attended.view(lanes, -1), weights.out, tilings.out)
            self._norm(x, mixed, weights.mlp_norm, normed)
            up = linear(normed, weights.up, tilings.up, relu=relu)
            added = partial_linear(up if relu else gate(up), weights.down, tilings.down)
        assert decoder.weights.final_norm is not None
        self._norm(x, added, decoder.weights.final_norm, normed)
        return fn.linear(normed, decoder.weights.head)

    def _norm(self, x: Tensor, added: Sum | None, norm: Affine, normed: Tensor) -> None:
        add_norm(x, added, norm, self.decoder.config.norm_eps, normed, centred=self.decoder.spec.norm_bias)

    def _queries(self, layer: int, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [lane, head, channel] of a product's rows, position encoded."""
        decoder, spec = self.decoder, self.decoder.spec
        heads = rows.view(rows.shape[0], -1, spec.head_dim)
        turning = Turning.of(decoder)
        if turning is not None:
            norms = head_norms(decoder.weights.layers[layer])
            place(heads[:, : spec.heads + spec.kv_heads], spec.heads, positions, turning, norms)
        q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        return q, k, v

    def _attend(self, layer: int, inputs: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:  # noqa: ARG002
        """``inputs`` are what queries, keys and values were projected from."""
        self.slots.attend(layer, q, k, v, self.attended)
        with self.beside.work():
            self.slots.settle(layer)


class DecodeStep(CapturedStep):
    """Lanes in step: ``tokens`` [lane] go in and come out, ``row`` [1] counts the steps."""

    def __init__(
        self,
        decoder: Decoder,
        slots: Slots,
        padding: Tensor,
        cached: Tensor,
        row: Tensor,
        weights: ComingWeights | None = None,
    ) -> None:
        lanes, device = padding.shape[0], decoder.device
        super().__init__(decoder, slots, lanes, weights)
        self.padding, self.row, self.cached = padding, row, cached  # cached: [row]
        self.tokens = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.generated = torch.zeros((lanes, cached.shape[0]), dtype=torch.int64, device=device)

    def seek(self, row: int) -> None:
        """The next step is ``row``."""
        self.row.fill_(row)

    def _reset(self) -> None:
        self.seek(1)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self.tokens, self.cached.index_select(0, self.row) - 1 - self.padding

    def _emit(self, tokens: Tensor) -> None:
        self.tokens.copy_(tokens)
        self.generated.index_copy_(1, self.row, self.tokens[:, None])

    def _advance(self) -> None:
        self.row += 1


def fuses(decoder: Decoder) -> bool:
    """Whether the decoder has the parts that ``_fused`` puts together: OPT's or Llama's, with norms before."""
    config, spec, weights = decoder.config, decoder.spec, decoder.weights
    plain_head = weights.project_out is None and weights.final_norm is not None
    activation = "silu" if spec.gated_mlp else "relu"
    biased = spec.gated_mlp or all(w.up.bias is not None for w in weights.layers)
    return plain_head and biased and config.activation == activation and config.pre_norm and not config.parallel
