"""Host memory of any size that a GPU's kernels reach: registered where it lies, so not rounded to a power of two."""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.memory import Mapped


class Shared(NamedTuple):
    """The same memory twice: as a tensor of the host, which the copy engine moves, and of the device, for its kernels.

    Both are needed as long as one is: the memory is registered while the device's tensor lives.
    """

    host: Tensor
    device: Tensor


def registered(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed host memory as a tensor of ``device``; unregistered when the tensor goes."""
    return shared(device, shape, dtype).device


def shared(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Shared:
    """Zeroed host memory. ``copy_`` of a contiguous part, unblocking and to one of the device's, is a single DMA."""
    memory = torch.zeros(shape, dtype=dtype)
    if device.type != "cuda" or memory.numel() == 0:
        return Shared(host=memory, device=memory.to(device))
    flat: Tensor = torch.as_tensor(_Registered(memory), device=device)
    return Shared(host=memory, device=flat.view(dtype).view(shape))


class _Registered(Mapped):
    def __init__(self, memory: Tensor) -> None:
        super().__init__(memory)
        size_bytes = memory.numel() * memory.element_size()
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size_bytes, 0)  # type: ignore[no-untyped-call]
        if int(error):
            raise MemoryError(f"{size_bytes} bytes of host memory, could not be pinned: error {int(error)}")

    def __del__(self) -> None:
        torch.cuda.cudart().cudaHostUnregister(self.pinned.data_ptr())  # type: ignore[no-untyped-call]
