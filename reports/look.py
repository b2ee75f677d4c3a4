"""How figures look: colours that colour-blind readers tell apart, on light and dark ground, and what all layouts share."""

from typing import Any

import numpy as np

from sim import breakdown

# Okabe and Ito's palette, two of its tones moved so that each keeps a contrast of 2.5 to white and to near-black.
BLUE, ORANGE, GREEN, VERMILION, PINK = "#2b7bba", "#e08e0b", "#0f9d76", "#d55e00", "#c568a0"
SKY, GREY, YELLOW, BROWN, VIOLET = "#4ba3d9", "#8a8f98", "#b8a000", "#8c6239", "#7a6bc4"
OLIVE, SLATE = "#6f8f2f", "#64748b"

WORK_COLOURS = {
    "matrix products": BLUE,
    "attention": ORANGE,
    "selection": GREEN,
    "quantisation": PINK,
    "recomputation": VIOLET,
    "unfused passes": OLIVE,
    "kernel launches": GREY,
    "SMs lent to transfers": BROWN,
    breakdown.OUTPUT_LAYER: SKY,
    breakdown.CPU_WAIT: BROWN,
    breakdown.FETCH_WAIT: VERMILION,
    breakdown.WRITE_WAIT: YELLOW,
    breakdown.LAUNCH_WAIT: SLATE,
}
SPAN_COLOURS = {
    **{kind: WORK_COLOURS[kind] for kind in (*breakdown.GPU_WORK, breakdown.OUTPUT_LAYER)},
    "a layer": BLUE,
    "fetch": VERMILION,
    "write-back": YELLOW,
    "attention on the CPU": BROWN,
    "launches by the host": SLATE,
    "other": GREY,
}
HOME_COLOURS = {"HBM": BLUE, "host memory": ORANGE, "layer inputs": GREEN, "dropped": GREY}
SERIES = (BLUE, VERMILION, GREEN, PINK, ORANGE, VIOLET, SKY, BROWN)
# Light to dark is few to many: read without its colours as well.
SCALE = [[0.0, "#e8f1f8"], [0.35, "#7fb8de"], [0.7, "#2b7bba"], [1.0, "#0b3c66"]]


def plain(text: object) -> str:
    """Text as plotly shows it literally: it reads some tags, entities and %{...} as its own markup."""
    kept = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return kept.replace("%{", "%&#123;")


def distance(ratio: float) -> str:
    """How far from 1: ``+3.4 %``, or ``x 85`` where a percentage would not be read."""
    return f"{100 * (ratio - 1):+.1f} %" if 0.5 <= ratio <= 2 else f"x {ratio:.3g}"


def share(error: float) -> str:
    """An error's size, to two digits or the whole percent."""
    return f"{100 * error:.0f} %" if error >= 0.1 else f"{100 * error:.1f} %"


def one_two_five(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis; fewer where it spans decades."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if high < 100 * low else (1,)
    return [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on ``colour``."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#101418" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def base_layout(height_px: int) -> dict[str, Any]:
    """What every figure shares. Colours of text and grid follow the reader's scheme and are set by the page."""
    return {
        "height": height_px,
        "margin": {"l": 8, "r": 12, "t": 24, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 13, "family": "system-ui, sans-serif"},
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {"align": "left"},
        "dragmode": "zoom",
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis that names its unit and makes room for its labels."""
    return {
        "title": {"text": title, "standoff": 8},
        "automargin": True,
        "zeroline": False,
        "separatethousands": True,
    } | more
