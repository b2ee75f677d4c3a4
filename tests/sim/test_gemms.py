"""Products of decode steps and of prompts: as measured where they were, else by their curve; what is launched between them.

The tiny model's matrices of 16 x 48, 16 x 16, 16 x 8 and 8 x 16 take 3, 1, 1/2 and 1/2 s, whatever the rows.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import in_hbm, make_cost, make_machine, make_model, make_products, make_profile, make_setting
from sim.capture import FUSED_ROWS, is_captured
from sim.cost import CostModel
from sim.flows import flows_of, home_columns
from sim.gemms import (
    LayerGemms,
    decoded_products_s,
    least_as_measured,
    least_products_s,
    least_read_s,
    product_rows,
    prompt_products_s,
)
from sim.layer import layer_times
from sim.layer_prices import decode_launch_s, layer_prices
from sim.plan import Setting
from sim.profile import MeasuredProduct, Profile
from sim.spec import DType, MachineSpec, ModelSpec, WeightFormat
from strategies import machines, models

FP16 = DType.FP16
CURVED = {"qkv": 3.0, "out": 1.0, "mlp": 1.0}


def measured(inputs: int, outputs: int, seconds: dict[int, float], dtype: DType = FP16) -> MeasuredProduct:
    return MeasuredProduct(
        inputs=inputs, outputs=outputs, dtype=dtype, rows=tuple(seconds), seconds=tuple(seconds.values())
    )


KNOWN = (
    measured(16, 48, {1: 6.0, 4: 12.0}),
    measured(16, 16, {1: 5.0}, DType.FP32),
    measured(16, 8, {2: 0.25}),
)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        (1, {"qkv": 6.0, "out": 1.0, "mlp": 0.25 + 0.5}),  # one of two matrices that a feed-forward multiplies
        (2, {"qkv": 9.0, "out": 1.0, "mlp": 0.25 + 0.5}),
        (
            4,
            {"qkv": 12.0, "out": 1.0, "mlp": 0.375 + 0.5},
        ),  # from the last on by the curve, once there are 4 times as many
        (8, {"qkv": 7.5, "out": 1.0, "mlp": 0.5 + 0.5}),
        (16, {"qkv": 3.0, "out": 1.0, "mlp": 0.5 + 0.5}),
    ],
)
def test_a_decode_steps_products_take_what_was_measured(rows: int, seconds: dict[str, float]) -> None:
    """Queries, keys and values 2 to 4 times their curve, by how often rows double; half of a feed-forward half of it."""
    found = decoded_products_s(make_cost(products=KNOWN), make_setting(), rows)

    assert found == pytest.approx(seconds, rel=1e-12)


def test_gate_and_up_are_one_matrix() -> None:
    """16 x 16 as the output's is, of which nothing else is known; with 8 x 16 behind it."""
    setting = make_setting(model=make_model(gated_mlp=True))
    cost = make_cost(products=(measured(16, 16, {1: 3.0}), measured(8, 16, {1: 1.0})))

    assert decoded_products_s(cost, setting, 1) == pytest.approx({"qkv": 3.0, "out": 3.0, "mlp": 3.0 + 1.0}, rel=1e-12)


def test_of_weights_that_are_widened_first_the_product_is_as_measured() -> None:
    setting = make_setting(weight_format=WeightFormat.INT8)

    widened = decoded_products_s(make_cost(products=KNOWN), setting, 1)

    by_curve, native = (decoded_products_s(make_cost(), one, 1) for one in (setting, make_setting()))
    assert native == CURVED
    assert by_curve["qkv"] > CURVED["qkv"]
    assert widened["qkv"] == pytest.approx(by_curve["qkv"] - 3.0 + 6.0, rel=1e-12)
    assert widened["out"] == by_curve["out"]


def test_prompts_are_priced_as_measured_the_head_and_what_is_projected_again_by_their_curves() -> None:
    """The head is a matrix of 16 x 16 too, and keys and values are projected again by 16 x 32."""
    plan = in_hbm(make_setting(output=2))
    slower = make_cost(
        products=(*make_products(make_cost(), make_model(), {1: 4.0, 4: 3.0}), measured(16, 32, {1: 100.0}))
    )

    plain, changed = (layer_prices(cost, plan.setting, 1) for cost in (make_cost(), slower))

    prompt = {name: 3 * plain.prefill[name] for name in CURVED}  # of 4 rows
    assert changed == replace(plain, qkv_s=4 * 3.0, out_s=4 * 1.0, mlp_s=4 * 1.0, prefill=plain.prefill | prompt)
    times = layer_times(changed, flows_of(plan, home_columns(plan.homes)), slower)
    assert [times.ops[name].tolist() for name in ("qkv", "out", "mlp")] == [[9, 12], [3, 4], [3, 4]]


