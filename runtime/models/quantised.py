"""Matrices stored as integers: 64 inputs of a row share a 16-bit minimum and step; widened when a product takes them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.models.decoder import Affine, LayerWeights
from runtime.quantise import from_integer, spread, to_integer
from sim.spec import WeightFormat

GROUP = 64
_BITS = {WeightFormat.INT8: 8, WeightFormat.INT4: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedAffine(Affine):
    """``weight`` [outputs, group, 64 entries of 8 bit or 32 pairs], ``ranges`` [outputs, group, 2].

    With s = (high - low) / (2^bits - 1) of its group an entry comes back within s / 2, and the rounding of s and low to 16
    bit and of itself to the compute type.
    """

    ranges: Tensor
    inputs: int
    bits: int
    dtype: torch.dtype

    def widened(self) -> Tensor:
        entries = from_integer(self.weight, self.ranges[..., :1], self.ranges[..., 1:], self.bits, self.dtype)
        return entries.flatten(1)[:, : self.inputs]

    def below(self, row: int) -> "QuantisedAffine":
        bias = None if self.bias is None else self.bias[row:]
        return replace(self, weight=self.weight[row:], ranges=self.ranges[row:], bias=bias)


def quantised(affine: Affine, weight_format: WeightFormat) -> QuantisedAffine:
    """``affine`` with its matrix in ``weight_format``; where the last group is short its last entry fills it."""
    weight, bits = affine.weight, _BITS[weight_format]
    outputs, inputs = weight.shape
    filled = torch.cat((weight, weight[:, -1:].expand(-1, -inputs % GROUP)), dim=-1).view(outputs, -1, GROUP)
    ranges = spread(filled.amin(-1), filled.amax(-1), bits, dim=-1)
    return QuantisedAffine(
        weight=to_integer(filled, ranges[..., :1], ranges[..., 1:], bits),
        bias=affine.bias,
        ranges=ranges,
        inputs=inputs,
        bits=bits,
        dtype=weight.dtype,
    )


def quantised_layer(layer: LayerWeights, weight_format: WeightFormat) -> LayerWeights:
    """A layer with its matrices in ``weight_format``; norms and biases stay as they are."""
    if weight_format is WeightFormat.NATIVE:
        return layer
    return replace(
        layer,
        qkv=quantised(layer.qkv, weight_format),
        out=quantised(layer.out, weight_format),
        up=quantised(layer.up, weight_format),
        down=quantised(layer.down, weight_format),
    )
