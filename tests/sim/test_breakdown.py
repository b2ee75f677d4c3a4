"""Where the seconds of a step go: everything adds up, and each wait is named."""

import numpy as np
import pytest
from hypothesis import given, settings

from builders import in_hbm, make_cost, make_machine, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.breakdown import CPU_WAIT, FETCH_WAIT, LAUNCH_WAIT, OUTPUT_LAYER, WRITE_WAIT, breakdown, totals
from sim.cost import CostModel
from sim.forecast import forecast
from sim.launches import decode_operations, end_operations
from sim.plan import Plan
from strategies import priced_plans

WAITS = {CPU_WAIT, FETCH_WAIT, LAUNCH_WAIT, WRITE_WAIT}


@settings(max_examples=100, deadline=None)
@given(priced_plans())
def test_parts_add_up_to_every_step_and_to_the_makespan(priced: tuple[Plan, CostModel]) -> None:
    plan, cost = priced
    found = forecast(plan, cost)
    for wave in found.waves:
        spent = breakdown(plan.setting, wave)

        assert sum(spent.values()) == pytest.approx(wave.step_s, rel=1e-6)
        assert all((seconds >= 0).all() for seconds in spent.values())
    whole = sum(
        plan.setting.wave_sizes.count(wave.sequences) * sum(totals(plan.setting, wave).values()) for wave in found.waves
    )
    assert whole == pytest.approx(found.outcome.makespan_s, rel=1e-6)


def waits_of(plan: Plan, cost: CostModel) -> set[str]:
    spent = breakdown(plan.setting, forecast(plan, cost).waves[0])
    return {kind for kind in WAITS if spent[kind].any()}


def test_with_all_in_hbm_nothing_waits() -> None:
    assert waits_of(in_hbm(make_setting()), make_cost()) == set()


def test_a_slow_link_makes_steps_wait_for_what_they_fetch() -> None:
    machine = make_machine(link_bytes_per_s=1.0)

    assert FETCH_WAIT in waits_of(newest_in_hbm(make_setting(machine=machine, output=6), slots=1), make_cost(machine))


def test_a_slow_cpu_makes_the_gpu_wait_for_its_attention() -> None:
    machine = make_machine(dram_bytes_per_s=1.0)
    plan = newest_in_hbm(make_setting(machine=machine, output=6, host_attention=True), slots=1)

    assert CPU_WAIT in waits_of(plan, make_cost(machine))


def test_a_slow_host_makes_steps_wait_for_its_launches() -> None:
    """Exact top-k is launched one by one, 100 s each: the step lasts as long as its layers take to launch."""
    plan = in_hbm(make_setting(Selector.TOPK, prompt=8, sparsity=0.5))
    slow, free = (forecast(plan, make_cost(host_operation_s=seconds)).waves[0] for seconds in (100.0, 0.0))

    waited = breakdown(plan.setting, slow)[LAUNCH_WAIT]
    layer = decode_operations(plan.setting, away=False)

    assert waits_of(plan, make_cost(host_operation_s=100.0)) == {LAUNCH_WAIT}
    assert waited[1:].tolist() == pytest.approx(
        (100 * (2 * layer.worth + end_operations(plan.setting, prefill=False).worth) - free.step_s[1:]).tolist()
    )


def test_the_output_layer_stands_by_itself() -> None:
    """512 bytes of head at 512 B/s."""
    spent = breakdown(in_hbm(make_setting()).setting, forecast(in_hbm(make_setting()), make_cost()).waves[0])

    assert np.array_equal(spent[OUTPUT_LAYER], np.ones(4))


def test_a_prefill_waits_for_what_it_writes_even_over_a_fast_link() -> None:
    """A token a second: 3 of 4 prompt tokens without a slot and one that leaves, in each of two layers."""
    setting = make_setting(prompt=4, output=3)
    spilled, held = (
        forecast(plan, make_cost()).waves[0] for plan in (newest_in_hbm(setting, slots=1), in_hbm(setting))
    )

    spent = breakdown(setting, spilled)

    assert spent[WRITE_WAIT][0] == 2 * 4
    assert spilled.step_s[0] == held.step_s[0] + 2 * 4
    assert not spent[CPU_WAIT].any()
