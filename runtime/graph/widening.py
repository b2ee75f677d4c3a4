"""Matrices stored as integers, widened by one kernel each time that a product takes them, into room that all share.

Products run one after the other on one stream, so a matrix is wide only until the next one is.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from runtime.graph.launch import chains
from runtime.models import Decoder
from runtime.models.decoder import Affine, LayerWeights
from runtime.models.quantised import GROUP, QuantisedAffine

_GROUPS = 64  # that a program takes


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAffine(QuantisedAffine):
    """Widened into the first entries of ``room``; ``chained``: among kernels that are launched before those ahead end."""

    room: Tensor
    chained: bool

    def widened(self) -> Tensor:
        out = self.room[: self.weight.shape[0] * self.inputs].view(-1, self.inputs)
        widen(self, out, chained=self.chained)
        return out


def widen(affine: QuantisedAffine, out: Tensor, *, chained: bool = False) -> None:
    """The matrix in ``out`` [output, input], bit for bit what torch gives."""
    from runtime.graph import widening_kernels  # machines without a GPU may lack Triton

    groups = affine.weight.shape[0] * affine.weight.shape[1]
    widening_kernels.widen[(-(-groups // _GROUPS),)](
        affine.weight,
        affine.ranges,
        out,
        groups,
        affine.inputs,
        BITS=affine.bits,
        WHOLE=affine.inputs % GROUP == 0,
        GROUPS=_GROUPS,
        CHAINED=chained,
        launch_pdl=chained,
        num_warps=4,
    )


def sharing_room(decoder: Decoder, lanes: int) -> Decoder:
    """``decoder`` with matrices that widen into one room, for steps of ``lanes``; itself where none are stored as integers."""
    most = max(map(_entries, decoder.weights.layers))
    if not most:
        return decoder
    room = torch.empty(most, dtype=decoder.dtype, device=decoder.device)
    chained = chains(decoder.device, lanes)
    layers = tuple(_sharing(layer, room, chained=chained) for layer in decoder.weights.layers)
    return Decoder(decoder.config, replace(decoder.weights, layers=layers), weight_format=decoder.weight_format)


def _sharing(layer: LayerWeights, room: Tensor, *, chained: bool) -> LayerWeights:
    def shared(affine: Affine) -> Affine:
        if not isinstance(affine, QuantisedAffine):
            return affine
        held = {member.name: getattr(affine, member.name) for member in fields(affine)}
        return SharedAffine(**held, room=room, chained=chained)

    return replace(layer, qkv=shared(layer.qkv), out=shared(layer.out), up=shared(layer.up), down=shared(layer.down))


def _entries(layer: LayerWeights) -> int:
    """Of the largest matrix that is stored as integers."""
    matrices = (layer.qkv, layer.out, layer.up, layer.down)
    return max((one.weight.shape[0] * one.inputs for one in matrices if isinstance(one, QuantisedAffine)), default=0)
