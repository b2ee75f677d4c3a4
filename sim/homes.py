"""Where each cached token lives, step by step, and the phases that follow from it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum


class PhaseName(StrEnum):
    """ALISA's three phases: all KV in HBM; HBM and host memory; host memory and recomputation."""

    GPU = "gpu"
    GPU_CPU = "gpu_cpu"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase and the first step that belongs to it; step 0 is the prefill."""

    name: PhaseName
    first_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenHomes:
    """Tokens of one sequence by home, a row a step, and how many off-HBM tokens have a copy in HBM.

    Row 0 is the end of the prefill, row j the decode step that attends to prompt + j tokens. Within a row the oldest
    tokens are the outermost: dropped, then activations, then host KV, then HBM.
    """

    hbm: tuple[int, ...]
    host_kv: tuple[int, ...]
    activations: tuple[int, ...]
    dropped: tuple[int, ...]
    copies: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = sorted({len(getattr(self, column.name)) for column in fields(self)})
        if len(lengths) != 1 or lengths[0] == 0:
            raise ValueError(f"homes, columns of {lengths} rows, must all have one row a step")
        for column in fields(self):
            lowest = min(getattr(self, column.name))
            if lowest < 0:
                raise ValueError(f"homes.{column.name}={lowest}, must be at least 0 at every step")
        self._require_outward()

    @property
    def steps(self) -> int:
        return len(self.hbm)

    def phases(self, dead: tuple[int, ...]) -> tuple[Phase, ...]:
        """The phases that occur, each from its first step; ``dead`` counts the dropped tokens that need no recomputation."""
        first_host = _first(tokens > 0 for tokens in self.host_kv)
        recomputed = zip(self.activations, self.dropped, dead, strict=True)
        first_recompute = _first(kept > 0 or lost > gone for kept, lost, gone in recomputed)
        starts = [(PhaseName.GPU, 0), (PhaseName.GPU_CPU, first_host), (PhaseName.RECOMPUTE, first_recompute)]
        later = min((step for _, step in starts[1:] if step is not None), default=None)
        return tuple(
            Phase(name=name, first_step=step)
            for name, step in starts
            if step is not None
            and not (name is PhaseName.GPU and later == 0)
            and not (name is PhaseName.GPU_CPU and first_recompute is not None and first_recompute <= step)
        )

    def _require_outward(self) -> None:
        bounds = (0, 0, 0)
        for step, row in enumerate(zip(self.host_kv, self.activations, self.dropped, strict=True)):
            outward = (sum(row), row[1] + row[2], row[2])
            if any(now < before for now, before in zip(outward, bounds, strict=True)):
                raise ValueError(
                    f"homes at step {step}, tokens moved inward; homes go hbm, host_kv, activations, dropped"
                )
            bounds = outward


def _first(flags: Iterable[bool]) -> int | None:
    return next((step for step, flag in enumerate(flags) if flag), None)
