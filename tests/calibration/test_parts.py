"""The smaller parts: clocks, figures, access profiles, what two days differ by, which steps are captured."""

import gc
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import make_machine, make_setting, newest_in_hbm, refuses
from calibration.access import Seen, access_of, random_weights_access
from calibration.draw import draw_recipe
from calibration.repeat import differences
from calibration.roofline import roofline_s, with_hindsight
from calibration.runner import Runner
from calibration.timer import CpuTimer, Spread
from calibration.verdict import explained_by
from runtime.execute import execute
from runtime.graph.support import require_graphable
from runtime.recorder import Record
from sim import catalogue
from sim.access import LivingAges, measured_access
from sim.attention import Selector
from sim.capture import is_captured
from sim.cost import CostModel
from sim.engine import simulate
from sim.forecast import forecast
from sim.homes import TokenHomes
from sim.kv import KvFormat
from sim.measured import Measured
from sim.plan import Admission, Placement, Plan, Preemption, Recompute, Setting, WriteBack
from sim.profile import Evidence, Measurement, Profile
from sim.recipe import Recipe, plan_of
from sim.spec import DType, WeightFormat
from sim.verdict import Figures
from tests.calibration.tiny import CPU, MODEL, fingerprint, machine


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_a_spread_is_ordered_and_within_its_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)

    assert min(samples) <= spread.low_s <= spread.seconds <= spread.high_s <= max(samples)
    assert spread.samples == len(samples)


def test_the_median_of_an_even_number_lies_between() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0]).seconds == 2.5


def test_every_call_is_made_as_often_and_its_mean_time_counts() -> None:
    made = list[str]()
    spread = CpuTimer().time([lambda: made.append("a"), lambda: made.append("b")], captured=True, budget_s=0.0)

    assert made == ["a", "b"] * (1 + spread.samples)
    assert spread.samples == 5


def test_figures_are_read_off_a_trace() -> None:
    """Two waves of two and one of one: five sequences, each step counted for those that it serves."""
    plan = newest_in_hbm(make_setting(batch=5, prompt=4, output=6, concurrency=2), slots=3)
    cost = CostModel(machine=make_machine(), profile=Profile.nominal(make_machine()))

    figures, outcome = Figures.of(simulate(plan, cost)), forecast(plan, cost).outcome

    assert figures.makespan_s == pytest.approx(outcome.makespan_s)
    assert figures.ttft_s == pytest.approx(outcome.ttft_s)
    assert figures.moved_bytes == outcome.h2d_bytes + outcome.d2h_bytes
    assert len(figures.step_s) == 6
    assert figures.tpot_p50_s is not None
    assert figures.tpot_p95_s is not None
    assert min(figures.step_s[1:]) <= figures.tpot_p50_s <= figures.tpot_p95_s <= max(figures.step_s[1:])
    assert Figures.of(simulate(plan, cost), 7).peak_hbm_bytes == 7


def swa_plan() -> Plan:
    recipe = Recipe(model=MODEL, batch=2, prompt=20, output=10, selector=Selector.SWA, keep=40)
    return plan_of(replace(recipe, placement=Placement.RESIDENT, dtype=DType.FP32), machine())


@pytest.mark.parametrize(
    ("slower", "blamed"),
    [("prefill", "prefill"), ("every", "products, launches"), ("growing", "attention")],
)
def test_a_gap_is_laid_at_the_part_that_has_it(slower: str, blamed: str) -> None:
    recipe = Recipe(model=MODEL, batch=2, prompt=20, output=40, dtype=DType.FP32)
    plan = plan_of(recipe, machine())
    said = Figures.of(simulate(plan, CostModel(machine=machine(), profile=Profile.nominal(machine()))))
    change = {
        "prefill": lambda step, s: 3 * s if step == 0 else s,
        "every": lambda step, s: s + 1e-3 * (step > 0),
        "growing": lambda step, s: s + 1e-5 * (20 + step) * (step > 0),
    }[slower]
    took = replace(said, step_s=tuple(change(step, seconds) for step, seconds in enumerate(said.step_s)))

    assert explained_by(plan, said, took) == blamed


def test_a_roofline_is_no_slower_than_the_simulator_with_ideal_efficiencies() -> None:
    plan = swa_plan()
    cost = CostModel(machine=machine(), profile=Profile.nominal(machine()))

    assert 0 < roofline_s(plan, cost) < forecast(plan, cost).outcome.makespan_s
    assert with_hindsight([1.0, 2.0, 4.0], [3.0, 6.0, 24.0]) == pytest.approx([0.0, 0.0, -0.5])


