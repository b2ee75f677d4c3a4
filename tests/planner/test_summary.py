"""What people read: every statement of the summary, on small plans whose limits are known."""

import sys
from dataclasses import replace
from io import StringIO

import pytest

from builders import in_hbm, make_cost, make_machine, make_model, make_setting, newest_in_hbm
from planner.limits import stretches
from planner.request import Objective, Request
from planner.solution import Certificate, Solution
from planner.summary import simulation_summary, summary
from planner.terminal import show
from sim.attention import Selector
from sim.cost import CostModel
from sim.forecast import forecast
from sim.kv import KvFormat, KvFormats
from sim.outcome import Outcome, Utilisation
from sim.plan import Admission, Plan, Recompute
from sim.spec import DType, WeightFormat

CERTIFICATE = Certificate(
    name="highs",
    status="optimal",
    objective_s=1.003,
    bound_s=1.0,
    gap=0.003,
    solver_gap=0.001,
    discretisation_gap=0.002,
    solve_s=0.045,
    options=60,
    solved=7,
    binding=tuple(f"hbm_capacity_step_{step}" for step in range(1, 7)),
)


def solved(plan: Plan, lossless: Solution | None = None) -> Solution:
    cost = make_cost(plan.setting.machine)
    return Solution(plan=plan, predicted=forecast(plan, cost).outcome, certificate=CERTIFICATE, lossless=lossless)


def asked(plan: Plan, **changes: object) -> Request:
    setting = plan.setting
    request = Request(
        machine=setting.machine,
        profile=make_cost().profile,
        model=setting.model,
        workload=setting.workload,
        weight_format=setting.weight_format,
    )
    return replace(request, **changes)


