"""Raw measurements as a file, beside the profile that was fitted to them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.access import AccessProfile
from sim.codec import from_plain, to_plain
from sim.files import read_json_object, readable_json, write_atomically
from sim.profile import Fingerprint, Measurement
from sim.spec import MachineSpec

SCHEMA_VERSION = 2
_DIGITS = {"seconds": 5, "low_s": 4, "high_s": 4, "launch_s": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Raw measurements of one machine; ``access`` of a checkpoint, ``random_access`` of random weights, by selector."""

    fingerprint: Fingerprint
    machine: MachineSpec
    access: tuple[AccessProfile, ...] = ()
    random_access: tuple[AccessProfile, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    def has(self, family: str, case: str) -> bool:
        return any((one.family, one.case) == (family, case) for one in self.measurements)


def save_measured(file: Path, measured: Measured) -> None:
    """One measurement a line, and one access profile."""
    plain = {"schema_version": SCHEMA_VERSION, **to_plain(replace(measured, measurements=()))}
    plain["measurements"] = [_plain(one) for one in measured.measurements]
    write_atomically(file, readable_json(plain) + "\n")


def load_measured(file: Path) -> Measured:
    """What ``save_measured`` wrote.

    Raises ValueError for another schema version or a value that does not fit.
    """
    data = read_json_object(file)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"{file}: schema_version={version!r}, must be {SCHEMA_VERSION}: measure again")
    return from_plain(Measured, data, str(file))


def measurements_file(profile: Path) -> Path:
    """Beside the profile."""
    return profile.with_suffix(".measurements.json")


def _plain(one: Measurement) -> dict[str, Any]:
    """Five digits of a time are more than any clock gives; what was not looked at, and is 0, is left out."""
    told = {name: value for name, value in to_plain(one).items() if value != 0}
    return {
        name: float(f"{value:.{_DIGITS.get(name, 7)}g}") if isinstance(value, float) else value
        for name, value in told.items()
    }
