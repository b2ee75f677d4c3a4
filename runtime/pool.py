"""Slots of fixed number, allocated once, that hold tokens' rows; tables on the device say which token lies where."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from runtime.masks import listed

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
Rows = dict[str, Tensor]  # plane name: [lane, token, head, width]


class SlotPool:
    """Rows of tokens of every layer, each made of the same planes (key, value, scales) [layer, lane, head, slot, width].

    ``holds`` [layer, lane, slot] is the position in each slot, ``slot_of`` [layer, lane, position] the slot of each
    position. One slot and one position more than there are stand for "none": writes that a mask excludes land there.
    What comes from another device is moved; what is given lies where the pool does.
    """

    def __init__(
        self,
        planes: Mapping[str, tuple[tuple[int, int], torch.dtype]],
        *,
        layers: int,
        lanes: int,
        slots: int,
        positions: int,
        device: torch.device,
        allocate: Allocate,
    ) -> None:
        self.slots = slots
        self.positions = positions
        self.device = device
        self.planes = {
            name: allocate((layers, lanes, heads, slots + 1, width), dtype)
            for name, ((heads, width), dtype) in planes.items()
        }
        self.holds = torch.full((layers, lanes, slots + 1), positions, device=device)
        self.slot_of = torch.full((layers, lanes, positions + 1), slots, device=device)
        self.overflowed = torch.zeros(layers, dtype=torch.bool, device=device)

    def put(self, layer: int, positions: Tensor, valid: Tensor, rows: Rows) -> None:
        """Store ``rows`` of ``positions`` [lane, token] in free slots, where ``valid``."""
        holds, slot_of = self.holds[layer], self.slot_of[layer]
        positions, valid = positions.to(self.device), valid.to(self.device)
        if self.slots == 0:
            self.overflowed[layer] |= valid.any()
            return
        slots, there = listed(holds[:, : self.slots] == self.positions, positions.shape[1])
        if positions.shape[1] > 1:
            nth = (valid.cumsum(-1) - 1).clamp_(min=0)
            slots, there = slots.gather(-1, nth), there.gather(-1, nth)
        self.overflowed[layer] |= (valid & ~there).any()
        slots = slots.masked_fill(~(valid & there), self.slots)
        at = positions.masked_fill(~valid, self.positions)
        holds.scatter_(-1, slots, at)
        slot_of.scatter_(-1, at, slots)
        holds[:, self.slots] = self.positions
        slot_of[:, self.positions] = self.slots
        self._write(layer, slots, rows)

    def rewrite(self, layer: int, positions: Tensor, rows: Rows) -> None:
        """Replace planes of ``positions`` that are held; those that are not stay absent."""
        self._write(layer, self.slot_of[layer].gather(-1, positions.to(self.device)), rows)

    def take(self, layer: int, positions: Tensor, *, without: str | None = None) -> Rows:
        """Rows of ``positions`` [lane, token], of all planes but one; arbitrary ones for those not held."""
        slots = self.slot_of[layer].gather(-1, positions.to(self.device))
        numbers = self._numbers(slots)
        return {name: _taken(plane[layer], numbers) for name, plane in self.planes.items() if name != without}

    def rows(self, layer: int, slots: int) -> tuple[Tensor, Rows]:
        """What the first ``slots`` slots hold, [lane, slot] positions and their rows, without copying."""
        return self.holds[layer][:, :slots], {
            name: plane[layer][:, :, :slots].transpose(1, 2) for name, plane in self.planes.items()
        }

    def drop(self, layer: int, mask: Tensor) -> None:
        """Free the slots of the tokens in ``mask`` [lane, position]."""
        if self.slots == 0:
            return
        holds, slot_of, mask = self.holds[layer], self.slot_of[layer], mask.to(self.device)
        gone = torch.nn.functional.pad(mask, (0, 1)).gather(-1, holds)
        holds.masked_fill_(gone, self.positions)
        slot_of[:, : self.positions].masked_fill_(mask, self.slots)

    def grow(self, slots: int, allocate: Allocate) -> None:
        """Have ``slots`` from now on, no fewer than there are."""
        before, self.slots = self.slots, slots
        for name, plane in self.planes.items():
            wider = allocate((*plane.shape[:3], slots + 1, *plane.shape[4:]), plane.dtype)
            wider[:, :, :, :before] = plane[:, :, :, :before]
            self.planes[name] = wider
        holds = self.holds.new_full((*self.holds.shape[:2], slots + 1), self.positions)
        holds[..., :before] = self.holds[..., :before]
        self.holds, self.slot_of = holds, self.slot_of.masked_fill(self.slot_of == before, slots)

    def held(self) -> Tensor:
        """Slots in use, [layer, lane]."""
        return (self.holds != self.positions).sum(-1)

    def _write(self, layer: int, slots: Tensor, rows: Rows) -> None:
        numbers = self._numbers(slots).flatten()
        for name, row in rows.items():
            plane, given = self.planes[name][layer], row.to(self.device).transpose(1, 2)  # [lane, head, token, width]
            plane.flatten(0, 2).index_copy_(0, numbers, given.reshape(-1, plane.shape[-1]))

    def _numbers(self, slots: Tensor) -> Tensor:
        """Of the rows in ``slots`` [lane, token], the same in every plane."""
        return row_numbers(next(iter(self.planes.values()))[0], slots)


def take_rows(plane: Tensor, places: Tensor) -> Tensor:
    """Rows of ``plane`` [lane, head, place, ...] at ``places`` [lane, token], as [lane, token, head, ...]."""
    return _taken(plane, row_numbers(plane, places))


def row_numbers(plane: Tensor, places: Tensor) -> Tensor:
    """Numbers [lane, head, token] of the rows at ``places`` [lane, token] in ``plane`` [lane, head, place, ...] end to end."""
    lanes, heads, count = plane.shape[:3]
    first = torch.arange(0, lanes * heads * count, count, device=plane.device).view(lanes, heads, 1)
    return first + places[:, None]


def _taken(plane: Tensor, numbers: Tensor) -> Tensor:
    rows = plane.flatten(0, 2).index_select(0, numbers.flatten())
    return rows.view(*numbers.shape, *plane.shape[3:]).transpose(1, 2)
