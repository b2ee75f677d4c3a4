"""Where tensors lie: in the device's own memory, or in host memory that the device reads and writes over the link."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sim.units import format_bytes


@contextmanager
def memory_limits(gpu: str, host: str) -> Iterator[None]:
    """What runs out of memory inside is a ValueError of one line, with advice for the memory that ran out."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        asked = " ".join(str(error).split(".")[:2])
        raise ValueError(f"out of GPU memory ({asked}): {gpu}") from None
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        raise ValueError(f"out of host memory{reason}: {host}") from None
    except RuntimeError as error:  # the CPU's allocator, and that of pinned memory, have no class of their own
        if "DefaultCPUAllocator" not in str(error) and "out of memory" not in str(error):
            raise
        raise ValueError(f"out of host memory: {host}") from None


def require_host_memory(wanted_bytes: float, advice: str) -> None:
    """Raises ValueError, with ``advice``, where this machine has less: whoever asks for it none the less is ended unheard."""
    here_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted_bytes > here_bytes:
        wanted, here = format_bytes(wanted_bytes), format_bytes(here_bytes)
        raise ValueError(f"out of host memory ({wanted} wanted, {here} there): {advice}")


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
