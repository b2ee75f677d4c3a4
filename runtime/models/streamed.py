"""Layers whose weights lie in part on the host: copied before use into a ring of buffers, ahead of the layer that computes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from runtime.models.decoder import LayerWeights
from runtime.streams import Done, SideStream


class StreamedLayers(Sequence[LayerWeights]):
    """``share`` of each layer's bytes lies on the host, its first tensors; ``ahead`` layers may be on their way.

    A *place* is a layer's turn: its step times the layers, and the layer. ``begin`` is called as each turn comes; the
    copy for the turn ``ahead`` of it then starts, into the buffer of the turn that has just ended.
    """

    def __init__(self, layers: Iterable[LayerWeights], device: torch.device, *, share: float, ahead: int) -> None:
        self.device, self.share = device, share
        self._pieces = list[list[_Piece]]()
        for layer in layers:
            self._pieces.append(_split(layer, device, share))
            self._template = layer
        self.ahead = min(ahead, len(self._pieces) - 1)
        self._ring = [[piece.buffer(device) for piece in self._pieces[0]] for _ in range(self.ahead + 1)]
        self._stream = SideStream(device, overlap=False)
        self._arrived: dict[int, tuple[LayerWeights, Done]] = {}  # by layer

    def start(self, places: int, *, overlap: bool) -> None:
        """A wave of so many turns begins."""
        self._stream = SideStream(self.device, overlap=overlap and self.ahead > 0)
        self._arrived.clear()
        self._places = places
        for place in range(self.ahead):
            self._load(place)

    def begin(self, place: int) -> None:
        """The turn ``place`` comes; the current stream waits for its weights."""
        if place + self.ahead < self._places:
            self._load(place + self.ahead)
        self.wait(place % len(self))

    def wait(self, layer: int) -> None:
        """Let the current stream go no further before the layer's weights are there."""
        self._arrived[layer][1].wait()

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, layer: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, layer: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(layer, slice):
            raise TypeError("streamed layers are taken one by one")
        return self._arrived[layer][0]

    def _load(self, place: int) -> None:
        layer, buffers = place % len(self), self._ring[place % len(self._ring)]
        pieces = self._pieces[layer]
        with self._stream.work():
            for piece, buffer in zip(pieces, buffers, strict=True):
                piece.copy_to(buffer)
        tensors = iter([piece.whole(buffer) for piece, buffer in zip(pieces, buffers, strict=True)])
        weights = mapped(self._template, lambda _: next(tensors))
        self._arrived[layer] = (weights, self._stream.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A tensor's first entries on the host, the others on the device, both flat."""

    on_host: Tensor
    resident: Tensor
    shape: torch.Size

    def buffer(self, device: torch.device) -> Tensor:
        """Room for the whole tensor, if any of it is on the host."""
        size = self.on_host.numel() + self.resident.numel() if self.on_host.numel() else 0
        return torch.empty(size, dtype=self.on_host.dtype, device=device)

    def copy_to(self, buffer: Tensor) -> None:
        if there := self.on_host.numel():
            buffer[:there].copy_(self.on_host, non_blocking=True)
            buffer[there:].copy_(self.resident)

    def whole(self, buffer: Tensor) -> Tensor:
        return (buffer if self.on_host.numel() else self.resident).view(self.shape)


def _split(layer: LayerWeights, device: torch.device, share: float) -> list[_Piece]:
    tensors = list(_tensors(layer))
    left_bytes = round(share * sum(tensor.nbytes for tensor in tensors))
    pieces = []
    for tensor in tensors:
        there = min(tensor.numel(), left_bytes // tensor.element_size())
        left_bytes -= there * tensor.element_size()
        flat = tensor.flatten()
        host = flat[:there].to("cpu", copy=True)
        pieces.append(
            _Piece(
                on_host=host.pin_memory() if device.type == "cuda" and there else host,
                resident=flat[there:].to(device, copy=True),
                shape=tensor.shape,
            )
        )
    return pieces


def _tensors(noun: Any) -> Iterator[Tensor]:
    found = list[Tensor]()
    mapped(noun, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return iter(found)


def mapped(noun: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with every tensor in it changed, in the order of its fields."""
    if isinstance(noun, Tensor):
        return change(noun)
    if not is_dataclass(noun) or isinstance(noun, type):
        return noun
    return replace(noun, **{member.name: mapped(getattr(noun, member.name), change) for member in fields(noun)})
