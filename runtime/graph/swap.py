"""Where the pages of sequences wait that stepped back: host memory, registered once, that a kernel reaches over the link."""

from types import ModuleType

from torch import Tensor

from runtime.graph.copies import uploaded
from runtime.graph.pinned import registered
from sim.admission import Rules, schedule

_BLOCK_BYTES = 8192  # that a program of four warps moves


class HostPages:
    """``pages`` on the host of what a device has in ``planes`` [layer, page, …]. Who has which is the caller's affair.

    A copy, out or in, takes one launch a plane, all layers together, and no memory of the device but for a list of pages.
    """

    def __init__(self, planes: list[Tensor], pages: int) -> None:
        self.pages, self.here = pages, planes
        self.there = [
            registered(plane.device, (plane.shape[0], pages, *plane.shape[2:]), plane.dtype) for plane in planes
        ]
        if pages:  # its kernel is compiled now, not within a run
            self.write([0], [0])
            self.read([0], [0])

    def write(self, here: list[int], there: list[int]) -> None:
        """Copy pages of the device to the host's."""
        _carry(self.here, self.there, here, there)

    def read(self, here: list[int], there: list[int]) -> None:
        """Copy the host's pages back."""
        _carry(self.there, self.here, there, here)


def most_swapped_bytes(rules: Rules) -> float:
    """That ``rules`` ever keep on the host, where no text ends early."""
    return float(schedule(rules).host_bytes.max(initial=0.0))


def _carry(sources: list[Tensor], targets: list[Tensor], read: list[int], written: list[int]) -> None:
    """Pages ``read`` of all layers to pages ``written``."""
    pairs = uploaded([list(pair) for pair in zip(read, written, strict=True)], sources[0].device)
    for source, target in zip(sources, targets, strict=True):
        words, block = source[0, 0].numel(), _BLOCK_BYTES // source.element_size()
        _kernels().carry[len(read), source.shape[0], -(-words // block)](
            source, target, pairs, source.shape[1], target.shape[1], words, BLOCK=block, num_warps=4
        )


def _kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import paged_kernels as module

    return module