def test_two_days_differ_by_family() -> None:
    def day(copy_s: float, sum_s: float) -> Measured:
        taken = {"family": "copy", "low_s": 1.0, "high_s": 1.0, "samples": 3}
        copies = [Measurement(case=f"bytes={size}", seconds=copy_s * size, **taken) for size in (1, 2)]  # type: ignore[arg-type]
        dram = Measurement(family="dram", case="bytes=1", seconds=sum_s, low_s=1.0, high_s=1.0, samples=3)
        return Measured(fingerprint=fingerprint(), machine=machine(), measurements=(*copies, dram))

    worst, other = differences(day(1.0, 1.0), day(1.02, 0.9))

    assert (worst.family, worst.common, worst.median, worst.bias) == (
        "dram",
        1,
        pytest.approx(0.1),
        pytest.approx(-0.1),
    )
    assert (other.family, other.common, other.median) == ("copy", 2, pytest.approx(0.02))
    with refuses("the two measurement files have no case in common: measure both on the same kind of device"):
        differences(day(1.0, 1.0), replace(day(1.0, 1.0), measurements=()))


def test_an_access_profile_says_what_a_run_did() -> None:
    """Where any token may return new is what the step before did not attend to: none of three picks, then token 2, then 3 and 9
    of four. Token 20 has only just left the newest three when it is picked. Of 18 to 20 older tokens an eighth is two and a half.
    """
    recipe = Recipe(model=MODEL, batch=1, prompt=20, output=6, selector=Selector.TOPK, keep=30, dtype=DType.FP32)
    plan = plan_of(replace(recipe, placement=Placement.RESIDENT), machine())
    counts = plan.setting.token_counts
    assert [n - near for n, near in zip(counts.cached, counts.local, strict=True)] == [17, 18, 19, 20, 20, 21]
    picks: Any = [[[step]] * 2 for step in ((0, 1, 15), (0, 1, 15), (0, 2, 15), (0, 2, 3, 9), (0, 2, 3, 20))]
    flags = [np.array([[token in lane for token in range(25)] for (lane,) in layers]) for layers in picks]

    listed, flagged = (access_of(Selector.TOPK, [Seen(0.3, plan, seen, 0.8)], "here") for seen in (picks, flags))

    assert listed == flagged
    assert listed.turnovers == (pytest.approx((0 + 1 + 2 + 0) / (3 + 3 + 4 + 4), abs=1e-4),)
    assert listed.keep_shares == (0.3,)
    every = {18: (0, 1, 15), 19: (0, 1, 15), 20: (0, 2, 15, 0, 2, 3, 9), 21: (0, 2, 3, 20)}
    on_quarter = sum(min(1.0, max(0.0, older / 4 - token)) for older, tokens in every.items() for token in tokens)
    assert listed.age_shares[:2] == ((0.0, 0.0), (0.25, round(on_quarter / 17, 3)))
    assert len(listed.age_shares) == 5
    (ages,) = listed.living_ages or ()
    two_and_most_of_the_last = (2 + 18 * 7 / 8 - 15) / 3
    assert ages.first == tuple(round(share, 3) for share in [2 / 3] * 6 + [two_and_most_of_the_last])
    assert ages.later == tuple(round(share, 3) for share in (0.5 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1))  # of 2, 3 and 9
    assert listed.source.startswith("here; attention kept 80% at 30%; perplexity: 91M-parameter")


@pytest.mark.parametrize(("output", "early", "later"), [(65, 1.0, 0.0), (64, 31 / 62, None)])
def test_what_is_new_in_the_first_32_steps_is_told_apart_where_as_many_follow(
    output: int, early: float, later: float | None
) -> None:
    """One token is picked: in each of those steps another one, then always the same."""
    recipe = Recipe(model=MODEL, batch=1, prompt=80, output=output, selector=Selector.PAGES, keep=5, dtype=DType.FP32)
    plan = plan_of(replace(recipe, placement=Placement.RESIDENT), machine())
    picks: Any = [[[(min(step, 32),)]] for step in range(1, output)]

    access = access_of(Selector.PAGES, [Seen(0.05, plan, picks, None)], "here")

    assert access.turnovers == (pytest.approx(early if later is None else later, abs=1e-4),)
    assert access.early_turnovers == (None if later is None else (pytest.approx(early, abs=1e-4),))


