"""Where every constant of a page comes from."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from reports.study import Study
from sim.access import EARLY_STEPS
from sim.profile import Estimate, Profile
from sim.spec import MachineSpec, ModelSpec


def constants(profile: Profile) -> list[tuple[str, str, str]]:
    """Name, value and reason of what the cost model assumes; of a measured profile the interval and what it rests on."""
    reasons = Profile.reasons() | {
        one.parameter: _rests_on(one) for one in (profile.evidence.estimates if profile.evidence else ())
    }
    return [(name, number(getattr(profile, name)), reason) for name, reason in reasons.items()]


def _rests_on(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return one.evidence
    return f"95 %: {number(one.low)} to {number(one.high)}; {one.evidence}"


def datasheets(machine: MachineSpec, model: ModelSpec) -> list[tuple[str, list[tuple[str, str]]]]:
    """What is known about GPU, host and model in SI units, each under a line that names its source and what was changed."""
    changed = f" Changed by hand: {', '.join(machine.overrides)}." if machine.overrides else ""
    nouns = (("GPU", machine.gpu, changed), ("Host", machine.host, changed), ("Model", model, ""))
    return [(f"{title} in SI units, from: {noun.source}.{more}", list(_members(noun))) for title, noun, more in nouns]


def access_rows(study: Study) -> list[tuple[str, str, str]]:
    """What a sparse selector's picks were measured to do."""
    access = study.plan.setting.access
    early = access.early_turnovers or access.turnovers
    return [
        (
            f"{access.selector}, {number(share)} kept",
            f"{number(later)} new each step{_at_first(first, later)}, {number(ratio)} x perplexity",
            access.source,
        )
        for share, first, later, ratio in zip(
            access.keep_shares, early, access.turnovers, access.perplexity_ratios, strict=True
        )
    ]


def _at_first(first: float, later: float) -> str:
    return "" if first == later else f" ({number(first)} in the first {EARLY_STEPS})"


def number(value: Any) -> str:
    """Digits enough to tell values apart: no figure is made of these."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _members(noun: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for member in fields(noun):
        value = getattr(noun, member.name)
        if member.name == "link":
            yield from _members(value, "link.")
        elif member.name != "source" and value is not None:
            yield f"{prefix}{member.name}", number(value)
