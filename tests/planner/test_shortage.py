"""Why nothing fits: the memory, the step, the bytes, what is to blame, and changes that do fit."""

import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from commandline import run
from planner import remedy
from planner.infeasible import diagnose, infeasible
from planner.inputs import Question, request_of
from planner.optimum import optimum
from planner.request import Request
from planner.shortage import memory_shortage, with_more
from planner.solution import Blame, Infeasible, Shortage, Tier
from planner.solve import solve
from planner.terminal import INFEASIBLE
from sim.units import GIB

ONE_AT_ONCE = {"gpu": "v100-32g", "batch": "64", "concurrency": "all", "lossless": True}


def asked(**changes: object) -> Request:
    return request_of(Question(**changes))  # type: ignore[arg-type]


def refused(request: Request) -> Infeasible:
    with pytest.raises(Infeasible) as caught:
        solve(request)
    return caught.value


def shortage_of(error: Infeasible) -> Shortage:
    assert error.shortage is not None
    return error.shortage


def test_weights_beyond_all_memory_are_to_blame() -> None:
    error = refused(asked(gpu="t4", model="llama-2-70b"))

    shortage = shortage_of(error)
    assert (shortage.blame, shortage.tier, shortage.step) == (Blame.WEIGHTS, Tier.HOST, None)
    assert shortage.blamed_bytes > 128 * GIB
    line = str(error)
    assert line.startswith("llama-2-70b (fp16) on t4 does not fit: host memory is 12.3 GiB short before the first step")
    assert "weights take 128 GiB; what fits: --weight-format int8 (" in line
    assert line.isprintable()


def test_kv_beyond_a_small_host_is_to_blame() -> None:
    shortage = diagnose(asked(**ONE_AT_ONCE, prompt="512", host_gib="16"))

    assert (shortage.blame, shortage.tier) == (Blame.KV, Tier.HOST)
    assert shortage.step is not None
    assert 0 < shortage.missing_bytes < shortage.blamed_bytes


def test_more_at_once_than_memory_holds_is_answered_with_fewer() -> None:
    shortage = shortage_of(refused(asked(**ONE_AT_ONCE, host_gib="12")))

    fewer = next(one for one in shortage.suggestions if one.words.startswith("--concurrency "))
    assert fewer.request.concurrency is not None
    assert 1 <= fewer.request.concurrency < 64
    assert fewer.request.workload.batch == 64


def test_a_prompt_too_long_for_a_single_sequence_is_answered_with_a_shorter_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remedy, "PATIENCE_S", 60.0)

    error = refused(
        asked(gpu="t4", model="llama-3.1-8b", hbm_gib="6", prompt="130000", output="8", batch="1", lossless=True)
    )

    shortage = shortage_of(error)
    assert (shortage.blame, shortage.tier) == (Blame.KV, Tier.HBM)
    assert "KV of a single sequence takes up to" in str(error)
    shorter = next(one for one in shortage.suggestions if one.words.startswith("--prompt "))
    assert 1000 < shorter.request.workload.prompt_tokens < 130_000


def test_a_time_between_tokens_that_no_plan_keeps_is_answered_with_the_least_one() -> None:
    error = refused(asked(batch="2", output="20", max_tpot_ms="1"))

    shortage = shortage_of(error)
    assert (shortage.blame, shortage.tier, shortage.missing_bytes) == (Blame.LATENCY, None, 0)
    assert "on a100-40g keeps to 1 ms per output token, the quickest plan takes" in str(error)
    assert shortage.suggestions[0].words.startswith("--max-tpot-ms ")


@pytest.mark.parametrize(
    "changes",
    [{"gpu": "t4", "model": "llama-2-70b"}, {**ONE_AT_ONCE, "host_gib": "12"}, {"hbm_gib": "2", "batch": "4"}],
    ids=["weights", "kv", "hbm"],
)
def test_every_suggestion_is_a_request_that_a_plan_fits(changes: dict[str, object]) -> None:
    suggestions = shortage_of(infeasible(asked(**changes))).suggestions

    assert suggestions
    for one in suggestions:
        best = optimum(one.request)
        assert best is not None
        assert best.found.priced.outcome.tokens_per_s == pytest.approx(one.tokens_per_s, rel=1e-9)


