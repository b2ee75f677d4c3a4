"""Times the runtime's own kernels and transfers, case by case, into a file that an interrupted run goes on from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.families import attention, formats, host, products, steps, transfers
from calibration.families.base import Case, Scope
from calibration.machine import fingerprint_of, is_cpu, machine_at
from calibration.recipe import Recipe
from calibration.runner import Runner
from calibration.timer import timer_for
from sim.access import AccessProfile
from sim.codec import from_plain, to_plain
from sim.files import read_json_object, write_atomically
from sim.profile import Fingerprint, Measurement
from sim.spec import DType, MachineSpec
from sim.units import GIB, MIB

SCHEMA_VERSION = 1
_MOST_FAILURES = 25
OnCase = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Raw measurements of one machine; ``access`` of a checkpoint, ``random_access`` of random weights, by selector."""

    fingerprint: Fingerprint
    machine: MachineSpec
    access: tuple[AccessProfile, ...] = ()
    random_access: tuple[AccessProfile, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    def has(self, case: Case) -> bool:
        return any((one.family, one.case) == (case.family, case.case) for one in self.measurements)


def scope_of(device: torch.device, machine: MachineSpec, *, thorough: bool) -> Scope:
    """Sizes that suit the device: the families' models on a GPU, small ones on a CPU."""
    timer, budget_s = timer_for(device), 0.15 if thorough else 0.03
    if device.type == "cuda":
        return Scope(
            machine=machine,
            device=device,
            dtype=DType.FP16,
            timer=timer,
            models=("opt-6.7b", "llama-3-8b", "opt-1.3b", "opt-13b") if thorough else ("opt-6.7b", "llama-3-8b"),
            batches=(4, 16, 32, 64, 128) if thorough else (4, 32, 64),
            prompts=(64, 512) if thorough else (128, 512),
            output=24 if thorough else 16,
            most_bytes=min(machine.gpu.hbm_bytes, machine.host.dram_bytes) // 8,
            cold_bytes=512 * MIB,
            budget_s=budget_s,
            thorough=thorough,
        )
    return Scope(
        machine=machine,
        device=device,
        dtype=DType.FP32,
        timer=timer,
        models=("opt-125m/6/512", "opt-125m/6/256", "opt-125m") if thorough else ("opt-125m/6/512", "opt-125m/6/256"),
        batches=(1, 2, 4, 8, 12) if thorough else (2, 8),
        prompts=(16, 64, 160) if thorough else (16, 128),
        output=16 if thorough else 12,
        most_bytes=min(GIB, machine.gpu.hbm_bytes // 16),
        cold_bytes=128 * MIB,
        budget_s=budget_s,
        thorough=thorough,
    )


def access_recipe(scope: Scope) -> Recipe:
    """A small model over enough tokens that selectors have a choice; on a GPU of its own width."""
    model = "opt-1.3b/4" if scope.on_gpu else scope.models[-1]
    return Recipe(model=model, batch=2, prompt=192, output=32, dtype=scope.dtype)


def cases(scope: Scope, runner: Runner) -> Iterator[Case]:
    """Every family, the quick ones first."""
    yield from host.cases(scope)
    yield from transfers.copies(scope)
    yield from transfers.gathers(scope)
    yield from formats.cases(scope)
    yield from products.cases(scope)
    yield from attention.cases(scope)
    yield from steps.cases(scope, runner)


def measure(
    scope: Scope,
    file: Path | None,
    before: Measured,
    on_case: OnCase | None = None,
    on_failure: Callable[[str], None] | None = None,
) -> Measured:
    """All cases that ``before`` lacks, written to ``file`` after each one; ``on_failure`` is told of those that failed."""
    waiting = [case for case in cases(scope, Runner(device=scope.device)) if not before.has(case)]
    measured, failed = before, list[tuple[Case, str]]()
    for number, case in enumerate(waiting, start=1):
        if on_case is not None:
            on_case(number, len(waiting), f"{case.family} {case.case}")
        try:
            taken = case.measure()
        except (RuntimeError, ValueError, MemoryError, AttributeError, TypeError) as error:
            # A kernel that this version or card lacks costs its own family only; when nothing works any more, stop.
            failed.append((case, str(error).splitlines()[0]))
            if len(failed) > _MOST_FAILURES:
                raise ValueError(
                    f"{case.family} {case.case}: {failed[-1][1]} (after {_MOST_FAILURES} others)"
                ) from error
            continue
        measured = replace(measured, measurements=(*measured.measurements, *taken))
        if file is not None:
            save_measured(file, measured)
    if on_failure is not None:
        for case, reason in failed:
            on_failure(f"{case.family} {case.case}: {reason}")
    return measured


def begin(device: torch.device, file: Path | None) -> Measured:
    """What ``file`` holds already, or nothing yet.

    Raises ValueError for measurements of another machine.
    """
    if file is not None and file.exists():
        measured = load_measured(file)
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        if (here or measured.fingerprint.cpu) != measured.fingerprint.device or (
            here is None and not is_cpu(measured.machine)
        ):
            raise ValueError(
                f"{file}: measured on {measured.fingerprint.device}, this is another device: name another file by -o"
            )
        return measured
    machine = machine_at(device)
    return Measured(fingerprint=fingerprint_of(device, machine), machine=machine)


def save_measured(file: Path, measured: Measured) -> None:
    """One measurement a line: readable, and small differences between two runs stand out."""
    head = {"schema_version": SCHEMA_VERSION, **to_plain(replace(measured, measurements=()))}
    lines = ",\n".join(json.dumps(_plain(one), allow_nan=False) for one in measured.measurements)
    text = json.dumps({name: value for name, value in head.items() if name != "measurements"}, indent=1)
    write_atomically(file, f'{text[:-2]},\n "measurements": [\n{lines}\n ]\n}}\n')


def load_measured(file: Path) -> Measured:
    """What ``save_measured`` wrote.

    Raises ValueError for another schema version or a value that does not fit.
    """
    data = read_json_object(file)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"{file}: schema_version={version!r}, must be {SCHEMA_VERSION}: measure again")
    return from_plain(Measured, data, str(file))


def _plain(one: Measurement) -> dict[str, Any]:
    """Seven digits are more than any clock gives."""
    plain = to_plain(one)
    return {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in plain.items()}
