"""A short run of a sparse plan moves exactly the bytes that the simulator says of what it picked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibration import campaign as campaigns
from calibration import replay
from calibration.campaign import Drawn
from calibration.runner import Ran, Runner
from sim import catalogue
from sim.attention import Selector
from sim.kv import KvFormat
from sim.plan import Placement, Plan
from sim.recipe import Recipe, plan_of
from sim.spec import DType
from sim.verdict import Replayed, Stratum, load_verdict, verdict_to_json
from studies import make_verdict
from tests.calibration.tiny import CPU, MODEL, machine

SPARSE = Recipe(model=MODEL, batch=3, prompt=40, output=24, dtype=DType.FP32, selector=Selector.PAGES, keep=30, hbm=50)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors gain nothing from more


@pytest.mark.parametrize(
    ("selector", "placement"),
    [
        (Selector.H2O, Placement.RECENT),
        *((one, where) for one in (Selector.SWA, Selector.PAGES, Selector.TOPK) for where in Placement),
    ],
)
@pytest.mark.parametrize("kv", [KvFormat.NATIVE, KvFormat.INT8])
def test_bytes_are_exact(selector: Selector, placement: Placement, kv: KvFormat) -> None:
    recipe = replace(SPARSE, selector=selector, placement=placement, kv=kv)

    again = replay.replayed(recipe, machine(), Runner(device=CPU))

    assert again is not None
    assert again.is_exact
    assert again.measured_h2d_bytes > 0 or selector is Selector.SWA  # its dead tokens leave nothing to fetch


@pytest.mark.parametrize(
    "recipe",
    [
        replace(SPARSE, hbm=100),
        replace(SPARSE, selector=Selector.H2O, placement=Placement.RESIDENT),  # all that lives is attended to
        replace(SPARSE, selector=Selector.DENSE, keep=100),
    ],
    ids=["in HBM", "nothing else lives", "dense"],
)
def test_what_picks_or_moves_nothing_is_not_run_again(recipe: Recipe) -> None:
    assert replay.replayed(recipe, machine(), Unused(device=CPU)) is None


def test_a_window_whose_least_wanted_leave_hbm_is_not_run_again() -> None:
    """Which those are, no list of picks says."""
    recipe = replace(SPARSE, dtype=DType.FP16, selector=Selector.SWA, placement=Placement.RESIDENT)
    card = replace(machine(), gpu=catalogue.gpu("H100 SXM"))

    assert replay.replayed(recipe, card, Unused(device=CPU)) is None


class Unused(Runner):
    def run(self, plan: Plan, **_: object) -> Ran:
        raise AssertionError(plan)


def test_a_run_that_fetches_more_than_it_picks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's picks forgotten: then the simulator fetches less than was measured."""
    real = Runner.run

    def forgetful(self: Runner, plan: Plan, **options: object) -> Ran:
        ran = real(self, plan, **options)  # type: ignore[arg-type]
        assert ran.picks is not None
        none = [[() for _ in layer] for layer in ran.picks[0]]
        return replace(ran, picks=[none, *ran.picks[1:]])

    monkeypatch.setattr(Runner, "run", forgetful)
    again = replay.replayed(replace(SPARSE, placement=Placement.RECENT), machine(), Runner(device=CPU))

    assert again is not None
    assert again.measured_h2d_bytes > again.simulated_h2d_bytes
    assert not again.is_exact


def test_what_was_timed_is_kept_where_the_replay_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(campaigns, "replayed", broken)
    drawn = Drawn(stratum=Stratum.LAUNCH, recipe=replace(SPARSE, output=4).case, predicted_s=9.0)

    result = campaigns._run(drawn, plan_of(Recipe.of(drawn.recipe), machine()), Runner(device=CPU), "test")

    assert result.figures is not None
    assert (result.replayed, result.reason) == (None, "out of memory")


def test_a_verdict_says_how_many_are_exact(tmp_path: Path) -> None:
    plans = make_verdict().plans
    exact, wrong = (
        Replayed(measured_h2d_bytes=5, measured_d2h_bytes=7, simulated_h2d_bytes=5, simulated_d2h_bytes=7),
        Replayed(measured_h2d_bytes=5, measured_d2h_bytes=7, simulated_h2d_bytes=6, simulated_d2h_bytes=7),
    )
    both = (replace(plans[0], replayed=exact), replace(plans[1], replayed=wrong), *plans[2:])

    assert make_verdict().replays is None
    assert make_verdict(plans=both[::2]).replays == "replayed selections: bytes of 1 of 1 plans exact"
    assert make_verdict(plans=both).replays == (
        f"replayed selections: bytes of 1 of 2 plans exact; not {plans[1].recipe}: to the GPU 5 bytes measured, "
        "6 simulated, to the host 7 bytes measured, 7 simulated"
    )

    file = tmp_path / "verdict.json"
    file.write_text(json.dumps(verdict_to_json(make_verdict(plans=both), None)))
    assert load_verdict(file).plans == both