def text_of(solution: Solution, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    show(summary(solution, asked(solution.plan, **changes)))
    return capsys.readouterr().out


def dense(**changes: object) -> Solution:
    return solved(in_hbm(make_setting(batch=2, prompt=4, output=4, **changes)))


def sparse(sparsity: float = 0.8) -> Solution:
    setting = make_setting(Selector.SWA, batch=2, prompt=10, output=10, sparsity=sparsity)
    lossless = solved(in_hbm(make_setting(batch=2, prompt=10, output=10)))
    return solved(in_hbm(setting), lossless)


def test_a_lossless_plan_stands_alone_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan = dense()
    text = text_of(replace(plan, lossless=plan), capsys)

    assert "tiny (fp16) on card (host box): 2 sequences of 4 + 4 tokens\n" in text
    assert "best plan, lossless\n" in text
    assert "best lossless plan" not in text
    assert "Lossless: the output is that of dense attention in fp16.\n" in text


def test_the_best_lossless_plan_stands_beside_a_sparse_one_with_what_sparsity_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = text_of(sparse(), capsys)

    lines = text.splitlines()
    heading = next(line for line in lines if "best plan" in line)
    assert heading.split("  ")[-1].strip() == "best lossless plan"
    both = next(line for line in lines if line.startswith("throughput"))
    assert both.count("tokens/s") == 2
    words = " ".join(text.split())
    assert (
        "80 % sparsity changes the output: swa had 1.19 times the perplexity of dense attention (measured on: " in words
    )
    assert "91M-parameter decoder, Python text" in words


def test_between_two_measured_shares_the_cost_is_called_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(text_of(sparse(0.85), capsys).split())

    assert "85 % sparsity changes the output: swa had about 1.27 times" in words
    assert "estimated from measurements on" in words


def test_rounded_values_are_said_to_change_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    formats = KvFormats(gpu=KvFormat.INT8, host=KvFormat.INT4)
    text = text_of(dense(kv_format=formats, weight_format=WeightFormat.INT8), capsys)

    assert "int8 KV and int4 KV and int8 weights are rounded: that changes the output too" in text
    assert "No plan is lossless with int8 weights." in text


def test_no_lossless_plan_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No lossless plan fits." in text_of(replace(sparse(), lossless=None), capsys)


def test_the_wish_is_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(dense(), capsys, objective=Objective.TPOT, concurrency=2, max_tpot_s=0.02, max_sparsity=0.0)

    assert (
        "wanted: least time per output token, dense attention, KV native or int8, 2 at once, at most 20 ms per output "
        "token" in " ".join(text.split())
    )


def test_phases_come_with_their_steps(capsys: pytest.CaptureFixture[str]) -> None:
    plan = newest_in_hbm(make_setting(batch=2, prompt=4, output=6), slots=6)
    lines = text_of(solved(plan), capsys).splitlines()
    start = lines.index("Phases of the whole batch at once")

    rows = [line for line in lines[start + 3 :] if not line.startswith(" ")]  # long limits go on in another line
    assert [line.split()[:2] for line in rows[:3]] == [
        ["prefill", "0"],
        ["gpu", "1-2"],
        ["gpu_cpu", "3-5"],
    ]


def test_waves_and_what_leaves_hbm_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    setting = make_setting(batch=5, prompt=4, output=6, concurrency=2)
    words = " ".join(text_of(solved(newest_in_hbm(setting, slots=3)), capsys).split())

    assert "2 sequences, in 3 waves" in words
    assert "KV on the host, fetched at each step (recent), written back at eviction" in words
    assert "Phases of the first of 3 waves" in words


def test_attention_on_the_cpu_and_streamed_weights_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    setting = make_setting(prompt=4, output=6, host_attention=True, weights_on_host=0.5)
    words = " ".join(text_of(solved(newest_in_hbm(setting, slots=3)), capsys).split())

    assert "KV on the host, attended by the CPU, written back at eviction" in words
    assert "50 % streamed from the host at every step" in words
    assert "2.5 KiB of it weights" in words


def test_memory_is_said_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    machine = make_machine(hbm_bytes=16 * 1024, dram_bytes=4096, usable_share=0.5)
    plan = in_hbm(make_setting(batch=2, machine=machine, kv_budget_bytes=3 * 1024))
    text = text_of(solved(plan), capsys)

    # 2 layers x 64 bytes x 2 sequences x 7 tokens; two layers of 2560 bytes and the head of 512
    assert "weights 5.5 KiB" in text
    assert "KV 1.75 KiB (room for 3 KiB)" in text
    assert "of 16 KiB: " in text
    assert "host memory  0 B of 2 KiB that may be pinned" in text


def test_the_certificate_splits_its_gap_and_names_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(dense(), capsys)

    assert "optimal: at most 0.30 % from the best possible (solver 0.10 %, discretisation 0.20 %)" in text
    assert "highs solved 7 of 60 options in 45 ms; bounds ruled out the others" in text
    assert "hbm_capacity_step_4 and 2 more" in " ".join(text.split())
    assert "profile ideal: test" in text


def test_a_plan_that_bounds_alone_settled_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan = dense()
    settled = replace(plan, certificate=replace(CERTIFICATE, solved=0, binding=()))
    text = text_of(settled, capsys)

    assert "bounds settled all of 60 options in 45 ms; highs had none to solve" in text
    assert "held back" not in text


def test_a_single_token_has_no_time_between_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(solved(in_hbm(make_setting(output=1))), capsys)

    assert "time per output token   -\n" in text


def test_a_pipe_gets_at_most_100_columns_without_colour_or_trailing_blanks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(name="[bold]" + "long-name-" * 12)
    lines = text_of(dense(model=model), capsys).splitlines()

    assert max(map(len, lines)) <= 100
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)
    assert "[bold]long-name-" in lines[0]


def test_a_terminal_gets_its_own_width_and_bold_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    plan = dense()
    show(summary(plan, asked(plan.plan)))
    text = sys.stdout.getvalue()

    assert "\x1b[1mMemory" in text
    plain = [line for line in text.splitlines() if "\x1b" not in line]
    assert max(map(len, plain)) <= 70


def test_a_simulation_reports_rates_beside_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(
        makespan_s=10.0,
        tokens_per_s=800.0,
        ttft_s=0.5,
        tpot_s=0.02,
        peak_hbm_bytes=2**30,
        peak_host_bytes=2**29,
        h2d_bytes=50 * 10**9,
        d2h_bytes=0,
        utilisation=Utilisation(gpu=0.75, h2d=0.25, d2h=0.0),
    )
    show(simulation_summary(in_hbm(make_setting()), outcome, "simulated by hand"))
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]

    assert ["host", "to", "GPU", "46.6 GiB, busy 25 %, 20 GB/s while busy"] in lines
    assert ["GPU", "to", "host", "nothing"] in lines
    assert ["GPU", "busy", "75", "%"] in lines
    assert ["simulated", "by", "hand"] in lines


