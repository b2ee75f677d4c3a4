"""What holds for any plan: capacity, conservation, bounds on the makespan, determinism, and that more is never slower."""

from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import in_hbm, make_cost, make_homes, make_machine, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.capture import keeps_open_group
from sim.cost import CostModel
from sim.engine import CapacityExceeded, simulate
from sim.flows import flows_of, home_columns
from sim.forecast import forecast, over_capacity
from sim.plan import Placement, Plan, Recompute, WriteBack
from sim.spec import MachineSpec
from sim.trace import Resource, Span, Tier, Trace, WaveTrace
from sim.workload import Workload
from strategies import any_priced_plans, continuous_plans, plans, priced_plans

ANY = settings(max_examples=150, deadline=None)


def with_room(plan: Plan, *, hbm_bytes: int | None = None, host_bytes: int | None = None) -> Plan:
    """``plan`` on a machine with just so much for KV in HBM, or just so much host memory."""
    setting = plan.setting
    if hbm_bytes is not None:
        setting = replace(setting, kv_budget_bytes=hbm_bytes)
    if host_bytes is not None:
        host = replace(setting.machine.host, dram_bytes=host_bytes, usable_share=1.0)
        setting = replace(setting, machine=replace(setting.machine, host=host))
    return replace(plan, setting=setting)


def peak_of(trace: Trace, tier: Tier) -> int:
    return ceil(max(wave.peak_bytes(tier) for wave in trace.waves))


@ANY
@given(priced_plans())
def test_pools_hold_what_fits_and_refuse_one_byte_less(priced: tuple[Plan, CostModel]) -> None:
    plan, cost = priced
    trace = simulate(plan, cost)
    hbm_bytes = peak_of(trace, Tier.HBM)
    host_bytes = trace.static_host_bytes + peak_of(trace, Tier.HOST)

    exact = simulate(with_room(plan, hbm_bytes=hbm_bytes, host_bytes=host_bytes), cost)

    assert exact == trace
    assert all(
        level.size_bytes <= (hbm_bytes if level.tier is Tier.HBM else host_bytes - trace.static_host_bytes)
        for wave in exact.waves
        for level in wave.levels
    )
    if hbm_bytes:
        refuse_at_first_overflow(with_room(plan, hbm_bytes=hbm_bytes - 1), cost, trace, Tier.HBM, hbm_bytes - 1)
    if peak_of(trace, Tier.HOST):
        room = peak_of(trace, Tier.HOST) - 1
        refuse_at_first_overflow(with_room(plan, host_bytes=host_bytes - 1), cost, trace, Tier.HOST, room)


def refuse_at_first_overflow(plan: Plan, cost: CostModel, ample: Trace, tier: Tier, room: int) -> None:
    step, needed = next(
        (level.step, level.size_bytes)
        for wave in ample.waves
        for level in wave.levels
        if level.tier is tier and level.size_bytes > room
    )
    message = f"{tier} overflows at step {step}: {ceil(needed):,} bytes of KV, {ceil(needed - room):,} more than"

    with pytest.raises(CapacityExceeded, match=f"^{message}"):
        simulate(plan, cost)

    over = over_capacity(forecast(plan, cost))[0 if tier is Tier.HBM else 1]
    assert over[step] > 0
    assert not (over[:step] > 0).any()


@ANY
@given(any_priced_plans())
def test_the_fast_path_and_the_engine_see_the_same_levels(priced: tuple[Plan, CostModel]) -> None:
    trace, priced_waves = simulate(*priced), forecast(*priced).waves

    for simulated, wave in zip(trace.waves, priced_waves, strict=True):
        for tier, column in ((Tier.HBM, wave.load.held.hbm), (Tier.HOST, wave.load.held.host)):
            levels = [level.size_bytes for level in simulated.levels if level.tier is tier]
            assert levels == column.tolist()


@ANY
@given(priced_plans(continuous_plans()))
def test_one_by_one_never_overflows_either(priced: tuple[Plan, CostModel]) -> None:
    plan, _ = priced
    (wave,) = simulate(*priced).waves

    assert wave.peak_bytes(Tier.HBM) <= plan.setting.kv_budget_bytes
    assert wave.peak_bytes(Tier.HOST) <= plan.setting.machine.host.usable_bytes
    assert sum(some.sequences for some in wave.served) == plan.setting.workload.batch


