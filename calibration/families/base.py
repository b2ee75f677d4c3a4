"""What all families share: where they run, how much they take, and a case to be timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from calibration.timer import Call, Timer
from runtime.execute import DTYPES
from sim.profile import Measurement
from sim.spec import DType, MachineSpec

T = TypeVar("T")
try:
    from triton.errors import TritonError
except ImportError:  # a machine without a GPU may lack Triton
    TritonError = RuntimeError

FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    MemoryError,
    AttributeError,
    TypeError,
    TritonError,
)  # of a kernel that this version or card lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Where and how thoroughly to measure. ``cold_bytes`` is more than any cache holds: buffers rotate over as much.

    ``models`` are recipes' model names, whose layers are taken whole; ``batches`` are numbers of sequences.
    """

    machine: MachineSpec
    device: torch.device
    dtype: DType
    timer: Timer
    models: tuple[str, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    output: int
    most_bytes: int
    cold_bytes: int
    budget_s: float
    thorough: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def step_batches(self) -> tuple[int, ...]:
        """Every second one, where there are several: whole steps take long."""
        return self.batches[::2] if len(self.batches) > 2 else self.batches

    def some(self, values: Sequence[T]) -> Sequence[T]:
        """All of ``values``, or every second where time is short."""
        return values if self.thorough else values[::2]

    def copies(self, size_bytes: float, most: int = 64) -> int:
        """Buffers of ``size_bytes`` that make the caches forget the first one before it is used again."""
        return max(2, min(most, round(self.cold_bytes / size_bytes)))

    def normal(self, *shape: int) -> Tensor:
        """Values that a GPU's clocks meet in practice; a CPU's speed does not depend on them, and drawing is slow there."""
        if not self.on_gpu:
            return torch.full(shape, 0.01, dtype=self.torch_dtype)
        return torch.randn(shape, device=self.device, dtype=self.torch_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One or more measurements made together; the first is named ``family`` and ``case``."""

    family: str
    case: str
    measure: Callable[[], tuple[Measurement, ...]]


def reason_of(error: Exception) -> str:
    """One line; of an error that says nothing its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


Prepare = Callable[[], Sequence[Call]]


def timed(
    scope: Scope,
    family: str,
    case: str,
    prepare: Prepare,
    *,
    size_bytes: float = 0.0,
    flops: float = 0.0,
    captured: bool = True,
) -> Case:
    """A case whose calls are made ready by ``prepare`` only when it is measured."""

    def measure() -> tuple[Measurement, ...]:
        with torch.inference_mode():
            spread = scope.timer.time(prepare(), captured=captured, budget_s=scope.budget_s)
        return (
            Measurement(
                family=family,
                case=case,
                seconds=spread.seconds,
                low_s=spread.low_s,
                high_s=spread.high_s,
                samples=spread.samples,
                size_bytes=size_bytes,
                flops=flops,
            ),
        )

    return Case(family=family, case=case, measure=measure)


def each(work: Callable[[T], object], buffers: Sequence[T]) -> list[Call]:
    """``work`` on each buffer in turn."""
    return [partial(work, buffer) for buffer in buffers]


Family = Callable[[Scope], Iterator[Case]]
