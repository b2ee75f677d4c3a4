"""The fit: what a known profile would have measured gives that profile back; what nothing tells stays as it was."""

import multiprocessing
import os
import random
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from builders import refuses
from calibration.beside import beside
from calibration.evidence import family_errors
from calibration.fit import fit
from calibration.problem import problem_of
from sim import catalogue
from sim.allocated import peak_allocated_bytes
from sim.attention import Selector
from sim.cost import CostModel
from sim.kv import KvFormat
from sim.measured import Measured
from sim.plan import Placement
from sim.predict import predictable
from sim.profile import MeasuredProduct, Measurement, Profile
from sim.recipe import Recipe, plan_of
from sim.spec import DType, MachineSpec, WeightFormat
from tests.calibration.tiny import fingerprint, machine

CARD = MachineSpec(name="h200", gpu=catalogue.gpu("h200"), host=catalogue.host())
TRUTH = {
    "gemm_hbm_efficiency": 0.91,
    "gemm_peak_efficiency": 0.66,
    "gemm_half_rows": 40.0,
    "product_setup_s": 4e-6,
    "attention_efficiency": 0.72,
    "attention_setup_s": 3e-6,
    "prefill_attention_efficiency": 0.31,
    "prompt_tile_s": 2.1e-6,
    "link_efficiency": 0.81,
    "link_duplex_efficiency": 0.83,
    "copy_setup_s": 6e-6,
    "copy_floor_s": 13e-6,
    "gather_setup_s": 9e-6,
    "gather_link_efficiency": 0.87,
    "kernels_per_layer": 7.0,
    "kernels_per_selection": 9.0,
    "elementwise_efficiency": 0.42,
    "conversion_efficiency": 0.3,
    "widening_efficiency": 0.45,
    "selection_pass_s": 9e-7,
    "host_operation_s": 7e-6,
    "step_overhead_s": 150e-6,
    "piece_setup_s": 21e-6,
    "branch_s": 60e-6,
}


_WAYS = ("quantise", "dequantise")


def cases() -> list[tuple[str, str]]:
    products = [
        ("product", f"rows={rows} inputs={inputs} outputs={outputs} dtype=fp16")
        for rows in (1, 16, 64, 256, 2048)
        for inputs, outputs in ((2048, 2048), (4096, 12288), (4096, 16384))
    ]
    copies = [("copy", f"to=device memory=pinned bytes={4096 * 8**power}") for power in range(7)]
    both = [("duplex", f"bytes={size}") for size in (2**20, 2**26)]
    gathers = [
        ("gather", f"from={source} bytes={size} row=1024")
        for source in ("host", "hbm")
        for size in (2**14, 2**18, 2**22, 2**26)
    ]
    converted = [(way, f"groups={n} native={n * 2**22} stored={n * 2**21}") for n in (4, 32) for way in _WAYS]
    base = Recipe(model="opt-6.7b/2", batch=16, prompt=64, output=6)
    dense = [
        replace(base, model=f"opt-6.7b/{layers}", batch=batch, prompt=prompt, hbm=hbm)
        for layers in (2, 6)
        for batch in (4, 64)
        for prompt in (64, 512)
        for hbm in (100, 50)
    ] + [replace(base, batch=4, hbm=85)]  # which waits for its pieces, not for the link
    window = [
        replace(one, selector=Selector.SWA, keep=20, placement=Placement.RESIDENT) for one in dense if one.hbm == 100
    ]
    eager = [
        replace(one, selector=Selector.H2O, keep=20)
        for one in dense
        if one.hbm == 100 and one.prompt == 64  # few tokens: the host is what they wait for
    ]
    chosen = [
        replace(one, batch=batch, keep=keep, output=2)
        for one in window[-1:]
        for batch in (1, 4, 64)
        for keep in (20, 70)
    ]
    attention = [replace(base, batch=batch, prompt=kept, output=2) for batch in (4, 64) for kept in (31, 255, 1023)]
    runs = [(family, recipe.case) for recipe in dense + window + eager for family in ("decode", "prefill")]
    prompts = [
        ("prompt_attention", f"sequences={sequences} tokens={tokens} heads=32 key_heads=8 channels=128 dtype=fp16")
        for sequences, tokens in ((64, 16), (16, 128), (16, 512), (4, 2048))  # by tiles, then by arithmetic
    ]
    return [
        *products,
        *prompts,
        *copies,
        *both,
        *gathers,
        *converted,
        *runs,
        *(("attention", recipe.case) for recipe in attention),
        *(("select", recipe.case) for recipe in chosen),
    ]


