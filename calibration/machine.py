"""The machine at hand: what it is called, and its datasheet; a CPU has none, so its ceilings are measured."""

import datetime
import os
import platform
import subprocess
from dataclasses import replace

import torch

from calibration.beside import cores
from calibration.families.base import each
from calibration.timer import CpuTimer
from sim import catalogue
from sim.checks import require_one_of
from sim.profile import Fingerprint
from sim.spec import CPU_LINK, GpuSpec, HostSpec, LinkSpec, MachineSpec
from sim.units import MIB

_MARGIN = 1.1  # a ceiling is this much above the best rate seen, so that no share of it exceeds one
_SUMMED_BYTES, _SIDE, _OPS = 64 * MIB, 1024, 500


def device_of(name: str) -> torch.device:
    """The torch device that ``--device`` names.

    Raises ValueError for one that is not there.
    """
    require_one_of("--device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, torch finds no GPU here: use --device cpu")
    return torch.device(name)


def machine_at(device: torch.device) -> MachineSpec:
    """The catalogue's card in a host of this one's memory and cores, or this CPU."""
    if device.type == "cpu":
        return _cpu_machine()
    gpu = catalogue.gpu(device_name(device))
    host = _host("this host: memory and cores as the system states them, rates of the catalogue's default host")
    return MachineSpec(name=gpu.name, gpu=gpu, host=host)


def name_at(device: torch.device) -> str:
    """What ``machine_at`` calls the machine, without measuring it."""
    if device.type == "cpu":
        return f"cpu-{cores()}-cores"
    return catalogue.gpu(device_name(device)).name


def device_name(device: torch.device) -> str:
    """What its makers call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def require_answering(device: torch.device) -> None:
    """After an error: some leave a GPU so that this process cannot use it any more, and all that it still tried would fail.

    Raises ValueError where it does not answer.
    """
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{device} no longer answers ({reason}): run the same command again, it goes on from here"
        ) from None


def fingerprint_of(device: torch.device, machine: MachineSpec) -> Fingerprint:
    """What to recognise the machine by, and what may change its speed."""
    on_gpu = device.type == "cuda"
    return Fingerprint(
        gpu=machine.gpu.name,
        device=device_name(device),
        cpu=_cpu_name(),
        cores=machine.host.cores,
        driver=_driver() if on_gpu else platform.release(),
        torch=f"{torch.__version__} (CUDA {torch.version.cuda})" if on_gpu else torch.__version__,
        clocks=_clocks() if on_gpu else "not read",
        date=datetime.date.today().isoformat(),
    )


def _host(source: str) -> HostSpec:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(catalogue.host(), name="measured-host", dram_bytes=memory, cores=cores(), source=source)


def _cpu_machine() -> MachineSpec:
    """One memory for both tiers, half for each; the link is a copy from one half to the other."""
    host = _host("this CPU, measured")
    read, copied = _read_bytes_per_s(), _copied_bytes_per_s()
    flop_per_s = {dtype: _flop_per_s(dtype) for dtype in (torch.float32, torch.float16)}
    source = (
        f"{_cpu_name()}, {host.cores} cores: the best rates that torch {torch.__version__} was seen to reach, measured"
    )
    gpu = GpuSpec(
        name=name_at(torch.device("cpu")),
        hbm_bytes=host.dram_bytes // 2,
        hbm_bytes_per_s=max(read, 2 * copied) * _MARGIN,
        fp16_flop_per_s=flop_per_s[torch.float16] * _MARGIN,
        fp32_flop_per_s=flop_per_s[torch.float32] * _MARGIN,
        fp8_flop_per_s=None,
        int8_op_per_s=None,
        has_bf16=True,
        sm_count=host.cores,
        link=LinkSpec(name=CPU_LINK, bytes_per_s=copied * _MARGIN),
        launch_s=_operation_s(),
        source=source,
    )
    memory = replace(
        host,
        dram_bytes=host.dram_bytes // 2,
        dram_bytes_per_s=gpu.hbm_bytes_per_s,
        flop_per_s=gpu.fp32_flop_per_s,
        source=source,
    )
    return MachineSpec(name=gpu.name, gpu=gpu, host=memory)


def _best_s(calls: list, budget_s: float = 0.3) -> float:  # type: ignore[type-arg]
    return CpuTimer().time(calls, captured=False, budget_s=budget_s).low_s


def _read_bytes_per_s() -> float:
    parts = [torch.ones(_SUMMED_BYTES // 4) for _ in range(4)]
    return _SUMMED_BYTES / _best_s(each(torch.sum, parts))


def _copied_bytes_per_s() -> float:
    pairs = [(torch.ones(_SUMMED_BYTES // 4), torch.ones(_SUMMED_BYTES // 4)) for _ in range(2)]
    return _SUMMED_BYTES / _best_s(each(lambda pair: pair[0].copy_(pair[1]), pairs))


def _flop_per_s(dtype: torch.dtype) -> float:
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    return float(2 * _SIDE**3) / _best_s([lambda: a @ b])


def _operation_s() -> float:
    """One operation on one element."""
    one = torch.zeros(1)
    return _best_s([lambda: one.add_(1.0)] * _OPS, 0.05)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _driver() -> str:
    """The tool that comes with the driver knows."""
    return _asked("driver_version")


def _clocks() -> str:
    """Of the SMs and of memory, now and at most."""
    return _asked("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem")


def _asked(what: str) -> str:
    """For the record alone: where there is no answer, measuring goes on."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said or "unknown"
