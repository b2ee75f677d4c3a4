"""What captured INT8 fetches, counted by hand and token by token: a head of 16 channels, 36 bytes of levels and range a token."""

from dataclasses import replace

import numpy as np
import pytest

from builders import make_model, make_setting, newest_in_hbm
from sim.attention import Selector
from sim.capture import keeps_open_group
from sim.counts import Column
from sim.flows import flows_of, home_columns
from sim.kv import GROUP_TOKENS, KvFormat, KvFormats, kv_layer_bytes
from sim.occupancy import occupancy_of
from sim.open_group import fetched_layer_bytes, least_layer_bytes
from sim.plan import Admission, Plan, Recompute, Setting

INT8 = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT8)
LEVELS, RANGE = 16, 4


def column(*tokens: float) -> Column:
    return np.array(tokens, dtype=np.float64)


@pytest.mark.parametrize(
    ("on_host", "cached", "size_bytes"),
    [
        # 10 of 11 are fetched: 30 tokens of the first group are open, so that of all 10 keys are in HBM.
        (11, 31, 10 * (LEVELS + RANGE)),
        # 70: the 5 open ones for their values. 58 of the group before have both in HBM, the 7 before those have not.
        (71, 64 + 6, 5 * LEVELS + (70 - 5 - 58) * 2 * LEVELS + 70 * RANGE),
        # A group has just been completed: none is open, 63 have stayed behind.
        (101, 129, (100 - 63) * 2 * LEVELS + 100 * RANGE),
        # 63 are open: none of the group before has stayed behind.
        (101, 192, 63 * LEVELS + (100 - 63) * 2 * LEVELS + 100 * RANGE),
        # The newborn is not fetched.
        (1, 129, 0),
        (0, 129, 0),
    ],
)
def test_bytes_of_a_head_by_hand(on_host: int, cached: int, size_bytes: int) -> None:
    assert fetched_layer_bytes(make_model(), column(on_host), column(cached)).tolist() == [size_bytes]


def test_bytes_are_those_of_each_token_and_no_less_than_the_line_says() -> None:
    """Rows of the open group's keys: its tokens', the newborn's, and in the others still those of the group before."""
    model = make_model(heads=2, kv_heads=2)
    for cached in (1, 2, 30, 64, 65, 66, 100, 127, 128, 129, 190, 250):
        on_host = column(*range(cached + 1))
        token_bytes, spared = least_layer_bytes(model, column(cached))

        fetched = fetched_layer_bytes(model, on_host, np.full_like(on_host, cached))

        assert fetched.tolist() == [_token_by_token(2, int(tokens), cached) for tokens in on_host]
        line = token_bytes * on_host - spared
        assert (line <= fetched).all()
        assert line[GROUP_TOKENS:].tolist() == fetched[GROUP_TOKENS:].tolist()


def _token_by_token(heads: int, on_host: int, cached: int) -> int:
    newborn, total = cached - 1, 0
    for position in range(cached - on_host, newborn):
        is_open = position // GROUP_TOKENS == newborn // GROUP_TOKENS
        stays_behind = not is_open and position + GROUP_TOKENS > newborn
        total += RANGE + (LEVELS if is_open else 0 if stays_behind else 2 * LEVELS)
    return heads * total


def spilling(setting: Setting) -> Plan:
    return newest_in_hbm(setting, slots=30)


def int8_setting(**changes: object) -> Setting:
    return make_setting(prompt=99, output=4, kv_format=INT8, **changes)


def test_a_plan_fetches_what_they_come_to_in_tokens_and_holds_as_much_as_ever() -> None:
    """72, 73 and 74 of 102 tokens are on the host, 69 to 71 but for the newborn; 35 to 37 are open. A token takes 37 bytes."""
    plan = spilling(int8_setting())
    assert keeps_open_group(plan.setting)
    assert kv_layer_bytes(plan.setting.model, plan.setting.dtype, KvFormat.INT8) == 37

    homes = home_columns(plan.homes)
    flows = flows_of(plan, homes)
    held = occupancy_of(plan, homes, flows)

    assert flows.fetched_kv.tolist() == pytest.approx(
        [
            0,
            ((69 - 63) * 32 + 35 * 16 + 69 * 4) / 37,
            ((70 - 63) * 32 + 36 * 16 + 70 * 4) / 37,
            ((71 - 63) * 32 + 37 * 16 + 71 * 4) / 37,
        ]
    )
    open_bytes, staged = 64 * 16 * 2, [0, 2 * 70 * 37, 2 * 71 * 37, 2 * 72 * 37]
    assert held.hbm[1:].tolist() == [2 * (30 * 37 + open_bytes) + ring for ring in staged[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        {"host_attention": True, "kv_format": KvFormats(gpu=KvFormat.INT8)},
        {"weights_on_host": 0.5, "model": make_model(layers=3)},
        {"recompute": Recompute.ACTIVATIONS_HOST},
        {"recompute": Recompute.TOKENS},
        {"kv_format": KvFormats()},
        {"kv_format": KvFormats(gpu=KvFormat.INT8)},
        {"admission": Admission.CONTINUOUS},
    ],
)
def test_other_settings_fetch_whole_tokens(changes: dict[str, object]) -> None:
    assert keeps_open_group(int8_setting())
    assert not keeps_open_group(replace(int8_setting(), **changes))


def test_heads_that_share_a_key_head_keep_one_too() -> None:
    assert keeps_open_group(int8_setting(model=make_model(heads=2)))


def test_selectors_keep_no_open_group_apart() -> None:
    assert not keeps_open_group(make_setting(Selector.SWA, sparsity=0.5, kv_format=INT8))
