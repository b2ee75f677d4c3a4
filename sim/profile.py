"""What of a datasheet a machine delivers. A spec is never fitted, a profile never typed by hand."""

from dataclasses import dataclass, field, fields

from sim.checks import require_non_negative, require_positive, require_share
from sim.spec import MachineSpec


def _share(nominal: float, reason: str) -> float:
    return field(default=nominal, metadata={"kind": "share", "reason": reason})


def _amount(nominal: float, reason: str) -> float:
    return field(default=nominal, metadata={"kind": "amount", "reason": reason})


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Constants of the cost model. ``basis`` says what they rest on: nominal, or measured on which card and date."""

    name: str
    basis: str
    gemm_hbm_efficiency: float = _share(
        0.85, "weight streaming of a tuned decode GEMM reaches 80 to 90 % of datasheet HBM bandwidth"
    )
    gemm_peak_efficiency: float = _share(0.78, "large square GEMMs on random data: 769 of 990 TFLOP/s on an H200")
    gemm_half_rows: float = _amount(
        128,
        "rows that cost as much again as the work itself: rate(rows) = peak * rows / (rows + half), Hockney's n-half",
    )
    attention_efficiency: float = _share(0.80, "share of HBM bandwidth that decode attention reads KV with")
    quantised_attention_efficiency: float = _share(0.60, "the same where keys and values are widened on the way")
    prefill_attention_efficiency: float = _share(0.50, "share of the matrix rate that causal attention reaches")
    gather_efficiency: float = _share(
        0.60, "rows of 1 KiB and more gathered in HBM, bytes read plus written: 3.1 of 4.8 TB/s on an H200"
    )
    elementwise_efficiency: float = _share(0.60, "share of HBM bandwidth of quantise, dequantise and selection passes")
    link_efficiency: float = _share(
        0.86, "large pinned copies: 54.6 of 63.0 GB/s on PCIe 5 x16; the rest is packet overhead"
    )
    link_duplex_efficiency: float = _share(0.88, "rate that each direction keeps while both run: 48.0 of 54.6 GB/s")
    gather_link_efficiency: float = _share(
        0.92, "gather kernel reading pinned rows, against a large copy: 50 of 54.6 GB/s"
    )
    copy_setup_s: float = _amount(8e-6, "start of one copy: 1 MiB took 27.5 us where its bytes take 19.2")
    copy_floor_s: float = _amount(10e-6, "no copy ends sooner, however small (16 to 18 us when launched eagerly)")
    gather_setup_s: float = _amount(5e-6, "start of a gather kernel and the first round trip over the link")
    gather_sm_share: float = _share(0.06, "8 of 132 SMs hold the persistent blocks that keep a PCIe 5 link busy")
    kernels_per_layer: float = _amount(
        10, "kernels of a fused decoder layer: norms, projections, rotation, attention, feed-forward"
    )
    kernels_per_selection: float = _amount(4, "score, reduce, top-k, update of the selection")
    step_overhead_s: float = _amount(60e-6, "graph launch, sampling and the read-back of a step's tokens")
    host_attention_efficiency: float = _share(0.50, "share of DRAM bandwidth that CPU attention reads KV with")
    host_round_trip_s: float = _amount(30e-6, "queries to the CPU and the result back, each layer")
    reserve_bytes: float = _amount(2**30, "CUDA context, libraries' workspaces and allocator slack")

    def __post_init__(self) -> None:
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            if parameter.metadata.get("kind") == "share":
                require_share(f"profile.{parameter.name}", value)
                if not parameter.name.endswith("sm_share"):
                    require_positive(f"profile.{parameter.name}", value)
            elif parameter.metadata.get("kind") == "amount":
                require_non_negative(f"profile.{parameter.name}", value)

    @classmethod
    def nominal(cls, machine: MachineSpec) -> "Profile":
        """Constants that hold for the class of machine, each with its reason; none is tuned to one paper's figure."""
        return cls(
            name=f"nominal-{machine.name}",
            basis="nominal: datasheet rates times typical efficiencies, nothing measured here",
        )

    @classmethod
    def reasons(cls) -> dict[str, str]:
        """Why each constant has its nominal value."""
        return {
            parameter.name: parameter.metadata["reason"] for parameter in fields(cls) if "reason" in parameter.metadata
        }
