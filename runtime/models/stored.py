"""A decoder's weights where and how a plan wants them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from runtime.models.decoder import Decoder, LayerWeights, Weights
from runtime.models.quantised import quantised_layer
from runtime.models.streamed import StreamedLayers, mapped
from sim.plan import Setting
from sim.spec import WeightFormat


def as_planned(decoder: Decoder, setting: Setting, device: torch.device | None = None) -> Decoder:
    """``decoder`` on ``device`` with its layers quantised and streamed as ``setting`` says; itself where it is so already.

    Raises ValueError for one that has been stored in another way.
    """
    device = device or decoder.device
    wanted = setting.weight_format, setting.weights_on_host
    got = decoder.weight_format, decoder.weights_on_host
    if got == wanted and decoder.device == device:
        return _ringed(decoder, setting.prefetch_layers)
    if got != (WeightFormat.NATIVE, 0.0):
        raise ValueError(
            f"weights are stored as {got[0]} with {got[1]:.0%} on the host, the plan has {wanted[0]} with "
            f"{wanted[1]:.0%}: load them anew"
        )
    return Decoder(
        decoder.config,
        replace(_moved(decoder.weights, device), layers=_layers(decoder, setting, device)),
        weight_format=setting.weight_format,
        weights_on_host=setting.weights_on_host,
    )


def _ringed(decoder: Decoder, ahead: int) -> Decoder:
    """``decoder`` with as many buffers for streamed weights as run ``ahead``; itself where it has them."""
    layers = decoder.weights.layers
    if not isinstance(layers, StreamedLayers) or layers.ahead == min(ahead, len(layers) - 1):
        return decoder
    weights = replace(decoder.weights, layers=layers.ringed(ahead))
    kind, on_host = decoder.weight_format, decoder.weights_on_host
    return Decoder(decoder.config, weights, weight_format=kind, weights_on_host=on_host)


def _layers(decoder: Decoder, setting: Setting, device: torch.device) -> Sequence[LayerWeights]:
    def stored() -> Iterator[LayerWeights]:
        for layer in decoder.weights.layers:
            yield quantised_layer(mapped(layer, lambda tensor: tensor.to(device)), setting.weight_format)

    if setting.weights_on_host:
        return StreamedLayers.of(stored(), device, share=setting.weights_on_host, ahead=setting.prefetch_layers)
    return tuple(stored())


def _moved(weights: Weights, device: torch.device) -> Weights:
    """All but the layers."""
    there = dict[int, Tensor]()  # what is tied stays tied

    def move(tensor: Tensor) -> Tensor:
        return there.setdefault(id(tensor), tensor.to(device))

    moved: Weights = mapped(replace(weights, layers=()), move)
    return moved
