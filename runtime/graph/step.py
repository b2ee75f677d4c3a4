"""One decode step as a CUDA graph: every tensor has its place, every length is on the device."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as fn

from runtime.graph.products import Tiling, add_norm, linear, partial_linear
from runtime.models import Decoder
from runtime.streams import SideStream


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
    """The step of ``lanes`` sequences. What goes in, and where what comes out goes, is a subclass's affair."""

    def __init__(self, decoder: Decoder, slots: Slots, lanes: int) -> None:
        spec, device = decoder.spec, decoder.device
        self.decoder, self.slots = decoder, slots
        self.attended = torch.zeros((lanes, spec.heads, spec.head_dim), dtype=decoder.dtype, device=device)
        self.logits = torch.zeros((lanes, spec.vocab), device=device)  # of the last step
        self.tilings = Tilings()
        self.beside = SideStream(device, overlap=True)
        self.replay = self._run

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
        stream = torch.cuda.Stream(self.decoder.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._reset()
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self.replay = graph.replay

    def _run(self) -> None:
        tokens, positions = self._inputs()
        self.slots.begin_step()
        x = self.decoder.embed(tokens[:, None], positions[:, None])
        self.logits = self._fused(x[:, 0]) if fuses(self.decoder) else self._plain(x, positions[:, None])
        self._emit(self.logits.argmax(-1))
        self.beside.last.wait()
        self._advance()

    def _plain(self, x: Tensor, positions: Tensor) -> Tensor:
        """Any family, in the decoder's own operations."""
        decoder = self.decoder
        for layer in range(decoder.spec.layers):
            q, k, v = (rows[:, 0].contiguous() for rows in decoder.project(layer, x, positions))
            self._attend(layer, q, k, v)
            x = decoder.finish(layer, x, self.attended[:, None])
        return decoder.logits(x)[:, 0]

    def _fused(self, x: Tensor) -> Tensor:
        """From x [lane, hidden]: residual sums and norms in one kernel, biases and ReLU in the products' epilogues."""
        decoder, eps, tilings = self.decoder, self.decoder.config.norm_eps, self.tilings
        normed, added, lanes = torch.empty_like(x), None, x.shape[0]
        for layer, weights in enumerate(decoder.weights.layers):
            add_norm(x, added, weights.attention_norm, eps, normed)
            rows = linear(normed, weights.qkv, tilings.qkv).view(lanes, 3, decoder.spec.heads, decoder.spec.head_dim)
            self._attend(layer, rows[:, 0], rows[:, 1], rows[:, 2])
            mixed = partial_linear(self.attended.view(lanes, -1), weights.out, tilings.out)
            add_norm(x, mixed, weights.mlp_norm, eps, normed)
            up = linear(normed, weights.up, tilings.up, relu=True)
            added = partial_linear(up, weights.down, tilings.down)
        assert decoder.weights.final_norm is not None
        add_norm(x, added, decoder.weights.final_norm, eps, normed)
        return fn.linear(normed, decoder.weights.head)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.slots.attend(layer, q, k, v, self.attended)
        with self.beside.work():
            self.slots.settle(layer)


class DecodeStep(CapturedStep):
    """Lanes in step: ``tokens`` [lane] go in and come out, ``row`` [1] counts the steps."""

    def __init__(self, decoder: Decoder, slots: Slots, padding: Tensor, cached: Tensor, row: Tensor) -> None:
        lanes, device = padding.shape[0], decoder.device
        super().__init__(decoder, slots, lanes)
        self.padding, self.row, self.cached = padding, row, cached  # cached: [row]
        self.tokens = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.generated = torch.zeros((lanes, cached.shape[0]), dtype=torch.int64, device=device)

    def _reset(self) -> None:
        self.row.fill_(1)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return self.tokens, self.cached.index_select(0, self.row) - 1 - self.padding

    def _emit(self, tokens: Tensor) -> None:
        self.tokens.copy_(tokens)
        self.generated.index_copy_(1, self.row, self.tokens[:, None])

    def _advance(self) -> None:
        self.row += 1


def fuses(decoder: Decoder) -> bool:
    """Whether the decoder has the parts that ``_fused`` puts together: OPT's, with norms before."""
    config, spec, weights = decoder.config, decoder.spec, decoder.weights
    plain_head = weights.project_out is None and weights.final_norm is not None
    layer_norms = spec.norm_bias and not spec.qk_norm and config.rope is None
    simple_mlp = (
        config.activation == "relu" and not spec.gated_mlp and all(w.up.bias is not None for w in weights.layers)
    )
    return plain_head and layer_norms and simple_mlp and config.pre_norm and not config.parallel
