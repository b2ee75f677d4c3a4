"""Datasheet facts about machines and models, and the bytes and FLOPs that follow from them alone."""

from dataclasses import dataclass
from enum import StrEnum

from sim.checks import require_non_negative, require_positive, require_share, require_whole

CPU_LINK = "copy within memory"  # the name of a link that leads nowhere else


class DType(StrEnum):
    """What the model computes in."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def size_bytes(self) -> int:
        return 4 if self is DType.FP32 else 2


class WeightFormat(StrEnum):
    """How weights are stored; they are widened to the compute type inside the GEMM."""

    NATIVE = "native"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """The link between host and GPU; ``bytes_per_s`` is the datasheet rate of one direction."""

    name: str
    bytes_per_s: float

    def __post_init__(self) -> None:
        require_positive("link.bytes_per_s", self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One GPU's datasheet. Rates are dense (no structured sparsity), without clocks above boost."""

    name: str
    hbm_bytes: int
    hbm_bytes_per_s: float
    fp16_flop_per_s: float
    fp32_flop_per_s: float
    fp8_flop_per_s: float | None
    int8_op_per_s: float | None
    has_bf16: bool
    sm_count: int
    link: LinkSpec
    launch_s: float
    source: str

    def __post_init__(self) -> None:
        require_whole("gpu.hbm_bytes", self.hbm_bytes)
        require_whole("gpu.sm_count", self.sm_count)
        for name in ("hbm_bytes_per_s", "fp16_flop_per_s", "fp32_flop_per_s"):
            require_positive(f"gpu.{name}", getattr(self, name))
        for name in ("fp8_flop_per_s", "int8_op_per_s"):
            if getattr(self, name) is not None:
                require_positive(f"gpu.{name}", getattr(self, name))
        require_non_negative("gpu.launch_s", self.launch_s)

    def flop_per_s(self, dtype: DType) -> float:
        """Dense matrix rate in ``dtype``.

        Raises ValueError where the card has no such arithmetic.
        """
        if dtype is DType.BF16 and not self.has_bf16:
            raise ValueError(f"dtype=bf16, {self.name} has no bf16 arithmetic: use fp16 or fp32")
        return self.fp32_flop_per_s if dtype is DType.FP32 else self.fp16_flop_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """The CPU side. ``usable_share`` is what may be pinned for KV; the rest stays with the system."""

    name: str
    dram_bytes: int
    dram_bytes_per_s: float
    cores: int
    flop_per_s: float
    source: str
    usable_share: float = 0.9

    def __post_init__(self) -> None:
        require_whole("host.dram_bytes", self.dram_bytes, at_least=0)
        require_positive("host.dram_bytes_per_s", self.dram_bytes_per_s)
        require_positive("host.flop_per_s", self.flop_per_s)
        require_whole("host.cores", self.cores)
        require_share("host.usable_share", self.usable_share)

    @property
    def usable_bytes(self) -> int:
        return int(self.dram_bytes * self.usable_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """A GPU in a host. ``name`` is the GPU's; an override keeps it and is listed in ``overrides``."""

    name: str
    gpu: GpuSpec
    host: HostSpec
    overrides: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Whether both tiers are the same memory: then what launches the work also does it."""
        return self.gpu.link.name == CPU_LINK


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder's shape. ``positions`` counts rows of a learned position table (0 with rotary encoding).

    ``embedding_dim`` differs from ``hidden`` only where the embedding is projected (OPT-350M).
    Norms carry a bias (LayerNorm) or none (RMSNorm).
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    embedding_dim: int
    context_tokens: int
    gated_mlp: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_bias: bool
    norm_bias: bool
    norms_per_layer: int
    final_norm: bool
    qk_norm: bool
    tied_embeddings: bool
    source: str

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "hidden",
            "intermediate",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab",
            "embedding_dim",
            "context_tokens",
        ):
            require_whole(f"model.{name}", getattr(self, name))
        require_whole("model.positions", self.positions, at_least=0)
        require_whole("model.norms_per_layer", self.norms_per_layer, at_least=0)
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads}, must divide heads={self.heads}")

    @property
    def kv_dim(self) -> int:
        """Width of one token's key (or value) in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def query_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def qkv_parameters(self) -> int:
        out = self.query_dim + 2 * self.kv_dim
        return out * self.hidden + (out if self.qkv_bias else 0)

    @property
    def out_parameters(self) -> int:
        return self.query_dim * self.hidden + (self.hidden if self.out_bias else 0)

    @property
    def mlp_parameters(self) -> int:
        up = 2 if self.gated_mlp else 1
        bias = (up * self.intermediate + self.hidden) if self.mlp_bias else 0
        return (up + 1) * self.hidden * self.intermediate + bias

    @property
    def layer_parameters(self) -> int:
        """One decoder layer: attention, feed-forward, norms."""
        norms = self.norms_per_layer * self._norm_parameters + (2 * self.head_dim if self.qk_norm else 0)
        return self.qkv_parameters + self.out_parameters + self.mlp_parameters + norms

    @property
    def head_parameters(self) -> int:
        """The output projection's matrix, whether or not it is tied to the embedding."""
        return self.vocab * self.embedding_dim + (self.vocab if self.head_bias else 0)

    @property
    def parameters(self) -> int:
        """All parameters, tied ones counted once."""
        projections = 2 * self.hidden * self.embedding_dim if self.embedding_dim != self.hidden else 0
        embedding = self.vocab * self.embedding_dim + self.positions * self.hidden + projections
        head = 0 if self.tied_embeddings else self.head_parameters
        final = self._norm_parameters if self.final_norm else 0
        return embedding + self.layers * self.layer_parameters + final + head

    @property
    def _norm_parameters(self) -> int:
        return self.hidden * (2 if self.norm_bias else 1)

    def weight_bytes(self, dtype: DType, weight_format: WeightFormat = WeightFormat.NATIVE) -> int:
        """Stored size. int8 and int4 hold the layers' matrices with one scale for 64 weights; embeddings stay native."""
        layers = self.layers * self.layer_parameters
        rest = self.parameters - layers
        return rest * dtype.size_bytes + round(layers * weight_bytes_per_parameter(dtype, weight_format))


def weight_bytes_per_parameter(dtype: DType, weight_format: WeightFormat) -> float:
    """Bytes that one stored weight takes, its share of a 16-bit scale and zero for each group of 64 included."""
    group_bytes = 4 / 64
    if weight_format is WeightFormat.INT8:
        return 1 + group_bytes
    if weight_format is WeightFormat.INT4:
        return 0.5 + group_bytes
    return float(dtype.size_bytes)
