"""Plans with something to show, as the pages take them."""

import random
from dataclasses import replace
from typing import Any

from builders import in_hbm, make_homes, make_machine, make_model, make_setting, newest_in_hbm
from reports import Answer, Origin, Rival, Run, Stretch, Study, Sweep
from sim import catalogue
from sim.cost import CostModel
from sim.engine import simulate
from sim.forecast import forecast
from sim.measured import load_measured, measurements_file
from sim.outcome import Outcome, Utilisation
from sim.plan import Admission, Plan, Preemption, Recompute, WriteBack
from sim.profile import Profile
from sim.profile_files import SHIPPED, load_profile
from sim.spec import MachineSpec
from sim.trace import Trace, WaveTrace
from sim.verdict import Figures, Judged, Stratum, Verdict

STEPS = 12
MODEL = make_model(layers=3)


def three_phases() -> Plan:
    """Five sequences in waves of two: tokens go to the host from step 3 on, to their layer inputs from step 7 on."""
    machine = make_machine(hbm_bytes_per_s=1e6, link_bytes_per_s=2e5, flop_per_s=1e8, dram_bytes=10**8)
    setting = make_setting(
        batch=5,
        prompt=6,
        output=STEPS,
        concurrency=2,
        machine=machine,
        model=MODEL,
        recompute=Recompute.ACTIVATIONS_HOST,
        write_back=WriteBack.AT_EVICTION,
        kv_budget_bytes=20_000,
    )
    activations = [max(0, step - 6) for step in range(STEPS)]
    off_hbm = [max(0, 4 * (step - 2) // 3) for step in range(STEPS)]
    host_kv = [off - inputs for off, inputs in zip(off_hbm, activations, strict=True)]
    hbm = [6 + step - off for step, off in enumerate(off_hbm)]
    return Plan(setting=setting, homes=make_homes(hbm, host_kv=host_kv, activations=activations))


def continuous() -> Plan:
    """Six sequences that enter page by page into room for two and a half."""
    page_bytes = 16 * MODEL.layers * 64
    setting = make_setting(
        batch=6,
        prompt=6,
        output=STEPS + 12,
        machine=make_machine(hbm_bytes_per_s=1e6, link_bytes_per_s=2e5, flop_per_s=1e8, dram_bytes=10**8),
        model=MODEL,
        admission=Admission.CONTINUOUS,
        preemption=Preemption.SWAP,
        kv_budget_bytes=5 * page_bytes,
    )
    return in_hbm(setting)


def large() -> Plan:
    """512 steps of 40 layers, with traffic both ways."""
    gpu = catalogue.gpu("a100-40g")
    machine = MachineSpec(name=gpu.name, gpu=gpu, host=catalogue.host())
    setting = make_setting(
        batch=8,
        prompt=128,
        output=512,
        machine=machine,
        model=catalogue.model("opt-13b"),
        kv_budget_bytes=2**34,
    )
    return newest_in_hbm(setting, slots=300)


def make_study(plan: Plan, **changes: Any) -> Study:
    """``plan`` simulated on its machine's nominal profile, with a line of each thing that the planner says."""
    cost = CostModel(machine=plan.setting.machine, profile=Profile.nominal(plan.setting.machine))
    given = {
        "plan": plan,
        "cost": cost,
        "priced": forecast(plan, cost),
        "simulated": Run(name="simulated", trace=simulate(plan, cost, ops=True)),
        "answer": make_answer(),
        "origin": Origin(versions=(("kvplan", "0"),), commands=("planner solve", "planner report"), solved="today"),
    }
    return Study(**(given | changes))


def measured_study(plan: Plan, **changes: Any) -> Study:
    """``plan`` on a profile that was measured, with its measurements and a campaign."""
    file = SHIPPED / "h100-80g-sxm.json"
    cost = CostModel(machine=plan.setting.machine, profile=load_profile(file))
    given = {"cost": cost, "raw": load_measured(measurements_file(file)), "verdict": make_verdict()}
    return make_study(plan, **(given | changes))


def make_verdict(**changes: Any) -> Verdict:
    """A plan of each kind and one more, the worst first; one more could not be run, and three wait."""
    kinds = [*Stratum, Stratum.LINK]
    plans = [_judged(kind, place, 1.0 + 0.2 * place * (-1) ** place) for place, kind in enumerate(kinds, 1)]
    given = {
        "gpu": "h100-80g-sxm",
        "profile": "measured",
        "profile_hash": "sha256:0",
        "seed": 1,
        "waiting": 3,
        "plans": tuple(sorted(plans, key=lambda one: -abs(one.makespan))),
        "failed": (("model=opt-13b batch=1 prompt=1 output=1", "out of memory"),),
    }
    return Verdict(**(given | changes))


def _judged(stratum: Stratum, place: int, measured_s: float) -> Judged:
    said_s = 0.9 + 0.1 * place
    simulated, measured = (
        Figures(
            makespan_s=seconds,
            ttft_s=0.1,
            tpot_p50_s=0.01,
            tpot_p95_s=0.02,
            moved_bytes=0.0,
            peak_hbm_bytes=2**30,
            step_s=(0.1, 0.01),
        )
        for seconds in (said_s, abs(measured_s) + 0.1)
    )
    return Judged(
        recipe=f"model=opt-1.3b batch={place} prompt=64 output=32 selector=swa keep=10 hbm=50 recompute=tokens",
        stratum=stratum,
        measured=measured,
        simulated=simulated,
        makespan=simulated.makespan_s / measured.makespan_s - 1,
        ttft=0.0,
        tpot_p50=None,
        tpot_p95=None,
        moved=None,
        peak_hbm=None,
        roofline=0.5,
        explained_by="prefill",
    )


def make_answer(**changes: Any) -> Answer:
    given = {
        "question": "tiny on card",
        "choices": (("attention", "dense"),),
        "losses": ("Lossless.",),
        "stretches": (Stretch(name="gpu", first_step=0, last_step=3, seconds=2.0, limit="GPU: weights, 81 %"),),
        "stretches_of": "the whole batch",
        "sure": ("optimal",),
        "worth": (("GiB of HBM", 12.5),),
    }
    return Answer(**(given | changes))


def make_rivals() -> tuple[Rival, ...]:
    """Two optima, a lossless and a lossy rival, and one that does not fit."""
    common = {"reason": None, "footnote": "a note"}
    return (
        Rival(policy="optimum", lossless=False, given_up="int8 KV", outcome=make_outcome(200.0), **common),
        Rival(policy="optimum-lossless", lossless=True, given_up="", outcome=make_outcome(120.0), **common),
        Rival(policy="flexgen", lossless=True, given_up="", outcome=make_outcome(80.0), **common),
        Rival(policy="alisa", lossless=False, given_up="80 % by swa", outcome=make_outcome(160.0), **common),
        Rival(policy="zero", lossless=True, given_up="", outcome=None, reason="out of memory", footnote="a note"),
    )


def make_outcome(tokens_per_s: float) -> Outcome:
    return Outcome(
        makespan_s=10.0,
        tokens_per_s=tokens_per_s,
        ttft_s=0.5,
        tpot_s=0.02,
        peak_hbm_bytes=2**34,
        peak_host_bytes=2**30,
        h2d_bytes=2**31,
        d2h_bytes=2**29,
        utilisation=Utilisation(gpu=0.9, h2d=0.5, d2h=0.1),
    )


def as_if_measured(trace: Trace, seed: int = 1) -> Trace:
    """The same run with every step somewhat longer or shorter."""
    rng = random.Random(seed)
    waves = tuple(_stretched(wave, [rng.uniform(0.9, 1.3) for _ in wave.step_end_s]) for wave in trace.waves)
    return replace(trace, source="measured on a bench", waves=waves)


def _stretched(wave: WaveTrace, factors: list[float]) -> WaveTrace:
    old, new = [0.0, *wave.step_end_s], [0.0]
    for step, factor in enumerate(factors):
        new.append(new[-1] + factor * (old[step + 1] - old[step]))

    def at(seconds: float, step: int) -> float:
        return new[step] + factors[step] * (seconds - old[step])

    spans = tuple(one._replace(start_s=at(one.start_s, one.step), end_s=at(one.end_s, one.step)) for one in wave.spans)
    return replace(wave, spans=spans, step_end_s=tuple(new[1:]))


def make_sweep(**changes: Any) -> Sweep:
    """Two GPUs by three batches by two sparsities; one point has no plan."""
    rows = [
        {
            "gpu": gpu,
            "batch": batch,
            "sparsity": sparsity,
            "tokens_per_s": speed * batch**0.5 * (1 + sparsity),
            "tpot_s": batch**0.7 / speed,
            "ttft_s": 0.1 * batch,
            "peak_hbm_bytes": (20 + batch) * 2**30,
            "plan": f"{batch} at once",
            "reason": None,
        }
        for gpu, speed in (("slow", 100.0), ("fast", 300.0))
        for batch in (4, 16, 8)
        for sparsity in (0.0, 0.8)
    ]
    missing = dict.fromkeys(("tokens_per_s", "tpot_s", "ttft_s", "peak_hbm_bytes", "plan")) | {"reason": "HBM is short"}
    rows[3] |= missing
    given = {"title": "What if", "question": "a grid", "fields": ("gpu", "batch", "sparsity"), "rows": tuple(rows)}
    return Sweep(**(given | changes))
