"""The machine as SimPy sees it: serial streams that record what they do, pools that refuse to overflow, and progress marks."""

import heapq
from collections.abc import Generator
from itertools import count
from math import ceil
from typing import Any, TypeAlias

from simpy import Environment, Event

from sim.trace import Level, Resource, Span, Tier

Process: TypeAlias = Generator[Event, Any, None]  # a SimPy process: yields what it waits for


class CapacityExceeded(Exception):
    """A plan asked a memory for more than it has."""


class Stream:
    """One engine that does one thing at a time. Its driver process yields from ``run``; spans go to the shared record."""

    def __init__(self, env: Environment, resource: Resource, record: list[Span]) -> None:
        self.env = env
        self.resource = resource
        self._record = record

    def run(self, name: str, step: int, layer: int | None, seconds: float, size_bytes: float = 0.0) -> Process:
        """Occupy the stream for ``seconds``."""
        start_s = self.env.now
        yield self.env.timeout(seconds)
        self._record.append(Span(self.resource, name, step, layer, start_s, self.env.now, size_bytes))


class Pool:
    """Bytes of one tier set aside for KV."""

    def __init__(self, env: Environment, tier: Tier, capacity_bytes: float, record: list[Level]) -> None:
        self.env = env
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self._record = record

    def hold(self, step: int, size_bytes: float) -> None:
        """Hold ``size_bytes`` from now on.

        Raises CapacityExceeded if there is not so much.
        """
        if size_bytes > self.capacity_bytes:
            needed, missing = ceil(size_bytes), ceil(size_bytes - self.capacity_bytes)
            raise CapacityExceeded(
                f"{self.tier} overflows at step {step}: {needed:,} bytes of KV, {missing:,} more than there is room for"
            )
        self._record.append(Level(self.tier, step, self.env.now, size_bytes))


class Progress:
    """A count that only grows, and processes that wait until it has reached a value."""

    def __init__(self, env: Environment, reached: int = 0) -> None:
        self.env = env
        self.reached = reached
        self._arrivals = count()  # first come, first served; events themselves have no order
        self._waiting: list[tuple[int, int, Event]] = []

    def until(self, value: int) -> Process:
        """Wait until the count is at least ``value``; at once if it is."""
        if self.reached < value:
            event = self.env.event()
            heapq.heappush(self._waiting, (value, next(self._arrivals), event))
            yield event

    def advance(self) -> None:
        """One more."""
        self.reached += 1
        while self._waiting and self._waiting[0][0] <= self.reached:
            heapq.heappop(self._waiting)[2].succeed()
