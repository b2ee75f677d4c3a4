"""A figure as the page shows it: plotly's picture, its key, and the numbers behind it as a table that can be saved."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Steps: TypeAlias = NDArray[np.integer[Any]]

MOST_POINTS = 1500  # of a line; a screen shows fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns of equal length under headings that name their units."""

    headings: tuple[str, ...]
    columns: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        if len(self.headings) != len(self.columns) or len({len(column) for column in self.columns}) > 1:
            raise ValueError(f"table {self.headings}, needs one column of the same length for each heading")

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        return list(zip(*self.columns, strict=True))

    @classmethod
    def of(cls, columns: Mapping[str, Iterable[Any]]) -> "Table":
        """From columns by heading; numpy's numbers become plain ones."""
        plain = (column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values())
        return cls(headings=tuple(columns), columns=tuple(map(tuple, plain)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``figure`` is a plotly figure, ``key`` its colours by name, in the order of the picture; ``name`` is its id."""

    name: str
    figure: Any
    key: tuple[tuple[str, str], ...]
    table: Table
    about: str


def thinned(steps: int, keep: Sequence[int] = ()) -> Steps:
    """Numbers of the steps that a line is drawn through: all of them, or as many as a screen can show and ``keep``."""
    if steps <= MOST_POINTS:
        return np.arange(steps)
    spread = np.linspace(0, steps - 1, MOST_POINTS).round().astype(int)
    near = [step + beside for step in keep for beside in (-1, 0) if 0 <= step + beside < steps]
    return np.unique(np.concatenate([spread, np.array(near, dtype=int)]))
