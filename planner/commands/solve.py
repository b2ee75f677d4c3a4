"""``planner solve``."""

from pathlib import Path

from planner.commands import options
from planner.inputs import Question, request_of
from planner.terminal import json_text, patiently, show, write_answer
from sim.outputs import require_outputs

EPILOG = """\
[bold]Examples[/bold]

  planner solve --gpu a100-40g

  planner solve --gpu rtx-4090 --model mistral-7b --batch 32 --prompt 1000

  planner solve --selector swa,pages --sparsity 0.9 --kv-formats int8,int4

  planner solve --lossless --objective tpot --concurrency all --json

  planner solve --gpu l40s --host-gib 512 --link-gb-s 25 -o plan.json

Sizes are binary (1 GiB = 2^30 bytes), rates decimal (1 GB/s = 10^9 bytes/s).
"""

_DEFAULT = Question()


def solve(
    gpu: options.Gpu = _DEFAULT.gpu,
    host: options.Host = _DEFAULT.host,
    hbm_gib: options.HbmGib = None,
    host_gib: options.HostGib = None,
    link_gb_s: options.LinkGbS = None,
    profile: options.Profile = None,
    kv_budget_gib: options.KvBudgetGib = None,
    model: options.Model = _DEFAULT.model,
    batch: options.Batch = _DEFAULT.batch,
    prompt: options.Prompt = _DEFAULT.prompt,
    output: options.Output = _DEFAULT.output,
    dtype: options.Dtype = _DEFAULT.dtype,
    weight_format: options.WeightFormat = _DEFAULT.weight_format,
    sparsity: options.Sparsity = None,
    selector: options.Selectors = None,
    kv_formats: options.KvFormats = None,
    lossless: options.Lossless = False,
    concurrency: options.Concurrency = _DEFAULT.concurrency,
    objective: options.Objective = _DEFAULT.objective,
    max_tpot_ms: options.MaxTpotMs = None,
    as_json: options.Json = False,
    out: options.OutputFile = None,
) -> None:
    """Find the best KV-caching plan: where each token's keys and values live at every step, and what that gives.

    It prints the phases of the plan and what limits each, speed, memory and certificate.

    Beside it stands the best plan that leaves the output unchanged.
    """
    question = Question(
        gpu=gpu,
        host=host,
        hbm_gib=hbm_gib,
        host_gib=host_gib,
        link_gb_s=link_gb_s,
        profile=profile,
        kv_budget_gib=kv_budget_gib,
        model=model,
        batch=batch,
        prompt=prompt,
        output=output,
        dtype=dtype,
        weight_format=weight_format,
        sparsity=sparsity,
        selector=tuple(selector or ()),
        kv_formats=tuple(kv_formats or ()),
        lossless=lossless,
        concurrency=concurrency,
        objective=objective,
        max_tpot_ms=max_tpot_ms,
    )
    _answer(question, as_json=as_json, out=None if out is None else Path(out))


def _answer(question: Question, *, as_json: bool, out: Path | None) -> None:
    require_outputs([out], [question.gpu, question.model, question.profile])
    request = request_of(question)
    from planner.solve import solve as best  # numpy and the solver: not before the question is known to be one
    from planner.worth import worth_of

    with patiently("planning"):
        solution = best(request)
        worth = worth_of(solution, request)
    from planner.answer import answer_to_json

    text = json_text(answer_to_json(solution, request, worth, command=question.command_line))
    if out is not None:
        write_answer(out, text)
    if as_json:
        print(text, end="")
        return
    from planner.summary import summary

    show(summary(solution, request, worth))
