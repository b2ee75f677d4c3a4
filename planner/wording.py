"""Plans in words: what was asked, what a plan does with each part of the cache, and what it gives up."""

from collections.abc import Iterable
from math import isclose

from planner.layout import percent
from planner.request import Objective, Request
from planner.solution import Certificate, Solution
from sim.kv import KvFormat
from sim.outcome import Outcome
from sim.plan import Admission, Placement, Plan, Preemption, Recompute, Setting
from sim.spec import WeightFormat
from sim.units import format_bytes, format_seconds

_SHOWN_CONSTRAINTS = 4


def question_text(setting: Setting | Request) -> str:
    """Model, machine and work, in one line."""
    work, machine = setting.workload, setting.machine
    weights = "" if setting.weight_format is WeightFormat.NATIVE else f", {setting.weight_format} weights"
    changed = f", {', '.join(machine.overrides)}" if machine.overrides else ""
    return (
        f"{setting.model.name} ({setting.dtype}{weights}) on {machine.name} (host {machine.host.name}{changed}): "
        f"{work.batch:,} sequences of {work.prompt_tokens:,} + {work.output_tokens:,} tokens"
    )


def wanted_text(request: Request) -> str:
    """The objective, its bounds, and what the plan may give up."""
    goals = {
        Objective.THROUGHPUT: "most tokens/s",
        Objective.TPOT: "least time per output token",
        Objective.TTFT: "least time to the first token",
    }
    formats = " or ".join((KvFormat.NATIVE, *request.kv_formats))
    sparse = f"sparsity up to {request.max_sparsity:.3g} by {' or '.join(request.selectors)}"
    may_be_sparse = request.selectors and request.max_sparsity > 0
    wanted = [goals[request.objective], sparse if may_be_sparse else "dense attention", f"KV {formats}"]
    if request.concurrency is not None:
        wanted.append(f"{request.concurrency:,} at once")
    if request.max_tpot_s is not None:
        wanted.append(f"at most {format_seconds(request.max_tpot_s)} per output token")
    return f"wanted: {', '.join(wanted)}"


def plan_rows(solution: Solution) -> list[tuple[str, str]]:
    """A plan line by line: what it is, and what it is predicted to do."""
    predicted = solution.predicted
    return [
        *speed_rows(predicted),
        *choice_rows(solution.plan),
        ("peak in HBM", format_bytes(predicted.peak_hbm_bytes)),
        ("peak in host memory", format_bytes(predicted.peak_host_bytes)),
        ("moved to GPU, to host", f"{format_bytes(predicted.h2d_bytes)}, {format_bytes(predicted.d2h_bytes)}"),
    ]


