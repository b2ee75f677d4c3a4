"""Weights drawn from a seed, for a model of which only the shape is at hand: speed does not depend on their values."""

import torch
from torch import Tensor

from runtime.models.config import DecoderConfig
from runtime.models.decoder import Affine, Decoder, LayerWeights, Weights

_SPREAD = 0.02  # standard deviation of a matrix's entries, as the families initialise them


def random_decoder(config: DecoderConfig, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """A decoder of ``config``'s shape; the same seed gives the same weights on the same kind of device."""
    spec = config.spec
    draw = _Draw(device, dtype, seed)
    embedding = draw.matrix(spec.vocab, spec.embedding_dim)
    projects = spec.embedding_dim != spec.hidden
    weights = Weights(
        embedding=embedding,
        positions=draw.matrix(spec.positions, spec.hidden) if spec.positions else None,
        project_in=draw.matrix(spec.hidden, spec.embedding_dim) if projects else None,
        project_out=draw.matrix(spec.embedding_dim, spec.hidden) if projects else None,
        layers=tuple(_layer(config, draw) for _ in range(spec.layers)),
        final_norm=draw.norm(spec.hidden, bias=spec.norm_bias) if spec.final_norm else None,
        head=embedding if spec.tied_embeddings else draw.matrix(spec.vocab, spec.embedding_dim),
    )
    return Decoder(config, weights)


class _Draw:
    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, device=self.device, dtype=self.dtype)
        return drawn.normal_(0.0, _SPREAD, generator=self.generator)

    def affine(self, outputs: int, inputs: int, *, bias: bool) -> Affine:
        return Affine(weight=self.matrix(outputs, inputs), bias=self.matrix(outputs) if bias else None)

    def norm(self, width: int, *, bias: bool) -> Affine:
        scale = torch.ones(width, device=self.device, dtype=self.dtype)
        return Affine(weight=scale, bias=torch.zeros_like(scale) if bias else None)


def _layer(config: DecoderConfig, draw: _Draw) -> LayerWeights:
    spec = config.spec
    up = 2 if spec.gated_mlp else 1
    return LayerWeights(
        attention_norm=draw.norm(spec.hidden, bias=spec.norm_bias),
        qkv=draw.affine(spec.query_dim + 2 * spec.kv_dim, spec.hidden, bias=spec.qkv_bias),
        query_norm=draw.norm(spec.head_dim, bias=False).weight if spec.qk_norm else None,
        key_norm=draw.norm(spec.head_dim, bias=False).weight if spec.qk_norm else None,
        out=draw.affine(spec.hidden, spec.query_dim, bias=spec.out_bias),
        mlp_norm=draw.norm(spec.hidden, bias=spec.norm_bias),
        up=draw.affine(up * spec.intermediate, spec.hidden, bias=spec.mlp_bias),
        down=draw.affine(spec.hidden, spec.intermediate, bias=spec.mlp_bias),
    )
