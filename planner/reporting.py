"""From a plan file to what its page shows. ``pages`` is the reports package, handed in: planning never loads it."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from planner.answer import kvplan_version
from planner.compare import Row, compare
from planner.grid_table import point_to_json
from planner.inputs import profile_of, question_of, request_of
from planner.limits import stretches
from planner.solution import Certificate
from planner.sweep import Point
from planner.wording import certificate_texts, change_texts, choice_rows, question_text, wanted_text, waves_text
from sim.codec import from_plain
from sim.cost import CostModel
from sim.engine import simulate
from sim.files import load_trace, plan_from_json, read_json_object
from sim.forecast import Forecast, forecast
from sim.measured import Measured, load_measured, measurements_file
from sim.plan import Plan
from sim.profile import Profile
from sim.profile_files import shipped_file
from sim.trace import Trace
from sim.units import GIB
from sim.verdict import Verdict, load_verdict

_WORTH = {
    "hbm_tokens_per_s_per_gib": "GiB of HBM",
    "host_tokens_per_s_per_gib": "GiB of host memory",
    "link_tokens_per_s_per_gb_s": "GB/s of link, each way",
    "flops_tokens_per_s_per_percent": "percent of FLOP/s",
}
MOST_LAYER_STEPS = 60_000
_SAME = 1e-3  # of throughput: beyond that the file's prediction is another version's


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a page is made from. ``steps`` bounds the timeline; ``command`` makes the page again."""

    plan: Path
    traces: tuple[Path, ...]
    profile: str | None
    rivals: bool
    steps: tuple[int, int] | None
    command: str
    verdict: Path | None = None


def study_of(pages: Any, wanted: Wanted) -> Any:
    """The plan, simulated, with the runs and, if wanted, its rivals."""
    file, data = wanted.plan, read_json_object(wanted.plan)
    plan = plan_from_json(data, str(file))
    machine = plan.setting.machine
    profile = profile_of(wanted.profile, machine)
    cost = CostModel(machine=machine, profile=profile)
    priced = forecast(plan, cost)
    return pages.Study(
        plan=plan,
        cost=cost,
        priced=priced,
        simulated=pages.Run(name="simulated", trace=simulate(plan, cost, ops=_by_operation(priced))),
        measured=_runs(pages, plan, wanted.traces),
        answer=_answer(pages, data, priced, cost),
        rivals=tuple(_rivals(pages, data, file, profile)) if wanted.rivals else (),
        origin=_origin(pages, data, file, wanted.command),
        drawn_steps=wanted.steps,
        raw=_raw(wanted.profile, profile),
        verdict=_verdict(wanted.verdict, machine.gpu.name),
    )


def _raw(given: str | None, profile: Profile) -> Measured | None:
    """What the profile was fitted to, where it lies beside it.

    Raises ValueError for what another machine or day gave.
    """
    if profile.evidence is None:
        return None
    source = shipped_file(profile.evidence.fingerprint.gpu) if given is None else Path(given)
    file = None if source is None else measurements_file(source)
    if file is None or not file.exists():
        return None
    raw = load_measured(file)
    if raw.fingerprint != profile.evidence.fingerprint:
        raise ValueError(
            f"{file}: measured on {raw.fingerprint.device}, {raw.fingerprint.date}, the profile beside it on "
            f"{profile.evidence.fingerprint.device}, {profile.evidence.fingerprint.date}: move the file away"
        )
    return raw


def _verdict(file: Path | None, gpu: str) -> Verdict | None:
    if file is None:
        return None
    verdict = load_verdict(file)
    if verdict.gpu != gpu:
        raise ValueError(f"{file}: plans were run on {verdict.gpu}, this plan is for {gpu}: give a verdict on {gpu}")
    return verdict


def _by_operation(priced: Forecast) -> bool:
    """Whether every operation is simulated by itself: of a long run, layers tell enough and take a third of the time."""
    return sum(len(wave.step_s) for wave in priced.waves) * priced.plan.setting.model.layers <= MOST_LAYER_STEPS


def page_of(pages: Any, points: Sequence[Point], *, lossless: bool, file: Path) -> str:
    """The page, for ``file``, that shows the points of ``planner whatif``."""
    rows = [_row(point) for point in points]
    fields = tuple(name for name, _ in points[0].values if name != "lossless")
    if not fields:
        raise ValueError("--html, needs an option with several values: give one, as --batch 8,16,32")
    fixed = [f"{name.replace('_', ' ')} {rows[0][name]}" for name in fields if len({row[name] for row in rows}) == 1]
    sweep = pages.Sweep(
        title=f"What if: {len(rows):,} plans",
        question=", ".join(["lossless" if lossless else "the best plan of each point", *fixed]),
        fields=fields,
        rows=tuple(rows),
        commands=(_whatif_command(points, fields, lossless, file),),
        versions=_versions(),
    )
    return str(pages.sweep_page(sweep))


