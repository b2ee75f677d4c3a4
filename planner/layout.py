"""How answers are laid out for people: sections with titles, tables without frames."""

from collections.abc import Container, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def percent(share: float, digits: int = 0) -> str:
    """``80 %``."""
    return f"{100 * share:.{digits}f} %"


def sections(*parts: tuple[str, Sequence[RenderableType]]) -> Group:
    """Each with a title, or "" for none, and a blank line between two."""
    lines: list[RenderableType] = []
    for title, body in parts:
        lines += [Text("")] if lines else []
        lines += [Text(title, style="bold")] if title else []
        lines += body
    return Group(*lines)


def grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: Container[int] = (0,)) -> Table:
    """Numbers to the right, the columns numbered in ``left`` to the left; only those may be wrapped."""
    laid_out = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for number, heading in enumerate(headings):
        is_text = number in left
        laid_out.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in rows:
        laid_out.add_row(*map(Text, row))
    return laid_out
