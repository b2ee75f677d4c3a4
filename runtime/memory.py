"""Where tensors lie: in the device's own memory, or in host memory that the device reads and writes over the link."""

from typing import Any

import torch
from torch import Tensor


def device_zeros(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of ``device`` itself."""
    return torch.zeros(shape, dtype=dtype, device=device)


def host_zeros(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Host memory as a tensor of ``device``: on a GPU pinned, mapped into the GPU's addresses, so that its kernels gather
    and scatter rows over the link by indices that never leave the GPU. The CPU's own memory otherwise.
    """
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype)
    pinned = torch.zeros(shape, dtype=dtype, pin_memory=True)
    if pinned.numel() == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    flat: Tensor = torch.as_tensor(Mapped(pinned), device=device)
    return flat.view(dtype).view(shape)


class Mapped:
    """Pinned memory under the address at which the GPU sees it (unified addressing: the same one).

    torch keeps this object, and with it the memory, as long as the tensor made from it lives.
    """

    def __init__(self, pinned: Tensor) -> None:
        self.pinned = pinned
        size_bytes = pinned.numel() * pinned.element_size()
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (pinned.data_ptr(), False),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }
