"""Small copies between the host and a device that neither waits for."""

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory that a queued copy to ``device`` reads; torch lends it again only after that copy."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


def uploaded(numbers: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """As a tensor of ``device``."""
    return pinned(torch.tensor(numbers, dtype=torch.int64), device).to(device, non_blocking=True)


def to_host(rows: Tensor) -> Tensor:
    """A copy in pinned memory, there once the device has come so far."""
    if rows.device.type != "cuda":
        return rows.clone()
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
