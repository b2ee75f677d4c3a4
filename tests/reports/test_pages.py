"""Real pages in a real browser: drawn, quiet, within the window, alive under mouse and keys, and safe."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chromium import Browser
from reports import Run, plan_page, sweep_page
from reports.look import SPAN_COLOURS
from reports.timeline import LANES
from studies import (
    as_if_measured,
    large,
    make_answer,
    make_rivals,
    make_study,
    make_sweep,
    measured_study,
    three_phases,
)

PageFile = Callable[[str], Path]
LOOKS = [(width, scheme) for width in (400, 1280) for scheme in ("light", "dark")]
NASTY = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1"> %{x} &amp; <b>bold</b> ${1}'
PLOTS = "[...document.querySelectorAll('.plot')]"
DRAWN = """
return [...document.querySelectorAll('.plot')].map((plot) => ({
  name: plot.dataset.figure ?? plot.id,
  marks: [...plot.querySelectorAll('.plot .trace path, .plot .fills path, .heatmaplayer image')]
    .filter((mark) => mark.tagName === 'image' || (mark.getAttribute('d') ?? '').length > 8).length,
  width: plot.getBoundingClientRect().width,
  titles: [...plot.querySelectorAll('.xtitle')].map((title) => title.textContent),
  inside: [...plot.querySelectorAll('.xtitle, .ytitle, .xtick text, .ytick text')].every((text) => {
    const box = text.getBoundingClientRect(), frame = plot.getBoundingClientRect();
    return box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
  }),
}))"""


@pytest.mark.parametrize("name", ["plan", "everything", "evidence", "continuous", "large", "sweep"])
def test_every_figure_is_drawn_quietly_within_the_window(window: Browser, page_file: PageFile, name: str) -> None:
    window.open(page_file(name))
    for width, scheme in LOOKS:
        window.look(width=width, scheme=scheme)
        assert window.until("document.querySelector('.plot').clientWidth <= innerWidth")
        assert window.until(f"{PLOTS}.every((plot) => plot._fullLayout.width <= plot.clientWidth + 1)")
        drawn = window.run(DRAWN)

        assert len(drawn) >= 4
        assert [one for one in drawn if not one["marks"] or one["width"] < 300 or not one["inside"]] == []
        assert all(title for one in drawn for title in one["titles"])
        assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.messages() == []
    assert window.requests() == []


def test_both_colour_schemes_are_followed(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("plan"), scheme="dark")
    inks = {}
    for scheme in ("dark", "light"):
        window.look(width=1280, scheme=scheme)
        ground = window.run("return getComputedStyle(document.body).backgroundColor")
        dark_text = "rgb(213, 219, 225)" if scheme == "dark" else "rgb(42, 48, 56)"
        assert window.until(
            f"{PLOTS}.every((p) => getComputedStyle(p.querySelector('.xtick text')).fill === '{dark_text}')"
        )
        inks[scheme] = ground

    assert inks == {"dark": "rgb(20, 24, 29)", "light": "rgb(255, 255, 255)"}


def middle(window: Browser, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
    """A point of a figure's drawing area in the window, scrolled to."""
    script = """
    const plot = document.querySelector(arguments[0]);
    plot.scrollIntoView({block: 'center', behavior: 'instant'});
    const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
    return [box.left + arguments[1] * box.width, box.top + arguments[2] * box.height];"""
    x, y = window.run(script, selector, across, down)
    return x, y


def test_pointing_at_a_figure_tells_its_values(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("plan"))
    window.point_at(*middle(window, "[data-figure=step-times]"))

    assert window.until("document.querySelector('[data-figure=step-times] .hoverlayer').textContent.includes(' ms')")


