"""Two-sided proof on small problems: nothing beats the optimum, and its bound undercuts everything there is.

Each optimum is held against an exhaustive search over every whole-token state and every option, judged by the engine.
The quotas keep it honest. How rare the rare ones are among optima of small problems drawn at random, among those of
catalogue cards and models at full size, and the hardware on which they arise:

- the host's limit (2 %, 0.7 %): host memory of less than the KV that does not fit HBM
- p1 < p2 inside the run (5 %, none of 538): links of 2 to 20 % of HBM bandwidth (GH200, PCIe 5) under layers that
  outweigh their KV, and a CPU too slow to attend
- recomputation (19 %, 2 %): hundreds of FLOP for each byte of HBM, wide KV, a slow CPU
- waves (21 %, 3 %): batches that may wait, on cards whose decode reads more KV than weights
- KV on the host (69 %, 48 %): at full size nearly always because the CPU attends to it there
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_machine, make_model, make_products, make_profile
from exhaustive import Optimum, exhaustive_optimum, optimum_of_setting, settings_to_search
from instances import FAMILIES, Family
from planner.bound import least_bound
from planner.coefficients import coefficients_of, fetch_rate
from planner.objective import objective_weights
from planner.optimum import optimum
from planner.options import families, paged_settings, resident_settings, spilling_settings
from planner.request import Request
from planner.search import PRUNE_SHARE, Found, Search
from sim import catalogue
from sim.attention import Selector
from sim.capture import evicts_least_wanted, keeps_open_group
from sim.cost import CostModel
from sim.flows import flows_of, home_columns
from sim.forecast import Forecast, forecast, over_capacity
from sim.homes import PhaseName, TokenHomes
from sim.kv import KvFormat, KvFormats, kv_layer_bytes
from sim.plan import Admission, Plan, Setting
from sim.profile import Profile
from sim.spec import DType, MachineSpec
from sim.workload import Workload
from strategies import plans

WITHIN = 1e-3
EXACT = 1e-9  # sums of the same seconds in another order
PROVED = 200
SPILLING_WINDOWS = ((94, 2), (112, 2), (184, 2), (200, 4), (247, 1))  # seeds of sparse problems, and sequences at once
SPILLING_INT8_WINDOWS = ((8, 1), (46, 1), (372, 2), (398, 1))
QUOTAS = {"host KV": 60, "recompute": 30, "host limit": 30, "p1 < p2": 20, "waves": 30}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_optimum_is_that_of_an_exhaustive_search(family: Family) -> None:
    faults: list[str] = []
    census: Counter[str] = Counter()

    for seed in range(family.seeds):
        request = family.request(seed)
        exact, verdict = _compare(request)
        if verdict:
            faults.append(f"seed {seed}: {verdict}")
        if exact is not None:
            census.update({"feasible", *_traits(exact.plan, request)})

    assert faults == []
    assert census["feasible"] == family.feasible
    assert {trait: census[trait] for trait, least in family.least.items() if census[trait] < least} == {}


def test_families_meet_the_quotas() -> None:
    met = Counter[str]()
    for family in FAMILIES:
        met.update(family.least)

    assert sum(family.feasible for family in FAMILIES) >= PROVED
    assert {trait: met[trait] for trait, quota in QUOTAS.items() if met[trait] < quota} == {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_exhaustive_search_finds_the_same_without_a_limit_to_begin_with(family: Family) -> None:
    request = next(request for seed in range(family.seeds) if optimum(request := family.request(seed)) is not None)
    best = optimum(request)
    assert best is not None

    blind, limited = exhaustive_optimum(request), exhaustive_optimum(request, at_most_s=best.found.objective_s)

    assert blind is not None
    assert limited is not None
    assert blind.objective_s == pytest.approx(limited.objective_s, rel=EXACT)


@pytest.mark.parametrize(("name", "seed"), [("long", 7), ("the link fills up", 19), ("small host", 23)])
def test_plans_whose_kernels_differ_by_where_tokens_come_from_are_all_searched(name: str, seed: int) -> None:
    """Grouped heads go over their tokens in parts, but for a step that streams: recomputing eagerly may then be the best."""
    request = next(family for family in FAMILIES if family.name == name).request(seed)
    slow = replace(request, profile=replace(request.profile, attention_token_s=1e-5))
    assert slow.model.heads > slow.model.kv_heads

    exact, fault = _compare(slow)

    assert exact is not None
    assert not fault


@pytest.mark.parametrize(
    "ratios",
    [{1: 0.4, 4: 0.6}, {1: 2.0, 4: 1.5}, {1: 2.5, 2: 0.3, 3: 1.2}],
    ids=["faster", "slower", "faster and slower"],
)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_where_products_were_measured_the_optimum_is_that_of_an_exhaustive_search(
    family: Family, ratios: dict[int, float]
) -> None:
    """Times by rows, of all the model's matrices: a bound may not count on their curves."""
    found = [_compare(_as_measured(family.request(seed), ratios)) for seed in range(4)]

    assert {fault for _, fault in found} == {""}
    assert any(exact for exact, _ in found)


