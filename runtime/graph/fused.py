"""A decoder for prompts: few kernels between its products, and products over numbers of rows that cuBLAS is quick at."""

import torch
from torch import Tensor

from runtime.graph.products import Sum, Turning, add_norm, gate, head_norms, place
from runtime.models import Decoder
from runtime.models.decoder import Affine, LayerWeights, linear
from sim.gemms import product_rows

TURNED_TOGETHER = 8  # heads, by a program: their angles are the same


class FusedDecoder(Decoder):
    """Of the weights of ``decoder``, whose ``project`` and ``finish`` it gives within rounding; their arguments stay as they are.

    What is [made-up row, ...] has ``product_rows`` rows: all beyond the tokens' are arbitrary, and nobody looks at what they give.
    """

    def __init__(self, decoder: Decoder) -> None:
        kind, on_host = decoder.weight_format, decoder.weights_on_host
        super().__init__(decoder.config, decoder.weights, weight_format=kind, weights_on_host=on_host)
        self.turning = Turning.of(self)

    def warm_up(self) -> None:
        """A layer of one token, so that no prompt waits for a compiler."""
        tokens = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        x = self.embed(tokens, tokens)
        q, _, _ = self.project(0, x, tokens)
        self.finish(0, x, q)

    def project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the product's rows."""
        weights, spec, tokens = self.weights.layers[layer], self.spec, x.shape[:2]
        inputs = self._normed(_rows(x), weights.attention_norm) if self.config.pre_norm else _made_up(x)
        heads = linear(inputs, weights.qkv)[: tokens.numel()].view(tokens.numel(), -1, spec.head_dim)
        if self.turning is not None:
            turned, at = heads[:, : spec.heads + spec.kv_heads], positions.expand(tokens).flatten()
            place(turned, spec.heads, at, self.turning, head_norms(weights), at_once=TURNED_TOGETHER)
        q, k, v = torch.split(heads.view(*tokens, *heads.shape[1:]), [spec.heads, spec.kv_heads, spec.kv_heads], dim=2)
        return q, k, v

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """A view of the last product's rows."""
        weights, config, rows = self.weights.layers[layer], self.config, _rows(x)
        mixed = linear(_made_up(attended), weights.out)[: len(rows)]
        if config.parallel:
            fed = self._fed_forward(weights, self._normed(rows, weights.mlp_norm), len(rows))
            return mixed.add_(fed).add_(rows).view(x.shape)
        normed = self._normed(mixed, weights.mlp_norm if config.pre_norm else weights.attention_norm, added=rows)
        fed = self._fed_forward(weights, normed, len(rows))
        if config.pre_norm:
            return fed.add_(mixed).view(x.shape)
        return self._normed(fed, weights.mlp_norm, added=normed[: len(rows)])[: len(rows)].view(x.shape)

    def _normed(self, rows: Tensor, norm: Affine, added: Tensor | None = None) -> Tensor:
        """[made-up row, hidden] of ``rows``, to which ``added`` is added first, in place.

        For LayerNorm alone torch has one kernel as well, whose launch takes the host less.
        """
        count, centred = product_rows(len(rows)), self.spec.norm_bias
        if added is None and centred and count == len(rows):
            return self._norm(rows, norm)
        normed = rows.new_empty((count, rows.shape[1]))
        more = None if added is None else Sum(parts=added[None], bias=None)
        add_norm(rows, more, norm, self.config.norm_eps, normed, centred=centred, apart=True)
        return normed

    def _fed_forward(self, weights: LayerWeights, normed: Tensor, count: int) -> Tensor:
        """The first ``count`` rows of what the feed-forward gives."""
        up = linear(normed, weights.up)
        if not self.spec.gated_mlp:
            return linear(self.activate(up), weights.down)[:count]
        gated, value = up.chunk(2, dim=-1)
        if self.config.activation == "silu":
            gate(up[:count], gated)
        else:
            gated = self.activate(gated).mul_(value)
        return linear(gated, weights.down)[:count]


def _rows(x: Tensor) -> Tensor:
    """[batch, token, ...] as [row, ...], side by side in memory."""
    return x.flatten(0, 1).contiguous()


def _made_up(x: Tensor) -> Tensor:
    """[batch, token, ...] as [made-up row, column]; copied only where rows are made up, or do not lie side by side."""
    tokens = x.shape[:2].numel()
    rows: int = product_rows(tokens)
    if rows == tokens:
        return x.flatten(0, 1).flatten(1)
    made = x.new_empty((rows, *x.shape[2:]))
    made[:tokens].view(x.shape).copy_(x)
    return made.flatten(1)