def test_dragging_zooms_and_a_double_click_shows_all(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("plan"))
    selector = "[data-figure=step-times]"
    axis = f"document.querySelector('{selector}')._fullLayout.xaxis.range"
    whole = window.run(f"return {axis}")
    window.drag(middle(window, selector, 0.3), middle(window, selector, 0.6))

    assert window.until(f"{axis}[1] - {axis}[0] < {0.5 * (whole[1] - whole[0])}")
    window.run(f"document.querySelector('{selector}').focus()")
    press(window, selector, "0")
    assert window.until(f"Math.abs({axis}[1] - {whole[1]}) < 1e-6")


def press(window: Browser, selector: str, keys: str) -> None:
    window.driver.find_element("css selector", selector).send_keys(keys)


def test_keys_zoom_and_move_every_plot_that_has_focus(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("plan"))
    for selector in ("[data-figure=token-homes]", "#timeline"):
        axis = f"document.querySelector('{selector}')._fullLayout.xaxis.range.map(Number)"
        low, high = window.run(f"return {axis}")
        press(window, selector, "+")
        assert window.until(f"Math.abs({axis}[1] - {axis}[0] - {(high - low) / 2}) < 1e-6")
        press(window, selector, "\ue014")  # arrow right
        assert window.until(f"Math.abs({axis}[0] - {low + 0.25 * (high - low) + 0.1 * (high - low)}) < 1e-6")


def test_a_reader_without_a_mouse_reaches_everything(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("everything"))
    reached = "[...document.querySelectorAll('a, button, input, [tabindex=\"0\"]')]"
    first, *others = window.run(f"return {reached}.map((one) => one.className || one.id || one.tagName)")

    assert first == "skip"
    assert {"plot", "csv", "timeline-first", "wide"} <= {name.split()[0] for name in others}
    named = "(one) => one.textContent || one.ariaLabel || one.labels?.length"
    assert window.run(f"return [...document.querySelectorAll('button, input, [role]:not(.modebar)')].every({named})")


def test_the_numbers_of_each_figure_can_be_saved(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("everything"))
    names = window.run("return [...document.querySelectorAll('.csv[data-table]')].map((one) => one.dataset.table)")
    texts = {name: window.run("return kvplan.csv(arguments[0])", name) for name in names}

    assert len(names) == window.run("return document.querySelectorAll('.plot[data-figure]').length")
    assert all(len(text.splitlines()) > 1 and "," in text for text in texts.values())
    lines = texts["token-homes"].splitlines()
    homes = ("HBM", "host memory", "layer inputs", "dropped", "copies in HBM")
    assert lines[0] == "step," + ",".join(f'"{home}, tokens"' for home in homes)
    assert lines[1] == "0,6,0,0,0,0"
    assert window.run("return kvplan.line(['=1+1', 'a,b', 'x\"y', null, 2.5])") == '\'=1+1,"a,b","x""y",,2.5'


def test_the_page_prints(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("plan"), scheme="dark")
    paper = window.pdf()

    assert paper.startswith(b"%PDF")
    assert len(paper) > 20_000


# The timeline


