"""A plan's page: seven questions in order, each with a sentence and its pictures."""

from collections.abc import Callable, Iterator
from typing import Any

from reports import html, sentences
from reports.chart import Chart
from reports.evidence import campaign_section, fit_section
from reports.figures.homes import tier_bytes, token_homes
from reports.figures.measured import family_errors, pairs_of, parity, steps_measured
from reports.figures.rivals import ranked, rival_charts
from reports.figures.shared import PHASE_NAMES
from reports.figures.time import step_times, time_totals, total_seconds
from reports.look import distance
from reports.page import Section, document
from reports.provenance import access_rows, constants, datasheets
from reports.study import Rival, Stretch, Study
from reports.timeline import timeline_data
from reports.timeline_controls import controls
from sim.outcome import Outcome
from sim.units import GIB, MILLI, format_bytes, format_seconds


def plan_page(study: Study) -> str:
    """The whole document."""
    timeline = timeline_data(study)
    sections = [
        _answer(study),
        _kv(study),
        _time(study),
        _timeline(study, (timeline["first_step"], timeline["last_step"])),
        *_rivals(study),
        *_measured(study),
        *fit_section(study),
        *campaign_section(study),
        _provenance(study),
    ]
    setting = study.plan.setting
    title = f"{setting.model.name} on {setting.machine.name}"
    return document(title, study.answer.question, sections, timeline=timeline)


def _answer(study: Study) -> Section:
    said, outcome = study.answer, study.priced.outcome
    parts = [
        html.figures(headline(outcome)),
        html.subheading("The plan"),
        html.facts(said.choices),
        html.bullets(said.losses),
        html.table(
            ("phase", "steps", "time", "per step", "limited by"),
            map(_stretch_cells, said.stretches),
            f"Phases of {said.stretches_of}",
            left=(0, 1, 4),
        ),
        html.subheading("How sure"),
        html.bullets(said.sure),
        *_worth(said.worth),
    ]
    return Section(name="answer", title="The answer", says=sentences.answer(study, outcome), parts=tuple(parts))


def headline(outcome: Outcome) -> list[tuple[str, str]]:
    """The numbers that matter, in the units that people use."""
    per_token = "none" if outcome.tpot_s is None else format_seconds(outcome.tpot_s)
    return [
        ("throughput", f"{outcome.tokens_per_s:,.0f} tokens/s"),
        ("time to first token (TTFT)", format_seconds(outcome.ttft_s)),
        ("time per output token (TPOT)", per_token),
        ("time in all", format_seconds(outcome.makespan_s)),
        ("peak in HBM", format_bytes(outcome.peak_hbm_bytes)),
        ("peak in host memory", format_bytes(outcome.peak_host_bytes)),
    ]


def _stretch_cells(stretch: Stretch) -> tuple[str, ...]:
    steps = stretch.last_step - stretch.first_step + 1
    which = f"{stretch.first_step}" if steps == 1 else f"{stretch.first_step} to {stretch.last_step}"
    times = format_seconds(stretch.seconds), format_seconds(stretch.seconds / steps)
    return (PHASE_NAMES.get(stretch.name, stretch.name), which, *times, stretch.limit)


def _worth(worth: tuple[tuple[str, float], ...]) -> Iterator[str]:
    if worth:
        rows = [(f"one more {unit}", f"{gain:+,.3g} tokens/s") for unit, gain in worth]
        yield html.subheading("What a little more of the machine is worth")
        yield html.facts(rows)


def _kv(study: Study) -> Section:
    parts = (*tier_bytes(study), token_homes(study.plan))
    return Section(name="kv", title="Where the KV lives", says=sentences.kv(study), parts=parts)


def _time(study: Study) -> Section:
    spent = total_seconds(study)
    parts = (step_times(study), time_totals(spent))
    return Section(name="time", title="Where the time goes", says=sentences.time(spent, study), parts=parts)


def _timeline(study: Study, drawn: tuple[int, int]) -> Section:
    says = sentences.timeline(study, drawn)
    return Section(name="timeline-section", title="The timeline", says=says, parts=(controls(study, drawn),))


def _rivals(study: Study) -> Iterator[Section]:
    if study.rivals:
        parts: tuple[str | Chart, ...] = (*rival_charts(study.rivals), *rival_tables(study.rivals))
        yield Section(name="rivals", title="Against the others", says=sentences.rivals(study.rivals), parts=parts)


