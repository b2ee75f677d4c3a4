"""Which tokens a step attends to, counted by hand and checked for every length."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_model, refuses
from sim.attention import Attention, Selector, TokenCounts, count_tokens
from sim.spec import DType

SPARSE = [selector for selector in Selector if selector is not Selector.DENSE]


def attentions() -> st.SearchStrategy[Attention]:
    return st.builds(
        Attention,
        selector=st.sampled_from(SPARSE),
        sparsity=st.floats(0, 0.99),
        local_fraction=st.floats(0, 1),
    )


def test_the_papers_example_keeps_one_newest_and_one_older_token() -> None:
    """A caching ratio of 40 % on five tokens: k = round(5 x 0.4 / 2) = 1 of each kind."""
    swa = Attention(selector=Selector.SWA, sparsity=0.6)

    assert (swa.local_tokens(5), swa.global_tokens(5)) == (1, 1)


def test_the_papers_setting_keeps_a_fifth() -> None:
    """128 tokens at 80 % sparsity: 12.8 newest and 12.8 older ones, rounded; 640 tokens: 64 of each."""
    swa = Attention(selector=Selector.SWA, sparsity=0.8)

    assert [(swa.local_tokens(n), swa.global_tokens(n)) for n in (128, 640)] == [(13, 13), (64, 64)]


@pytest.mark.parametrize(
    ("selector", "local_fraction", "kept"),
    [
        (Selector.DENSE, 0.5, (10, 0)),
        (Selector.LOCAL, 0.5, (4, 0)),
        (Selector.STRIDED, 0.5, (2, 2)),
        (Selector.H2O, 0.25, (1, 3)),
        (Selector.PAGES, 1.0, (4, 0)),
        (Selector.TOPK, 0.0, (1, 4)),  # the token being processed is always attended to
    ],
)
def test_ten_tokens_at_60_percent_sparsity(selector: Selector, local_fraction: float, kept: tuple[int, int]) -> None:
    sparsity = 0.0 if selector is Selector.DENSE else 0.6
    attention = Attention(selector=selector, sparsity=sparsity, local_fraction=local_fraction)

    assert (attention.local_tokens(10), attention.global_tokens(10)) == kept


@pytest.mark.parametrize(
    ("selector", "living"),
    [
        (Selector.LOCAL, 20),
        (Selector.STRIDED, 20),
        (Selector.H2O, 20),
        (Selector.SWA, 30),  # 10 newest, 10 older, 10 that the last 10 steps left out
        (Selector.PAGES, 100),
        (Selector.TOPK, 100),
    ],
)
def test_who_may_still_return_of_100_tokens_at_80_percent(selector: Selector, living: int) -> None:
    assert Attention(selector=selector, sparsity=0.8).living_tokens(100) == living


def test_three_steps_of_swa_counted_by_hand() -> None:
    """10 to 13 tokens at 80 %: k = 1, so three live (newest, older, one leaver) and the rest is dead."""
    counts = count_tokens(Attention(selector=Selector.SWA, sparsity=0.8), prompt_tokens=10, steps=4)

    assert counts == TokenCounts(cached=(10, 11, 12, 13), local=(1, 1, 1, 1), selected=(1, 1, 1, 1), dead=(7, 8, 9, 10))


def test_what_has_been_dropped_stays_dropped() -> None:
    """H2O at 50 %: 9 tokens keep 2 + 2; at 10 the halves round up to 3, but only five tokens are left to choose from."""
    counts = count_tokens(Attention(selector=Selector.H2O, sparsity=0.5), prompt_tokens=8, steps=3)

    assert counts == TokenCounts(cached=(8, 9, 10), local=(2, 2, 3), selected=(2, 2, 2), dead=(4, 5, 5))


def test_nothing_is_dead_unless_the_dead_are_dropped() -> None:
    counts = count_tokens(Attention(selector=Selector.LOCAL, sparsity=0.5), prompt_tokens=8, steps=3, drop_dead=False)

    assert counts == TokenCounts(cached=(8, 9, 10), local=(4, 5, 5), selected=(0, 0, 0), dead=(0, 0, 0))


@given(attentions(), st.integers(1, 60), st.integers(1, 40), st.booleans())
def test_counts_are_lawful_at_every_step(attention: Attention, prompt: int, steps: int, drop_dead: bool) -> None:
    counts = count_tokens(attention, prompt, steps, drop_dead=drop_dead)

    assert counts.cached == tuple(range(prompt, prompt + steps))
    for cached, local, selected, dead in zip(counts.cached, counts.local, counts.selected, counts.dead, strict=True):
        assert local >= 1
        assert min(selected, dead) >= 0
        assert local + selected + dead <= cached
    living = [cached - dead for cached, dead in zip(counts.cached, counts.dead, strict=True)]
    older = [cached - local for cached, local in zip(counts.cached, counts.local, strict=True)]
    assert all(before <= after <= before + 1 for before, after in pairwise(living))
    assert all(before <= after <= before + 1 for before, after in pairwise(older))
    assert all(before <= after for before, after in pairwise(counts.dead))


@given(attentions(), st.integers(1, 1000))
def test_no_more_is_kept_than_there_is_and_no_less_than_one(attention: Attention, cached: int) -> None:
    kept = attention.local_tokens(cached) + attention.global_tokens(cached)

    assert 1 <= kept <= attention.living_tokens(cached) <= cached


def test_selection_state_by_hand() -> None:
    """Keys of 16 elements in fp16: a page of 16 tokens has a minimum and a maximum; top-k reads every key."""
    model = make_model()
    sparse = {selector: Attention(selector=selector, sparsity=0.8) for selector in SPARSE}

    assert sparse[Selector.PAGES].state_bytes_per_token(model, DType.FP16) == 2 * 16 * 2 / 16
    assert sparse[Selector.TOPK].offloaded_state_bytes_per_token(model, DType.FP16) == 32.0
    assert sparse[Selector.SWA].state_bytes(100, DType.FP16) == 10 * 20 * 2  # k queries' weights of 2 k tokens
    assert sparse[Selector.H2O].state_bytes(100, DType.FP16) == 20 * 4  # a float32 sum a token
    assert sparse[Selector.LOCAL].state_bytes(100, DType.FP16) == 0
    assert sparse[Selector.SWA].state_bytes_per_token(model, DType.FP16) == 0.0
    assert sparse[Selector.PAGES].offloaded_state_bytes_per_token(model, DType.FP16) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"selector": "sparse"},
            "attention.selector=sparse, must be one of dense, local, strided, swa, h2o, pages, topk",
        ),
        ({"selector": Selector.SWA, "sparsity": 1.2}, "attention.sparsity=1.2, must lie in [0, 1)"),
        ({"selector": Selector.SWA, "sparsity": 1}, "attention.sparsity=1, must lie in [0, 1)"),
        ({"selector": Selector.SWA, "sparsity": float("nan")}, "attention.sparsity=nan, must lie in [0, 1)"),
        ({"selector": Selector.SWA, "local_fraction": -0.1}, "attention.local_fraction=-0.1, must lie in [0, 1]"),
        (
            {"selector": Selector.DENSE, "sparsity": 0.5},
            "attention.sparsity=0.5, dense attention leaves nothing out: use 0 or a sparse selector",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with refuses(message):
        Attention(**arguments)
