"""Text to markup. Whatever comes from a file passes ``text``; tables and lists are built here and nowhere else."""

from collections.abc import Iterable, Sequence
from html import escape


def text(value: object) -> str:
    """As the reader shall see it, whatever it holds."""
    return escape(str(value), quote=True)


def paragraph(words: str, kind: str = "") -> str:
    """``kind`` is its class in the style sheet."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list; nothing at all where it is empty."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in rows)}</dl>"


def figures(rows: Iterable[tuple[str, str]]) -> str:
    """The few numbers that matter, large."""
    cards = "".join(f"<li><strong>{text(value)}</strong><span>{text(name)}</span></li>" for name, value in rows)
    return f'<ul class="figures">{cards}</ul>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str, left: Sequence[int] = (0,)) -> str:
    """A table that scrolls by itself where it is wider than the page; the columns in ``left`` are words."""
    kinds = ["words" if place in left else "number" for place in range(len(headings))]
    head = "".join(
        f'<th scope="col" class="{kind}">{text(one)}</th>' for one, kind in zip(headings, kinds, strict=True)
    )
    body = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in rows)
    return (
        f'<p class="caption">{text(caption)}</p><div class="wide" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def subheading(words: str) -> str:
    """Within a section."""
    return f"<h3>{text(words)}</h3>"


def _cells(row: Sequence[str], kinds: Sequence[str]) -> str:
    return "".join(f'<td class="{kind}">{text(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))


def code(lines: Iterable[str]) -> str:
    """Commands, one a line, as they are typed."""
    return f"<pre><code>{text(chr(10).join(lines))}</code></pre>"