@pytest.mark.parametrize(
    ("seed", "concurrency", "kv_format"),
    [
        *((*one, KvFormat.NATIVE) for one in SPILLING_WINDOWS),
        *((*one, KvFormat.INT8) for one in SPILLING_INT8_WINDOWS),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_setting_whose_least_wanted_leave_hbm_is_solved_exactly(
    seed: int, concurrency: int, kv_format: KvFormat, share: float
) -> None:
    """Of its new picks, a ``share`` of all, a ``share`` returns. In INT8 ranges of all keys stay in HBM."""
    request = next(family for family in FAMILIES if family.name == "sparse").request(seed)
    request, formats = replace(request, kv_formats=(KvFormat.INT8,)), KvFormats(gpu=kv_format, host=kv_format)
    cost = CostModel(machine=request.machine, profile=request.profile)
    settings = (one for one in settings_to_search(request) if one.kv_format == formats and not one.weights_on_host)
    evicting = (one for one in settings if evicts_least_wanted(one))
    setting = next(one for one in evicting if one.concurrency == concurrency)
    access = replace(setting.access, keep_shares=(0.5,), turnovers=(share,), perplexity_ratios=(1.0,))
    setting = replace(setting, access=replace(access, returned_share=share))
    bound_s, _ = least_bound(coefficients_of(setting, cost), objective_weights(request.objective, setting).of)

    found, exact = (
        Search(request, cost)._solved(setting, bound_s, float("inf")),
        optimum_of_setting(setting, request, cost),
    )

    assert exact is not None
    assert any(exact[0].homes.host_kv)
    assert found is not None
    assert found.objective_s == pytest.approx(exact[1], rel=WITHIN)
    assert bound_s <= exact[1] * (1 + EXACT)


def test_exhaustive_search_leaves_no_plan_out() -> None:
    request = tiny_request()
    cost = CostModel(machine=request.machine, profile=request.profile)

    priced = [forecast(plan, cost) for setting in settings_to_search(request) for plan in every_plan(setting)]
    quickest_s = min(plan.outcome.makespan_s for plan in priced if fits(plan))

    exact = exhaustive_optimum(request)
    assert exact is not None
    assert len(priced) > 1000
    assert exact.objective_s == pytest.approx(quickest_s, rel=EXACT)


def _as_measured(request: Request, ratios: dict[int, float]) -> Request:
    cost = CostModel(machine=request.machine, profile=request.profile)
    products = make_products(cost, request.model, ratios, request.dtype)
    return replace(request, profile=replace(request.profile, products=products))


def _compare(request: Request) -> tuple[Optimum | None, str]:
    """What the exhaustive search finds, and what is wrong with the planner's optimum beside it."""
    best = optimum(request)
    if best is None:
        exact = exhaustive_optimum(request)
        return exact, "" if exact is None else f"no plan, though one takes {exact.objective_s:.6g} s"
    certificate = best.certificate
    exact = exhaustive_optimum(request, at_most_s=certificate.objective_s * (1 + WITHIN))
    if exact is None:
        return None, f"{certificate.objective_s:.6g} s, better than anything there is"
    regret, above = (seconds / exact.objective_s - 1 for seconds in (certificate.objective_s, certificate.bound_s))
    if not -EXACT <= regret <= WITHIN:
        return exact, f"optimum is {100 * regret:.4f} % off"
    return exact, f"bound is {100 * above:.4f} % above the optimum" if above > EXACT else ""


def _traits(plan: Plan, request: Request) -> Iterator[str]:
    """What the quotas count."""
    setting, starts = plan.setting, {phase.name: phase.first_step for phase in plan.phases}
    p1, p2 = starts.get(PhaseName.GPU_CPU, 0), starts.get(PhaseName.RECOMPUTE)
    peak_bytes = forecast(plan, CostModel(machine=request.machine, profile=request.profile)).outcome.peak_host_bytes
    token_bytes = setting.model.layers * kv_layer_bytes(setting.model, setting.dtype, setting.kv_format.host)
    traits = {
        "host KV": any(plan.homes.host_kv),
        "recompute": p2 is not None,
        "host limit": setting.machine.host.usable_bytes - peak_bytes < setting.concurrency * token_bytes,
        "p1 < p2": p2 is not None and 0 < p1 < p2,
        "waves": setting.concurrency < request.workload.batch and setting.admission is Admission.WAVES,
        "sparse": not setting.attention.is_dense,
        "open group": keeps_open_group(setting) and any(plan.homes.host_kv),
    }
    yield from (trait for trait, holds in traits.items() if holds)


def tiny_request() -> Request:
    """One sequence of two tokens and three steps that do not fit HBM: so few plans that all can be written down."""
    model = make_model(layers=4, hidden=8, head_dim=16)
    machine = make_machine(
        hbm_bytes=model.weight_bytes(DType.FP16) + 1200,
        hbm_bytes_per_s=1e9,
        flop_per_s=2e9,
        link_bytes_per_s=5e7,
        dram_bytes=1500,
        dram_bytes_per_s=1e6,
        host_flop_per_s=1e7,
    )
    workload = Workload(batch=1, prompt_tokens=2, output_tokens=3)
    return Request(
        machine=machine, profile=make_profile(), model=model, workload=workload, max_sparsity=0.0, kv_formats=()
    )


def every_plan(setting: Setting) -> Iterator[Plan]:
    """All token homes that a plan of ``setting`` accepts."""
    for rows in product(*(_every_row(cached) for cached in setting.token_counts.cached)):
        hbm, host_kv, activations, dropped, copies = zip(*rows, strict=True)
        with suppress(ValueError):
            homes = TokenHomes(hbm=hbm, host_kv=host_kv, activations=activations, dropped=dropped, copies=copies)
            yield Plan(setting=setting, homes=homes)


def fits(priced: Forecast) -> bool:
    return not any(np.any(over > 0) for over in over_capacity(priced))


def _every_row(cached: int) -> list[tuple[int, int, int, int, int]]:
    """Dense attention selects every token, so nothing is copied."""
    rows = product(range(cached + 1), repeat=4)
    return [(*row, 0) for row in rows if sum(row) == cached]


@given(st.sampled_from((Selector.SWA, Selector.PAGES, Selector.TOPK)).flatmap(plans))
def test_a_token_outside_hbm_is_fetched_no_less_than_the_program_counts(plan: Plan) -> None:
    """Whether the oldest are picked most or least, in the first steps or later, and however many slots there are for copies."""
    homes = home_columns(plan.homes)
    outside = homes.host_kv + homes.activations - homes.copies
    flows = flows_of(plan, homes)

    fetched = flows.fetched_kv + flows.reprojected
    assert (fetched >= fetch_rate(plan.setting) * outside * (1 - 1e-9) - 1e-9).all()


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "concurrency", "kv_formats", "room"),
    [
        # All in HBM heads that are shared are gone over in many parts, streamed ones in one.
        (512, 256, 64, 512, (), 0.999),
        (512, 256, 64, None, (KvFormat.INT8,), 0.999),
        # Over pages each query head has a program of its own.
        (8, 128, 2048, None, (KvFormat.INT8,), 0.999),
        # Inputs in HBM are recomputed kernel by kernel, which no launch slows here.
        (4, 128, 512, None, (), 0.999),
    ],
)
def test_what_bounds_one_way_to_attend_prunes_no_other(
    batch: int, prompt: int, output: int, concurrency: int | None, kv_formats: tuple[KvFormat, ...], room: float
) -> None:
    """A little less HBM than all of it needs; every other plan of the same concurrency is no better than the answer."""
    machine = MachineSpec(name="h200", gpu=catalogue.gpu("h200"), host=catalogue.host())
    request = Request(
        machine=machine,
        profile=Profile.nominal(machine),
        model=catalogue.model("qwen3-0.6b"),
        workload=Workload(batch=batch, prompt_tokens=prompt, output_tokens=output),
        concurrency=concurrency,
        max_sparsity=0.0,
        kv_formats=kv_formats,
    )
    cost = CostModel(machine=machine, profile=request.profile)
    *_, whole = resident_settings(next(families(request)), request)
    needed_bytes = whole.concurrency * coefficients_of(whole, cost).memory.hbm_all_in.max()
    short = replace(request, kv_budget_bytes=int(room * needed_bytes))

    search = Search(short, cost)
    best = search.best(lossless_only=False)

    assert best is not None
    others_s = [found.objective_s for found in _each_found(search)]
    assert len(others_s) > 1
    assert best.certificate.bound_s <= min(others_s) * (1 + 1e-9)
    assert best.found.objective_s <= min(others_s) * (1 + PRUNE_SHARE)


def _each_found(search: Search) -> Iterator[Found]:
    """Of every setting of the first concurrency, whatever its bound: what spills, and what is admitted as pages fall free."""
    for setting in resident_settings(next(families(search.request)), search.request):
        found = [search._solved(leaf, 0.0, float("inf")) for leaf in spilling_settings(setting, search.request)]
        if search.request.concurrency is None:
            found += [search._fitted(paged) for paged in paged_settings(setting)]
        yield from (one for one in found if one is not None)
