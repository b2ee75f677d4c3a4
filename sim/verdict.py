"""Runs beside their simulations, as a document: figures of each, errors, and what the time was spent on."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sim.checks import require_positive
from sim.codec import from_plain, to_plain
from sim.files import read_json_object
from sim.trace import Resource, Trace

SCHEMA_VERSION = 1


class Stratum(StrEnum):
    """What a plan's decode steps are mostly spent on; launches and choices from a quarter on."""

    WEIGHTS = "weights"
    KV_READS = "kv_reads"
    LINK = "link"
    LAUNCH = "launch"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """``step_s`` are the first wave's, the prefill first; times per output token are those between two tokens of a sequence.

    ``launch_s`` is what the host took to launch a kernel just before and after, 0 where that was not looked at.
    """

    makespan_s: float
    ttft_s: float
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    moved_bytes: float
    peak_hbm_bytes: int
    step_s: tuple[float, ...]
    launch_s: float = 0.0

    @classmethod
    def of(cls, trace: Trace, peak_hbm_bytes: int | None = None) -> "Figures":
        """``peak_hbm_bytes`` is what an allocator says, where there is one to ask."""
        outcome = trace.outcome
        between = sorted(
            (end_s - start_s, wave.sequences * wave.repeats)
            for wave in trace.waves
            for start_s, end_s in pairwise(wave.step_end_s)
        )
        ends = trace.waves[0].step_end_s
        moved = sum(
            wave.repeats * wave.moved_bytes(which) for wave in trace.waves for which in (Resource.H2D, Resource.D2H)
        )
        return cls(
            makespan_s=outcome.makespan_s,
            ttft_s=outcome.ttft_s,
            tpot_p50_s=_quantile(between, 0.5),
            tpot_p95_s=_quantile(between, 0.95),
            moved_bytes=moved,
            peak_hbm_bytes=outcome.peak_hbm_bytes if peak_hbm_bytes is None else peak_hbm_bytes,
            step_s=(ends[0], *(end_s - start_s for start_s, end_s in pairwise(ends))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Bytes that a short run of a sparse plan moved, and those that the simulator says of what that run picked."""

    measured_h2d_bytes: int
    measured_d2h_bytes: int
    simulated_h2d_bytes: int
    simulated_d2h_bytes: int

    @property
    def measured(self) -> tuple[int, int]:
        return self.measured_h2d_bytes, self.measured_d2h_bytes

    @property
    def simulated(self) -> tuple[int, int]:
        return self.simulated_h2d_bytes, self.simulated_d2h_bytes

    @property
    def is_exact(self) -> bool:
        return self.measured == self.simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One plan. Errors are predicted over measured less one; None where there is nothing to compare.

    ``moved`` is of the traffic that the access profile expects, ``replayed`` of the very picks of a short run.
    """

    recipe: str
    stratum: Stratum
    measured: Figures
    simulated: Figures
    makespan: float
    ttft: float
    tpot_p50: float | None
    tpot_p95: float | None
    moved: float | None
    peak_hbm: float | None
    roofline: float
    explained_by: str
    replayed: Replayed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A campaign held against its profile: all plans, the worst makespan first, and those that could not be run.

    ``waiting`` plans have not been tried yet; ``not_replayed`` are those that ran, but not once more with their picks.
    """

    gpu: str
    profile: str
    profile_hash: str
    seed: int
    waiting: int
    plans: tuple[Judged, ...]
    failed: tuple[tuple[str, str], ...]
    not_replayed: tuple[tuple[str, str], ...] = ()

    @property
    def median_error(self) -> float:
        return median(abs(one.makespan) for one in self.plans)

    @property
    def worst_error(self) -> float:
        return max(abs(one.makespan) for one in self.plans)

    @property
    def summary(self) -> str:
        """In a line."""
        said = (
            f"makespan: median error {self.median_error:.1%}, worst {self.worst_error:.1%}, {len(self.plans)} plans"
            f" of seed {self.seed}, profile {self.profile} ({self.profile_hash[:19]}...)"
        )
        whole = len(self.plans) + len(self.failed) + self.waiting
        return f"{said}; {self.waiting} of {whole} plans have not been run" if self.waiting else said

    @property
    def replays(self) -> str | None:
        """Whether the bytes of recorded selections are exact, and the first of those that are not; None if there are none."""
        found = [(one.recipe, one.replayed) for one in self.plans if one.replayed is not None]
        if not found:
            return None
        wrong = [(recipe, one) for recipe, one in found if not one.is_exact]
        said = f"replayed selections: bytes of {len(found) - len(wrong)} of {len(found)} plans exact"
        if not wrong:
            return said
        recipe, one = wrong[0]
        there, back = (
            f"{measured} bytes measured, {simulated} simulated"
            for measured, simulated in zip(one.measured, one.simulated, strict=True)
        )
        return f"{said}; not {recipe}: to the GPU {there}, to the host {back}"


def verdict_to_json(verdict: Verdict, drift: float | None) -> dict[str, Any]:
    """``drift`` is how many times as long the profile's reference step took on the day, if it was asked."""
    told = {"summary": verdict.summary, "replays": verdict.replays, "drift": drift}
    return {"schema_version": SCHEMA_VERSION, **told, **to_plain(verdict)}


def load_verdict(path: Path) -> Verdict:
    """What ``planner validate --json`` printed.

    Raises ValueError for another schema version or a value that does not fit.
    """
    data = read_json_object(path)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version={version!r}, must be {SCHEMA_VERSION}: give what `planner validate --json` prints"
        )
    for told in ("summary", "replays", "drift"):
        data.pop(told, None)
    verdict = from_plain(Verdict, data, str(path))
    if not verdict.plans:
        raise ValueError(f"{path}: no plan has been judged: run the campaign first")
    for one in verdict.plans:
        require_positive("measured.makespan_s", one.measured.makespan_s)
        require_positive("simulated.makespan_s", one.simulated.makespan_s)
    return verdict


def by_stratum(plans: Sequence[Judged]) -> list[tuple[str, Sequence[Judged]]]:
    """All plans, then those of each stratum that has some."""
    groups: list[tuple[str, Sequence[Judged]]] = [("all", plans)]
    for stratum in Stratum:
        members = [one for one in plans if one.stratum is stratum]
        if members:
            groups.append((str(stratum), members))
    return groups


def _quantile(ordered: Sequence[tuple[float, int]], share: float) -> float | None:
    """Of times that each stand for as many sequences as they say."""
    if not ordered:
        return None
    wanted, passed = share * sum(count for _, count in ordered), 0
    for seconds, count in ordered:
        passed += count
        if passed >= wanted:
            return seconds
    return ordered[-1][0]
