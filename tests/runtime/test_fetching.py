"""The kernel that fetches listed tokens brings those and no others, however many programs share the work."""

import pytest
import torch

from runtime.graph.fetching import PROGRAMS, fetch
from tests.runtime.graphs import DEVICE, kernels

LANES, HEADS, CHANNELS, HERE, THERE = 2, 12, 8, 7, 10  # so many heads that two programs share a token


@kernels
@pytest.mark.parametrize("programs", [1, 4, 12, PROGRAMS])
def test_what_is_listed_is_brought_to_its_slot(programs: int) -> None:
    there = tuple(torch.randn(LANES, THERE, HEADS, CHANNELS, device=DEVICE) for _ in range(2))
    here = tuple(torch.full((LANES, HEADS, HERE, CHANNELS), -1.0, device=DEVICE) for _ in range(2))
    listed = torch.tensor([[(9, 0), (3, 6), (4, 2), (0, 5)], [(7, 1), (2, 3), (8, 4), (1, 0)]], dtype=torch.int32)
    counts = torch.tensor([[0, 0], [3, 2]], dtype=torch.int32)  # of the second row
    row = torch.ones(1, dtype=torch.int64, device=DEVICE)

    fetch(listed.to(DEVICE), counts.to(DEVICE), row, here, there, programs=programs)  # type: ignore[arg-type]

    for got, source in zip(here, there, strict=True):
        want = torch.full_like(got, -1.0)
        for lane, moves in enumerate(listed.tolist()):
            for position, slot in moves[: counts[1, lane]]:
                want[lane, :, slot] = source[lane, position]
        assert torch.equal(got, want)
