"""Profiles as files: whole, of this version, unaltered and of the machine that is asked about, or refused in one line."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sim.codec import from_plain, to_plain
from sim.files import read_json_object, readable_json, write_atomically
from sim.profile import Profile
from sim.spec import MachineSpec

PROFILE_SCHEMA_VERSION = 11
SHIPPED = Path(__file__).parent.parent / "calibration" / "profiles"  # <gpu>.json, measured on that card
_AGAIN = "run `planner calibrate -o FILE` on the machine"


def content_hash(profile: Profile) -> str:
    """Of all that a profile says; a campaign names the profile that it tests by it."""
    as_read = from_plain(Profile, to_plain(profile), "profile")  # where a whole number may stand for a float
    text = json.dumps(to_plain(as_read), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def save_profile(path: Path, profile: Profile) -> None:
    """Write a profile so that ``load_profile`` gives it back."""
    head = {"schema_version": PROFILE_SCHEMA_VERSION, "content_hash": content_hash(profile)}
    write_atomically(path, readable_json({**head, **to_plain(profile)}) + "\n")


def load_profile(path: Path) -> Profile:
    """Read what ``save_profile`` wrote.

    Raises ValueError for another schema version, a value that does not fit, and a file that was altered.
    """
    data = read_json_object(path)
    version = data.pop("schema_version", None)
    if version != PROFILE_SCHEMA_VERSION:
        age = "an older profile" if isinstance(version, int) and version < PROFILE_SCHEMA_VERSION else "no profile"
        raise ValueError(f"{path}: schema_version={version!r}, {age}, must be {PROFILE_SCHEMA_VERSION}: {_AGAIN}")
    said = data.pop("content_hash", None)
    profile = _profile(path, data)
    if said != content_hash(profile):
        raise ValueError(f"{path}: altered since it was written (its content_hash differs): {_AGAIN}")
    return profile


def profile_for(machine: MachineSpec, path: Path | None = None) -> Profile:
    """The profile in ``path``; without one that of the card, if one is shipped; else the nominal one.

    Raises ValueError for a profile of another card.
    """
    file = path or shipped_file(machine.gpu.name)
    if file is None:
        return Profile.nominal(machine)
    profile = load_profile(file)
    measured_on = profile.evidence.fingerprint.gpu if profile.evidence else machine.gpu.name
    if measured_on != machine.gpu.name:
        raise ValueError(
            f"{file}: measured on {measured_on}, the machine asked about is {machine.gpu.name}: give another profile, or "
            f"ask about {measured_on}"
        )
    return profile


def shipped_file(gpu: str) -> Path | None:
    """Where the measured profile of a card lies, if there is one."""
    file = SHIPPED / f"{gpu}.json"
    return file if gpu.isprintable() and os.sep not in gpu and os.path.isfile(file) else None


def _profile(path: Path, data: dict[str, Any]) -> Profile:
    try:
        return from_plain(Profile, data, str(path))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
