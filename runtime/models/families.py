"""Where each family keeps its tensors: the names in a checkpoint, and how they become ``Weights``."""

from typing import Protocol

import torch
from torch import Tensor

from runtime.models.config import DecoderConfig
from runtime.models.decoder import Affine, LayerWeights, Weights
from sim.spec import ModelSpec


class Tensors(Protocol):
    """Tensors by name; ``get`` refuses a missing one and another shape."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor: ...


def read_weights(config: DecoderConfig, tensors: Tensors) -> Weights:
    """All weights of ``config``'s model."""
    return {"opt": _opt, "gpt_neox": _gpt_neox}.get(config.spec.family, _llama)(config, tensors)


class _Reader:
    """Reads below one prefix; matrices with the bias that the shape says they have."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self.tensors = tensors
        self.prefix = prefix

    def below(self, name: str) -> "_Reader":
        return _Reader(self.tensors, f"{self.prefix}{name}.")

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.tensors.get(self.prefix + name, shape)

    def matrix(self, name: str, outputs: int, inputs: int, *, bias: bool) -> Affine:
        weight = self.tensor(f"{name}.weight", outputs, inputs)
        return Affine(weight=weight, bias=self.tensor(f"{name}.bias", outputs) if bias else None)

    def norm(self, name: str, width: int, *, bias: bool) -> Affine:
        return Affine(
            weight=self.tensor(f"{name}.weight", width), bias=self.tensor(f"{name}.bias", width) if bias else None
        )

    def stacked(self, names: tuple[str, ...], outputs: tuple[int, ...], inputs: int, *, bias: bool) -> Affine:
        parts = [self.matrix(name, rows, inputs, bias=bias) for name, rows in zip(names, outputs, strict=True)]
        biases = [part.bias for part in parts if part.bias is not None]
        return Affine(weight=torch.cat([part.weight for part in parts]), bias=torch.cat(biases) if biases else None)

    def qkv(self, spec: ModelSpec) -> Affine:
        rows = (spec.query_dim, spec.kv_dim, spec.kv_dim)
        return self.stacked(("q_proj", "k_proj", "v_proj"), rows, spec.hidden, bias=spec.qkv_bias)


def _llama(config: DecoderConfig, tensors: Tensors) -> Weights:
    spec = config.spec
    root = _Reader(tensors, "model." if "model.embed_tokens.weight" in tensors else "")
    embedding = root.tensor("embed_tokens.weight", spec.vocab, spec.embedding_dim)
    return Weights(
        embedding=embedding,
        positions=None,
        project_in=None,
        project_out=None,
        layers=tuple(_llama_layer(spec, root.below(f"layers.{layer}")) for layer in range(spec.layers)),
        final_norm=root.norm("norm", spec.hidden, bias=False),
        head=embedding if spec.tied_embeddings else tensors.get("lm_head.weight", (spec.vocab, spec.hidden)),
    )


def _llama_layer(spec: ModelSpec, reader: _Reader) -> LayerWeights:
    attention, mlp = reader.below("self_attn"), reader.below("mlp")
    wide = (spec.intermediate, spec.intermediate)
    return LayerWeights(
        attention_norm=reader.norm("input_layernorm", spec.hidden, bias=False),
        qkv=attention.qkv(spec),
        query_norm=attention.tensor("q_norm.weight", spec.head_dim) if spec.qk_norm else None,
        key_norm=attention.tensor("k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        out=attention.matrix("o_proj", spec.hidden, spec.query_dim, bias=spec.out_bias),
        mlp_norm=reader.norm("post_attention_layernorm", spec.hidden, bias=False),
        up=mlp.stacked(("gate_proj", "up_proj"), wide, spec.hidden, bias=spec.mlp_bias),
        down=mlp.matrix("down_proj", spec.hidden, spec.intermediate, bias=spec.mlp_bias),
    )


def _opt(config: DecoderConfig, tensors: Tensors) -> Weights:
    spec = config.spec
    prefixes = ("model.decoder.", "decoder.")  # the second in Meta's own releases
    root = _Reader(tensors, next((p for p in prefixes if f"{p}embed_tokens.weight" in tensors), prefixes[0]))
    embedding = root.tensor("embed_tokens.weight", spec.vocab, spec.embedding_dim)
    projects = spec.embedding_dim != spec.hidden
    return Weights(
        embedding=embedding,
        positions=root.tensor("embed_positions.weight", spec.positions, spec.hidden),
        project_in=root.tensor("project_in.weight", spec.hidden, spec.embedding_dim) if projects else None,
        project_out=root.tensor("project_out.weight", spec.embedding_dim, spec.hidden) if projects else None,
        layers=tuple(_opt_layer(spec, root.below(f"layers.{layer}")) for layer in range(spec.layers)),
        final_norm=root.norm("final_layer_norm", spec.hidden, bias=True) if spec.final_norm else None,
        head=embedding if spec.tied_embeddings else tensors.get("lm_head.weight", (spec.vocab, spec.embedding_dim)),
    )


def _opt_layer(spec: ModelSpec, reader: _Reader) -> LayerWeights:
    attention = reader.below("self_attn")
    return LayerWeights(
        attention_norm=reader.norm("self_attn_layer_norm", spec.hidden, bias=True),
        qkv=attention.qkv(spec),
        query_norm=None,
        key_norm=None,
        out=attention.matrix("out_proj", spec.hidden, spec.query_dim, bias=spec.out_bias),
        mlp_norm=reader.norm("final_layer_norm", spec.hidden, bias=True),
        up=reader.matrix("fc1", spec.intermediate, spec.hidden, bias=spec.mlp_bias),
        down=reader.matrix("fc2", spec.hidden, spec.intermediate, bias=spec.mlp_bias),
    )


def _gpt_neox(config: DecoderConfig, tensors: Tensors) -> Weights:
    spec = config.spec
    root = _Reader(tensors, "gpt_neox.")
    embedding = root.tensor("embed_in.weight", spec.vocab, spec.hidden)
    return Weights(
        embedding=embedding,
        positions=None,
        project_in=None,
        project_out=None,
        layers=tuple(_gpt_neox_layer(spec, root.below(f"layers.{layer}")) for layer in range(spec.layers)),
        final_norm=root.norm("final_layer_norm", spec.hidden, bias=True),
        head=embedding if spec.tied_embeddings else tensors.get("embed_out.weight", (spec.vocab, spec.hidden)),
    )


def _gpt_neox_layer(spec: ModelSpec, reader: _Reader) -> LayerWeights:
    attention, mlp = reader.below("attention"), reader.below("mlp")
    mixed = attention.matrix("query_key_value", 3 * spec.query_dim, spec.hidden, bias=spec.qkv_bias)
    return LayerWeights(
        attention_norm=reader.norm("input_layernorm", spec.hidden, bias=True),
        qkv=Affine(
            weight=_sorted_rows(mixed.weight, spec),
            bias=None if mixed.bias is None else _sorted_rows(mixed.bias, spec),
        ),
        query_norm=None,
        key_norm=None,
        out=attention.matrix("dense", spec.hidden, spec.query_dim, bias=spec.out_bias),
        mlp_norm=reader.norm("post_attention_layernorm", spec.hidden, bias=True),
        up=mlp.matrix("dense_h_to_4h", spec.intermediate, spec.hidden, bias=spec.mlp_bias),
        down=mlp.matrix("dense_4h_to_h", spec.hidden, spec.intermediate, bias=spec.mlp_bias),
    )


def _sorted_rows(mixed: Tensor, spec: ModelSpec) -> Tensor:
    """GPT-NeoX stores query, key and value head by head; ``Weights`` wants all queries, then keys, then values."""
    by_head = mixed.view(spec.heads, 3, spec.head_dim, *mixed.shape[1:])
    return by_head.transpose(0, 1).flatten(0, 2).contiguous()
