"""Hosts shared with others change their pace: what is launched takes as many times as long, and nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from builders import make_cost, make_machine, make_profile, make_setting
from sim.attention import Selector
from sim.capture import captures_prefill, is_captured
from sim.cost import CostModel
from sim.launches import begin_operations
from sim.layer_prices import at_pace, layer_prices
from sim.plan import Admission, Recompute, Setting
from sim.predict import predictable, usual_launch_s
from sim.profile import Evidence, Fingerprint, Measurement, Profile
from sim.spec import CPU_LINK, MachineSpec

USUAL_S = 4e-6
FINGERPRINT = Fingerprint(
    gpu="card", device="card", cpu="cpu", cores=2, driver="1", torch="2", clocks="-", date="2026-11-25"
)
DENSE = {"machine": make_machine(launch_s=1.0)}
EAGER = {"selector": Selector.TOPK, "prompt": 8, "sparsity": 0.5, "machine": make_machine(launch_s=1.0)}


def on_a_cpu() -> MachineSpec:
    machine = make_machine(launch_s=1.0)
    return replace(machine, gpu=replace(machine.gpu, link=replace(machine.gpu.link, name=CPU_LINK)))


def taken_with(launch_s: float) -> Profile:
    return replace(
        make_profile(host_operation_s=3.0, step_overhead_s=5.0, kernels_per_layer=7.0),
        evidence=Evidence(fingerprint=FINGERPRINT, launch_s=launch_s),
    )


@pytest.mark.parametrize(
    "setting",
    [
        make_setting(**DENSE),  # replayed as a whole
        make_setting(**DENSE, recompute=Recompute.ACTIVATIONS_HOST),  # in pieces, where some is kept away
        make_setting(**EAGER),
        make_setting(**(EAGER | {"machine": on_a_cpu()})),
    ],
)
def test_half_the_pace_is_twice_the_time_of_each_operation_that_the_host_launches(setting: Setting) -> None:
    usual, slow = (
        layer_prices(make_cost(setting.machine, host_operation_s=seconds, kernels_per_layer=3.0), setting, 1)
        for seconds in (2.0, 4.0)
    )

    assert usual.prefill_launched_s < slow.prefill_launched_s
    assert at_pace(usual, 2.0) == slow
    assert at_pace(slow, 0.5) == usual
    assert at_pace(usual, 1.0) == usual


def test_a_wave_begins_with_operations_of_a_gpus_host_few_where_its_prefill_is_a_graph() -> None:
    """A captured step whose prefill is not one, in two passes, begins as any other. Under continuous admission no
    wave begins; a CPU has nothing to wait for.
    """
    captured, eager = make_setting(**DENSE), make_setting(**EAGER)
    in_passes = make_setting(**DENSE, batch=5, prompt=2000)
    assert [is_captured(setting) for setting in (captured, in_passes, eager)] == [True, True, False]
    assert [captures_prefill(setting) for setting in (captured, in_passes, eager)] == [True, False, False]

    assert [begin_operations(setting) for setting in (captured, in_passes, eager)] == [16, 90, 90]
    assert begin_operations(replace(captured, admission=Admission.CONTINUOUS)) == 0
    assert begin_operations(replace(eager, machine=on_a_cpu())) == 0


def measurement(family: str, batch: int, launch_s: float, **words: Any) -> Measurement:
    """Eager steps of a small model."""
    said = {"model": "opt-125m/2", "batch": batch, "prompt": 16, "output": 6, "selector": "topk", "keep": 50} | words
    case = " ".join(f"{name}={value}" for name, value in said.items())
    return Measurement(family=family, case=case, seconds=1.0, low_s=1.0, high_s=1.0, samples=3, launch_s=launch_s)


def priced(measurements: list[Measurement], operation_s: float) -> list[float]:
    """On a host so slow that steps take what it takes to launch them."""
    machine = make_machine(hbm_bytes_per_s=1e12, link_bytes_per_s=1e10)
    cost = CostModel(machine=machine, profile=make_profile(host_operation_s=operation_s))
    return [predict(cost) for _, predict in predictable(measurements, machine)]


@pytest.mark.parametrize("family", ["decode", "prefill"])
def test_a_measurement_is_predicted_at_the_pace_that_it_was_taken_at(family: str) -> None:
    """The one taken at twice the usual, as on a host of half the pace; one whose pace was not looked at, as usual."""
    paces = [USUAL_S, 2 * USUAL_S, USUAL_S, 0.0, USUAL_S]
    paced = [measurement(family, batch, launch_s) for batch, launch_s in enumerate(paces, 1)]
    plain = [replace(one, launch_s=0.0) for one in paced]

    usual, slow = priced(plain, 1e-3), priced(plain, 2e-3)

    assert slow[1] > 1.9 * usual[1]
    assert priced(paced, 1e-3) == pytest.approx([usual[0], slow[1], *usual[2:]])


def test_the_usual_pace_is_the_lower_quartile_of_those_that_were_looked_at() -> None:
    paces = [0.0, 0.0, 0.0, USUAL_S, 9 * USUAL_S, 2 * USUAL_S]

    assert usual_launch_s([measurement("decode", 1, launch_s) for launch_s in paces]) == 1.5 * USUAL_S
    assert usual_launch_s([measurement("decode", 1, 0.0)]) == 0.0
    assert usual_launch_s([]) == 0.0
