"""One self-contained HTML document: sections of prose and charts, plotly and the page's own script inlined.

A policy in the head forbids every request and every script but those two, so that nothing from a file can run.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from reports.chart import Chart
from reports.html import paragraph, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A question and its answer: one plain sentence, then markup and charts in order."""

    name: str
    title: str
    says: str
    parts: tuple[str | Chart, ...]


def document(
    title: str, subtitle: str, sections: Sequence[Section], *, timeline: Mapping[str, Any] | None = None
) -> str:
    """The whole file."""
    charts = [part for section in sections for part in section.parts if isinstance(part, Chart)]
    data = {
        "figures": {chart.name: _drawing(chart.figure) for chart in charts},
        "tables": {chart.name: {"headings": chart.table.headings, "columns": chart.table.columns} for chart in charts},
        "timeline": timeline,
    }
    scripts = (plotly_js(), _asset("page.js"), *((_asset("timeline.js"),) if timeline else ()))
    links = "".join(f'<li><a href="#{section.name}">{text(section.title)}</a></li>' for section in sections)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<style>{_asset('page.css')}</style></head>",
            '<body><a class="skip" href="#content">Skip to the content</a>',
            f"<header><h1>{text(title)}</h1>{paragraph(subtitle)}",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
            f'<main id="content">{"".join(map(_section, sections))}</main>',
            "<noscript><p>The figures need JavaScript; the text and the tables do not.</p></noscript>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>",
            "",
        ]
    )


@cache
def plotly_js() -> str:
    """The library as it came with the installed package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _section(section: Section) -> str:
    body = "".join(_chart(part) if isinstance(part, Chart) else part for part in section.parts)
    return (
        f'<section id="{section.name}" aria-labelledby="{section.name}-title">'
        f'<h2 id="{section.name}-title">{text(section.title)}</h2>{paragraph(section.says, "says")}{body}</section>'
    )


def _chart(chart: Chart) -> str:
    key = "".join(f'<li><i style="background:{colour}"></i>{text(name)}</li>' for name, colour in chart.key)
    height = chart.figure.layout.height
    return (
        f'<figure id="{chart.name}"><figcaption>{text(chart.about)}</figcaption>'
        f"{f'<ul class=key>{key}</ul>' if key else ''}"
        f'<div class="plot" data-figure="{chart.name}" style="height:{height}px" tabindex="0" role="group" '
        f'aria-label="{text(chart.about)}. Arrow keys move, plus and minus zoom, 0 shows all."></div>'
        f'<button type="button" class="csv" data-table="{chart.name}">Save these numbers (CSV)</button></figure>'
    )


def _drawing(figure: Any) -> dict[str, Any]:
    drawing = figure.to_plotly_json()
    drawing["layout"].pop("template", None)
    return {"data": drawing["data"], "layout": drawing["layout"]}


def _json(data: Any) -> str:
    """No ``<`` is left that could end the script element."""
    from plotly.utils import PlotlyJSONEncoder

    whole = json.dumps(data, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return whole.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _policy(scripts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def _asset(name: str) -> str:
    return (files("reports.assets") / name).read_text(encoding="utf-8")
