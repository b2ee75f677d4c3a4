"""Continuous admission: who runs when, by hand and by property."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.admission import Rules, Scheduler, schedule
from sim.outcome import Served
from sim.plan import Preemption

TWO_OF_THREE = Rules(
    batch=3,
    prompt_tokens=2,
    held_bytes=(2.0, 3.0, 4.0),
    budget_bytes=6.0,
    host_bytes=100.0,
    most_sequences=3,
    prefill_tokens=100,
    preemption=Preemption.RECOMPUTE,
)


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    prompt, tokens = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    most = float(prompt + tokens - 1)
    return Rules(
        batch=draw(st.integers(1, 9)),
        prompt_tokens=prompt,
        held_bytes=tuple(float(prompt + done) for done in range(tokens)),
        budget_bytes=most * draw(st.floats(1.0, 6.0)),
        host_bytes=draw(st.sampled_from((0.0, most, 1e9))),
        most_sequences=draw(st.integers(1, 9)),
        prefill_tokens=draw(st.integers(1, 40)),
        preemption=draw(st.sampled_from(Preemption)),
    )


def test_three_sequences_where_one_must_step_back() -> None:
    # 2 + 2 + 2 bytes enter at once; growing to 3 each leaves room for two, to 4 for one.
    # Who stepped back returns with what it has: the second prefills 2 + 2 tokens, the third 2 + 1.
    planned = schedule(TWO_OF_THREE)

    assert planned.prefilled_tokens.tolist() == [6, 0, 0, 4, 3, 0]
    assert sorted(planned.runs) == [(1, 1, 1), (1, 1, 2), (5, 2, 1)]
    assert planned.held_bytes.tolist() == [6, 6, 4, 4, 3, 4]
    assert planned.served == tuple(Served(sequences=1, first_step=0, last_step=last) for last in (2, 3, 5))


def test_swapping_moves_out_and_in_the_same_bytes_and_prefills_once() -> None:
    planned = schedule(replace(TWO_OF_THREE, preemption=Preemption.SWAP))

    assert planned.prefilled.sum() == 3.0
    assert planned.swapped_out.sum() == planned.swapped_in.sum() > 0.0
    assert planned.host_bytes[-1] == 0.0


@pytest.mark.parametrize("preemption", Preemption)
def test_who_ends_while_waiting_to_return_does_not(preemption: Preemption) -> None:
    scheduler = Scheduler(replace(TWO_OF_THREE, preemption=preemption))
    scheduler.step()
    turn = scheduler.step()
    assert turn is not None
    (back,) = turn.left

    scheduler.retire(back.number)

    assert scheduler.host_bytes == 0.0
    rest = list(iter(scheduler.step, None))
    assert all(change.number != back.number for turn in rest for change in turn.entered)


def test_with_room_for_all_it_is_one_wave() -> None:
    planned = schedule(replace(TWO_OF_THREE, budget_bytes=12.0))

    assert planned.served == (Served(sequences=3, first_step=0, last_step=2),)


def test_a_budget_below_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget_bytes=3, must hold one whole sequence of 4 bytes"):
        schedule(replace(TWO_OF_THREE, budget_bytes=3.0))


@settings(max_examples=200, deadline=None)
@given(rules())
def test_everyone_is_served_and_nothing_overflows(given_rules: Rules) -> None:
    planned = schedule(given_rules)
    tokens = len(given_rules.held_bytes)

    assert planned.decoding(np.ones(tokens)).sum() + planned.prefilled.sum() == given_rules.batch * tokens
    assert sum(some.sequences for some in planned.served) == given_rules.batch
    assert planned.held_bytes.max() <= given_rules.budget_bytes
    assert planned.host_bytes.max(initial=0.0) <= given_rules.host_bytes
    assert np.isclose(planned.swapped_in.sum(), planned.swapped_out.sum())
    assert (planned.decoding(np.ones(tokens)) + planned.prefilled).max() <= given_rules.most_sequences
    assert all(some.last_step - some.first_step >= tokens - 1 for some in planned.served)
    if given_rules.preemption is Preemption.RECOMPUTE:
        assert planned.swapped_out.sum() == 0.0


def test_turn_by_turn_the_three_do_as_scheduled() -> None:
    scheduler = Scheduler(TWO_OF_THREE)
    turns = list(iter(scheduler.step, None))

    assert [[change.number for change in turn.entered] for turn in turns] == [[0, 1, 2], [], [], [1], [2], []]
    assert [turn.left for turn in turns] == [(), ((2, 1, False),), ((1, 2, False),), (), (), ()]
    assert [turn.decoding for turn in turns] == [(), (0, 1), (0,), (), (), (2,)]


@settings(max_examples=100, deadline=None)
@given(rules())
def test_turns_add_up_to_the_schedule(given_rules: Rules) -> None:
    planned, turns = schedule(given_rules), list(iter(Scheduler(given_rules).step, None))
    done = dict.fromkeys(range(given_rules.batch), 0)
    for turn in turns:
        for change in turn.entered:
            assert done[change.number] == change.done
        prefilled = [change.number for change in turn.entered if not change.swapped]
        for number in (*turn.decoding, *prefilled):
            done[number] += 1

    assert len(turns) == planned.steps
    assert [len(turn.decoding) for turn in turns] == planned.decoding(np.ones(len(given_rules.held_bytes))).tolist()
    assert set(done.values()) == {len(given_rules.held_bytes)}


@settings(max_examples=100, deadline=None)
@given(rules(), st.randoms(use_true_random=False))
def test_texts_that_end_early_make_room(given_rules: Rules, rng: random.Random) -> None:
    scheduler, ended, steps = Scheduler(given_rules), set[int](), 0
    while (turn := scheduler.step()) is not None:
        steps += 1
        assert not ended & {*turn.decoding, *(change.number for change in (*turn.entered, *turn.left))}
        stepped_back = [sequence for sequence in scheduler.waiting if sequence.done]
        for sequence in (*scheduler.running, *stepped_back):
            if rng.random() < 0.3:
                scheduler.retire(sequence.number)
                ended.add(sequence.number)

    assert steps <= schedule(given_rules).steps
    assert scheduler.host_bytes == 0.0


@pytest.mark.parametrize(
    ("prefill_tokens", "entered"),
    [
        (100, [5, 0, 0]),
        (4, [2, 2, 1, 0, 0]),  # as many prompts as a step prefills
        (1, [1, 1, 1, 1, 1, 0, 0]),  # a prompt that is longer goes by itself
    ],
)
def test_newcomers_are_prefilled_together(prefill_tokens: int, entered: list[int]) -> None:
    """Five of 2 tokens, with room for all; each decodes for two steps more."""
    roomy = replace(TWO_OF_THREE, batch=5, budget_bytes=100.0, most_sequences=5, prefill_tokens=prefill_tokens)

    planned = schedule(roomy)

    assert planned.prefilled.tolist() == entered
    assert planned.prefill_lengths.tolist() == [min(1, many) for many in entered]


def test_who_returns_with_more_tokens_is_of_another_length() -> None:
    # 2 + 2 + 2 bytes enter. Of 3 each 7 bytes hold two, of 4 one: the third steps back with 1 token done, then the second
    # with 2. Once the first has ended both return, with 2 + 2 and 2 + 1 tokens, and fill the 7 bytes.
    planned = schedule(replace(TWO_OF_THREE, budget_bytes=7.0))

    assert planned.prefilled_tokens.tolist() == [6, 0, 0, 7, 0]
    assert planned.prefill_lengths.tolist() == [1, 0, 0, 2, 0]


@settings(max_examples=100, deadline=None)
@given(rules())
def test_each_length_counts_once(given_rules: Rules) -> None:
    planned, turns = schedule(given_rules), list(iter(Scheduler(given_rules).step, None))

    lengths = [{change.done for change in turn.entered if not change.swapped} for turn in turns]
    assert planned.prefill_lengths.tolist() == [len(found) for found in lengths]
