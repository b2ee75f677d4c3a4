"""A caching plan: all that an engine needs to run a workload, and nothing that depends on how fast it runs.

``Setting`` holds what is chosen once, ``TokenHomes`` what is chosen for each step; a ``Plan`` is both, checked together.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from sim.access import AccessProfile
from sim.attention import Attention, TokenCounts, count_tokens
from sim.checks import require_one_of, require_share, require_whole
from sim.homes import Phase, TokenHomes
from sim.kv import KvFormat, KvFormats, require_kv_format
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from sim.workload import Workload


class Placement(StrEnum):
    """What the GPU caches of the tokens whose home is not HBM."""

    RECENT = "recent"  # nothing: what is attended is fetched at every step (the paper)
    RESIDENT = "resident"  # the selected ones: only the difference between two steps is fetched


class WriteBack(StrEnum):
    """When KV is copied to the host."""

    AT_BIRTH = "at_birth"  # link traffic and host space from the first token, eviction is free
    AT_EVICTION = "at_eviction"


class Recompute(StrEnum):
    """What deleted KV is computed from when a step attends to it."""

    NONE = "none"
    ACTIVATIONS_HOST = "activations_host"  # layer inputs, saved at birth in host memory
    ACTIVATIONS_HBM = "activations_hbm"  # layer inputs, saved at birth in HBM: no link traffic
    TOKENS = "tokens"  # a forward pass of the whole dropped prefix through all layers

    @property
    def from_activations(self) -> bool:
        return self in (Recompute.ACTIVATIONS_HOST, Recompute.ACTIVATIONS_HBM)


class Mechanism(StrEnum):
    """How fetched bytes cross the link."""

    COPY_ENGINE = "copy_engine"  # contiguous blocks
    GATHER_KERNEL = "gather_kernel"  # scattered rows, read from pinned memory by a few SMs


class Admission(StrEnum):
    """How sequences enter when not all run at once."""

    WAVES = "waves"  # the next ones start together when those that run have all finished
    CONTINUOUS = "continuous"  # one by one as pages fall free (``sim.admission``); all KV in HBM


class Preemption(StrEnum):
    """What becomes of the KV of a sequence that must step back under continuous admission."""

    RECOMPUTE = "recompute"  # dropped; prompt and tokens so far are prefilled again
    SWAP = "swap"  # copied to host memory and back


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How ``model`` serves ``workload`` on ``machine``; at most ``concurrency`` sequences run at once.

    ``prefetch_layers`` is how many layers' fetches may be ahead of the layer that computes; the last of a step fetch
    for the first layers of the next one. ``guess_hits`` is the share of right guesses with which a selector that
    recalls fetches ahead (None: it fetches once the query is known). ``weights_on_host`` is the share of each layer's
    weights streamed at every step. With ``host_attention`` the CPU attends to the host's tokens where they lie.
    """

    machine: MachineSpec
    model: ModelSpec
    workload: Workload
    dtype: DType
    weight_format: WeightFormat = WeightFormat.NATIVE
    weights_on_host: float = 0.0
    concurrency: int
    admission: Admission = Admission.WAVES
    preemption: Preemption = Preemption.RECOMPUTE
    attention: Attention
    access: AccessProfile
    drop_dead: bool = True
    kv_format: KvFormats
    placement: Placement = Placement.RECENT
    write_back: WriteBack = WriteBack.AT_EVICTION
    recompute: Recompute = Recompute.NONE
    fetch_by: Mechanism = Mechanism.COPY_ENGINE
    host_attention: bool = False
    guess_hits: float | None = None
    prefetch_layers: int = 1
    kv_budget_bytes: int

    def __post_init__(self) -> None:
        self._check_options()
        self._check_combinations()

    @property
    def wave_sizes(self) -> tuple[int, ...]:
        """Sequences in each wave: full ones, then the rest. Continuous admission is one long wave."""
        if self.admission is Admission.CONTINUOUS:
            return (self.workload.batch,)
        full, rest = divmod(self.workload.batch, self.concurrency)
        return (self.concurrency,) * full + ((rest,) if rest else ())

    @property
    def token_counts(self) -> TokenCounts:
        return _counts(self.attention, self.workload.prompt_tokens, self.workload.output_tokens, self.drop_dead)

    @property
    def is_lossless(self) -> bool:
        """The output is that of dense attention in the compute type."""
        return self.attention.is_dense and self.kv_format.are_native and self.weight_format is WeightFormat.NATIVE

    @property
    def slots_needed(self) -> tuple[int, ...]:
        """HBM slots that a sequence cannot do without at each step.

        The newborn token; under a sparse selector the local window, with ``resident`` placement the selected ones too.
        """
        counts = self.token_counts
        if self.attention.is_dense:
            return (1,) * len(counts.cached)
        if self.placement is Placement.RECENT:
            return counts.local
        return tuple(near + far for near, far in zip(counts.local, counts.selected, strict=True))

    @property
    def most_dropped(self) -> tuple[int, ...]:
        """Tokens that may be without any home at each step: the dead, or a densely prefilled prefix that is recomputed."""
        prefix = self.workload.prompt_tokens if self.recompute is Recompute.TOKENS else 0
        return tuple(max(dead, prefix) for dead in self.token_counts.dead)

    def _check_options(self) -> None:
        require_whole("concurrency", self.concurrency)
        if self.concurrency > self.workload.batch:
            raise ValueError(f"concurrency={self.concurrency}, must be at most the batch of {self.workload.batch}")
        require_share("weights_on_host", self.weights_on_host)
        if self.guess_hits is not None:
            require_share("guess_hits", self.guess_hits)
        require_whole("kv_budget_bytes", self.kv_budget_bytes, at_least=0)
        require_one_of("prefetch_layers", self.prefetch_layers, range(1, max(2, self.model.layers)))
        if self.workload.cached_tokens > self.model.context_tokens:
            raise ValueError(
                f"prompt + output - 1 = {self.workload.cached_tokens} tokens, must fit {self.model.name}'s context of "
                f"{self.model.context_tokens}"
            )
        self.machine.gpu.flop_per_s(self.dtype)  # raises where the card lacks the type
        for kv_format in (self.kv_format.gpu, self.kv_format.host):
            require_kv_format(self.machine.gpu, kv_format)

    def _check_combinations(self) -> None:
        dense = self.attention.is_dense
        if self.access.selector is not self.attention.selector:
            raise ValueError(f"access.selector={self.access.selector}, must be the plan's {self.attention.selector}")
        if dense and self.placement is Placement.RESIDENT:
            raise ValueError("placement=resident, needs a sparse selector: dense attention selects every token")
        if self.host_attention and not (dense and self.kv_format.host is KvFormat.NATIVE):
            raise ValueError("host_attention=True, needs dense attention and native KV on the host")
        if self.admission is Admission.CONTINUOUS and (self.weights_on_host or self.host_attention):
            raise ValueError("admission=continuous, needs weights, KV and attention on the GPU: use waves")
        if self.recompute is Recompute.TOKENS and not dense:
            raise ValueError("recompute=tokens, is exact only under dense attention: use activations_host")
        if self.attention.selector.recalls and self.prefetch_layers != 1:
            raise ValueError(
                f"prefetch_layers={self.prefetch_layers}, must be 1: {self.attention.selector} can guess one layer ahead"
            )
        if self.guess_hits is not None and not self.attention.selector.recalls:
            raise ValueError(
                f"guess_hits={self.guess_hits}, must be null: {self.attention.selector} knows its picks a step ahead"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A setting and the token homes that go with it."""

    setting: Setting
    homes: TokenHomes

    def __post_init__(self) -> None:
        steps = self.setting.workload.output_tokens
        if self.homes.steps != steps:
            raise ValueError(f"homes, {self.homes.steps} rows, must have one for each of {steps} output tokens")
        self._check_rows()
        if self.setting.admission is Admission.CONTINUOUS and not self._all_living_in_hbm:
            raise ValueError("admission=continuous, needs all living tokens in HBM: use waves")

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.homes.phases(self.setting.token_counts.dead)

    @property
    def saved_inputs_tokens(self) -> int:
        """The first tokens of a sequence whose layer inputs are saved at birth: all that are ever homed there."""
        if not self.setting.recompute.from_activations:
            return 0
        homes = self.homes
        return max(
            (lost + kept for lost, kept in zip(homes.dropped, homes.activations, strict=True) if kept), default=0
        )

    @property
    def _all_living_in_hbm(self) -> bool:
        homes = self.homes
        return homes.dropped == self.setting.token_counts.dead and not any(homes.host_kv + homes.activations)

    def _check_rows(self) -> None:
        setting, homes, counts = self.setting, self.homes, self.setting.token_counts
        resident, recomputes = setting.placement is Placement.RESIDENT, setting.recompute.from_activations
        limits = zip(counts.cached, counts.dead, setting.most_dropped, setting.slots_needed, strict=True)
        rows = zip(homes.hbm, homes.host_kv, homes.activations, homes.dropped, homes.copies, strict=True)
        for step, ((hbm, host_kv, activations, dropped, copies), (cached, dead, most, slots)) in enumerate(
            zip(rows, limits, strict=True)
        ):
            off_hbm = host_kv + activations
            if hbm + off_hbm + dropped != cached:
                raise ValueError(
                    f"homes at step {step}, {hbm + off_hbm + dropped} tokens, must hold all {cached} cached ones"
                )
            if copies > (off_hbm if resident else 0):
                raise ValueError(f"homes.copies at step {step}={copies}, must be at most {off_hbm if resident else 0}")
            if not dead <= dropped <= most:
                raise ValueError(f"homes.dropped at step {step}={dropped}, must lie in [{dead}, {most}]")
            if activations and not recomputes:
                raise ValueError(
                    f"homes.activations at step {step}={activations}, must be 0 with recompute={setting.recompute}"
                )
            if hbm + copies < slots:
                raise ValueError(
                    f"homes at step {step}, {hbm + copies} slots in HBM, {setting.placement} placement needs {slots}"
                )


@lru_cache(maxsize=256)
def _counts(attention: Attention, prompt_tokens: int, steps: int, drop_dead: bool) -> TokenCounts:
    return count_tokens(attention, prompt_tokens, steps, drop_dead=drop_dead)
