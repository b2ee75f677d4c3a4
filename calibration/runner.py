"""Runs plans with the runtime: random weights, drawn once for each shape, and the trace of what happened."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from runtime.execute import DTYPES, execute
from runtime.models import Decoder, random_decoder
from runtime.models.config import config_from_spec
from runtime.options import Options
from runtime.recorder import LanePicks, Record, SelectionStats
from sim.plan import Plan
from sim.recipe import shortened
from sim.spec import DType, ModelSpec
from sim.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A run; ``peak_bytes`` is the most that the device's allocator gave out, None on a CPU."""

    trace: Trace
    peak_bytes: int | None
    picks: LanePicks | None
    stats: tuple[tuple[SelectionStats, ...], ...]


@dataclass(slots=True)
class Runner:
    """Keeps the last model's weights."""

    device: torch.device
    _held: tuple[ModelSpec, DType] | None = None
    _decoder: Decoder | None = field(default=None, repr=False)

    def warm(self, plan: Plan) -> None:
        """Load, compile and choose what ``plan`` needs, by its first steps."""
        self.run(shortened(plan, 3))

    def run(self, plan: Plan, *, record: Record | None = None) -> Ran:
        """Random prompts of the full length through ``plan``."""
        decoder, work = self.decoder(plan.setting.model, plan.setting.dtype), plan.setting.workload
        generator = torch.Generator().manual_seed(0)
        shape = (work.batch, work.prompt_tokens)
        prompts = torch.randint(0, plan.setting.model.vocab, shape, generator=generator).tolist()
        options = Options(stop=False, record=record or Record(selections=False))
        self._reset_peak()
        ran = execute(plan, decoder, prompts, options=options)
        return Ran(trace=ran.trace, peak_bytes=self._peak_bytes(), picks=ran.picks, stats=ran.stats)

    def decoder(self, model: ModelSpec, dtype: DType) -> Decoder:
        if self._held != (model, dtype) or self._decoder is None:
            self._decoder = None
            self._forget()
            config = replace(config_from_spec(model), stop_tokens=())
            self._decoder = random_decoder(config, device=self.device, dtype=DTYPES[dtype])
            self._held = (model, dtype)
        return self._decoder

    def _forget(self) -> None:
        """Give memory back before other weights take it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        """What earlier runs took is kept at hand, so that a prefill does not wait for the allocator."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


Run = Callable[[Plan], Ran]
