"""A CPU that is measured in seconds: one small shape, few sizes, no patience."""

from pathlib import Path

import torch

from calibration.families.base import Scope
from calibration.timer import CpuTimer
from sim import catalogue
from sim.access import measured_access
from sim.attention import Selector
from sim.measured import Measured
from sim.profile import Fingerprint
from sim.spec import DType, GpuSpec, LinkSpec, MachineSpec
from sim.units import MIB

MODEL = "opt-125m/2/64"
CPU = torch.device("cpu")


def machine() -> MachineSpec:
    """Round numbers of a small CPU."""
    card = GpuSpec(
        name="cpu-test",
        hbm_bytes=2**33,
        hbm_bytes_per_s=4e10,
        fp16_flop_per_s=4e11,
        fp32_flop_per_s=4e11,
        fp8_flop_per_s=None,
        int8_op_per_s=None,
        has_bf16=True,
        sm_count=2,
        link=LinkSpec(name="copy within memory", bytes_per_s=2e10),
        launch_s=2e-6,
        source="test",
    )
    return MachineSpec(name="cpu-test", gpu=card, host=catalogue.host())


def fingerprint() -> Fingerprint:
    return Fingerprint(
        gpu="cpu-test", device="test", cpu="test", cores=2, driver="-", torch="2", clocks="-", date="2026-11-25"
    )


def nothing_yet() -> Measured:
    return Measured(fingerprint=fingerprint(), machine=machine(), random_access=(measured_access(Selector.SWA),))


def scope(**changes: object) -> Scope:
    settings: dict[str, object] = {
        "machine": machine(),
        "device": CPU,
        "dtype": DType.FP32,
        "timer": CpuTimer(),
        "models": (MODEL,),
        "batches": (2,),
        "prompts": (16,),
        "output": 6,
        "most_bytes": 4 * MIB,
        "cold_bytes": MIB,
        "budget_s": 0.0,
        "thorough": False,
    }
    return Scope(**(settings | changes))  # type: ignore[arg-type]


def file_of(folder: Path) -> Path:
    return folder / "cpu.measurements.json"