def test_an_access_profile_of_a_run_that_picks_nothing_new_says_so() -> None:
    recipe = Recipe(model=MODEL, batch=1, prompt=20, output=3, selector=Selector.TOPK, keep=30, dtype=DType.FP32)
    plan = plan_of(replace(recipe, placement=Placement.RESIDENT), machine())
    picks: Any = [[[(0, 1, 2)]] * 2] * 2

    access = access_of(Selector.TOPK, [Seen(0.3, plan, picks, None)], "here")

    assert access.turnovers == (0.0,)
    assert access.living_ages is not None
    assert access.living_ages[0].later == tuple(eighth / 8 for eighth in range(1, 8))


def test_what_other_selectors_leave_out_dies() -> None:
    """Of the picks of steps that follow another one, none, one of three and two of three are new."""
    picks: Any = [[[step]] for step in ((0, 1, 15), (0, 1, 15), (0, 2, 15), (2, 3, 9))]

    access = access_of(Selector.H2O, [Seen(0.4, swa_plan(), picks, 0.8)], "here")

    assert access.turnovers == (pytest.approx(1 / 3, abs=1e-4),)
    assert access.picks_every_age_alike
    assert access.living_ages is None


def test_an_access_profile_says_how_old_a_windows_picks_are_when_it_begins_and_later() -> None:
    """Three older tokens are picked of six that live: the prompt's first, which are the oldest half, and when the window has
    moved on by its three or four tokens those that left it since.
    """
    recipe = Recipe(model=MODEL, batch=1, prompt=30, output=6, selector=Selector.SWA, keep=20, dtype=DType.FP32)
    plan = plan_of(replace(recipe, placement=Placement.RESIDENT), machine())
    counts = plan.setting.token_counts
    assert [n - dead - near for n, dead, near in zip(counts.cached, counts.dead, counts.local, strict=True)] == [6] * 6
    picks: Any = [[[(0, 1, 2)]] * 2] * 3 + [[[(28, 29, 30)]] * 2] * 2

    access = access_of(Selector.SWA, [Seen(0.2, plan, picks, None)], "here")

    first, later = (0.25, 0.5, 0.75, 1, 1, 1, 1), (0, 0, 0, 0, 0.25, 0.5, 0.75)
    assert access.living_ages == (LivingAges(first=first, later=later),)
    assert access.source == f"here; perplexity: {measured_access(Selector.SWA).source}"


def test_a_windows_picks_are_read_off_captured_steps() -> None:
    recipe = Recipe(model=MODEL, batch=2, prompt=24, output=8, selector=Selector.SWA, keep=40, dtype=DType.FP32)
    plan, runner = plan_of(replace(recipe, placement=Placement.RESIDENT), machine()), Runner(device=CPU)

    assert runner.window_picks(plan) == runner.run(plan, record=Record(picks=True)).picks


def test_what_pages_are_picked_is_read_off_captured_steps() -> None:
    recipe = Recipe(model=MODEL, batch=2, prompt=40, output=8, selector=Selector.PAGES, keep=40, dtype=DType.FP32)
    plan, runner = plan_of(replace(recipe, placement=Placement.RESIDENT), machine()), Runner(device=CPU)

    picked = runner.page_picks(plan)

    listed = runner.run(plan, record=Record(picks=True)).picks
    assert listed is not None
    assert [[tuple(np.flatnonzero(lane).tolist()) for lane in step] for step in picked] == [
        [lane for layer in step for lane in layer] for step in listed
    ]


class Circle:
    """Holds itself, so that a collection alone frees it."""

    itself: object = None


def test_collections_between_runs_pass_over_what_was_there_before_the_weights() -> None:
    """Until other weights come, which is when everything that nobody holds any more goes."""
    runner, circle = Runner(device=CPU), Circle()
    runner.run(swa_plan())
    assert gc.get_freeze_count() > 0
    circle.itself = circle
    gone = weakref.ref(circle)
    gc.freeze()
    del circle
    gc.collect()
    assert gone() is not None

    runner.run(replace(swa_plan(), setting=replace(swa_plan().setting, dtype=DType.FP16)))

    assert gone() is None


def test_runs_of_one_plan_share_what_was_captured_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, kept = Runner(device=CPU), list[object]()

    def spy(*args: Any, captured: object, **options: Any) -> Any:
        kept.append(captured)
        return execute(*args, captured=captured, **options)

    monkeypatch.setattr("calibration.runner.execute", spy)
    for _ in range(2):
        runner.run(swa_plan())
    runner.warm(swa_plan())
    runner.run(swa_plan())

    first, again, warming, anew = kept
    assert first is again
    assert len({id(one) for one in (first, warming, anew)}) == 3


