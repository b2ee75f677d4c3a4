"""Whose text has ended, learnt without waiting for the step just launched."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.graph.copies import to_host, uploaded


class _Late(NamedTuple):
    """Tokens that a step gave, on the host once ``event`` has passed."""

    numbers: list[int]
    places: list[int]
    tokens: Tensor
    event: torch.cuda.Event | None


class StopWatcher:
    """What a step gave is read while the next one runs. ``ends`` says at which place a sequence has its stop token."""

    def __init__(self, stop_tokens: Sequence[int], generated: Tensor) -> None:
        self.stop_tokens, self.generated = frozenset(stop_tokens), generated
        self.late = deque[_Late]()
        self.ends: dict[int, int] = {}

    def note(self, numbers: list[int], places: list[int]) -> None:
        """Read the tokens in ``places`` of sequences ``numbers`` later."""
        if not self.stop_tokens or not numbers:
            return
        device = self.generated.device
        tokens = to_host(self.generated[uploaded(numbers, device), uploaded(places, device)])
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.late.append(_Late(numbers, places, tokens, event))

    def ended(self, behind: int = 1) -> list[int]:
        """Sequences not told of before, by all steps but the last ``behind``."""
        found = list[int]()
        while len(self.late) > behind:
            late = self.late.popleft()
            if late.event is not None:
                late.event.synchronize()
            for number, place, token in zip(late.numbers, late.places, late.tokens.tolist(), strict=True):
                if token in self.stop_tokens and number not in self.ends:
                    self.ends[number] = place
                    found.append(number)
        return found
