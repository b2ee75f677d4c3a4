"""KV formats and the bytes that one token of one sequence takes in one layer."""

from dataclasses import dataclass
from enum import StrEnum

from sim.spec import DType, GpuSpec, ModelSpec

GROUP_TOKENS = 64  # keys are quantised by channel in frozen groups; the newest group stays in the compute type
SCALE_BYTES = 4  # a 16-bit scale and a 16-bit zero point


class KvFormat(StrEnum):
    """How keys and values are stored; ``native`` is the compute type."""

    NATIVE = "native"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def is_grouped(self) -> bool:
        """Integer formats carry scales: by channel and group for keys, by token and head for values."""
        return self in (KvFormat.INT8, KvFormat.INT4)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvFormats:
    """One format for each tier."""

    gpu: KvFormat = KvFormat.NATIVE
    host: KvFormat = KvFormat.NATIVE

    @property
    def are_native(self) -> bool:
        return self.gpu is KvFormat.NATIVE and self.host is KvFormat.NATIVE


def kv_layer_bytes(model: ModelSpec, dtype: DType, kv_format: KvFormat) -> int:
    """Key and value of one token in one layer, scales included."""
    elements = 2 * model.kv_dim
    if kv_format is KvFormat.NATIVE:
        return elements * dtype.size_bytes
    if kv_format is KvFormat.FP8:
        return elements  # one scale a tensor, not counted
    key_scales = key_range_bytes(model)
    value_scales = model.kv_heads * SCALE_BYTES
    payload = elements if kv_format is KvFormat.INT8 else -(-elements // 2)
    return payload + key_scales + value_scales


def key_range_bytes(model: ModelSpec) -> int:
    """A token's share of the ranges of its group's keys, in one layer."""
    return -(-model.kv_dim * SCALE_BYTES // GROUP_TOKENS)


def open_group_bytes(model: ModelSpec, dtype: DType, kv_format: KvFormat) -> int:
    """The newest keys of one sequence and layer that wait in the compute type until their group is frozen."""
    return GROUP_TOKENS * model.kv_dim * dtype.size_bytes if kv_format.is_grouped else 0


def inputs_layer_bytes(model: ModelSpec, dtype: DType) -> int:
    """One token's layer input, from which its KV can be projected again; below the KV only if kv_dim > hidden / 2."""
    return model.hidden * dtype.size_bytes


def require_kv_format(gpu: GpuSpec, kv_format: KvFormat) -> None:
    """Raise ValueError where the card cannot convert ``kv_format`` in hardware."""
    if kv_format is KvFormat.FP8 and gpu.fp8_flop_per_s is None:
        raise ValueError(f"kv_format=fp8, {gpu.name} has no fp8 arithmetic: use native, int8 or int4")