def choice_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a plan does with sequences, attention, cache and weights."""
    setting = plan.setting
    return [
        ("at once", _at_once(setting)),
        ("attention", _attention(setting)),
        ("KV stored as", _kv_formats(plan)),
        ("outside HBM", _outside(plan)),
        ("weights", _weights(setting)),
    ]


def speed_rows(outcome: Outcome) -> list[tuple[str, str]]:
    """Throughput and latencies."""
    per_token = "-" if outcome.tpot_s is None else format_seconds(outcome.tpot_s)
    return [
        ("throughput", f"{outcome.tokens_per_s:,.0f} tokens/s"),
        ("time to first token", format_seconds(outcome.ttft_s)),
        ("time per output token", per_token),
        ("time in all", format_seconds(outcome.makespan_s)),
    ]


def _at_once(setting: Setting) -> str:
    waves = len(setting.wave_sizes)
    if setting.admission is Admission.CONTINUOUS:
        return f"up to {setting.concurrency:,} sequences, admitted as pages fall free"
    return f"{setting.concurrency:,} sequences" + (f", in {waves:,} waves" if waves > 1 else ", all of them")


def waves_text(setting: Setting) -> str:
    """What a figure of one full wave speaks of."""
    waves = len(setting.wave_sizes)
    if setting.admission is Admission.CONTINUOUS:
        return "the machine, all sequences together"
    return f"the first of {waves:,} waves" if waves > 1 else "the whole batch at once"


def _attention(setting: Setting) -> str:
    attention = setting.attention
    if attention.is_dense:
        return "dense"
    newest = f"{percent(attention.local_fraction)} of the rest newest"
    return f"{attention.selector}, {percent(attention.sparsity)} left out, {newest}"


def _kv_formats(plan: Plan) -> str:
    formats = plan.setting.kv_format
    if formats.gpu is formats.host or not any(plan.homes.host_kv):
        return str(formats.gpu)
    return f"{formats.gpu} in HBM, {formats.host} on the host"


def _outside(plan: Plan) -> str:
    """What becomes of the tokens that HBM has no room for."""
    setting, homes = plan.setting, plan.homes
    kept = []
    if any(homes.host_kv):
        kept.append(f"KV on the host, {_use(setting)}, written back {setting.write_back.replace('_', ' ')}")
    if any(homes.activations):
        place = "HBM" if setting.recompute is Recompute.ACTIVATIONS_HBM else "host memory"
        kept.append(f"recompute from layer inputs in {place}")
    if setting.recompute is Recompute.TOKENS and any(homes.dropped):
        kept.append("recompute from tokens")
    if any(homes.dropped) and setting.recompute is not Recompute.TOKENS:
        kept.append("what cannot be attended again is dropped")
    if setting.admission is Admission.CONTINUOUS:
        preempted = "copied to the host" if setting.preemption is Preemption.SWAP else "dropped and prefilled again"
        kept.append(f"KV of sequences that step back is {preempted}")
    return "; ".join(kept) or "nothing"


def _use(setting: Setting) -> str:
    """How a step attends to KV on the host."""
    if setting.host_attention:
        return "attended by the CPU"
    copies = "fetched at each step" if setting.placement is Placement.RECENT else "selected ones copied to HBM"
    return f"{copies} ({setting.placement})"


def _weights(setting: Setting) -> str:
    if not setting.weights_on_host:
        return "in HBM"
    return f"{percent(setting.weights_on_host)} streamed from the host at every step"


def loss_texts(solution: Solution) -> Iterable[str]:
    """Whether the output changes, by what, and by how much as far as that has been measured."""
    setting = solution.plan.setting
    yield from change_texts(setting)
    if solution.lossless is None:
        native = setting.weight_format is WeightFormat.NATIVE
        yield "No lossless plan fits." if native else f"No plan is lossless with {setting.weight_format} weights."


def change_texts(setting: Setting) -> Iterable[str]:
    """What changes the output."""
    if setting.is_lossless:
        yield f"Lossless: the output is that of dense attention in {setting.dtype}."
        return
    attention = setting.attention
    if not attention.is_dense:
        yield _accuracy(setting)
    stored = [f"{one.value} KV" for one in dict.fromkeys((setting.kv_format.gpu, setting.kv_format.host))]
    stored.append(f"{setting.weight_format.value} weights")
    rounded = [one for one in stored if not one.startswith("native")]
    if rounded:
        verb = "are" if len(rounded) > 1 else "is"
        yield f"{' and '.join(rounded)} {verb} rounded: that changes the output too, how much is not measured here."


def certificate_texts(certificate: Certificate) -> Iterable[str]:
    """How far from the best the plan can be, and what was done to know that."""
    yield (
        f"{certificate.status}: at most {percent(certificate.gap, 2)} from the best possible (solver "
        f"{percent(certificate.solver_gap, 2)}, discretisation {percent(certificate.discretisation_gap, 2)})"
    )
    spent = f"{certificate.options:,} options in {format_seconds(certificate.solve_s)}"
    if certificate.solved:
        yield f"{certificate.name} solved {certificate.solved:,} of {spent}; bounds ruled out the others"
    else:
        yield f"bounds settled all of {spent}; {certificate.name} had none to solve"
    if certificate.binding:
        more = len(certificate.binding) - _SHOWN_CONSTRAINTS
        names = ", ".join(certificate.binding[:_SHOWN_CONSTRAINTS])
        yield f"held back by {names}" + (f" and {more} more" if more > 0 else "")


def given_up(setting: Setting) -> str:
    """What changes the output, in few words; empty if nothing does."""
    attention, formats = setting.attention, dict.fromkeys((setting.kv_format.gpu, setting.kv_format.host))
    lossy = [] if attention.is_dense else [f"{percent(attention.sparsity)} by {attention.selector}"]
    lossy += [f"{one} KV" for one in formats if one is not KvFormat.NATIVE]
    lossy += [] if setting.weight_format is WeightFormat.NATIVE else [f"{setting.weight_format} weights"]
    return ", ".join(lossy)


def _accuracy(setting: Setting) -> str:
    """What leaving tokens out cost where it was measured; between two measurements, what lies between."""
    attention, access = setting.attention, setting.access
    keep = 1 - attention.sparsity
    measured = any(isclose(keep, share) for share in access.keep_shares)
    return (
        f"{percent(attention.sparsity)} sparsity changes the output: {attention.selector} had "
        f"{'' if measured else 'about '}{access.perplexity_ratio(keep):.3g} times the perplexity of dense attention "
        f"({'measured on' if measured else 'estimated from measurements on'}: {access.source})."
    )