def measured_by(profile: Profile, card: MachineSpec, names: list[tuple[str, str]], jitter: float) -> Measured:
    """What ``profile`` says, each measurement off by ``jitter`` or so."""
    rng, cost = random.Random(1), CostModel(machine=card, profile=profile)
    blank = [Measurement(family=f, case=c, seconds=1.0, low_s=1.0, high_s=1.0, samples=9) for f, c in names]
    taken = []
    for one, price in predictable(blank, card):
        seconds = price(cost) * rng.gauss(1, jitter)
        peak_bytes = peak_allocated_bytes(plan_of(Recipe.of(one.case), card), cost) if one.family == "prefill" else 0
        spread = {"low_s": seconds * (1 - jitter), "high_s": seconds * (1 + jitter)}
        taken.append(replace(one, seconds=seconds, peak_bytes=peak_bytes, **spread))
    return Measured(fingerprint=fingerprint(), machine=card, measurements=tuple(taken))


@pytest.fixture(scope="module")
def truth() -> Profile:
    return replace(Profile.nominal(CARD), **TRUTH)


def test_a_known_profile_is_recovered_and_the_rest_left_alone(truth: Profile) -> None:
    told = list[tuple[int, int, str]]()
    measured = measured_by(truth, CARD, cases(), 0.005)

    found = fit(measured, name="found", basis="synthetic", on_step=lambda *step: told.append(step))

    assert [(number, total) for number, total, _ in told[:3]] == [(1, 3), (2, 3), (3, 3)]
    assert all(what.removeprefix("whether it needs ") in Profile.constants() for _, _, what in told[2:])
    far = {name: getattr(found, name) / value for name, value in TRUTH.items()}
    assert {name: ratio for name, ratio in far.items() if not 0.85 < ratio < 1.15} == {}
    assert found.evidence
    by_name = {one.parameter: one for one in found.evidence.estimates}
    assert sorted(by_name) == sorted(Profile.constants())
    held = [(by_name[name].low or 9) <= value <= (by_name[name].high or 0) for name, value in TRUTH.items()]
    assert sum(held) >= 0.7 * len(held)  # of 95 % intervals; constants that stand in for each other widen none
    assert {one.family for one in found.evidence.errors} == {family for family, _ in cases()}
    assert max(one.median for one in found.evidence.errors) < 0.02
    for name in ("quantised_attention_efficiency", "host_round_trip_s", "reserve_bytes"):
        left = by_name[name]
        assert getattr(found, name) == getattr(Profile.nominal(CARD), name)
        assert (left.low, left.high) == (None, None)
        assert left.evidence.startswith("nominal: ")


