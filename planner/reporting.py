"""From a plan file to what its page shows. ``pages`` is the reports package, handed in: planning never loads it."""

import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from planner.answer import kvplan_version
from planner.compare import Row, compare
from planner.inputs import question_of, request_of
from planner.limits import stretches
from planner.solution import Certificate
from planner.wording import certificate_texts, change_texts, choice_rows, question_text, waves_text
from sim.codec import from_plain
from sim.cost import CostModel
from sim.engine import simulate
from sim.files import load_trace, plan_from_json, read_json_object
from sim.forecast import Forecast, forecast
from sim.plan import Plan
from sim.profile import Profile
from sim.trace import Trace

_WORTH = {
    "hbm_tokens_per_s_per_gib": "GiB of HBM",
    "host_tokens_per_s_per_gib": "GiB of host memory",
    "link_tokens_per_s_per_gb_s": "GB/s of link, each way",
    "flops_tokens_per_s_per_percent": "percent of FLOP/s",
}
_SAME = 1e-3  # of throughput: beyond that the file's prediction is another version's


def study_of(
    pages: Any, file: Path, traces: Sequence[Path], with_rivals: bool, steps: tuple[int, int] | None, command: str
) -> Any:
    """The plan in ``file``, simulated, with the runs in ``traces`` and, if wanted, its rivals."""
    data = read_json_object(file)
    plan = plan_from_json(data, str(file))
    cost = CostModel(machine=plan.setting.machine, profile=Profile.nominal(plan.setting.machine))
    priced = forecast(plan, cost)
    return pages.Study(
        plan=plan,
        cost=cost,
        priced=priced,
        simulated=pages.Run(name="simulated", trace=simulate(plan, cost, ops=True)),
        measured=_runs(pages, plan, traces),
        answer=_answer(pages, data, priced, cost),
        rivals=tuple(_rivals(pages, data, file)) if with_rivals else (),
        origin=_origin(pages, data, file, command),
        drawn_steps=steps,
    )


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
        choices=tuple(choice_rows(priced.plan)),
        losses=(*change_texts(setting), *_lossless(data)),
        stretches=tuple(shown),
        stretches_of=waves_text(setting),
        sure=tuple(_sure(data, priced, cost.profile)),
        worth=tuple((unit, float(worth[name])) for name, unit in _WORTH.items() if name in worth),
    )


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


def _rivals(pages: Any, data: dict[str, Any], file: Path) -> Iterator[Any]:
    command = data.get("provenance", {}).get("command")
    if command is None:
        raise ValueError(f"{file}: provenance.command, missing: --compare needs a plan of `planner solve -o`")
    for row in compare(request_of(question_of(command))):
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
    versions = [("kvplan", kvplan_version()), ("Python", sys.version.split()[0])]
    versions += [(name, _version(name)) for name in ("plotly", "simpy", "numpy", "pulp", "highspy")]
    return pages.Origin(
        versions=tuple(versions),
        commands=(*solved, command),
        solved=f"{source.get('date', 'unknown date')}, with kvplan {source.get('kvplan_version', 'unknown')}",
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
