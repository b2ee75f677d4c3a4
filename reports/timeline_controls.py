"""The timeline's place in the page: buttons and fields that need no mouse, the picture, and what of it is in view."""

from reports.html import text
from reports.look import SPAN_COLOURS
from reports.study import Study
from reports.timeline import kind_of

_WORDS = {"gpu": "first step in HBM", "gpu_cpu": "host memory begins", "recompute": "recomputation begins"}
_KEYS = (("-", "Zoom out"), ("+", "Zoom in"), ("ArrowLeft", "Earlier"), ("ArrowRight", "Later"))


def controls(study: Study, drawn: tuple[int, int]) -> str:
    """Markup that the page's script brings to life."""
    first, last = drawn
    jumps = [("All", first, last), *([("Prefill", 0, 0)] if first == 0 else [])]
    phases = {max(1, phase.first_step): _WORDS[phase.name] for phase in study.plan.phases}
    jumps += [(words, step, step) for step, words in phases.items() if first <= step <= last]
    buttons = "".join(f'<button type="button" data-steps="[{a},{b}]">{text(name)}</button>' for name, a, b in jumps)
    keys = "".join(f'<button type="button" data-key="{key}">{name}</button>' for key, name in _KEYS)
    span = f'type="number" min="{first}" max="{last}" value="{first}" required'
    return (
        f'<figure id="timeline-figure"><figcaption>GPU stream and copy engines</figcaption>'
        f'<form id="timeline-show" class="tools"><label>Steps <input id="timeline-first" {span}></label>'
        f'<label>to <input id="timeline-last" {span}></label><button>Show</button></form>'
        f'<div class="tools">{buttons}{keys}</div><ul class="key">{_key(study)}</ul>'
        '<div class="plot" id="timeline" tabindex="0" role="group" style="min-height:280px" '
        'aria-label="Timeline. Arrow keys move, plus and minus zoom, 0 shows all."></div>'
        '<p class="inview" id="timeline-view" aria-live="polite"></p>'
        '<button type="button" class="csv" id="timeline-csv">Save these numbers (CSV)</button></figure>'
    )


def _key(study: Study) -> str:
    """The colours that occur, in the order of the palette."""
    waves = [wave for run in (study.simulated, *study.measured) for wave in run.trace.waves]
    kinds = {kind_of(span) for wave in waves for span in wave.spans if span.end_s > span.start_s}
    return "".join(
        f'<li><i style="background:{colour}"></i>{text(kind)}</li>'
        for kind, colour in SPAN_COLOURS.items()
        if kind in kinds
    )