def test_the_words_of_a_suggestion_are_options_that_give_its_speed() -> None:
    asked_for = ("--hbm-gib", "2", "--batch", "4")
    suggestions = shortage_of(infeasible(asked(hbm_gib="2", batch="4"))).suggestions

    answers = [json.loads(run("solve", *asked_for, *one.words.split(), "--json").out) for one in suggestions]

    speeds = [answer["predicted"]["tokens_per_s"] for answer in answers]
    assert speeds == pytest.approx([one.tokens_per_s for one in suggestions], rel=1e-9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    gpu=st.sampled_from(("t4", "v100-16g")),
    model=st.sampled_from(("opt-6.7b", "llama-2-13b")),
    batch=st.sampled_from((1, 8, 64)),
    prompt=st.sampled_from((16, 300, 1500)),
    output=st.sampled_from((2, 40, 300)),
    host_gib=st.sampled_from((0, 1, 3)),
    lossless=st.booleans(),
    together=st.booleans(),
)
def test_what_is_missing_is_neither_more_nor_less_than_it_takes(
    gpu: str, model: str, batch: int, prompt: int, output: int, host_gib: int, lossless: bool, together: bool
) -> None:
    request = asked(
        gpu=gpu,
        model=model,
        batch=str(batch),
        prompt=str(prompt),
        output=str(output),
        host_gib=str(host_gib),
        lossless=lossless,
        concurrency="all" if together else "auto",
    )
    shortage = memory_shortage(request)
    assume(shortage is not None)
    assert shortage is not None
    assert shortage.tier is not None

    enough = with_more(request, shortage.tier, shortage.missing_bytes + 1)
    too_little = with_more(request, shortage.tier, shortage.missing_bytes * 99 // 100)

    assert optimum(request) is None
    assert memory_shortage(too_little) is not None
    left = memory_shortage(enough)
    assert left is None or left.tier is not shortage.tier or left.step is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "t4", "model": "opt-6.7b", "prompt": "500", "output": "8", "kv_budget_gib": "0.01", "host_gib": "3"},
        {"gpu": "v100-16g", "model": "llama-3-8b", "prompt": "64", "output": "40", "host_gib": "0.25"},
        {"gpu": "l4", "model": "opt-2.7b", "prompt": "500", "output": "300", "kv_budget_gib": "1", "host_gib": "0"},
    ],
    ids=["hbm for kv", "host for weights", "host for kv"],
)
def test_with_what_is_missing_a_plan_is_found(changes: dict[str, object]) -> None:
    request = asked(**changes, batch="32", concurrency="all", lossless=True)
    shortage = shortage_of(infeasible(request, suggest=False))
    assert shortage.tier is not None
    token_bytes = request.model.layers * 2 * 2 * request.model.kv_dim

    # Tokens are whole, and the steps are coupled: a few tokens of each sequence more than the least
    enough = with_more(request, shortage.tier, shortage.missing_bytes + 3 * 32 * token_bytes)

    assert optimum(request) is None
    assert optimum(enough) is not None


def test_the_error_survives_the_way_to_another_process() -> None:
    error = infeasible(asked(hbm_gib="2", batch="4"), suggest=False)

    again = pickle.loads(pickle.dumps(error))

    assert (str(again), again.shortage) == (str(error), error.shortage)
    assert shortage_of(error).suggestions == ()


def test_the_command_line_says_it_in_one_line() -> None:
    said = run("solve", "--gpu", "t4", "--model", "llama-2-70b", "--json")

    assert said.code == INFEASIBLE
    assert "what fits: " in said.error


def test_more_of_a_memory_is_more_of_what_kv_may_use() -> None:
    request = asked(kv_budget_gib="1")

    assert with_more(request, Tier.HBM, GIB).kv_budget_bytes == 2 * GIB
    more = with_more(request, Tier.HOST, GIB).machine.host
    assert more.usable_bytes == pytest.approx(request.machine.host.usable_bytes + GIB, abs=2)
    assert with_more(replace(request, kv_budget_bytes=None), Tier.HBM, 5).kv_budget_bytes is None
