"""Saved inputs become keys and values again, between two pieces of a captured step: in few operations, launched one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.graph.products import Turning, add_norm, place
from runtime.models import Decoder

Projection = Callable[[int, Tensor, Tensor, Tensor], None]


def projection_of(decoder: Decoder) -> Projection:
    """A function of layer, inputs x [row, hidden], positions [row] and where keys and values go, [row, 2 * kv_dim].

    What does not change from step to step is looked up once.
    """
    spec, config, layers = decoder.spec, decoder.config, decoder.weights.layers
    matrices, turning = [layer.qkv.below(spec.query_dim) for layer in layers], Turning.of(decoder)

    def normed(layer: int, x: Tensor) -> Tensor:
        if spec.norm_bias or not config.pre_norm:
            return decoder.attention_input(layer, x)
        rows = torch.empty_like(x)  # a root mean square, for which torch takes four operations
        add_norm(x, None, layers[layer].attention_norm, config.norm_eps, rows, centred=False)
        return rows

    def project(layer: int, x: Tensor, positions: Tensor, out: Tensor) -> None:
        x, matrix, key_norm = normed(layer, x), matrices[layer], layers[layer].key_norm
        if matrix.bias is None:
            torch.mm(x, matrix.widened().t(), out=out)
        else:
            torch.addmm(matrix.bias, x, matrix.widened().t(), out=out)
        if turning is not None:
            heads = out.view(out.shape[0], -1, spec.head_dim)[:, : spec.kv_heads]
            place(heads, 0, positions, turning, None if key_norm is None else (key_norm, key_norm))

    return project