@ANY
@given(plans(Selector.DENSE))
def test_dense_attention_reaches_every_token_once_a_step(plan: Plan) -> None:
    homes = home_columns(plan.homes)
    flows = flows_of(plan, homes)

    fetched = flows.fetched_kv
    if keeps_open_group(plan.setting):  # of each token on the host a part, and the rest is in HBM
        assert (fetched <= homes.host_kv).all()
        fetched = homes.host_kv
    reached = homes.hbm + fetched + flows.reprojected + flows.forwarded + flows.host_attended

    assert reached[1:].tolist() == flows.cached[1:].tolist() == flows.kept[1:].tolist()
    assert (flows.fetched_kv[0], flows.reprojected[0], flows.forwarded[0], flows.host_attended[0]) == (0, 0, 0, 0)


@ANY
@given(plans())
def test_every_step_reaches_no_more_than_it_keeps(plan: Plan) -> None:
    """Nor more than has no copy, unless it is known how old new picks are: those take the slots of copies that are left out."""
    homes, setting = home_columns(plan.homes), plan.setting
    flows = flows_of(plan, homes)

    if not setting.attention.is_dense:
        moved = flows.fetched_kv + flows.reprojected
        recalled = setting.attention.selector.recalls and setting.placement is Placement.RESIDENT
        copies = 0 if recalled and setting.access.living_ages else homes.copies
        assert (moved <= flows.selected + 1e-9).all()
        assert (moved <= homes.host_kv + homes.activations - copies + 1e-9).all()
        assert (flows.forwarded == 0).all()
        assert (flows.host_attended == 0).all()
    assert (flows.kept <= flows.cached).all()


@ANY
@given(plans(Selector.DENSE))
def test_tokens_are_written_when_they_leave_hbm_for_the_host(plan: Plan) -> None:
    """One token after the other: its home is HBM in one row and host memory in the next."""
    homes, flows = plan.homes, flows_of(plan, home_columns(plan.homes))
    rows = list(zip(homes.dropped, homes.activations, homes.host_kv, strict=True))
    homed = [set(range(gone + kept, gone + kept + near)) for gone, kept, near in rows]
    outside = [set(range(sum(row))) for row in rows]
    written = [len(after - before) for before, after in zip(outside, homed[1:], strict=False)] + [0]
    written[0] += len(homed[0])

    if plan.setting.write_back is WriteBack.AT_EVICTION:
        assert flows.written_kv.tolist() == written
    else:
        assert flows.written_kv.tolist() == [homes.hbm[0] + homes.host_kv[0]] + [1] * (homes.steps - 1)


@ANY
@given(any_priced_plans())
def test_the_makespan_lies_between_the_busiest_resource_and_all_in_turn(priced: tuple[Plan, CostModel]) -> None:
    """Never is everything idle: what a stream waits for, another one is doing."""
    for wave in simulate(*priced).waves:
        busy_s = [wave.busy_s(resource) for resource in Resource]

        assert max(busy_s) <= wave.seconds * (1 + 1e-9)
        assert wave.seconds <= sum(busy_s) * (1 + 1e-9)


@ANY
@given(any_priced_plans())
def test_streams_do_one_thing_at_a_time_in_a_lawful_order(priced: tuple[Plan, CostModel]) -> None:
    plan, _ = priced
    for wave in simulate(*priced).waves:
        spans = {resource: [span for span in wave.spans if span.resource is resource] for resource in Resource}
        for stream in spans.values():
            assert all(before.end_s <= after.start_s for before, after in pairwise(stream))
            assert all(0 <= span.start_s <= span.end_s <= wave.seconds for span in stream)
        assert_causes_precede(wave, spans)
        layers, steps = plan.setting.model.layers, len(wave.step_end_s)
        assert [(s.step, s.layer) for s in spans[Resource.GPU] if s.name == "attend"] == [
            (step, layer) for step in range(steps) for layer in range(layers)
        ]


