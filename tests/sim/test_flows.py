"""What a plan moves and holds, counted by hand: 2 layers, 64 bytes of KV and 32 of layer input a token and layer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from builders import in_hbm, make_homes, make_machine, make_model, make_setting, newest_in_hbm
from sim.access import AccessProfile, LivingAges
from sim.attention import Selector
from sim.counts import counts_of
from sim.flows import Flows, flows_of, home_columns, link_token_bytes
from sim.kv import KvFormat, KvFormats
from sim.occupancy import Occupancy, occupancy_of
from sim.plan import Placement, Plan, Recompute, WriteBack
from sim.spec import CPU_LINK, DType, LinkSpec

IN_MEMORY = LinkSpec(name=CPU_LINK, bytes_per_s=64.0)


def traffic(plan: Plan) -> Flows:
    return flows_of(plan, home_columns(plan.homes))


def held(plan: Plan) -> Occupancy:
    homes = home_columns(plan.homes)
    return occupancy_of(plan, homes, flows_of(plan, homes))


def half_new(selector: Selector, **changes: Any) -> AccessProfile:
    """Half of the picks are new at every step."""
    return AccessProfile(
        selector=selector, keep_shares=(0.5,), turnovers=(0.5,), perplexity_ratios=(1.0,), source="test", **changes
    )


def test_turnover_falls_from_what_it_is_early_by_how_often_steps_double() -> None:
    """Of half the tokens, of which half are local; what is new among picks comes from the half that is not attended to."""
    access = replace(half_new(Selector.PAGES, early_turnovers=(0.9,)), turnovers=(0.1,))
    setting = make_setting(
        Selector.PAGES, prompt=400, output=161, sparsity=0.5, access=access, placement=Placement.RESIDENT
    )
    counts = counts_of(setting)

    turnovers = counts.fetch_rate * counts.pool / counts.selected

    assert turnovers[[1, 2, 16, 32, 64, 160]] == pytest.approx([1.0, 0.9, 0.9, 0.5, 0.1, 0.1])
    assert (np.diff(turnovers[1:]) < 1e-12).all()


def test_dense_attention_fetches_all_that_is_on_the_host() -> None:
    """4 to 7 tokens, 2 slots: each step evicts one, the prefill also what it has no slot for."""
    flows = traffic(newest_in_hbm(make_setting(), slots=2))

    assert flows.cached.tolist() == flows.kept.tolist() == [4, 5, 6, 7]
    assert flows.fetched_kv.tolist() == [0, 3, 4, 5]
    assert flows.written_kv.tolist() == [2 + 1, 1, 1, 0]
    for unused in (flows.selected, flows.fetched_inputs, flows.reprojected, flows.forwarded, flows.host_attended):
        assert not unused.any()


def test_with_host_attention_nothing_is_fetched() -> None:
    flows = traffic(newest_in_hbm(make_setting(host_attention=True), slots=2))

    assert flows.host_attended.tolist() == [0, 3, 4, 5]
    assert not flows.fetched_kv.any()


def test_recent_placement_fetches_the_selected_share_of_the_older_tokens() -> None:
    """8, 9, 10 tokens: 2, 2, 3 newest and as many picks among the 6, 7, 7 older ones, of which 4, 5, 6 are on the host."""
    setting = make_setting(Selector.TOPK, prompt=8, output=3, sparsity=0.5)
    assert setting.token_counts.local == setting.token_counts.selected == (2, 2, 3)

    flows = traffic(newest_in_hbm(setting, slots=4))

    assert flows.kept.tolist() == [4, 4, 6]
    assert flows.fetched_kv.tolist() == pytest.approx([0, 5 * 2 / 7, 6 * 3 / 7])


def test_resident_placement_fetches_the_new_picks_among_the_tokens_left_out() -> None:
    """4, 5, 4 tokens are left out; of the host's tokens 0, 1, 2 have a copy. The first step's picks are all new, then half."""
    setting = make_setting(
        Selector.TOPK,
        prompt=8,
        output=3,
        sparsity=0.5,
        placement=Placement.RESIDENT,
        access=half_new(Selector.TOPK),
    )
    homes = make_homes((4, 4, 4), host_kv=(4, 5, 6), copies=(0, 1, 2))

    flows = traffic(Plan(setting=setting, homes=homes))

    assert flows.fetched_kv.tolist() == pytest.approx([0, 4 * 2 / 5, 4 * (3 / 2) / 4])


def test_copies_stay_until_they_are_deselected() -> None:
    """From the first step on, which fetches all of its picks, as many as are picked."""
    setting = make_setting(
        Selector.TOPK,
        prompt=8,
        output=4,
        sparsity=0.5,
        placement=Placement.RESIDENT,
        access=half_new(Selector.TOPK),
    )
    assert setting.token_counts.selected == (2, 2, 3, 3)

    assert counts_of(setting).copy_rate.tolist() == pytest.approx([0, 2 / 5, 3 / 4, 3 / 5])


def test_the_oldest_tokens_are_fetched_as_often_as_they_are_picked() -> None:
    """11 tokens, 3 newest, 3 picks among 8: the oldest 4 of them, on the host, get a fifth of the picks."""
    older = half_new(Selector.TOPK, age_shares=((0.0, 0.0), (0.5, 0.2), (1.0, 1.0)))
    setting = make_setting(Selector.TOPK, prompt=10, output=2, sparsity=0.5, access=older)

    flows = traffic(newest_in_hbm(setting, slots=7))

    assert flows.fetched_kv.tolist() == pytest.approx([0, 3 * 0.2])


@pytest.mark.parametrize("copies", [2, 4])
def test_new_picks_are_fetched_by_their_ages_however_many_slots_there_are_for_copies(copies: int) -> None:
    """8 and 9 older tokens, of which the oldest 4 are homed on the host: a quarter of the first step's picks falls on them, which
    are all new; later half of them are, and on the oldest 3 and 4 of 8 fall a twentieth and a tenth.
    """
    ages = LivingAges(first=(0.1, 0.15, 0.2, 0.25, 0.5, 0.7, 0.9), later=(0, 0, 0.05, 0.1, 0.3, 0.5, 0.7))
    every = half_new(Selector.TOPK, age_shares=((0.0, 0.0), (0.5, 0.2), (1.0, 1.0)))
    access = replace(every, living_ages=(ages,) * len(every.keep_shares))
    setting = make_setting(
        Selector.TOPK, prompt=10, output=3, sparsity=0.5, access=access, placement=Placement.RESIDENT
    )
    kept = setting.token_counts
    assert [n - near for n, near in zip(kept.cached[1:], kept.local[1:], strict=True)] == [8, 9]
    assert kept.selected[1:] == (3, 3)
    homes = make_homes((6, 7, 8), host_kv=(4, 4, 4), copies=(0, copies, copies))

    fetched = traffic(Plan(setting=setting, homes=homes)).fetched_kv

    of_the_oldest_four_ninths = 0.05 + (8 * 4 / 9 - 3) * (0.1 - 0.05)
    assert fetched.tolist() == pytest.approx([0, 3 * 0.25, 3 * 0.5 * of_the_oldest_four_ninths])


@pytest.mark.parametrize(
    ("host_kv", "copies", "fetched"),
    [
        (7, (5, 4, 5), [0, 4, 0.1 * 5]),  # four of four, though no more than three are left out; then a tenth is new
        (3, (1, 1, 1), [0, 4 * 2 / 3, 5 * 3 / 7 - 1]),  # as the program counts; then all but the one that has a slot
    ],
)
def test_in_the_first_step_all_picks_come_and_later_those_too_for_which_there_is_no_slot(
    host_kv: int, copies: tuple[int, ...], fetched: list[float]
) -> None:
    """Of seven older tokens four and five are picked, those of every age alike."""
    alike = LivingAges(**dict.fromkeys(("first", "later"), tuple(eighth / 8 for eighth in range(1, 8))))
    usual = half_new(Selector.TOPK)
    shares = len(usual.keep_shares)
    access = replace(usual, turnovers=(0.1,) * shares, living_ages=(alike,) * shares)
    setting = make_setting(
        Selector.TOPK, prompt=10, output=3, sparsity=0.2, access=access, placement=Placement.RESIDENT
    )
    kept = setting.token_counts
    assert (kept.local[1:], kept.selected[1:]) == ((4, 5), (4, 5))
    homes = make_homes([cached - host_kv for cached in kept.cached], host_kv=(host_kv,) * 3, copies=copies)

    assert traffic(Plan(setting=setting, homes=homes)).fetched_kv.tolist() == pytest.approx(fetched)


def test_a_windows_picks_grow_younger_until_all_its_newest_tokens_have_come_since() -> None:
    """8 to 10 older tokens live and the oldest 2 to 5 are outside; picked are at first the oldest half alone, the newest half
    when as many steps have gone by as tokens are local, and in between of each as much as has gone by.
    """
    setting = make_setting(Selector.SWA, prompt=20, output=6, sparsity=0.6)
    counts = setting.token_counts
    plan = newest_in_hbm(setting, slots=10)
    older = [n - gone - near for n, gone, near in zip(counts.cached, counts.dead, counts.local, strict=True)]
    assert (older[1:], plan.homes.host_kv[1:]) == ([8, 8, 8, 9, 10], (2, 2, 3, 4, 5))
    assert (counts.local[1:], counts.selected[1:]) == ((4, 4, 5, 5, 5), (4, 4, 5, 5, 5))
    ages = LivingAges(first=(0.25, 0.5, 0.75, 1, 1, 1, 1), later=(0, 0, 0, 0, 0.25, 0.5, 0.75))
    looked_at = replace(setting.access, living_ages=(ages,) * len(setting.access.keep_shares))

    fetched = traffic(replace(plan, setting=replace(setting, access=looked_at))).fetched_kv

    alike = [
        share * picked for share, picked in zip((2 / 8, 2 / 8, 3 / 8, 4 / 9, 5 / 10), (4, 4, 5, 5, 5), strict=True)
    ]
    assert fetched.tolist() == pytest.approx(
        [0, *(2 * some * (1 - gone) for some, gone in zip(alike, (0, 1 / 4, 2 / 5, 3 / 5, 4 / 5), strict=True))]
    )
    assert traffic(plan).fetched_kv.tolist() == pytest.approx([0, *alike])
    undying = newest_in_hbm(replace(setting, drop_dead=False, access=looked_at), slots=10)
    unknown = replace(undying, setting=replace(undying.setting, access=setting.access))
    assert traffic(undying).fetched_kv.tolist() == traffic(unknown).fetched_kv.tolist()


@pytest.mark.parametrize(
    ("source", "fetched_inputs"), [(Recompute.ACTIVATIONS_HOST, [0, 1, 2]), (Recompute.ACTIVATIONS_HBM, [0, 0, 0])]
)
def test_tokens_kept_as_inputs_are_projected_again(source: Recompute, fetched_inputs: list[float]) -> None:
    setting = make_setting(output=3, recompute=source)

    flows = traffic(Plan(setting=setting, homes=make_homes((2, 2, 2), host_kv=(2, 2, 2), activations=(0, 1, 2))))

    assert flows.fetched_kv.tolist() == [0, 2, 2]
    assert flows.reprojected.tolist() == [0, 1, 2]
    assert flows.fetched_inputs.tolist() == fetched_inputs


def test_inputs_cross_the_link_at_birth() -> None:
    """5 tokens are ever kept as inputs: the 4 of the prompt, and the first one generated."""
    setting = make_setting(recompute=Recompute.ACTIVATIONS_HOST)

    flows = traffic(Plan(setting=setting, homes=make_homes((1, 1, 1, 2), activations=(3, 4, 5, 5))))

    assert flows.written_inputs.tolist() == [4, 1, 0, 0]
    assert not flows.written_kv.any()


def test_a_dropped_prefix_is_forwarded_whole() -> None:
    setting = make_setting(recompute=Recompute.TOKENS)

    flows = traffic(Plan(setting=setting, homes=make_homes((4, 4, 4, 3), dropped=(0, 1, 2, 4))))

    assert flows.forwarded.tolist() == [0, 1, 2, 4]
    assert not flows.written_kv.any()


def test_where_a_token_on_the_host_dies_another_one_takes_its_place() -> None:
    """SWA at 80 % of 10 to 13 tokens: newest, pick and leaver live; one of pick and leaver dies at each step."""
    setting = make_setting(Selector.SWA, prompt=10, sparsity=0.8)

    flows = traffic(newest_in_hbm(setting, slots=2))  # one of the two is on the host: it dies every other time

    assert flows.fetched_kv.tolist() == [0, 0.5, 0.5, 0.5]
    assert flows.written_kv.tolist() == [1 + 0.5, 0.5, 0.5, 0]


def window(**changes: Any) -> Plan:
    """SWA at 80 % of 10 to 13 tokens, as above, with copies of the picks: outside HBM lies one token, the one that dies.

    Half of the picks are new, and of these a fifth of what all alike would bring comes from outside HBM.
    """
    choices = {"access": half_new(Selector.SWA, returned_share=0.2), "placement": Placement.RESIDENT} | changes
    setting = make_setting(Selector.SWA, prompt=10, sparsity=0.8, **choices)
    dead, twos, ones = setting.token_counts.dead, (2, 2, 2, 2), (1, 1, 1, 1)
    assert dead == (7, 8, 9, 10)
    return Plan(setting=setting, homes=make_homes(ones, host_kv=twos, dropped=dead, copies=ones))


def test_where_the_least_wanted_leave_hbm_what_leaves_takes_the_place_of_what_dies_or_returns() -> None:
    """The prompt's end keeps what the first step lets live; of the other steps each has 1 dead and 0.1 that returns."""
    plan = window()

    flows = traffic(plan)

    assert flows.fetched_kv.tolist() == pytest.approx([0, 0.1, 0.1, 0.1])
    assert flows.written_kv.tolist() == pytest.approx([1, 1 + 0.1, 1 + 0.1, 0])
    assert counts_of(plan.setting).copy_rate.tolist() == pytest.approx([0, 0.1, 0.2, 0.2])
    assert held(plan).host.tolist() == pytest.approx([2 * tokens * 64 for tokens in (1, 2.1, 2.1, 1)])