def shown_spans(window: Browser) -> list[dict[str, Any]]:
    lines = window.run("return kvplan.timeline.allAsCsv()").splitlines()
    headings = ["run", "stream", "name", "step", "layer", "start_s", "end_s", "bytes"]
    return [dict(zip(headings, line.split(","), strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("name", ["three phases", "large"])
def test_the_timeline_holds_the_spans_of_the_trace(window: Browser, tmp_path: Path, name: str) -> None:
    study = make_study(three_phases() if name == "three phases" else large(), drawn_steps=(0, 20))
    file = tmp_path / "page.html"
    file.write_text(plan_page(study))
    window.open(file)
    spans = [span for span in study.simulated.trace.waves[0].spans if span.step <= 20 and span.end_s > span.start_s]
    spans.sort(key=lambda span: (list(LANES).index(span.resource), span.start_s))
    shown = shown_spans(window)

    assert len(shown) == len(spans) > 100
    for got, span in zip(shown, spans, strict=True):
        layer = "" if span.layer is None else str(span.layer)
        assert (got["stream"], got["name"], int(got["step"]), got["layer"]) == (
            span.resource,
            span.name,
            span.step,
            layer,
        )
        assert float(got["start_s"]) == pytest.approx(span.start_s, abs=1.5e-9)
        assert float(got["end_s"]) == pytest.approx(span.end_s, abs=1.5e-9)
        assert float(got["bytes"]) == span.size_bytes


def test_a_large_timeline_is_summed_up_until_it_is_zoomed_into(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("large"))
    count = window.run("return kvplan.timeline.runs()[0].lanes.reduce((sum, lane) => sum + lane.spans, 0)")
    show = "await kvplan.timeline.showSteps(0, 511)"
    draw_ms = f"(async () => {{ const t = performance.now(); {show}; return performance.now() - t; }})()"
    took_ms = min(window.wait(draw_ms) for _ in range(3))

    assert count > 100_000
    assert took_ms < 1000  # a fraction of that on a machine that does nothing else
    assert window.run("return document.getElementById('timeline').dataset.exact") == "false"
    assert window.run("return document.querySelectorAll('#timeline path').length") < 400
    window.wait("kvplan.timeline.showSteps(100, 101)")
    assert window.run("return document.getElementById('timeline').dataset.exact") == "true"


def test_sums_of_a_view_are_the_busy_time_of_its_spans(window: Browser, page_file: PageFile) -> None:
    study = make_study(large())
    wave = study.simulated.trace.waves[0]
    window.open(page_file("large"))
    window.wait("kvplan.timeline.showSteps(0, 511)")
    shapes = window.run(
        "const {shapes} = kvplan.timeline.drawn([0, arguments[0]]);"
        "return shapes.map(({x, y}) => { let area = 0; for (let i = 0; i < x.length; i += 6)"
        " area += (x[i + 1] - x[i]) * (y[i + 2] - y[i + 1]); return area; })",
        wave.seconds * 1e3,
    )
    drawn = dict(zip(SPAN_COLOURS, shapes, strict=True))

    assert sum(drawn.values()) / 0.76 / 1e3 == pytest.approx(sum(map(wave.busy_s, LANES)), rel=1e-6)
    fetched = sum(span.end_s - span.start_s for span in wave.spans if span.name == "fetch")
    assert drawn["fetch"] / 0.76 / 1e3 == pytest.approx(fetched, rel=1e-6)


def test_pointing_at_the_timeline_names_the_span(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("plan"))
    window.point_at(*middle(window, "#timeline", 0.5, 1 / 6))

    assert window.until("!document.querySelector('.tip').hidden")
    words = window.run("return document.querySelector('.tip').textContent")
    assert "step 8" in words
    assert "ms (simulated)" in words


def test_steps_are_chosen_by_number_and_by_button(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("everything"))
    window.run(
        "document.getElementById('timeline-first').value = 4; document.getElementById('timeline-last').value = 5"
    )
    window.run("document.getElementById('timeline-show').requestSubmit()")
    title = "document.querySelector('#timeline .xtitle').textContent"

    assert window.until(f"{title} === 'ms since the start of step 4'")
    window.run("document.querySelector('[data-steps=\"[0,0]\"]').click()")
    assert window.until(f"{title} === 'ms since the start of the prefill'")
    lanes = window.run("return [...document.querySelectorAll('#timeline .ytick text')].map((one) => one.textContent)")
    assert len(lanes) == 9
    assert sum("simulated" in lane for lane in lanes) == 3


# Text from files


def test_text_from_files_stays_text(window: Browser, tmp_path: Path) -> None:
    plan = three_phases()
    setting = plan.setting
    machine = replace(
        setting.machine,
        name=NASTY,
        overrides=(NASTY,),
        gpu=replace(setting.machine.gpu, name=NASTY, source=NASTY),
        host=replace(setting.machine.host, name=NASTY, source=NASTY),
    )
    model = replace(setting.model, name=NASTY, source=NASTY)
    access = replace(setting.access, source=NASTY)
    plan = replace(plan, setting=replace(setting, machine=machine, model=model, access=access))
    study = make_study(plan, answer=make_answer(question=NASTY, losses=(NASTY,), sure=(NASTY,)))
    run = Run(name=NASTY, trace=replace(as_if_measured(study.simulated.trace), source=NASTY))
    spans = tuple(span._replace(name=NASTY) for span in run.trace.waves[0].spans)
    trace = replace(run.trace, waves=(replace(run.trace.waves[0], spans=spans), *run.trace.waves[1:]))
    rivals = tuple(
        replace(one, policy=f"{one.policy} {NASTY}", footnote=NASTY, given_up=NASTY) for one in make_rivals()
    )
    origin = replace(study.origin, commands=(NASTY,), versions=((NASTY, NASTY),))
    file = tmp_path / "nasty.html"
    file.write_text(plan_page(replace(study, measured=(replace(run, trace=trace),), rivals=rivals, origin=origin)))
    window.open(file)
    window.point_at(*middle(window, "[data-figure=steps-measured]"))
    assert window.until(
        "document.querySelector('[data-figure=steps-measured] .hoverlayer').textContent.includes('<img')"
    )

    assert_only_text(window)


def test_text_of_measurements_and_campaigns_stays_text(window: Browser, tmp_path: Path) -> None:
    plan = three_phases()
    plan = replace(plan, setting=replace(plan.setting, model=replace(plan.setting.model, name=NASTY)))
    study = measured_study(plan)
    profile, raw, verdict = study.cost.profile, study.raw, study.verdict
    assert profile.evidence
    assert raw
    assert verdict
    errors = tuple(replace(one, family=NASTY, worst_case=NASTY) for one in profile.evidence.errors)
    cost = replace(study.cost, profile=replace(profile, evidence=replace(profile.evidence, errors=errors)))
    word = f"as={NASTY.replace(' ', '_')}"
    told = tuple(replace(one, case=f"{one.case} {word}") for one in raw.measurements if one.family == "product")
    recipe = f"model={NASTY.replace(' ', '_').replace('=', '')}"
    plans = tuple(replace(one, recipe=recipe, explained_by=NASTY) for one in verdict.plans)
    nasty = replace(verdict, gpu=NASTY, profile=NASTY, plans=plans, failed=((NASTY, NASTY),))
    file = tmp_path / "nasty.html"
    file.write_text(plan_page(replace(study, cost=cost, raw=replace(raw, measurements=told), verdict=nasty)))
    window.open(file)

    assert_only_text(window)


def test_a_point_names_its_measurement(window: Browser, page_file: PageFile) -> None:
    window.open(page_file("evidence"))
    point = "document.querySelector('[data-figure=fit-copies] .scatterlayer .points path')"
    x, y = window.run(
        f"{point}.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = {point}.getBoundingClientRect();"
        "return [b.left + b.width / 2, b.top + b.height / 2]"
    )
    window.point_at(x, y)

    assert window.until(
        "document.querySelector('[data-figure=fit-copies] .hoverlayer').textContent.includes('memory=pinned bytes=4096')"
    )


def test_text_in_a_sweep_stays_text(window: Browser, tmp_path: Path) -> None:
    rows = tuple(
        {**row, "gpu": f"{row['gpu']} {NASTY}", "reason": NASTY, NASTY: row["batch"]} for row in make_sweep().rows
    )
    sweep = make_sweep(rows=rows, fields=("gpu", NASTY, "sparsity"), title=NASTY, question=NASTY, commands=(NASTY,))
    file = tmp_path / "nasty.html"
    file.write_text(sweep_page(sweep))
    window.open(file)

    assert_only_text(window)


def assert_only_text(window: Browser) -> None:
    assert window.run("return window.hacked ?? null") is None
    assert window.run("return document.querySelectorAll('main img, main b, main script, .plot a').length") == 0
    assert "<img src=x onerror=" in window.run("return document.querySelector('h1').textContent")
    assert window.messages() == []
    assert window.requests() == []