def test_access_is_measured_on_random_weights() -> None:
    recipe = Recipe(model=MODEL, batch=2, prompt=24, output=8, dtype=DType.FP32)

    profiles = random_weights_access(Runner(device=CPU), machine(), recipe, (20, 50), "test")

    assert [one.selector for one in profiles] == [Selector.SWA, Selector.H2O, Selector.PAGES, Selector.TOPK]
    assert all("random weights of opt-125m/2/64" in one.source for one in profiles)
    by_selector = {one.selector: one for one in profiles}
    assert by_selector[Selector.TOPK].turnovers[0] > by_selector[Selector.SWA].turnovers[0]
    assert by_selector[Selector.SWA].picks_every_age_alike
    assert len(by_selector[Selector.TOPK].age_shares) == 5
    assert {(one.model, one.tokens) for one in profiles} == {(None, None)}  # cut down: it stands for any


def test_access_of_a_whole_model_is_that_models() -> None:
    """Others take what was measured first."""
    cut_down = replace(measured_access(Selector.PAGES), turnovers=(0.4, 0.4, 0.4))
    whole = replace(cut_down, turnovers=(0.1, 0.1, 0.1), model="opt-125m")
    taken = fingerprint()
    profile = Profile(name="p", basis="test", evidence=Evidence(fingerprint=taken, random_access=(cut_down, whole)))

    recipes = [
        Recipe(model=name, batch=1, prompt=8, output=2, selector=Selector.PAGES, keep=50)
        for name in ("opt-125m", "opt-125m/2", "opt-1.3b")
    ]
    found = [plan_of(recipe, machine(), profile).setting.access.turnovers[0] for recipe in recipes]
    assert found == [0.1, 0.1, 0.4]
    assert profile.random_access(Selector.SWA, "opt-125m", 9) == measured_access(Selector.SWA)


def test_access_of_a_whole_model_is_that_of_about_as_many_tokens() -> None:
    """Prompts of 100 and 300 tokens, 200 steps: 200 and 400 in the middle."""
    measured = measured_access(Selector.PAGES)
    few, many = (
        replace(measured, turnovers=(share,) * 3, model="opt-125m", tokens=tokens)
        for share, tokens in ((0.1, 100), (0.3, 400))
    )
    evidence = Evidence(fingerprint=fingerprint(), random_access=(many, few))
    profile = Profile(name="p", basis="test", evidence=evidence)

    recipe = Recipe(model="opt-125m", batch=1, prompt=100, output=200, selector=Selector.PAGES, keep=50)
    found = [plan_of(replace(recipe, prompt=prompt), machine(), profile).setting.access for prompt in (100, 300)]
    assert [one.turnovers[0] for one in found] == [pytest.approx(0.2), pytest.approx(0.3)]
    assert found[1] == many


def graphable(plan: Plan) -> bool:
    """With a decoder as a GPU would have it; nothing runs."""
    decoder: Any = SimpleNamespace(
        spec=plan.setting.model, device=torch.device("cuda"), dtype=torch.float16, config=SimpleNamespace()
    )
    try:
        require_graphable(plan, decoder, plan.setting.admission)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("seed", range(60))
def test_prices_and_runtime_agree_on_what_is_captured(seed: int) -> None:
    recipe = replace(draw_recipe(random.Random(seed), on_gpu=True), hbm=50)
    plan = plan_of(recipe, make_machine(hbm_bytes_per_s=1e12))

    assert graphable(plan) == is_captured(plan.setting)


@pytest.mark.parametrize("selector", [Selector.DENSE, Selector.SWA, Selector.PAGES])
@pytest.mark.parametrize(("model", "head_dim"), [("opt-1.3b", 64), ("opt-1.3b", 62), ("llama-3-8b", 128)])
@pytest.mark.parametrize("kv", KvFormat)
def test_prices_and_runtime_agree_on_continuous_steps(
    selector: Selector, model: str, head_dim: int, kv: KvFormat
) -> None:
    """Those of dense attention are captured, but not in 4 bits."""
    keep, placement = (100, Placement.RECENT) if selector is Selector.DENSE else (40, Placement.RESIDENT)
    recipe = Recipe(model=model, batch=4, prompt=20, output=40, selector=selector, keep=keep, kv=kv)
    setting = plan_of(
        replace(recipe, placement=placement), replace(make_machine(), gpu=catalogue.gpu("H100 SXM"))
    ).setting
    setting = replace(setting, model=replace(setting.model, head_dim=head_dim), admission=Admission.CONTINUOUS)

    known = kv in (KvFormat.NATIVE, KvFormat.FP8) or (kv is KvFormat.INT8 and head_dim % 4 == 0)
    captured = selector is Selector.DENSE and known
    for preemption in Preemption:
        plan = all_in_hbm(replace(setting, preemption=preemption))
        assert graphable(plan) == is_captured(plan.setting) == captured