def test_where_the_least_wanted_leave_hbm_a_token_is_written_when_it_leaves() -> None:
    """6, 6, 7 of 8 to 10 tokens live, 1, 2, 1 of them outside HBM: what gets a copy there has left the host."""
    access = half_new(Selector.SWA, returned_share=0.2)
    setting = make_setting(Selector.SWA, prompt=8, output=3, sparsity=0.5, placement=Placement.RESIDENT, access=access)
    assert setting.token_counts.dead == (2, 3, 3)
    plan = Plan(setting=setting, homes=make_homes((5, 4, 4), host_kv=(1, 2, 3), dropped=(2, 3, 3), copies=(0, 0, 2)))

    assert traffic(plan).written_kv.tolist() == pytest.approx([1 + 1, 0, 0])
    assert held(plan).host.tolist() == pytest.approx([2 * tokens * 64 for tokens in (2, 2, 1)])


def test_a_captured_window_over_int8_keeps_ranges_of_all_keys_in_hbm() -> None:
    """A byte a token of 16 channels: of the one on the host, and of the dead. What crosses the link are 36 of 37 bytes."""
    plan, native = window(kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)), window()
    attention, waiting = plan.setting.attention, 64 * 16 * 2

    assert traffic(plan).written_kv.tolist() == traffic(native).written_kv.tolist()
    assert (link_token_bytes(plan.setting), link_token_bytes(native.setting)) == (36, 64)
    states = [attention.state_bytes(cached, DType.FP16) for cached in (11, 12, 13)]
    by_hand = [2 * (2 * 37 + 1 + dead + waiting + state) for dead, state in zip((8, 9, 10), states, strict=True)]
    assert held(plan).hbm[1:].tolist() == pytest.approx([layers + 2 * 0.1 * 37 for layers in by_hand])


