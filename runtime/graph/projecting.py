"""Saved inputs become keys and values again, between two pieces of a captured step: in few operations, launched one by one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as fn

from runtime.graph.products import Turning, add_norm, place
from runtime.models import Decoder

Projection = Callable[[int, Tensor, Tensor, Tensor], None]


def projection_of(decoder: Decoder) -> Projection:
    """A function of layer, inputs x [row, hidden], positions [row] and where keys and values go, [row, 2 * kv_dim].

    What does not change from step to step is looked up once.
    """
    spec, config, layers = decoder.spec, decoder.config, decoder.weights.layers
    matrices = [layer.qkv.below(spec.query_dim) for layer in layers]
    turning = None
    if decoder.frequencies is not None:
        turning = Turning(frequencies=decoder.frequencies, magnitude=decoder.magnitude, eps=config.norm_eps)

    def project(layer: int, x: Tensor, positions: Tensor, out: Tensor) -> None:
        norm, matrix, key_norm = layers[layer].attention_norm, matrices[layer], layers[layer].key_norm
        if config.pre_norm and spec.norm_bias:
            x = fn.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, config.norm_eps)
        elif config.pre_norm:
            normed = torch.empty_like(x)
            add_norm(x, None, norm, config.norm_eps, normed, centred=False)  # torch takes four operations for this one
            x = normed
        if matrix.bias is None:
            torch.mm(x, matrix.widened().t(), out=out)
        else:
            torch.addmm(matrix.bias, x, matrix.widened().t(), out=out)
        if turning is not None:
            heads = out.view(out.shape[0], -1, spec.head_dim)[:, : spec.kv_heads]
            place(heads, 0, positions, turning, None if key_norm is None else (key_norm, key_norm))

    return project
