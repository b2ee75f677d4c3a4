"""CUDA graphs of pieces of work that share a pool's memory."""

from collections.abc import Callable
from typing import Any

import torch


def captured(pool: Any, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What ``work`` launches on the current stream, as a graph with its memory in ``pool``."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool)
    try:
        work()
    finally:  # a stream that goes on capturing would hide why it failed
        graph.capture_end()
    return graph
