"""Stands for a CUDA graph where there is none: what is captured is written down, and replayed as it was.

As on a GPU all that Python knew at capture stays as it was: which tensors, which numbers, which kernels. The memory of
intermediates is not used twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from runtime.graph.run import GraphWave
from runtime.graph.streamed_step import StreamedStep
from runtime.wave import Prompts


class RecordedGraph(TorchDispatchMode):
    """``recording`` is the one whose capture has begun."""

    recording: "RecordedGraph | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[Callable[[], None]]()
        self.replays = 0

    def capture_begin(self, pool: object = None) -> None:  # noqa: ARG002
        assert RecordedGraph.recording is None
        RecordedGraph.recording = self
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        RecordedGraph.recording = None

    def replay(self) -> None:
        assert RecordedGraph.recording is None
        self.replays += 1
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in func.__name__, "asks the device while it is captured"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append(partial(_again, func, args, kwargs, out))
        return out


@contextmanager
def recorded_graphs(monkeypatch: Any) -> Iterator[None]:
    """Inside, CUDA graphs are recorded ones, and kernels are captured too."""
    from triton.runtime.jit import KernelInterface

    def launching(kernel: Any, grid: Any) -> Callable[..., None]:
        def launched(*args: Any, **options: Any) -> None:
            launch = partial(kernel.run, *args, grid=grid, warmup=False, **options)
            with _disable_current_modes():  # interpreted, it is operations of torch itself
                launch()
            if RecordedGraph.recording:
                RecordedGraph.recording.calls.append(launch)

        return launched

    with monkeypatch.context() as patched:
        patched.setattr(KernelInterface, "__getitem__", launching)
        patched.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patched.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        yield


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Results go where they went at capture; what is in place, or a view, is there already."""
    for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out), strict=True):
        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)


def assert_replayed_alike(wave: GraphWave, prompts: Prompts, monkeypatch: Any) -> list[list[int]]:
    """Whatever its step is captured as, ``prompts`` come to the same tokens and logits. Returns, of each kind of row, how often
    its graphs were replayed.
    """
    assert isinstance(wave.step, StreamedStep)
    whole, logits = wave.run(prompts).tokens, wave.step.logits.clone()
    with recorded_graphs(monkeypatch), torch.inference_mode():
        wave.step.capture_each()
        again = wave.run(prompts).tokens
    torch.testing.assert_close(again, whole, atol=0, rtol=0)
    torch.testing.assert_close(wave.step.logits, logits, atol=1e-4, rtol=0)
    return [
        [graph.replays for graph in graphs if isinstance(graph, RecordedGraph)] for graphs in wave.step.graphs.values()
    ]