def test_one_that_keeps_the_newest_in_hbm_does_so_too() -> None:
    """Three slots; a byte for each of the others, living or dead; two buffers of what is fetched."""
    int8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    setting = make_setting(Selector.SWA, prompt=8, output=3, sparsity=0.5, kv_format=int8)
    eager = replace(setting, write_back=WriteBack.AT_BIRTH)
    plan, fetched = newest_in_hbm(setting, slots=3), traffic(newest_in_hbm(setting, slots=3)).fetched_kv[1:]

    assert setting.placement is Placement.RECENT
    assert (link_token_bytes(setting), link_token_bytes(eager)) == (36, 37)
    states = [setting.attention.state_bytes(cached, DType.FP16) for cached in (9, 10)]
    by_hand = [2 * (3 * 37 + cached - 3 + 64 * 16 * 2 + state) for cached, state in zip((9, 10), states, strict=True)]
    staged = [2 * 37 * tokens for tokens in fetched]
    assert all(staged)
    assert held(plan).hbm[1:].tolist() == pytest.approx([a + b for a, b in zip(by_hand, staged, strict=True)])


@pytest.mark.parametrize("recompute", [Recompute.ACTIVATIONS_HOST, Recompute.TOKENS])
def test_captured_steps_over_int8_beside_what_they_compute_again_have_room_for_all_ranges(recompute: Recompute) -> None:
    """36 of a token's 37 bytes are levels, and cross the link; a byte for each of 64 tokens and more stays in HBM, and the open
    group's keys. Staged are two layers of what is fetched, 37 bytes a token, and of inputs, and a layer computed again, 64 each.
    """
    again = (0, 2, 3)
    setting = make_setting(
        prompt=64, output=3, recompute=recompute, kv_format=KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
    )
    forwards = recompute is Recompute.TOKENS
    homes = make_homes((60, 60, 58), host_kv=(4, 3, 5), **{"dropped" if forwards else "activations": again})
    plan = Plan(setting=setting, homes=homes)

    assert link_token_bytes(setting) == 36
    staged = [2 * 37 * kv + (64 + 2 * 32) * tokens for kv, tokens in ((3, 2), (5, 3))]
    slots = [2 * (36 * near + 66 + 64 * 16 * 2) for near in (60, 58)]
    assert held(plan).hbm[1:].tolist() == [levels + room for levels, room in zip(slots, staged, strict=True)]
    assert traffic(plan).fetched_kv.tolist() == [0, 3, 5]
    eager = replace(plan, setting=replace(setting, write_back=WriteBack.AT_BIRTH))
    assert link_token_bytes(eager.setting) == 37


