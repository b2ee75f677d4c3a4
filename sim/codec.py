"""Nouns to plain JSON values and back, exactly; a value that does not fit is refused with its place in the document.

Many named tuples of one kind are written as columns, an object of arrays: names once, and checked a column at a time.
"""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from math import isfinite
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

IF_KNOWN = {"if_known": True}  # metadata of a field added later: where it is None, what is written is as it was before


def to_plain(value: Any) -> Any:
    """Dataclasses become objects, enums their values, tuples arrays."""
    if is_dataclass(value) and not isinstance(value, type):
        named = ((member, getattr(value, member.name)) for member in fields(value))
        return {one.name: to_plain(held) for one, held in named if held is not None or "if_known" not in one.metadata}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, (tuple, list)):
        return _columns(value) if value and hasattr(value[0], "_fields") else [to_plain(item) for item in value]
    return value


def _columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Named tuples, one array a field."""
    return {
        name: [cell.value if isinstance(cell, StrEnum) else cell for cell in column]
        for name, column in zip(rows[0]._fields, zip(*rows, strict=True), strict=True)
    }


def from_plain(kind: type[T], data: object, where: str) -> T:
    """Build a ``kind`` from what ``to_plain`` gave; ``where`` names the place in errors.

    Raises ValueError for a missing or unknown key, or a value of another type.
    """
    built: T = _build(kind, data, where)
    return built


def _build(kind: Any, data: Any, where: str) -> Any:
    if isinstance(kind, UnionType):
        return (
            None if data is None else _build(next(arm for arm in get_args(kind) if arm is not type(None)), data, where)
        )
    if get_origin(kind) is tuple:
        return _build_tuple(get_args(kind), data, where)
    if is_dataclass(kind):
        return _build_dataclass(kind, data, where)
    if issubclass(kind, StrEnum):
        if data not in list(kind):
            raise ValueError(f"{where}={data!r}, must be one of {', '.join(kind)}")
        return kind(data)
    return _build_scalar(kind, data, where)


def _build_scalar(kind: type, data: Any, where: str) -> Any:
    allowed = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}[kind]
    if not isinstance(data, allowed) or (isinstance(data, bool) and kind is not bool):
        raise ValueError(f"{where}={_brief(data)}, must be a {kind.__name__}")
    if kind is float and not isfinite(float(data)):
        raise ValueError(f"{where}={data}, must be finite")
    return float(data) if kind is float else data


def _build_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if hasattr(kinds[0], "_fields") and isinstance(data, dict):
        return _build_rows(kinds[0], data, where)
    if not isinstance(data, list):
        raise ValueError(f"{where}={_brief(data)}, must be an array")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(kinds) != len(data):
        raise ValueError(f"{where}, {len(data)} entries, must have {len(kinds)}")
    return tuple(
        _build(kind, item, f"{where}[{place}]") for place, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _build_rows(kind: Any, data: dict[str, Any], where: str) -> tuple[Any, ...]:
    """Named tuples from their columns."""
    if set(data) != set(kind._fields):
        raise ValueError(f"{where}, columns {', '.join(data) or 'none'}, must be {', '.join(kind._fields)}")
    hints = _hints(kind)
    columns = [_build_column(hints[name], data[name], f"{where}.{name}") for name in kind._fields]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(
            f"{where}, columns of {', '.join(str(len(column)) for column in columns)} rows, must be as long"
        )
    return tuple(map(kind._make, zip(*columns, strict=True)))


def _build_column(kind: Any, data: Any, where: str) -> list[Any]:
    """Each distinct value is built once, and floats not at all: a column may have a hundred thousand cells."""
    if not isinstance(data, list):
        raise ValueError(f"{where}={_brief(data)}, must be an array")
    if kind is float and set(map(type, data)) == {float} and all(map(isfinite, data)):
        return data
    try:
        built = {(type(cell), cell): cell for cell in data}
    except TypeError:
        raise ValueError(f"{where}, must be an array of plain values") from None
    built = {key: _build(kind, cell, where) for key, cell in built.items()}
    return [built[type(cell), cell] for cell in data]


def _build_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}={_brief(data)}, must be an object")
    known = fields(kind)
    unknown = sorted(set(data) - {member.name for member in known})
    if unknown:
        raise ValueError(
            f"{where}.{unknown[0]}, unknown key, must be one of {', '.join(member.name for member in known)}"
        )
    missing = [member.name for member in known if member.name not in data and not _has_default(member)]
    if missing:
        raise ValueError(f"{where}.{missing[0]}, missing key")
    hints = _hints(kind)
    return kind(**{name: _build(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _has_default(member: "Field[Any]") -> bool:
    return member.default is not MISSING or member.default_factory is not MISSING


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _brief(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}..."
