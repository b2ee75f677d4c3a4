"""One plain sentence above each picture: what it says, in numbers that the reader can check in it."""

from collections.abc import Mapping, Sequence

from reports.figures.measured import Pair, family_seconds
from reports.figures.rivals import speed
from reports.look import distance
from reports.study import Rival, Study
from sim.outcome import Outcome
from sim.units import format_bytes, format_seconds


def answer(study: Study, outcome: Outcome) -> str:
    """Throughput, what it costs the output, and what limits the longest phase."""
    longest = max(study.answer.stretches, key=lambda stretch: stretch.seconds)
    setting = study.plan.setting
    kind = "lossless" if setting.is_lossless else "not lossless"
    return (
        f"{setting.machine.name} generates {outcome.tokens_per_s:,.0f} tokens/s with this plan, which is {kind}; "
        f"what limits it most is {_unit(longest.limit)}, in the {_phase(longest.name)}."
    )


def kv(study: Study) -> str:
    """How much KV is where at its fullest."""
    plan, held = study.plan, study.priced.waves[0].load.held
    homes, last = plan.homes, plan.homes.steps - 1
    room = plan.setting.kv_budget_bytes
    in_hbm = f"KV takes at most {format_bytes(float(held.hbm.max()))} of the {format_bytes(room)} that HBM has for it"
    off = homes.host_kv[last] + homes.activations[last]
    dropped = f", and {_share(homes.dropped[last], study)} are dropped" if homes.dropped[last] else ""
    if not off:
        swapped = float(held.host.max())
        if swapped:
            return f"{in_hbm}{dropped}; sequences that step back leave up to {format_bytes(swapped)} in host memory."
        return f"{in_hbm}{dropped}; nothing goes to host memory."
    begins = next(step for step, tokens in enumerate(homes.host_kv) if tokens or homes.activations[step])
    since = "from the start" if begins == 0 else f"from step {begins}"
    return (
        f"{in_hbm}; tokens leave it {since}, and at the end {_share(off, study)} are at home in host memory "
        f"({format_bytes(float(held.host.max()))} at most){dropped}."
    )


def time(spent: Mapping[str, float], study: Study) -> str:
    """The largest share, and how steps grow."""
    whole = sum(spent.values())
    (first, seconds), *rest = spent.items()
    then = f", then {rest[0][0]} with {_percent(rest[0][1] / whole)}" if rest else ""
    step_s = study.priced.waves[0].step_s
    grows = ""
    if len(step_s) > 2:
        grows = f"; a decode step takes {format_seconds(float(step_s[1]))} at first and {format_seconds(float(step_s[-1]))} at last"
    return f"Of {format_seconds(whole)}, {_percent(seconds / whole)} goes into {first}{then}{grows}."


def timeline(study: Study, drawn: tuple[int, int]) -> str:
    """How busy the streams are, and what is drawn."""
    used = study.simulated.trace.outcome.utilisation
    wave = study.priced.waves[0]
    whole = drawn == (0, len(wave.step_s) - 1)
    which = "All steps" if whole else f"Steps {drawn[0]} to {drawn[1]} of {len(wave.step_s) - 1}"
    above = "; simulated above measured" if study.measured else ""
    waits = "waits for nothing" if used.gpu > 0.995 else f"is busy {_percent(used.gpu)} of the time"
    return (
        f"The GPU {waits}, copies to it take {_percent(used.h2d)} and copies to the host {_percent(used.d2h)}. "
        f"{which} of a wave of {wave.sequences:,} sequences can be drawn{above}."
    )


def rivals(found: Sequence[Rival]) -> str:
    """How far the optimum is ahead of the fastest rival of its kind, and who does not fit."""
    parts: list[str] = []
    for policy, words, lossless in (("optimum-lossless", "Lossless", True), ("optimum", "With changes allowed", False)):
        best = next((one for one in found if one.policy == policy and one.outcome), None)
        others = [one for one in found if not one.policy.startswith("optimum") and one.outcome]
        others = [one for one in others if one.lossless or not lossless]
        if best and others:
            second = max(others, key=speed)
            parts.append(f"{words.lower() if parts else words}, the best plan is {_ahead(best, second)}")
    misfits = [one.policy for one in found if one.outcome is None]
    failing = f" {', '.join(misfits)} {'does' if len(misfits) == 1 else 'do'} not fit." if misfits else ""
    return ("; ".join(parts) or "No policy can be held against another") + "." + failing


def _ahead(best: Rival, second: Rival) -> str:
    """A rival may be ahead of the best plan of a request that forbids what it does."""
    ratio = speed(best) / speed(second)
    if ratio < 0.995:
        forbidden = f" by what the request does not allow ({second.given_up})" if second.given_up else ""
        return f"{ratio:.2f} times as fast as {second.policy}, which is ahead{forbidden}"
    return f"{'as fast as' if ratio < 1.005 else f'{ratio:.2f} times as fast as'} the next policy, {second.policy}"


def measured(study: Study, pairs: Sequence[Pair]) -> str:
    """The largest error of throughput, and the step that is furthest off."""
    predicted = study.simulated.trace.outcome.tokens_per_s
    parts = []
    for pair in pairs:
        got = pair.run.trace.outcome.tokens_per_s
        step = pair.worst_step
        parts.append(
            f"{pair.run.name} reached {got:,.0f} tokens/s where {predicted:,.0f} were predicted "
            f"({distance(got / predicted)}); furthest off is {f'step {step}' if step else 'the prefill'}, "
            f"{format_seconds(float(pair.measured_s[step]))} for {format_seconds(float(pair.simulated_s[step]))}"
        )
    return "; ".join(parts) + "." + _worst_family(study)


def _worst_family(study: Study) -> str:
    """The kind of work whose seconds are furthest off in any run."""
    simulated = family_seconds(study.simulated)
    runs = {run.name: family_seconds(run) for run in study.measured}
    ratios = {
        (name, run): got[name] / simulated[name] for run, got in runs.items() for name in got if name in simulated
    }
    if not ratios:
        return ""
    name, run = max(ratios, key=lambda key: abs(ratios[key] - 1))
    return f" By kind of work the largest error is {distance(ratios[name, run])}, {name} in {run}."


def _unit(limit: str) -> str:
    """``GPU: weights, 81 %`` within a sentence."""
    return limit.replace("GPU: ", "the GPU's ").replace(", ", " (", 1) + (")" if ", " in limit else "")


def _phase(name: str) -> str:
    return {"gpu": "phase with all KV in HBM", "gpu_cpu": "phase with KV in both memories"}.get(name, f"{name} phase")


def _share(tokens: float, study: Study) -> str:
    return f"{_percent(tokens / study.plan.setting.workload.cached_tokens)} of a sequence's tokens"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
