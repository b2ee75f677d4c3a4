"""Saved inputs become keys and values again, between two pieces of a captured step: in few operations, launched one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.graph.products import Turning, place
from runtime.models import Decoder
from sim.spec import WeightFormat

Projection = Callable[[int, Tensor, Tensor, Tensor], None]


def projection_of(decoder: Decoder) -> Projection:
    """A function of layer, what it projects (``Decoder.attention_input``) [row, hidden], positions [row] and where keys and
    values go, [row, 2 * kv_dim].

    What does not change from step to step is looked up once.
    """
    spec, layers = decoder.spec, decoder.weights.layers
    matrices, turning = [layer.qkv.below(spec.query_dim) for layer in layers], Turning.of(decoder)
    native = decoder.weight_format is WeightFormat.NATIVE
    turned = [matrix.weight.t() if native else None for matrix in matrices]

    def project(layer: int, inputs: Tensor, positions: Tensor, out: Tensor) -> None:
        matrix, key_norm = turned[layer], layers[layer].key_norm
        if matrix is None:
            matrix = matrices[layer].widened().t()
        bias = matrices[layer].bias
        if bias is None:
            torch.mm(inputs, matrix, out=out)
        else:
            torch.addmm(bias, inputs, matrix, out=out)
        if turning is not None:
            heads = out.view(out.shape[0], -1, spec.head_dim)[:, : spec.kv_heads]
            place(heads, 0, positions, turning, None if key_norm is None else (key_norm, key_norm))

    return project
