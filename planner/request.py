"""What a user asks for: the work, and what the plan may give up for speed."""

from dataclasses import dataclass
from enum import StrEnum

from sim.attention import Selector
from sim.checks import require_positive, require_share, require_whole
from sim.kv import KvFormat
from sim.profile import Profile
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from sim.workload import Workload


class Objective(StrEnum):
    """What is best: most tokens a second, least time between tokens, or least time to the first."""

    THROUGHPUT = "throughput"
    TPOT = "tpot"
    TTFT = "ttft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A planning problem.

    ``max_sparsity`` bounds the share of cached tokens that sparse attention may leave out; 0 allows dense attention
    only. ``selectors`` and ``kv_formats`` are what may be used besides dense attention and native KV, which always may.
    ``concurrency`` fixes how many sequences run at once, None leaves it to the planner. ``kv_budget_bytes`` replaces
    what HBM has left beside weights and workspace. ``max_tpot_s`` bounds the mean time between tokens.
    """

    machine: MachineSpec
    profile: Profile
    model: ModelSpec
    workload: Workload
    dtype: DType = DType.FP16
    weight_format: WeightFormat = WeightFormat.NATIVE
    max_sparsity: float = 0.8
    selectors: tuple[Selector, ...] = (Selector.SWA,)
    kv_formats: tuple[KvFormat, ...] = (KvFormat.INT8,)
    concurrency: int | None = None
    objective: Objective = Objective.THROUGHPUT
    max_tpot_s: float | None = None
    kv_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        require_share("sparsity", self.max_sparsity, below_one=True)
        if self.concurrency is not None:
            require_whole("concurrency", self.concurrency)
            if self.concurrency > self.workload.batch:
                raise ValueError(f"concurrency={self.concurrency}, must be at most the batch of {self.workload.batch}")
        if self.max_tpot_s is not None:
            require_positive("max_tpot_s", self.max_tpot_s)
        if self.workload.output_tokens == 1 and (self.objective is Objective.TPOT or self.max_tpot_s is not None):
            raise ValueError(
                "output=1, must be at least 2 tokens for a time per output token: ask for throughput or ttft"
            )
        if self.kv_budget_bytes is not None:
            require_whole("kv_budget_bytes", self.kv_budget_bytes, at_least=0)
        if self.workload.cached_tokens > self.model.context_tokens:
            raise ValueError(
                f"prompt + output - 1 = {self.workload.cached_tokens} tokens, must fit {self.model.name}'s context of "
                f"{self.model.context_tokens}"
            )
        self.machine.gpu.flop_per_s(self.dtype)  # raises where the card lacks the type
