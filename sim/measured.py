"""Raw measurements as a file, beside the profile that was fitted to them."""

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from pathlib import Path
from typing import Any

from sim.access import AccessProfile
from sim.codec import from_plain, to_plain
from sim.files import read_json_object, readable_json, write_atomically
from sim.profile import Fingerprint, Measurement
from sim.spec import MachineSpec

SCHEMA_VERSION = 2
_KEPT = {
    "seconds": (5, ROUND_HALF_EVEN),
    "low_s": (4, ROUND_FLOOR),
    "high_s": (4, ROUND_CEILING),
    "size_bytes": (7, ROUND_HALF_EVEN),
    "flops": (7, ROUND_HALF_EVEN),
    "launch_s": (4, ROUND_HALF_EVEN),
}


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


def told(one: Measurement) -> Measurement:
    """``one`` as it is kept: five digits of a time are more than any clock gives. Its bounds, of four, are rounded outwards."""
    short = {
        name: float(Context(prec=digits, rounding=rounding).create_decimal(repr(getattr(one, name))))
        for name, (digits, rounding) in _KEPT.items()
    }
    return replace(one, **short)  # type: ignore[arg-type]


def _plain(one: Measurement) -> dict[str, Any]:
    """What was not looked at, and is 0, is left out."""
    return {name: value for name, value in to_plain(one).items() if value != 0}