def test_more_than_256_rows_of_a_captured_prompt_are_multiplied_as_a_multiple_of_128() -> None:
    rows = [1, 256, 257, 384, 385, 8192]
    assert [product_rows(count) for count in rows] == [1, 256, 384, 384, 512, 8192]
    assert product_rows(np.array(rows, dtype=np.float64)).tolist() == [1, 256, 384, 384, 512, 8192]

    machine = make_machine(flop_per_s=64.0)
    captured, eager = make_setting(machine=machine), make_setting(machine=machine, host_attention=True)
    assert is_captured(captured)
    assert not is_captured(eager)
    for setting, multiplied in ((captured, 384.0), (eager, 300.0)):
        found = prompt_products_s(make_cost(machine), setting, np.array([300.0]))
        curve = LayerGemms.of(make_cost(machine), setting).of_layer
        assert {name: seconds.tolist() for name, seconds in found.items()} == {
            name: [curve[name].at_one(multiplied)] for name in CURVED
        }


def test_what_no_pass_has_room_for_goes_one_pass_after_the_other() -> None:
    cost, setting = make_cost(make_machine(flop_per_s=64.0)), make_setting(machine=make_machine(flop_per_s=64.0))

    one, three = (prompt_products_s(cost, setting, np.array([rows]))["qkv"] for rows in (8192.0, 3 * 8192.0))

    assert three == pytest.approx(3 * one)


def test_widening_comes_besides_what_was_measured() -> None:
    """A product of 4 rows takes 3 times its curve; what is widened before it takes what it takes."""
    known = make_cost(products=make_products(make_cost(), make_model(), {4: 3.0}))
    setting = make_setting(weight_format=WeightFormat.INT8)

    curved, found = (prompt_products_s(cost, setting, np.array([4.0])) for cost in (make_cost(), known))

    assert found["qkv"] - curved["qkv"] == pytest.approx(2 * CURVED["qkv"])


def test_the_least_is_that_of_any_rows() -> None:
    """From 2 times at one row to a quarter at 16."""
    cost = make_cost(products=(measured(16, 48, {1: 6.0, 16: 0.75}),))

    assert least_as_measured(cost, make_model(), FP16) == pytest.approx(0.25)
    assert least_as_measured(cost, make_model(), DType.FP32) == 1.0
    assert least_as_measured(make_cost(), make_model(), FP16) == 1.0


def test_no_mixture_of_two_matrices_falls_below_the_least() -> None:
    """Up, twice as large as down, has half of the seconds where starting is all of them, and two thirds of many rows'.

    Measured at 1 and 128 rows, where both together take as their curves say or more; in between up, the faster one at first,
    gains weight.
    """
    model = make_model(hidden=64, intermediate=512, gated_mlp=True)
    bare = make_cost(make_machine(hbm_bytes_per_s=1e9, flop_per_s=1e9), product_setup_s=1e-3)
    up, down = (bare.gemm(*shape, FP16, WeightFormat.NATIVE) for shape in ((64, 1024), (512, 64)))
    products = (
        measured(64, 1024, {1: 0.1 * up.at_one(1), 128: up.at_one(128)}),
        measured(512, 64, {1: 2 * down.at_one(1), 128: down.at_one(128)}),
    )
    cost = replace(bare, profile=replace(bare.profile, products=products))
    setting = make_setting(model=model, machine=bare.machine)
    curve = LayerGemms.of(cost, setting).mlp

    shares = [decoded_products_s(cost, setting, rows)["mlp"] / curve.at_one(rows) for rows in range(1, 129)]

    assert least_as_measured(cost, model, FP16) <= min(shares) * (1 + 1e-9)


@st.composite
def measured_costs(draw: st.DrawFn, machine: MachineSpec, model: ModelSpec) -> CostModel:
    """Each matrix, or some, at rows of its own; faster and slower than the curve, which starts in no time or in some."""
    profile = draw(st.sampled_from((Profile.nominal(machine), make_profile(product_setup_s=1e-6), make_profile())))
    bare = CostModel(machine=machine, profile=profile)
    products = []
    for one in make_products(bare, model, {1: 1.0}):
        ratios = draw(st.dictionaries(st.integers(1, 128), st.floats(0.1, 10), max_size=4))
        if ratios:
            curve = bare.gemm(one.inputs, one.outputs, FP16, WeightFormat.NATIVE)
            products.append(measured(one.inputs, one.outputs, {n: ratios[n] * curve.at_one(n) for n in sorted(ratios)}))
    return replace(bare, profile=replace(profile, products=tuple(products)))