def rival_tables(rivals: tuple[Rival, ...]) -> Iterator[str]:
    """Memory and bytes beside the speed, numbered notes below."""
    headings = ("policy", "output", "tokens/s", "TTFT", "TPOT", "HBM GiB", "host GiB", "to GPU GiB", "to host GiB")
    numbers = {one.policy: number for number, one in enumerate(rivals, 1)}
    rows = [_rival_cells(one, numbers[one.policy]) for one in (*_of(rivals, True), *_of(rivals, False))]
    yield html.table(headings, rows, "Speed, memory and bytes moved; numbers refer to the notes", left=(0, 1))
    yield html.bullets(f"[{numbers[one.policy]}] {one.footnote}" for one in rivals)


def _of(rivals: tuple[Rival, ...], lossless: bool) -> list[Rival]:
    return ranked([one for one in rivals if one.lossless is lossless])


def _rival_cells(rival: Rival, number: int) -> tuple[str, ...]:
    kind = "unchanged" if rival.lossless else f"changed: {rival.given_up}" if rival.given_up else "changed"
    if rival.outcome is None:
        return (f"{rival.policy} [{number}]", f"does not fit: {rival.reason}", *("-",) * 7)
    out = rival.outcome
    sizes = (out.peak_hbm_bytes, out.peak_host_bytes, out.h2d_bytes, out.d2h_bytes)
    per_token = "-" if out.tpot_s is None else f"{out.tpot_s / MILLI:,.1f} ms"
    return (
        f"{rival.policy} [{number}]",
        kind,
        f"{out.tokens_per_s:,.0f}",
        format_seconds(out.ttft_s),
        per_token,
        *(f"{size / GIB:,.1f}" for size in sizes),
    )


def _measured(study: Study) -> Iterator[Section]:
    pairs = pairs_of(study)
    if not pairs:
        return
    parts: tuple[str | Chart, ...] = (
        html.table(("", "simulated", *(run.name for run in study.measured)), _outcome_rows(study), "Totals"),
        steps_measured(study, pairs),
        parity(pairs),
        family_errors(study),
    )
    yield Section(
        name="measured", title="Simulated against measured", says=sentences.measured(study, pairs), parts=parts
    )


def _outcome_rows(study: Study) -> Iterator[tuple[str, ...]]:
    """What both sides say of the whole work, each measured figure with its distance from the simulated one."""
    outcomes = [run.trace.outcome for run in (study.simulated, *study.measured)]
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "tokens_per_s": ("throughput", lambda value: f"{value:,.0f} tokens/s"),
        "ttft_s": ("time to first token", format_seconds),
        "tpot_s": ("time per output token", format_seconds),
        "makespan_s": ("time in all", format_seconds),
        "peak_hbm_bytes": ("peak in HBM", format_bytes),
        "peak_host_bytes": ("peak in host memory", format_bytes),
        "h2d_bytes": ("moved to GPU", format_bytes),
        "d2h_bytes": ("moved to host", format_bytes),
    }
    for name, (words, said) in shown.items():
        first, *others = (getattr(outcome, name) for outcome in outcomes)
        cells = ["none" if value is None else said(value) + _distance(value, first) for value in others]
        yield (words, "none" if first is None else said(first), *cells)


def _distance(value: float, first: float | None) -> str:
    return f" ({distance(value / first)})" if first else ""


def _provenance(study: Study) -> Section:
    profile, setting = study.cost.profile, study.plan.setting
    headings, words = ("constant", "value", "reason or source"), (0, 1, 2)
    parts = (
        html.subheading("The commands that make this page again"),
        html.code(study.origin.commands),
        html.facts(
            (*study.origin.versions, ("solved", study.origin.solved), ("simulated", study.simulated.trace.source))
        ),
        *(html.paragraph(f"{run.name}: {run.trace.source}.") for run in study.measured),
        html.table(headings, constants(profile), f"Profile {profile.name}: {profile.basis}", left=words),
        *(
            html.table(headings[:2], rows, source, left=words[:2])
            for source, rows in datasheets(setting.machine, setting.model)
        ),
        html.table(headings, access_rows(study), "What the selector's picks were measured to do", left=words),
    )
    says = (
        f"Every number rests on profile {profile.name} ({profile.basis}), datasheets and the plan; all are listed here."
    )
    return Section(name="provenance", title="Where the numbers come from", says=says, parts=parts)
