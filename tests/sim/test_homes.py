"""Token homes: rows of one length, tokens that only move outward, and the phases that follow."""

import pytest

from builders import make_homes, refuses
from sim.homes import Phase, PhaseName, TokenHomes


def phases_of(homes: TokenHomes, dead: tuple[int, ...] = ()) -> list[tuple[str, int]]:
    return [(phase.name.value, phase.first_step) for phase in homes.phases(dead or (0,) * homes.steps)]


def test_all_in_hbm_is_one_phase() -> None:
    assert phases_of(make_homes((4, 5, 6))) == [("gpu", 0)]


def test_the_papers_three_phases() -> None:
    """HBM alone; from step 1 the host too; from step 3 some layer inputs in place of KV."""
    homes = make_homes((4, 4, 4, 4), host_kv=(0, 1, 2, 2), activations=(0, 0, 0, 1))

    assert homes.phases((0,) * 4) == (
        Phase(name=PhaseName.GPU, first_step=0),
        Phase(name=PhaseName.GPU_CPU, first_step=1),
        Phase(name=PhaseName.RECOMPUTE, first_step=3),
    )


def test_phases_that_do_not_occur_are_not_named() -> None:
    assert phases_of(make_homes((2, 2), host_kv=(2, 3))) == [("gpu_cpu", 0)]
    assert phases_of(make_homes((2, 2), host_kv=(1, 1), activations=(1, 2))) == [("recompute", 0)]
    assert phases_of(make_homes((4, 4), activations=(0, 1))) == [("gpu", 0), ("recompute", 1)]
    assert phases_of(make_homes((2, 2), activations=(2, 3))) == [("recompute", 0)]


def test_a_host_that_is_used_only_once_tokens_are_recomputed_is_no_phase_of_its_own() -> None:
    homes = make_homes((4, 3, 3), activations=(0, 1, 1), host_kv=(0, 1, 2), dropped=(0, 0, 0))

    assert phases_of(homes) == [("gpu", 0), ("recompute", 1)]


def test_dead_tokens_need_no_recomputation_and_a_dropped_prefix_does() -> None:
    homes = make_homes((4, 4, 4), dropped=(0, 1, 2))

    assert phases_of(homes, dead=(0, 1, 2)) == [("gpu", 0)]
    assert phases_of(homes, dead=(0, 1, 1)) == [("gpu", 0), ("recompute", 2)]


def test_columns_must_be_equally_long() -> None:
    with refuses("homes, columns of [1, 2] rows, must all have one row a step"):
        TokenHomes(hbm=(1, 2), host_kv=(0,), activations=(0, 0), dropped=(0, 0), copies=(0, 0))
    with refuses("homes, columns of [0] rows, must all have one row a step"):
        TokenHomes(hbm=(), host_kv=(), activations=(), dropped=(), copies=())


@pytest.mark.parametrize("column", ["host_kv", "activations", "dropped", "copies"])
def test_no_home_holds_less_than_nothing(column: str) -> None:
    with refuses(f"homes.{column}=-1, must be at least 0 at every step"):
        make_homes((4, 4), **{column: (0, -1)})


@pytest.mark.parametrize(
    ("columns", "step"),
    [
        ({"host_kv": (2, 1)}, 1),  # back to HBM
        ({"host_kv": (0, 1, 2), "activations": (0, 1, 0)}, 2),  # from inputs to KV on the host
        ({"activations": (0, 0, 2), "dropped": (0, 1, 0)}, 2),  # out of nothing
        ({"host_kv": (0, 0), "dropped": (3, 2)}, 1),
    ],
)
def test_tokens_never_move_inward(columns: dict[str, tuple[int, ...]], step: int) -> None:
    with refuses(f"homes at step {step}, tokens moved inward; homes go hbm, host_kv, activations, dropped"):
        make_homes((4,) * len(columns[next(iter(columns))]), **columns)