@settings(max_examples=200)
@given(st.data(), models(), machines(), st.sampled_from(WeightFormat), st.sampled_from((0.0, 1e3, 1e12)))
def test_no_step_and_no_prompt_falls_below_the_least(
    data: st.DataObject, model: ModelSpec, machine: MachineSpec, stored: WeightFormat, found_bytes: float
) -> None:
    """Neither each matrix, nor, where what was widened is found in a cache, all of them together."""
    bare = data.draw(measured_costs(machine, model))
    cost = replace(bare, profile=replace(bare.profile, widened_found_bytes=found_bytes))
    setting = make_setting(model=model, machine=machine, weight_format=stored)
    native = make_setting(model=model, machine=machine)
    curves = LayerGemms.of(cost, native).of_layer

    least, read_s = least_as_measured(cost, model, FP16), least_read_s(cost, model, FP16, stored)

    rows = np.arange(1.0, 600.0)
    for name, seconds in prompt_products_s(cost, native, rows).items():
        assert (seconds >= least * curves[name].at(rows) * (1 - 1e-9)).all()
    for count in (1, 2, 3, 7, 64, 128, 500):
        for name, decoded_s in decoded_products_s(cost, native, count).items():
            assert decoded_s >= least * curves[name].at_one(count) * (1 - 1e-9)
        together_s = sum(decoded_products_s(cost, setting, count).values())
        assert together_s >= least_products_s(cost, setting, count) * (1 - 1e-9)
        assert together_s >= read_s * (1 - 1e-9)


def launched_s(rows: int, setting: Setting) -> float:
    """Three kernels of 1 s a layer, and passes at half of HBM's 512 B/s."""
    cost = make_cost(setting.machine, kernels_per_layer=3.0, elementwise_efficiency=0.5)
    return decode_launch_s(cost, setting, rows)


PLAIN = make_setting(model=make_model(positions=64), machine=make_machine(launch_s=1.0))


def test_up_to_64_rows_products_add_what_comes_after_them_themselves() -> None:
    """With more a captured layer's kernels begin one after the other, and ReLU, of 8 entries a row, is one more of them. Norms with
    the sums before them pass a row's 16 entries eight times, in 1 s.
    """
    relu_s, norms_s = 65 * 8 * 2 * 2 / 256, 8 * 16 * 2 / 256

    assert FUSED_ROWS == 64
    assert is_captured(PLAIN)
    expected = [3 + norms_s, 3 + 64 * norms_s, 3 + 2 + relu_s + 65 * norms_s]
    assert [launched_s(rows, PLAIN) for rows in (1, 64, 65)] == expected


def test_a_gate_is_a_kernel_of_its_own_with_few_rows_already() -> None:
    gated = replace(PLAIN, model=make_model(gated_mlp=True))  # and a rotation

    row_s = 2 * (8 * 16 + 2.4 * 32 + 3 * 8) / 256  # of norms, the rotation and the gate
    assert [launched_s(rows, gated) for rows in (64, 65)] == pytest.approx([5 + 64 * row_s, 6 + 65 * row_s])


def test_a_step_launched_kernel_by_kernel_launches_as_many_for_any_rows() -> None:
    eager = replace(PLAIN, model=make_model(positions=64, layers=3), weights_on_host=0.5)

    assert [launched_s(rows, eager) for rows in (1, 64, 65, 1000)] == [3, 3, 3, 3]


def test_a_waves_rows_are_its_sequences() -> None:
    few, many = (
        layer_prices(make_cost(PLAIN.machine, kernels_per_layer=3.0), make_wave(sequences), sequences)
        for sequences in (64, 65)
    )

    assert (few.launch_s, many.launch_s) == (3 + 64 / 2, 5 + 65 * 8 * 2 * 2 / 512 + 65 / 2)
    flat = np.array([few.qkv_s, few.out_s, few.mlp_s])
    assert flat.tolist() == [many.qkv_s, many.out_s, many.mlp_s]


def make_wave(sequences: int) -> Setting:
    return make_setting(batch=sequences, model=PLAIN.model, machine=PLAIN.machine)