def assert_causes_precede(wave: WaveTrace, spans: dict[Resource, list[Span]]) -> None:
    """Attention follows its fetch, correction its query, a write-back its layer; a step ends with its last span."""
    gpu = {(span.name, span.step, span.layer): span for span in spans[Resource.GPU]}
    for span in spans[Resource.H2D]:
        if span.step < len(wave.step_end_s):
            assert span.end_s <= gpu["attend", span.step, span.layer].start_s
        if span.name == "correct":
            assert span.start_s >= gpu["query", span.step, span.layer].end_s
    for span in spans[Resource.D2H]:
        assert span.start_s >= gpu["rest", span.step, span.layer].end_s
        assert span.end_s <= wave.step_end_s[span.step]
    for step, end_s in enumerate(wave.step_end_s[:-1]):
        assert gpu["query", step + 1, 0].start_s == end_s


@settings(max_examples=50, deadline=None)
@given(any_priced_plans())
def test_the_same_plan_gives_the_same_trace(priced: tuple[Plan, CostModel]) -> None:
    assert simulate(*priced) == simulate(*priced)
    assert forecast(*priced).outcome == forecast(*priced).outcome


FASTER = {
    "HBM bandwidth": lambda machine, by: _gpu(machine, hbm_bytes_per_s=machine.gpu.hbm_bytes_per_s * by),
    "arithmetic": lambda machine, by: _gpu(
        machine,
        fp16_flop_per_s=machine.gpu.fp16_flop_per_s * by,
        fp32_flop_per_s=machine.gpu.fp32_flop_per_s * by,
    ),
    "link": lambda machine, by: _gpu(
        machine, link=replace(machine.gpu.link, bytes_per_s=machine.gpu.link.bytes_per_s * by)
    ),
    "launches": lambda machine, by: _gpu(machine, launch_s=machine.gpu.launch_s / by),
    "DRAM bandwidth": lambda machine, by: _host(machine, dram_bytes_per_s=machine.host.dram_bytes_per_s * by),
    "CPU": lambda machine, by: _host(machine, flop_per_s=machine.host.flop_per_s * by),
}


def _gpu(machine: MachineSpec, **changes: object) -> MachineSpec:
    return replace(machine, gpu=replace(machine.gpu, **changes))  # type: ignore[arg-type]


def _host(machine: MachineSpec, **changes: object) -> MachineSpec:
    return replace(machine, host=replace(machine.host, **changes))  # type: ignore[arg-type]


@settings(max_examples=400, deadline=None)
@given(any_priced_plans(), st.sampled_from(sorted(FASTER)), st.sampled_from((1.001, 1.5, 10.0, 1e4)))
def test_more_of_any_resource_is_never_slower(priced: tuple[Plan, CostModel], what: str, by: float) -> None:
    plan, cost = priced
    machine = FASTER[what](plan.setting.machine, by)

    slow = forecast(plan, cost).outcome
    fast = forecast(
        replace(plan, setting=replace(plan.setting, machine=machine)), replace(cost, machine=machine)
    ).outcome

    for name in ("makespan_s", "ttft_s", "tpot_s"):
        assert (getattr(fast, name) or 0) <= (getattr(slow, name) or 0) * (1 + 1e-12), name


@pytest.mark.parametrize(
    ("what", "slow"),
    [
        ("HBM bandwidth", {"hbm_bytes_per_s": 1e3}),
        ("arithmetic", {"flop_per_s": 1e3}),
        ("link", {"link_bytes_per_s": 1e3}),
        ("launches", {"launch_s": 1.0}),
        ("DRAM bandwidth", {"dram_bytes_per_s": 1e3}),
        ("CPU", {"host_flop_per_s": 1e3}),
    ],
)
def test_twice_the_scarce_resource_takes_half_the_time(what: str, slow: dict[str, float]) -> None:
    """So that the property above cannot hold by ignoring one."""
    ample = {"hbm_bytes_per_s": 1e15, "link_bytes_per_s": 1e15, "dram_bytes_per_s": 1e15}
    machine = make_machine(**(ample | slow))
    on_cpu = what in ("DRAM bandwidth", "CPU")
    plan = newest_in_hbm(make_setting(machine=machine, host_attention=on_cpu), slots=1)

    before = forecast(plan, make_cost(machine, kernels_per_layer=1)).outcome
    after = forecast(plan, make_cost(FASTER[what](machine, 2.0), kernels_per_layer=1)).outcome

    assert after.makespan_s == pytest.approx(before.makespan_s / 2)