@pytest.mark.parametrize(
    "changes",
    [
        {"write_back": WriteBack.AT_BIRTH},
        {"kv_format": KvFormats(gpu=KvFormat.INT4, host=KvFormat.INT4)},
        {"machine": replace(make_machine(), gpu=replace(make_machine().gpu, link=IN_MEMORY))},
    ],
    ids=["at birth", "int4", "on a CPU"],
)
def test_launched_kernel_by_kernel_homes_go_by_age_and_picks_return_from_every_age_alike(
    changes: dict[str, Any],
) -> None:
    plan = window(**changes)

    assert traffic(plan).fetched_kv.tolist() == pytest.approx([0, 1, 0.5, 0.5])
    assert counts_of(plan.setting).copy_rate.tolist() == pytest.approx([0, 1, 1, 1])


def test_at_birth_every_token_crosses_the_link_once() -> None:
    setting = make_setting(write_back=WriteBack.AT_BIRTH)

    assert traffic(newest_in_hbm(setting, slots=2)).written_kv.tolist() == [4, 1, 1, 1]
    assert traffic(in_hbm(setting)).written_kv.tolist() == [4, 1, 1, 1]


@pytest.mark.parametrize("write_back", WriteBack)
def test_with_one_output_token_only_the_prefill_spills(write_back: WriteBack) -> None:
    setting = make_setting(output=1, write_back=write_back)

    flows = traffic(newest_in_hbm(setting, slots=1))

    assert flows.written_kv.tolist() == [3 if write_back is WriteBack.AT_EVICTION else 4]
    assert not flows.fetched_kv.any()


