"""The copy engine, asked by addresses: a block moved is one call of the driver, with no tensor made and no stream entered.

Between two pieces of a captured step the host does little but give such orders, and where a layer is short that is what the
layer takes.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor


class CopyEngine:
    """Copies in the order in which they are asked for, beside the main stream; on a CPU at once.

    Memory on the host must be registered, and both ends must live until the main stream has waited for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._handle, self._copy = self.stream.cuda_stream, _driver().cuMemcpyAsync

    def copy(self, to: int, come_from: int, size_bytes: int) -> None:
        """``size_bytes`` from one address to another."""
        if self.stream is None:
            ctypes.memmove(to, come_from, size_bytes)
            return
        error = self._copy(to, come_from, size_bytes, self._handle)
        if error:
            raise RuntimeError(f"{size_bytes} bytes, the driver did not copy them: error {error}")


class Mark:
    """A point in a stream, set again and again; who waits, waits for where it was then. Nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def put(self, stream: torch.cuda.Stream | None) -> None:
        """Here: after all that ``stream`` has been given."""
        if self._event is not None:
            self._event.record(stream)

    def hold(self, stream: torch.cuda.Stream | None) -> None:
        """Let ``stream`` go no further before."""
        if self._event is not None and stream is not None:
            stream.wait_event(self._event)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Block:
    """Where the equal parts of a contiguous tensor lie: ``at`` an index of its first dimensions."""

    def __init__(self, tensor: Tensor, dims: int) -> None:
        self._base = tensor.data_ptr()
        self._strides = [stride * tensor.element_size() for stride in tensor.stride()[:dims]]
        self.size_bytes = tensor[(slice(0, 1),) * dims].numel() * tensor.element_size()

    def at(self, *index: int) -> int:
        return self._base + sum(place * stride for place, stride in zip(index, self._strides, strict=True))


@cache
def _driver() -> Any:
    """CUDA's own library, which torch has loaded before."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    driver.cuMemcpyAsync.restype = ctypes.c_int
    return driver
