"""Where there is no GPU, Triton's kernels are interpreted: said before anything imports Triton."""

import os
from collections.abc import Iterator

import pytest

if os.environ.get("KVPLAN_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def nothing_between_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Norms, rotations and gates of a decode step take no time: what is worked out by hand stays short."""
    from sim.layer_prices import layer_prices
    from sim.passes import Passes

    layer_prices.cache_clear()
    monkeypatch.setattr("sim.layer_prices.of_step", lambda _: Passes())
    yield
    layer_prices.cache_clear()
