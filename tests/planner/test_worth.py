"""What one unit more of a resource brings, checked by solving the request that has it."""

import json
from dataclasses import replace

import pytest

from commandline import run
from planner.inputs import Question, request_of
from planner.request import Request
from planner.solve import solve
from planner.worth import Worth, worth_of

TOGETHER = {"batch": "32", "prompt": "256", "output": "64", "lossless": True, "concurrency": "all", "hbm_gib": "28"}


def asked(**changes: object) -> Request:
    return request_of(Question(**changes))  # type: ignore[arg-type]


def worth(**changes: object) -> Worth:
    request = asked(**changes)
    found = worth_of(solve(request), request)
    assert found is not None
    return found


def test_where_hbm_holds_everything_only_arithmetic_is_worth_something() -> None:
    ample = worth(model="opt-125m", batch="4", prompt="64", output="16")

    assert ample.hbm_tokens_per_s_per_gib == ample.host_tokens_per_s_per_gib == ample.link_tokens_per_s_per_gb_s == 0.0
    assert ample.flops_tokens_per_s_per_percent > 0.0


def test_where_kv_spills_memory_is_worth_as_much_as_solving_with_more_says() -> None:
    short = asked(**TOGETHER)
    more = asked(**{**TOGETHER, "hbm_gib": "29"})

    gained = solve(more).predicted.tokens_per_s - solve(short).predicted.tokens_per_s

    assert gained > 0.0
    assert worth(**TOGETHER).hbm_tokens_per_s_per_gib == pytest.approx(gained, rel=1e-6)


def test_the_link_is_worth_as_much_as_solving_with_a_wider_one_says() -> None:
    narrow = {"model": "opt-13b", "gpu": "t4", "batch": "4", "prompt": "64", "output": "16", "lossless": True}
    now, wider = ({**narrow, "link_gb_s": rate} for rate in ("10", "11"))

    gained = solve(asked(**wider)).predicted.tokens_per_s - solve(asked(**now)).predicted.tokens_per_s

    assert gained > 0.0
    assert worth(**now).link_tokens_per_s_per_gb_s == pytest.approx(gained, rel=1e-6)


@pytest.mark.parametrize("gpu", ["v100-32g", "a100-40g"])
@pytest.mark.parametrize(
    "kept", [{"lossless": True}, {"kv_formats": ("int8",), "sparsity": "0.5"}], ids=["all", "less"]
)
def test_nothing_is_worth_less_than_nothing(gpu: str, kept: dict[str, object]) -> None:
    found = worth(gpu=gpu, batch="48", prompt="300", output="48", concurrency="all", **kept)

    assert min(getattr(found, name) for name in Worth.__dataclass_fields__) >= 0.0


def test_a_budget_for_kv_grows_with_the_memory() -> None:
    assert worth(**{**TOGETHER, "hbm_gib": None, "kv_budget_gib": "1"}).hbm_tokens_per_s_per_gib > 0.0


def test_it_is_said_in_tokens_a_second_so_only_where_they_are_wanted() -> None:
    request = asked(model="opt-125m", batch="4", prompt="64", output="16", objective="tpot")

    assert worth_of(solve(request), request) is None


def test_more_of_everything_leaves_the_request_as_it_was() -> None:
    request = asked(model="opt-125m", batch="2", prompt="8", output="4")
    before = replace(request)

    worth_of(solve(request), request)

    assert request == before


def test_solve_shows_it_to_people_and_programs() -> None:
    quick = ("--model", "opt-125m", "--batch", "2", "--prompt", "8", "--output", "6")

    answer = json.loads(run("solve", *quick, "--json").out)
    latency = json.loads(run("solve", *quick, "--objective", "ttft", "--json").out)
    shown = " ".join(run("solve", *quick).out.split())

    assert list(answer["worth"]) == [
        "hbm_tokens_per_s_per_gib",
        "host_tokens_per_s_per_gib",
        "link_tokens_per_s_per_gb_s",
        "flops_tokens_per_s_per_percent",
    ]
    assert latency["worth"] is None
    assert "one more is worth, in tokens/s: GiB of HBM 0, GiB of host memory 0, GB/s of link 0, % of FLOP/s" in shown
