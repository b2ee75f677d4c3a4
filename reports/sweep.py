"""What a sweep's page is made of: points of a grid as plain rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]

FIELD_WORDS = {
    "gpu": "GPU",
    "hbm_gib": "HBM (GiB)",
    "host_gib": "host memory (GiB)",
    "link_gb_s": "link (GB/s)",
    "kv_budget_gib": "KV budget (GiB)",
    "prompt": "prompt tokens",
    "output": "output tokens",
    "kv_formats": "KV formats",
    "max_tpot_ms": "longest TPOT (ms)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """``rows`` have the ``fields`` that were varied and the figures of the plan found, None in all where none fits.

    Figures that are used: tokens_per_s, tpot_s, ttft_s, peak_hbm_bytes, and, where present, kv_budget_bytes, plan,
    is_lossless and reason.
    """

    title: str
    question: str
    fields: tuple[str, ...]
    rows: tuple[Row, ...]
    commands: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.rows or not self.fields:
            raise ValueError("sweep, must have at least one varied field and one row")
        for name in (*self.fields, "tokens_per_s"):
            if any(name not in row for row in self.rows):
                raise ValueError(f"sweep.rows, one lacks {name!r}")

    @property
    def feasible(self) -> list[Row]:
        return [row for row in self.rows if row["tokens_per_s"] is not None]

    def values(self, field: str) -> list[Any]:
        """The values of ``field``: numbers ascending, words in the order of their first row."""
        found = list(dict.fromkeys(row[field] for row in self.rows))
        return sorted(found, key=as_number) if all(is_number(value) for value in found) else found

    @property
    def varied(self) -> list[str]:
        """Fields that take more than one value."""
        return [name for name in self.fields if len(self.values(name)) > 1]


def is_number(value: Any) -> bool:
    """Numbers may be typed as text: options of a command line are."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def as_number(value: Any) -> float:
    """What ``is_number`` has let pass."""
    return float(value)


def field_words(name: str) -> str:
    """A field as people call it, its unit behind it."""
    return FIELD_WORDS.get(name, name.replace("_", " "))


def point_name(row: Row, fields: Sequence[str]) -> str:
    """``batch 16, gpu l40s``."""
    return ", ".join(f"{field_words(name)} {row[name]}" for name in fields)
