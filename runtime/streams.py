"""Streams beside the one that computes: host to device, device to host. On a CPU, or unasked, all is one sequence.

Three rules keep memory safe. A side stream begins a piece of work by waiting for all that was queued on the main stream.
The main stream waits for that piece before it uses or changes what the piece reads or writes. A tensor of the main
stream that a side stream still reads when its last name is gone is lent to that stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class Done:
    """A point in a side stream."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Let the current stream go no further before that point is reached."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class SideStream:
    """One engine's work, in the order in which it is given."""

    def __init__(self, device: torch.device, *, overlap: bool) -> None:
        self._stream = _stream(device) if overlap and device.type == "cuda" else None
        self.last = Done()

    @contextmanager
    def work(self, *lent: Tensor) -> Iterator[None]:
        """Queue what is done inside, after all that the current stream has been given; ``last`` is its end."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in lent:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self.last = Done(event)


@cache
def warming_stream(device: torch.device) -> torch.cuda.Stream:
    """Where kernels run before they are captured, always the same: for each stream that ever multiplied matrices the
    library keeps 32 MiB of HBM until the process ends.
    """
    return _stream(device)


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
