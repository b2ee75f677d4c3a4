"""What all rows share: the workload, the ceilings they are compared with, and the figures that a table holds."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.models import Decoder
from sim import catalogue
from sim.access import measured_access
from sim.attention import Attention, Selector
from sim.homes import TokenHomes
from sim.kv import KvFormats, kv_layer_bytes
from sim.plan import Plan, Setting
from sim.spec import DType, MachineSpec
from sim.units import GIB
from sim.workload import Workload

MODEL, BATCH, PROMPT, OUTPUT, REPEATS = "OPT-6.7B", 64, 128, 512, 3
BUDGET_BYTES = int(4.5 * GIB)
WORKSPACE_BYTES = int(1.5 * GIB)  # that a row may take beside weights and budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Ceilings of this machine: bytes a second read from HBM and copied from pinned host memory, FLOP a second of products."""

    hbm: float
    link: float
    matrix: float


class Row(Protocol):
    """``must`` and ``aim`` are tokens/s, None where the link alone sets them: then they are shares of the limit."""

    @property
    def model(self) -> str: ...

    @property
    def must(self) -> float | None: ...

    @property
    def aim(self) -> float | None: ...

    def measure(self, decoder: Decoder) -> "Measured": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``runs`` are (seconds, those of the prefills among them); bytes, and FLOP of what is recomputed, are a decode step's
    mean; ``waited_link_bytes`` are those that nothing else is done beside. ``notes`` go to the table.
    """

    generated: int = BATCH * OUTPUT
    recompute_flop: float = 0.0
    runs: list[tuple[float, float]]
    decode_steps: int
    hbm_bytes: float
    link_bytes: float
    waited_link_bytes: float = 0.0
    kv_bytes: int
    budget_bytes: int
    setup_s: float
    sampled: bool
    notes: dict[str, Any]


def figures(row: Row, measured: Measured, decoder: Decoder, rates: Rates) -> dict[str, Any]:
    """The row as the table keeps it: the median run beside the limit, with the measured prefill in both."""
    runs = sorted(measured.runs)
    seconds, prefill_s = runs[len(runs) // 2]
    step_s = (seconds - prefill_s) / measured.decode_steps
    limit_step_s = max(
        measured.hbm_bytes / rates.hbm, measured.link_bytes / rates.link, measured.recompute_flop / rates.matrix
    )
    limit_step_s += measured.waited_link_bytes / rates.link
    limit = measured.generated / (prefill_s + measured.decode_steps * limit_step_s)
    peak, allowed = torch.cuda.max_memory_allocated(), weight_bytes(decoder) + measured.budget_bytes + WORKSPACE_BYTES
    return {
        "tokens_per_s": measured.generated / seconds,
        "all_tokens_per_s": [measured.generated / every for every, _ in runs],
        "sampled": measured.sampled,
        "must": row.must or 0.85 * limit,
        "aim": row.aim or 0.95 * limit,
        "limit_tokens_per_s": limit,
        "decode_steps": measured.decode_steps,
        "step_ms": step_s * 1e3,
        "limit_step_ms": limit_step_s * 1e3,
        "hbm_gb_per_s": measured.hbm_bytes / step_s / 1e9,
        "link_gb_per_s": (measured.link_bytes + measured.waited_link_bytes) / step_s / 1e9,
        "recompute_tflop_per_s": measured.recompute_flop / step_s / 1e12,
        "ceiling_hbm_gb_per_s": rates.hbm / 1e9,
        "ceiling_link_gb_per_s": rates.link / 1e9,
        "ceiling_tflop_per_s": rates.matrix / 1e12,
        "prefill_s": prefill_s,
        "setup_s": measured.setup_s,
        "kv_gib": measured.kv_bytes / GIB,
        "peak_hbm_gib": peak / GIB,
        "allowed_hbm_gib": allowed / GIB,
        "within_hbm": peak <= allowed and measured.kv_bytes <= measured.budget_bytes,
        **measured.notes,
    }


def setting(attention: Attention, budget_bytes: int, *, concurrency: int = BATCH, **options: Any) -> Setting:
    machine = MachineSpec(name="measured", gpu=catalogue.gpu("H200"), host=catalogue.host())
    options.setdefault("kv_format", KvFormats())
    return Setting(
        machine=machine,
        model=catalogue.model(MODEL),
        workload=Workload(batch=BATCH, prompt_tokens=PROMPT, output_tokens=OUTPUT),
        dtype=DType.FP16,
        concurrency=concurrency,
        attention=attention,
        access=measured_access(attention.selector),
        kv_budget_bytes=budget_bytes,
        **options,
    )


def dense_setting(budget_bytes: int, concurrency: int = BATCH, **options: Any) -> Setting:
    return setting(Attention(selector=Selector.DENSE), budget_bytes, concurrency=concurrency, **options)


def dense_plan(chosen: Setting, slots: int) -> Plan:
    """So many tokens in HBM, the rest on the host."""
    cached = chosen.token_counts.cached
    none = (0,) * len(cached)
    hbm, host = tuple(min(n, slots) for n in cached), tuple(max(0, n - slots) for n in cached)
    return Plan(setting=chosen, homes=TokenHomes(hbm=hbm, host_kv=host, activations=none, dropped=none, copies=none))


def token_bytes(chosen: Setting) -> int:
    """A token's keys and values in HBM, all layers, of one sequence."""
    return chosen.model.layers * kv_layer_bytes(chosen.model, chosen.dtype, chosen.kv_format.gpu)


def weight_bytes(decoder: Decoder) -> int:
    weights = decoder.weights
    layers = [part for layer in weights.layers for part in (layer.qkv, layer.out, layer.up, layer.down)]
    tensors = [weights.embedding, weights.positions, *(part.weight for part in layers)]
    tensors += [] if weights.head is weights.embedding else [weights.head]
    return sum(_bytes(tensor) for tensor in tensors)


def read_weight_bytes(decoder: Decoder) -> int:
    """Of a decode step: each matrix once, tables that are looked up not at all."""
    weights = decoder.weights
    looked_up = [weights.positions] + ([] if weights.head is weights.embedding else [weights.embedding])
    return weight_bytes(decoder) - sum(_bytes(tensor) for tensor in looked_up)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def random_tokens(chosen: Setting, *shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randint(0, chosen.model.vocab, shape, generator=generator, device="cuda")