@settings(max_examples=50, deadline=None)
@given(priced_plans())
def test_more_memory_changes_nothing_for_a_plan_that_fits(priced: tuple[Plan, CostModel]) -> None:
    plan, cost = priced

    assert simulate(with_room(plan, hbm_bytes=2**63, host_bytes=2**63), cost) == simulate(plan, cost)


@ANY
@given(priced_plans())
def test_waves_add_up(priced: tuple[Plan, CostModel]) -> None:
    plan, cost = priced
    sizes = plan.setting.wave_sizes
    alone = {size: forecast(_one_wave(plan, size), cost).outcome for size in sizes}

    whole = forecast(plan, cost).outcome

    assert sum(sizes) == plan.setting.workload.batch
    assert whole.makespan_s == pytest.approx(sum(alone[size].makespan_s for size in sizes))
    assert whole.h2d_bytes == pytest.approx(sum(alone[size].h2d_bytes for size in sizes), abs=len(sizes))
    assert whole.d2h_bytes == pytest.approx(sum(alone[size].d2h_bytes for size in sizes), abs=len(sizes))
    assert whole.peak_host_bytes == max(outcome.peak_host_bytes for outcome in alone.values())
    waited_s, first_s = 0.0, 0.0
    for size in sizes:
        first_s += size * (waited_s + alone[size].ttft_s)
        waited_s += alone[size].makespan_s
    assert whole.ttft_s == pytest.approx(first_s / sum(sizes))


def _one_wave(plan: Plan, size: int) -> Plan:
    work = plan.setting.workload
    alone = Workload(batch=size, prompt_tokens=work.prompt_tokens, output_tokens=work.output_tokens)
    return replace(plan, setting=replace(plan.setting, workload=alone, concurrency=size))


def test_a_host_that_is_one_byte_short_names_the_first_step() -> None:
    """2 layers x 64 bytes a token: 3 of 4 prompt tokens and the one that leaves in step 0, then one more a step."""
    plan = newest_in_hbm(make_setting(), slots=1)

    with pytest.raises(CapacityExceeded) as refusal:
        simulate(with_room(plan, host_bytes=5 * 128 - 1), make_cost())

    assert str(refusal.value) == "host overflows at step 1: 640 bytes of KV, 1 more than there is room for"


def test_an_hbm_pool_that_is_one_byte_short_names_the_first_step() -> None:
    with pytest.raises(CapacityExceeded) as refusal:
        simulate(with_room(in_hbm(make_setting()), hbm_bytes=6 * 128 - 1), make_cost())

    assert str(refusal.value) == "hbm overflows at step 2: 768 bytes of KV, 1 more than there is room for"


def test_tokens_that_move_on_from_the_host_make_room_for_written_ones() -> None:
    """The host keeps two tokens; from step 1 on one more is kept as inputs each step, and one leaves HBM."""
    setting = make_setting(recompute=Recompute.ACTIVATIONS_HOST)
    homes = make_homes((2, 2, 2, 2), host_kv=(2, 2, 2, 2), activations=(0, 1, 2, 3))

    flows = flows_of(Plan(setting=setting, homes=homes), home_columns(homes))

    assert flows.written_kv.tolist() == [2 + 1, 1, 1, 0]
    assert flows.written_inputs.tolist() == [3, 0, 0, 0]


@settings(max_examples=100, deadline=None)
@given(priced_plans())
def test_a_prefill_takes_its_layers_and_their_write_backs_in_turn(priced: tuple[Plan, CostModel]) -> None:
    """The GPU waits while the link is written to, so that no write-back of a prefill runs beside its work."""
    plan, cost = priced
    for wave in simulate(plan, cost).waves:
        on_gpu = [span for span in wave.spans if span.resource is Resource.GPU and span.step == 0]
        written = [span for span in wave.spans if span.resource is Resource.D2H and span.step == 0]

        assert not [one for one in written for other in on_gpu if overlap_s(one, other) > 0]
        ttft_s = sum(span.end_s - span.start_s for span in (*on_gpu, *written))
        assert wave.step_end_s[0] >= ttft_s * (1 - 1e-9)


def overlap_s(one: Span, other: Span) -> float:
    return min(one.end_s, other.end_s) - max(one.start_s, other.start_s)
