"""One decoder for all families, cut where attention happens: the cache lies between ``project`` and ``finish``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn

from runtime.models.config import DecoderConfig
from runtime.models.rope import rotate
from sim.spec import WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """A matrix [outputs, inputs] and its bias, or a norm's scale [hidden] and its bias."""

    weight: Tensor
    bias: Tensor | None = None

    def widened(self) -> Tensor:
        """The matrix in the compute type."""
        return self.weight

    def below(self, row: int) -> "Affine":
        """The rows from ``row`` on."""
        return Affine(weight=self.weight[row:], bias=None if self.bias is None else self.bias[row:])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """``qkv`` stacks query, key and value rows; ``up`` stacks gate and up where the feed-forward is gated."""

    attention_norm: Affine
    qkv: Affine
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Affine
    mlp_norm: Affine
    up: Affine
    down: Affine


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All tensors of a checkpoint in the compute type on the device, but for layers that a plan stores otherwise."""

    embedding: Tensor
    positions: Tensor | None
    project_in: Tensor | None
    project_out: Tensor | None
    layers: Sequence[LayerWeights]
    final_norm: Affine | None
    head: Tensor


class Decoder:
    """Shapes: x [batch, token, hidden]; q, k, v [batch, token, head, head_dim]; positions [batch, token]."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        *,
        weight_format: WeightFormat = WeightFormat.NATIVE,
        weights_on_host: float = 0.0,
    ) -> None:
        self.config = config
        self.weight_format, self.weights_on_host = weight_format, weights_on_host
        self.spec = config.spec
        self.weights = weights
        self.activate = _ACTIVATIONS[config.activation]
        self.frequencies, self.magnitude = self._prepare_rope()
        self._turned: tuple[Tensor, Tensor, Tensor] | None = None  # positions, their cosines and sines

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        weights = self.weights
        x = fn.embedding(tokens, weights.embedding)
        if weights.project_in is not None:
            x = fn.linear(x, weights.project_in)
        if weights.positions is not None:
            x = x + fn.embedding(positions + self.config.position_offset, weights.positions)
        return x

    def project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, position encoded."""
        return self.project_normed(layer, self.attention_input(layer, x), positions)

    def project_normed(self, layer: int, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what they are projected from, ``attention_input``."""
        weights, spec = self.weights.layers[layer], self.spec
        rows = linear(inputs, weights.qkv)
        q, k, v = torch.split(rows, [spec.query_dim, spec.kv_dim, spec.kv_dim], dim=-1)
        q = self._place(self._heads(q), weights.query_norm, positions)
        k = self._place(self._heads(k), weights.key_norm, positions)
        return q, k, self._heads(v)

    def reproject(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value alone, from saved layer inputs: position encoding and key norm are applied again."""
        weights, spec = self.weights.layers[layer], self.spec
        rows = linear(self.attention_input(layer, x), weights.qkv.below(spec.query_dim))
        k, v = (self._heads(part) for part in torch.split(rows, [spec.kv_dim, spec.kv_dim], dim=-1))
        return self._place(k, weights.key_norm, positions), v

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, given its input and what attention gave, [batch, token, head, head_dim]."""
        weights, config = self.weights.layers[layer], self.config
        mixed = linear(attended.flatten(-2), weights.out)
        if config.parallel:
            return mixed.add_(self._mlp(weights, self._norm(x, weights.mlp_norm))).add_(x)
        x = mixed.add_(x)
        if config.pre_norm:
            return self._mlp(weights, self._norm(x, weights.mlp_norm)).add_(x)
        x = self._norm(x, weights.attention_norm)
        return self._norm(self._mlp(weights, x).add_(x), weights.mlp_norm)

    def logits(self, x: Tensor) -> Tensor:
        """[batch, token, vocab] in float32."""
        weights = self.weights
        if weights.final_norm is not None:
            x = self._norm(x, weights.final_norm)
        if weights.project_out is not None:
            x = fn.linear(x, weights.project_out)
        return fn.linear(x, weights.head).float()

    def attention_input(self, layer: int, x: Tensor) -> Tensor:
        """What queries, keys and values are projected from, given the layer's input."""
        return self._norm(x, self.weights.layers[layer].attention_norm) if self.config.pre_norm else x

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:-1], -1, self.spec.head_dim)

    def _place(self, heads: Tensor, norm: Tensor | None, positions: Tensor) -> Tensor:
        if norm is not None:
            heads = rms_norm(heads, norm, self.config.norm_eps)
        if self.frequencies is None:
            return heads
        return rotate(heads, *self._turn(positions, self.frequencies, heads.dtype))

    def _turn(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [batch, token, 1, dims]; of the same positions, layer after layer, the same tensors."""
        if self._turned is None or self._turned[0] is not positions:
            angles = positions[..., None].float() * frequencies
            angles = torch.cat((angles, angles), dim=-1)[..., None, :]
            cos, sin = ((turn(angles) * self.magnitude).to(dtype) for turn in (torch.cos, torch.sin))
            self._turned = (positions, cos, sin)
        return self._turned[1:]

    def _norm(self, x: Tensor, norm: Affine) -> Tensor:
        if self.spec.norm_bias:
            return fn.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.config.norm_eps)
        return rms_norm(x, norm.weight, self.config.norm_eps)

    def _mlp(self, weights: LayerWeights, x: Tensor) -> Tensor:
        up = linear(x, weights.up)
        if not self.spec.gated_mlp:
            return linear(self.activate(up), weights.down)
        gate, value = up.chunk(2, dim=-1)
        return linear(self.activate(gate).mul_(value), weights.down)

    def _prepare_rope(self) -> tuple[Tensor | None, float]:
        if self.config.rope is None:
            return None, 1.0
        frequencies, magnitude = self.config.rope.frequencies()
        return frequencies.to(self.device), magnitude


def linear(x: Tensor, affine: Affine) -> Tensor:
    """``x`` [..., input] to [..., output]."""
    return fn.linear(x, affine.widened(), affine.bias)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """In float32, but for the scale."""
    return scale * fn.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def _tanh_gelu(x: Tensor) -> Tensor:
    return fn.gelu(x, approximate="tanh")


def _relu(x: Tensor) -> Tensor:
    return fn.relu(x, inplace=True)


def _silu(x: Tensor) -> Tensor:
    return fn.silu(x, inplace=True)


# In place where that is to be had: a prefill's widest rows are held once.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": _relu,
    "gelu": fn.gelu,
    "silu": _silu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}