@pytest.mark.parametrize("write_back", WriteBack)
@pytest.mark.parametrize("hbm", [100, 50])
@pytest.mark.parametrize("kv", KvFormat)
def test_prices_and_runtime_agree_on_windows_that_keep_recent_tokens(
    write_back: WriteBack, hbm: int, kv: KvFormat
) -> None:
    """Captured are those that write at eviction, in native and INT8."""
    recipe = Recipe(model="opt-1.3b", batch=4, prompt=60, output=20, selector=Selector.SWA, keep=40, hbm=hbm, kv=kv)
    plan = plan_of(recipe, replace(make_machine(), gpu=catalogue.gpu("H100 SXM")))
    plan = replace(plan, setting=replace(plan.setting, write_back=write_back))

    assert plan.setting.placement is Placement.RECENT
    known = kv in (KvFormat.NATIVE, KvFormat.INT8)
    assert graphable(plan) == is_captured(plan.setting) == (known and write_back is WriteBack.AT_EVICTION)


@pytest.mark.parametrize("model", ["opt-1.3b", "llama-3-8b"])
@pytest.mark.parametrize("selector", [Selector.SWA, Selector.PAGES, Selector.H2O])
@pytest.mark.parametrize("kv", KvFormat)
def test_prices_and_runtime_agree_on_sparse_waves(model: str, selector: Selector, kv: KvFormat) -> None:
    """Windows in native and INT8, pages in native; tokens lie on the host too."""
    recipe = Recipe(model=model, batch=4, prompt=200, output=40, selector=selector, keep=40, kv=kv, hbm=50)
    machine = replace(make_machine(), gpu=catalogue.gpu("H100 SXM"))

    plan = plan_of(replace(recipe, placement=Placement.RESIDENT), machine)

    formats = {Selector.SWA: (KvFormat.NATIVE, KvFormat.INT8), Selector.PAGES: (KvFormat.NATIVE,)}
    assert any(plan.homes.host_kv) == (selector is not Selector.H2O)
    assert graphable(plan) == is_captured(plan.setting) == (kv in formats.get(selector, ()))


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("write_back", WriteBack)
@pytest.mark.parametrize("kv", [KvFormat.NATIVE, KvFormat.INT8, KvFormat.FP8])
def test_prices_and_runtime_agree_on_what_is_computed_again(
    recompute: Recompute, write_back: WriteBack, kv: KvFormat
) -> None:
    """From inputs on the host or from token ids; over INT8 where all that leaves HBM does so with its levels."""
    recipe = Recipe(model="opt-1.3b", batch=4, prompt=60, output=20, kv=kv, recompute=recompute, hbm=50)
    machine = replace(make_machine(), gpu=catalogue.gpu("H100 SXM"))
    plan = plan_of(recipe, machine)
    plan = replace(plan, setting=replace(plan.setting, write_back=write_back))

    again = recompute in (Recompute.ACTIVATIONS_HOST, Recompute.TOKENS)
    native, eight = kv is KvFormat.NATIVE, kv is KvFormat.INT8 and write_back is WriteBack.AT_EVICTION
    known = native or kv is KvFormat.INT8 if recompute is Recompute.NONE else again and (native or eight)
    assert graphable(plan) == is_captured(plan.setting) == known


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize(
    ("admission", "on_host", "ahead"),
    [
        (Admission.WAVES, 0.0, 4),
        *((Admission.WAVES, 0.5, ahead) for ahead in (1, 2, 4)),
        (Admission.CONTINUOUS, 0.0, 1),
    ],
)
def test_prices_and_runtime_agree_on_weights(
    admission: Admission, weights: WeightFormat, on_host: float, ahead: int
) -> None:
    """In any format; where some stream in, the ring's buffers must divide the 24 layers."""
    recipe = Recipe(model="opt-1.3b", batch=4, prompt=20, output=40, weights=weights)
    setting = plan_of(recipe, make_machine()).setting

    plan = all_in_hbm(replace(setting, admission=admission, weights_on_host=on_host, prefetch_layers=ahead))

    assert graphable(plan) == is_captured(plan.setting) == (on_host == 0 or ahead < 4)


def all_in_hbm(setting: Setting) -> Plan:
    dead = setting.token_counts.dead
    hbm = tuple(cached - gone for cached, gone in zip(setting.token_counts.cached, dead, strict=True))
    none = (0,) * len(dead)
    homes = TokenHomes(hbm=hbm, host_kv=none, activations=none, dropped=dead, copies=none)
    return Plan(setting=setting, homes=homes)