def test_pools_of_a_dense_plan_in_hbm() -> None:
    occupancy = held(in_hbm(make_setting()))

    assert occupancy.hbm.tolist() == [2 * tokens * 64 for tokens in (4, 5, 6, 7)]
    assert occupancy.host.tolist() == [0, 0, 0, 0]


def test_host_memory_is_taken_when_a_token_leaves_or_at_its_birth() -> None:
    """At eviction a token has its place on the host from the step that writes it."""
    late = newest_in_hbm(make_setting(), slots=2)
    early = newest_in_hbm(make_setting(write_back=WriteBack.AT_BIRTH), slots=2)

    assert held(late).host.tolist() == [2 * tokens * 64 for tokens in (3, 4, 5, 5)]
    assert held(early).host.tolist() == [2 * tokens * 64 for tokens in (4, 5, 6, 7)]


@pytest.mark.parametrize("depth", [1, 2])
def test_staging_is_a_ring_of_fetched_layers(depth: int) -> None:
    """Beside 2 slots in 3 layers; while the prefill runs, two layers of what it has no slot for."""
    setting = make_setting(model=make_model(layers=3), prefetch_layers=depth)

    occupancy = held(newest_in_hbm(setting, slots=2))

    ring = [(depth + 1) * fetched * 64 for fetched in (3, 4, 5)]
    assert occupancy.hbm.tolist() == [3 * 2 * 64 + staged for staged in (2 * 2 * 64, *ring)]