def test_several_processes_find_what_one_does(truth: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_by(truth, CARD, cases()[::3], 0.005)
    alone = fit(measured, name="found", basis="synthetic")
    begun = list[int]()

    def spy(processes: int, *begin: Any) -> ProcessPoolExecutor:
        begun.append(processes)
        return beside(processes, *begin)

    monkeypatch.setattr("calibration.problem.beside", spy)
    monkeypatch.setattr("calibration.problem.cores", lambda: 2)
    monkeypatch.setattr("calibration.problem._WORTH_IT", 10)

    assert fit(measured, name="found", basis="synthetic") == alone
    assert begun == [2]


def test_what_a_process_that_ends_would_have_looked_at_this_one_does(
    truth: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.problem.cores", lambda: 2)
    monkeypatch.setattr("calibration.problem._WORTH_IT", 10)
    measured = measured_by(truth, CARD, cases()[::9], 0.005)
    names = ("gemm_hbm_efficiency", "link_efficiency")

    with problem_of(measured.measurements, CARD, truth) as nothing:
        problem = nothing.of(names)
        places = [problem.nominal - 0.1 * number for number in range(3)]
        before = list(problem.at_each(places))
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        after = list(problem.at_each(places))

    assert np.array_equal(before, after)
    assert np.array_equal(before[0], problem.residuals_and_pull(places[0]))


def test_every_product_that_was_measured_is_kept_by_its_matrix() -> None:
    """In whatever order rows were measured; as they came out, however far from the fitted curve."""
    names = [
        ("product", f"rows={rows} inputs=2048 outputs={outputs} dtype={dtype}")
        for dtype, outputs, several in (("fp16", 2048, (1, 64, 16)), ("fp16", 6144, (32,)), ("bf16", 2048, (16, 1)))
        for rows in several
    ]
    measured = measured_by(Profile.nominal(CARD), CARD, names, 0.2)
    seconds = {one.case: one.seconds for one in measured.measurements}

    found = fit(measured, name="found", basis="synthetic")

    def product(outputs: int, dtype: DType, *rows: int) -> MeasuredProduct:
        took = [seconds[f"rows={n} inputs=2048 outputs={outputs} dtype={dtype}"] for n in rows]
        return MeasuredProduct(inputs=2048, outputs=outputs, dtype=dtype, rows=rows, seconds=tuple(took))

    assert found.products == (
        product(2048, DType.FP16, 1, 16, 64),
        product(6144, DType.FP16, 32),
        product(2048, DType.BF16, 1, 16),
    )
    cost = CostModel(machine=CARD, profile=found)
    curve = cost.gemm(2048, 2048, DType.FP16, WeightFormat.NATIVE)
    measured_s = seconds["rows=16 inputs=2048 outputs=2048 dtype=fp16"]
    assert cost.as_measured(2048, 2048, 16, DType.FP16) * curve.at_one(16) == pytest.approx(measured_s)


def test_what_libraries_take_is_what_captured_prefills_have_besides_their_plans() -> None:
    truth = replace(Profile.nominal(CARD), library_bytes=3e8)
    dense = Recipe(model="opt-6.7b/2", batch=16, prompt=64, output=6)
    recipes = [
        dense,
        replace(dense, batch=4),
        replace(dense, prompt=512),
        replace(dense, selector=Selector.H2O, keep=20),
    ]
    measured = measured_by(truth, CARD, [("prefill", recipe.case) for recipe in recipes], 0.0)
    spoilt = tuple(
        replace(one, peak_bytes=2 * one.peak_bytes) if "h2o" in one.case else one for one in measured.measurements
    )

    found = fit(replace(measured, measurements=spoilt), name="found", basis="synthetic")

    assert found.library_bytes == pytest.approx(3e8, abs=1)
    unasked = tuple(replace(one, peak_bytes=0) for one in spoilt)
    assert fit(replace(measured, measurements=unasked), name="found", basis="synthetic").library_bytes == 2**25


def test_outliers_do_not_lead_the_fit_astray(truth: Profile) -> None:
    names = [("copy", f"to=device memory=pinned bytes={2**power}") for power in range(12, 29)]
    clean = measured_by(truth, CARD, names, 0.005)
    spoilt = tuple(
        replace(one, seconds=3 * one.seconds, low_s=3 * one.low_s, high_s=3 * one.high_s) if place in (4, 12) else one
        for place, one in enumerate(clean.measurements)
    )

    found = fit(replace(clean, measurements=spoilt), name="found", basis="synthetic")

    assert found.link_efficiency == pytest.approx(TRUTH["link_efficiency"], rel=0.03)
    assert found.copy_floor_s == pytest.approx(TRUTH["copy_floor_s"], rel=0.1)


def test_on_a_cpu_nothing_is_captured_and_nothing_overlaps() -> None:
    truth = replace(
        Profile.nominal(machine()),
        host_operation_s=2e-5,
        gather_sm_share=1.0,
    )
    recipes = [
        Recipe(model=f"opt-125m/{layers}/64", batch=2, prompt=prompt, output=6, dtype=DType.FP32, kv=kv)
        for layers in (2, 6)
        for prompt in (8, 64)
        for kv in (KvFormat.NATIVE, KvFormat.INT8)
    ]

    products = [("product", f"rows={rows} inputs=64 outputs=192 dtype=fp32") for rows in (1, 8, 64, 512)]
    attention = [("attention", replace(recipes[0], prompt=kept, output=2).case) for kept in (31, 255, 1023)]
    names = [*products, *attention, *(("decode", one.case) for one in recipes)]

    found = fit(measured_by(truth, machine(), names, 0.005), name="found", basis="synthetic")

    assert found.host_operation_s == pytest.approx(2e-5, rel=0.15)
    assert (found.gather_sm_share, found.selection_exposed_share) == (1.0, 1.0)
    assert found.evidence
    notes = {one.parameter: one.evidence for one in found.evidence.estimates}
    said = {name: notes[name] for name in ("gather_sm_share", "selection_exposed_share")}
    assert said == dict.fromkeys(said, "1: a CPU does one thing after the other")
    assert found.evidence.machine == machine()


def test_errors_are_shares_of_what_was_measured(truth: Profile) -> None:
    names = [(family, case) for family, case in cases() if family == "copy"]
    rows = predictable(measured_by(truth, CARD, names, 0.0).measurements, CARD)
    slower = replace(truth, link_efficiency=TRUTH["link_efficiency"] / 2, copy_setup_s=0.0, copy_floor_s=0.0)

    (error,) = family_errors(rows, CostModel(machine=CARD, profile=slower))

    assert (error.family, error.measurements) == ("copy", len(names))
    assert error.worst == pytest.approx(1, abs=0.05)


def test_nothing_measured_cannot_be_fitted() -> None:
    empty = Measured(fingerprint=fingerprint(), machine=CARD)
    with refuses("measurements, there are none that a constant prices: measure first"):
        fit(empty, name="x", basis="y")
