"""Layers whose weights lie in part on the host: copied before use into a ring of buffers, ahead of the layer that computes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from runtime.graph.pinned import Shared, shared
from runtime.models.decoder import LayerWeights
from runtime.streams import Done, SideStream

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # that bytes are handled as, the widest that fits
_CUT_BYTES = 16  # where a tensor may be cut: a multiple of what is read at once
_ALIGNED_BYTES = 256  # what a tensor's place in a block is a multiple of: as an allocator's would be


class StreamedLayers(Sequence[LayerWeights]):
    """A share of each layer's bytes lies on the host, its first tensors; ``ahead`` layers may be on their way.

    A *place* is a layer's turn: its step times the layers, and the layer. ``begin`` is called as each turn comes; the
    copy for the turn ``ahead`` of it then starts, into the buffer of the turn that has just ended.
    """

    def __init__(self, stored: list["_Stored"], device: torch.device, *, ahead: int) -> None:
        self.device, self._stored = device, stored
        self.ahead = min(ahead, len(self._stored) - 1)
        size_bytes = self._stored[0].buffer_bytes
        self._ring = [torch.empty(size_bytes, dtype=torch.uint8, device=device) for _ in range(self.ahead + 1)]
        self._stream = SideStream(device, overlap=False)
        self._arrived: dict[int, tuple[LayerWeights, Done]] = {}  # by layer
        self._wholes: dict[tuple[int, int], LayerWeights] = {}  # by layer and buffer: many tensors, made once

    @classmethod
    def of(cls, layers: Iterable[LayerWeights], device: torch.device, *, share: float, ahead: int) -> "StreamedLayers":
        """Of layers of one shape, ``share`` of each on the host."""
        return cls([_stored(layer, device, share) for layer in layers], device, ahead=ahead)

    def ringed(self, ahead: int) -> "StreamedLayers":
        """The same layers with a ring of its own."""
        return StreamedLayers(self._stored, self.device, ahead=ahead)

    @property
    def buffers(self) -> int:
        """Of the ring."""
        return len(self._ring)

    def in_place(self) -> tuple[LayerWeights, ...]:
        """Every layer in the buffer of its own: the one that all its turns have, as the buffers divide the layers.

        Raises ValueError where they do not.
        """
        if len(self) % self.buffers:
            raise ValueError(f"layers={len(self)}, must be a multiple of the {self.buffers} buffers of weights")
        return tuple(one.whole(self._own(layer)) for layer, one in enumerate(self._stored))

    def move(self, layer: int) -> "Move":
        """What brings the layer's block into the buffer of its own."""
        block = self._stored[layer].block.host
        return Move(self._own(layer).data_ptr(), block.data_ptr(), block.numel())

    def complete(self, layer: int) -> None:
        """Put beside the block, by a kernel of the current stream, what lies on the device of a tensor that is cut."""
        self._stored[layer].complete(self._own(layer))

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
        return len(self._stored)

    @overload
    def __getitem__(self, layer: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, layer: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(layer, slice):
            raise TypeError("streamed layers are taken one by one")
        return self._arrived[layer][0]

    def _own(self, layer: int) -> Tensor:
        return self._ring[layer % len(self._ring)]

    def _load(self, place: int) -> None:
        layer, at = place % len(self), place % self.buffers
        one, buffer = self._stored[layer], self._ring[at]
        with self._stream.work():
            buffer[: one.block.host.numel()].copy_(one.block.host, non_blocking=True)
            one.complete(buffer)
        if (layer, at) not in self._wholes:
            self._wholes[layer, at] = one.whole(buffer)
        self._arrived[layer] = (self._wholes[layer, at], self._stream.last)


class Move(NamedTuple):
    """Addresses, and how many bytes go from one to the other."""

    to: int
    come_from: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """Where a tensor begins in a buffer."""

    at: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        size_bytes = self.shape.numel() * self.dtype.itemsize
        return buffer[self.at : self.at + size_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A layer's first bytes on the host, ``block``; ``rest``, of the tensor that the share ends in, lies on the device.

    A buffer takes both, one after the other, and has every tensor that begins in the block. Other ``tensors`` lie on the
    device, in the order of the ``template``'s, which are empty.
    """

    block: Shared
    rest: Tensor
    tensors: list[Tensor | _Placed]
    template: LayerWeights

    @property
    def buffer_bytes(self) -> int:
        return self.block.host.numel() + self.rest.numel()

    def complete(self, buffer: Tensor) -> None:
        """Put the rest beside the block, by a kernel: a copy would take an engine."""
        if self.rest.numel():
            here = buffer[self.block.host.numel() :]
            words = next(
                kind for kind in _WORDS if not (here.numel() % kind.itemsize or here.data_ptr() % kind.itemsize)
            )
            torch.bitwise_or(self.rest.view(words), 0, out=here.view(words))

    def whole(self, buffer: Tensor) -> LayerWeights:
        """The layer, of what a buffer holds and what lies on the device."""
        found = iter([one.of(buffer) if isinstance(one, _Placed) else one for one in self.tensors])
        weights: LayerWeights = mapped(self.template, lambda _: next(found))
        return weights


def _stored(layer: LayerWeights, device: torch.device, share: float) -> _Stored:
    given, tensors, at = list(_tensors(layer)), list[Tensor | _Placed](), 0
    left_bytes = round(share * sum(tensor.nbytes for tensor in given))
    parts, rest = list[tuple[int, Tensor]](), torch.empty(0, dtype=torch.uint8, device=device)
    for tensor in given:
        there_bytes = tensor.nbytes if tensor.nbytes <= left_bytes else left_bytes // _CUT_BYTES * _CUT_BYTES
        left_bytes = left_bytes - there_bytes if there_bytes == tensor.nbytes else 0
        if not there_bytes:
            tensors.append(tensor.to(device, copy=True).contiguous())
            continue
        at += -at % _ALIGNED_BYTES
        flat = tensor.contiguous().flatten().view(torch.uint8)
        tensors.append(_Placed(at=at, dtype=tensor.dtype, shape=tensor.shape))
        parts.append((at, flat[:there_bytes]))
        at += there_bytes
        if there_bytes < tensor.nbytes:
            rest = flat[there_bytes:].to(device, copy=True)
    block = shared(device, (at,), torch.uint8)
    for first, part in parts:
        block.host[first : first + part.numel()].copy_(part)
    template = mapped(layer, lambda tensor: tensor.new_empty(0))
    return _Stored(block=block, rest=rest, tensors=tensors, template=template)


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
