"""Files that are whole or absent: written beside and renamed, read with errors of one line."""

import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from sim.codec import from_plain, to_plain
from sim.homes import TokenHomes
from sim.outputs import require_place
from sim.plan import Plan, Setting
from sim.trace import Trace

SCHEMA_VERSION = 1


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; a file that was there stays as it was until the new one is complete.

    Raises ValueError if the folder is missing or cannot be written to.
    """
    require_place(path)
    place = Path(os.path.realpath(path))  # what a link leads to is written anew, not the link
    try:
        handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError as error:
        raise ValueError(f"{path}, cannot be written ({error.strerror}): choose another folder") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, place)
    except BaseException as error:
        os.unlink(beside)
        if not isinstance(error, OSError):
            raise
        raise ValueError(f"{path}, cannot be written ({error.strerror}): choose another place") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises ValueError if there is no such file, or no JSON object in it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ValueError(f"{path}, does not exist: give the path of a JSON file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}, is a folder: name a JSON file in it") from None
    except OSError as error:
        raise ValueError(f"{path}, cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}, is not JSON text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, is not complete JSON (line {error.lineno}: {error.msg}): write it anew") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}, holds a {type(data).__name__}, must be a JSON object")
    return data


def readable_json(value: Any, depth: int = 0) -> str:
    """A member a line, and of its lists an entry a line, or their numbers together: small differences stand out."""
    if isinstance(value, dict) and value:
        members = (
            f"{' ' * (depth + 1)}{json.dumps(name)}: {readable_json(one, depth + 1)}" for name, one in value.items()
        )
        return "{\n" + ",\n".join(members) + f"\n{' ' * depth}}}"
    entries = value if isinstance(value, list) and any(isinstance(one, (dict, list)) for one in value) else []
    lines = ",".join(f"\n{_compact(entry)}" for entry in entries)
    return f"[{lines}\n]" if lines else _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain values. The phases stand there for readers; they follow from the homes."""
    return {
        "schema_version": SCHEMA_VERSION,
        **to_plain(plan.setting),
        "phases": to_plain(plan.phases),
        "homes": to_plain(plan.homes),
    }


def plan_from_json(data: dict[str, Any], where: str) -> Plan:
    """The plan in ``data``; keys that an answer adds to its plan are passed over.

    Raises ValueError for another schema version, a missing key or a value that does not fit.
    """
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{where}: schema_version={version!r}, must be {SCHEMA_VERSION}: solve again with this version"
        )
    own = {name: data[name] for name in Setting.__dataclass_fields__ if name in data}
    if "homes" not in data:
        raise ValueError(f"{where}: homes, missing key")
    return Plan(setting=from_plain(Setting, own, where), homes=from_plain(TokenHomes, data["homes"], f"{where}.homes"))


def load_plan(path: Path) -> Plan:
    """Read the plan that ``planner solve -o`` wrote."""
    return plan_from_json(read_json_object(path), str(path))


def save_trace(path: Path, trace: Trace) -> None:
    """Write a run, simulated or measured, so that ``load_trace`` gives it back exactly."""
    write_atomically(path, trace_text(trace))


def trace_text(trace: Trace) -> str:
    """A run as one JSON document without spaces: there may be a hundred thousand spans."""
    whole = {"schema_version": SCHEMA_VERSION, **to_plain(trace)}
    return _compact(whole) + "\n"


def load_trace(path: Path) -> Trace:
    """Read what ``save_trace`` wrote.

    Raises ValueError for another schema version, a missing key, a value that does not fit or a run that never ends.
    """
    data = read_json_object(path)
    if data.get("schema_version") != SCHEMA_VERSION or "waves" not in data:
        raise ValueError(
            f"{path}: no trace of schema version {SCHEMA_VERSION}: write one by `planner simulate --save-trace`"
        )
    trace = from_plain(Trace, {name: value for name, value in data.items() if name != "schema_version"}, str(path))
    _require_a_run(trace, path)
    return trace


def _require_a_run(trace: Trace, path: Path) -> None:
    if not trace.waves:
        raise ValueError(f"{path}: waves, must have at least one")
    for number, wave in enumerate(trace.waves):
        ends = wave.step_end_s
        if not ends or ends[0] <= 0 or any(end < before for before, end in pairwise(ends)):
            raise ValueError(f"{path}: waves[{number}].step_end_s, must ascend from above 0, one entry a step")
        if any(span.end_s < span.start_s for span in wave.spans):
            raise ValueError(f"{path}: waves[{number}].spans, one ends before it starts")
        if any(not 0 <= one.first_step <= one.last_step < len(ends) for one in wave.served):
            raise ValueError(f"{path}: waves[{number}].served, names a step that there is not")


def _refuse_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is not a number", name, 0)