SLOW_LINK = make_machine(link_bytes_per_s=1.0)
SLOW_ARITHMETIC = make_machine(flop_per_s=10.0)


@pytest.mark.parametrize(
    "plan, constants, limit",
    [
        (in_hbm(make_setting()), {}, "GPU: weights, "),
        (in_hbm(make_setting(machine=SLOW_ARITHMETIC)), {}, "GPU: arithmetic, "),
        (in_hbm(make_setting(prompt=2000, output=4)), {}, "GPU: attention, "),
        (
            in_hbm(make_setting(machine=make_machine(launch_s=1e6))),
            {"kernels_per_layer": 1},
            "GPU: kernel launches, 10",
        ),
        (in_hbm(make_setting()), {"step_overhead_s": 1e6}, "GPU: output layer, 100 %"),
        (newest_in_hbm(make_setting(machine=SLOW_LINK), 1), {}, "link, host to GPU"),
        (newest_in_hbm(make_setting(machine=SLOW_LINK, host_attention=True), 1), {}, "link, GPU to host"),
        (
            newest_in_hbm(make_setting(machine=make_machine(dram_bytes_per_s=1e-3), host_attention=True), 1),
            {},
            "CPU attention",
        ),
        (
            Plan(
                setting=make_setting(
                    machine=make_machine(hbm_bytes_per_s=1e9, flop_per_s=1e3), recompute=Recompute.TOKENS, prompt=64
                ),
                homes=replace(
                    in_hbm(make_setting(prompt=64)).homes, hbm=(0 + 1, 1 + 1, 2 + 1, 3 + 1), dropped=(63,) * 4
                ),
            ),
            {},
            "GPU: recomputation, ",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_last_phase_names_what_it_waits_for(plan: Plan, constants: dict[str, float], limit: str) -> None:
    cost = make_cost(plan.setting.machine, **constants)

    last = stretches(forecast(plan, cost), cost)[-1]

    assert last.limit.startswith(limit)


def test_stretches_cover_every_step_once_and_add_up_to_the_wave() -> None:
    plan = newest_in_hbm(make_setting(batch=2, prompt=4, output=6), slots=6)
    cost = make_cost(plan.setting.machine)
    priced = forecast(plan, cost)

    rows = stretches(priced, cost)

    covered = [step for row in rows for step in range(row.first_step, row.last_step + 1)]
    assert covered == list(range(6))
    assert sum(row.seconds for row in rows) == pytest.approx(priced.waves[0].seconds)
    assert all(0 <= share <= 1 for row in rows for share in (row.gpu, row.h2d, row.d2h))


def test_continuous_admission_mixes_prefill_and_decoding_in_one_stretch(capsys: pytest.CaptureFixture[str]) -> None:
    setting = make_setting(batch=5, prompt=4, output=6, concurrency=2, admission=Admission.CONTINUOUS)
    plan = in_hbm(replace(setting, kv_budget_bytes=2**20))
    cost = make_cost(setting.machine)
    priced = forecast(plan, cost)

    (row,) = stretches(priced, cost)

    assert (row.first_step, row.last_step) == (0, len(priced.waves[0].step_s) - 1)
    assert row.seconds == pytest.approx(priced.waves[0].seconds)
    words = " ".join(text_of(solved(plan), capsys).split())
    assert "up to 2 sequences, admitted as pages fall free" in words
    assert "KV of sequences that step back is dropped and prefilled again" in words


def test_a_phase_that_begins_with_the_prefill_has_its_decode_steps_only() -> None:
    plan = newest_in_hbm(make_setting(prompt=4, output=3), slots=2)
    cost = CostModel(machine=plan.setting.machine, profile=make_cost().profile)

    rows = stretches(forecast(plan, cost), cost)

    assert [(row.name, row.first_step, row.last_step) for row in rows] == [("prefill", 0, 0), ("gpu_cpu", 1, 2)]
    assert plan.setting.dtype is DType.FP16
