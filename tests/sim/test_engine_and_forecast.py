"""Event by event or in closed form: the same outcome for any plan, over every option and every regime."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, seed, settings

from builders import make_cost, make_machine, make_model, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.cost import CostModel
from sim.engine import simulate
from sim.forecast import forecast
from sim.kv import KvFormat
from sim.outcome import Outcome
from sim.plan import Admission, Mechanism, Placement, Plan, Preemption, Recompute, WriteBack
from sim.spec import DType, WeightFormat
from sim.trace import Resource, Span, WaveTrace
from strategies import any_priced_plans, continuous_plans, plans, priced_plans

BATCHES = [  # of 30 plans each: within one, hypothesis draws much that is alike
    *(plans(selector) for selector in Selector for _ in range(3)),
    *(plans(Selector.DENSE) for _ in range(4)),
    *(plans(selector) for selector in (Selector.TOPK, Selector.PAGES) for _ in range(4)),  # guesses are seldom long
    *(continuous_plans() for _ in range(4)),
    *(continuous_plans((Preemption.SWAP,)) for _ in range(8)),  # few are so tight that a sequence must step back
]
SELDOM = 5  # every option and regime is met at least so often

OPTIONS = {
    *(f"selector {name}" for name in Selector),
    *(f"placement {name}" for name in Placement),
    *(f"write_back {name}" for name in WriteBack),
    *(f"recompute {name}" for name in Recompute),
    *(f"fetch_by {name}" for name in Mechanism),
    *(f"admission {name}" for name in Admission),
    *(f"preemption {name}" for name in Preemption),
    *(f"dtype {name}" for name in DType),
    *(f"weight_format {name}" for name in WeightFormat),
    *(f"kv_format.gpu {name}" for name in KvFormat),
    *(f"kv_format.host {name}" for name in KvFormat),
    *("dead tokens dropped", "dead tokens kept", "host attention", "weights streamed", "no guess", "guess"),
    *("prefetch deeper than 1", "one wave", "waves with a rest", "one output token", "one layer", "two layers"),
}
HOMES = {"tokens on the host", "tokens kept as inputs", "prefix forwarded again", "copies"}
REGIMES = {
    *(f"step ends with {name}" for name in ("gpu", "h2d", "d2h", "launch")),
    *("all in HBM", "GPU never waits", "GPU waits for a fetch", "GPU waits for the CPU", "recall exposed"),
    *("guess hidden", "guess longer than its layer", "both directions at once", "write-backs trail"),
    *("one by one", "swapped out"),
}


def test_engine_and_fast_path_agree_over_every_option_and_regime() -> None:
    census: Counter[str] = Counter()

    def agree(priced: tuple[Plan, CostModel]) -> None:
        plan, cost = priced
        trace = simulate(plan, cost)
        census.update({*options_of(plan), *homes_of(plan), *regimes_of(trace.waves[0])})
        if plan.setting.admission is Admission.CONTINUOUS:
            census.update(admissions_of(trace.waves[0]))
        assert_same(trace.outcome, forecast(plan, cost).outcome)

    for number, strategy in enumerate(BATCHES):
        tried = given(priced_plans(strategy))(agree)
        seed(number)(settings(max_examples=30, database=None, deadline=None)(tried))()
    assert {name: census[name] for name in OPTIONS | HOMES | REGIMES if census[name] < SELDOM} == {}


@settings(max_examples=100, deadline=None)
@given(any_priced_plans())
def test_recording_single_operations_changes_no_time(priced: tuple[Plan, CostModel]) -> None:
    by_layer, by_op = simulate(*priced), simulate(*priced, ops=True)

    assert_same(by_op.outcome, by_layer.outcome)


def test_at_full_size_they_agree_too() -> None:
    model = make_model(layers=40, hidden=64, heads=4, kv_heads=4)
    machine = make_machine(
        hbm_bytes_per_s=1e9, flop_per_s=1e11, link_bytes_per_s=2e7, launch_s=2e-6, dram_bytes_per_s=1e8
    )
    setting = make_setting(prompt=128, output=128, batch=8, concurrency=3, model=model, machine=machine)
    plan, cost = newest_in_hbm(setting, 150), make_cost(machine, link_duplex_efficiency=0.88, copy_floor_s=1e-5)

    assert_same(simulate(plan, cost).outcome, forecast(plan, cost).outcome)


def assert_same(run: Outcome, priced: Outcome) -> None:
    """Times and rates within 1e-9 of each other; rounded bytes within one."""
    assert (run.tpot_s is None) == (priced.tpot_s is None)
    for name in ("makespan_s", "tokens_per_s", "ttft_s", "tpot_s"):
        assert (getattr(run, name) or 0.0) == pytest.approx(getattr(priced, name) or 0.0, rel=1e-9, abs=0), name
    for name in ("peak_hbm_bytes", "peak_host_bytes", "h2d_bytes", "d2h_bytes"):
        assert getattr(run, name) == pytest.approx(getattr(priced, name), rel=1e-9, abs=1), name
    for name in ("gpu", "h2d", "d2h"):
        busy, share = getattr(run.utilisation, name), getattr(priced.utilisation, name)
        assert busy == pytest.approx(share, rel=1e-9, abs=1e-9), name


def options_of(plan: Plan) -> Iterator[str]:
    setting = plan.setting
    yield f"selector {setting.attention.selector}"
    for name in (
        "placement",
        "write_back",
        "recompute",
        "fetch_by",
        "admission",
        "preemption",
        "dtype",
        "weight_format",
    ):
        yield f"{name} {getattr(setting, name)}"
    yield f"kv_format.gpu {setting.kv_format.gpu}"
    yield f"kv_format.host {setting.kv_format.host}"
    yield "dead tokens dropped" if any(setting.token_counts.dead) else "dead tokens kept"
    if setting.attention.selector.recalls:
        yield "no guess" if setting.guess_hits is None else "guess"
    flags = {
        "host attention": setting.host_attention,
        "weights streamed": setting.weights_on_host > 0,
        "prefetch deeper than 1": setting.prefetch_layers > 1,
        "one wave": len(setting.wave_sizes) == 1,
        "waves with a rest": len(set(setting.wave_sizes)) == 2,
        "one output token": setting.workload.output_tokens == 1,
        "one layer": setting.model.layers == 1,
        "two layers": setting.model.layers == 2,
    }
    yield from (name for name, holds in flags.items() if holds)


def homes_of(plan: Plan) -> Iterator[str]:
    homes = plan.homes
    columns = {
        "tokens on the host": homes.host_kv,
        "tokens kept as inputs": homes.activations,
        "prefix forwarded again": homes.dropped if plan.setting.recompute is Recompute.TOKENS else (),
        "copies": homes.copies,
    }
    yield from (name for name, column in columns.items() if any(column))


def regimes_of(wave: WaveTrace) -> Iterator[str]:
    """What bounds the steps of ``wave``, read off its spans."""
    spans = {resource: [span for span in wave.spans if span.resource is resource] for resource in Resource}
    for end_s in wave.step_end_s:
        enders = {span.resource for span in wave.spans if span.end_s == end_s}
        yield from (f"step ends with {resource}" for resource in enders if len(enders) == 1)
    if not spans[Resource.H2D] and not spans[Resource.D2H]:
        yield "all in HBM"
    waits = list(gpu_waits(spans))
    yield from waits or ["GPU never waits"]
    yield from recalls(spans)
    if any(overlap(a, b) for a in spans[Resource.H2D] for b in spans[Resource.D2H]):
        yield "both directions at once"
    heads = {span.step: span.end_s for span in spans[Resource.GPU] if span.name == "head"}
    if any(span.layer and span.start_s > heads[span.step] for span in spans[Resource.D2H]):
        yield "write-backs trail"


def admissions_of(wave: WaveTrace) -> Iterator[str]:
    if len(wave.served) > 1:
        yield "one by one"
    if any(span.resource is Resource.D2H for span in wave.spans):
        yield "swapped out"


def gpu_waits(spans: dict[Resource, list[Span]]) -> Iterator[str]:
    cpu_ends = {span.end_s for span in spans[Resource.CPU]}
    fetch_ends = {span.end_s for span in spans[Resource.H2D]}
    before = 0.0
    for span in spans[Resource.GPU]:
        if span.start_s > before and span.name == "attend" and span.start_s in fetch_ends:
            yield "GPU waits for a fetch"
        if span.start_s > before and span.name == "rest" and span.start_s in cpu_ends:
            yield "GPU waits for the CPU"
        before = span.end_s


def recalls(spans: dict[Resource, list[Span]]) -> Iterator[str]:
    corrected = [span for span in spans[Resource.H2D] if span.name == "correct"]
    if not corrected:
        return
    yield "recall exposed"
    layer_ends = {(span.step, span.layer): span.end_s for span in spans[Resource.GPU] if span.name == "rest"}
    for span in spans[Resource.H2D]:
        if span.name == "fetch" and span.layer:
            late = span.end_s > layer_ends[span.step, span.layer - 1]
            yield "guess longer than its layer" if late else "guess hidden"


def overlap(one: Span, other: Span) -> bool:
    return one.start_s < other.end_s and other.start_s < one.end_s