def test_saved_inputs_are_held_where_they_are_saved() -> None:
    """The first 2 tokens' inputs, 32 bytes each, from the prefill on; what is projected again needs a layer's room."""
    homes = make_homes((3, 3), activations=(1, 2))
    on_host = held(Plan(setting=make_setting(output=2, recompute=Recompute.ACTIVATIONS_HOST), homes=homes))
    in_card = held(Plan(setting=make_setting(output=2, recompute=Recompute.ACTIVATIONS_HBM), homes=homes))

    assert on_host.host.tolist() == [2 * 2 * 32, 2 * 2 * 32]
    assert on_host.hbm.tolist() == [2 * 3 * 64 + 2 * 64, 2 * 3 * 64 + 2 * 2 * 32 + 2 * 64]
    assert in_card.host.tolist() == [0, 0]
    assert in_card.hbm.tolist() == [2 * (3 * 64 + 2 * 32) + 2 * 64, 2 * (3 * 64 + 2 * 32) + 2 * 64]


def test_a_forwarded_prefix_needs_room_for_a_layer_of_it() -> None:
    setting = make_setting(output=2, recompute=Recompute.TOKENS)

    occupancy = held(Plan(setting=setting, homes=make_homes((4, 3), dropped=(0, 2))))

    assert occupancy.hbm.tolist() == [2 * 4 * 64, 2 * 3 * 64 + 2 * (64 + 2 * 32)]


@pytest.mark.parametrize(
    ("selector", "state"),
    [
        (Selector.LOCAL, 0),
        (Selector.H2O, 4 * 4),  # a float32 sum for each of 2 + 2 kept tokens
        (Selector.SWA, 2 * 4 * 2),  # the last 2 queries' fp16 weights of them
        (Selector.PAGES, 8 * 2 * 16 * 2 / 16),  # minimum and maximum of 16 key channels for 16 tokens
        (Selector.TOPK, 0),  # all keys are in HBM as it is
    ],
)
def test_selection_state_is_part_of_the_pool(selector: Selector, state: float) -> None:
    """8 tokens, 2 newest and 2 older ones kept; each layer and sequence has its own."""
    setting = make_setting(selector, prompt=8, output=1, sparsity=0.5, drop_dead=False)

    assert held(in_hbm(setting)).hbm.tolist() == [2 * (8 * 64 + state)]


def test_exact_top_k_keeps_the_keys_of_what_is_off_hbm() -> None:
    setting = make_setting(Selector.TOPK, prompt=8, output=1, sparsity=0.5)

    assert held(newest_in_hbm(setting, slots=3)).hbm.tolist() == [2 * (3 * 64 + 5 * 32) + 2 * 5 * 64]


def test_formats_are_per_tier() -> None:
    """int8 in HBM: 32 + 1 + 4 bytes a token and 64 keys of 32 bytes that wait; int4 on the host: 16 + 1 + 4."""
    formats = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT4)
    plan = newest_in_hbm(make_setting(output=2, kv_format=formats), slots=3)

    assert held(plan).hbm.tolist() == [
        2 * (3 * 37 + 64 * 32) + 2 * 1 * 64,
        2 * (3 * 37 + 64 * 32) + 2 * 2 * 37,
    ]
    assert held(plan).host.tolist() == [2 * 2 * 21, 2 * 2 * 21]


def test_columns_of_zeros_are_columns_too() -> None:
    columns = home_columns(make_homes((3, 0), host_kv=(0, 4)))

    assert columns.hbm.tolist() == [3, 0]
    assert columns.host_kv.tolist() == [0, 4]
    assert columns.copies.tolist() == [0, 0]
    assert columns.copies.dtype == columns.hbm.dtype == float
