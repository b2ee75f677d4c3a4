"""Listed tokens brought from pinned host memory by a kernel."""

from types import ModuleType

from torch import Tensor

from runtime.graph.launch import power_of_two

# Of a fetch beside which nothing runs: one that brings several tokens waits for the link at each, and one lane may lack many.
PROGRAMS = 4096
_HEADS_AT_ONCE = 8


def fetch(
    listed: Tensor,
    counts: Tensor,
    row: Tensor,
    here: tuple[Tensor, Tensor],
    there: tuple[Tensor, Tensor],
    *,
    programs: int = PROGRAMS,
) -> None:
    """Keys and values ``there`` [lane, position, head, channel] to ``here`` [lane, head, slot, channel].

    The first ``counts`` [row, lane] of ``listed`` [lane, entry, 2], position and slot, in ``row``. There are about
    ``programs``, no fewer than parts of lanes: a program fetches some heads of every so-many-th token of one lane.
    """
    lanes, heads, slots, channels = here[0].shape
    at_once = min(_HEADS_AT_ONCE, power_of_two(heads))
    parts = -(-heads // at_once)
    kernels().fetch[lanes, parts, max(1, programs // (lanes * parts))](
        listed,
        counts,
        row,
        *here,
        *there,
        heads,
        slots,
        there[0].shape[1],
        listed.shape[1],
        CHANNELS=channels,
        PADDED=power_of_two(channels),
        HEADS=at_once,
        num_warps=4,
    )


def kernels() -> ModuleType:
    """See ``runtime.graph.launch.kernels``."""
    from runtime.graph import recall_kernels as module

    return module