def _row(point: Point) -> dict[str, Any]:
    row = point_to_json(point)
    return row | ({"kv_budget_bytes": row["kv_budget_gib"] * GIB} if "kv_budget_gib" in row else {})


def _whatif_command(points: Sequence[Point], fields: Sequence[str], lossless: bool, file: Path) -> str:
    given = [dict(point.values) for point in points]
    words = ["planner", "whatif"]
    for name in fields:
        values = dict.fromkeys("+".join(v) if isinstance(v := one[name], tuple) else str(v) for one in given)
        words += [f"--{name.replace('_', '-')}", ",".join(values)]
    return shlex.join([*words, *(["--lossless"] if lossless else []), "--html", str(file)])


def _runs(pages: Any, plan: Plan, traces: Sequence[Path]) -> tuple[Any, ...]:
    """Called by their files' names, which the page shows."""
    names = [path.stem for path in traces]
    shown = names if len(set(names)) == len(names) else [str(path) for path in traces]
    return tuple(
        pages.Run(name=name, trace=_fitting(plan, load_trace(path), path))
        for name, path in zip(shown, traces, strict=True)
    )


def _fitting(plan: Plan, trace: Trace, path: Path) -> Trace:
    work = plan.setting.workload
    if trace.output_tokens != work.output_tokens:
        raise ValueError(f"{path}: {trace.output_tokens} output tokens, must be the plan's {work.output_tokens}")
    return trace


def _answer(pages: Any, data: dict[str, Any], priced: Forecast, cost: CostModel) -> Any:
    setting = priced.plan.setting
    found = stretches(priced, cost)
    shown = [
        pages.Stretch(
            name=one.name, first_step=one.first_step, last_step=one.last_step, seconds=one.seconds, limit=one.limit
        )
        for one in found
    ]
    worth = data.get("worth") or {}
    return pages.Answer(
        question=question_text(setting),
        choices=(*_wanted(data), *choice_rows(priced.plan)),
        losses=(*change_texts(setting), *_lossless(data)),
        stretches=tuple(shown),
        stretches_of=waves_text(setting),
        sure=tuple(_sure(data, priced, cost.profile)),
        worth=tuple((unit, float(worth[name])) for name, unit in _WORTH.items() if name in worth),
    )


def _wanted(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was asked for, where the file says so and the files that its command names are still there."""
    with suppress(ValueError):
        request = request_of(question_of(data.get("provenance", {}).get("command", "")))
        yield "wanted", wanted_text(request).removeprefix("wanted: ")


def _lossless(data: dict[str, Any]) -> Iterator[str]:
    """The file's best lossless plan, where this one is none."""
    best = data.get("lossless")
    if isinstance(best, dict) and not best.get("is_this_plan"):
        yield f"The best plan that leaves the output unchanged reaches {best['tokens_per_s']:,.0f} tokens/s."


def _sure(data: dict[str, Any], priced: Forecast, profile: Profile) -> Iterator[str]:
    if "solver" in data:
        yield from certificate_texts(from_plain(Certificate, data["solver"], "solver"))
    else:
        yield "not solved for: a plan written by hand has no certificate"
    yield f"profile {profile.name}: {profile.basis}"
    said, found = data.get("predicted", {}).get("tokens_per_s"), priced.outcome.tokens_per_s
    if said is not None and abs(said / found - 1) > _SAME:
        yield f"the file predicts {said:,.0f} tokens/s, this version and profile {found:,.0f}: solve again"


def _rivals(pages: Any, data: dict[str, Any], file: Path, profile: Profile) -> Iterator[Any]:
    command = data.get("provenance", {}).get("command")
    if command is None:
        raise ValueError(f"{file}: provenance.command, missing: --compare needs a plan of `planner solve -o`")
    for row in compare(replace(request_of(question_of(command)), profile=profile)):
        yield _rival(pages, row)


def _rival(pages: Any, row: Row) -> Any:
    return pages.Rival(
        policy=row.policy,
        lossless=row.lossless,
        given_up=row.given_up,
        outcome=row.outcome,
        reason=row.reason,
        footnote=row.footnote,
    )


def _origin(pages: Any, data: dict[str, Any], file: Path, command: str) -> Any:
    source = data.get("provenance", {})
    solved = [f"{source['command']} -o {file.name}"] if "command" in source else []
    return pages.Origin(
        versions=_versions(),
        commands=(*solved, command),
        solved=f"{source.get('date', 'unknown date')}, with kvplan {source.get('kvplan_version', 'unknown')}",
    )


def _versions() -> tuple[tuple[str, str], ...]:
    packages = ("plotly", "simpy", "numpy", "pulp", "highspy")
    own = [("kvplan", kvplan_version()), ("Python", sys.version.split()[0])]
    return (*own, *((name, _version(name)) for name in packages))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
